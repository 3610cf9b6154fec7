"""A job on many processes: how the weights are held, what each process holds and sends."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from small_model import CONFIG

from trimtab.errors import InputError
from trimtab.parallel import rule
from trimtab.planning import shards, states
from trimtab.planning.devices import Device, Reached
from trimtab.planning.job import Adapter, Batch, Job, Role, Sampling
from trimtab.planning.memory import MESSAGE, memory_of
from trimtab.planning.models import model_of
from trimtab.planning.processes import Processes, held_by, spread, told
from trimtab.planning.quick import quick_job
from trimtab.planning.quick_config import QuickConfig
from trimtab.planning.roles import adapter_of, reward_model_of, snapshot_of
from trimtab.planning.time import links_of, time_of
from trimtab.planning.work import pieces

SMALL = model_of(CONFIG, "small")
DEEP = model_of({**CONFIG, "num_hidden_layers": 6}, "deep")
"""More layers than are gathered at once."""
DEVICE = Device("plain", "gpu", 80, 10, 100, 1000, call_s=0.0, decode_call_s=0.0, row_s=0.0, hop_s=0.0)
DEVICE = dataclasses.replace(DEVICE, reached=Reached(*(1.0 for _ in dataclasses.fields(Reached))))
GIB = 2**30


def job(**changed: Any) -> Job:
    """16 sequences of 128 tokens, of which 32 are predicted, in one micro-batch."""
    batch = Batch(16, 16, 2048, 512, 16 * 128 * 129 / 2, 1, 2048, 512, 1, 128)
    return Job(**{"method": "sft", "model": SMALL, "batch": batch, "engine": "gpu", **changed})


def rollout(**changed: Any) -> Sampling:
    return Sampling(
        **{**dict.fromkeys(("prompts", "samples"), 16), "prompt": 96, "response": 32} | LONGEST | changed
    )


LONGEST = {"longest_prompt": 96, "longest_response": 32}


def sent(of: Job, phase: str, kind: str) -> float:
    return float(sum(getattr(p.amount, kind) for p in pieces(of) if p.phase == phase))


def held(of: Job, phase: str, *kinds: str) -> float:
    found = next(one for one in memory_of(of).phases if one.name == phase)
    return float(sum(part.bytes for part in found.parts if part.kind in kinds))


# --- the rule -----------------------------------------------------------------------------------------------


def test_weights_are_replicated_where_they_leave_room() -> None:
    """In bf16 18 bytes of a weight against 60 % of what is free: 18 · P ≤ 0.6 · free."""
    p = float(SMALL.parameters)
    enough, short = 18 * p / 0.6, 17.9 * p / 0.6
    assert not spread(job(), Processes(4), available=enough)[0].shard
    sharded, why = spread(job(), Processes(4), available=short)
    assert sharded.shard
    assert why.startswith("they take about")
    # Each role counts; one that leaves before training begins does not.
    beside = (
        Role("reference", SMALL),
        Role("critic", SMALL, learns=True),
        Role("reward model", SMALL, bytes=4),
        Role("reference", SMALL, when="before"),
    )
    for roles, each in ((beside[:1], 20), (beside[:2], 38), (beside[:3], 42), (beside, 42)):
        assert rule.whole_bytes(held_by(job(roles=roles)), 2) == each * p
    adapted = job(adapter=adapter_of(SMALL, "lora", 4))
    assert not spread(adapted, Processes(4), available=2 * p / 0.6)[0].shard
    assert spread(adapted, Processes(4), available=1.9 * p / 0.6)[0].shard


def test_one_process_takes_no_notice() -> None:
    asked = Processes(1, "shard", 4, "layers")
    found, why = spread(job(devices=3, shard=True), asked, available=1.0)
    assert (found.devices, found.shard, found.sharers, found.copies, why) == (1, False, 1, 1, "")
    assert told(found) == {}


@pytest.mark.parametrize(
    ("asked", "changed", "line"),
    [
        (
            Processes(6, "shard", 4),
            {},
            "shard_over = 4 does not divide the number of processes, 6: choose one of 2, 3, 6",
        ),
        (Processes(4, "auto", 2), {}, "shard_over has no effect, since weights are whole (they take about"),
        (Processes(4, "auto", 0, "layers"), {}, "gather has no effect, since weights are whole"),
        (Processes(4, "shard"), {"adapter": Adapter("lora", 4, 9, 1, "nf4")}, "cannot cut a quantised base"),
    ],
)
def test_what_a_run_would_refuse(asked: Processes, changed: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        spread(job(**changed), asked, available=100 * GIB)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_quantised_base_is_whole_by_itself() -> None:
    found, why = spread(job(adapter=Adapter("lora", 4, 9, 1, "nf4")), Processes(4), available=1.0)
    assert not found.shard
    assert why == "a quantised base is not cut"


def test_whole_weights_are_sampled_from_where_they_leave_a_fifth() -> None:
    drawn = job(sampling=rollout(), method="grpo")
    taken = 16 * float(shards.shard(SMALL, 4)) + 0.8 * GIB
    whole = 2 * float(SMALL.parameters)
    for spare, expected in ((1.001, "whole"), (0.999, "layers")):
        found, _ = spread(drawn, Processes(4, "shard"), available=taken + spare * whole / 0.8)
        assert found.gather == expected
        assert told(found)["samples_from"].startswith(expected)
    assert spread(drawn, Processes(4, "shard", gather="layers"))[0].gather == "layers"


def test_options_of_a_plan_without_a_file() -> None:
    def quick(method: str = "sft", **more: Any) -> Job:
        return quick_job(
            QuickConfig(method=method, model="qwen3-0.6b", engine="gpu", **more), available=80 * GIB
        )

    assert not quick(devices=4).shard
    assert quick(devices=4, weights="shard", shard_over=2).copies == 2
    assert quick("grpo", devices=4, weights="shard", gather="layers").gather == "layers"
    for options, line in (
        (
            {"devices": 4, "weights": "replicate", "shard_over": 2},
            'shard_over has no effect with weights = "replicate"',
        ),
        ({"devices": 4, "gather": "layers"}, "gather has no effect with sft, which does not sample"),
        ({"devices": 4, "shard_over": 1}, "shard_over = 1 is a whole copy"),
    ):
        with pytest.raises(ValueError, match=line):
            quick(**options)


@pytest.mark.parametrize(("compute", "size"), [("bfloat16", 2), ("float32", 4), ("float64", 8)])
def test_the_rule_counts_the_states_that_a_plan_counts(compute: Any, size: int) -> None:
    parts = states.learning(job(compute=compute), "policy", 1)
    assert rule.learning_bytes(size) == sum(part.bytes for part in parts)


def test_what_a_run_keeps_whole_is_planned_whole() -> None:
    """Four processes: a decoder is cut, an encoder is not, nor what a thread asks."""
    p = SMALL.parameters
    for whole, bytes_ in ((False, 4 * shards.shard(SMALL, 4)), (True, 4 * p)):
        [part] = states.role_states(job(devices=4, shard=True), reward_model_of(SMALL, whole=whole))
        assert part.bytes == bytes_
    adapted = job(devices=4, shard=True, adapter=adapter_of(SMALL, "lora", 4))
    copy = states.role_states(adapted, snapshot_of(SMALL, adapted.adapter))
    assert sum(part.bytes for part in copy) == 2 * (p + 4 * adapted.adapter.ends)


# --- bytes --------------------------------------------------------------------------------------------------


def test_states_by_hand() -> None:
    """Replicated 18 bytes a weight; sharded 16 over the sharers, whatever the number of copies."""
    kinds = ("weights", "master weights", "gradients", "optimiser")
    p = SMALL.parameters
    assert held(job(devices=8), "training", *kinds) == 18 * p
    assert held(job(devices=8, shard=True), "training", *kinds) == 16 * shards.shard(SMALL, 8)
    copies = job(devices=8, shard=True, shard_over=4)
    # By 8, the number of processes, it would be half.
    assert held(copies, "training", *kinds) == 16 * shards.shard(SMALL, 4)
    wide = job(devices=4, shard=True, compute="float64")
    assert held(wide, "training", *kinds) == 32 * shards.shard(SMALL, 4)


def test_an_adapter_over_shards_keeps_no_rounded_copy() -> None:
    adapter = adapter_of(SMALL, "lora", 4)
    count = 4 * adapter.ends
    whole, cut = (job(devices=4, shard=shard, adapter=adapter) for shard in (False, True))
    kinds = ("adapter", "master weights", "gradients", "optimiser")
    assert held(whole, "training", *kinds) == 18 * count
    assert held(cut, "training", *kinds) == 16 * count / 4
    assert held(cut, "training", "weights") == 2 * shards.shard(SMALL, 4)


def test_activations_are_those_of_the_groups_that_the_fullest_process_has() -> None:
    one, eight, three = (held(job(devices=n), "training", "activations") for n in (1, 8, 3))
    assert eight == one / 8
    # 16 groups over 3 processes: one has 6. 16 / 3 would be too few.
    assert three == one * 6 / 16


def test_gradients_that_are_added_up_go_in_messages() -> None:
    assert held(job(devices=2), "update", "workspace") == 4 * SMALL.parameters < MESSAGE
    assert held(job(), "update", "workspace") == 0
    assert held(job(devices=2, shard=True), "update", "workspace") == 0


def test_a_snapshot_is_whole() -> None:
    """It is drawn from while the others learn, so that the policy itself need not be gathered."""
    given = {"sampling": rollout(), "devices": 4, "shard": True, "method": "grpo"}
    beside = job(roles=(Role("snapshot", SMALL, whole=True),), **given)
    snapshot = next(p for p in memory_of(beside).phases[1].parts if p.role == "snapshot")
    assert snapshot.bytes == 2 * SMALL.parameters
    assert held(beside, "sampling", "gathered layer") == 0
    assert held(job(**given), "sampling", "gathered layer") == 2 * SMALL.parameters
    layers = job(gather="layers", **given)
    assert held(layers, "sampling", "gathered layer") == 2 * (2 * 96 * 32 + 32) + 3 * 2 * SMALL.layer


def test_a_reward_model_scores_from_whole_weights_too() -> None:
    """In fp32, beside a policy in bf16; one that only evaluations ask is not spread."""
    given: dict[str, Any] = {"method": "grpo", "sampling": rollout(), "devices": 2, "shard": True}
    of_layers = 2 * 96 * 32 + 32 + 3 * DEEP.layer
    assert of_layers < DEEP.parameters
    roles = (Role("reward model", DEEP, bytes=4),)
    scored = job(model=DEEP, roles=roles, **given)
    assert held(scored, "scoring", "gathered layer") == 4 * DEEP.parameters
    assert held(dataclasses.replace(scored, gather="layers"), "scoring", "gathered layer") == 4 * of_layers
    watched = dataclasses.replace(scored, roles=(dataclasses.replace(roles[0], watched=True),))
    assert held(watched, "scoring", "gathered layer") == 2 * of_layers


# --- seconds ------------------------------------------------------------------------------------------------


def test_replicated_gradients_are_added_up_once_a_step() -> None:
    batch = dataclasses.replace(job().batch, micro_batches=8)
    eight = job(devices=8, batch=batch)
    # Of 16 groups in 9 micro-batches one device has 2, in two of them; 9 / 8 passes nobody makes.
    cut = job(devices=8, shard=True, batch=dataclasses.replace(batch, micro_batches=9))
    [amount] = [piece.amount for piece in pieces(cut) if piece.phase == "training"]
    assert amount.hops == 2 * (4 + 7) * 7
    assert sent(eight, "training", "link") == sent(eight, "training", "across") == 0
    assert sent(eight, "update", "across") == pytest.approx(2 * 4 * SMALL.parameters * 7 / 8)
    assert sent(job(), "update", "across") == 0


def test_copies_of_shards_add_up_their_parts() -> None:
    two = job(devices=16, shard=True, shard_over=8)
    root = 2 * 96 * 32 + 32
    assert sent(two, "training", "link") == pytest.approx(((2 * 2 + 4) * SMALL.parameters - 2 * root) * 7 / 8)
    assert sent(two, "training", "across") == pytest.approx(2 * 4 * SMALL.parameters / 8 / 2)
    assert sent(job(devices=16, shard=True), "training", "across") == 0


def test_network_cards_of_a_machine_carry_a_ring_together() -> None:
    device = dataclasses.replace(DEVICE, link=400, node_link=30, node_devices=8)
    assert links_of(device, 8, 8) == (400, 400)
    assert links_of(device, 64, 64)[0] == 240, "eight cards; one alone would carry 30"
    assert links_of(device, 64, 8) == (400, 30), "copies: each device has its own card"
    assert links_of(device, 64, 1)[1] == 240, "replicated"
    assert links_of(dataclasses.replace(device, node_link=100), 64, 64)[0] == 400, "no faster than within"


def test_layers_are_gathered_for_every_token() -> None:
    given = {"sampling": rollout(samples=1), "devices": 4, "shard": True, "method": "grpo"}
    whole, layers = job(**given), job(gather="layers", **given)
    once = 2 * SMALL.parameters * 3 / 4
    assert sent(whole, "sampling", "link") == pytest.approx(once)
    # 4 rows draw 32 tokens each at once, behind one pass over the prompts.
    assert sent(layers, "sampling", "link") == pytest.approx(33 * once)
    assert sent(layers, "sampling", "hops") == 33 * 4 * 3, "three layers and the root, each three hops"


def test_a_step_of_many_devices_takes_longer_than_its_share() -> None:
    slow = dataclasses.replace(DEVICE, link=1e-3)
    one, eight = (time_of(job(devices=n), slow).step_s for n in (1, 8))
    across = 2 * 4 * SMALL.parameters * 7 / 8 / 1e6
    # What sums of gradients take comes on top: nothing hides it.
    assert eight == pytest.approx(
        (one - 46 * SMALL.parameters / 1e12) / 8 + 46 * SMALL.parameters / 1e12 + across, rel=0.02
    )
