"""Master weights, accumulation, and what a loss or gradient that is not finite leaves behind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trimtab.errors import InputError, NotFinite
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser
from trimtab.training.precision import choose_dtype
from trimtab.training.schedule import learning_rate


class Line(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values))
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("frequencies", torch.tensor([1 / 3, 1e-4]))


def test_updates_of_a_millionth_are_kept_and_a_plain_bf16_optimiser_loses_them() -> None:
    """64 updates of 1e-6 on a weight of 1: bf16's spacing below 1 is 2⁻⁸ = 3.9e-3, so each rounds away."""
    model = Line([1.0])
    optimiser = Optimiser(model, TrainConfig(grad_clip=0.0), torch.bfloat16)
    for _ in range(64):
        optimiser.backward((model.weight.float() * 1.0).sum())
        optimiser.step(1e-6)
    # With a constant gradient every AdamW update is the learning rate itself.
    assert optimiser.masters["weight"].item() == pytest.approx(1 - 64e-6, abs=1e-6)
    assert model.weight.dtype == torch.bfloat16

    peer = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([peer], lr=1e-6, weight_decay=0.0)
    for _ in range(64):
        (peer * 1.0).sum().backward()
        plain.step()
        plain.zero_grad()
    assert peer.item() == 1.0  # the wrong number: nothing was learned


def test_updates_reach_the_compute_weights_once_they_show() -> None:
    model = Line([1.0])
    optimiser = Optimiser(model, TrainConfig(grad_clip=0.0), torch.bfloat16)
    for _ in range(8):
        optimiser.backward(model.weight.float().sum())
        optimiser.step(1e-3)
    assert model.weight.item() == optimiser.masters["weight"].to(torch.bfloat16).item() == 0.9921875


def test_micro_batches_are_added_up_in_fp32() -> None:
    """One gradient of 256 and then 8 of 1: a bf16 sum stays at 256, whose next number is 258."""
    model = Line([1.0])
    optimiser = Optimiser(model, TrainConfig(grad_clip=0.0), torch.bfloat16)
    for factor in [256.0] + [1.0] * 8:
        optimiser.backward((model.weight * factor).sum())
    assert optimiser.masters["weight"].grad.item() == 264.0
    assert optimiser.masters["weight"].grad.dtype == torch.float32
    assert optimiser.step(0.0) == 264.0

    wrong = torch.tensor(256.0, dtype=torch.bfloat16)
    for _ in range(8):
        wrong += 1.0
    assert wrong.item() == 256.0

    optimiser.backward((model.weight * 3.0).sum())
    assert optimiser.step(0.0) == 3.0, "the last step's gradient was not cleared"


def test_buffers_keep_their_precision_and_frozen_weights_do_not_move() -> None:
    model = Line([1.0])
    optimiser = Optimiser(model, TrainConfig(weight_decay=0.5), torch.bfloat16)
    optimiser.backward(model.weight.float().sum())
    optimiser.step(0.1)
    assert model.frequencies.dtype == torch.float32
    assert model.frequencies[0].item() == torch.tensor(1 / 3).item()
    assert model.fixed.dtype == torch.bfloat16
    assert model.fixed.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_scales_the_gradient_and_reports_the_norm_before(dtype: torch.dtype) -> None:
    """Gradient (3, 4) has norm 5, clipped to 1 it is (0.6, 0.8): seen in Adam's first moment, (1 − β1)·g."""
    model = Line([1.0, 1.0])
    optimiser = Optimiser(model, TrainConfig(grad_clip=1.0), dtype)
    optimiser.backward((model.weight * torch.tensor([3.0, 4.0], dtype=dtype)).sum())
    assert optimiser.step(1e-3) == pytest.approx(5.0)
    moment = optimiser.tensors()["exp_avg.weight"]
    torch.testing.assert_close(moment, 0.1 * torch.tensor([0.6, 0.8]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = Line([1.0, 2.0])
    optimiser = Optimiser(model, TrainConfig(), torch.bfloat16)
    with pytest.raises(NotFinite, match=r"the loss is (nan|inf)"):
        optimiser.backward((model.weight.float() * bad).sum())
    assert optimiser.masters["weight"].tolist() == [1.0, 2.0]
    assert optimiser.masters["weight"].grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype: torch.dtype) -> None:
    """√x at 0 has value 0 and slope infinity: the loss alone would not tell."""
    model = Line([0.0, 4.0])
    optimiser = Optimiser(model, TrainConfig(), dtype)
    optimiser.backward(model.weight.sqrt().sum())
    with pytest.raises(NotFinite, match=r"the gradient's norm is (inf|nan)"):
        optimiser.step(1.0)
    assert optimiser.masters["weight"].tolist() == [0.0, 4.0]
    assert not [name for name in optimiser.tensors() if name.startswith("exp_avg")]
    optimiser.backward(model.weight[1] * 1.0)
    assert optimiser.step(0.0) == 1.0, "the bad gradient was not cleared"


def test_a_model_without_trainable_weights_is_refused() -> None:
    model = Line([1.0])
    model.weight.requires_grad_(False)
    with pytest.raises(InputError, match="no trainable"):
        Optimiser(model, TrainConfig(), torch.float32)


def test_decoupled_weight_decay() -> None:
    """AdamW: w ← w·(1 − lr·wd) − lr·ĝ/(√v̂ + ε) = 2·0.99 − 0.1 with a gradient of one."""
    model = Line([2.0])
    optimiser = Optimiser(model, TrainConfig(weight_decay=0.1, grad_clip=0.0), torch.float32)
    optimiser.backward(model.weight.sum())
    optimiser.step(0.1)
    assert model.weight.item() == pytest.approx(2 * 0.99 - 0.1, abs=1e-6)


# ---------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, [1.0] * 5),
        ({"schedule": "linear"}, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "final_lr": 0.5}, [1.0, 0.9, 0.8, 0.7, 0.6]),
        # The rise ends at the full rate, from which the fall starts: 1/2, 1, then 1 − 0/3, 1 − 1/3, 1 − 2/3.
        ({"schedule": "linear", "warmup_steps": 2}, [0.5, 1.0, 1.0, 2 / 3, 1 / 3]),
        ({"schedule": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0]),
        ({"schedule": "cosine"}, [0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(5)]),
        (
            {"schedule": "cosine", "final_lr": 0.1},
            [0.1 + 0.45 * (1 + math.cos(math.pi * k / 5)) for k in range(5)],
        ),
    ],
)
def test_learning_rate(options: dict[str, object], expected: list[float]) -> None:
    config = TrainConfig.model_validate({"lr": 2.0, "steps": 5, **options})
    rates = [learning_rate(config, step, 5) for step in range(5)]
    assert rates == pytest.approx([2 * rate for rate in expected])


def test_compute_dtype() -> None:
    class Shapes:
        hidden_size, intermediate_size = 32, 64

    cpu = torch.device("cpu")
    assert choose_dtype("bfloat16", Shapes, cpu, 8) == (
        torch.bfloat16,
        "computing in bfloat16, as configured",
    )
    chosen, why = choose_dtype("auto", Shapes, cpu, 64)
    assert chosen in (torch.float32, torch.bfloat16)
    assert str(chosen).removeprefix("torch.") in why
