"""Whole runs on samples drawn in several ways, and on ones whose drawing moves over the run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from pydantic import ValidationError
from tiny import assert_same_run, stop_at, train

from trimtab import methods
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared import ahead
from trimtab.methods.shared.scored import sample_and_score
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.rollouts.strategies import MixedSampling, RunSampling, at, steady
from trimtab.training.schedule import ramp

Make = Callable[..., Any]

PLAIN = [{"temperature": 0.6}, {"temperature": 1.7}]
TRUNCATED = [{"temperature": 0.6}, {"temperature": 1.7, "top_p": 0.8}]
MIXES = [("grpo", {"grpo__group_size": 4}), ("ppo", {"ppo__samples": 2})]


# Mixed groups.


@pytest.mark.parametrize(("name", "changed"), MIXES)
def test_a_mix_is_learned_from_at_each_responses_temperature(
    name: str, changed: dict[str, Any], configured: Make
) -> None:
    """Policy, old and reference: where all three are the untrained model, ratios and KL show any slip."""
    options = {**changed, "train__lr": 0.0, "train__batch_groups": 2, f"{name}__rollout_groups": 4}
    options |= {f"{name}__epochs_per_rollout": 2, "train__save_every": 1, "sampling__mix": PLAIN}
    _, metrics = train(configured(name, **options), name)
    for line in metrics:
        # Everybody's at temperature 1: a gap of about 0.5.
        assert line["sampler_gap"] < 1e-5
        assert abs(line["kl"]) < 1e-9
        assert line["clip_fraction"] == 0
    out = Path(configured(name, **options).run.out)
    saved = tiny.saved_state(out, 6)["pending"] or tiny.saved_state(out, 5)["pending"]
    assert [r["temperature"] for r in saved[0]["responses"]][:2] == [0.6, 1.7]


def test_only_truncated_strategies_need_the_weights(configured: Make) -> None:
    base = {"grpo__group_size": 4, "sampling__mix": PLAIN}
    assert not configured("grpo", **base).corrected
    assert configured("grpo", **base | {"sampling__mix": TRUNCATED}).corrected
    with pytest.raises(InputError, match='importance = "never" with top_k, top_p'):
        configured("grpo", **base | {"sampling__mix": TRUNCATED, "grpo__importance": "never"})


def test_a_mix_that_a_group_cannot_hold_is_refused_at_the_start(configured: Make) -> None:
    config = configured("ppo", ppo__samples=1, sampling__mix=PLAIN)
    with pytest.raises(InputError, match="of 1 samples a prompt none falls to entry 2"):
        methods.find("ppo").train(config)


@pytest.mark.parametrize("search", [{"sampling__strategy": "beam"}, {"sampling__beams": 4}])
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_methods_of_ratios_refuse_beams(name: str, search: dict[str, Any], configured: Make) -> None:
    with pytest.raises(InputError, match="has no probability of having been sampled"):
        configured(name, **search)


# Options that move.


def test_what_moves_by_hand() -> None:
    config = RunSampling(top_p=0.8, top_p_end=1.0, temperature=0.5, temperature_end=1.5)
    config.temperature_shape = "cosine"
    middle = at(config, functools.partial(ramp, progress=0.25))
    assert isinstance(middle, MixedSampling)
    assert not isinstance(middle, RunSampling)
    [way] = middle.mix
    # 0.8 + 0.2/4; 0.5 + (1 − cos π/4)/2, which linear would be 0.75.
    assert (way.top_p, way.temperature) == pytest.approx((0.85, 0.6464466), abs=1e-7)
    assert config.truncated
    assert not at(RunSampling(top_p_end=0.5), functools.partial(ramp, progress=0.0)).truncated
    last = at(config, functools.partial(ramp, progress=1.0))
    assert not last.truncated
    assert (steady(config).top_p, steady(config).temperature) == (1.0, 1.5)
    still = RunSampling(top_p=0.8)
    assert at(still, functools.partial(ramp, progress=0.5)) is still


def test_an_evaluation_draws_by_the_largest_share() -> None:
    made = steady(MixedSampling(mix=[{"share": 1}, {"share": 2, "top_k": 5}, {"share": 2, "top_k": 7}]))
    assert made == SamplingConfig(top_k=5)
    plain = SamplingConfig(top_p=0.5)
    assert steady(plain) is plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p_shape": "cosine"}, "top_p_shape has no effect without top_p_end"),
        ({"temperature_shape": "cosine"}, "temperature_shape has no effect without temperature_end"),
        ({"top_p_end": 0.5, "mix": PLAIN}, "top_p_end has no effect with mix"),
        ({"temperature_end": 0.5, "mix": PLAIN}, "temperature_end has no effect with mix"),
        ({"temperature_end": 0.5, "temperature": 0}, "no effect at temperature 0"),
        ({"temperature_end": 0.0}, "greater than 0"),
        ({"top_p_end": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_moving_options_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunSampling(**options)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[SamplingConfig]:
    """What every rollout was drawn with."""
    seen: list[SamplingConfig] = []

    def spy(
        lm: Any, sampler: Any, mixture: Any, prompts: list[Group], n: int, given: Any, **more: Any
    ) -> Any:
        seen.append(given)
        return sample_and_score(lm, sampler, mixture, prompts, n, given, **more)

    monkeypatch.setattr(ahead, "sample_and_score", spy)
    return seen


@pytest.mark.parametrize("overlap", [False, True])
def test_top_p_goes_from_start_to_end(overlap: bool, configured: Make, drawn: list[SamplingConfig]) -> None:
    train(configured("grpo", sampling__top_p=0.5, sampling__top_p_end=1.0, grpo__overlap=overlap), "grpo")
    assert [config.top_p for config in drawn] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


def test_the_share_of_a_token_budget_counts(configured: Make, drawn: list[SamplingConfig]) -> None:
    budget = {"train__steps": 0, "train__token_budget": 400, "grpo__group_size": 2}
    _, metrics = train(configured("grpo", sampling__top_p=0.5, sampling__top_p_end=1.0, **budget), "grpo")
    found = [config.top_p for config in drawn]
    assert len(found) == len(metrics) > 2
    assert found[0] == 0.5
    assert found == sorted(set(found))


@pytest.mark.parametrize(
    "moving",
    [
        {"sampling__top_p": 0.5, "sampling__top_p_end": 1.0},
        {"sampling__temperature": 0.5, "sampling__temperature_end": 2.0, "grpo__overlap": True},
        {"sampling__mix": TRUNCATED},
        {"sampling__mix": PLAIN, "train__batch_groups": 2, "grpo__rollout_groups": 4},
    ],
)
def test_resume_is_bit_exact(moving: dict[str, Any], configured: Make) -> None:
    options = {"train__save_every": 3, "train__eval_every": 1, "grpo__group_size": 4, **moving}
    module = methods.find("grpo")
    straight = module.train(configured("grpo", out="straight", **options))
    config = configured("grpo", out="stopped", **options)
    with pytest.raises(KeyboardInterrupt):
        module.train(config, on_eval=stop_at(5))
    config.run.resume = True
    resumed = module.train(config)
    assert_same_run(resumed.out, straight.out)


def test_a_temperature_that_moves_is_followed_by_all_log_probabilities(configured: Make) -> None:
    moving = {"sampling__temperature": 0.5, "sampling__temperature_end": 2.0, "train__lr": 0.0}
    _, metrics = train(configured("grpo", **moving), "grpo")
    assert max(line["sampler_gap"] for line in metrics) < 1e-5
    assert max(abs(line["kl"]) for line in metrics) < 1e-9
    entropies = [line["entropy"] for line in metrics]
    assert entropies[-1] > entropies[0] + 1
