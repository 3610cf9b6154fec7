"""What a plan says that a CPU holds, against what autograd, the optimiser and the cache really hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab.groups import Group
from trimtab.kernels.build import library
from trimtab.methods.shared.setup import settle_layout
from trimtab.models.adapters import AdapterConfig, adapt, fresh
from trimtab.models.language_model import LanguageModel
from trimtab.planning import activations, states
from trimtab.planning.batch import batch_of
from trimtab.planning.job import Adapter, Batch, Compute, Job, Model, Role, Sampling
from trimtab.planning.memory import cache, memory_of
from trimtab.planning.models import model_of
from trimtab.rollouts.engine import TreeSampler
from trimtab.rollouts.sampling import SamplingConfig
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
                engine=engine,  # type: ignore[arg-type]
                recompute=recompute,  # type: ignore[arg-type]
                activation_mb=1,
            )
            for found in memory_of(job).phases:
                assert all(part.bytes >= 0 for part in found.parts), (recompute, engine, found.name)


def test_recomputation_and_shards_take_less() -> None:
    model = model_of({"model_type": "llama", **SIZES, "num_hidden_layers": 12, "hidden_size": 256})
    large = batch(micro_batch_tokens=4096, groups=200)
    peaks = {
        name: memory_of(Job("dpo", model, large, **more)).peak
        for name, more in {
            "none": {},
            "all": {"recompute": "all"},
            "gpu": {"engine": "gpu"},
            "two": {"engine": "gpu", "devices": 2, "shard": True},
        }.items()
    }
    assert peaks["all"] < peaks["none"]
    assert peaks["two"] < peaks["gpu"]


def phase(job: Job, name: str) -> Any:
    """The parts of one phase."""
    return next(found.parts for found in memory_of(job).phases if found.name == name)


def held(job: Job) -> float:
    """Bytes of models, masters, gradients and moments while the run trains."""
    kinds = {"weights", "master weights", "gradients", "optimiser", "adapter"}
    return float(sum(part.bytes for part in phase(job, "training") if part.kind in kinds))
