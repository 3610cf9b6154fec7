"""What is planned: a model, a method, a batch, a device, as numbers and options. No torch, no weights.

Whoever plans makes a :class:`Job` (from a run's configuration: ``studies/job.py``; from options alone:
``quick.py``) and hands it to ``plan.py``. Numbers may be :class:`trimtab.planning.trace.Quantity`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trimtab.planning.numbers import Number

Compute = Literal["float32", "bfloat16", "float64"]
Layout = Literal["packed", "tree", "plain"]
BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
"""Of a number of each dtype."""


@dataclass(frozen=True, slots=True)
class Model:
    """What of a Hugging Face configuration costs memory and time. Counts are of numbers, not bytes."""

    name: str
    family: str
    """``model_type``."""
    parameters: Number
    """All of a causal language model's, tied ones once."""
    active: Number
    """Of these, what one token goes through: less with experts."""
    layers: Number
    width: Number
    """D, of the hidden states."""
    query: Number
    """heads × head width."""
    key: Number
    """Key heads × head width; with multi-head latent attention the width that is kept of a token."""
    value: Number
    heads: Number
    kv_heads: Number
    head_width: Number
    inner: Number
    """Of the MLP: the sum over the experts that a token goes through (shared ones too); mean over layers."""
    matrices: Number
    """Of an MLP: 3 gated, 2 not."""
    linear: Number
    """Parameters of the layers' linear weights, all experts."""
    active_linear: Number
    """Of these, what one token is multiplied by."""
    linear_ends: Number
    """Σ (inputs + outputs) over the layers' linear weights: a LoRA of rank r over all has r times as many."""
    tensor: Number
    """The largest single weight."""
    layer: Number
    """Parameters of the largest layer: what FSDP gathers at once."""
    vocabulary: Number
    """Rows of the embedding."""
    embedding: Number
    """Parameters of the input embedding, positions included."""
    head: Number
    """Parameters of the output head that are its own: 0 where tied."""
    context: Number
    window: Number
    """Of the sliding-window layers; 0 for none."""
    windowed: Number
    """Layers with the window."""
    experts: Number
    """Of a layer; 0 for a dense model."""
    experts_used: Number
    norms: Number
    """RMSNorm or LayerNorm calls over the width in a layer: 2, or 4 (Gemma 2 and 3)."""
    head_norms: Number
    """1 where queries and keys are normed (Qwen3), else 0."""
    norm: Literal["rms", "layer"] = "rms"
    gate: Literal["silu", "gelu", "none"] = "silu"
    """Activation of a gated MLP; none for one of two matrices."""
    tied: bool = True
    packed: bool = True
    """Trees can be packed into one row (no soft-capping, no sinks); False takes the tree or plain layout."""
    latent: bool = False
    """Multi-head latent attention: attention itself reads keys and values of every head."""
    linears: tuple[tuple[str, int, int, int], ...] = ()
    """(name, inputs, outputs, how many in the model) of the layers' linear weights."""

    @property
    def attended_key(self) -> Number:
        """Of a token, what attention reads as keys: what transformers' modules, and our cache, keep."""
        return self.query if self.latent else self.key

    @property
    def attended_value(self) -> Number:
        """As values; with latent attention at most as wide as queries, since their own width is not known."""
        return self.query if self.latent else self.value


@dataclass(frozen=True, slots=True)
class Batch:
    """One optimiser step's work, and its largest piece."""

    groups: Number
    """Groups of a step."""
    responses: Number
    """Responses of a step."""
    tokens: Number
    """Tokens of a step that the model computes: a prompt once in a tree; plain, once for each response."""
    targets: Number
    """Response tokens of a step."""
    scores: Number
    """Σ queries × keys that attention computes in a step, a head and layer: causal triangles count half."""
    micro_batches: Number
    widest: Number
    """Tokens of the largest micro-batch, padding counted."""
    widest_targets: Number
    """Response tokens of that micro-batch: rows of logits."""
    rows: Number
    """Rows of that micro-batch: 1 where packed."""
    longest: Number
    """Tokens of the longest sequence, prompt and response."""
    forward_times: Number = 1
    """How many micro-batches a pass without gradient takes at once."""
    forward_widest: Number = 0
    """Tokens of the largest micro-batch of a pass without gradient; 0 where there is none."""
    forward_targets: Number = 0
    """Response tokens of that one."""
    forward_rows: Number = 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """One rollout, as the engine draws it."""

    prompts: Number
    samples: Number
    """Responses to each prompt."""
    prompt: Number
    """Mean tokens of a prompt."""
    response: Number
    """Mean tokens of a response: what is computed."""
    longest_response: Number
    """What is reserved: ``sampling.max_new_tokens``."""
    longest_prompt: Number
    cache_mb: Number = 2048
    max_rows: Number = 256
    engine: Literal["tree", "plain"] = "tree"
    """plain: every response with its own copy of the prompt, all at once, whatever cache and rows say."""
    filtered: bool = False
    """Top-k, top-p or min-p take tokens out."""


@dataclass(frozen=True, slots=True)
class Role:
    """A model in memory beside the policy."""

    name: Literal["reference", "critic", "reward model", "snapshot"]
    model: Model
    learns: bool = False
    """It has an optimiser of its own."""
    shares_base: bool = False
    """It stands on the policy's frozen base: only an adapter and a head are its own."""
    adapter: bool = False
    """It has an adapter of its own, of the policy's options."""
    bytes: Number | None = None
    """Of a weight; None takes the run's compute dtype."""
    when: Literal["always", "scoring", "before"] = "always"
    """before: only until training begins (a named reference of an offline method)."""
    watched: bool = False
    """Loaded for what is measured on the way alone: it takes no part in a step."""
    whole: bool = False
    """Every process keeps all of it, also where the policy's weights are sharded."""
    file: bool = False
    """It is read from a file of its own; a copy of the policy is not."""
    file_bytes: Number | None = None
    """Of a weight in that file; None for as many as in the policy's."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What learns over a frozen base."""

    kind: Literal["none", "lora", "rslora", "dora"] = "none"
    rank: Number = 16
    ends: Number = 0
    """Σ (inputs + outputs) of the linear layers that get one."""
    layers: Number = 0
    """How many linear layers get one."""
    quantise: Literal["none", "nf4", "int8"] = "none"
    outputs: Number = 0
    """Σ outputs of these layers: with DoRA each has a length, which learns."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    method: str
    """As on the command line."""
    model: Model
    batch: Batch
    steps: Number = 1
    """Optimiser steps of the whole run."""
    sampling: Sampling | None = None
    """None for a method that learns from given feedback."""
    steps_per_rollout: Number = 1
    """Optimiser steps taken on one rollout: epochs × mini-batches."""
    roles: tuple[Role, ...] = ()
    adapter: Adapter = field(default_factory=Adapter)
    compute: Compute = "bfloat16"
    layout: Layout = "packed"
    engine: Literal["cpu", "gpu"] = "cpu"
    """cpu: our fused kernels and packed attention; gpu: transformers' modules and FlexAttention."""
    head: Literal["chunked", "whole"] = "chunked"
    """Logits a chunk at a time; whole is what most peers do, and models whose head cannot be set apart."""
    scalar: bool = False
    """The policy is itself a reward model: a head of a score, no vocabulary."""
    entropy: bool = False
    reference_pass: bool = False
    """Log-probabilities of a frozen reference (or of the policy before it learns) are computed."""
    reference_once: bool = False
    """… once before the first step (offline methods), not for each rollout."""
    reference_each: bool = False
    """… and for each step's batch besides (KTO's baseline)."""
    old_pass: bool = False
    """Log-probabilities of the policy are computed again when a rollout is taken up."""
    old_pass_whole: bool = False
    """… of all of it; otherwise the first step's groups need none."""
    value_head: bool = False
    """The critic is a head on the policy's trunk."""
    recompute: Literal["none", "some", "all"] = "none"
    micro_batch_tokens: Number = 4096
    file_bytes: Number = 4
    """Of a weight in the file that the policy is read from."""
    reward_tokens: Number = 8192
    """Tokens that a reward model reads at once (its args.batch_tokens)."""
    steps_of_rollout: Number = 1
    """Optimiser steps whose groups one rollout holds: rollout_groups ÷ batch_groups."""
    activation_mb: Number = 0
    """With recompute = some: MiB that activations may take; layers beyond it are computed again."""
    data_passes: Number = 1
    """Of the whole run over its data: what is computed once is all steps' tokens over these."""
    devices: Number = 1
    """Processes, one on each device: they share out a step's groups and a rollout's prompts."""
    shard: bool = False
    """Parameters, gradients and optimiser states are sharded over processes (FSDP2); else each has all."""
    shard_over: int = 0
    """Processes that share one copy of the weights, where they are sharded; 0: all of them."""
    gather: Literal["whole", "layers"] = "whole"
    """A sharded policy samples from whole weights, gathered once a rollout, or gathers layers each token."""

    @property
    def sharers(self) -> Number:
        """Processes among which one copy of the weights is cut: 1 where each has all."""
        return (self.shard_over or self.devices) if self.shard else 1

    @property
    def copies(self) -> Number:
        """Copies of the weights that learn alike and whose gradients are added up."""
        return self.devices / self.sharers
