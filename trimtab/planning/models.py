"""A model's sizes from its configuration: by folder, by hub name, or from the cards. No torch, no weights.

Counts are exact: of the modules that transformers 5 builds, a tied head once. Nothing of a model is run; a
configuration whose family is not known here is refused, whatever code it comes with.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.planning.cards.families import FAMILIES, read
from trimtab.planning.job import Model

TEXT = {"gemma3": "gemma3_text", "llama4": "llama4_text", "mistral3": "mistral"}
"""Models of text and images, and the family of their text_config where it names none."""
ENCODERS = (
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert"),
    *("mpnet", "modernbert", "nomic_bert", "roberta", "xlm-roberta", "xlm-roberta-xl"),
)
SUFFIXES = ("-instruct", "-chat", "-it", "-pt", "-base", "-hf", "-sft", "-dpo")
"""Of names of models that are built as another one."""
TIMEOUT_S = 5.0
CONFIG, ADAPTER = "config.json", "adapter_config.json"
REFUSALS = {
    "GatedRepoError": "the hub wants its licence accepted first (and then: hf auth login)",
    "RevisionNotFoundError": "the hub has no such revision of it",
    "EntryNotFoundError": f"on the hub it has no {CONFIG} (of an adapter, plan the base)",
    "RepositoryNotFoundError": "the hub has no such model",
    "HFValidationError": "it can be no name on the hub",
}
"""Exceptions of the hub's client, the more special first, and what they mean."""


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """The names most like a mistaken one, best first: "a, b or c"; "" where there are none at all."""
    known = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), known, n=count, cutoff=0.0)
    close = [n for n in found if difflib.SequenceMatcher(None, name.lower(), n).ratio() >= 0.5]
    chosen = [known[n] for n in close or found]
    return " or ".join([", ".join(chosen[:-1]), chosen[-1]] if len(chosen) > 1 else chosen)


def model_of(config: Mapping[str, Any], name: str = "") -> Model:
    """A Hugging Face configuration's model. ``config``: what config.json holds; ``name``: for messages too.

    What it leaves out takes the family's defaults in transformers. Of a model of text and images it is the
    text model, and the name says so. Raises InputError for an architecture that is not known or no causal
    language model, and for sizes that are missing or cannot be.
    """
    where = name or "the configuration"
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise InputError(f"{where} has no model_type: it is no configuration of a transformers model")
    if family in TEXT or (family not in FAMILIES and isinstance(config.get("text_config"), Mapping)):
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise InputError(f"{where}: {family} has no text_config")
        own = (
            {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
        )
        inner = {"model_type": TEXT.get(family, "none"), **own, **text}
        return model_of(inner, f"{name or family} (its text model)")
    if family not in FAMILIES:
        raise InputError(_unknown(config, family, where))
    return read(config, family, where).model(name, family)


def _unknown(config: Mapping[str, Any], family: str, where: str) -> str:
    if family in ENCODERS:
        return f"{where}: {family} is an encoder, no causal language model; a plan is for decoders"
    if config.get("is_encoder_decoder") is True:
        return f"{where}: {family} has an encoder and a decoder; a plan is for decoders alone"
    known = f"model_type {family!r} is not known to the planner; the nearest are {nearest(family, FAMILIES)}"
    code = ", and the code that comes with it is not run" if config.get("auto_map") else ""
    return f"{where}: {known}{code}"


def reward_model_of(model: Model, outputs: int = 1) -> Model:
    """The same trunk with a linear head of ``outputs`` scores in place of the vocabulary's, without bias.

    As transformers builds its sequence classification models. Raises InputError for outputs below 1.
    """
    if isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 1:
        raise InputError(f"{model.name}: a reward model has {outputs!r} outputs; it has at least 1")
    narrower = (out for name, _, out, _ in model.linears if name == "project_out")  # before OPT's head
    head = outputs * next(narrower, model.width)
    gone = model.head - head
    return replace(
        model, parameters=model.parameters - gone, active=model.active - gone, head=head, tied=False
    )


# --- by name ------------------------------------------------------------------------------------------------


@cache
def _configurations() -> dict[str, dict[str, Any]]:
    text = files("trimtab.planning.cards").joinpath("cards.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


@cache
def cards() -> dict[str, Model]:
    """Well-known open models by hub name, smallest first."""
    made = {name: model_of(config, name) for name, config in _configurations().items()}
    return dict(sorted(made.items(), key=lambda card: float(card[1].parameters)))


def find_model(name: str, *, online: bool = True, revision: str = "main") -> Model:
    """The model at a folder (an adapter's: its base), on a card, or on the hub.

    A card is meant by its hub name or what follows its slash, in capitals or not. ``online``: the hub may be
    asked, for config.json alone; HF_HUB_OFFLINE forbids it too, and what the hub's cache holds is read all
    the same. A name that is a card's but for an ending like -Instruct is planned as that card if nothing else
    is found, and says so. Raises InputError with the nearest names for anything else.
    """
    return model_of(*_configuration(name, online, revision))


def find_reward_model(name: str, *, online: bool = True, revision: str = "main", outputs: int = 1) -> Model:
    """The sequence classification model at ``name``, or the one that its trunk would make.

    Saved as such, it has as many outputs as its labels; another gets ``outputs``. Otherwise as
    :func:`find_model`.
    """
    config, found = _configuration(name, online, revision)
    return reward_model_of(model_of(config, found), saved_outputs(config) or outputs)


def saved_outputs(config: Mapping[str, Any]) -> int:
    """Scores of a configuration saved as a sequence classification model; 0 for any other."""
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if not any("SequenceClassification" in str(name) for name in names):
        return 0
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) and labels else config.get("num_labels", 2)
    return count if isinstance(count, int) and count > 0 else 2


def _configuration(name: str, online: bool, revision: str) -> tuple[dict[str, Any], str]:
    """The configuration, and the name to show."""
    if not name or not name.strip():
        raise InputError("no model is named: give a folder, a hub name or the name of a card")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _of_folder(folder, name, online)
    if card := _card(name):
        return _configurations()[card], card
    if folder.is_file():
        return _table(folder), name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such folder")
    found, why = _of_hub(name, revision, online)
    if found is not None:
        return found, name
    if why != REFUSALS["RepositoryNotFoundError"] and (sibling := _sibling(name)):
        return _configurations()[sibling], f"{name} (as {sibling})"
    cards = [*(_short(card) for card in _configurations()), *_configurations()]
    raise InputError(
        f"model {name!r} is neither a folder nor a card, and {why}; the nearest cards are "
        f"{nearest(name, cards if '/' in name else cards[: len(cards) // 2])}; a folder with its "
        f"{CONFIG} will do"
    )


def _short(name: str) -> str:
    return name.rpartition("/")[2].lower()


def _card(name: str) -> str | None:
    """The card of a hub name or a short name."""
    wanted = name.strip().lower()
    return next((card for card in _configurations() if wanted in (card.lower(), _short(card))), None)


def _sibling(name: str) -> str | None:
    """The card of the model without, or with, an ending that says how it was tuned."""
    stem = name.strip().lower().replace("/meta-llama-", "/llama-")  # as Llama 3's were called at first
    for ending in SUFFIXES:
        stem = stem.replace(f"{ending}-", "-").removesuffix(ending)
    return next((card for ending in ("", *SUFFIXES) if (card := _card(stem + ending))), None)


def _of_folder(folder: Path, name: str, online: bool) -> tuple[dict[str, Any], str]:
    if (folder / CONFIG).is_file():
        return _table(folder / CONFIG), name
    if not (folder / ADAPTER).is_file():
        raise InputError(f"{name} has neither {CONFIG} nor {ADAPTER}; is it a saved model?")
    values = _table(folder / ADAPTER)
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{folder / ADAPTER} names no base: set base_model_name_or_path")
    beside = folder / base
    place = str(beside) if not os.path.isabs(base) and not Path(base).exists() and beside.is_dir() else base
    if Path(place).is_dir() and not (Path(place) / CONFIG).is_file() and (Path(place) / ADAPTER).is_file():
        raise InputError(f"{name}: its base {base} is itself an adapter: merge that one with trimtab export")
    found = values.get("revision")
    config, shown = _configuration(place, online, found if isinstance(found, str) and found else "main")
    return config, f"{name} (an adapter of {shown})"


def _of_hub(name: str, revision: str, online: bool) -> tuple[dict[str, Any] | None, str]:
    """The configuration on the hub or in its cache, or why there is none."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.constants import HF_HUB_OFFLINE
    except ImportError:
        return None, "the hub cannot be asked without huggingface_hub"
    asked = online and not HF_HUB_OFFLINE
    reached = asked and hub_answers()
    try:
        path = hf_hub_download(
            name, CONFIG, revision=revision, etag_timeout=TIMEOUT_S, local_files_only=not reached
        )
    except Exception as error:  # the hub's client raises many types; each means that there is no file
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if asked and not reached:
            return None, "the hub could not be reached"
        if not asked:
            return None, "the hub is not asked offline"
        return None, next((why for kind, why in REFUSALS.items() if kind in kinds), "the hub gave no answer")
    return _table(Path(path)), ""


def hub_answers() -> bool:
    """Asked once and briefly: its client would try again for half a minute."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.utils import get_session

    try:
        get_session().head(ENDPOINT, timeout=TIMEOUT_S)
    except Exception:  # of whichever library the hub's client uses
        return False
    return True


def _table(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a table of settings")
    return values
