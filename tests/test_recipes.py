"""Every recipe of a paper or a text says only what its method understands, and where its values are from."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from trimtab import methods
from trimtab.config import load_config

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
QUOTED = sorted([*(RECIPES / "papers").glob("*.toml"), *(RECIPES / "starters").glob("*.toml")])
PLACES = {"path", "name", "out", "columns", "split", "on_bad_row", "limit", "revision", "save_dtype"}
"""Keys whose value is a place or a name, which a line above or the file's head explains."""


def method_of(file: Path) -> str:
    """The command in the file's head."""
    line = next(x for x in file.read_text().splitlines() if x.startswith("#     trimtab ") and file.name in x)
    return line.split()[2]


@pytest.mark.parametrize("file", QUOTED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_recipe_is_a_configuration_of_its_method(file: Path) -> None:
    name = method_of(file)
    config: Any = load_config(methods.find(name).Config, str(file), {})
    assert config.run.out.startswith("runs/")
    # What it names is the method's own section, not another's that would be left out in silence.
    assert name.replace("-", "_") in tomllib.loads(file.read_text()) or name in ("reward", "sft", "spin")


@pytest.mark.parametrize("file", QUOTED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_value_of_a_recipe_names_its_source(file: Path) -> None:
    section, silent = "", []
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("["):
            section = line
        key, equals, _ = line.partition(" = ")
        if not equals or line.startswith(("#", " ", "[")) or key in PLACES or key == "terms":
            continue
        # A pair of values may share one comment: the line before or after has it.
        if "#" not in line and not any(
            "#" in lines[n] for n in (number - 1, number + 1) if 0 <= n < len(lines)
        ):
            silent.append(f"{section} {line}")
    assert silent == []


@pytest.mark.parametrize("file", QUOTED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_recipe_of_a_paper_is_in_the_index(file: Path) -> None:
    index = (RECIPES.parent / "docs" / "papers.md").read_text()
    assert f"recipes/{file.parent.name}/{file.name}" in index


@pytest.mark.parametrize("file", QUOTED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_longest_answer_fits_into_a_micro_batch(file: Path) -> None:
    """Three recipes sampled answers of up to 20,480 tokens and learned from 4,096 at once: all refused."""
    config: Any = load_config(methods.find(method_of(file)).Config, str(file), {})
    if hasattr(config, "sampling"):
        longest = (config.data.max_prompt_tokens or 1) + config.sampling.max_new_tokens
        assert longest <= config.train.micro_batch_tokens
