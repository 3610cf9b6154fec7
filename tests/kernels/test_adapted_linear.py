"""A linear layer with its adapter in one function: PEFT's numbers, and their gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trimtab.kernels.build import library
from trimtab.kernels.fused import adapted_linear
from trimtab.models.fused import fuse, unfuse


def test_gradients_are_those_of_finite_differences() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    x, weight, bias, a, b = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: adapted_linear(x, weight, bias, a, b, 0.7), (x, a, b))
    plain = nn.functional.linear(x, weight, bias) + 0.7 * (x @ a.t() @ b.t())
    torch.testing.assert_close(adapted_linear(x, weight, bias, a, b, 0.7), plain)
    with torch.no_grad():
        torch.testing.assert_close(adapted_linear(x, weight, bias, a, b, 0.7), plain)


@pytest.mark.skipif(library() is None, reason="no compiler")
@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_layer_is_pefts(bias: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(24, 16, bias=bias), nn.Linear(16, 8, bias=bias))
    plain: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=["0", "1"]))
    with torch.no_grad():  # B begins at 0, where A's gradient is 0 too
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ours = copy.deepcopy(plain)
    assert fuse(ours)["adapters"] == 2
    x = torch.randn(5, 24)
    found = []
    for layer in (plain, ours):
        given = x.clone().requires_grad_()
        out = layer(given)
        out.square().sum().backward()
        grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        found.append((out, given.grad, grads))
    (out, grad, grads), (our_out, our_grad, our_grads) = found
    torch.testing.assert_close(our_out, out)
    torch.testing.assert_close(our_grad, grad, rtol=1e-4, atol=1e-3)
    assert set(our_grads) == set(grads)
    assert len(grads) == 4
    for name, value in grads.items():
        torch.testing.assert_close(our_grads[name], value, rtol=1e-4, atol=1e-3)
    # Taken away, the scale would show: 12 / 4 = 3, and not 1.
    assert not torch.allclose(
        out, plain.base_model.model(x) * 0 + model[1].base_layer(model[0].base_layer(x))
    )
    unfuse(ours)
    torch.testing.assert_close(ours(x), out)


@pytest.mark.skipif(library() is None, reason="no compiler")
def test_what_is_no_plain_adapter_goes_its_own_way() -> None:
    torch.manual_seed(0)
    dora: Any = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"], use_dora=True)
    )
    assert fuse(dora)["adapters"] == 0
    lora: Any = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    assert fuse(lora)["adapters"] == 1
    x = torch.randn(2, 8)
    with lora.disable_adapter():
        own = lora(x)
    torch.testing.assert_close(
        own,
        nn.functional.linear(
            x, lora.base_model.model[0].base_layer.weight, lora.base_model.model[0].base_layer.bias
        ),
    )
    # The adapter in fp32 over a base in bf16 is for PEFT, which casts.
    lora.base_model.model[0].base_layer.bfloat16()
    assert lora(x.bfloat16()).dtype == torch.bfloat16
