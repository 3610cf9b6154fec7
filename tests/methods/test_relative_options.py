"""The family's options: what contradicts each other is refused in one line, and each paper's defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import tiny

from trimtab import methods
from trimtab.errors import InputError
from trimtab.methods.shared.relative_options import RelativeOptions

Make = Callable[..., Any]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("grpo", {"constant_length": 5}, 'constant_length has no effect without reduction = "constant"'),
    ("grpo", {"beta": 0.0, "kl_level": "sequence"}, "kl_estimator and kl_level have no effect with beta = 0"),
    ("dapo", {"kl_in": "reward"}, "kl_in has no effect with beta = 0"),
    ("grpo", {"kl_estimator": "k1"}, "has no gradient in expectation"),
    ("rloo", {"kl_in": "loss"}, "has no gradient in expectation"),
    ("grpo", {"kl_in": "reward"}, 'kl_in = "reward" with kl_estimator = "k3" has not the gradient'),
    ("rloo", {"kl_level": "sequence"}, 'kl_level has no effect with kl_in = "reward"'),
    ("grpo", {"log_kl": False}, "log_kl = false has no effect"),
    ("grpo", {"beta": 0.0, "log_kl": False, "refresh_reference_every": 2}, "refresh_reference_every has no"),
    ("grpo", {"reference_average": 0.5}, "reference_average has no effect without refresh_reference_every"),
    ("cispo", {"dual_clip": 9.0}, 'dual_clip has no effect with surrogate = "cispo"'),
    ("dapo", {"dual_clip": 1.25}, "dual_clip = 1.25 must be above 1 + clip_high"),
    ("rloo", {"clip_high": 0.3}, 'clip_low and clip_high have no effect with surrogate = "reinforce"'),
    ("cispo", {"ratio": "sequence"}, 'surrogate = "cispo" weighs each token'),
    ("gspo", {"reduction": "token_mean"}, 'ratio = "sequence" is one term a response'),
    ("gspo", {"reduction": "constant"}, 'ratio = "sequence" is one term a response'),
    ("grpo", {"supervision": "process", "baseline": "leave_one_out"}, 'baseline = "leave_one_out" has no'),
    ("grpo", {"supervision": "process", "scale": "batch_std"}, 'scale = "batch_std" has no effect with'),
    ("grpo", {"supervision": "process", "advantage_from": "winner"}, "ranks responses"),
    ("gspo", {"supervision": "process"}, 'ratio = "sequence" has one advantage a response'),
    ("rloo", {"supervision": "process"}, 'baseline = "leave_one_out" has no effect with'),
    (
        "grpo",
        {"supervision": "process", "kl_in": "reward", "kl_estimator": "k1"},
        'kl_in = "reward" belongs to no step',
    ),
    ("dapo", {"supervision": "process"}, "overlong_buffer belongs to no step"),
    ("rloo", {"advantage_from": "gains"}, 'baseline = "leave_one_out" has no use with advantage_from'),
    ("grpo", {"advantage_from": "gains", "baseline": "batch_mean"}, 'baseline = "batch_mean" has no use'),
    ("dapo", {"advantage_from": "dcg"}, "overlong_buffer would only reorder"),
    (
        "grpo",
        {"advantage_from": "winner", "kl_in": "reward", "kl_estimator": "k1"},
        'kl_in = "reward" would only reorder',
    ),
    ("grpo", {"gains": [1.0, 0.0]}, 'gains has no effect without advantage_from = "gains"'),
    ("grpo", {"advantage_from": "gains", "gains": [0.0, 1.0]}, "must be two or more that fall"),
    ("grpo", {"advantage_from": "gains", "gains": [1.0]}, "must be two or more that fall"),
    ("grpo", {"advantage_from": "gains", "gains": [1.0, 1.0]}, "must be two or more that fall"),
    ("grpo", {"advantage_from": "gains", "gains": [1, 1, 1, 0], "group_size": 3}, "a group_size of 3"),
    ("grpo", {"advantage_from": "dcg", "label_temperature": 2.0}, "label_temperature has no effect"),
    ("grpo", {"baseline": "batch_mean"}, 'scale = "std" is of each group'),
    ("dapo", {"baseline": "batch_mean", "scale": "batch_std"}, "dynamic_sampling drops groups of equal"),
    ("grpo", {"overlong_penalty": 0.5}, "overlong_penalty has no effect without overlong_buffer"),
    ("grpo", {"max_refills": 3}, "max_refills has no effect without dynamic_sampling"),
    ("grpo", {"overlong_buffer": 7}, "overlong_buffer = 7 is more than sampling.max_new_tokens = 6"),
    ("grpo", {"overlong_buffer": -2}, "greater than or equal to -1"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_what_contradicts_is_refused(
    name: str, options: dict[str, Any], message: str, configured: Make
) -> None:
    section = name.replace("-", "_")
    with pytest.raises(InputError) as caught:
        configured(name, **{f"{section}__{key}": value for key, value in options.items()})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_refusal_of_the_options_is_tested() -> None:
    """One line for each problem that the code can name."""
    problems = inspect.getsource(RelativeOptions).count("yield ")
    assert len({message for _, _, message in REFUSED}) >= problems - 1  # one "yield from"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        # GSPO's ratio with the clips of tokens is another choice, no contradiction.
        ("gspo", {"clip_low": 0.2, "clip_high": 0.2}),
        ("gspo", {"reduction": "response_sum"}),
        ("gspo", {"ratio": "sequence_token", "reduction": "token_mean", "supervision": "process"}),
        ("grpo", {"kl_in": "reward", "kl_estimator": "k1"}),
        ("rloo", {"kl_in": "loss", "kl_estimator": "k2", "kl_level": "sequence"}),
        ("rloo", {"surrogate": "clip", "clip_high": 0.3}),
        ("dapo", {"dual_clip": 3.0, "mask_cut_off": True}),
        ("grpo", {"baseline": "batch_mean", "scale": "batch_std"}),
        ("grpo", {"advantage_from": "gains", "scale": "batch_std"}),
        ("cispo", {"dynamic_sampling": True, "overlong_buffer": -1}),
        ("dapo", {"overlong_buffer": 0, "supervision": "process"}),
    ],
)
def test_what_does_not_is_let_through(name: str, options: dict[str, Any], configured: Make) -> None:
    configured(name, **{f"{name}__{key}": value for key, value in options.items()})


DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.04, "clip_low": 0.2, "clip_high": 0.2, "reduction": "response_mean", "scale": "std"},
    "dr-grpo": {"beta": 0.0, "scale": "none", "reduction": "constant", "baseline": "group_mean"},
    "rloo": {"baseline": "leave_one_out", "scale": "none", "kl_in": "reward", "kl_estimator": "k1"},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "reduction": "token_mean", "group_size": 16, "beta": 0.0},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "ratio": "sequence", "reduction": "response_mean"},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "reduction": "token_mean", "beta": 0.0},
}


@pytest.mark.parametrize("name", tiny.RELATIVE)
def test_defaults_are_the_papers(name: str, configured: Make) -> None:
    assert name in methods.names()
    config = methods.find(name).Config
    section = config.section
    options = config.model_fields[section].annotation()
    for key, value in DEFAULTS[name].items():
        assert getattr(options, key) == value, key
    # No method has an option that the others have not, nor leaves one out.
    assert set(type(options).model_fields) == set(RelativeOptions.model_fields)
    for key, info in type(options).model_fields.items():
        assert info.description, key


def test_dapo_has_all_four_parts(configured: Make) -> None:
    config = configured("dapo", sampling__max_new_tokens=20)
    assert config.dapo.dynamic_sampling
    assert config.overlong_buffer == 4
    assert configured("dapo", dapo__overlong_buffer=0, out="no").overlong_buffer == 0
    assert configured("dapo", sampling__max_new_tokens=3, out="few").overlong_buffer == 1


def test_no_contrast_at_temperature_0(configured: Make) -> None:
    for name in tiny.RELATIVE:
        with pytest.raises(InputError, match="nothing to compare"):
            configured(name, sampling__temperature=0.0)
