"""The packed layout = the model's own call: attention in pieces against a dense softmax, whole models."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from trimtab.batch import TreeBatch
from trimtab.data.collate import collate, in_each_layout
from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.kernels import build
from trimtab.models import attention, attention_plan
from trimtab.models.attention import _PackedAttention, packed_attention
from trimtab.models.attention_plan import AttentionPlan, plan_attention
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import choose_layout, probe_groups
from trimtab.models.roles import frozen_copy
from trimtab.training.config import TrainConfig
from trimtab.training.export import save_model
from trimtab.training.optimiser import Optimiser

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 3, 5
Shape = tuple[int, list[int]]
"""A prompt's length, and its responses'."""


def groups_of(shapes: list[Shape], seed: int = 0) -> list[Group]:
    draw = random.Random(seed)
    return [
        Group(
            id=str(i),
            prompt_tokens=families.tokens(prompt, draw),
            responses=[Response(tokens=families.tokens(n, draw)) for n in lengths],
        )
        for i, (prompt, lengths) in enumerate(shapes)
    ]


def visible(shapes: list[Shape], window: int | None = None) -> torch.Tensor:
    """The rule, from the groups and not from the batch: ``[T, T]``, True where a query sees a key."""
    places = []
    for g, (prompt, lengths) in enumerate(shapes):
        places += [(g, -1, i) for i in range(prompt)]
        places += [(g, r, prompt + i) for r, n in enumerate(lengths) for i in range(n)]
    out = torch.zeros(len(places), len(places), dtype=torch.bool)
    for q, (group, response, at) in enumerate(places):
        for k, (other, owner, before) in enumerate(places[: q + 1]):
            near = window is None or at - before < window
            out[q, k] = group == other and owner in (-1, response) and near
    return out


def plan_of(batch: TreeBatch, *, itemsize: int = 8) -> AttentionPlan:
    return plan_attention(batch.spans, batch.position_ids_BL[0], HEADS, itemsize=itemsize)


def pairs(plan: AttentionPlan) -> Counter[tuple[int, int]]:
    """How often each (query, key) is computed and counted."""
    found: Counter[tuple[int, int]] = Counter()
    for piece in (*plan.own, *plan.prefix):
        for queries, keys in zip(piece.queries.tolist(), piece.keys.tolist(), strict=True):
            for q, at in zip(queries, piece.positions.tolist(), strict=True):
                if q >= 0:
                    found.update((q, k) for k in keys[: at + 1])
    return found


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention written out, in fp64."""
    q, k, v = q.double(), *(x.double().repeat_interleave(HEADS // KV_HEADS, dim=0) for x in (k, v))
    scores = (scale * q @ k.transpose(1, 2)).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def tensors(tokens: int, dtype: torch.dtype, spread: float = 1.0) -> list[torch.Tensor]:
    torch.manual_seed(tokens)
    shapes = (HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, VALUE_WIDTH)
    made = [torch.randn(heads, tokens, width).to(dtype) for heads, width in shapes]
    made[0] *= spread
    return [x.requires_grad_() for x in made]


def assert_is_dense(
    shapes: list[Shape], window: int | None, dtype: torch.dtype, slack: float, spread: float = 1.0
) -> None:
    """Values and gradients of the pieces are those of the dense softmax."""
    batch = collate(groups_of(shapes), layout="packed")
    q, k, v = tensors(batch.tokens, dtype, spread)
    weights = torch.randn(HEADS, batch.tokens, VALUE_WIDTH).to(dtype)
    ours = _PackedAttention.apply(q, k, v, plan_of(batch), 0.6, window)
    truth = dense(q, k, v, visible(shapes, window), 0.6)
    grads = torch.autograd.grad(ours, [q, k, v], weights)
    truths = torch.autograd.grad(truth, [q, k, v], weights.double())
    for a, b in zip((ours, *grads), (truth, *truths), strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b).abs().max()) <= slack * max(1.0, float(b.abs().max()))


SHAPES = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(0, 14), min_size=1, max_size=5)),
    min_size=1,
    max_size=4,
)


class TestPieces:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        shapes=SHAPES,
        # In scores of fp64 for four heads: 16 queries against 16 keys up to everything at once.
        budget=st.sampled_from([1, 40, 300, 1 << 20]),
        short=st.sampled_from([0, 4, 32]),
        spared=st.sampled_from([0.0, 0.8, 1.0]),
        many=st.sampled_from([0, 64]),
        window=st.sampled_from([None, 1, 3, 8]),
    )
    def test_any_groups_in_any_pieces_are_the_dense_softmax(
        self,
        shapes: list[Shape],
        budget: int,
        short: int,
        spared: float,
        many: int,
        window: int | None,
    ) -> None:
        chosen = {"SCORE_BYTES": budget * 8 * HEADS, "SHORT": short, "SPARED": spared, "MANY": many}
        batch = collate(groups_of(shapes), layout="packed")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in chosen.items():
                patch.setattr(attention if name == "MANY" else attention_plan, name, value)
            plan = plan_of(batch)
            seen = pairs(plan)
            assert set(seen.values()) <= {1}
            assert set(seen) == {(q, k) for q, k in visible(shapes).nonzero().tolist()}
            own = [q for piece in plan.own for q in piece.queries.flatten().tolist() if q >= 0]
            assert sorted(own) == list(range(batch.tokens))
            # The rule of a GPU's block mask: a place is seen from itself to the end of what continues it.
            place = torch.arange(batch.tokens)
            ends = (place[None] <= place[:, None]) & (place[:, None] < plan.last_L[None])
            assert torch.equal(ends, visible(shapes))
            assert_is_dense(shapes, window, torch.float64, 1e-12)
            assert_is_dense(shapes, window, torch.float32, 2e-5)

    def test_a_long_span_is_cut_into_rows_and_its_continuation_into_pieces(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A prompt of 90 and responses of 70 and 2, at 16 rows a piece."""
        monkeypatch.setattr(attention_plan, "SCORE_BYTES", 16 * 40 * 8 * HEADS)
        shapes: list[Shape] = [(90, [70, 2]), (1, [50])]
        plan = plan_of(collate(groups_of(shapes), layout="packed"))
        assert sum(len(p.queries) == 1 for p in plan.own) > 5
        assert len(plan.prefix) > 5
        assert all(len(p.queries) == 1 for p in plan.prefix)
        assert set(pairs(plan).values()) == {1}
        # Half of the square is left out, where the whole would be one piece.
        scores = sum(p.queries.numel() * p.keys.shape[1] for p in plan.own)
        assert scores < 0.75 * (90**2 + 70**2 + 51**2)
        for window in (None, 20):
            assert_is_dense(shapes, window, torch.float64, 1e-12)
            assert_is_dense(shapes, window, torch.float32, 2e-5)

    def test_many_pieces_are_summed_in_fp32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In bf16 a prompt's gradient would lose a digit with every response that is added to it."""
        monkeypatch.setattr(attention_plan, "SCORE_BYTES", 1)
        shapes: list[Shape] = [(6, [60] * 8)]
        batch = collate(groups_of(shapes), layout="packed")
        plan = plan_of(batch)
        assert len(plan.own) + len(plan.prefix) > attention.MANY
        q, k, v = tensors(batch.tokens, torch.bfloat16)
        weights = torch.rand(HEADS, batch.tokens, VALUE_WIDTH).bfloat16()
        truth = torch.autograd.grad(dense(q, k, v, visible(shapes), 0.6), v, weights.double())[0]
        gaps = []
        for many in (attention.MANY, 1 << 30):
            monkeypatch.setattr(attention, "MANY", many)
            out = _PackedAttention.apply(q, k, v, plan, 0.6, None)
            (grad,) = torch.autograd.grad(out, v, weights)
            gaps.append(float(((grad.double() - truth)[:, :6].abs() / truth[:, :6].abs()).max()))
        assert gaps[0] < 0.02
        assert gaps[1] > 3 * gaps[0]

    def test_spans_share_a_piece_where_little_is_padded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention_plan, "SHORT", 4)

        def own(shapes: list[Shape]) -> list[tuple[int, int, bool]]:
            plan = plan_of(collate(groups_of(shapes), layout="packed"))
            return [(*p.queries.shape, p.padded) for p in plan.own]

        assert own([(100, [100, 81]), (50, [50, 39])]) == [
            (3, 100, True),
            (2, 50, False),
            (1, 39, False),
        ]
        # Short ones whatever their lengths.
        assert own([(4, [1, 2]), (30, [3, 0])]) == [(1, 30, False), (4, 4, True)]

    @pytest.mark.parametrize("used", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_padding_has_no_gradient_however_large_its_scores(self, dtype: torch.dtype, used: bool) -> None:
        """Padding reads the first token, whose log-sum-exp is of its own score alone: far below these."""
        shapes: list[Shape] = [(5, [4, 3])]
        batch = collate(groups_of(shapes), layout="packed")
        plan = plan_of(batch)
        assert [p.padded for p in plan.own] == [True]
        try:
            build.use(used)
            # exp2 of 2·WIDTH·size²·log2 e: about 128, where fp32 overflows, 1024, where fp64 does, and more.
            for size in (3.8, 3.84, 3.86, 10.9, 12.0, 30.0):
                q, k, v = (x.detach() for x in tensors(batch.tokens, dtype))
                q[:], k[:], k[:, 0] = size, size, -size
                q, k, v = (x.requires_grad_() for x in (q, k, v))
                out = _PackedAttention.apply(q, k, v, plan, 1.0, None)
                for grad in torch.autograd.grad(out.square().sum(), [q, k, v]):
                    assert grad.isfinite().all()
        finally:
            build.use(True)

    def test_scores_far_apart(self) -> None:
        for shapes in ([(5, [4, 3, 9]), (40, [2])], [(3, [1])]):
            assert_is_dense(shapes, None, torch.float64, 1e-10, spread=200.0)
            assert_is_dense(shapes, 4, torch.float64, 1e-10, spread=200.0)

    def test_without_kernels_fp32_is_the_same(self) -> None:
        try:
            build.use(False)
            assert_is_dense([(5, [4, 3, 9]), (40, [2, 0])], 6, torch.float32, 2e-5)
        finally:
            build.use(True)

    def test_responses_without_their_prompts_part_are_another_model(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shapes: list[Shape] = [(5, [4, 3])]
        assert_is_dense(shapes, None, torch.float64, 1e-12)
        monkeypatch.setattr(attention, "merge_", lambda *parts: None)
        with pytest.raises(AssertionError):
            assert_is_dense(shapes, None, torch.float64, 0.05)

    def test_a_window_counted_in_places_is_another_model(self) -> None:
        """A sibling that lies between a response and its prompt would use the window up."""
        shapes: list[Shape] = [(5, [4, 3])]
        batch = collate(groups_of(shapes), layout="packed")
        q, k, v = tensors(batch.tokens, torch.float64)
        truth = dense(q, k, v, visible(shapes, 6), 0.6)
        wrong = plan_attention(batch.spans, torch.arange(batch.tokens), HEADS)
        for window, differs in ((6, True), (None, False)):
            out = _PackedAttention.apply(q, k, v, wrong, 0.6, window)
            gap = (out - dense(q, k, v, visible(shapes, window), 0.6)).abs().max()
            assert (float(gap) > 0.05) is differs
        right = _PackedAttention.apply(q, k, v, plan_of(batch), 0.6, 6)
        assert (right - truth).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_a_plan_cannot_express_is_refused(name: str) -> None:
    batch = collate(families.groups(), layout="packed")
    q, k, v = (x[None] for x in tensors(batch.tokens, torch.float32))
    mask = attention.as_mask(plan_of(batch), torch.device("cpu"))
    packed_attention(torch.nn.Module(), q, k, v, mask, **{name: None})
    with pytest.raises(ValueError, match=name):
        packed_attention(torch.nn.Module(), q, k, v, mask, **{name: 2.0})


# --- whole models -------------------------------------------------------------------------------------------

LAYOUTS = {
    **dict.fromkeys(families.TREE, "packed"),
    "deepseek": "packed",
    # Soft-capped scores, and attention that does not go through transformers' interface.
    "gemma2": "tree",
    "gptj": "tree",
    "falcon": "tree",
    # ALiBi, recurrence, chunks, windows over places.
    "bloom": "plain",
    "mamba": "plain",
    "llama4": "plain",
    "gptneo": "plain",
}
PACKED = [family for family, layout in LAYOUTS.items() if layout == "packed"]


def settle(lm: LanguageModel, requested: str = "auto") -> str | None:
    return choose_layout(lm, in_each_layout(probe_groups(lm.vocab_size)), requested)


@torch.no_grad()
def logps_of(lm: LanguageModel, groups: list[Group], layout: str = "packed") -> torch.Tensor:
    return lm.token_logprobs(collate(groups, layout=layout))[0]  # type: ignore[arg-type]


def packed(family: str, **options: Any) -> LanguageModel:
    lm = families.tiny(family, **options)
    settle(lm)
    assert lm.layout == "packed"
    return lm


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def ragged() -> list[Group]:
    """The families' groups, and: an empty response, eight responses, a prompt of one token, a long one."""
    more = groups_of([(4, [0, 3]), (2, [3, 1, 9, 2, 2, 5, 1, 7]), (1, [1]), (45, [6, 38])], seed=3)
    return [*families.groups(), *more]


def test_every_family_has_its_layout() -> None:
    assert set(LAYOUTS) == set(families.CONFIGS)


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_layout_that_a_family_settles_on_is_exact(family: str) -> None:
    lm, groups = families.tiny(family), ragged()
    kernel = lm.config._attn_implementation
    line = settle(lm)
    assert lm.layout == LAYOUTS[family]
    assert (line is None) == (lm.layout != "plain")
    assert lm.config._attn_implementation == (attention.NAME if lm.layout == "packed" else kernel)
    assert largest(logps_of(lm, groups, lm.layout), families.direct_logprobs(lm, groups)) < 1e-5


def gradients(lm: LanguageModel, groups: list[Group], layout: str) -> dict[str, torch.Tensor | None]:
    """Of a loss that weighs every token's log-probability and entropy differently."""
    batch = collate(groups, layout=layout)  # type: ignore[arg-type]
    logps, entropy = lm.token_logprobs(batch, temperature=0.8, entropy=True)
    weights = torch.linspace(-1, 1, logps.numel()).view(logps.shape)
    named = dict(lm.model.named_parameters())
    loss = (weights * logps + weights.flip(0) * entropy).sum()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


@pytest.mark.parametrize("family", PACKED)
def test_gradients_are_those_of_the_plain_layout(family: str) -> None:
    """A key's bias moves all scores of a row alike: its gradient is 0 but for rounding, hence one scale."""
    lm, groups = packed(family), ragged()
    ours, plain = gradients(lm, groups, "packed"), gradients(lm, groups, "plain")
    top = max(float(g.abs().max()) for g in plain.values() if g is not None)
    moved = 0
    for name, truth in plain.items():
        found = ours[name]
        assert (found is None) == (truth is None)
        if truth is not None and found is not None:
            moved += bool(truth.abs().max() > 1e-3 * top)
            assert largest(found, truth) <= 2e-5 * top, name
    assert moved > len(plain) / 3


@pytest.mark.parametrize("family", [family for family in families.WINDOWED if family in PACKED])
def test_a_window_reaches_the_pieces(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, groups = packed(family), ragged()
    truth = families.direct_logprobs(lm, groups)
    own = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, k, v, p, window, scale: own(q, k, v, p, None, scale))
    assert largest(logps_of(lm, groups), truth) > 0.5


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_traps_without_the_prompts_part_and_without_positions(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, groups = packed(family), ragged()
    truth = families.direct_logprobs(lm, groups)
    batch = collate(groups, layout="packed")
    places = torch.arange(batch.tokens)[None]
    with torch.no_grad():
        moved = lm.token_logprobs(dataclasses.replace(batch, position_ids_BL=places))[0]
    assert largest(moved, truth) > 0.05
    monkeypatch.setattr(attention, "merge_", lambda *parts: None)
    assert largest(logps_of(lm, groups), truth) > 0.5


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_small_pieces_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, groups = packed(family), ragged()
    whole, truth = logps_of(lm, groups), gradients(lm, groups, "packed")
    monkeypatch.setattr(attention_plan, "SCORE_BYTES", 16 * 24 * 4 * 4)
    assert largest(logps_of(lm, groups), whole) < 1e-5
    top = max(float(g.abs().max()) for g in truth.values() if g is not None)
    for name, found in gradients(lm, groups, "packed").items():
        assert found is None or largest(found, truth[name]) <= 2e-5 * top, name  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_siblings_and_neighbours_are_not_seen(family: str) -> None:
    lm, groups = packed(family), ragged()
    before = logps_of(lm, groups)
    # Another first response of group a, and another prompt of group c (response 5).
    groups[0].responses[0].tokens = [5] * 7
    groups[2].prompt_tokens = [9] * 14
    after = logps_of(lm, groups)
    changed = [n for n in range(len(before)) if largest(before[n], after[n]) > 1e-5]
    assert changed == [0, 5]
    alone = logps_of(lm, groups[1:2])
    assert largest(after[3:5, :5], alone) < 1e-5


def test_bf16_is_within_its_rounding_and_gradients_are_finite() -> None:
    for family in ("llama", "gemma3"):
        lm, groups = packed(family), ragged()
        truth = families.direct_logprobs(lm, groups)
        lm.cast(torch.bfloat16)
        assert 1e-5 < largest(logps_of(lm, groups), truth) < 0.6
        plain = largest(logps_of(lm, groups, "plain"), truth)
        assert largest(logps_of(lm, groups), truth) < 2 * plain + 0.05
        assert all(g is None or g.isfinite().all() for g in gradients(lm, groups, "packed").values())


def test_fp64_is_packed_too() -> None:
    lm, groups = packed("llama", dtype=torch.float64), ragged()
    assert largest(logps_of(lm, groups), families.direct_logprobs(lm, groups)) < 1e-5
    assert all(g is None or g.isfinite().all() for g in gradients(lm, groups, "packed").values())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_packed_model_is_called_in_the_ordinary_way(family: str) -> None:
    """By reward workers, by users after the run, by generate: padded on the left, with a cache, with none."""
    lm = packed(family)
    torch.manual_seed(0)
    fresh: Any = AutoModelForCausalLM.from_config(
        families.CONFIGS[family](), attn_implementation="sdpa"
    ).eval()
    ours: Any = lm.model
    ids = torch.randint(3, families.VOCAB, (3, 12))
    keep = torch.ones_like(ids)
    keep[1, :5] = 0
    with torch.no_grad():
        for mask in (None, keep, keep.flip(1)):
            a, b = (m(input_ids=ids, attention_mask=mask).logits for m in (ours, fresh))
            rows = slice(None) if mask is None else mask.bool()
            assert largest(a[rows], b[rows]) < 1e-4
        made = [
            m.generate(ids, attention_mask=keep, max_new_tokens=8, do_sample=False, use_cache=cached)
            for m in (ours, fresh)
            for cached in (True, False)
        ]
    assert all(torch.equal(made[0], other) for other in made[1:])


def test_a_copy_and_a_saved_model(tmp_path: Path) -> None:
    lm, groups = packed("mistral"), ragged()
    truth = logps_of(lm, groups)
    for twin in (frozen_copy(lm), copy.deepcopy(lm)):
        assert twin.layout == "packed"
        assert torch.equal(logps_of(twin, groups), truth)
    save_model(lm, Optimiser(lm.model, TrainConfig(), torch.float32), tmp_path / "model", "float32")
    assert attention.NAME not in (tmp_path / "model" / "config.json").read_text()
    assert "attn" not in " ".join(json.loads((tmp_path / "model" / "config.json").read_text()))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert back.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "kernel", "reason"),
    [
        ("gemma2", "", "its attention is eager"),
        ("llama", "eager", "its attention is eager"),
        ("falcon", "", "differ"),
        ("mamba", "", "eager"),
        ("llama4", "", "differ"),
    ],
)
def test_packed_by_name_is_taken_or_refused(family: str, kernel: str, reason: str) -> None:
    lm = families.tiny(family, kernel)
    before = lm.config._attn_implementation
    with pytest.raises(InputError) as caught:
        settle(lm, "packed")
    line = str(caught.value)
    assert "\n" not in line
    assert "does not support the packed layout" in line
    assert reason in line
    assert lm.config._attn_implementation == before


def test_layouts_by_name_that_are_exact_are_taken() -> None:
    for layout in ("packed", "tree", "plain"):
        lm, groups = families.tiny("llama"), families.groups()
        assert settle(lm, layout) == ("layout plain, as configured" if layout == "plain" else None)
        assert lm.layout == layout
        assert lm.config._attn_implementation == (attention.NAME if layout == "packed" else "sdpa")
        assert largest(logps_of(lm, groups, layout), families.direct_logprobs(lm, groups)) < 1e-5


def test_a_packing_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the traps above, met by the check on the loaded model, which then takes the tree."""
    own = attention.attend
    for name, wrong in (
        ("merge_", lambda *parts: None),
        ("attend", lambda q, k, v, at, window, scale: own(q, k, v, at, None, scale)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(attention, name, wrong)
            lm = families.tiny("mistral")
            settle(lm)
            assert (lm.layout, lm.config._attn_implementation) == ("tree", "sdpa")
