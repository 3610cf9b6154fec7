"""What one pass of a model computes: operations, bytes and calls, by what their speed depends on.

Every formula is in the style of ``numbers.py``. How the counts follow from the code: docs/plan-time.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from trimtab.planning.job import BYTES, Compute, Model
from trimtab.planning.numbers import Number, choose, largest, smallest

KEPT_LOGITS = 128 * 2**20
"""Bytes of a micro-batch's logits, beyond which they are computed again in the backward pass (head.py)."""
AROUND = 6
"""A pass's work around its layers (collation, embedding, head, loss), counted as so many layers' calls."""
TRANSPOSED = 1024
"""From this width on our kernels transpose for a weight's gradient (TRANSPOSE_WIDTH in fused.py)."""
ADAPTED, ADAPTED_BACK = 3.5, 4.5
"""How often an adapter passes over a number of its layer's inputs and outputs, half of each: it reads the
input (1), writes its result, scales it and adds it (6); with gradients, on the way back, 5 and 4.
"""
AGAIN = 2.5
"""Attention's backward pass in forward passes: five products for two, since scores are computed again."""


@dataclass(frozen=True, slots=True)
class Amount:
    """Of work, by what its speed depends on. Flops, bytes, and numbers of calls."""

    products: Number = 0
    """Flops of linear layers and the head, on many rows."""
    slow: Number = 0
    """Those of them that take twice the time: seconds count them once more."""
    narrow: Number = 0
    """Flops of adapters' factors: products that are as narrow as their rank."""
    scores: Number = 0
    """Flops of attention."""
    passes: Number = 0
    """Bytes of elementwise work, of what products read and write, of gradients that are added up."""
    logits: Number = 0
    """Bytes of logits, in training and scoring."""
    draws: Number = 0
    """Bytes of logits that tokens are drawn from."""
    updates: Number = 0
    """Bytes of the optimiser's step."""
    decode_flops: Number = 0
    decode_bytes: Number = 0
    """Weights, keys and values that decode steps read."""
    calls: Number = 0
    """Passes through one layer."""
    decode_calls: Number = 0
    """Layers of decode steps."""
    steps: Number = 0
    """Decode steps."""
    rows: Number = 0
    """Tokens drawn."""
    link: Number = 0
    """Bytes that one device sends to those that share its copy of the weights …"""
    across: Number = 0
    """… and to the other copies."""
    hops: Number = 0
    """Messages that follow one another: a collective of n devices is n − 1."""
    read: Number = 0
    """Bytes from disk."""

    def __add__(self, other: Amount) -> Amount:
        return Amount(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, share: Number) -> Amount:
        """So much of it."""
        return Amount(*(getattr(self, f.name) * share for f in fields(self)))

    @property
    def flops(self) -> Number:
        """All operations."""
        return self.products + self.narrow + self.scores + self.decode_flops

    @property
    def bytes(self) -> Number:
        """All bytes of the memory."""
        return self.passes + self.logits + self.draws + self.updates + self.decode_bytes


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a pass computes."""

    tokens: Number
    targets: Number
    scores: Number
    passes: Number
    """Micro-batches."""


@dataclass(frozen=True, slots=True)
class Runner:
    """A model as one role computes it."""

    model: Model
    engine: Literal["cpu", "gpu"]
    compute: Compute
    scalar: bool = False
    """A head of a score instead of a vocabulary."""
    adapter: Number = 0
    """Σ (inputs + outputs) of the layers with an adapter; 0 for none."""
    rank: Number = 0
    adapted: Number = 0
    """How many layers have one."""
    lengths: Number = 0
    """Of its rows, which DoRA learns besides."""
    kind: str = "none"
    quantise: str = "none"
    frozen: bool = False
    """The weights do not learn: an adapter's base, or a model that only scores."""
    head: Literal["chunked", "whole"] = "chunked"
    entropy: bool = False

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return BYTES[self.compute]

    @property
    def weights(self) -> Number:
        """Parameters of the model as the role has it."""
        return self.model.parameters - (self.model.head if self.scalar else 0)

    @property
    def learned(self) -> Number:
        """Parameters that learn, where the role learns."""
        score = self.model.width if self.scalar else 0
        return self.rank * self.adapter + self.lengths + score if self.frozen else self.weights + score

    def forward(self, given: Tokens) -> Amount:
        """Without what is kept: a pass with a gradient and one without cost the same."""
        return self._layers(given) + self._head(given)

    def backward(self, given: Tokens, widest_targets: Number, again: Number) -> Amount:
        """With the layers' share ``again`` computed a second time, and logits that were not kept."""
        model, ends = self.model, layer_ends(self.model) * self.model.layers
        of_weights = 0 if self.frozen else 1
        learned = self.learned
        own = Amount(
            products=2 * (1 + of_weights) * given.tokens * model.active_linear,
            slow=2 * given.tokens * self._slow() if not self.frozen else 0,
            narrow=4 * given.tokens * self.rank * self.adapter,
            scores=AGAIN * attention_flops(model, given),
            passes=self.size * given.tokens * ((1 + 2 * of_weights) * ends + 2 * self._elementwise())
            + ADAPTED_BACK * self.size * given.tokens * self.adapter
            + given.passes * (self.size * model.linear + (2 * self.size + 6) * learned),
            calls=2 * given.passes * self._calls(),
        )
        found = own + self._layers(given).times(again)
        if self.scalar:
            return found
        rows = self._logit_rows(given)
        found += Amount(
            products=2 * (1 + of_weights) * rows * model.vocabulary * model.width,
            logits=rows * model.vocabulary * (4 * self.size + (26 if self.engine == "gpu" else 0)),
        )
        if self.head == "whole":
            return found
        beyond = widest_targets * model.vocabulary * self.size - KEPT_LOGITS
        return found + self._head(given).times(choose(beyond, 1, 0))

    def _layers(self, given: Tokens) -> Amount:
        model = self.model
        per_weight = {"none": 0, "nf4": 3, "int8": 4}[self.quantise] + (20 if self.kind == "dora" else 0)
        return Amount(
            products=2 * given.tokens * model.active_linear,
            narrow=2 * given.tokens * self.rank * self.adapter,
            scores=attention_flops(model, given),
            passes=self.size * given.tokens * (layer_ends(model) * model.layers + self._elementwise())
            + ADAPTED * self.size * given.tokens * self.adapter
            + given.passes * (self.size + per_weight) * model.linear,
            calls=given.passes * self._calls(),
        )

    def _head(self, given: Tokens) -> Amount:
        if self.scalar:
            return Amount()
        rows, vocabulary = self._logit_rows(given), self.model.vocabulary
        each = self.size * (3 if self.entropy else 2) + (14 if self.engine == "gpu" else 0)
        return Amount(products=2 * rows * vocabulary * self.model.width, logits=rows * vocabulary * each)

    def _slow(self) -> Number:
        """Weights whose gradient is a product with a transposed factor, which PyTorch is slow at in bf16."""
        m = self.model
        if self.engine == "gpu" or self.compute != "bfloat16":
            return 0
        attention = m.layers * m.width * (2 * m.query + m.key + m.value)
        return choose(TRANSPOSED - largest(m.width, m.query), attention, 0) + choose(
            TRANSPOSED - largest(m.width, m.inner), m.active_linear - attention, 0
        )

    def _logit_rows(self, given: Tokens) -> Number:
        return given.tokens if self.head == "whole" else given.targets

    def _calls(self) -> Number:
        # An adapter's layer is about a fifth of a layer's calls more.
        return self.model.layers + AROUND + 0.2 * self.adapted

    def _elementwise(self) -> Number:
        """Numbers read and written for a token around the products: norms, gates, rotary positions, sums.

        One pass each by our kernels; on a GPU as many as transformers' modules make.
        """
        m = self.model
        norm, turn, gate = (2, 2, 3) if self.engine == "cpu" else (18, 10, 5)
        if m.norm == "layer":
            norm = 2
        activated = (gate if m.gate != "none" else 2) * m.inner
        turned = (m.query + m.key) * (turn + norm * m.head_norms)
        # Packed attention gathers queries, keys and values by spans, and puts results back.
        merged = (
            6 * m.query + 3 * m.key + 3 * m.value if self.engine == "cpu" else 4 * m.query + m.key + m.value
        )
        return m.layers * (norm * m.norms * m.width + 6 * m.width + turned + merged + activated)


def layer_ends(model: Model) -> Number:
    """Σ (inputs + outputs) of the linear layers that a token goes through, the mean over layers."""
    attention = 4 * model.width + 2 * model.query + model.key + model.value
    return attention + model.matrices * (model.inner + model.width * largest(1, model.experts_used))


def attention_flops(model: Model, given: Tokens) -> Number:
    """Two products a layer over the scores that count; a window leaves out what is beyond it."""
    seen = smallest(given.scores, given.tokens * model.window)
    return 4 * model.query * (given.scores * (model.layers - model.windowed) + seen * model.windowed)
