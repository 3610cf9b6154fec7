"""What a sweep's file may say, and the runs that it stands for.

``[sweep]`` holds options by their names in the methods' sections, each with a list of values:

    [sweep]
    "dpo.beta" = [0.05, 0.1, 0.3]        several keys: every combination, or zip = true: the first of each, …
    seeds = [0, 1, 2]

``[methods.NAME.sweep]`` adds to it for one method, or takes its place key by key.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from trimtab import methods
from trimtab.config import fields, toml_value
from trimtab.errors import InputError
from trimtab.studies.config import (
    FOLDER_NAME,
    PROCESS_REWARD,
    REWARD,
    EvaluationConfig,
    StageConfig,
    StudyFile,
    check_folder,
)
from trimtab.studies.planner import Planner
from trimtab.studies.records import SAMPLE, Order, PipelineStage, Step
from trimtab.studies.stages import check_sections

SEEDS, ZIP = "seeds", "zip"
"""Keys of [sweep] that are no options: options have a dot."""
LONGEST = 60
"""Characters of a run's folder, at most; a longer name gives way to a number."""


class SweepMethod(StageConfig):
    """One method of a sweep. All other keys are that method's own sections."""

    method: str = Field("", description="sft, dpo, ppo, grpo, …; empty takes the table's name")
    start: str = Field(
        "", description="prepared stage whose model it starts from, or base; empty takes the newest"
    )
    reference: str = Field("", description="what a method is anchored to: start, base, or a prepared stage")
    sweep: dict[str, Any] = Field({}, description="options that are swept for this method, seeds and zip")


class SweepEvaluation(EvaluationConfig):
    """What every run is measured on; the options are those of ``trimtab compare``."""

    reference: str = Field(
        "",
        description="prepared stage that runs are compared with, or base; empty takes what they start from",
    )


class SweepConfig(StudyFile):
    """Options of ``trimtab sweep``."""

    title: str = Field("Sweep", description="heading of the table and the report")
    out: str = Field("runs/sweep", description="folder of the sweep; {out} stands for it in any string")
    sweep: dict[str, Any] = Field(
        {}, description="options that are swept for every method: lists of values by key; seeds; zip"
    )
    prepare: dict[str, PipelineStage] = Field(
        {}, description="stages that are run once, before: reward models, samples with labels"
    )
    common: dict[str, Any] = Field(
        {}, description="sections of every method, such as train; a method's own options go before them"
    )
    methods: dict[str, SweepMethod] = Field(description="what is run with each combination")
    on_failure: Literal["continue", "stop"] = Field(
        "continue", description="a run that fails: note it and go on with the next, or end the sweep"
    )
    keep: Literal["all", "models"] = Field(
        "all", description="what stays of a run that was measured: everything, or no checkpoints"
    )
    evaluation: SweepEvaluation = Field(default_factory=SweepEvaluation)


@dataclass(slots=True)
class Trial:
    """One run of a sweep."""

    block: str
    """Its table among the methods."""
    options: dict[str, Any]
    """The swept options, by dotted name."""
    seed: int
    step: Step

    @property
    def name(self) -> str:
        """Its folder."""
        return self.step.folder


def trials(config: SweepConfig, order: Order) -> list[Trial]:
    """Every run, in order, with every option checked. ``order``: what is prepared. Raises InputError."""
    if not config.methods:
        raise InputError("methods is empty: add [methods.NAME] with the method's sections")
    made: list[Trial] = []
    for block, method in config.methods.items():
        made += _trials_of(config, order, block, method)
    names = [trial.name for trial in made]
    if len(made) == 1:
        raise InputError("sweep: one method, no option and one seed: nothing is swept; add a list of values")
    for name in names:
        if names.count(name) > 1 or name in config.prepare:
            raise InputError(f"{name}: two runs would have this folder; give a method's table another name")
    return made


def _trials_of(config: SweepConfig, order: Order, block: str, method: SweepMethod) -> list[Trial]:
    key = f"methods.{block}"
    try:
        check_folder(key, block)
    except ValueError as error:
        raise InputError(str(error)) from None
    name = method.method or block
    if name not in methods.names():
        raise InputError(f"{key}.method: {name!r} is none of {', '.join(methods.names())}")
    if name in (REWARD, PROCESS_REWARD, SAMPLE):
        raise InputError(f"{key}: {name} makes no policy, so there is nothing to compare; see [prepare.NAME]")
    shared, own = flattened(config.sweep), flattened(method.sweep)
    swept, seeds, zipped = _checked(f"{key}.sweep", shared | own, name, config.seed)
    sections = _merged(config.common, method.model_extra or {})
    check_sections(key, sections, {option.split(".")[0] for option in [*swept, "train", "model"]})
    for option in [*swept, "train.seed"]:
        if _lookup(sections, option) is not None and (option in swept or SEEDS in shared | own):
            other = "swept" if option in swept else "given as seeds"
            raise InputError(f"{key}: {option} is both set and {other}; remove one")
    if "path" in sections.get("model", {}):
        raise InputError(f"{key}.model.path: runs start from [model], or from a stage: write start = …")
    found = []
    for number, (options, seed) in enumerate(itertools.product(_points(swept, zipped), seeds), start=1):
        values = _with(sections, options)
        if SEEDS in shared | own:
            values = _with(values, {"train.seed": seed})
        stage = PipelineStage.model_validate(
            {"method": name, "start": method.start, "reference": method.reference, **values}
            | {"reward_seen": method.reward_seen, "sees_judge": method.sees_judge}
        )
        folder = _folder(block, options, seed if len(seeds) > 1 else None, number)
        told = "".join(f" with {option} = {toml_value(value)}" for option, value in options.items())
        step = Planner(config, order, f"{key}{told}", stage, folder).step()
        found.append(Trial(block, options, step.config.train.seed, step))
    return found


def flattened(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"dpo": {"beta": […]}} and {"dpo.beta": […]} alike as {"dpo.beta": […]}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _checked(
    key: str, table: dict[str, Any], method: str, seed: int
) -> tuple[dict[str, list[Any]], list[int], bool]:
    """The swept options, the seeds, and whether values go together instead of by every combination."""
    known = [name for name, *_ in fields(methods.find(method).Config)]
    swept: dict[str, list[Any]] = {}
    for name, values in table.items():
        if name == ZIP:
            if not isinstance(values, bool):
                raise InputError(f"{key}.zip: {values!r}: true or false")
            continue
        if name != SEEDS and name not in known:
            last = [k for k in known if k.split(".")[-1] == name.split(".")[-1]]
            near = difflib.get_close_matches(name, last or known, n=1, cutoff=0.0 if last else 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{key}: {method} has no option {name!r}{hint}")
        if not isinstance(values, list) or not values:
            raise InputError(f"{key}.{name}: {values!r}: give a list of one or more values")
        together = name != SEEDS and table.get(ZIP) is True  # where one value may go with several others
        if not together and any(value in values[:k] for k, value in enumerate(values)):
            raise InputError(f"{key}.{name}: {values!r}: a value stands there twice")
        if name == SEEDS:
            if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
                raise InputError(f"{key}.seeds: {values!r}: give whole numbers of 0 or more")
        elif name == "train.seed" or name.startswith(("run.", "model.path")):
            better = {"train.seed": "use seeds", "model.path": "write a method's table for each start"}
            raise InputError(
                f"{key}: {name} cannot be swept: {better.get(name, 'each run has a folder of its own')}"
            )
        else:
            swept[name] = values
    zipped = table.get(ZIP, False)
    lengths = {name: len(values) for name, values in swept.items()}
    if zipped and len(swept) < 2:
        raise InputError(f"{key}.zip has no effect on fewer than two options")
    if zipped and len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise InputError(f"{key}.zip: lists of unequal length: {told}")
    rows = list(zip(*swept.values(), strict=True)) if zipped else []
    for k, row in enumerate(rows):
        if row in rows[:k]:
            raise InputError(f"{key}.zip: {row!r} stands there twice")
    return swept, table.get(SEEDS, [seed]), zipped


def _merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Both, table by table; where both have an option, its own."""
    out = dict(common)
    for name, value in own.items():
        other = out.get(name)
        out[name] = _merged(other, value) if isinstance(other, dict) and isinstance(value, dict) else value
    return out


def _points(swept: dict[str, list[Any]], zipped: bool) -> Iterator[dict[str, Any]]:
    rows = zip(*swept.values(), strict=True) if zipped else itertools.product(*swept.values())
    return (dict(zip(swept, row, strict=True)) for row in rows)


def _with(sections: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The sections with the options put in, each by its dotted name."""
    out = dict(sections)
    for name, value in options.items():
        *parents, last = name.split(".")
        place = out
        for parent in parents:
            place[parent] = dict(place.get(parent, {}))
            place = place[parent]
        place[last] = value
    return out


def _lookup(sections: dict[str, Any], name: str) -> Any:
    value: Any = sections
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _folder(block: str, options: dict[str, Any], seed: int | None, number: int) -> str:
    """The run's folder: "dpo,beta=0.1,seed=0", or "dpo,003" where that would be no name."""
    parts = [f"{short}={_told(value)}" for short, value in short_names(options).items()]
    if seed is not None:
        parts.append(f"seed={seed}")
    name = ",".join([block, *parts])
    plain = all(isinstance(v, bool | int | float | str) for v in options.values())
    return name if plain and len(name) <= LONGEST and FOLDER_NAME.fullmatch(name) else f"{block},{number:03d}"


def short_names(options: dict[str, Any]) -> dict[str, Any]:
    """Options by the last part of their names, or in full where two share it."""
    last = [name.split(".")[-1] for name in options]
    return {
        short if last.count(short) == 1 else name: value
        for short, (name, value) in zip(last, options.items(), strict=True)
    }


def _told(value: Any) -> str:
    return value if isinstance(value, str) else toml_value(value)
