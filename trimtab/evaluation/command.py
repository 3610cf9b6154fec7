"""``trimtab eval``: a policy, mostly against another, or a reward model on held-out comparisons.

The figures go to ``eval.json``, the page beside it, the verdict to the terminal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.evaluation.eval_config import EvalConfig
from trimtab.evaluation.eval_inputs import Problems, read_comparisons
from trimtab.evaluation.eval_verdict import verdict
from trimtab.evaluation.figures import share_with_interval
from trimtab.evaluation.measured import Measured, measure, named
from trimtab.evaluation.reward_model import judge_lines
from trimtab.evaluation.reward_scores import held_out_calibration, saved_calibration, scorer_report
from trimtab.rewards.calibration import calibration_line
from trimtab.rewards.models import RewardModelArgs, build_reward_model

FORMAT = 1
DRAWING = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")
"""What of the sampling options says how answers were drawn."""
SECTIONS = (
    *("reward", "win_rate", "judged", "attributes", "preference", "drift", "decoding", "tasks", "safety"),
)


def run_eval(config: EvalConfig, say: Callable[[str], object] | None = None) -> tuple[str, bool]:
    """Measure, write ``out`` and its page; what the terminal says, and whether no gate failed."""
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    out = Path(config.out)
    if out.suffix != ".json" or out.is_dir():
        raise InputError(f"out: {out}: give a file that ends in .json; the page stands beside it")
    if not out.parent.is_dir():
        raise InputError(f"out: {out.parent}: no such folder to write {out.name} in")
    audit = _audited(config.audit)
    if config.reward_model is not None:
        sections, lines = _reward_model(config, config.reward_model)
    else:
        assert config.model is not None
        sections, lines = _policy(config, measure(config, config.model, say), audit)
    _write(out, json.dumps(sections, indent=2, allow_nan=False) + "\n")
    from trimtab.evaluation.pages.command import report

    page = report([out])
    found = sections["verdict"]
    rest = [line for line in lines if line not in found["lines"]]  # a warning once
    told = [found["sentence"], *found["lines"], "", *rest, "", f"figures  {out}", f"report   {page}"]
    return "\n".join(told), found["gate"] != "failed"


def _policy(config: EvalConfig, found: Measured, audit: dict[str, Any] | None) -> tuple[Any, list[str]]:
    assert config.model is not None
    prompts = found.sections.pop("answered", None)
    sections = {
        **_head(config, config.model.path),
        "against": named(config.against or config.reference),
        "reference": named(config.reference),
        "samples": config.samples,
        "prompts": prompts,
        "sampling": config.sampling.model_dump(mode="json", include=set(DRAWING)),
        **{name: found.sections.get(name) for name in SECTIONS},
        "audit": audit,
        "samples_shown": found.shown,
        "problems": found.problems.rows,
        "configuration": config.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
    }
    sections["verdict"] = verdict(sections)
    return sections, found.lines


def _head(config: EvalConfig, path: str) -> dict[str, Any]:
    model = named(path)
    assert model is not None
    return {
        "format": FORMAT,
        "title": config.title or f"{model['name']}, evaluated",
        "model": model,
        "seed": config.seed,
        "lineage": _lineage(config.run),
    }


def _lineage(run: str) -> dict[str, Any] | None:
    """What a run's page shows of where it comes from."""
    try:
        found = json.loads((Path(run) / "lineage.json").read_text(encoding="utf-8")) if run else None
    except (OSError, ValueError):
        return None
    keep = ["method", "status", "parent", "model", "seed", "steps", "wall_s", "processes", "ancestors"]
    keep += ["packages", "code"]
    return {key: found[key] for key in keep if key in found} if isinstance(found, dict) else None


def _audited(path: str) -> dict[str, Any] | None:
    """The audit of the reward that drove the run."""
    if not path:
        return None
    file = Path(path) / "audit.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"audit: {file}: cannot be read: {error.strerror}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or "trusted" not in (found.get("verdict") or {}):
        raise InputError(f"audit: {file}: no audit.json of trimtab audit")
    return found


def _write(out: Path, text: str) -> None:
    try:
        temporary = out.with_name(f".{out.name}.partial")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise InputError(f"out: cannot write {out}: {error.strerror}") from None


def _reward_model(config: EvalConfig, args: RewardModelArgs) -> tuple[dict[str, Any], list[str]]:
    """Accuracy, calibration and length figures on the held-out comparisons."""
    problems = Problems()
    groups = read_comparisons(config, problems)
    # What was not asked for stays so: options say whether they were.
    scorer = build_reward_model(args.model_dump(exclude_unset=True))
    report = scorer_report(scorer, groups, seed=config.seed)
    if (saved := saved_calibration(scorer, groups)) is not None:
        report["calibrated"] = saved
    lines = judge_lines(report, "reward model")
    if config.calibrate:
        report["split"] = held_out_calibration(scorer, groups, seed=config.seed)
        lines.append(calibration_line(report["split"]))
    low, high = report["accuracy_ci95"]
    words = f"{share_with_interval(report, 'accuracy')} of {report['pairs']:,} held-out pairs (chance 50 %)"
    if low > 0.5:
        sentence = f"The reward model orders {words} as the labels do."
    elif high < 0.5:
        sentence = f"The reward model has the labels upside down: it orders {words} as they do."
    else:
        sentence = f"Nothing can be claimed with this reward model: it orders {words} as the labels do."
    sections = {
        **_head(config, args.path),
        "reward_model": report,
        "problems": problems.rows,
        "configuration": config.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
    }
    warnings = [line for line in lines if line.startswith("warning")]
    sections["verdict"] = {"sentence": sentence, "lines": warnings, "gate": None, "worse": high < 0.5}
    return sections, [line for line in lines if line not in warnings]
