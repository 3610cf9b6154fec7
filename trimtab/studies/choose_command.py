"""``trimtab choose``: read what there is, decide, plan, and write a recipe that runs."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.config import load_config
from trimtab.errors import InputError
from trimtab.planning.choosing.decide import Choice, decide
from trimtab.planning.choosing.fit import Fit, Hardware, fit, fits
from trimtab.planning.choosing.pilot import Pilot, commands, pilot, pilot_folder
from trimtab.planning.choosing.recipe import Setting, audit_recipe, recipe, several, stage_tables, to_fill_in
from trimtab.planning.choosing.show import show_choice
from trimtab.planning.choosing.sources import OURS, Hyper
from trimtab.planning.devices import find_device
from trimtab.planning.job import Model
from trimtab.planning.look import read_size
from trimtab.planning.models import find_model
from trimtab.studies.choose_checks import check_prompts, check_verifier, hints
from trimtab.studies.choose_config import ChooseConfig, seconds_of, situation
from trimtab.studies.choose_data import Looked, look
from trimtab.studies.recipes import RECIPES, REFERENCE_SIZE, SUPERVISED, learning_rate

SMALL = 0.3e9
"""Parameters under which a rate of a paper's model is too low: our own rule for small models is taken."""
DEFAULT_NEW = 256
REASONING_NEW = 4096
DEFAULT_PROMPT = 512


@dataclass(frozen=True)
class Chosen:
    """What the command gives."""

    choice: Choice
    pilot: Pilot
    recipe: str
    commands: Sequence[str]
    found: Looked | None
    fit: Fit
    warnings: Sequence[str]
    written: Sequence[str] = ()

    def text(self) -> str:
        """For a terminal."""
        return show_choice(
            self.choice,
            self.pilot,
            self.commands,
            found=() if self.found is None else self.found.lines(),
            fit=self.fit.line,
            warnings=self.warnings,
        ) + "".join(f"\nwrote {file}" for file in self.written)

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "format": 1,
            **self.choice.to_dict(),
            "pilot": self.pilot.to_dict(),
            "commands": list(self.commands),
            "data": None if self.found is None else self.found.to_dict(),
            "plan": None if self.fit.plan is None else self.fit.plan.to_dict(),
            "fit": self.fit.line,
            "warnings": list(self.warnings),
            "recipe": self.recipe,
            "written": list(self.written),
        }


def run_choose(config: ChooseConfig) -> Chosen:
    """Decide, plan and write. Raises InputError for anything that the user can mend."""
    if config.write and Path(config.write).exists():
        raise InputError(f"--write: {config.write} is there already; give another name, or move it away")
    warnings: list[str] = []
    found = look(config.data, config.columns) if config.data else None
    model = _model(config.model, warnings)
    s = situation(config, found, model)
    check_prompts(s, found)
    check_verifier(s, found, warnings)
    hints(s, found, warnings)
    hardware = _hardware(config)
    if config.devices > 1:
        warnings.append(
            f"--devices {config.devices}: planned as a run of so many processes, which torchrun starts, "
            "stage by stage (docs/parallel.md)"
        )
    new = _new_tokens(config, found, model)
    lengths = _lengths(found, model, int(new.value))
    can: Mapping[str, bool | None] = {}
    if model is not None and hardware.available is not None:
        can = (
            _planned(
                lambda: fits(("ppo", "rloo", "grpo"), name_of(config, model), s, lengths, hardware), warnings
            )
            or {}
        )
    choice = decide(s, can)
    fitted = Fit()
    if model is not None:
        known = model
        fitted = (
            _planned(lambda: fit(choice, name_of(config, known), known, lengths, hardware), warnings) or Fit()
        )
    label = Path(config.write).stem if config.write else "choose"
    setting = Setting(
        model=config.model or "MODEL",
        name=label,
        sources=() if found is None else found.sources,
        new_tokens=new,
        more=fitted.more,
        rates=_rates(choice, model, fitted.rates),
        budgets=_budgets(choice, config.time),
    )
    choice = _settled(choice, setting)
    made = pilot(choice)
    file = config.write or "recipe.toml"
    text = recipe(choice, setting, file)
    check(choice, text)
    audit = audit_recipe(choice, setting, pilot_folder(choice, made, label))
    audit_file = str(Path(file).with_name(f"{Path(file).stem}-audit.toml")) if audit else ""
    if missing := to_fill_in(text):
        warnings.append(f"to fill in before the recipe runs: {', '.join(missing)}")
    written = _write({config.write: text, audit_file: audit}) if config.write else []
    lines = commands(choice, made, file, label, audit_file if config.write else "", _place(config, choice))
    return Chosen(choice, made, text, lines, found, fitted, warnings, written)


def _model(name: str, warnings: list[str]) -> Model | None:
    """The model as the planner knows it; a hub's name that cannot be looked up now is no error."""
    if not name:
        return None
    with suppress(InputError):  # a card answers at once, where the hub may keep one waiting
        return find_model(name, online=False)
    try:
        return find_model(name)
    except InputError as error:
        if "/" not in name or Path(name).exists() or name.startswith((".", "/", "~")):
            raise
        warnings.append(f"no plan: {error}")
        return None


def name_of(config: ChooseConfig, model: Model) -> str:
    """What the planner finds the model by: the card that stands in for one it could not look up."""
    card = re.search(r"\(as (\S+)\)$", model.name)
    return card[1] if card else config.model


def _planned(make: Any, warnings: list[str]) -> Any:
    """What the planner says, or None with the reason among the warnings: a choice does not need it."""
    try:
        return make()
    except InputError as error:
        warnings.append(f"no plan: {error}")
        return None


def _hardware(config: ChooseConfig) -> Hardware:
    device = find_device(config.device) if config.device else None
    available: float | None = None
    if config.memory:
        available = read_size(config.memory, "--memory")
    elif device is not None:
        available = device.memory_gib * 2**30
    elif config.model:
        from trimtab.training.memory import available_bytes

        available = available_bytes()
    return Hardware(available, device, config.devices)


def _place(config: ChooseConfig, choice: Choice) -> str:
    """What ``trimtab plan`` has to be told, to plan for the same device."""
    values = {h.key: h.value for h in choice.hypers.get(choice.method, ())}
    count = min(config.devices, int(values.get("train.batch_groups", config.devices)))
    many = str(count) if count > 1 else ""
    given = {"device": config.device, "memory": config.memory, "devices": many}
    return " ".join(f"--{name} {shlex.quote(value)}" for name, value in given.items() if value)


def _new_tokens(config: ChooseConfig, found: Looked | None, model: Model | None) -> Hyper:
    """The longest answer that is sampled."""
    key = "sampling.max_new_tokens"
    context = int(model.context) if model is not None else 0
    if config.max_new_tokens:
        if context and config.max_new_tokens >= context:
            raise InputError(
                f"--max-new-tokens: {config.max_new_tokens:,} leave no room for a prompt in the context of "
                f"{config.model}, {context:,}"
            )
        return Hyper(key, config.max_new_tokens, "as asked for")
    room = max(1, context // 2) if context else 1 << 30
    if found is not None and found.tokens and config.reasoning != "yes":
        guess = 16 * math.ceil(found.tokens / 16)
        return Hyper(key, min(guess, room), f"{OURS}: 95 % of the data's answers, at 3 characters a token")
    if config.reasoning == "yes":
        source = f"{OURS}, for a first run (DeepSeekMath: 1,024; DAPO: 20,480)"
        return Hyper(key, min(REASONING_NEW, room), source)
    return Hyper(key, min(DEFAULT_NEW, room), f"{OURS}: the default of trimtab")


def _lengths(found: Looked | None, model: Model | None, new: int) -> tuple[int, int]:
    """Tokens of a prompt and of a response, for the plan."""
    prompt = DEFAULT_PROMPT if found is None else max(1, found.prompt_tokens)
    if model is not None and int(model.context) > 0:
        prompt = max(1, min(prompt, int(model.context) - new))
    return prompt, new


def _rates(choice: Choice, model: Model | None, adapter: Mapping[str, Hyper]) -> dict[str, Hyper]:
    """Learning rates of small models by our own rule; of adapters by what was found for them."""
    if adapter or model is None or float(model.parameters) >= SMALL:
        return dict(adapter)
    out = {}
    for stage in choice.stages:
        kin = SUPERVISED.get(stage) or SUPERVISED.get("reward" if stage == "process-reward" else "")
        lr, power = kin or (RECIPES["dpo"].lr, RECIPES["dpo"].power)
        rate = learning_rate(lr, power, int(model.parameters))
        rule = f"{lr:g}·({REFERENCE_SIZE:g}/parameters)^{power:g}"
        whose = "trimtab compare's rule" if kin or stage == "dpo" else "DPO's rule of trimtab compare"
        source = f"{OURS}: {whose} for small models, {rule}"
        out[stage] = Hyper("train.lr", rate, source)
    return out


def _budgets(choice: Choice, time: str) -> dict[str, Hyper]:
    """The time that was given, shared out over the stages: half for the last one, the rest for the others."""
    if not time:
        return {}
    whole = seconds_of(time)
    *before, last = choice.stages
    shares = {stage: 0.5 / len(before) for stage in before} | {last: 0.5 if before else 1.0}
    return {
        stage: Hyper(
            "train.time_budget_s", round(share * whole), f"{time} as asked for, {100 * share:.0f} % of it"
        )
        for stage, share in shares.items()
    }


def _settled(choice: Choice, setting: Setting) -> Choice:
    """The choice with every value as the recipe has it: length, rate, adapter, time."""
    left_out = ("data.sources", "reward.terms")
    hypers = {
        stage: tuple(
            h
            for values in stage_tables(stage, choice, setting).values()
            for h in values
            if h.key not in left_out and h.source
        )
        for stage in choice.stages
    }
    return dataclasses.replace(choice, hypers=hypers)


def check(choice: Choice, text: str) -> None:
    """Raises InputError where the recipe is not what the method, or the pipeline, takes."""
    values = tomllib.loads(text)
    if several(choice):
        from trimtab.studies.order import in_order
        from trimtab.studies.pipeline import PipelineConfig

        config = load_config(PipelineConfig, None, values)
        in_order(config, config.stages, config.repeat)
        return
    from trimtab import methods

    load_config(methods.find(choice.method).Config, None, values)


def _write(files: Mapping[str, str]) -> list[str]:
    written = []
    for name, text in files.items():
        if not text:
            continue
        try:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            with Path(name).open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InputError(f"--write: {name}: {error.strerror}") from None
        written.append(name)
    return written


def as_json(chosen: Chosen) -> str:
    """The whole answer as JSON."""
    return json.dumps(chosen.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
