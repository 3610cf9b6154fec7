"""What the rows and the options of ``trimtab choose`` say against each other, or would allow."""

from __future__ import annotations

from trimtab.errors import InputError
from trimtab.planning.choosing.situation import Situation
from trimtab.studies.choose_config import VERIFIERS
from trimtab.studies.choose_data import ANSWERS, Looked


def check_prompts(s: Situation, found: Looked | None) -> None:
    """Raises InputError for prompts with answers to check, and nothing said that checks them."""
    if found is None or s.scorer or s.rows != s.count("prompts"):
        return
    if term := found.verifier():
        raise InputError(
            f"trimtab choose: the rows are prompts with answers to check, and nothing is said to check them: "
            f"give --verifier {term}{_demonstrations(found)}"
        )


def _demonstrations(found: Looked) -> str:
    """How the rows become demonstrations, where they have a column to imitate."""
    if not found.imitated:
        return ""
    return f"; or make them demonstrations (--columns {found.imitated}=completion)"


def check_verifier(s: Situation, found: Looked | None, warnings: list[str]) -> None:
    """Raises InputError for a built-in verifier of rows without what it reads."""
    if found is None or s.verifier not in VERIFIERS:
        return
    rows = found.tests if s.verifier == "code" else found.answers
    what = "unit tests" if s.verifier == "code" else f"a column {' or '.join(ANSWERS)}"
    if not rows:
        raise InputError(
            f"--verifier {s.verifier}: none of the rows has {what}, which it reads; their columns are "
            f"{', '.join(found.names) or 'unknown'}: rename one (--columns YOURS=OURS), or give a function "
            "(--verifier FILE.py:NAME)"
        )
    if s.verifier == "numeric" and not found.numbers:
        raise InputError(
            "--verifier numeric: none of the rows' answers is a number; exact_match compares texts"
        )
    if rows < found.all_rows:
        warnings.append(f"only {rows:,} of {found.all_rows:,} rows have {what}, which {s.verifier} reads")


def hints(s: Situation, found: Looked | None, warnings: list[str]) -> None:
    """What the data would allow that was not said."""
    if found is None:
        return
    if not s.verifier and (term := found.verifier()):
        warnings.append(f"the rows have answers to check: --verifier {term} would score new ones")
    if ties := found.rows.get("ties"):
        warnings.append(f"{ties:,} rows are ties, which order nothing and are left out")
    if found.shared * 10 < found.prompts and s.comparisons == 0 and s.scorer is False and s.count("thumbs"):
        warnings.append("hardly a prompt has several answers: nothing is compared with anything")
