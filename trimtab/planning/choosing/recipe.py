"""The recipe of a choice, as TOML with the source of every value behind it: one method, or a pipeline.

Text only. Whoever writes it to a file validates it by the method's own options first.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.config import toml_value
from trimtab.planning.choosing.decide import Choice
from trimtab.planning.choosing.needs import ONLINE
from trimtab.planning.choosing.pilot import heldout_fraction
from trimtab.planning.choosing.situation import HELD_OUT, KINDS, SHOWN_ACCURACY, Situation
from trimtab.planning.choosing.sources import OURS, SECTION, Hyper, rows_of

SAMPLING = (*ONLINE, "spin")
FILL_IN = ("rewards.py:score", "YOUR_JUDGE", "MODEL")
"""Names that a user has to replace before a recipe runs."""
DATA_FILE = "data/{kind}.jsonl"
"""Where a recipe looks for feedback whose file was not given."""

COMPARED = ("pairs", "rankings", "ratings")


@dataclass(frozen=True, slots=True)
class Source:
    """A file of feedback."""

    path: str
    kind: str
    columns: Mapping[str, str] = field(default_factory=dict)
    skip: int = 0
    """Malformed rows, which a run leaves out."""

    def value(self) -> dict[str, Any]:
        """As a configuration has it."""
        out: dict[str, Any] = {"path": self.path}
        if self.columns:
            out["columns"] = dict(self.columns)
        if self.skip:
            out["on_bad_row"] = "skip"
        return out


@dataclass(frozen=True, slots=True)
class Setting:
    """What a recipe needs beyond the choice."""

    model: str = "MODEL"
    name: str = "choose"
    """Of the folder below runs/."""
    sources: Sequence[Source] = ()
    new_tokens: Hyper = field(
        default_factory=lambda: Hyper("sampling.max_new_tokens", 256, f"{OURS}: the default of trimtab")
    )
    more: Sequence[Hyper] = ()
    """Of every stage: what makes it fit, and what the size of the model changes."""
    rates: Mapping[str, Hyper] = field(default_factory=dict)
    """Stage → its learning rate, where the model's size decides it."""
    budgets: Mapping[str, Hyper] = field(default_factory=dict)
    """Stage → the time that it may take."""


def several(choice: Choice) -> bool:
    """A pipeline is needed."""
    return len(choice.stages) > 1


def recipe(choice: Choice, setting: Setting, file: str) -> str:
    """The text of the recipe."""
    lines = _heading(choice, file)
    if not several(choice):
        tables = stage_tables(choice.method, choice, setting)
        tables["run"] = [Hyper("run.out", f"runs/{setting.name}", "")]
        for table, values in {"model": [Hyper("model.path", setting.model, "")], **tables}.items():
            lines += _table(table, table, values)
        return "\n".join(lines) + "\n"
    lines += ["", f'title = "{_title(choice)}"', f'out = "runs/{setting.name}"', ""]
    lines += ["[model]", f"path = {toml_value(setting.model)}"]
    for stage in choice.stages:
        lines += ["", f"[stages.{stage}]", f'method = "{stage}"']
        for table, values in stage_tables(stage, choice, setting).items():
            lines += _table(f"stages.{stage}.{table}", table, values)
    return "\n".join(lines) + "\n"


def _title(choice: Choice) -> str:
    return ", then ".join(choice.stages)


def _heading(choice: Choice, file: str) -> list[str]:
    what = "pipeline" if several(choice) else choice.method
    because = "; ".join(r.because for r in choice.reasons if r.points > 0)
    lines = [f"# {_title(choice)}: written by trimtab choose.", "#", f"#     trimtab {what} {file}", "#"]
    lines += textwrap.wrap(f"Why: {because}.", 100, initial_indent="# ", subsequent_indent="# ")
    if choice.runner_up:
        text = f"Runner-up: {choice.runner_up}, if {choice.prefer}."
        lines += textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")
    return lines


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_value(name)


def inline(value: Any) -> str:
    """A value as TOML writes it on one line, keys without quotes where they need none."""
    if isinstance(value, Mapping):
        pairs = [f"{_key(key)} = {inline(inner)}" for key, inner in value.items()]
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(inline(inner) for inner in value) + "]"
    return toml_value(value)


def _table(name: str, prefix: str, values: Sequence[Hyper]) -> list[str]:
    lines = ["", f"[{name}]"]
    for h in values:
        source = f"  # {h.source}" if h.source else ""
        lines.append(f"{h.key.removeprefix(prefix + '.')} = {inline(h.value)}{source}")
    return lines


def stage_tables(stage: str, choice: Choice, setting: Setting) -> dict[str, list[Hyper]]:
    """A stage's sections → its values, in the order of a file."""
    found = {h.key: h for h in (*_data(stage, choice, setting), *choice.hypers[stage])}
    if stage in setting.rates:
        found["train.lr"] = setting.rates[stage]
    if stage in SAMPLING:
        found["sampling.max_new_tokens"] = setting.new_tokens
    if stage in ONLINE:
        found |= {h.key: h for h in _reward(choice, setting)}
    if stage == "ppo" and "reward" in choice.stages:
        source = "Huang et al., 2024: the critic starts from the reward model"
        found["critic.path"] = Hyper("critic.path", "{reward}/model", source)
    found |= {h.key: h for h in setting.more}
    if stage in setting.budgets:
        found["train.time_budget_s"] = setting.budgets[stage]
    if "data.heldout_fraction" in found:
        found["train.eval_every"] = Hyper("train.eval_every", _eval_every(stage, found, choice), OURS)
    order = (
        "data",
        "sampling",
        SECTION[stage],
        "reward_model",
        "critic",
        "reward",
        "train",
        "adapter",
        "model",
    )
    tables: dict[str, list[Hyper]] = {}
    for name in dict.fromkeys((*order, *(key.partition(".")[0] for key in found))):
        # A table below a section (mixed.labels.beta) is written as a dotted key of it.
        values = [h for h in found.values() if h.key.partition(".")[0] == name]
        if values and name != "model":
            tables[name] = values
    return tables


def _eval_every(stage: str, found: Mapping[str, Hyper], choice: Choice) -> int:
    """About five evaluations in the run."""
    if "train.steps" in found:
        steps = int(found["train.steps"].value)
    else:
        epochs = float(found["train.epochs"].value) if "train.epochs" in found else 1.0
        steps = int(epochs * rows_of(stage, choice.situation)) // int(found["train.batch_groups"].value)
    return max(1, steps // 5)


def sources_of(stage: str, s: Situation, sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What a stage reads, of what there is; the files that stand in where none was given."""
    wanted = _kinds(stage, s)
    given = [source for source in sources if source.kind in wanted]
    if not given and stage in ONLINE:
        given = list(sources)
    if given:
        return [source.value() for source in given]
    kinds = [kind for kind in wanted if s.count(kind)] or list(wanted[:1])
    return [{"path": DATA_FILE.format(kind=kind)} for kind in kinds]


def _kinds(stage: str, s: Situation) -> tuple[str, ...]:
    if stage in ("spin", "process-reward"):
        return ("demonstrations",) if stage == "spin" else ("steps",)
    if stage == "sft":
        return ("demonstrations",) if s.count("demonstrations") else (*COMPARED, "thumbs")
    if stage == "reward":
        return COMPARED if s.comparisons else ("scores",)
    if stage == "kto":
        return ("thumbs",) if s.count("thumbs") else COMPARED
    if stage == "mixed":
        return (*COMPARED, "thumbs", "demonstrations")
    if stage in ONLINE:
        return (
            ("prompts",) if s.count("prompts") else (*COMPARED, "thumbs", "demonstrations", "scores", "steps")
        )
    return COMPARED if s.comparisons else ("thumbs",)


def _data(stage: str, choice: Choice, setting: Setting) -> list[Hyper]:
    s = choice.situation
    values = [Hyper("data.sources", sources_of(stage, s, setting.sources), "")]
    share = heldout_fraction(stage, s)
    if share:
        why = (
            f"{OURS}: what eval_reward is measured on"
            if stage in ONLINE
            else f"{OURS}: what eval_loss is measured on"
            if stage in ("sft", "spin")
            else f"{OURS}: {HELD_OUT} rows tell {100 * SHOWN_ACCURACY:.0f} % from a coin"
        )
        values.append(Hyper("data.heldout_fraction", share, why))
    values.append(Hyper("data.on_long", "skip", f"{OURS}: rows over the context are counted and left out"))
    return values


def _reward(choice: Choice, setting: Setting) -> list[Hyper]:
    s = choice.situation
    terms: list[dict[str, Any]] = []
    if s.verifier:
        terms.append({"name": "rewards.py:score" if s.verifier == "yes" else s.verifier})
    if s.reward_model:
        path = "MODEL" if s.reward_model == "yes" else s.reward_model
        terms.append({"name": "reward_model", "label": "learned", "args": {"path": path}})
    if s.judge and not terms:
        terms.append({"name": "judge", "args": judge_options(choice)})
    if "reward" in choice.stages:
        terms.append({"name": "reward_model", "label": "learned", "args": {"path": "{reward}/model"}})
    if "process-reward" in choice.stages:
        args = {"path": "{process-reward}/model"}
        terms.append({"name": "process_reward_model", "label": "steps", "args": args})
    return [Hyper("reward.terms", terms, "")]


def judge_options(choice: Choice) -> dict[str, Any]:
    """``args`` of the reward term "judge": an address and a model, or a custom judge's name."""
    given = choice.situation.judge
    mode = {"online-dpo": "pairwise"}.get(choice.method, "listwise")
    if "://" in given:
        address, _, model = given.partition(" ")
        return {"kind": "endpoint", "mode": mode, "base_url": address, "model": model or "YOUR_JUDGE"}
    if given != "yes":
        return {"kind": "custom", "mode": mode, "name": given}
    return {"kind": "endpoint", "mode": mode, "base_url": "http://localhost:8000/v1", "model": "YOUR_JUDGE"}


def to_fill_in(text: str) -> list[str]:
    """What has to be replaced in a recipe before it runs."""
    names = [name for name in FILL_IN if f'"{name}"' in text]
    files = (DATA_FILE.format(kind=kind) for kind in KINDS)
    return names + [name for name in files if f'"{name}"' in text]


def audit_recipe(choice: Choice, setting: Setting, run: str) -> str:
    """The file of ``trimtab audit`` for a reward that was learned, or given with comparisons; or nothing.

    ``run``: the folder that the pilot writes, which is there when the audit is run.
    """
    s = choice.situation
    compared = [source for source in setting.sources if source.kind in COMPARED]
    if "reward" in choice.stages and compared:
        folder = f"{run}/reward" if several(choice) else run
        path, share = f"{folder}/model", heldout_fraction("reward", s)
    elif s.reward_model not in ("", "yes") and compared:
        path, folder, share = s.reward_model, f"runs/{setting.name}-audit", 0.0
    else:
        return ""
    lines = [
        "# Put the reward on trial before a policy learns from it: written by trimtab choose.",
        f"title = {toml_value(f'The reward in {path}')}",
        f"out = {toml_value(f'{folder}/audit.json')}",
        *([f"heldout_fraction = {share}  # what the reward model was not trained on"] if share else []),
        "",
        "[reward]",
        f"terms = {inline([{'name': 'reward_model', 'args': {'path': path}}])}",
    ]
    for source in compared:
        lines += ["", "[[pairs]]", *(f"{key} = {inline(value)}" for key, value in source.value().items())]
    return "\n".join(lines) + "\n"
