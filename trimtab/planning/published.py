"""Peaks that others measured on their GPUs and published, beside what the planner's functions give.

Each row states what its source states and plans that trainer's own way of doing things: its dtypes, its
optimiser, its head. Most are prime-rl's benchmark baselines (PrimeIntellect-ai/prime-rl, its folder
benchmarks/baselines, one JSON file a run): ``max_memory_reserved`` of a run on made-up data with fp32
parameters and bf16 compute under FSDP2, every layer compiled and computed again. That counts what PyTorch's
allocator holds, not CUDA's context. In its LoRA runs four adapters are in memory at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.planning import gpu, shards
from trimtab.planning.job import Adapter, Batch, Job, Model
from trimtab.planning.models import find_model
from trimtab.planning.numbers import Number

GIB = 2**30
ADAPTERS = 4
"""prime-rl's benchmark asks for so many concurrent adapters."""


@dataclass(frozen=True, slots=True)
class Row:
    """One published peak."""

    source: str
    setting: str
    published_gib: float
    planned_gib: float
    note: str = ""

    @property
    def error(self) -> float:
        """Planned over published, minus 1."""
        return self.planned_gib / self.published_gib - 1


@dataclass(frozen=True, slots=True)
class Setting:
    """What is planned of a published run."""

    model: str
    tokens: int
    gib: float
    """As published."""
    devices: int = 1
    head: Literal["chunked", "peer"] = "chunked"
    rank: int = 0
    """Of an adapter; 0 trains every weight."""
    note: str = ""


PRIME = (
    Setting("Qwen/Qwen3-0.6B", 8192, 31.74, head="peer"),
    Setting("Qwen/Qwen3-0.6B", 16384, 52.8, head="peer"),
    Setting("Qwen/Qwen3-0.6B", 16384, 12.53),
    Setting("Qwen/Qwen3-0.6B", 65536, 19.6),
    Setting("Qwen/Qwen3-0.6B", 16384, 5.1, rank=16),
    Setting("Qwen/Qwen3-0.6B", 65536, 11.5, rank=16),
    Setting("Qwen/Qwen3-0.6B", 16384, 3.33, devices=8, rank=16),
    Setting("HuggingFaceTB/SmolLM3-3B", 16384, 18.91, rank=16),
    Setting("Qwen/Qwen3-4B", 16384, 54.63, devices=8, head="peer"),
    Setting("Qwen/Qwen3-4B", 16384, 17.10, devices=8),
    Setting("Qwen/Qwen3-4B", 65536, 36.10, devices=8),
    Setting("Qwen/Qwen3-30B-A3B", 16384, 74.59, devices=8),
    Setting("meta-llama/Llama-3.1-8B", 16384, 16.56, devices=8, rank=16, note="on B200"),
)


def published() -> list[Row]:
    """Every row, in the order of the table in ``docs/plan-gpu.md``."""
    return [_prime(setting) for setting in PRIME] + torchtune()


def _prime(setting: Setting) -> Row:
    model = find_model(setting.model, online=False)
    adapter = adapter_of(model, setting.rank) if setting.rank else gpu.FULL
    job = job_of(model, setting.tokens, adapter, setting.devices)
    learns = not setting.rank
    if learns:
        states = sum((p.bytes for p in shards.sharded_states(model, setting.devices)), 0)
    else:
        # fp32 masters of a frozen base too; its adapters, their gradients and moments.
        states = 4 * shards.shard(model, setting.devices)
        states = states + ADAPTERS * 16 * adapter.rank * adapter.ends / setting.devices
    # Their adapters compute in bf16 and keep no copies in fp32: what is kept is as without.
    kept = gpu.gpu_activations(model, "bfloat16", setting.tokens, model.layers)
    back = gpu.gpu_in_backward(model, "bfloat16", setting.tokens, model.layers)
    if setting.head == "peer":
        head = gpu.gpu_head(model, "bfloat16", setting.tokens, style="peer", learns=learns)
    else:
        head = gpu.gpu_head_gradient(model, "bfloat16", learns=learns)
        head = head + 4 * model.width * setting.tokens
    waiting = gpu.gpu_head_gradient(model, "bfloat16", learns=learns)
    buffers = shards.gathered(job)
    last = states + shards.last_reduction(job) + 2 * shards.outside(model)
    peak = max(states + buffers + kept + max(head, waiting + back), last)
    what = "SFT, whole logits" if setting.head == "peer" else "RL, chunked head"
    how = f", LoRA r{setting.rank}" if setting.rank else ""
    on = f"{setting.devices} × H100" if not setting.note else f"{setting.devices} × B200"
    return Row(
        "prime-rl",
        f"{setting.model.split('/')[1]}, {what}{how}, {setting.tokens:,} tokens, {on}",
        setting.gib,
        (peak + gpu.gpu_workspace(peak)) / GIB,
        setting.note,
    )


def adapter_of(model: Model, rank: int) -> Adapter:
    """A LoRA on every linear layer that can have one."""
    return Adapter("lora", rank, model.linear_ends, sum(count for *_, count in model.linears))


def job_of(model: Model, tokens: Number, adapter: Adapter, devices: int) -> Job:
    """Enough of a job for the buffers of its shards."""
    batch = Batch(1, 1, tokens, tokens, 0, 1, tokens, tokens, 1, tokens)
    return Job("sft", model, batch, adapter=adapter, engine="gpu", devices=devices, shard=True)


def torchtune() -> list[Row]:
    """torchtune's README: two rows of 2,048 tokens, packed and compiled, layers computed again."""
    tokens = 2 * 2048
    small, large = (find_model(f"meta-llama/Llama-3.1-{size}", online=False) for size in ("8B", "70B"))
    rows = []
    for gib, moments, card, note in (
        (18.9, 0, "RTX 4090", "Adam's 8-bit moments paged out"),
        (37.4, 2, "A6000", "Adam's moments in 8 bits"),
    ):
        # bf16 weights; gradients are used up weight by weight in the backward pass.
        states = (2 + moments) * small.parameters + 2 * small.tensor
        what = f"Llama-3.1-8B, all weights in bf16, 1 × {card}"
        rows.append((what, gib, states + _kept(small, tokens), note))
    adapter = adapter_of(large, 16)
    states = 2 * shards.shard(large, 8) + 2 * 4 * adapter.rank * adapter.ends / 8
    states = states + shards.gathered(job_of(large, tokens, adapter, 8))
    rows.append(("Llama-3.1-70B, LoRA r16, 8 × A100", 27.6, states + _kept(large, tokens), ""))
    return [
        Row("torchtune", f"{what}, {tokens:,} tokens", gib, (used + gpu.gpu_workspace(used)) / GIB, note)
        for what, gib, used, note in rows
    ]


def _kept(model: Model, tokens: int) -> Number:
    kept = gpu.gpu_activations(model, "bfloat16", tokens, model.layers)
    # bf16 logits and their gradient, an eighth of them at a time in fp32.
    logits = tokens * model.vocabulary * (2 + 2 + 12 / 8)
    return kept + max(logits, gpu.gpu_in_backward(model, "bfloat16", tokens, model.layers))
