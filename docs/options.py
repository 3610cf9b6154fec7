"""Tables of every option, read from the configuration classes themselves.

``conf.py`` puts a table wherever a page has the line ``<!-- options: NAME -->``, NAME being a section
("train"), or "all" for every section under a heading of its own. ``python docs/options.py`` prints them.
Where the line ``<!-- output -->`` follows a block of one command, it puts what that command prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from typing import Any

from pydantic import BaseModel

from trimtab import methods
from trimtab.cli.main import run
from trimtab.config import fields
from trimtab.data.sources import SourceConfig
from trimtab.evaluation.eval_config import EvalConfig
from trimtab.evaluation.judging.label import LabelConfig
from trimtab.evaluation.safety.suites import SafetyConfig
from trimtab.evaluation.tasks.config import TaskConfig
from trimtab.models.scratch import ScratchConfig
from trimtab.rewards.base import RewardTermConfig
from trimtab.rewards.judge_config import JudgeConfig
from trimtab.rewards.models import RewardModelArgs
from trimtab.rewards.steps import ProcessRewardModelArgs, StepFunctionArgs
from trimtab.rollouts.strategies import StrategyConfig
from trimtab.studies.compare import StageConfig, StudyConfig
from trimtab.studies.diagnose import DiagnoseConfig
from trimtab.studies.grid import SweepConfig, SweepMethod
from trimtab.studies.own_data import OwnDataConfig
from trimtab.studies.pipeline import PipelineConfig
from trimtab.studies.records import PipelineStage, Repeat

MARK = re.compile(r"^<!-- options: (\w+) -->$", re.MULTILINE)
OUTPUT = re.compile(r"^```\n(trimtab [^`]+?)\n```\n\n<!-- output -->$", re.MULTILINE)
"""A command in a block of its own, and where its output goes. It must print the same on every machine."""

ROWS: dict[str, tuple[type[BaseModel], str]] = {
    "source": (SourceConfig, "Each table of `[[data.sources]]`, `[[data.heldout]]`, `prompts` and `pairs`."),
    "term": (RewardTermConfig, "Each entry of `reward.terms`."),
    "scorer": (RewardModelArgs, "`args` of the reward term `reward_model`."),
    "step_scorer": (ProcessRewardModelArgs, "`args` of the reward term `process_reward_model`."),
    "step_function": (StepFunctionArgs, "`args` of the reward term `steps`."),
    "strategy": (StrategyConfig, "Each entry of `sampling.mix`."),
    "diagnose": (DiagnoseConfig, "`trimtab diagnose FILE.toml`."),
    "own": (OwnDataConfig, "`trimtab compare --model … --data …`, for your own feedback."),
    "study": (StudyConfig, "The top of a study's file, for `trimtab compare`."),
    "stage": (StageConfig, "Each `[stages.NAME]`; its other keys are the method's own sections."),
    "pipeline": (PipelineConfig, "The top of a pipeline's file, for `trimtab pipeline`."),
    "step": (PipelineStage, "Each `[stages.NAME]` of a pipeline and `[prepare.NAME]` of a sweep."),
    "repeat": (Repeat, "Each table of `[[repeat]]` in a pipeline."),
    "sweep": (SweepConfig, "The top of a sweep's file, for `trimtab sweep`."),
    "swept": (SweepMethod, "Each `[methods.NAME]` of a sweep; its other keys are the method's own sections."),
    "scratch": (ScratchConfig, "`[scratch]` of a study, in place of `[model]`."),
    "eval": (EvalConfig, "The file of `trimtab eval`."),
    "judge": (JudgeConfig, "`[judge]`, and `args` of the reward term `judge`."),
    "task": (TaskConfig, "Each table of `[[tasks]]` in the file of `trimtab eval`."),
    "safety": (SafetyConfig, "Each table of `[[safety]]` in the file of `trimtab eval`."),
    "label": (LabelConfig, "The file of `trimtab label`."),
}
"""Tables that are no section of a method."""


def sections() -> dict[str, tuple[type[BaseModel], str]]:
    """Every section of every method, and which methods have it."""
    owners: dict[str, list[str]] = {}
    classes: dict[str, type[BaseModel]] = {}
    for method in methods.names():
        for name, info in methods.find(method).Config.model_fields.items():
            assert info.annotation is not None
            # Where methods take a section in several forms, that with the most options is shown.
            if name not in classes or issubclass(info.annotation, classes[name]):
                classes[name] = info.annotation
            owners.setdefault(name, []).append(method)

    def who(name: str) -> str:
        if owners[name] == methods.names():
            return "Every method."
        return ", ".join(f"`trimtab {owner}`" for owner in owners[name]) + "."

    return {name: (cls, who(name)) for name, cls in classes.items()}


def table(name: str) -> str:
    """One Markdown table. Raises KeyError for a name that there is not."""
    known = sections()
    cls = known[name][0] if name in known else ROWS[name][0]
    prefix = f"{name}." if name in known else ""
    lines = ["| option | type | default | |", "|---|---|---|---|"]
    for key, kind, text, default in fields(cls, prefix):
        lines.append(f"| `{key}` | {_kind(kind)} | {_default(default)} | {_text(text)} |")
    return "\n".join(lines)


def every() -> str:
    """All tables, each under a heading."""
    parts = [f"### `[{name}]`\n\n{who}\n\n{table(name)}" for name, (_, who) in sections().items()]
    titles = {"source": "A source", "term": "A reward term", "study": "A study", "stage": "A stage"}
    titles |= {"scratch": "A new model", "eval": "An evaluation"}
    titles |= {"pipeline": "A pipeline", "step": "A stage of a pipeline", "repeat": "A repeated block"}
    titles |= {"sweep": "A sweep", "swept": "A method of a sweep"}
    titles |= {"judge": "A judge", "label": "A labelling", "diagnose": "A critic held against Monte-Carlo"}
    titles |= {"step_scorer": "A learned reward of steps", "step_function": "A function of steps"}
    titles |= {
        "scorer": "A learned reward",
        "strategy": "A way of drawing",
        "own": "A comparison on your own data",
    }
    titles["safety"] = "A safety suite"
    titles["task"] = "A task"
    parts += [f"### {titles[name]}\n\n{where}\n\n{table(name)}" for name, (_, where) in ROWS.items()]
    return "\n\n".join(parts)


def fill(page: str) -> str:
    """The page with a table or a command's output in place of each mark."""
    page = OUTPUT.sub(lambda found: f"```\n{found[1]}\n```\n\n```\n{printed(found[1])}\n```", page)
    return MARK.sub(lambda mark: every() if mark[1] == "all" else table(mark[1]), page)


def printed(command: str) -> str:
    """What ``trimtab …`` prints, 80 columns wide. Raises ValueError where it is refused."""
    words = shlex.split(command.replace("\\\n", " "))
    out, err, before = io.StringIO(), io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(words[1:])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    if code not in (0, 1):
        raise ValueError(f"{command}: {err.getvalue().strip()}")
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _kind(kind: str) -> str:
    if kind.startswith("list[") and kind.endswith("Config]"):
        return "list of tables"
    if kind.endswith("Config]"):
        return "table of tables"
    if kind.endswith("Config"):
        return "table"
    return "`" + kind.replace("|", r" \| ") + "`"


def _default(default: Any) -> str:
    if default is ...:
        return "required"
    if default is None or default == "" or default == {} or default == []:
        return "–"
    if isinstance(default, str):
        default = default.replace("\n", "\\n")
    return f"`{str(default).lower()}`" if isinstance(default, bool) else f"`{default}`"


def _text(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", r"\|")


if __name__ == "__main__":
    print(every())
