"""Weights spread over processes: training gives what one process that holds them whole gives."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import spreading
import torch
from processes import Processes
from torch import nn
from torch.distributed.tensor import DTensor

from trimtab.errors import NotFinite
from trimtab.methods.shared.setup import settle_scalar_layout
from trimtab.models import language_model
from trimtab.models.head import chunked_logps
from trimtab.models.load import ModelConfig, load_scalar_model
from trimtab.models.roles import reference_of
from trimtab.models.shards import is_part
from trimtab.models.value_head import logprobs_and_values, value_head_of
from trimtab.objectives.reduce import reduce_tokens
from trimtab.parallel.world import world
from trimtab.spread import gloo, shard
from trimtab.spread.deal import Sums, global_count, parts
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser
from trimtab.training.recompute import fit_activations

EXACT = 1e-12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its head tied to its embedding."""
    return spreading.save(tmp_path_factory.mktemp("spread") / "model")


def _trained(path: Path, **how: Any) -> dict[str, Any]:
    lm = spreading.load(path, **how)
    assert lm.spread == (not world().alone)
    return spreading.trained(lm)


def _compared(processes: Processes, function: Any, size: int = 2, **given: Any) -> float:
    """How far processes that spread the weights are from one that does not; they agree to the bit."""
    (alone,) = processes.run(function, size=1, **given)
    found = processes.run(function, size=size, limit=150, **given)
    assert all(one == found[0] for one in found)
    return spreading.gap(found[0], alone)


@pytest.mark.parametrize(("layout", "tied"), [("packed", True), ("tree", False), ("plain", True)])
def test_layouts_and_tied_heads(processes: Processes, tmp_path: Path, layout: str, tied: bool) -> None:
    path = spreading.save(tmp_path / "model", tie_word_embeddings=tied)
    assert _compared(processes, _trained, path=path, layout=layout) < EXACT


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters(processes: Processes, model: Path, kind: str) -> None:
    assert _compared(processes, _trained, path=model, adapter=kind) < EXACT


def _copies(path: Path) -> dict[str, Any]:
    lm = spreading.load(path, shard_over=2)
    parts_of = {
        p.to_local().numel() * 2 >= p.numel() for p in lm.model.parameters() if isinstance(p, DTensor)
    }
    assert parts_of == (set() if world().alone else {True}), "a part is more than a quarter"
    return spreading.trained(lm, steps=2)


def test_copies_of_parts(processes: Processes, model: Path) -> None:
    """Four processes, two copies of the weights, each over two of them (HSDP)."""
    assert _compared(processes, _copies, size=4, path=model) < EXACT


def _in_fp32(path: Path) -> dict[str, Any]:
    return spreading.trained(spreading.load(path, dtype="float32"), dtype="float32")


def test_compiled_kernels_in_fp32(processes: Processes, model: Path) -> None:
    assert _compared(processes, _in_fp32, path=model) < 2e-5


def _bf16(path: Path, adapter: str) -> dict[str, Any]:
    lm = spreading.load(path, dtype="bfloat16", adapter=adapter)
    found = spreading.trained(lm, steps=3, dtype="bfloat16")
    assert lm.dtype == torch.bfloat16
    own = {p.dtype for p in lm.model.parameters() if p.requires_grad and is_part(p)}
    assert own == (set() if world().alone else {torch.float32})
    return found


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_bf16_passes_over_fp32_masters(processes: Processes, model: Path, adapter: str) -> None:
    (alone,) = processes.run(_bf16, size=1, path=model, adapter=adapter)
    first, second = processes.run(_bf16, path=model, adapter=adapter)
    assert first == second
    # From the second step on Adam has made whole steps of what rounding left of small gradients.
    for ours, theirs, far in zip(first["steps"], alone["steps"], (0.02, 0.2, 0.2), strict=True):
        assert ours == pytest.approx(theirs, rel=far)


def _recomputed(path: Path) -> dict[str, Any]:
    lm = spreading.load(path)
    train = TrainConfig(micro_batch_tokens=256, activation_mb=1)
    line = fit_activations(lm, train)
    assert line is not None
    assert "2 of 2 layers are computed again" in line or "1 of 2 layers" in line, line
    return {**spreading.trained(lm), "line": line}


def test_layers_that_are_computed_again(processes: Processes, tmp_path: Path) -> None:
    path = spreading.save(tmp_path / "model", intermediate_size=512)
    assert _compared(processes, _recomputed, path=path) < EXACT
    # The gathered weights are no activations.
    (alone,) = processes.run(_recomputed, size=1, path=path)
    assert alone["line"] == processes.run(_recomputed, path=path)[0]["line"]


def _chunked(path: Path) -> dict[str, Any]:
    small = functools.partial(chunked_logps, chunk_bytes=64 * 8 * 3, kept_bytes=0)
    language_model.chunked_logps = small
    try:
        return _trained(path)
    finally:
        language_model.chunked_logps = chunked_logps


def test_a_head_in_chunks_that_are_computed_again(processes: Processes, model: Path) -> None:
    assert _compared(processes, _chunked, path=model) < EXACT


def _with_values(path: Path, warming: int) -> dict[str, Any]:
    lm = spreading.load(path)
    head = value_head_of(lm)
    beside: dict[str, nn.Parameter] = {"value": head.weight}
    train = TrainConfig(lr=0.01, weight_decay=0.1, grad_clip=0.5)
    own = Optimiser(lm.model, train, lm.dtype, beside=beside, beside_lr=0.02)
    batch, found = spreading.groups(), []
    count = global_count(batch, "token_mean")
    before = spreading.weights(own)
    for step in range(4):
        sums = Sums()
        for part in parts(lm, batch, 24):
            logps_NT, _, values_NT = logprobs_and_values(lm, head, part.batch, detach=step < warming)
            loss_NT = (values_NT - 1.0) ** 2
            if step >= warming:
                loss_NT = loss_NT - logps_NT
            loss = reduce_tokens(loss_NT, part.batch.mask_NT, count, "token_mean")
            sums.backward(own, loss, part)
        found.append((sums.total(count)[0], own.step(0.01)))
        if step + 1 == warming:
            left = spreading.weights(own)
            assert left.pop("value") != before.pop("value")
            assert left == before, "weight decay moved what had no gradient"
    return {"steps": found, "weights": spreading.weights(own)}


@pytest.mark.parametrize("warming", [0, 2])
def test_a_value_head_on_the_trunk(processes: Processes, model: Path, warming: int) -> None:
    assert _compared(processes, _with_values, path=model, warming=warming) < EXACT


def _scalar(path: Path) -> dict[str, Any]:
    config = ModelConfig(path=str(path), dtype="float64", device="cpu")
    rm = load_scalar_model(config, new_head="normal", holder=spreading.holder())
    settle_scalar_layout(rm, "auto")
    own = Optimiser(rm.model, TrainConfig(lr=0.01), rm.dtype)
    batch, found = spreading.groups(), []
    for _ in range(4):
        sums = Sums()
        for part in parts(rm, batch, 24):
            loss = (rm.scores(part.batch)[:, 0] - 1).square().sum() + rm.values(part.batch).square().sum()
            sums.backward(own, loss / 10, part)
        found.append((sums.total(1)[0], own.step(0.01)))
    return {"steps": found, "weights": spreading.weights(own)}


def test_a_model_of_scores(processes: Processes, model: Path) -> None:
    """A process may hold none of a head of one row; and here two passes precede one backward pass."""
    assert _compared(processes, _scalar, path=model) < EXACT


def _between(path: Path) -> dict[str, Any]:
    """The reference is computed between the policy's forward pass and its backward pass."""
    lm = spreading.load(path, adapter="lora")
    reference = reference_of(lm)
    own, batch = spreading.optimiser(lm), spreading.groups()
    count = global_count(batch, "token_mean")
    found = []
    for _ in range(4):
        sums = Sums()
        for part in parts(lm, batch, 24):
            logps_NT, _ = lm.token_logprobs(part.batch)
            with torch.no_grad():
                ref_NT, _ = reference.token_logprobs(part.batch)
            loss_NT = (logps_NT - ref_NT).square() - logps_NT
            loss = reduce_tokens(loss_NT, part.batch.mask_NT, count, "token_mean")
            sums.backward(own, loss, part)
        found.append((sums.total(count)[0], own.step(0.01)))
    return {"steps": found, "weights": spreading.weights(own)}


def test_a_reference_between_forward_and_backward(processes: Processes, model: Path) -> None:
    assert _compared(processes, _between, path=model) < EXACT


class _Sometimes(nn.Module):
    """A layer with a parameter that some tokens reach (an expert), and one that none does."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        self.layer, self.rank = layer, rank
        self.some = nn.Parameter(torch.full((16,), 0.1, dtype=torch.float64))
        self.none = nn.Parameter(torch.full((16,), 0.1, dtype=torch.float64))

    def forward(self, hidden: torch.Tensor, **named: Any) -> Any:
        # In a world of one every token reaches it that in a world of two the second process has.
        found = self.layer(hidden, **named)
        return found + self.some if world().rank == self.rank else found


def _reached(path: Path) -> list[Any]:
    lm = spreading.load(path)
    holder = lm.holder
    assert holder is not None
    whole = spreading.load_plain(path)
    layers: Any = whole.trunk.layers
    layers[0], layers[1] = _Sometimes(layers[0], rank=1), _Sometimes(layers[1], rank=1)
    holder.spread(whole)
    holder.begin(whole)
    own = spreading.optimiser(whole, weight_decay=0.1)
    steps = [spreading.step(whole, own, spreading.groups()) for _ in range(2)]
    left = spreading.weights(own)
    name = "model.layers.0."
    return [steps, left[name + "some"], left[name + "none"]]


def test_what_only_some_tokens_reach(processes: Processes, model: Path) -> None:
    first, second = processes.run(_reached, path=model)
    assert first == second
    _, some, none = first
    assert none == [0.1] * 16, "what had no gradient anywhere was decayed"
    assert min(abs(s - 0.1) for s in some) > 1e-3


def _not_finite(path: Path) -> list[Any]:
    lm = spreading.load(path)
    own, batch = spreading.optimiser(lm), spreading.groups()
    before = spreading.weights(own)
    said = ""
    for part in parts(lm, batch, 24):
        logps_NT, _ = lm.token_logprobs(part.batch)
        bad = float("nan") if world().rank == 1 and not part.idle else 1.0
        (logps_NT.sum() * bad).backward()
    try:
        own.step(0.01)
    except NotFinite as error:
        said = str(error)
    same = spreading.weights(own) == before
    return [said, same, spreading.step(lm, own, spreading.groups())]


def test_a_gradient_that_is_not_finite_is_skipped_by_all(processes: Processes, model: Path) -> None:
    first, second = processes.run(_not_finite, path=model)
    assert first == second
    assert first[:2] == ["the gradient's norm is nan", True]
    (alone,) = processes.run(_trained, size=1, path=model)
    assert first[2] == pytest.approx(alone["steps"][0], abs=EXACT)


def _held_while_cut(path: Path, adapter: str) -> list[list[int]]:
    """Of the model's tensors, how many are still there and how many should be, before each cut."""
    lm, holder = spreading.load_plain(path, adapter=adapter), spreading.holder()
    assert holder is not None
    originals = [weakref.ref(p) for p in lm.model.parameters()]
    found, due, own = [], len(originals), shard.fully_shard

    def counted(module: nn.Module, **how: Any) -> Any:
        nonlocal due
        found.append([sum(held() is not None for held in originals), due])
        due -= len(list(module.parameters()))
        return own(module, **how)

    shard.fully_shard = counted  # type: ignore[assignment]
    try:
        holder.spread(lm)
    finally:
        shard.fully_shard = own
    return found


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_layer_is_freed_as_it_is_cut(processes: Processes, model: Path, adapter: str) -> None:
    """Else a turn would hold the whole model and this process's part of it."""
    for cuts in processes.run(_held_while_cut, path=model, adapter=adapter):
        assert len(cuts) == 3
        assert all(held == due for held, due in cuts), cuts


def _sent(numbers: int) -> list[Any]:
    """Gathered and summed in our way and in gloo's; and whether memory went back that was freed."""
    group = torch.distributed.group.WORLD
    assert group is not None
    torch.manual_seed(world().rank)
    same: list[Any] = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        own = torch.randn(numbers, dtype=dtype)
        ours, theirs = (torch.empty(group.size() * numbers, dtype=dtype) for _ in range(2))
        gloo.Gather()(ours, own, group)
        torch.distributed.all_gather_single(theirs, own)
        same.append(bool((ours == theirs).all()))
        if dtype != torch.bfloat16:
            many = torch.randn(group.size() * numbers, dtype=dtype)
            ours, theirs = (torch.empty(numbers, dtype=dtype) for _ in range(2))
            torch.distributed.reduce_scatter_single(theirs, many)
            gloo.ReduceScatter()(ours, many, group, torch.distributed.ReduceOp.SUM)
            same.append(bool((ours == theirs).all()))
    return same


@pytest.mark.parametrize("size", [0, 1, 1003])
def test_messages_carry_what_gloos_own_carry(processes: Processes, size: int) -> None:
    """To the bit, with three processes too, where the order of a sum shows."""
    assert processes.run(_sent, size=3, numbers=size) == [[True] * 5] * 3


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _climbs(path: Path) -> float:
    """By how many MB resident memory is above the first gather's, after many gathers of 8 MB in all."""
    group = torch.distributed.group.WORLD
    assert group is not None
    layers: Any = spreading.load(path).trunk.layers
    comm = layers[0]._get_fsdp_state()._fsdp_param_groups[0]._all_gather_comm
    allocator = ctypes.CDLL(None)
    # What a run's allocator does: all from the heap, nothing back (M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h).
    allocator.mallopt(-4, 0)
    allocator.mallopt(-1, 2**31 - 1)
    try:
        own, held = torch.ones(1 << 20), []
        for _ in range(12):
            out = comm.allocate((group.size() << 20,), dtype=torch.float32, device=torch.device("cpu"))
            comm(out, own, group)
            assert float(out.sum()) == group.size() << 20
            del out
            held.append(_resident_mb())
    finally:
        allocator.mallopt(-4, 65536)
        allocator.mallopt(-1, 128 * 1024)
    return held[-1] - held[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_climb_with_gathers(processes: Processes, model: Path) -> None:
    assert max(processes.run(_climbs, path=model)) < 2
