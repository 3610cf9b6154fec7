"""The quickstart: a world, a model from random weights, SFT, DPO and GRPO, and what each is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.config import load_config
from trimtab.errors import InputError
from trimtab.newsroom.files import write_world
from trimtab.newsroom.model import new_model
from trimtab.newsroom.tokenizer import build_tokenizer
from trimtab.studies.compare import StudyConfig, run_study

FILE = Path(__file__).with_name("quickstart.toml")


def run_quickstart(
    out: str = "runs/quickstart", seed: int = 0, overrides: dict[str, Any] | None = None
) -> Any:
    """Make the world in ``out/world``, then run the study of ``quickstart.toml`` in ``out``.

    Returns (configuration, summary). Raises InputError when ``out`` already holds a study.
    """
    folder = Path(out)
    if (folder / "study.toml").exists():
        raise InputError(f"{out} already holds a study; give another --out, or remove it")
    world = folder / "world"
    write_world(world, seed=seed, demonstrations=12000, pairs=4000, prompts=4000, heldout=300)
    tokenizer = build_tokenizer()
    model = new_model(len(tokenizer), seed)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = load_config(StudyConfig, FILE, {"out": out, "seed": seed, **(overrides or {})})
    return config, run_study(config)
