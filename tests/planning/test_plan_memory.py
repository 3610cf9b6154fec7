"""What a plan says that a CPU holds, against what autograd, the optimiser and the cache really hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab.groups import Group
from trimtab.kernels.build import library
from trimtab.methods.shared.setup import settle_layout
from trimtab.models.adapters import AdapterConfig, adapt, fresh
from trimtab.models.language_model import LanguageModel
from trimtab.planning import activations, gpu, states
from trimtab.planning.batch import batch_of
from trimtab.planning.job import BYTES, Adapter, Batch, Compute, Job, Model, Role, Sampling
from trimtab.planning.memory import memory_of
from trimtab.planning.models import model_of
from trimtab.planning.roles import adapter_of, reference_of, reward_model_of, snapshot_of
from trimtab.planning.rollout import cache, engine_of
from trimtab.rollouts.engine import TreeSampler
from trimtab.rollouts.sampling import (
    SamplingConfig,
    draw,
    exponential_noise,
    sampler_logprobs,
    token_hashes,
)
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser
from trimtab.training.recompute import PROBE_TOKENS, fit_activations, kept_bytes

DTYPES: dict[Compute, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MIB = 2**20
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **ENDS,
}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_head": 4, "n_positions": 512, **ENDS}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox", "phi3", "olmo2")
needs_kernels = pytest.mark.skipif(library() is None, reason="no compiler")


def built(family: str, layers: int, adapter: AdapterConfig | None = None, **more: Any) -> LanguageModel:
    """A random model in its layout, with an adapter if one is given."""
    torch.manual_seed(0)
    sizes = GPT2 | {"n_layer": layers} if family == "gpt2" else SIZES | {"num_hidden_layers": layers}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **more))
    model.eval()  # no dropout, whose masks would be kept too
    if adapter is not None:
        model = adapt(model, fresh(adapter, scores=False))
    lm = LanguageModel(model, None)
    settle_layout(lm, "auto")
    return lm


def card(lm: LanguageModel) -> Model:
    """As the planner reads the model's configuration."""
    return model_of(lm.config.to_dict())


def batch(**sizes: Any) -> Batch:
    """16 pairs of 32 + 2 × 8 tokens."""
    given = {"groups": 16, "responses": 2, "micro_batch_tokens": 256, "layout": "packed", "divisible": False}
    return batch_of(32, 8, **{**given, "layers": 2, **sizes})


@needs_kernels
@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_autograd_saves(family: str, compute: Compute) -> None:
    found = []
    for layers in (1, 3):
        lm = built(family, layers)
        assert lm.layout == "packed"
        lm.cast(DTYPES[compute])
        found.append(kept_bytes(lm))
    each = (found[1] - found[0]) / 2 / PROBE_TOKENS
    planned = activations.layer_kept(card(lm), compute, Adapter())
    # All queries as keys (64 and not 32 wide) would be 7 % more, a forgotten norm's input 8 % less.
    assert planned == pytest.approx(each, rel=0.02)


@needs_kernels
def test_attention_as_a_square_keeps_its_scores() -> None:
    found = []
    for layers in (2, 4):  # a full and a sliding layer each
        lm = built("gemma2", layers, head_dim=16)
        assert lm.layout == "tree"
        lm.cast(torch.bfloat16)
        found.append(kept_bytes(lm))
    row = batch(layout="tree", groups=1)
    square = Job("dpo", card(lm), dataclasses.replace(row, widest=PROBE_TOKENS, rows=1), layout="tree")
    each = (found[1] - found[0]) / 2 / PROBE_TOKENS
    # 4 heads × 256 keys × 8 bytes: three times what all else of the layer keeps.
    assert activations.per_layer(square, square.model) == pytest.approx(each, rel=0.03)


@needs_kernels
def test_under_an_adapter_a_layer_keeps_little_more() -> None:
    found = []
    for layers in (1, 3):
        lm = built("llama", layers, AdapterConfig(kind="lora", rank=4))
        Optimiser(lm.model, TrainConfig(), torch.bfloat16)  # rounds base and adapter, as a run does
        found.append(kept_bytes(lm))
    model = card(lm)
    adapter = Adapter("lora", 4, model.linear_ends, 7 * model.layers)
    each = (found[1] - found[0]) / 2 / PROBE_TOKENS
    planned = activations.layer_kept(model, "bfloat16", adapter)
    assert planned == pytest.approx(each, rel=0.02)
    # PEFT by itself would keep an fp32 copy of each layer's input: 4·(3·64 + 64 + 2·64 + 160) bytes more.
    assert planned == activations.layer_kept(model, "bfloat16", Adapter()) + 2 * 4 * 7


@needs_kernels
@pytest.mark.parametrize("budget", [1, 2])
def test_as_many_layers_are_computed_again_as_in_a_run(budget: int) -> None:
    lm = built("llama", 6)
    lm.cast(torch.bfloat16)
    sizes = TrainConfig(micro_batch_tokens=1024, activation_mb=budget * 4)
    line = fit_activations(lm, sizes)
    assert line is not None
    job = Job(
        "dpo",
        card(lm),
        batch(),
        recompute="some",
        activation_mb=budget * 4,
        micro_batch_tokens=1024,
    )
    again = activations.again(job, job.model)
    assert f"; {again} of 6 layers are computed again" in line
    assert 0 < again < 6


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_states_are_the_optimisers(compute: Compute) -> None:
    lm = built("llama", 2)
    optimiser = Optimiser(lm.model, TrainConfig(), DTYPES[compute])
    for parameter in lm.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for name, master in optimiser.masters.items():
        if optimiser.named[name] is not master:
            optimiser._collected.add(name)
    held = {id(t): t.nbytes for t in lm.model.parameters()}
    held |= {id(m.grad): m.grad.nbytes for m in optimiser.masters.values() if m.grad is not None}
    optimiser.step(0.1)
    held |= {id(m): m.nbytes for m in optimiser.masters.values()}
    for kept in optimiser.adam.state.values():
        held |= {id(t): t.nbytes for key, t in kept.items() if key != "step"}
    job = Job("sft", card(lm), batch(), compute=compute)
    planned = sum(part.bytes for part in states.policy_states(job))
    assert planned == sum(held.values()) == job.model.parameters * (18 if compute == "bfloat16" else 16)


def test_the_cache_holds_the_engines_blocks() -> None:
    lm = built("llama", 2)
    prompts = [Group(f"p{i}", f"p{i}", [], prompt_tokens=[3 + i] * 40) for i in range(3)]
    sampler = TreeSampler()
    sampler.sample(lm, prompts, 4, SamplingConfig(max_new_tokens=70), seed=0, end_tokens=[])
    assert sampler.blocks is not None
    drawn = Sampling(prompts=3, samples=4, prompt=40, response=70, longest_response=70, longest_prompt=40)
    job = Job("grpo", card(lm), batch(), sampling=drawn, compute="float32")
    # 3 prompts of 2 blocks, 12 responses of 3: their last token is never stored.
    assert sampler.blocks.capacity == 42
    assert cache(job) == sampler.blocks.capacity * sampler.blocks.block_bytes


def test_a_dpo_step_by_hand() -> None:
    """L = 2, D = Q = 64, K = V = 32, H = 4, I = 160, V = 96, bf16: counted on paper."""
    model = model_of({"model_type": "llama", **SIZES, "num_hidden_layers": 2, "tie_word_embeddings": True})
    # 96·64 + 2·(2·64·64 + 2·64·32 + 3·64·160 + 2·64) + 64
    assert model.parameters == 6144 + 2 * (8192 + 4096 + 30720 + 128) + 64 == 92480
    job = Job("dpo", model, batch(), reference_pass=True, reference_once=True)
    training = {(p.role, p.kind): p.bytes for p in phase(job, "training")}
    assert training["policy", "weights"] == 2 * 92480
    assert training["policy", "master weights"] == training["policy", "gradients"] == 4 * 92480
    assert training["policy", "optimiser"] == 8 * 92480
    # 256 tokens hold 5 trees of 48: 240 tokens, 80 of them predicted.
    norms, attention, between = 2 * (128 + 4), 2 * (128 + 32 + 32) + 16, 2 * 2 * 160
    read = 2 * (2 * 64 + 64 + 160)
    assert training["policy", "activations"] == 240 * (2 * (norms + attention + between + read) + 260)
    assert training["policy", "logits"] == 80 * 2 * 96 + 80 * 2 * 64
    assert "reference" not in {role for role, _ in training}


def test_what_a_role_adds() -> None:
    model = model_of({"model_type": "llama", **SIZES, "num_hidden_layers": 2})
    n = model.parameters
    plain = Job("ppo", model, batch(), sampling=Sampling(4, 1, 32, 8, 8, 32))
    roles = (
        Role("reference", model),
        Role("critic", model, learns=True),
        Role("reward model", model, bytes=4),
    )
    full = Job("ppo", model, batch(), sampling=plain.sampling, roles=roles)
    more = held(full) - held(plain)
    assert more == (2 + 18 + 4) * n
    # On one base the roles are adapters: three models more would be 3 · 2 · n.
    adapter = Adapter("lora", 4, model.linear_ends, 14)
    shared = (
        Role("reference", model, shares_base=True),
        Role("critic", model, learns=True, shares_base=True, adapter=True),
    )
    lora = Job("ppo", model, batch(), sampling=plain.sampling, roles=shared, adapter=adapter)
    small = 4 * model.linear_ends
    assert held(lora) == 2 * n + 2 * 18 * small


def test_a_phase_never_holds_less_than_nothing() -> None:
    model = model_of({"model_type": "llama", **SIZES, "num_hidden_layers": 2})
    for recompute in ("none", "some", "all"):
        for engine in ("cpu", "gpu"):
            job = Job(
                "grpo",
                model,
                batch(),
                sampling=Sampling(1, 1, 1, 1, 1, 1),
                engine=engine,
                recompute=recompute,
                activation_mb=1,
            )
            for found in memory_of(job).phases:
                assert all(part.bytes >= 0 for part in found.parts), (recompute, engine, found.name)


def test_recomputation_and_shards_take_less() -> None:
    model = model_of({"model_type": "llama", **SIZES, "num_hidden_layers": 12, "hidden_size": 256})
    large = batch(micro_batch_tokens=4096, groups=200)
    given: dict[str, dict[str, Any]] = {
        "none": {},
        "all": {"recompute": "all"},
        "gpu": {"engine": "gpu"},
        "two": {"engine": "gpu", "devices": 2, "shard": True},
    }
    peaks = {name: memory_of(Job("dpo", model, large, **more)).peak for name, more in given.items()}
    assert peaks["all"] < peaks["none"]
    # With a process beside it, a device holds NCCL's buffers too.
    assert peaks["two"] - gpu.LINKED < peaks["gpu"]


def llama(**changed: Any) -> Model:
    """Of the hand-counted sizes."""
    return model_of({"model_type": "llama", **SIZES, "num_hidden_layers": 2, **changed})


def total(job: Job, name: str, *kinds: str) -> float:
    """Bytes of these kinds in a phase."""
    return float(sum(part.bytes for part in phase(job, name) if part.kind in kinds))


def test_a_larger_critic_is_the_fullest_in_training() -> None:
    """Its own pass, with a score in the place of logits: 3 times the layers of the policy."""
    drawn = Sampling(4, 1, 32, 8, 8, 32)
    deep = llama(num_hidden_layers=6)
    small = Job("ppo", llama(), batch(), sampling=drawn, roles=(Role("critic", llama(), learns=True),))
    large = Job("ppo", llama(), batch(), sampling=drawn, roles=(Role("critic", deep, learns=True),))
    passing = ("activations", "logits", "workspace")
    alone = total(Job("ppo", llama(), batch(), sampling=drawn), "training", *passing)
    assert total(small, "training", *passing) == alone
    # 240 tokens · (6 layers of 1,880 bytes and the ends' 260), 80 scores read from 64 numbers, widened, and
    # their gradient; the first layer's moment of 2·(2·64 + 3·160) bytes a token is more than that gradient.
    kept = 2 * (128 + 4) + 2 * (128 + 32 + 32) + 16 + 2 * 2 * 160 + 2 * (2 * 64 + 64 + 160)
    scored = 80 * 4 * 64
    begin = max(scored, 240 * 2 * (2 * 64 + 3 * 160) - scored)
    assert total(large, "training", *passing) == 240 * (6 * kept + 260) + scored + begin
    assert {p.role for p in phase(large, "training") if p.kind == "logits" and p.bytes} == {"critic"}


def test_another_models_pass_without_gradient_takes_its_own_room() -> None:
    wide = llama(intermediate_size=1600)
    plain = Job("dpo", llama(), batch(), reference_pass=True)
    other = dataclasses.replace(plain, roles=(Role("reference", wide, when="before"),))
    more = total(other, "scoring", "activations") - total(plain, "scoring", "activations")
    assert more == 240 * 2 * 3 * (1600 - 160)


def test_the_plain_sampler_holds_prompts_for_every_response() -> None:
    model = llama()
    drawn = Sampling(3, 4, 40, 70, 70, 40, cache_mb=1, max_rows=2, engine="plain")
    job = Job("grpo", model, batch(), sampling=drawn, compute="float32")
    # 12 rows of 110 tokens in 2 layers and a copy of one as it grows: 2·16·2 numbers of 4 bytes a token.
    assert total(job, "sampling", "cache") == 12 * 110 * 3 * 64 * 4
    # Logits of all 40 tokens at first, not of the last; a draw takes 16 bytes a logit besides.
    assert total(job, "sampling", "logits") == 12 * 96 * (40 * 4 + 16)
    assert total(job, "training", "cache") == 0, "it goes with the rollout"
    tree = dataclasses.replace(job, sampling=dataclasses.replace(drawn, engine="tree"), layout="plain")
    assert total(tree, "training", "cache") == total(tree, "sampling", "cache") <= MIB
    assert total(tree, "sampling", "logits") == 2 * 96 * 4
    assert (engine_of(model), engine_of(model, "plain")) == ("tree", "plain")
    assert engine_of(dataclasses.replace(model, packed=False)) == "plain"
    # Soft-capping is not packed, and yet sampled by the tree engine.
    assert engine_of(dataclasses.replace(model, packed=False, family="gemma2")) == "tree"


def test_the_plain_sampler_keeps_so_much() -> None:
    """Against the cache that transformers makes."""
    lm = built("llama", 2)
    with torch.no_grad():
        rows = torch.ones(12, 40, dtype=torch.long)
        made = lm.model(input_ids=rows, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in made.layers)
    drawn = Sampling(3, 4, 39, 1, 1, 39, engine="plain")
    job = Job("grpo", card(lm), batch(), sampling=drawn, compute="float32")
    assert cache(job) == held * 3 / 2  # and a layer's copy


@pytest.mark.parametrize(
    ("engine", "compute", "filtered", "more"),
    [
        ("cpu", "bfloat16", False, 0),
        ("cpu", "bfloat16", True, 32),
        ("cpu", "float64", False, 16),
        ("gpu", "bfloat16", False, 16),
        ("gpu", "bfloat16", True, 32),
    ],
)
def test_a_draw_that_is_not_compiled_takes_more(
    engine: Any, compute: Compute, filtered: bool, more: int
) -> None:
    drawn = Sampling(3, 4, 40, 70, 70, 40, filtered=filtered)
    job = Job("grpo", llama(), batch(), sampling=drawn, compute=compute, engine=engine)
    assert total(job, "sampling", "logits") == 12 * 96 * (BYTES[compute] + more)


def test_what_a_draw_takes_in_pytorch() -> None:
    """The largest sum of tensors alive, by PyTorch's profiler, a logit; the last ones of one byte aside."""
    for options, planned in ({}, 16), ({"top_p": 0.9}, 32):
        logits, hashes = torch.randn(4, 50_000), token_hashes(50_000, "cpu")
        keys, ends = np.arange(4, dtype=np.uint64), np.array([], dtype=np.int64)
        config = SamplingConfig(**options)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            noise = exponential_noise(keys, np.zeros(4, dtype=np.int32), hashes)
            draw(sampler_logprobs(logits, config), noise)
        assert ends.size == 0
        held = most = 0
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        assert most / logits.numel() == pytest.approx(planned, rel=0.15), options


def test_with_a_snapshot_the_next_rollout_stands_beside_training() -> None:
    drawn = Sampling(4, 8, 32, 8, 8, 32)
    alone = Job("grpo", llama(), batch(), sampling=drawn)
    ahead = dataclasses.replace(alone, roles=(Role("snapshot", llama()),))
    passing = ("activations", "logits")
    sampled = total(alone, "sampling", *passing)
    assert total(ahead, "training", *passing) == total(alone, "training", *passing) + sampled
    # A large reward model's pass of 16 groups is more than the sampling, and is not added to it.
    wide = llama(intermediate_size=16_000)
    judged = dataclasses.replace(ahead, roles=(*ahead.roles, Role("reward model", wide, bytes=4)))
    scored = total(judged, "scoring", "activations")
    assert scored > sampled
    assert total(judged, "training", *passing) == total(alone, "training", *passing) + scored


def test_a_device_samples_from_its_share_of_the_prompts() -> None:
    drawn = Sampling(16, 4, 40, 70, 70, 40)
    one = Job("grpo", llama(), batch(), sampling=drawn, engine="gpu")
    four = dataclasses.replace(one, devices=4)
    for kind in ("cache", "logits", "activations"):
        assert total(four, "sampling", kind) == total(one, "sampling", kind) / 4, kind


def test_pages_of_files_that_roles_are_read_from() -> None:
    """A reward model in bf16 of a file in fp32 has both; one in the file's own dtype is its pages."""
    drawn, n = Sampling(4, 1, 32, 8, 8, 32), llama().parameters
    job = Job("ppo", llama(), batch(), sampling=drawn, file_bytes=4)

    def pages(*roles: Role) -> float:
        return total(dataclasses.replace(job, roles=roles), "loading", "file")

    assert pages() == 4 * n
    assert pages(reward_model_of(llama(), bytes=2)) == 8 * n
    assert pages(reward_model_of(llama(), bytes=4)) == 4 * n
    assert pages(reference_of(llama(), Adapter(), named=llama())) == 8 * n
    assert pages(reference_of(llama(), Adapter()), snapshot_of(llama(), Adapter())) == 4 * n, "copies"
    half = dataclasses.replace(reward_model_of(llama(), bytes=4), file_bytes=2)
    assert pages(half) == (4 + 2) * n
    assert pages(dataclasses.replace(half, bytes=2)) == 4 * n


def test_dora_and_averaged_references() -> None:
    model = llama()
    lora, dora = adapter_of(model, "lora", 4), adapter_of(model, "dora", 4)
    # A length for each row: q 64, k and v 32, o 64, gate and up 160, down 64, in both layers.
    lengths = 2 * (64 + 32 + 32 + 64 + 160 + 160 + 64)
    size = states.adapter_size(Job("dpo", model, batch(), adapter=dora))
    assert size == 4 * model.linear_ends + lengths
    assert states.adapter_size(Job("dpo", model, batch(), adapter=lora)) == 4 * model.linear_ends
    real: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES, num_hidden_layers=2))
    made = adapt(real, fresh(AdapterConfig(kind="dora", rank=4), scores=False))
    assert size == sum(p.numel() for p in made.parameters() if p.requires_grad)
    # Refreshed by an average: the adapter's fp32 sums beside what computes, 6 bytes and not 2.
    averaged = reference_of(model, lora, own=True, averaged="bfloat16")
    job = Job("grpo", model, batch(), adapter=lora, roles=(averaged,))
    [part] = states.role_states(job, averaged)
    assert part.bytes == 6 * 4 * model.linear_ends
    assert reference_of(model, Adapter(), averaged="float64").bytes == 16, "masters are fp64 there"


def test_latent_attention_keeps_keys_of_every_head(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
    }
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    more = sizes | moe | {"v_head_dim": 8, "moe_intermediate_size": 32, "first_k_dense_replace": 2}
    monkeypatch.setitem(SIZES, "num_key_value_heads", 4)
    lm = built("deepseek_v3", 2, **more)
    model = card(lm)
    assert (model.latent, model.query, model.key, model.value) == (True, 64, 24, 0)
    wrong = dataclasses.replace(model, latent=False)
    per_token = 64 + 64 - 24  # keys and values of 4 heads of 16, and not a latent of 24 numbers
    for count in (activations.layer_kept, gpu.gpu_kept):
        found = [count(m, "bfloat16", Adapter()) for m in (model, wrong)]
        assert found[0] - found[1] == 2 * per_token
    sampler, prompts = TreeSampler(), [Group("p", "p", [], prompt_tokens=[3] * 40)]
    sampler.sample(lm, prompts, 2, SamplingConfig(max_new_tokens=5), seed=0, end_tokens=[])
    drawn = Sampling(prompts=1, samples=2, prompt=40, response=5, longest_response=5, longest_prompt=40)
    assert sampler.blocks is not None
    held = sampler.blocks.capacity * sampler.blocks.block_bytes
    assert cache(Job("grpo", model, batch(), sampling=drawn, compute="float32")) == held


def phase(job: Job, name: str) -> Any:
    """The parts of one phase."""
    return next(found.parts for found in memory_of(job).phases if found.name == name)


def held(job: Job) -> float:
    """Bytes of models, masters, gradients and moments while the run trains."""
    kinds = {"weights", "master weights", "gradients", "optimiser", "adapter"}
    return float(sum(part.bytes for part in phase(job, "training") if part.kind in kinds))
