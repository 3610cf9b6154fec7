"""The fused kernels against their plain forms in fp64, and what happens where nothing can be compiled."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import families
import pytest
import torch
from torch.nn import functional as F

from trimtab.data.collate import collate
from trimtab.kernels import build
from trimtab.kernels.attention import (
    attend,
    attend_backward,
    merge_,
    row_dot,
    softmax_,
    softmax_backward_,
)
from trimtab.kernels.build import library
from trimtab.kernels.call import call, compiled, matrix_unit
from trimtab.kernels.fused import Gate, gated, linear, rms_norm, rotary
from trimtab.kernels.logps import selected_logps

needs_kernels = pytest.mark.skipif(library() is None, reason=f"no compiled kernels: {build.why_not()}")
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
HALF_ULP = 2.0**-8
"""Of bf16, relative: what rounding to nearest may lose. Cutting digits off would lose twice as much."""

Function = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def assert_near(ours: torch.Tensor, truth: torch.Tensor, slack: float = 3e-6) -> None:
    """Within ``slack`` of the largest number, and one rounding where the result is bf16."""
    assert ours.shape == truth.shape
    assert truth.dtype == torch.float64
    rounding = HALF_ULP * 1.001 * truth.abs() if ours.dtype == torch.bfloat16 else 0.0
    # Equal infinities are no gap.
    gap = (ours.double() - truth).masked_fill(ours.double() == truth, 0.0).abs()
    largest = float(truth[truth.isfinite()].abs().max()) if truth.isfinite().any() else 0.0
    assert bool((gap <= slack * max(1.0, largest) + rounding).all()), float(gap.max())


def values_and_gradients(function: Function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, then the gradients of a sum that weighs every output differently."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    made = function(*leaves)
    outputs = [made] if isinstance(made, torch.Tensor) else list(made)
    for output in outputs:
        assert (output.dtype == torch.float64) == (inputs[0].dtype == torch.float64)
    draw = torch.Generator().manual_seed(5)
    # In bf16's numbers, so that the weights are the same in every dtype.
    weights = [torch.randn(o.shape, generator=draw).bfloat16().to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def assert_is_plain(function: Function, inputs: list[torch.Tensor], slack: float = 3e-6) -> None:
    """Compiled, in the inputs' dtype, is what the plain form gives in fp64 of the same numbers."""
    assert compiled(*inputs)
    ours = values_and_gradients(function, inputs)
    truth = values_and_gradients(function, [x.double() for x in inputs])
    for a, b in zip(ours, truth, strict=True):
        assert_near(a, b, slack)


@needs_kernels
@both
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 31), (67, 64), (3, 1000)])
def test_rms_norm(dtype: torch.dtype, offset: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert_is_plain(lambda x, w: rms_norm(x, w, 1e-5, offset), [x, weight], slack=1e-5)
    # Not contiguous, as a head's part of a projection is.
    wide = torch.randn(4, 6, 2 * shape[-1]).to(dtype)[..., : shape[-1]].transpose(0, 1)
    assert_is_plain(lambda x, w: rms_norm(x, w, 1e-5, offset), [wide, weight], slack=1e-5)


@needs_kernels
def test_rms_norm_of_zeros_is_held_up_by_epsilon() -> None:
    x, weight = torch.zeros(2, 8, requires_grad=True), torch.ones(8)
    out = rms_norm(x, weight, 1e-6)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not out.any()
    assert grad.flatten().tolist() == pytest.approx([1e3] * 16, rel=1e-5)


@needs_kernels
def test_the_weights_gradient_is_whole_from_any_thread() -> None:
    """It is summed over one row a thread of OpenMP, and a thread of Python has its own number of those."""
    x, weight = torch.randn(64, 33), torch.randn(33)
    function = lambda x, w: rms_norm(x, w, 1e-6)  # noqa: E731
    (_, _, truth) = values_and_gradients(function, [x.double(), weight.double()])
    found: list[torch.Tensor] = []

    def elsewhere() -> None:
        found.append(values_and_gradients(function, [x, weight])[2])

    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        elsewhere()
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
    assert len(found) == 6
    for grad in found:
        assert_near(grad, truth, 1e-5)


@needs_kernels
@both
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated(dtype: torch.dtype, kind: Gate) -> None:
    torch.manual_seed(0)
    gate, up = (4 * torch.randn(3, 7, 41).to(dtype) for _ in range(2))
    assert_is_plain(lambda g, u: gated(g, u, kind), [gate, up])
    # Where exp over- or underflows: linear on one side, 0 on the other, and never NaN.
    far = torch.tensor([-1e6, -1e4, -300, -100, -90, -88, -86, -20, 0, 20, 86, 88, 90, 100, 300, 1e4, 1e6])
    assert_is_plain(lambda g, u: gated(g, u, kind), [far.to(dtype), torch.ones(17, dtype=dtype)])


@needs_kernels
@both
@pytest.mark.parametrize("width", [2, 8, 30, 64])
def test_rotary_reads_what_projections_write(dtype: torch.dtype, width: int) -> None:
    """Heads side by side in a token's row, queries and keys in one projection, part of a head turned."""
    torch.manual_seed(0)
    tokens, heads = 13, 3
    angles = 10 * torch.randn(1, tokens, width // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    whole = torch.randn(1, tokens, heads * width).to(dtype)
    joint = torch.randn(1, tokens, 3 * heads * width).to(dtype)[..., heads * width : 2 * heads * width]
    partly = torch.randn(1, tokens, heads, 2 * width).to(dtype).transpose(1, 2)[..., :width]
    for x in (whole, joint):
        x = x.view(1, tokens, heads, width).transpose(1, 2)
        assert_is_plain(lambda x: rotary(x, cos.to(x.dtype), sin.to(x.dtype)), [x])
    assert_is_plain(lambda x: rotary(x, cos.to(x.dtype), sin.to(x.dtype)), [partly])
    # Different angles for the two halves, and a gradient that comes broadcast, without strides of its own.
    cos, sin = torch.randn(2, 1, tokens, width).to(dtype)
    assert_is_plain(lambda x: rotary(x, cos.to(x.dtype), sin.to(x.dtype)), [partly])
    x = partly.detach().requires_grad_()
    (grad,) = torch.autograd.grad(rotary(x, cos, sin).sum(), x)
    y = partly.double().requires_grad_()
    assert_near(grad, torch.autograd.grad(rotary(y, cos.double(), sin.double()).sum(), y)[0])


def test_rotary_by_hand() -> None:
    # A quarter turn takes the pair (1, 2) to (−2, 1); an angle of 0 leaves (3, 4). Pairs are (i, i + d/2).
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[[[1.0, 3.0, 2.0, 4.0]]]], dtype=dtype)
        cos = torch.tensor([[[0.0, 1.0, 0.0, 1.0]]], dtype=dtype)
        assert rotary(x, cos, 1 - cos).flatten().tolist() == [-2.0, 3.0, 1.0, 4.0]


SIGHTS = {
    "causal": (torch.arange(40), None),
    "causal, windowed": (torch.arange(40), 7),
    "window of one": (torch.arange(40), 1),
    "behind all keys": (torch.arange(65, 105), None),
    "some beyond the window": (torch.arange(20, 100, 2), 30),
    "none within the window": (torch.arange(200, 240), 30),
    "in no order": (torch.arange(40).flip(0) % 17, 5),
}


@needs_kernels
@both
@pytest.mark.parametrize("spread", [1.0, 1e4])
@pytest.mark.parametrize("keys", [1, 16, 31, 33, 65])
@pytest.mark.parametrize("sight", SIGHTS)
def test_softmax_there_and_back(dtype: torch.dtype, spread: float, keys: int, sight: str) -> None:
    positions, window = SIGHTS[sight]
    positions = positions.int()
    torch.manual_seed(0)
    # Two heads share the keys: their rows repeat the positions.
    scores = (spread * torch.randn(3, 80, keys)).to(dtype)
    scale = 0.3
    at = positions.repeat(2)[:, None]
    key = torch.arange(keys)[None]
    hidden = (key > at) | (at - key >= (window or 1 << 30))
    ours, exact = scores.clone(), scores.double()
    lse, lse_exact = softmax_(ours, positions, window, scale), softmax_(exact, positions, window, scale)
    # An exponent of fp32 is exact to 6e-8 of the score.
    slack = 3e-6 + 4e-7 * scale * float(scores.abs().max())
    assert lse.dtype == torch.float32
    assert_near(lse, lse_exact, 3e-6)
    assert_near(ours, exact, slack)
    assert not ours.masked_select(hidden).any()
    blind = hidden.all(-1).expand(3, -1)
    assert_near(exact.sum(-1), (~blind).double(), 1e-12)
    assert torch.equal(lse == -torch.inf, blind)

    # Backward, of a row of which these keys are a part: its log-sum-exp is larger than theirs.
    more = torch.logaddexp(lse, torch.randn(3, 80))
    grad, delta = torch.randn(3, 80, keys).to(dtype), torch.randn(3, 80)
    p, ds, p_exact, ds_exact = scores.clone(), grad.clone(), scores.double(), grad.double()
    softmax_backward_(p, ds, more, delta, positions, window, scale)
    softmax_backward_(p_exact, ds_exact, more.double(), delta.double(), positions, window, scale)
    assert_near(p, p_exact, slack)
    assert_near(ds, ds_exact, slack)
    assert not p.masked_select(hidden).any()
    assert not ds.masked_select(hidden).any()


def test_the_plain_softmax_is_the_ordinary_one() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 6, 9, dtype=torch.float64)
    positions = torch.tensor([0, 3, 20], dtype=torch.int32)
    mask = torch.tensor([[0 <= p - k < 5 for k in range(9)] for p in (0, 3, 20)]).repeat(2, 1)
    probabilities = scores.clone()
    softmax_(probabilities, positions, 5, 0.7)
    truth = (0.7 * scores).masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    assert (probabilities - truth).abs().max() < 1e-14
    assert not probabilities[:, 2].any()


def test_the_plain_backward_is_autograds() -> None:
    """With lse and delta of the whole row, ds and p are those of attention written out."""
    torch.manual_seed(0)
    q, k, v, out_grad = (torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(4))
    positions = torch.arange(5, dtype=torch.int32)
    scores = q @ k.transpose(1, 2)
    hidden = torch.ones(5, 5).triu(1).bool()
    out = (0.5 * scores).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    ds_truth, dv_truth = torch.autograd.grad(out, [scores, v], out_grad)
    p, ds = scores.detach().clone(), (out_grad @ v.transpose(1, 2)).detach()
    lse = softmax_(p.clone(), positions, None, 0.5)
    softmax_backward_(p, ds, lse, row_dot(out_grad, out).detach(), positions, None, 0.5)
    assert (ds - ds_truth).abs().max() < 1e-14
    assert (p.transpose(1, 2) @ out_grad - dv_truth).abs().max() < 1e-14


@needs_kernels
@both
@pytest.mark.parametrize("keys", [1, 31, 32, 33, 97])
@pytest.mark.parametrize("sight", SIGHTS)
def test_attention_over_a_piece_there_and_back(dtype: torch.dtype, keys: int, sight: str) -> None:
    """In bf16, where the CPU has a matrix unit, one call that keeps no scores: widths are whole tiles."""
    positions, window = SIGHTS[sight]
    positions = positions.int()
    torch.manual_seed(0)
    rows, d, e, scale = 80, 64, 32, 0.3
    given = [torch.randn(3, n, width) for n, width in ((rows, d), (keys, d), (keys, e), (rows, e))]
    q, k, v, grad = (x.to(dtype) for x in given)
    exact = [x.double() for x in (q, k, v, grad)]
    out, lse = attend(q, k, v, positions, window, scale)
    truth, truth_lse = attend(*exact[:3], positions, window, scale)
    # Scores are fp32 or rounded once to bf16, and so are the probabilities.
    half = dtype == torch.bfloat16
    top = float((exact[0] @ exact[1].transpose(1, 2)).abs().max()) * scale
    assert (lse.double() - truth_lse).masked_fill(truth_lse == -torch.inf, 0.0).abs().max() <= (
        HALF_ULP * top if half else 1e-5
    )
    assert torch.equal(lse == -torch.inf, truth_lse == -torch.inf)
    blind = truth_lse == -torch.inf
    assert not out[blind].any()
    slack = 0.06 if half else 1e-5
    assert (out.double() - truth).abs().max() <= slack * float(truth.abs().max().clamp(min=1.0))

    # Of a row of which these keys are a part.
    more = torch.logaddexp(truth_lse, torch.randn(3, rows).double())
    delta = torch.randn(3, rows)
    ours = attend_backward(q, k, v, grad, more.float(), delta, positions, window, scale)
    theirs = attend_backward(*exact, more, delta.double(), positions, window, scale)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert a.isfinite().all()
        assert (a.double() - b).abs().max() <= slack * float(b.abs().max().clamp(min=1.0))
    assert not ours[0][blind].any()


@needs_kernels
@both
def test_rows_whose_log_sum_exp_is_infinite_have_no_gradient(dtype: torch.dtype) -> None:
    """So padding is marked: whatever its scores, p and ds are 0."""
    torch.manual_seed(0)
    q, k, v, grad = (100 * torch.randn(2, 40, 32).to(dtype) for _ in range(4))
    grad[:, 20:] = 0
    lse, delta = torch.full((2, 40), torch.inf), torch.zeros(2, 40)
    at = torch.arange(40, dtype=torch.int32)
    for x in attend_backward(q, k, v, grad, lse, delta, at, None, 1.0):
        assert x.abs().max() < 1e-30


@needs_kernels
@both
def test_merge_into_slices(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole, whole_lse = torch.randn(3, 20, 33).to(dtype), 5 * torch.randn(3, 20)
    more, more_lse = torch.randn(3, 8, 33).to(dtype), 5 * torch.randn(3, 8)
    # Nothing to add, nothing there yet, and both; one side far above the other.
    more_lse[:, :2] = -torch.inf
    whole_lse[:, 5:8] = -torch.inf
    more_lse[:, 3] = -torch.inf
    whole[:, 5:8] = 0.0
    more_lse[0, 4:] = torch.tensor([1e4, -1e4, 300.0, -300.0])
    ours, ours_lse = whole.clone(), whole_lse.clone()
    exact, exact_lse = whole.double(), whole_lse.double()
    merge_(ours[:, 4:12], ours_lse[:, 4:12], more, more_lse)
    merge_(exact[:, 4:12], exact_lse[:, 4:12], more.double(), more_lse.double())
    assert_near(ours, exact)
    assert_near(ours_lse[0], exact_lse[0], 1e-6)
    assert_near(ours_lse[1:], exact_lse[1:])
    assert torch.equal(ours[:, :4], whole[:, :4])
    assert torch.equal(ours[:, 12:], whole[:, 12:])
    assert torch.equal(ours[:, 4:6], whole[:, 4:6])


def test_merged_parts_are_the_whole() -> None:
    torch.manual_seed(0)
    for dtype, slack in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        scores, v = torch.randn(2, 5, 12, dtype=dtype), torch.randn(2, 12, 3, dtype=dtype)
        parts = []
        for keys in (slice(0, 7), slice(7, 12)):
            lse = scores[..., keys].logsumexp(-1)
            parts.append((scores[..., keys].softmax(-1) @ v[:, keys], lse))
        (out, lse), (more, more_lse) = parts
        merge_(out, lse, more, more_lse)
        assert (out - scores.softmax(-1) @ v).abs().max() < slack
        assert (lse - scores.logsumexp(-1)).abs().max() < slack


@needs_kernels
@both
def test_row_dot(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(3, 5, 67).to(dtype) for _ in range(2))
    assert row_dot(a, b).dtype == torch.float32
    assert_near(row_dot(a, b), row_dot(a.double(), b.double()))


@needs_kernels
@both
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocabulary", [1, 5, 33, 4099])
def test_selected_logps(dtype: torch.dtype, entropy: bool, temperature: float, vocabulary: int) -> None:
    torch.manual_seed(0)
    rows = 7
    logits = (3 * torch.randn(rows, vocabulary)).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    if vocabulary > 1:
        logits[0, 0], targets[0] = 3000.0, 0
        logits[1] -= 3000.0
        forbidden = torch.arange(vocabulary) % 3 == 0
        logits[2, forbidden], targets[2] = -torch.inf, 1
        logits[3] = 0.0
    assert_is_plain(
        lambda z: selected_logps(z, targets, temperature, entropy=entropy)[: 1 + entropy],
        [logits],
        # An fp32 number of 3000 / T is exact to 1e-4, and so are its exponents.
        slack=1e-5 if vocabulary == 1 else 3e-4,
    )


@needs_kernels
def test_the_gradient_of_an_entropy_alone_and_of_none() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 21), torch.tensor([3, 0, 20, 7])
    assert_is_plain(lambda z: selected_logps(z, targets, 0.8, entropy=True)[1], [logits])
    leaf = logits.requires_grad_()
    logps, entropy = selected_logps(leaf, targets, entropy=True)
    (with_zeros,) = torch.autograd.grad((logps + 0 * entropy).sum(), leaf, retain_graph=True)
    (without,) = torch.autograd.grad(logps.sum(), leaf)
    assert torch.equal(with_zeros, without)


@needs_kernels
def test_a_target_that_is_next_to_certain_keeps_its_gradient() -> None:
    """1 − p taken from a rounded p would be 0 or twice too large."""
    logits = torch.tensor([[0.0, -12.0, -13.0]]).requires_grad_()
    (grad,) = torch.autograd.grad(selected_logps(logits, torch.tensor([0]))[0].sum(), logits)
    p = logits.detach().double().softmax(-1)
    assert float(grad[0, 0]) == pytest.approx(float(p[0, 1:].sum()), rel=0.02)
    half = logits.detach().bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(selected_logps(half, torch.tensor([0]))[0].sum(), half)
    assert float(grad[0, 0]) == pytest.approx(float(p[0, 1:].sum()), rel=0.02)


@both
def test_a_forbidden_target_is_infinitely_unlikely_and_not_nan(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]]).to(dtype).requires_grad_()
    logps, entropy = selected_logps(logits, torch.tensor([1]), entropy=True)
    assert logps.item() == -torch.inf
    (grad,) = torch.autograd.grad((0.5 * logps + entropy).sum(), logits)
    assert grad.isfinite().all()
    assert float(grad[0, 1]) == 0.5


@needs_kernels
@pytest.mark.parametrize(
    "shape", [(1, 1), (8, 8), (7, 9), (33, 65), (40, 3), (3, 40), (256, 24), (100, 1031)]
)
def test_transpose(shape: tuple[int, int]) -> None:
    x = torch.randint(-(2**15), 2**15, shape).short().view(torch.bfloat16)
    out = x.new_empty(shape[::-1])
    call("transpose", x, out, *shape)
    assert torch.equal(out.view(torch.int16), x.t().contiguous().view(torch.int16))


@needs_kernels
@pytest.mark.parametrize("frozen", ["", "x", "weight"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [((2, 130), 37, 1031), ((259,), 1025, 8)])
def test_the_gradients_of_a_linear_layer(
    sizes: tuple[tuple[int, ...], int, int], biased: bool, frozen: str
) -> None:
    torch.manual_seed(0)
    rows, width, outputs = sizes
    given = [torch.randn(*rows, width), torch.randn(outputs, width), torch.randn(outputs)]
    leaves = [x.bfloat16().requires_grad_() for x in given[: 2 + biased]]
    wanted = leaves
    if frozen:
        leaves[0 if frozen == "x" else 1].requires_grad_(False)
        wanted = [x for x in leaves if x.requires_grad]
    grad = torch.randn(*rows, outputs).bfloat16()
    ours = linear(*leaves)
    assert "_Linear" in type(ours.grad_fn).__name__
    assert torch.equal(ours, F.linear(*leaves))
    exact = F.linear(*(x.double() for x in leaves))
    found, truth = (torch.autograd.grad(out, wanted, grad.to(out.dtype)) for out in (ours, exact))
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == torch.bfloat16
        # Products of bf16 are summed in fp32 and rounded once; autograd's own bias sum likewise.
        assert_near(a, b.to(torch.float64), 1e-4)


@needs_kernels
def test_what_goes_into_a_frozen_linear_layer_is_not_kept() -> None:
    """Under an adapter on other layers it would be the largest thing in memory."""
    x, weight = torch.randn(256, 1024).bfloat16().requires_grad_(), torch.randn(1024, 1024).bfloat16()
    for learns in (True, False):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.data_ptr()) or t, lambda t: t
        ):
            linear(x, weight.requires_grad_(learns))
        assert (x.data_ptr() in kept) == learns
        assert weight.data_ptr() in kept


def test_small_or_exact_linear_layers_are_pytorchs() -> None:
    for dtype, rows in ((torch.bfloat16, 255), (torch.float32, 300)):
        x, weight = torch.randn(rows, 8, dtype=dtype, requires_grad=True), torch.randn(1024, 8, dtype=dtype)
        assert "_Linear" not in type(linear(x, weight).grad_fn).__name__


# --- the plain forms themselves -----------------------------------------------------------------------------


def test_plain_forms_gradcheck() -> None:
    torch.manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    cos, sin = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    targets = torch.tensor([0, 4, 2])
    checks: list[tuple[Function, tuple[torch.Tensor, ...]]] = [
        (lambda x, w: rms_norm(x, w, 1e-5), (leaf(3, 4), leaf(4))),
        (lambda x, w: rms_norm(x, w, 1e-5, 1.0), (leaf(3, 4), leaf(4))),
        (lambda g, u: gated(g, u, "silu"), (leaf(3, 4), leaf(3, 4))),
        (lambda g, u: gated(g, u, "gelu_tanh"), (leaf(3, 4), leaf(3, 4))),
        (lambda x: rotary(x, cos, sin), (leaf(1, 2, 3, 4),)),
        (lambda z: selected_logps(z, targets, 0.7, entropy=True), (leaf(3, 5),)),
        (lambda z: selected_logps(z, targets)[0], (leaf(3, 5),)),
    ]
    for function, inputs in checks:
        assert torch.autograd.gradcheck(function, inputs)


def test_plain_forms_by_hand() -> None:
    # Root mean square of (3, 4) is √12.5 = 3.5355: 0.8485 and 1.1314; times 2, and with Gemma's offset 3.
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    weight = torch.full((2,), 2.0, dtype=torch.float64)
    assert rms_norm(x, weight, 0.0).tolist() == pytest.approx([1.6971, 2.2627], abs=1e-4)
    assert rms_norm(x, weight, 0.0, 1.0).tolist() == pytest.approx([2.5456, 3.3941], abs=1e-4)
    # silu(1) = 0.73106; gelu(1) = 0.84119 in its tanh form, 0.84134 in the exact one.
    one, up = torch.ones(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64)
    assert gated(one, up, "silu").item() == pytest.approx(1.46212, abs=1e-5)
    assert gated(one, up, "gelu_tanh").item() == pytest.approx(1.68238, abs=1e-5)


# --- without a compiler -------------------------------------------------------------------------------------


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """The library is looked for again, with an empty cache of compiled files; afterwards as before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TRIMTAB_KERNELS", raising=False)
    build._built.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    build._built.cache_clear()


def assert_all_runs() -> None:
    """Without the library: nothing is compiled, and a model computes what it computed."""
    assert library() is None
    assert not compiled(torch.zeros(1))
    x = torch.randn(4, 6, requires_grad=True)
    made = rms_norm(gated(x, x, "silu"), torch.ones(6), 1e-6)
    torch.autograd.grad(selected_logps(made, torch.tensor([0, 1, 2, 3]), entropy=True)[0].sum(), x)
    lm, groups = families.tiny("llama"), families.groups()
    for layout in ("packed", "tree"):
        if layout == "packed":
            lm.config._attn_implementation = "trimtab"
        logps, _ = lm.token_logprobs(collate(groups, layout=layout))  # type: ignore[arg-type]
        assert (logps - families.direct_logprobs(lm, groups)).abs().max() < 1e-5
        logps.sum().backward()


def test_turned_off_by_the_environment(anew: pytest.MonkeyPatch) -> None:
    anew.setenv("TRIMTAB_KERNELS", "off")
    assert_all_runs()
    assert build.why_not() == "turned off by TRIMTAB_KERNELS"


def test_no_compiler(anew: pytest.MonkeyPatch) -> None:
    anew.setattr(build.shutil, "which", lambda name: None)
    assert_all_runs()
    assert build.why_not() == "no C compiler (cc)"


def test_no_openmp(anew: pytest.MonkeyPatch) -> None:
    anew.setattr(build, "_openmp", lambda: None)
    assert library() is None
    assert "OpenMP" in (build.why_not() or "")


def failing_compiler(folder: Path, body: str) -> str:
    file = folder / "cc"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return str(file)


def test_a_compiler_that_fails(anew: pytest.MonkeyPatch, tmp_path: Path) -> None:
    anew.setenv("CC", failing_compiler(tmp_path, "echo first >&2; echo 'no such target' >&2; exit 1"))
    assert_all_runs()
    assert build.why_not() == "the C compiler failed: no such target"
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_compiler_that_says_nothing_and_one_that_makes_no_library(
    anew: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    anew.setenv("CC", failing_compiler(tmp_path, "exit 3"))
    assert (build.why_not() or "").startswith("the C compiler failed")
    build._built.cache_clear()
    # Writes its arguments where the library should be.
    anew.setenv("CC", failing_compiler(tmp_path, 'for a; do last=$a; done; echo "$@" > "$last"'))
    assert library() is None
    assert (build.why_not() or "").startswith("the C compiler failed")


def test_a_compiler_that_hangs_is_given_up(anew: pytest.MonkeyPatch) -> None:
    def run(command: list[str]) -> None:
        raise subprocess.TimeoutExpired(command, 120)

    anew.setattr(build, "_run", run)
    assert library() is None
    assert "timed out" in (build.why_not() or "")


@needs_kernels
def test_compiled_once_and_kept_elsewhere_where_the_cache_cannot_be_written(
    anew: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = []

    def run(command: list[str]) -> None:
        commands.append(command)
        Path(command[command.index("-o") + 1]).touch()

    anew.setattr(build, "_run", run)
    first = build._compiled("cc", "libgomp.so")
    assert first.parent == tmp_path / "cache" / "trimtab"
    assert list(first.parent.iterdir()) == [first]
    made = len(commands)
    # The same machine again compiles nothing; another compiler does.
    assert build._compiled("cc", "libgomp.so") == first
    assert len(commands) == made
    assert build._compiled("clang", "libgomp.so") != first
    (tmp_path / "file").touch()
    anew.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elsewhere = build._compiled("cc", "libgomp.so")
    assert elsewhere.exists()
    assert elsewhere.name == first.name
    elsewhere.unlink()
    os.rmdir(elsewhere.parent)


@needs_kernels
def test_use_turns_them_off_and_on_again() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.ones(8)
    try:
        build.use(False)
        assert (library(), build.why_not(), compiled(x)) == (None, "turned off", False)
        assert "RMSNorm" not in type(rms_norm(x, weight, 1e-6).grad_fn).__name__
    finally:
        build.use(True)
    assert (build.why_not(), compiled(x)) == (None, True)
    assert "RMSNorm" in type(rms_norm(x, weight, 1e-6).grad_fn).__name__


@needs_kernels
def test_which_tensors_are_taken() -> None:
    single, half, double = (torch.zeros(1, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float64))
    assert compiled(single, single)
    assert compiled(half)
    assert not compiled(double)
    assert not compiled(single, half)
    assert not compiled(single.half())
    assert not compiled(single.to("meta"))


@needs_kernels
@pytest.mark.parametrize(
    ("batch", "rows", "keys", "d", "e", "period", "window", "offset"),
    [
        (2, 32, 32, 32, 32, 32, None, 0),
        (3, 40, 50, 64, 64, 20, None, 5),
        (4, 128, 64, 64, 32, 64, None, 0),
        (2, 70, 100, 64, 64, 35, 9, 40),
        (1, 17, 300, 96, 128, 17, None, 200),
        (2, 5, 7, 32, 64, 5, 3, 10),
        (2, 6, 9, 24, 8, 3, None, 1),
    ],
    ids=str,
)
def test_attention_of_a_piece_and_its_gradients(
    batch: int, rows: int, keys: int, d: int, e: int, period: int, window: int | None, offset: int
) -> None:
    """In bf16, on the matrix unit where there is one and the widths suit it, against fp64 products."""
    draw = torch.Generator().manual_seed(rows)
    q, k, v, grad = (
        torch.randn(batch, n, width, generator=draw).bfloat16()
        for n, width in ((rows, d), (keys, d), (keys, e), (rows, e))
    )
    where = (torch.arange(period, dtype=torch.int32) + offset, window, 0.2)
    out, lse = attend(q, k, v, *where)
    truth, true_lse = attend(q.double(), k.double(), v.double(), *where)
    assert torch.equal(lse.isinf(), true_lse.isinf())
    assert largest_gap(out, truth) <= 0.01
    torch.testing.assert_close(lse.double(), true_lse, atol=0.03, rtol=0)
    delta = (truth * grad.double()).sum(-1)
    ours = attend_backward(q, k, v, grad, true_lse.float(), delta.float(), *where)
    exact = attend_backward(q.double(), k.double(), v.double(), grad.double(), true_lse, delta, *where)
    # Without the matrix unit scores are rounded to bf16 before their exponential is taken.
    for mine, theirs in zip(ours, exact, strict=True):
        assert largest_gap(mine, theirs) <= (0.015 if matrix_unit() else 0.025)


def largest_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """In units of the largest."""
    return float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-9))
