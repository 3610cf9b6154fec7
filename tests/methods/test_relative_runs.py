"""Whole runs of the group-relative family on the tiny world, and its advantages on groups made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny import assert_same_run, stop_at, train
from torch import nn

from trimtab import methods
from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.methods.shared import ahead, relative
from trimtab.methods.shared.online import next_groups
from trimtab.methods.shared.relative import counted
from trimtab.methods.shared.relative_advantages import fill_advantages
from trimtab.methods.shared.scored import sample_and_score
from trimtab.training.metrics import read_metrics

Make = Callable[..., Any]
LAZY = "words = response.split(); return 0.5 if len(prompt.split()) > 2 else len(set(words)) / 6"
"""A reward with no contrast for long prompts: of the eight, four."""
LENGTH = {"limit": 2, "span": 2}


def reward(folder: Path, body: str = LAZY) -> list[dict[str, str]]:
    return [{"name": tiny.write_reward(folder / "own.py", body)}]


# ---------------------------------------------------------------- advantages


def answers(rewards: list[float], lengths: list[int], **fields: list[Any]) -> Group:
    """A sampled group; ``fields`` has one value for each response."""
    responses = [
        Response(text="x", tokens=[5] * length, reward=reward, sampler_logps=[-1.0] * length, finish="stop")
        for reward, length in zip(rewards, lengths, strict=True)
    ]
    for name, values in fields.items():
        for response, value in zip(responses, values, strict=True):
            setattr(response, name, value)
    return Group("g:1", "p", responses, prompt_tokens=[6])


def advantages(group: Group, config: Any) -> list[float]:
    fill_advantages([group], config)
    return [float(response.advantage or 0.0) for response in group.responses]


def test_the_kl_in_the_reward_by_hand(configured: Make) -> None:
    # log π − log π_ref sums to 0.5 and −1: R = 1 − 0.1·0.5 and 0 + 0.1·1, so the first is ahead by 0.85.
    # The KL's mean over tokens would make it 1 − 0.025 − 0.05 = 0.925.
    group = answers(
        [1.0, 0.0],
        [2, 2],
        old_logps=[[-1.0, -0.5], [-2.0, -1.0]],
        ref_logps=[[-1.5, -0.5], [-1.0, -1.0]],
    )
    assert advantages(group, configured("rloo", rloo__beta=0.1)) == pytest.approx([0.85, -0.85])
    grpo = {"kl_in": "reward", "kl_estimator": "k1", "scale": "none", "beta": 0.1}
    config = configured("grpo", **{f"grpo__{key}": value for key, value in grpo.items()})
    assert advantages(group, config) == pytest.approx([0.425, -0.425])
    assert [r.reward for r in group.responses] == [1.0, 0.0], "the reward itself is logged as it came"


def test_the_punishment_of_length_by_hand(configured: Make) -> None:
    # Limit 20, its last fifth costs: 18 tokens one half, 20 all. Equal rewards of 1 become 1, 0.5 and 0.
    group = answers([1.0, 1.0, 1.0], [3, 18, 20])
    config = configured("dapo", sampling__max_new_tokens=20, dapo__scale="none")
    assert advantages(group, config) == pytest.approx([0.5, 0.0, -0.5])
    config = configured(
        "dapo", out="two", sampling__max_new_tokens=20, dapo__scale="none", dapo__overlong_penalty=2
    )
    assert advantages(group, config) == pytest.approx([1.0, 0.0, -1.0])


def test_advantages_from_judgements_by_hand(configured: Make) -> None:
    group = answers([0.2, 0.9, 0.1, 0.9], [1, 1, 1, 1])
    for source, wanted in {
        "winner": [0.0, 0.5, 0.0, 0.5],
        "gains": [0.3, 0.8, 0.0, 0.8],
        "dcg": [0.5, (1 + 1 / math.log2(3)) / 2, 1 / math.log2(5), (1 + 1 / math.log2(3)) / 2],
    }.items():
        config = configured("grpo", out=source, grpo__advantage_from=source, grpo__scale="none")
        mean = sum(wanted) / 4
        assert advantages(group, config) == pytest.approx([value - mean for value in wanted])
    how = {"grpo__advantage_from": "bradley_terry", "grpo__label_temperature": 0.5, "grpo__scale": "none"}
    pair = answers([1.0, 0.0], [1, 1])
    assert advantages(pair, configured("grpo", out="bt", **how)) == pytest.approx([0.3808, -0.3808], abs=5e-5)


def test_steps_by_hand(configured: Make) -> None:
    # Mean of 1, 0 | 0.5 is 0.5: the first response's steps are worth 0.5 and −0.5.
    group = answers([0.0, 0.0], [4, 2], step_rewards=[[1.0, 0.0], [0.5]], step_ends=[[1, 2], [1]])
    config = configured("grpo", grpo__supervision="process", grpo__scale="none")
    fill_advantages([group], config)
    assert group.responses[0].token_advantages == pytest.approx([0.0, 0.0, -0.5, 0.0])
    assert group.responses[1].token_advantages == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize(
    ("rewards", "ends", "message"),
    [
        ([None, [1.0]], [None, [0]], "a response has no step rewards"),
        ([[], [1.0]], [[], [0]], "a response has no step rewards"),
        ([[1.0, 2.0], [1.0]], [[0], [0]], "2 step rewards for steps that end at tokens [0]"),
        ([[1.0], [1.0]], [[2], [0]], "of 2 tokens has 1 step rewards for steps that end at tokens [2]"),
    ],
)
def test_steps_that_do_not_fit_are_one_line(
    rewards: list[Any], ends: list[Any], message: str, configured: Make
) -> None:
    group = answers([0.0, 0.0], [2, 2], step_rewards=rewards, step_ends=ends)
    with pytest.raises(InputError) as caught:
        fill_advantages([group], configured("grpo", grpo__supervision="process"))
    assert str(caught.value).startswith("g:1: ")
    assert message in str(caught.value)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("name", tiny.RELATIVE)
def test_every_method_learns_what_is_rewarded(name: str, configured: Make) -> None:
    section = name.replace("-", "_")
    options = {f"{section}__beta": 0.0, f"{section}__group_size": 8, "train__batch_groups": 8}
    if name == "rloo":
        options["rloo__beta"] = 0.01
    options["train__steps"] = 25
    if name == "gspo":  # two steps a rollout, so that there is a ratio to clip
        options |= {"train__batch_groups": 4, "gspo__rollout_groups": 8, "train__steps": 50}
    _, metrics = train(configured(name, **options), name)
    start, end = (sum(m["reward_mean"] for m in part) / 3 for part in (metrics[:3], metrics[-3:]))
    assert start < 0.35
    assert end > 0.7
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    if name == "gspo":
        assert max(m["clip_fraction"] for m in metrics) > 0.3, "clips of 3e-4 hold most responses"


@pytest.mark.parametrize("name", tiny.RELATIVE)
def test_tree_and_plain_layout_are_one_run(name: str, configured: Make) -> None:
    section = name.replace("-", "_")
    runs = []
    for layout in ("tree", "plain"):
        config = configured(
            name,
            out=layout,
            train__steps=3,
            model__layout=layout,
            model__dtype="float64",
            **{f"{section}__epochs_per_rollout": 2},
        )
        runs.append(train(config, name)[1])
    for ours, theirs in zip(*runs, strict=True):
        for key in ("reward_mean", "response_tokens", "loss", "entropy", "grad_norm", "clip_fraction"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5), key


@pytest.mark.usefixtures("norms_in_their_own_dtype")
@pytest.mark.parametrize("name", tiny.RELATIVE[1:])
def test_micro_batches_are_the_whole(name: str, configured: Make) -> None:
    section = name.replace("-", "_")
    common = {
        "train__steps": 3,
        "model__dtype": "float64",
        "train__adam_eps": 1e-3,
        "train__lr": 1e-2,
        f"{section}__epochs_per_rollout": 3,
        f"{section}__entropy_bonus": 0.01,
        f"{section}__mask_cut_off": True,
    }
    small, large = (
        methods.find(name).train(configured(name, out=str(n), train__micro_batch_tokens=n, **common))
        for n in (16, 4096)
    )
    for key, weight in small.state.optimiser.masters.items():
        assert (weight - large.state.optimiser.masters[key]).abs().max().item() <= 1e-10, key
    metrics = [read_metrics(run.out / "metrics.jsonl") for run in (small, large)]
    assert [m["loss"] for m in metrics[0]] == pytest.approx([m["loss"] for m in metrics[1]], abs=1e-10)
    assert max(m["grad_norm"] for m in metrics[0]) > 1e-3


def test_an_entropy_bonus_keeps_the_policy_varied(configured: Make) -> None:
    entropy = {}
    for bonus in (0.0, 1.0):
        config = configured("dr-grpo", out=str(bonus), train__steps=12, dr_grpo__entropy_bonus=bonus)
        entropy[bonus] = train(config, "dr-grpo")[1][-1]["entropy"]
    assert entropy[1.0] > entropy[0.0] + 0.3


@pytest.mark.parametrize("name", ["grpo", "rloo", "gspo"])
def test_a_mix_of_temperatures_keeps_every_ratio_exact(name: str, configured: Make) -> None:
    """Each response at its own temperature: π_old is the sampler's, and before the first step π_ref too."""
    mix = [{"temperature": 0.6}, {"temperature": 1.4}]
    _, metrics = train(configured(name, sampling__mix=mix, train__steps=2), name)
    assert max(m["sampler_gap"] for m in metrics) < 1e-5
    assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert metrics[1]["kl"] > 0


def test_a_truncated_sampler_is_corrected_at_the_ratios_level(
    configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response that is one term has one weight, the same for all of its tokens."""
    seen: list[torch.Tensor] = []
    loss = relative.relative_loss

    def watched(*arguments: Any, **more: Any) -> Any:
        seen.append(more["importance_NT"])
        return loss(*arguments, **more)

    monkeypatch.setattr(relative, "relative_loss", watched)
    for name, alike in (("gspo", True), ("rloo", True), ("grpo", False)):
        seen.clear()
        train(configured(name, out=name, sampling__top_p=0.7, train__steps=1), name)
        spread = max(float((weights.max(-1).values - weights.min(-1).values).max()) for weights in seen)
        assert (spread < 1e-6) == alike
        assert min(float(weights.min()) for weights in seen) < 0.9


# ---------------------------------------------------------------- dynamic sampling


class Spy:
    """What every call of ``sample_and_score`` drew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[Group] = []
        self.calls: list[tuple[int, list[str]]] = []

        def spy(lm: Any, sampler: Any, mixture: Any, prompts: list[Group], *rest: Any, **more: Any) -> Any:
            rollout = sample_and_score(lm, sampler, mixture, prompts, *rest, **more)
            self.calls.append((more["step"], [group.id for group in prompts]))
            self.drawn += rollout.groups
            return rollout

        monkeypatch.setattr(ahead, "sample_and_score", spy)


def test_groups_without_contrast_are_replaced(
    configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    config = configured("dapo", train__steps=4, reward__terms=reward(tmp_path), dapo__overlong_buffer=0)
    result, metrics = train(config, "dapo")
    assert [m["groups_without_contrast"] for m in metrics] == [0.0] * 4
    kept = 4 * 4
    assert len(spy.drawn) > kept + 8
    # Every prompt drawn is accounted for, and so is every token, of dropped groups too.
    assert result.state.position == len(spy.drawn) == kept + metrics[-1]["refilled_groups"]
    tokens = sum(len(r.tokens or ()) for group in spy.drawn for r in group.responses)
    assert metrics[-1]["generated_tokens"] == tokens
    # Refills of one rollout belong to one step, and each draws as many as are missing.
    sizes = [len(ids) for step, ids in spy.calls if step == 0]
    assert sizes[0] == 4
    assert all(size < 4 for size in sizes[1:])
    # Prompts go on in the stream's order, without a gap or a repetition.
    names = [name.split("#")[0] for _, ids in spy.calls for name in ids]
    assert sorted(names[:8]) == sorted(set(names))
    assert sorted(names[8:16]) == sorted(set(names))
    lineage = json.loads((result.out / "lineage.json").read_text())
    assert lineage["refilled_groups"] == metrics[-1]["refilled_groups"]


def test_a_prompt_that_comes_again_in_a_refill_is_answered_anew(
    configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    body = "return 0.5 if len(prompt.split()) > 1 else len(set(response.split())) / 6"
    config = configured("dapo", train__steps=1, reward__terms=reward(tmp_path, body), dapo__overlong_buffer=0)
    train(config, "dapo")
    texts: dict[str, list[list[Any]]] = {}
    for group in spy.drawn:
        texts.setdefault(group.id.split("#")[0], []).append([r.tokens for r in group.responses])
    again = [drawn for drawn in texts.values() if len(drawn) > 1]
    assert again, "the test needs more than a pass over the prompts"
    for drawn in again:
        assert drawn[0] != drawn[1]


def test_dynamic_sampling_that_never_finds_contrast_is_one_line(configured: Make, tmp_path: Path) -> None:
    terms = reward(tmp_path, "return 1.0")
    config = configured("dapo", reward__terms=terms, dapo__max_refills=2)
    with pytest.raises(InputError) as caught:
        methods.find("dapo").train(config)
    # 4 prompts and twice as many again.
    assert "step 1: dynamic sampling found no contrast: within each of 12 groups" in str(caught.value)
    assert "after 2 refills" in str(caught.value)
    # Without it such groups teach nothing and are counted.
    config = configured("dapo", out="off", reward__terms=terms, dapo__dynamic_sampling=False, train__steps=2)
    _, metrics = train(config, "dapo")
    assert [m["groups_without_contrast"] for m in metrics] == [1.0, 1.0]
    assert "refilled_groups" not in metrics[0]


def test_fewer_groups_than_optimiser_steps_are_one_line() -> None:
    state: Any = SimpleNamespace(step=4, position=0, pending=[answers([1.0, 0.0], [1, 1])] * 3)
    state.controllers = {"cursor": 0}
    with pytest.raises(InputError, match="step 5: 3 groups are left of a rollout for its 4 optimiser steps"):
        next_groups(state, batch_groups=2, rollout=8, seed=0)


def test_a_rollout_that_stays_short_is_learned_from(configured: Make, tmp_path: Path) -> None:
    config = configured("dapo", train__steps=4, reward__terms=reward(tmp_path), dapo__max_refills=1)
    result, metrics = train(config, "dapo")
    assert result.state.position < 16 + metrics[-1]["refilled_groups"]
    assert len(metrics) == 4


DYNAMIC: dict[str, Any] = {"dapo__max_refills": 5, "train__batch_groups": 2, "dapo__rollout_groups": 4}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("dapo", DYNAMIC),
    ("dapo", DYNAMIC | {"dapo__overlap": True, "model__dtype": "bfloat16"}),
    ("dapo", DYNAMIC | {"dapo__mask_cut_off": True, "dapo__epochs_per_rollout": 2}),
    ("rloo", {"train__batch_groups": 2, "rloo__rollout_groups": 4, "rloo__epochs_per_rollout": 2}),
    (
        "gspo",
        {
            "gspo__epochs_per_rollout": 2,
            "gspo__refresh_reference_every": 3,
            "gspo__reference_average": 0.3,
            "model__dtype": "bfloat16",
        },
    ),
    ("cispo", {"cispo__epochs_per_rollout": 2, "cispo__entropy_bonus": 0.1, "sampling__top_p": 0.8}),
    ("dr-grpo", {"dr_grpo__advantage_from": "gains", "dr_grpo__scale": "batch_std"}),
    ("rloo", {"adapter__kind": "lora", "adapter__rank": 4, "rloo__refresh_reference_every": 2}),
]


@pytest.mark.parametrize(("name", "changed"), CASES)
def test_resume_is_bit_exact(name: str, changed: dict[str, Any], configured: Make, tmp_path: Path) -> None:
    options = {"train__save_every": 3, "train__eval_every": 1, **changed}
    if name == "dapo":
        options["reward__terms"] = reward(tmp_path)
    module = methods.find(name)
    straight = module.train(configured(name, out="straight", **options))
    config = configured(name, out="stopped", **options)
    with pytest.raises(KeyboardInterrupt):
        module.train(config, on_eval=stop_at(5))
    torch.manual_seed(12345)
    resumed = module.train(configured(name, out="stopped", run__resume=True, **options))
    assert resumed.state.position == straight.state.position
    if "adapter__kind" in changed:
        ours, theirs = (read_metrics(run.out / "metrics.jsonl") for run in (resumed, straight))
        assert tiny.comparable(ours) == tiny.comparable(theirs)
        for key, weight in resumed.state.optimiser.masters.items():
            assert torch.equal(weight, straight.state.optimiser.masters[key])
        return
    assert_same_run(straight.out, resumed.out)


# ---------------------------------------------------------------- cut-off responses


def test_cut_off_responses_teach_nothing_and_still_count_as_rewards(
    configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is that of the others alone, with the advantages of all."""
    seen: list[list[Group]] = []
    assess = relative.assess

    def watched(lm: Any, reference: Any, groups: list[Group], *rest: Any) -> None:
        assess(lm, reference, groups, *rest)
        seen.append(groups)

    monkeypatch.setattr(relative, "assess", watched)
    plain, masked = (
        train(configured("dapo", out=str(on), train__steps=1, dapo__mask_cut_off=on), "dapo")
        for on in (False, True)
    )
    assert 0 < masked[1][0]["cut_off"] < 1
    every, rest = ([r for g in groups for r in g.responses] for groups in seen)
    assert [r.advantage for r in every] == [r.advantage for r in rest]
    assert [r.finish == "length" for r in rest] == [r.mask is not None for r in rest]
    kept = [r for g in counted(seen[1]) for r in g.responses]
    assert {r.finish for r in kept} == {"stop"}
    # token_mean over what is left: on policy −Σ A·|o| / Σ|o|.
    tokens = sum(len(r.tokens or ()) for r in kept)
    wanted = -sum((r.advantage or 0.0) * len(r.tokens or ()) for r in kept) / tokens
    assert masked[1][0]["loss"] == pytest.approx(wanted, abs=1e-5)
    assert masked[1][0]["loss"] != pytest.approx(plain[1][0]["loss"], abs=1e-3)
    for key in ("reward_mean", "response_tokens", "advantage_mean", "cut_off"):
        assert masked[1][0][key] == plain[1][0][key], key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_cut_off_responses_alone_changes_nothing(dtype: str, configured: Make) -> None:
    options = {
        "sampling__min_new_tokens": 6,
        "train__steps": 2,
        "model__dtype": dtype,
        "train__weight_decay": 0,
    }
    result, metrics = train(configured("dapo", dapo__mask_cut_off=True, **options), "dapo")
    assert [m["cut_off"] for m in metrics] == [1.0, 1.0]
    assert [m["grad_norm"] for m in metrics] == [0.0, 0.0]
    start = methods.find("dapo").train(configured("dapo", out="none", **(options | {"train__lr": 0.0})))
    for key, weight in result.state.optimiser.masters.items():
        assert torch.equal(weight, start.state.optimiser.masters[key]), key


def test_a_token_budget_that_is_never_spent_ends_in_one_line(configured: Make) -> None:
    options = {"sampling__min_new_tokens": 6, "train__steps": 0, "train__token_budget": 100}
    with pytest.raises(InputError, match=r"step 20: in each of the last 20 steps every response was cut off"):
        train(configured("dapo", dapo__mask_cut_off=True, **options), "dapo")


# ---------------------------------------------------------------- steps


def steps_term(folder: Path, separator: str) -> list[dict[str, Any]]:
    """A reward for steps: how many words they have that differ."""
    body = "return [len(set(step.split())) / 6 for step in steps]"
    (folder / "steps.py").write_text(f"def judge(prompt, steps, **columns):\n    {body}\n")
    function = f"{folder / 'steps.py'}:judge"
    return [{"name": "steps", "args": {"function": function, "separator": separator, "outcome": "last"}}]


def test_process_supervision_with_one_step_is_the_outcomes_run(configured: Make, tmp_path: Path) -> None:
    runs = [
        train(
            configured(
                "grpo",
                out=kind,
                train__steps=4,
                reward__terms=steps_term(tmp_path, "nowhere"),
                grpo__supervision=kind,
            ),
            "grpo",
        )
        for kind in ("outcome", "process")
    ]
    assert runs[0][1][0]["grad_norm"] > 0.01
    weights = [result.state.optimiser.masters for result, _ in runs]
    for key, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][key], rtol=0, atol=1e-5)


def test_process_supervision_of_several_steps_runs_and_resumes(configured: Make, tmp_path: Path) -> None:
    """Each answer's steps end at a "u"; micro-batches and a checkpoint in a rollout change nothing."""
    options: dict[str, Any] = {
        "grpo__supervision": "process",
        "reward__terms": steps_term(tmp_path, "u"),
        "grpo__epochs_per_rollout": 2,
        "train__save_every": 3,
        "train__eval_every": 1,
    }
    straight, metrics = train(configured("grpo", out="straight", **options), "grpo")
    saved = tiny.saved_state(straight.out, 3)
    steps = [r["step_rewards"] for group in saved["pending"] for r in group["responses"]]
    assert max(map(len, steps)) > 1
    advantages = [r["token_advantages"] for group in saved["pending"] for r in group["responses"]]
    assert any(len(set(row)) > 1 for row in advantages), "tokens of one response differ"
    # Contrast is between steps: groups whose outcomes are equal may well have it.
    [line] = [m for m in metrics if m["step"] == 3 and "loss" in m]
    taught = [
        len({s for r in group["responses"] for s in r["step_rewards"]}) > 1 for group in saved["pending"]
    ]
    assert line["groups_without_contrast"] == 1 - sum(taught) / len(taught)
    with pytest.raises(KeyboardInterrupt):
        methods.find("grpo").train(configured("grpo", out="stopped", **options), on_eval=stop_at(5))
    resumed = methods.find("grpo").train(configured("grpo", out="stopped", run__resume=True, **options))
    assert_same_run(straight.out, resumed.out)
    losses = train(configured("grpo", out="small", train__micro_batch_tokens=16, **options), "grpo")[1]
    assert [m["loss"] for m in losses[:2]] == pytest.approx([m["loss"] for m in metrics[:2]], abs=1e-5)


def test_process_supervision_without_steps_is_one_line(configured: Make) -> None:
    with pytest.raises(InputError, match=r'grpo\.supervision = "process" needs a reward for steps'):
        methods.find("grpo").train(configured("grpo", grpo__supervision="process"))


def test_process_supervision_refuses_a_weight_that_would_teach_nothing(
    configured: Make, tmp_path: Path
) -> None:
    def run(weight: float) -> None:
        terms = [*steps_term(tmp_path, "u"), {"name": "length", "weight": weight, "args": LENGTH}]
        options = {"grpo__supervision": "process", "reward__terms": terms, "train__steps": 1}
        train(configured("grpo", out=str(weight), **options), "grpo")

    with pytest.raises(InputError, match="the reward 'length' judges none: give it weight = 0"):
        run(0.5)
    run(0.0)


# ---------------------------------------------------------------- the reference


def test_a_resumed_moving_average_is_where_the_policy_is() -> None:
    """A checkpoint is read onto the CPU, and a GPU's weights cannot be averaged with it."""
    policy, own = nn.Linear(2, 1, device="meta"), nn.Linear(2, 1, device="meta")
    reference = object.__new__(relative.Reference)
    reference.lm, reference._share = SimpleNamespace(model=own, version=0), 0.5  # type: ignore[assignment]
    state: Any = SimpleNamespace(optimiser=SimpleNamespace(masters=dict(policy.named_parameters())))
    saved = {f"reference.{name}": torch.ones(p.shape) for name, p in policy.named_parameters()}
    for state.extra in (dict(saved), {}):  # none: a run that goes on with the options added
        reference.restore(state)
        assert state.extra.keys() == saved.keys()
        assert {tensor.device.type for tensor in state.extra.values()} == {"meta"}
        reference.refresh(SimpleNamespace(), state)  # type: ignore[arg-type]


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_a_moving_average(dtype: str, adapter: str, configured: Make) -> None:
    share, every = 0.25, 2
    options: dict[str, Any] = {"grpo__refresh_reference_every": every, "grpo__reference_average": share}
    options |= {"model__dtype": dtype, "train__steps": 4, "train__eval_every": 1, "adapter__kind": adapter}
    seen: list[dict[str, torch.Tensor]] = []
    state: list[Any] = []
    begin = relative.Reference.begin

    def remember(self: Any, lm: Any, given: Any, **more: Any) -> None:
        begin(self, lm, given, **more)
        state.append(given)

    def on_eval(lm: object, heldout: object, step: int) -> dict[str, float]:
        seen.append({k: v.detach().clone() for k, v in state[0].optimiser.masters.items()})
        return {}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(relative.Reference, "begin", remember)
        result, metrics = train(configured("grpo", **options), "grpo", on_eval=on_eval)
    kept = {k.removeprefix("reference."): v for k, v in result.state.extra.items()}
    assert kept.keys() == result.state.optimiser.masters.keys(), "adapters: their weights alone"
    for key, value in kept.items():
        assert value.dtype == torch.float32
        wanted = seen[0][key]
        for step in (2, 4):
            wanted = (1 - share) * wanted + share * seen[step][key]
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
    assert metrics[1]["kl"] > 0
    # Nothing is averaged where all is taken over.
    plain = train(configured("grpo", out="plain", **(options | {"grpo__reference_average": 1.0})), "grpo")[1]
    assert plain[2]["kl"] < metrics[2]["kl"]
