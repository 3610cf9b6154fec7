"""Kernels in a loaded model: what is replaced computes the same, and nothing else is touched."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama

from trimtab.data.collate import collate
from trimtab.kernels import build
from trimtab.kernels.build import library
from trimtab.models.fused import ROTARY, fuse, unfuse
from trimtab.models.roles import frozen_copy

pytestmark = pytest.mark.skipif(library() is None, reason=f"no compiled kernels: {build.why_not()}")

COUNTS = {
    # norms, gates, rotary, activations; three layers each (mamba two)
    "llama": (7, 3, 3, 0),
    "qwen2": (7, 3, 3, 0),
    "qwen3": (13, 3, 3, 0),
    "mistral": (7, 3, 3, 0),
    "mixtral": (7, 0, 3, 0),
    "gemma2": (13, 3, 3, 3),
    "gemma3": (19, 3, 3, 3),
    "neox": (0, 0, 3, 0),
    "gpt2": (0, 0, 0, 3),
    "opt": (0, 0, 0, 0),
    "phi": (0, 0, 3, 3),
    "phi3": (7, 0, 3, 0),
    # Layer norms without a mean's weight, angles of neighbouring pairs.
    "cohere": (0, 3, 0, 0),
    "granite": (7, 3, 3, 0),
    "olmo2": (13, 3, 3, 0),
    "deepseek": (13, 3, 3, 0),
    "mamba": (3, 0, 0, 0),
}


def made(config: Any) -> Any:
    """A random model as transformers builds it, but its norms' weights are not 1 and its biases not 0."""
    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def assert_same(model: Any, other: Any, slack: float = 1e-5) -> None:
    """Logits of rows of any length, with and without a gradient, and the gradient itself."""
    torch.manual_seed(1)
    for length in (3, 30):
        ids = torch.randint(3, families.VOCAB, (1, length))
        with torch.no_grad():
            a, b = (m(input_ids=ids, use_cache=False).logits for m in (model, other))
        assert (a - b).abs().max() < slack * max(1.0, float(b.abs().max()))
    found = []
    for m in (model, other):
        logits = m(input_ids=ids, use_cache=False).logits
        named = dict(m.named_parameters())
        weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
        grads = torch.autograd.grad((logits * weights).sum(), list(named.values()), allow_unused=True)
        found.append(dict(zip(named, grads, strict=True)))
    top = max(float(g.abs().max()) for g in found[1].values() if g is not None)
    for name, truth in found[1].items():
        if truth is not None:
            assert (found[0][name] - truth).abs().max() < 2e-5 * top, name


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("family", COUNTS)
def test_what_is_replaced_computes_the_same(family: str) -> None:
    model, other = made(families.CONFIGS[family]()), made(families.CONFIGS[family]())
    counts = fuse(model)
    assert tuple(counts[k] for k in ("norms", "gates", "rotary", "activations")) == COUNTS[family]
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    assert counts["linears"] == len(linears)
    assert_same(model, other)
    unfuse(model)
    assert replaced(model) == []
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_a_class_whose_instances_differ_is_checked_instance_by_instance() -> None:
    """Gemma 3n: norms without a weight beside norms with one; sparse gates and dense ones."""
    config = hf.Gemma3nTextConfig(
        vocab_size=families.VOCAB,
        vocab_size_per_layer_input=families.VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 4,
        activation_sparsity_pattern=[0.0, 0.9, 0.0, 0.9],
        laurel_rank=4,
        initializer_range=families.SPREAD,
        pad_token_id=0,
        max_position_embeddings=256,
    )
    model, other = made(config), made(config)
    counts = fuse(model)
    assert counts["gates"] == 2
    norms = [m for m in model.modules() if type(m).__name__ == "Gemma3nRMSNorm"]
    assert 0 < counts["norms"] < len(norms)
    assert_same(model, other, 1e-4)


class Scaled(modeling_llama.LlamaRMSNorm):
    """Looks like the norm and has its name, but is none: it also halves."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) / 2


class OtherRMSNorm(modeling_llama.LlamaRMSNorm):
    """The same under a name that is looked at."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class BiasedRMSNorm(modeling_llama.LlamaRMSNorm):
    """Equal at first, until its bias is trained."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + self.bias


class MLP(nn.Module):
    """The parts of a gated MLP, put together in a given way."""

    def __init__(self, how: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn = F.silu
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.how(self, x))


@pytest.mark.parametrize("norm", [Scaled(8), OtherRMSNorm(8), BiasedRMSNorm(8)])
def test_a_norm_that_is_none_is_left_alone(norm: nn.Module) -> None:
    assert fuse(nn.Sequential(norm))["norms"] == 0
    assert replaced(norm) == []


@pytest.mark.parametrize(
    ("how", "gates"),
    [
        (lambda m, x: F.silu(m.gate_proj(x)) * m.up_proj(x), 1),
        (lambda m, x: F.gelu(m.gate_proj(x), approximate="tanh") * m.up_proj(x), 1),
        (lambda m, x: F.gelu(m.gate_proj(x)) * m.up_proj(x), 0),
        (lambda m, x: F.relu(m.gate_proj(x)) * m.up_proj(x), 0),
        (lambda m, x: F.silu(m.up_proj(x)) * m.gate_proj(x), 0),
        # Equal on the usual inputs.
        (lambda m, x: F.silu(m.gate_proj(x).clamp(max=10)) * m.up_proj(x), 0),
        (lambda m, x: F.silu(m.gate_proj(x)) * m.up_proj(x).clamp(-10, 10), 0),
    ],
)
def test_a_gate_that_is_another_is_left_alone(
    how: Callable[[Any, torch.Tensor], torch.Tensor], gates: int
) -> None:
    torch.manual_seed(0)
    mlp = MLP(how)
    x = torch.randn(3, 8)
    before = mlp(x)
    assert fuse(mlp)["gates"] == gates
    assert (mlp(x) - before).abs().max() < 1e-6


def test_an_attention_with_another_rotation_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = getattr(modeling_llama, ROTARY)

    def backwards(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **rest: Any) -> Any:
        return own(q, k, cos, -sin, **rest)

    monkeypatch.setattr(modeling_llama, ROTARY, backwards)
    assert fuse(made(families.CONFIGS["llama"]()))["rotary"] == 0


def test_another_rotation_of_several_rows_goes_its_own_way() -> None:
    """The kernel takes one row; a batch of rows is transformers' code, in the same forward."""
    model, other = made(families.CONFIGS["llama"]()), made(families.CONFIGS["llama"]())
    fuse(model)
    ids = torch.randint(3, families.VOCAB, (4, 9))
    with torch.no_grad():
        assert (model(input_ids=ids).logits - other(input_ids=ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("copied", [copy.deepcopy, frozen_copy])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi"])
def test_a_copy_computes_with_its_own_weights(family: str, copied: Callable[[Any], Any]) -> None:
    """Methods on an instance are bound to it: copied as they are, the copy's would be the original's."""
    lm, batch = families.tiny(family), collate(families.groups())
    with torch.no_grad():
        before = lm.token_logprobs(batch)[0]
        twin = copied(lm)
        for name, parameter in twin.model.named_parameters():
            torch.manual_seed(len(name))
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert torch.equal(lm.token_logprobs(batch)[0], before)
        moved = twin.token_logprobs(batch)[0]
        assert (moved - before).abs().max() > 0.01
        unfuse(twin.model)
        assert (twin.token_logprobs(batch)[0] - moved).abs().max() < 1e-5
    for module in twin.model.modules():
        assert vars(module).get("forward") is None
    for module in lm.model.modules():
        forward = vars(module).get("forward")
        assert forward is None or forward.__self__ is module


def test_nothing_of_transformers_is_changed() -> None:
    for family in ("llama", "gemma3", "gpt2", "phi"):
        before = made(families.CONFIGS[family]())
        modules = {sys.modules[type(m).__module__] for m in before.modules()}
        scopes = {module: dict(vars(module)) for module in modules}
        classes = {type(m): type(m).forward for m in before.modules()}
        fused = made(families.CONFIGS[family]())
        assert any(fuse(fused).values())
        with torch.no_grad():
            fused(input_ids=torch.arange(3, 20)[None])
        for module, scope in scopes.items():
            assert {k: v for k, v in vars(module).items() if v is not scope.get(k)} == {}
        for made_class, forward in classes.items():
            assert made_class.forward is forward
        assert replaced(before) == []
        # Its signature is read elsewhere, to decide which arguments a layer takes.
        for module in fused.modules():
            if "forward" in vars(module) and hasattr(module, "q_proj"):
                ours, own = (inspect.signature(f).parameters for f in (module.forward, type(module).forward))
                assert {"self": own["self"].kind} | {n: p.kind for n, p in ours.items()} == {
                    n: p.kind for n, p in own.items()
                }


def test_a_cast_model_and_other_dtypes() -> None:
    for dtype in (torch.float64, torch.float16):
        model, other = (made(families.CONFIGS["llama"]()).to(dtype) for _ in range(2))
        fuse(model)
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            a, b = (m(input_ids=ids).logits for m in (model, other))
        assert (a - b).abs().max() < (0.05 if dtype == torch.float16 else 1e-5)
    model, other = made(families.CONFIGS["gemma3"]()), made(families.CONFIGS["gemma3"]())
    fuse(model)
    truth = other(input_ids=torch.arange(3, 20)[None]).logits
    for m in (model, other):
        for p in m.parameters():
            p.data = p.data.bfloat16()
    with torch.no_grad():
        a, b = (m(input_ids=torch.arange(3, 20)[None]).logits.float() for m in (model, other))
    # One rounding where the module's own code makes several: no further from the truth than that.
    assert (a - truth).abs().max() < 1.5 * (b - truth).abs().max() + 0.02


def test_without_kernels_nothing_is_replaced_and_what_is_goes_its_own_way() -> None:
    model, other = made(families.CONFIGS["llama"]()), made(families.CONFIGS["llama"]())
    try:
        build.use(False)
        assert not any(fuse(model).values())
        assert replaced(model) == []
        build.use(True)
        fuse(model)
        build.use(False)
        assert_same(model, other)
    finally:
        build.use(True)
