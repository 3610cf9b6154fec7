"""What to change so that a run fits: on a planner of three lines, whose bytes can be added up by hand."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from trimtab.config import load_config
from trimtab.errors import InputError
from trimtab.planning.advice import Advice, advise, changed, configuration, flattened
from trimtab.planning.levers import LEVERS
from trimtab.planning.result import Memory, Part, Phase, Plan

MIB = 2**20
GIVEN: dict[str, Any] = {
    "train.micro_batch_tokens": 4096,
    "train.activation_mb": 0,
    "train.save_in_background": False,
    "train.lr": 2e-6,
    "model.dtype": "bfloat16",
    "adapter.kind": "none",
    "adapter.quantise": "none",
    "sampling.cache_mb": 4096,
    "sampling.max_rows": 0,
    "grpo.group_size": 8,
    "grpo.beta": 0.04,
    "watch.samples": 4,
}


class Planner:
    """1,000 MiB of weights, 7,000 of states (100 with an adapter), 1 MiB a token in training, a cache."""

    def __init__(self, given: dict[str, Any] = GIVEN, *, longest: int = 1, sampling: int = 0) -> None:
        self.given, self.longest, self.sampling = given, longest, sampling
        self.asked: list[dict[str, Any]] = []

    def __call__(self, options: dict[str, Any]) -> Plan:
        self.asked.append(options)
        o = {**self.given, **options}
        tokens = o["train.micro_batch_tokens"]
        if tokens < self.longest:
            raise InputError(f"one group needs {self.longest} tokens")
        states = 7000 if o["adapter.kind"] == "none" else 100
        budget = o["train.activation_mb"] or tokens
        activations = max(min(tokens, budget), 0.2 * tokens)  # all layers computed again: a fifth is left
        held = [Part("policy", "weights", 1000 * MIB), Part("policy", "optimiser", states * MIB)]
        training = Phase("training", (*held, Part("policy", "activations", activations * MIB)))
        cache = Part("policy", "cache", min(o["sampling.cache_mb"], self.sampling) * MIB)
        return Plan("", Memory((Phase("sampling", (*held, cache)), training)))


def advice(available_mb: float, planner: Planner | None = None) -> Advice:
    planner = planner or Planner()
    found = advise(planner, planner.given, available_mb * MIB)
    assert found.fits == (found.plan.memory.peak <= available_mb * MIB)
    return found


def test_the_mildest_value_of_the_first_lever_that_alone_is_enough() -> None:
    """12,096 MiB of 11,000: 2,048 tokens leave 10,048. The strongest value would be 16 tokens."""
    found = advice(11_000)
    assert found.overrides == {"train.micro_batch_tokens": 2048}
    assert found.plan.memory.peak == 10_048 * MIB
    [change] = found.changes
    assert (change.saves, change.phase, change.effect) == (2048 * MIB, "training", "same")
    assert found.options() == "--train.micro_batch_tokens 2048"
    assert found.options("stages.grpo") == "--stages.grpo.train.micro_batch_tokens 2048"


def test_what_fits_needs_no_change() -> None:
    assert advice(12_096).changes == ()
    assert advice(12_096).toml() == ""


def test_a_budget_for_activations_where_tokens_cannot_be_fewer() -> None:
    """A group of 3,000 tokens: 4,096 cannot be halved. Of 11,000 MiB 3,000 are left for the 4,096."""
    found = advice(11_000, Planner(longest=3000))
    # Three quarters are 3,072 MiB: 72 too many.
    assert found.overrides == {"train.activation_mb": 2457}
    assert found.plan.memory.peak == 10_457 * MIB


def test_a_budget_that_a_run_would_refuse_is_not_advised() -> None:
    """With every layer computed again 819 of 4,096 MiB are left: a budget of 614 cannot be met."""
    assert advice(8_820, Planner(longest=3000)).overrides == {"train.activation_mb": 819}
    planner = Planner(longest=3000)
    assert advice(8_810, planner).overrides == {"adapter.kind": "lora", "train.lr": 2e-5}
    assert {"train.activation_mb": 614} in planner.asked


def test_two_phases_that_are_too_full_at_once_take_two_changes() -> None:
    """Each alone leaves the peak where it was: who looks at the peak alone finds no way."""
    planner = Planner(sampling=4096)
    assert planner({}).memory.peak == planner({"train.micro_batch_tokens": 16}).memory.peak == 12_096 * MIB
    found = advice(10_100, planner)
    assert found.overrides == {"train.micro_batch_tokens": 2048, "sampling.cache_mb": 2048}
    assert [change.phase for change in found.changes] == ["training", "sampling"]
    assert [change.saves for change in found.changes] == [2048 * MIB, 2048 * MIB]


def test_an_adapter_comes_last_with_its_rate_and_only_what_is_needed_beside_it() -> None:
    """1,000 + 100 + tokens in 3,000: 1,024 tokens, though 16 were tried before the adapter."""
    found = advice(3_000)
    assert found.overrides == {
        "train.micro_batch_tokens": 1024,
        "adapter.kind": "lora",
        "train.lr": 2e-5,
    }
    assert [change.effect for change in found.changes] == ["same", "another"]
    assert found.changes[1].saves == 6_900 * MIB
    assert tomllib.loads(found.toml()) == {
        "train": {"micro_batch_tokens": 1024, "lr": 2e-5},
        "adapter": {"kind": "lora"},
    }


def test_nothing_is_enough() -> None:
    """1,000 + 100 + 3.2 MiB (16 tokens, all layers computed again) are the least; 500 are there."""
    found = advice(500)
    assert not found.fits
    assert 1_100 * MIB < found.plan.memory.peak < 1_120 * MIB
    assert "a device with 2 GiB would do" in found.otherwise
    assert "one with 12 GiB without any change" in found.otherwise
    assert found.to_dict()["otherwise"] == found.otherwise


def test_an_option_that_is_not_there_is_not_advised() -> None:
    given = {key: value for key, value in GIVEN.items() if key not in ("adapter.kind", "adapter.quantise")}
    planner = Planner()
    found = advise(planner, given, 3_000 * MIB)
    assert not any(key.startswith("adapter") for options in planner.asked for key in options)
    assert not found.fits


def test_each_set_of_options_is_planned_once() -> None:
    planner = Planner(sampling=4096)
    advise(planner, GIVEN, 1_000 * MIB)
    asked = [repr(sorted(options.items())) for options in planner.asked]
    assert len(asked) == len(set(asked)) < 200


def test_a_run_that_cannot_be_planned_as_it_is_raises() -> None:
    with pytest.raises(InputError, match="5000"):
        advice(11_000, Planner(longest=5000))


def test_options_of_plan_without_a_file() -> None:
    """Their names are shorter; devices are advised as far as they are said to be at hand."""
    given = {"micro_batch_tokens": 1024, "adapter": "none", "recompute": "none", "devices": 1}

    def replan(options: dict[str, Any]) -> Plan:
        o = {**given, **options}
        states = (8 if o["adapter"] == "none" else 1) * 1024 / o["devices"]
        kept = o["micro_batch_tokens"] * (0.25 if o["recompute"] == "all" else 1)
        parts = (Part("policy", "optimiser", states * MIB), Part("policy", "activations", kept * MIB))
        return Plan("", Memory((Phase("training", parts),)))

    assert advise(replan, given, 8_500 * MIB).overrides == {"micro_batch_tokens": 256}
    assert advise(replan, given, 2_000 * MIB).overrides == {"micro_batch_tokens": 512, "adapter": "lora"}
    given["devices_at_hand"] = 8
    assert advise(replan, given, 5_200 * MIB).overrides == {"devices": 2}
    given |= {"adapter": "lora", "devices_at_hand": 1}
    found = advise(replan, given, 100 * MIB)
    assert found.otherwise.endswith("so would 16 devices")  # 1,024 / 16 + 4 MiB; 8 leave 132
    # Each device computes groups of its own.
    assert advise(replan, given | {"groups": 16}, 100 * MIB).otherwise == found.otherwise
    assert "so would" not in advise(replan, given | {"groups": 15}, 100 * MIB).otherwise


@pytest.mark.parametrize(
    ("facts", "given", "least"),
    [
        # Of 100 tokens in the rows read, others may have 125, twice that in a pair.
        ({"longest_sequence": 100, "lengths": "the first 256 groups", "responses_per_group": 2.0}, {}, 256),
        ({"longest_sequence": 100, "lengths": "all rows", "responses_per_group": 2.0}, {}, 16),
        # The configuration's own limit: 300 a response.
        (
            {"longest_sequence": 100, "lengths": "the first 256 groups", "responses_per_group": 2.0},
            {"data.max_tokens": 300},
            1024,
        ),
        # A group of samples is spread over several trees: one of 125 is the least.
        (
            {"longest_sequence": 100, "lengths": "the first 256 groups", "responses_per_group": 8.0},
            {"grpo.group_size": 8},
            128,
        ),
        ({}, {}, 16),
    ],
)
def test_micro_batches_hold_the_longest_group_that_may_come(
    facts: dict[str, Any], given: dict[str, Any], least: int
) -> None:
    lever = next(lever for lever in LEVERS if lever.name == "micro batch")
    plan = Plan("", Memory(()), facts=facts)
    values = [
        o["train.micro_batch_tokens"] for o in lever.values(given | {"train.micro_batch_tokens": 4096}, plan)
    ]
    assert values[0] == 2048
    assert values[-1] == least


@pytest.mark.parametrize(
    ("options", "name", "found"),
    [
        ({"watch.kl": True, "watch.prompts": ["a"]}, "watched KL", [{"watch.kl": False}]),
        ({"watch.kl": True, "watch.prompts": [], "watch.heldout": False}, "watched KL", []),
        ({"grpo.log_kl": True, "grpo.beta": 0}, "logged KL", [{"grpo.log_kl": False}]),
        ({"grpo.log_kl": True, "grpo.beta": 0.04}, "logged KL", []),
        ({"critic.share": "none"}, "critic", [{"critic.share": "trunk"}]),
        ({"critic.share": "trunk"}, "critic", []),
        ({"ppo.samples": 4, "watch.samples": 8}, "group", [{"ppo.samples": 2}]),
        ({"watch.samples": 8}, "group", []),
        ({"dpo.reference": "other", "watch.reference": "third"}, "reference", [{"dpo.reference": ""}]),
        ({"watch.reference": "third"}, "reference", []),
        ({"sampling.max_rows": 0}, "rows", [{"sampling.max_rows": n} for n in (128, 64, 32, 16, 8, 4)]),
        ({"model.dtype": "auto"}, "dtype", [{"model.dtype": "bfloat16"}]),
        ({"adapter.kind": "dora", "train.lr": 1.0}, "adapter", []),
    ],
)
def test_levers(options: dict[str, Any], name: str, found: list[dict[str, Any]]) -> None:
    lever = next(lever for lever in LEVERS if lever.name == name)
    assert list(lever.values(options, Planner()({}))) == found


def test_a_ready_configuration(configured: Callable[..., Any]) -> None:
    config = configured("dpo", train__lr=1e-6)
    given = flattened(config)
    assert given["train.lr"] == 1e-6
    assert given["dpo.reference"] == ""
    overrides = {"adapter.kind": "lora", "train.lr": 1e-5, "train.micro_batch_tokens": 64}
    made = changed(config, overrides)
    assert flattened(made) == {**given, **overrides}
    read = load_config(type(config), None, tomllib.loads(configuration(config, overrides)))
    assert read == made
    assert config.adapter.kind == "none"
    with pytest.raises(InputError, match="quantise has no effect"):
        changed(config, {"adapter.quantise": "nf4"})
