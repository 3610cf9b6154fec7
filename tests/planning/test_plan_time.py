"""Seconds, tokens and cost of a plan: counts by hand and against PyTorch's own counter, devices by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import CONFIG
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from trimtab.errors import InputError
from trimtab.models.adapters import AdapterConfig, adapt, fresh
from trimtab.planning import devices
from trimtab.planning.counts import Amount, Tokens, layer_ends
from trimtab.planning.devices import CARDS, Device, Reached, calibrated, find_device, keep
from trimtab.planning.job import BYTES, Adapter, Batch, Job, Model, Role, Sampling
from trimtab.planning.models import find_model, model_of
from trimtab.planning.roles import adapter_of
from trimtab.planning.rollout import rows_at_once
from trimtab.planning.time import spent_on, time_of
from trimtab.planning.trace import Table, evaluate
from trimtab.planning.work import drawn, once, pieces, policy_of

SMALL = model_of(CONFIG, "small")
PLAIN = Device("plain", "gpu", 80, 10, 100, 1000, call_s=0.0, decode_call_s=0.0, row_s=0.0)
PLAIN = dataclasses.replace(
    PLAIN, reached=Reached(*(1.0 for _ in dataclasses.fields(Reached))), link=100, node_link=10
)
"""Every peak is reached and nothing else takes time: 10 and 100 · 10¹² flops/s, 10¹² bytes/s."""


def job(model: Model = SMALL, **changed: Any) -> Job:
    """16 sequences of 96 + 32 tokens, one micro-batch of 2,048."""
    batch = Batch(
        groups=16,
        responses=16,
        tokens=2048,
        targets=512,
        scores=16 * 128 * 129 / 2,
        micro_batches=1,
        widest=2048,
        widest_targets=512,
        rows=1,
        longest=128,
    )
    return Job(**{"method": "sft", "model": model, "batch": batch, "engine": "gpu", **changed})


def rollout(**changed: Any) -> Sampling:
    """16 prompts of 96 tokens, one answer of 32 to each."""
    sizes = {"prompts": 16, "samples": 1, "prompt": 96, "response": 32, "longest_prompt": 96}
    return Sampling(**{**sizes, "longest_response": 32, **changed})


def of(job: Job, phase: str) -> Amount:
    """What a step computes in a phase."""
    return sum((p.amount for p in pieces(job) if p.phase == phase), Amount())


# --- counts, against PyTorch's counter on the real modules --------------------------------------------------


def counted(model: torch.nn.Module, tokens: int) -> tuple[int, int]:
    """Flops of matrix products, and of those in attention, in one forward and backward pass."""

    def in_place(_: Any, a: Any, b: Any, **_more: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    # Its table lacks this form, in which a product is added to what is there.
    more: Any = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        model(input_ids=torch.arange(tokens)[None] % 96).logits.sum().backward()
    by_op = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    batched = sum(flops for name, flops in by_op.items() if "bmm" in name or "attention" in name)
    return sum(by_op.values()) - batched, batched


@pytest.mark.parametrize("adapted", [False, True])
def test_flops_are_those_that_pytorch_counts(adapted: bool) -> None:
    torch.manual_seed(0)
    real: Any = Qwen2ForCausalLM._from_config(Qwen2Config(**CONFIG), attn_implementation="eager")
    made = Adapter()
    if adapted:
        real = adapt(real, fresh(AdapterConfig(kind="lora", rank=8), scores=False))
        made = Adapter("lora", 8, ends=SMALL.linear_ends, layers=21)
    products, attention = counted(real, 64)
    given = Tokens(64, 64, 64 * 64, 1)  # eager attention computes the whole square
    policy = policy_of(job(adapter=made))
    ours = policy.forward(given) + policy.backward(given, 64, 0)
    # Nothing below the first layer learns: its q, k, v (and their adapters' first factor) send nothing down.
    unsent = 2 * 64 * (32 * (32 + 16 + 16) + 3 * 32 * 8) if adapted else 0
    assert ours.products + ours.narrow - unsent == products
    # Autograd keeps the probabilities, where packed attention computes them again: 3 for our 1 + 2.5.
    assert ours.scores / 3.5 * 3 == attention


def test_width_of_a_layers_linear_weights() -> None:
    assert layer_ends(SMALL) * SMALL.layers == SMALL.linear_ends
    # Mixtral: a token reads its width for each of two experts, not for all eight.
    mixtral = find_model("mixtral-8x7b-v0.1", online=False)
    width, inner = 4096, 14336
    attention = 4 * width + 2 * 4096 + 2 * 1024
    assert layer_ends(mixtral) == attention + 3 * (2 * inner + 2 * width)


def test_experts_compute_what_is_active_and_read_what_is_used() -> None:
    mixtral = find_model("mixtral-8x7b-v0.1", online=False)
    one = drawn(given := job(mixtral, sampling=rollout(prompts=1)), policy_of(given))
    many = drawn(given := job(mixtral, sampling=rollout(prompts=64)), policy_of(given))
    steps = 32
    # All rows of 64 prompts meet every expert; a lone row reads the two that it goes through.
    cache = 8 * 128 * 2 * 2 * 32 * (96 + 16) * 32  # 2 · 8 heads · 128 · 2 bytes · layers · keys · tokens
    ends = 32000 * 4096
    assert one.decode_bytes == steps * 2 * (mixtral.active_linear + ends) + cache
    assert many.decode_bytes == steps * 2 * (mixtral.linear + ends) + 64 * cache
    assert many.products == 64 * one.products, "prefill computes with the active ones"


def test_backward_twice_forward_and_recomputation_a_forward_more() -> None:
    plain, again = of(job(), "training"), of(job(recompute="all"), "training")
    layers = 2 * 2048 * SMALL.active_linear
    head = 2 * 512 * 96 * 32
    assert plain.products == 3 * (layers + head)
    assert again.products == plain.products + layers, "the head is no layer"
    frozen = of(job(adapter=Adapter("lora", 8, ends=SMALL.linear_ends, layers=21)), "training")
    assert frozen.products == 2 * (layers + head), "a frozen base has no gradient: 2, not 3"
    assert frozen.narrow == 3 * 2 * 2048 * 8 * SMALL.linear_ends


def test_an_adapter_computes_in_the_runs_dtype() -> None:
    adapter = Adapter("lora", 8, ends=SMALL.linear_ends, layers=21)
    frozen = Adapter("lora", 0, ends=0, layers=0)
    passes = {}
    for compute in ("bfloat16", "float32"):
        with_it, without = (of(job(adapter=a, compute=compute), "training") for a in (adapter, frozen))
        learned = (2 * BYTES[compute] + 6) * 8 * SMALL.linear_ends
        passes[compute] = with_it.passes - without.passes - learned
    assert passes["float32"] == 2 * passes["bfloat16"] == 2 * 2048 * 16 * SMALL.linear_ends
    narrow, h100 = Amount(narrow=1e12), find_device("h100")
    seconds = {compute: spent_on(narrow, h100, compute)["compute"] for compute in ("bfloat16", "float32")}
    assert seconds["float32"] / seconds["bfloat16"] == pytest.approx(989 / 67)


def test_gradients_of_narrow_weights_take_twice_the_time_on_a_cpu() -> None:
    all_of_them = 2 * 2048 * SMALL.active_linear
    assert of(job(engine="cpu"), "training").slow == all_of_them
    wide = dataclasses.replace(SMALL, inner=1024)
    assert of(job(wide, engine="cpu"), "training").slow == 2 * 2048 * 3 * 32 * (2 * 32 + 2 * 16)
    adapter = Adapter("lora", 8, ends=SMALL.linear_ends, layers=21)
    others: tuple[dict[str, Any], ...] = ({"compute": "float32"}, {"engine": "gpu"}, {"adapter": adapter})
    for other in others:
        assert of(job(**{"engine": "cpu", **other}), "training").slow == 0, other
    found = time_of(job(engine="cpu"), dataclasses.replace(PLAIN, engine="cpu")).works[0]
    training = of(job(engine="cpu"), "training")
    assert found.flops == training.products + training.scores, "what is needed, not what it takes"
    computed = (training.flops + all_of_them) / 1e14
    assert found.seconds == pytest.approx(computed + (training.passes + training.logits) / 1e12)


def test_logits_beyond_128_mib_are_computed_twice() -> None:
    batch = dataclasses.replace(job().batch, widest_targets=2**20)
    kept, beyond = job(), job(batch=batch)  # 2²⁰ · 96 · 2 bytes = 192 MiB
    assert of(beyond, "training").products == of(kept, "training").products + 2 * 512 * 96 * 32
    assert of(job(batch=batch, head="whole"), "training").products == 3 * (
        2 * 2048 * SMALL.active_linear + 2 * 2048 * 96 * 32
    ), "whole logits: of every token, once"
    assert of(job(batch=batch, scalar=True), "training").logits == 0


def test_a_window_leaves_scores_out() -> None:
    windowed = dataclasses.replace(SMALL, window=16, windowed=2)
    one, rest = 4 * 32 * 16 * 128 * 129 / 2, 4 * 32 * 2048 * 16
    assert of(job(windowed), "training").scores == pytest.approx(3.5 * (one + 2 * rest))


# --- phases of methods --------------------------------------------------------------------------------------


def test_an_offline_reference_is_read_once_and_a_rollouts_every_time() -> None:
    offline = job(method="dpo", reference_pass=True, reference_once=True, steps=40, data_passes=4)
    assert "scoring" not in {p.phase for p in pieces(offline)}
    [_, reference] = once(offline)
    # 40 steps are four passes over the data: the data is that of 10 steps.
    assert reference.amount.products == 10 * 2 * (2048 * SMALL.active_linear + 512 * 96 * 32)
    online = job(method="grpo", reference_pass=True, sampling=rollout(), steps_per_rollout=2)
    assert of(online, "scoring").products == (2048 * SMALL.active_linear + 512 * 96 * 32)
    assert len(list(once(online))) == 1, "loading alone"


def test_copies_are_not_read_from_disk() -> None:
    other = dataclasses.replace(SMALL)
    roles = (Role("reference", SMALL), Role("snapshot", SMALL), Role("critic", SMALL, learns=True))
    [loading] = once(job(roles=roles, file_bytes=2))
    assert loading.amount.read == 2 * 2 * SMALL.parameters, "policy and critic"
    [loading] = once(job(roles=(Role("reference", other, bytes=2), Role("critic", other, shares_base=True))))
    assert loading.amount.read == 2 * 4 * SMALL.parameters, "a named reference; the critic is on the base"


def test_roles_of_ppo() -> None:
    roles = (
        Role("reference", SMALL),
        Role("critic", SMALL, learns=True),
        Role("reward model", SMALL, bytes=4),
    )
    four = job(method="ppo", reference_pass=True, old_pass=True, sampling=rollout(), roles=roles)
    layers, head = 2 * 2048 * SMALL.active_linear, 2 * 512 * 96 * 32
    assert of(four, "scoring").products == 4 * layers + 2 * head, "critic and reward model have no vocabulary"
    assert of(four, "training").products == 6 * layers + 3 * head
    assert {p.compute for p in pieces(four) if p.phase == "scoring"} == {"bfloat16", "float32"}
    # Policy and critic: 40 bytes a weight and 6 for rounding; the critic has 3,072 weights fewer, 32 more.
    assert of(four, "update").updates == 46 * (2 * SMALL.parameters - 3072 + 32)


def test_of_several_mini_batches_the_first_needs_no_old_pass() -> None:
    one = Tokens(4 * 2048, 4 * 512, 4 * 16 * (96 * 96 / 2 + 32 * 96 + 32 * 16), 4)
    split = job(method="grpo", old_pass=True, sampling=rollout(prompts=64), steps_per_rollout=4)
    whole = policy_of(split).forward(one)
    assert of(split, "scoring").products == whole.products * 3 / 4 / 4
    assert of(dataclasses.replace(split, old_pass_whole=True), "scoring").products == whole.products / 4


def test_each_reward_model_takes_its_own_time_and_a_watched_one_none() -> None:
    small = dataclasses.replace(SMALL, layers=1, active_linear=SMALL.active_linear / 3)
    roles = (Role("reward model", SMALL, bytes=2), Role("reward model", small, bytes=2))
    both = job(method="grpo", sampling=rollout(), roles=roles)
    # By its name the second was timed as the first: 2 instead of 1 and a third.
    assert of(both, "scoring").products == pytest.approx(2 * 2048 * SMALL.active_linear * 4 / 3)
    watched = (
        roles[0],
        Role("reward model", SMALL, bytes=4, watched=True),
        Role("reference", SMALL, watched=True),
    )
    given = job(method="grpo", sampling=rollout(), roles=watched)
    assert of(given, "scoring").products == 2 * 2048 * SMALL.active_linear


def test_a_reference_reads_the_pairs_alone() -> None:
    """Of 8 samples to a prompt two are compared: 16·(96 + 2·32) tokens, not the rollout's 16·(96 + 8·32)."""
    pairs = dataclasses.replace(job().batch, tokens=16 * 160, targets=16 * 64, widest=16 * 160)
    drawn_from = rollout(samples=8)
    given = job(method="online-dpo", batch=pairs, reference_pass=True, sampling=drawn_from)
    head = 2 * 96 * 32
    assert of(given, "scoring").products == 2560 * 2 * SMALL.active_linear + 1024 * head
    # SPIN: a rollout of four steps' prompts, each with its demonstration beside the answer that was drawn.
    spin = job(
        method="spin",
        batch=pairs,
        reference_pass=True,
        sampling=rollout(prompts=64),
        steps_of_rollout=4,
        steps_per_rollout=8,
    )
    assert of(spin, "scoring").products == 4 / 8 * of(given, "scoring").products


def test_a_baseline_comes_on_top_of_the_pass_over_all_data() -> None:
    kto = job(
        method="kto", reference_pass=True, reference_once=True, reference_each=True, old_pass=True, steps=10
    )
    one = 2048 * 2 * SMALL.active_linear + 512 * 2 * 96 * 32
    assert [p.amount.products for p in once(kto)] == [0, 10 * one]
    assert of(kto, "scoring").products == 2 * one


# --- sampling -----------------------------------------------------------------------------------------------


def test_rows_and_steps_of_continuous_batching() -> None:
    def steps(**changed: Any) -> float:
        given = job(sampling=rollout(**changed))
        return drawn(given, policy_of(given)).steps

    assert steps() == 32
    assert steps(prompts=512) == 64, "256 rows at a time"
    assert steps(prompts=512, response=16) == 32 + 16, "half as long on average; the last run to the longest"
    # 3 layers · (16 + 32) numbers · 2 bytes a token, 8 wide values being kept 16 wide in each of two heads: a
    # row keeps 96 + 32 of them, 36 KiB, and 1 MiB holds 28 (42 without that rounding).
    assert rows_at_once(job(sampling=rollout(prompts=512, cache_mb=1))) == 28
    shared = rollout(prompts=16, samples=32, cache_mb=1)
    assert rows_at_once(job(sampling=shared)) == 104, "a prompt is kept once for its 32 samples"


def test_the_plain_sampler_repeats_prompts_and_runs_all_at_once() -> None:
    few = rollout(prompts=4, samples=8, cache_mb=1, max_rows=2)
    plain = job(sampling=dataclasses.replace(few, engine="plain", response=16))
    found, tree = (drawn(one, policy_of(one)) for one in (plain, job(sampling=few, layout="plain")))
    assert rows_at_once(plain) == 32
    assert rows_at_once(job(sampling=few, layout="plain")) == 2, "the layout is of training"
    # 32 prompts of 96 tokens and the logits of each; the tree reads 4, and has logits of their ends.
    assert found.products == 2 * 32 * 96 * (SMALL.active_linear + 96 * 32)
    assert tree.products == 2 * 4 * (96 * SMALL.active_linear + 96 * 32)
    # Rows that have ended run on until the last one has: 32 steps, though 16 is the mean.
    assert (found.steps, found.rows) == (32, 32 * 32)


def test_prompts_are_shared_out_over_devices() -> None:
    given = job(sampling=rollout(prompts=10, samples=2), devices=4)
    # The fullest has 3 of the 10.
    assert rows_at_once(given) == 6
    assert drawn(given, policy_of(given)).rows == 6 * 32


def test_dora_learns_a_length_for_each_row_too() -> None:
    outputs = 3 * (32 + 16 + 16 + 32 + 80 + 80 + 32)
    for kind, more in (("lora", 0), ("dora", outputs)):
        adapter = adapter_of(SMALL, kind, 8)  # type: ignore[arg-type]
        assert policy_of(job(adapter=adapter)).learned == 8 * SMALL.linear_ends + more


def test_a_lone_row_reads_every_weight_for_every_token() -> None:
    llama = find_model("llama-3.1-8b", online=False)
    a100 = find_device("A100")
    given = job(llama, sampling=rollout(prompts=1, response=1000, longest_response=1000))
    [work] = [w for w in time_of(given, a100).works if w.phase == "sampling"]
    weights = 2 * (llama.parameters - 128256 * 4096)  # the embedding is looked up
    floor = 1000 * weights / 2039e9
    # 15 GB at 2,039 GB/s are 7.4 ms a token, 10.5 at the share that is reached. By its flops: 0.05 ms.
    assert 7.3 < floor < 7.4
    assert 1.0 < work.seconds / (floor / a100.reached.weights) < 1.05
    assert work.bound == "memory"


def test_many_rows_compute_longer_than_they_read() -> None:
    llama = find_model("llama-3.1-8b", online=False)
    device = dataclasses.replace(PLAIN, bandwidth=1e6)
    given = job(llama, sampling=rollout(prompts=256, cache_mb=10**6))
    [work] = [w for w in time_of(given, device).works if w.phase == "sampling"]
    assert work.bound == "compute"


# --- seconds ------------------------------------------------------------------------------------------------


def test_seconds_by_hand() -> None:
    given = job(steps=10)
    training = of(given, "training")
    seconds = (training.products + training.scores) / 1e14 + (training.passes + training.logits) / 1e12
    update = 46 * SMALL.parameters / 1e12
    found = time_of(given, PLAIN, price_per_hour=3.6)
    assert found.step_s == pytest.approx(seconds + update)
    assert found.once_s == pytest.approx(SMALL.parameters * 4 / 1e9)
    assert found.run_s == pytest.approx(found.once_s + 10 * found.step_s)
    assert found.tokens == 20_480
    assert found.cost == pytest.approx(found.run_s / 1000)
    assert found.generated_tokens == 0


def test_float32_has_its_own_peak() -> None:
    slow, fast = (time_of(job(compute=c), PLAIN).works[0] for c in ("float32", "bfloat16"))
    assert slow.flops == fast.flops
    assert slow.seconds > 2 * fast.seconds
    t4 = find_device("T4")
    assert t4.flops("bfloat16") == t4.flops("float32") == 8.1e12, "no bf16 there, and 65 is fp16's"


def test_calls_come_on_top_on_a_cpu_and_run_ahead_on_a_gpu() -> None:
    slow = dataclasses.replace(PLAIN, call_s=1.0)
    gpu = time_of(job(), slow).works[0]
    cpu = time_of(job(engine="cpu"), dataclasses.replace(slow, engine="cpu")).works[0]
    # Three passes through 3 layers and what is around them, counted as 6.
    assert gpu.seconds == pytest.approx(27)
    assert 27 < cpu.seconds < 27.1
    assert gpu.bound == cpu.bound == "overhead"


def test_shards_send_layers_twice_and_the_root_and_gradients_once() -> None:
    eight = job(devices=8, shard=True)
    # The root group (embedding, head, last norm) stays whole until its backward pass.
    root = 2 * 96 * 32 + 32
    sent = ((2 * 2 + 4) * SMALL.parameters - 2 * root) * 7 / 8
    assert of(eight, "training").link == pytest.approx(sent)
    assert of(job(shard=True), "training").link == 0
    assert of(eight, "training").products == of(job(), "training").products / 8
    # Masters are the sharded weights themselves: no rounded copy is written.
    assert of(eight, "update").updates == pytest.approx(40 / 46 * of(job(), "update").updates / 8)
    slow = dataclasses.replace(PLAIN, link=1e-3, node_link=1e-5, hop_s=0)
    near = next(w for w in time_of(eight, slow).works if w.phase == "training")
    far = next(w for w in time_of(job(devices=16, shard=True), slow).works if w.phase == "training")
    assert near.bound == far.bound == "link"
    assert near.seconds == pytest.approx(sent / 1e6)
    eight_cards = 8 * 1e-5 * 1e9
    assert far.seconds == pytest.approx(sent / 7 * 8 * 15 / 16 / eight_cards), "a machine's cards together"
    assert time_of(eight, PLAIN, price_per_hour=1.0).cost == pytest.approx(
        8 * time_of(eight, PLAIN).run_s / 3600
    )


def test_tokens_that_are_drawn() -> None:
    given = job(method="grpo", sampling=rollout(samples=8), steps=12, steps_per_rollout=3)
    assert time_of(given, PLAIN).generated_tokens == 4 * 16 * 8 * 32


def test_the_formulas_can_be_written_down() -> None:
    def made(tokens: Any, rows: Any, devices: Any) -> Job:
        roles = (Role("critic", SMALL, learns=True), Role("reward model", SMALL, bytes=4))
        batch = dataclasses.replace(job().batch, tokens=tokens, widest_targets=tokens)
        return job(
            method="ppo",
            batch=batch,
            sampling=rollout(max_rows=rows),
            roles=roles,
            reference_pass=True,
            old_pass=True,
            devices=devices,
            shard=True,
            recompute="all",
        )

    sizes = {"tokens": 3000.0, "rows": 5.0, "devices": 16.0}
    table = Table()
    device = find_device("L4")
    found = time_of(made(*(table.name(name) for name in sizes)), device, price_per_hour=2.0)
    wanted = [found.step_s, found.run_s, found.cost, *(work.seconds for work in found.works)]
    written, places = table.written(wanted, list(sizes))
    values = evaluate(json.loads(json.dumps(written)), sizes)
    plain = time_of(made(*sizes.values()), device, price_per_hour=2.0)
    now = [plain.step_s, plain.run_s, plain.cost, *(work.seconds for work in plain.works)]
    assert [values[place] for place in places] == pytest.approx(now)


@pytest.mark.parametrize(
    ("changed", "device", "price", "says"),
    [
        ({}, "A100", -1.0, "price_per_hour is -1.0"),
        ({}, "A100", float("nan"), "price_per_hour is nan"),
        ({}, "CPU", None, "the plan is for a GPU and CPU is a CPU"),
        ({"devices": 0}, "A100", None, "devices is 0"),
        ({"steps": -3}, "A100", None, "steps is -3"),
    ],
)
def test_what_cannot_be_meant(changed: dict[str, Any], device: str, price: float | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        time_of(job(**changed), find_device(device), price_per_hour=price)


# --- devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        *(("h100", "H100-SXM"), ("NVIDIA H100 80GB HBM3", "H100-SXM"), ("h100 pcie", "H100-PCIe")),
        *(("rtx4090", "RTX-4090"), ("NVIDIA GeForce RTX 3090", "RTX-3090"), ("Tesla T4", "T4")),
        *(("NVIDIA A10G", "A10G"), ("A100-SXM4-40GB", "A100-40GB"), ("cpu", "CPU")),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_names_of_devices(asked: str, name: str) -> None:
    assert find_device(asked).name == name


def test_an_unknown_device_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'H1OO-SXM'.*did you mean H100-SXM"):
        find_device("H1OO-SXM")
    with pytest.raises(InputError, match=r"known are A10, A100-40GB"):
        find_device("%%")


def test_cards_hold_dense_figures_in_their_units() -> None:
    h100, a100 = find_device("H100"), find_device("A100")
    assert h100.flops("bfloat16") == 989e12, "1,979 is with sparsity"
    assert h100.flops("float32") == 67e12, "TF32 is off in PyTorch"
    assert a100.tf32 == a100.flops("bfloat16") / 2e12
    assert find_device("CPU-AMX").bfloat16 == pytest.approx(8 * 2.1e9 * 1024 / 1e12, rel=1e-3), "not twice it"
    assert find_device("MI250X").float32 == 47.9, "matrices, of one die; 23.9 are of vectors"
    assert find_device("A10G").flops("bfloat16") == 70e12, "not the A10's 125"
    assert find_device("RTX 4090").flops("bfloat16") == 165.2e12, "330 adds up in fp16"
    assert h100.memory_gib < 80, "of 80 GiB on the board the driver shows 81,559 MiB"
    assert find_device("H200").memory_gib * 1024 == pytest.approx(143_771, abs=6), "MiB: its GB are GiB"
    assert h100.link == 450, "NVLink's 900 GB/s count both directions"
    assert all(card.tf32 is None or card.float32 <= card.tf32 for card in CARDS.values())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "trimtab" / "calibration.json"


def test_a_calibration_is_kept_by_threads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrated(2) is None
    measured = dataclasses.replace(find_device("CPU"), name="here", measured=True)
    assert keep(measured, 2) == cache
    keep(dataclasses.replace(measured, name="alone"), 1)
    assert calibrated(2) == measured
    assert calibrated(4) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = calibrated()
    assert found is not None
    assert found.name == "alone"


@pytest.mark.parametrize("fact", ["cpu", "cores", "torch", "format", "kernels", "allocator"])
def test_a_stale_calibration_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch, fact: str) -> None:
    keep(find_device("CPU"), 2)
    now = devices.host()
    monkeypatch.setattr(devices, "host", lambda: {**now, fact: "another"})
    assert calibrated(2) is None
    keep(dataclasses.replace(find_device("CPU"), name="new"), 1)
    assert calibrated(2) is None, "nor is it kept beside a new one"
    assert calibrated(1) is not None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"devices": 3}', '{"host": {}, "devices": {"2": {"name": 1}}}', "{"]
)
def test_a_damaged_calibration_is_not_used(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text.replace('"host": {}', f'"host": {json.dumps(devices.host())}'))
    assert calibrated(2) is None
