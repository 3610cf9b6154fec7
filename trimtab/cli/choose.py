"""``trimtab choose``: parsing, and printing what the call gives."""

from __future__ import annotations

import argparse
from typing import Any

from trimtab.errors import InputError

CHOOSE = "from what you have to a method, with reasons, a runner-up, a pilot and a recipe"
BARE = (
    "verifier",
    "reward_model",
    "judge",
    "exploration",
    "reasoning",
    "long_horizon",
    "noisy",
    "keep_short",
)
"""Options that stand alone for yes."""


def choose(arguments: list[str], parser: argparse.ArgumentParser) -> int:
    """``trimtab choose [--option value …]``."""
    parser.usage = "trimtab choose --model M --data FILE | --have pairs:20000 [--option value ...]"
    from trimtab.config import fields, load_config
    from trimtab.studies.choose_config import ChooseConfig

    for key, kind, text, default in fields(ChooseConfig):
        shown = "" if default in ("", [], {}) else f" (default {default})"
        more: dict[str, Any] = {}
        if key in (*BARE, "reuse"):
            more = {"nargs": "?", "const": "yes"}
        elif key in ("data", "columns", "have"):
            more = {"action": "append"}
        metavar = kind if "|" in kind else {"data": "FILE", "columns": "YOURS=OURS"}.get(key, kind.upper())
        flag = f"--{key.replace('_', '-')}"
        parser.add_argument(
            flag, dest=key, default=argparse.SUPPRESS, metavar=metavar, help=text + shown, **more
        )
    parser.add_argument("--json", action="store_true", help="everything, for machines")
    options = vars(parser.parse_args(arguments))
    machine = options.pop("json")
    if "have" in options:
        options["have"] = ",".join(options["have"])
    if "columns" in options:
        options["columns"] = _columns(options["columns"])
    from trimtab.studies.choose_command import as_json, run_choose

    chosen = run_choose(load_config(ChooseConfig, None, options))
    print(as_json(chosen) if machine else chosen.text())
    return 0


def _columns(given: list[str]) -> dict[str, str]:
    pairs = [part.strip() for text in given for part in text.split(",")]
    wrong = next((part for part in pairs if part.count("=") != 1), None)
    if wrong is not None:
        raise InputError(f"trimtab choose: --columns {wrong!r}: write YOURS=OURS, as question=prompt")
    return dict(part.split("=") for part in pairs)
