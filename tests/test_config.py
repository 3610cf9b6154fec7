"""Configuration files: what is accepted, and the one line that says what is not."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from trimtab import methods
from trimtab.config import Section, dump_toml, fields, load_config, parse_value
from trimtab.errors import InputError
from trimtab.methods import dpo, grpo, sft
from trimtab.studies.compare import StudyConfig

MINIMAL: dict[str, Any] = {
    "model": {"path": "somewhere"},
    "data": {"sources": [{"path": "rows.jsonl"}]},
}
REWARD = {"reward": {"terms": [{"name": "numeric"}]}}


class Inner(Section):
    rate: float = 0.5
    name: str = ""
    flags: list[bool] = Field([])
    words: list[str] = Field([])


class Outer(Section):
    steps: int = 1
    inner: Inner = Field(default_factory=Inner)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    return file


def minimal(name: str) -> dict[str, Any]:
    wanted = methods.find(name).Config.model_fields.get("reward")
    return {**MINIMAL, **(REWARD if wanted is not None and wanted.is_required() else {})}


# ---------------------------------------------------------------- unknown keys and wrong types


@pytest.mark.parametrize(
    ("text", "line", "key", "near"),
    [
        (
            '[model]\npath = "m"\n\n[train]\nlr = 1.0\nwarmup_step = 3\n',
            6,
            "train.warmup_step",
            "train.warmup_steps",
        ),
        ('[model]\npath = "m"\n[trian]\nlr = 1.0\n', 3, "trian", "train"),
        ('model.path = "m"\nmodel.pth = "n"\n', 2, "model.pth", "model.path"),
        ('[model]\npath = "m"\n[data]\nlr = 1.0\n', 4, "data.lr", "train.lr"),
    ],
)
def test_unknown_key_names_key_line_and_neighbour(
    tmp_path: Path, text: str, line: int, key: str, near: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_config(sft.Config, file)
    message = str(caught.value)
    assert message.startswith(f"{file}:{line}: unknown key {key!r}"), message
    assert near in message.partition("did you mean")[2], message


def test_unknown_key_in_the_second_of_several_tables(tmp_path: Path) -> None:
    text = (
        '[model]\npath = "m"\n[[data.sources]]\npath = "a"\n[[data.sources]]\npath = "b"\nwieght = 2.0\n'
        '[data.sources.columns]\nq = "prompt"\n'
    )
    with pytest.raises(InputError, match=r"run\.toml:7: unknown key 'data.sources.1.wieght'.*sources.weight"):
        load_config(sft.Config, write(tmp_path, text))


def test_wrong_type_below_the_second_table_names_its_own_line(tmp_path: Path) -> None:
    text = (
        '[model]\npath = "m"\n[[data.sources]]\npath = "a"\nweight = 1.0\n'
        '[[data.sources]]\npath = "b"\nweight = "heavy"\n'
    )
    with pytest.raises(InputError, match=r"run\.toml:8: data\.sources\.1\.weight: .*number.*got 'heavy'"):
        load_config(sft.Config, write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('steps = "many"\n', 1, "integer"),
        ("steps = 1\n\n[inner]\nrate = [1.0]\n", 4, "number"),
        ("[inner]\nflags = [true, 'perhaps']\n", 2, "boolean"),
        ("inner = 3\n", 1, "inner"),
    ],
)
def test_wrong_type_names_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(InputError, match=rf"run\.toml:{line}: .*{words}") as caught:
        load_config(Outer, write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_required_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.toml: 'data' is required"):
        load_config(sft.Config, write(tmp_path, '[model]\npath = "m"\n'))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.toml: no such configuration file"):
        load_config(Outer, tmp_path / "nowhere.toml")
    with pytest.raises(InputError, match="no such configuration file"):
        load_config(Outer, tmp_path)
    with pytest.raises(InputError, match=r"run\.toml: not valid TOML.*line 2"):
        load_config(Outer, write(tmp_path, "steps = 1\nsteps = = 2\n"))
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(InputError, match=r"latin\.toml: cannot be read as UTF-8"):
        load_config(Outer, tmp_path / "latin.toml")


# ---------------------------------------------------------------- overrides


def test_overrides_are_read_as_toml_values_on_top_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'steps = 5\n[inner]\nrate = 0.25\nname = "x"\n')
    given = {
        "inner.rate": "1e-3",
        "inner.flags": "[true, false]",
        "inner.words": '["a", "b=c"]',
        "inner.name": "plain words",
    }
    config = load_config(Outer, file, given)
    assert config.steps == 5
    assert config.inner == Inner(rate=1e-3, name="plain words", flags=[True, False], words=["a", "b=c"])


@pytest.mark.parametrize("text", ["2024", "true", "1e-3", "2024-01-01", "nan", "run-3", '"quoted"', "a = b"])
def test_text_options_take_text_that_looks_like_another_type(text: str) -> None:
    """run.out = 2024 is a folder's name. Read as TOML alone it would be an int and an error."""
    assert load_config(Outer, None, {"inner.name": text}).inner.name == text.strip('"')


def test_overrides_that_are_no_text_are_taken_as_they_are() -> None:
    assert load_config(Outer, None, {"inner": {"words": ["1"]}, "inner.rate": 2}).inner == Inner(
        words=["1"], rate=2.0
    )
    with pytest.raises(InputError, match=r"--inner\.name: .*string.*got 7"):
        load_config(Outer, None, {"inner.name": 7})


def test_override_errors_name_the_option() -> None:
    with pytest.raises(InputError, match=r"^--inner\.rate: .*number.*got 'abc'"):
        load_config(Outer, None, {"inner.rate": "abc"})
    with pytest.raises(InputError, match=r"^--inner\.raet: unknown key.*inner\.rate"):
        load_config(Outer, None, {"inner.raet": "1"})
    with pytest.raises(InputError, match=r"^--inner\.flags: .*boolean"):
        load_config(Outer, None, {"inner.flags": '[true, "x"]'})
    with pytest.raises(InputError, match=r"^--steps\.more: steps: .*integer"):
        load_config(Outer, None, {"steps.more": "1"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1e-2", -0.01),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"3"', "3"),
        ("True", "True"),
        ("", ""),
    ],
)
def test_parse_value(text: str, value: object) -> None:
    got = parse_value(text)
    assert got == value
    assert type(got) is type(value)


# ---------------------------------------------------------------- writing


def round_trip(config: BaseModel, tmp_path: Path) -> None:
    """Written, read and written again: equal values, equal text."""
    text = dump_toml(config)
    file = write(tmp_path, text)
    again = load_config(type(config), file)
    assert again == config
    assert dump_toml(again) == text


@pytest.mark.parametrize("name", methods.names())
def test_defaults_of_every_method_survive_writing(name: str, tmp_path: Path) -> None:
    round_trip(load_config(methods.find(name).Config, None, minimal(name)), tmp_path)


def test_nested_lists_of_sections_are_written_as_valid_toml(tmp_path: Path) -> None:
    sources = [
        {"path": 'a "b"\\c.jsonl', "name": "first", "weight": 0.1, "columns": {"my question": "prompt"}},
        {"path": "b.jsonl", "limit": 7, "on_bad_row": "skip"},
    ]
    terms = [
        {"name": "format", "weight": 1e-05, "args": {"pattern": "^\\d+\n\t\x7f\x1b$", "full": True}},
        {"name": "length", "args": {"limit": 3, "span": 2}, "label": "ünïcode"},
    ]
    values = {
        "model": {"path": "m"},
        "data": {"sources": sources, "heldout_fraction": 0.1},
        "reward": {"terms": terms, "on_error": "skip"},
        "sampling": {"stop": ["\n\n", "\x00", '"'], "stop_tokens": [1, 2]},
    }
    config = load_config(grpo.Config, None, values)
    round_trip(config, tmp_path)
    read = tomllib.loads(dump_toml(config))
    assert read["data"]["sources"][0] == sources[0] | {"split": "train", "on_bad_row": "error"}
    assert read["reward"]["terms"][0]["args"] == terms[0]["args"]
    assert read["sampling"]["stop"] == ["\n\n", "\x00", '"']


def test_a_study_survives_writing(tmp_path: Path) -> None:
    stage = {"method": "grpo", "train": {"lr": 1e-5}, **REWARD, "data": {"sources": [{"path": "p.jsonl"}]}}
    config = load_config(
        StudyConfig,
        None,
        {
            "model": {"path": "m"},
            "budget": {"steps": 3, "note": "two\nlines"},
            "stages": {"sft": {"method": "sft"}, "grpo v2": stage},
            "evaluation": {"prompts": [{"path": "p.jsonl"}], **REWARD},
        },
    )
    round_trip(config, tmp_path)


def test_every_option_is_documented() -> None:
    for name in methods.names():
        for key, kind, text, _ in fields(methods.find(name).Config):
            # reward.* comes from plain models whose words stand in their docstrings.
            if not key.startswith("reward."):
                assert text, f"{name}: {key} ({kind}) has no description"
                assert "\n" not in text


# ---------------------------------------------------------------- options that would have no effect


@pytest.mark.parametrize(
    ("config", "section", "values", "message"),
    [
        (sft.Config, "train", {"schedule": "constant", "final_lr": 0.1}, "final_lr has no effect"),
        (sft.Config, "train", {"steps": 5, "epochs": 2.0}, "epochs has no effect"),
        (sft.Config, "train", {"steps": 5, "warmup_steps": 6}, "warmup_steps is larger"),
        (dpo.Config, "dpo", {"reference_free": True, "reference": "x"}, "reference has no effect"),
        (grpo.Config, "grpo", {"constant_length": 5}, "constant_length has no effect"),
        (
            grpo.Config,
            "grpo",
            {"beta": 0.0, "kl_estimator": "k2"},
            "kl_estimator and kl_level have no effect",
        ),
        (grpo.Config, "grpo", {"beta": 0.0, "kl_level": "sequence"}, "kl_estimator and kl_level"),
        (grpo.Config, "grpo", {"log_kl": False}, "log_kl = false has no effect"),
        (grpo.Config, "grpo", {"importance": "never", "importance_cap": 5.0}, "importance_cap has no effect"),
        (
            grpo.Config,
            "grpo",
            {"refresh_reference_every": 2, "beta": 0.0, "log_kl": False},
            "refresh_reference_every has no effect",
        ),
        (grpo.Config, "sampling", {"temperature": 0.0, "top_k": 5}, "no effect at temperature 0"),
        (grpo.Config, "sampling", {"temperature": 0.0}, "nothing to compare"),
        (grpo.Config, "sampling", {"min_new_tokens": 5, "max_new_tokens": 4}, "larger than max_new_tokens"),
        (grpo.Config, "grpo", {"rollout_groups": 17}, "multiple of train.batch_groups"),
    ],
)
def test_options_without_effect_are_errors(
    config: type[BaseModel], section: str, values: dict[str, Any], message: str
) -> None:
    name = "grpo" if config is grpo.Config else "sft"
    with pytest.raises(InputError, match=re.escape(message)):
        load_config(config, None, {**minimal(name), section: values})


def test_biased_sampling_without_correction_is_refused() -> None:
    values = {**minimal("grpo"), "sampling": {"top_p": 0.9}, "grpo": {"importance": "never"}}
    with pytest.raises(InputError, match="biases every ratio"):
        load_config(grpo.Config, None, values)
