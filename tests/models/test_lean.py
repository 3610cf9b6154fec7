"""A layer as one function, and a decode step's layers in one call: the model's own numbers, or not used."""

from __future__ import annotations

import random
from typing import Any

import families
import pytest
import torch
import transformers as hf

from trimtab.groups import Group
from trimtab.kernels.call import matrix_unit
from trimtab.kernels.fused import linear
from trimtab.models.adapters import AdapterConfig, adapt, fresh
from trimtab.models.fused import fuse, unfuse
from trimtab.models.language_model import LanguageModel
from trimtab.models.lean import Lean, lean_of
from trimtab.models.load import wrap
from trimtab.rollouts import engine
from trimtab.rollouts.engine import TreeSampler
from trimtab.rollouts.sampling import SamplingConfig

LEAN = ["llama", "qwen2", "qwen3", "mistral"]
OTHERS = ["gemma3", "olmo2", "cohere", "phi3", "mixtral", "deepseek", "gpt2"]
on_matrix_unit = pytest.mark.skipif(not matrix_unit(), reason="this CPU has no matrix unit for bf16")


def one_layer(lm: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
    """The first layer's output, through whatever its forward is now."""
    trunk: Any = lm.trunk
    positions = trunk.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    with torch.no_grad():
        return trunk.layers[0](hidden, attention_mask=None, position_embeddings=positions)


@pytest.mark.parametrize("family", LEAN)
def test_a_lean_layer_is_the_layer(family: str) -> None:
    lm = families.tiny(family)
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    assert lean_of(lm.trunk.layers[0]) is not None  # type: ignore[union-attr, index]
    ours = one_layer(lm, hidden)
    assert "_lean" in vars(lm.trunk.layers[0])  # type: ignore[union-attr, index]
    unfuse(lm.model)
    torch.testing.assert_close(ours, one_layer(lm, hidden), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", OTHERS)
def test_other_layers_are_left_alone(family: str) -> None:
    lm = families.tiny(family)
    layers: Any = getattr(lm.trunk, "layers", None) or lm.trunk.h
    assert all(lean_of(layer) is None for layer in layers)


def test_a_layer_with_one_more_factor_is_not_recognised() -> None:
    """Granite is the same but for a factor on its residuals, which is 1 by default."""
    plain = wrap(hf.GraniteForCausalLM(hf.GraniteConfig(**families._GQA)), None)
    scaled = wrap(hf.GraniteForCausalLM(hf.GraniteConfig(**families._GQA, residual_multiplier=0.5)), None)
    assert lean_of(plain.trunk.layers[0]) is not None  # type: ignore[union-attr, index]
    assert lean_of(scaled.trunk.layers[0]) is None  # type: ignore[union-attr, index]


ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": None,
    "quick_gelu": None,
    "relu": None,
}
by_width = pytest.mark.parametrize("width", [64, 512])
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def fresh_llama(activation: str, width: int) -> Any:
    """One layer with the weights that transformers draws: so small that activations are alike on them."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    config = hf.LlamaConfig(**{**families._GQA, **sizes, "num_hidden_layers": 1, "initializer_range": 0.02})
    config.hidden_act = activation
    torch.manual_seed(0)
    return hf.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def logps(model: Any, *, gradient: bool) -> torch.Tensor:
    """Of all tokens at some positions; without gradient lean layers compute them."""
    with torch.set_grad_enabled(gradient):
        logits = model(input_ids=torch.arange(3, 12)[None], use_cache=False).logits
    return logits.detach().float().log_softmax(-1)


@both
@by_width
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_gate_passes_for_another(activation: str, width: int, dtype: torch.dtype) -> None:
    """Looked at while the weights hardly leave 0, and right when they have."""
    model = fresh_llama(activation, width).to(dtype)
    before = torch.get_rng_state()
    counts = fuse(model)
    assert torch.equal(before, torch.get_rng_state())
    lean, kind = lean_of(model.model.layers[0]), ACTIVATIONS[activation]
    assert (lean.kind if lean else None) == kind
    assert counts["gates"] == (kind is not None)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(50 * 2 * width**-0.5)  # to twice unit outputs
    # Each through the kernels and through the model's own code, and that in fp32 as the truth.
    ours = [logps(model, gradient=gradient) for gradient in (False, True)]
    unfuse(model)
    own = logps(model, gradient=False)
    truth = logps(model.float(), gradient=False)
    slack = 1e-4 if dtype == torch.float32 else 1.5 * float((own - truth).abs().max())
    for found in ours:
        assert (found - truth).abs().max() < slack


@both
def test_weights_that_stand_in_for_others_are_not_looked_at(dtype: torch.dtype) -> None:
    """A tree whose weights lie elsewhere has tensors of one number in their place."""
    for activation, kind in ACTIVATIONS.items():
        model = fresh_llama(activation, 64).to(dtype)
        for parameter in model.parameters():
            parameter.data = torch.full((), 0.02, dtype=dtype).expand(parameter.shape)
        counts, lean = fuse(model), lean_of(model.model.layers[0])
        assert (lean.kind if lean else None) == kind
        assert counts["gates"] == (kind is not None)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_gate_passes_for_another_under_an_adapter(activation: str) -> None:
    """A base in bf16, as adapters have it, and a new adapter, which adds 0."""
    options = fresh(AdapterConfig(kind="lora", rank=4), scores=False)
    model = adapt(fresh_llama(activation, 64).bfloat16(), options)
    lean, kind = lean_of(model.model.layers[0]), ACTIVATIONS[activation]
    assert (lean.kind if lean else None) == kind
    assert hasattr(model.model.layers[0].mlp.forward.__func__, "replaces") == (kind is not None)
    assert lean is None or all(part.lora is not None for part in lean.linears)


@pytest.mark.parametrize("within", ["mlp", "self_attn"])
def test_a_layer_with_a_weight_of_its_own_is_left_alone(within: str) -> None:
    """One that is 1 until it is trained shows in no pass."""
    model = fresh_llama("silu", 64)
    getattr(model.model.layers[0], within).scale = torch.nn.Parameter(torch.ones(()))
    counts = fuse(model)
    assert lean_of(model.model.layers[0]) is None
    assert counts["gates"] == (within != "mlp")


def test_an_update_of_the_weights_shows_at_once() -> None:
    lm = families.tiny("llama")
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    before = one_layer(lm, hidden)
    with torch.no_grad():
        lm.trunk.layers[0].mlp.down_proj.weight.mul_(2)  # type: ignore[union-attr, index]
    assert not torch.equal(before, one_layer(lm, hidden))


def test_a_pass_with_gradient_is_the_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = families.tiny("llama")

    def refuse(*_: Any) -> None:
        raise AssertionError("the lean way keeps nothing for a backward pass")

    monkeypatch.setattr(Lean, "__call__", refuse)
    lm.model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits.sum().backward()


@on_matrix_unit
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 16, 32), (5, 48, 64), (37, 160, 96), (192, 32, 512)])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_times_weights_in_place(rows: int, n: int, k: int, biased: bool) -> None:
    draw = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*s, generator=draw).bfloat16() for s in ((rows, k), (n, k), (n,)))
    with torch.no_grad():
        ours = linear(x, weight, bias if biased else None)
        # A row's result does not depend on its neighbours.
        assert torch.equal(ours[:1], linear(x[:1], weight, bias if biased else None))
    truth = x.double() @ weight.double().T + (bias.double() if biased else 0.0)
    # Within the rounding of the result: half a unit in the last of bf16's eight places.
    torch.testing.assert_close(ours.double(), truth, atol=1e-3, rtol=2**-8)


def stackable(family: str = "llama", **more: Any) -> LanguageModel:
    """A model in bf16 whose widths suit the matrix unit."""
    config: Any = families.CONFIGS[family]()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 96}
    for name, value in {**sizes, **more}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    lm = wrap(hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), None)
    lm.cast(torch.bfloat16)
    return lm


def prompts() -> list[Group]:
    draw = random.Random(3)
    return [
        Group(id=f"p{i}", prompt_tokens=[draw.randrange(3, 96) for _ in range(5 + 9 * i)]) for i in range(4)
    ]


def sampled(lm: LanguageModel, sampler: TreeSampler) -> list[list[int]]:
    config = SamplingConfig(max_new_tokens=20, max_rows=5)
    groups = sampler.sample(lm, prompts(), 3, config, seed=0, end_tokens=[])
    return [response.tokens or [] for group in groups for response in group.responses]


@on_matrix_unit
@pytest.mark.parametrize("family", LEAN)
def test_the_stack_draws_what_the_trunk_draws(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, sampler = stackable(family), TreeSampler()
    ours = sampled(lm, sampler)
    assert sampler.blocks is not None
    assert sampler.blocks.stack_agrees is True
    monkeypatch.setattr(engine, "decode_stack", lambda *_: None)
    other = TreeSampler()
    same = sum(a == b for a, b in zip(ours, sampled(lm, other), strict=True))
    assert other.blocks is not None
    assert other.blocks.stack_agrees is None
    # Both round to bf16, in another order: one token in some hundreds may come out differently.
    assert same >= len(ours) - 2


@on_matrix_unit
def test_the_stack_reads_the_weights_of_now() -> None:
    """What it holds are addresses: made anew for every call, and valid through an update in place."""
    lm, sampler = stackable(), TreeSampler()
    before = sampled(lm, sampler)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.data = torch.randn_like(parameter.data) * 0.2
    lm.version += 1
    after = sampled(lm, sampler)
    assert before != after
    assert after == sampled(lm, TreeSampler())


@on_matrix_unit
@pytest.mark.parametrize("rank", [4, 40])
def test_the_stack_takes_adapters(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On all projections but one, with weights that count: a new adapter has no effect."""
    bare = stackable()
    targets = ["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = AdapterConfig(kind="lora", rank=rank, alpha=3.0 * rank, targets=targets)
    lm = wrap(adapt(bare.model, fresh(options, scores=False)), None)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1 / rank**0.5)
    lm.cast(torch.bfloat16)

    def logps(lm: LanguageModel) -> torch.Tensor:
        """Of the first tokens, which are the same whatever was drawn before."""
        config = SamplingConfig(max_new_tokens=3)
        groups = TreeSampler().sample(lm, prompts(), 3, config, seed=0, end_tokens=[])
        return torch.tensor([r.sampler_logps for group in groups for r in group.responses])

    sampler = TreeSampler()
    ours = sampled(lm, sampler)
    assert sampler.blocks is not None
    assert sampler.blocks.stack_agrees is True
    fast, base = logps(lm), logps(bare)
    monkeypatch.setattr(engine, "decode_stack", lambda *_: None)
    same = sum(a == b for a, b in zip(ours, sampled(lm, TreeSampler()), strict=True))
    assert same >= len(ours) - 2
    plain = logps(lm)
    kept = (fast - plain).abs().amax(-1) < 1.0  # rows in which the same tokens were drawn
    assert kept.double().mean() > 0.8
    assert (fast - plain)[kept].abs().max() < 0.05
    assert (fast - base).abs().max() > 0.2


@on_matrix_unit
def test_a_new_sampler_draws_what_a_used_one_draws() -> None:
    """A resumed run begins with a new one, which compares the stack with the trunk in its first step.

    Beyond 192 rows the two round otherwise, so that what that step hands on shows.
    """
    lm = stackable(hidden_size=512, intermediate_size=1536)
    draw = random.Random(3)
    groups = [
        Group(id=f"p{i}", prompt_tokens=[draw.randrange(3, 96) for _ in range(20 + i % 7)]) for i in range(30)
    ]
    sampler, config = TreeSampler(), SamplingConfig(max_new_tokens=12)

    def logps(sampler: TreeSampler) -> list[list[float] | None]:
        made = sampler.sample(lm, groups, 8, config, seed=0, end_tokens=[])
        return [response.sampler_logps for group in made for response in group.responses]

    first, second = logps(sampler), logps(sampler)
    assert sampler.blocks is not None
    assert sampler.blocks.stack_agrees is True
    assert first == second == logps(TreeSampler())


@on_matrix_unit
def test_a_trunk_that_does_more_is_called_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trunk that scales its embeddings, as some do: one step shows it, and the stack is not used."""
    lm = stackable()
    with monkeypatch.context() as patch:
        # The stack's own draws may differ in a token by rounding.
        patch.setattr(engine, "decode_stack", lambda *_: None)
        truth = sampled(lm, TreeSampler())
    embed = lm.trunk.embed_tokens
    own = type(embed).forward
    calls: list[int] = []

    def scaled(ids: torch.Tensor) -> torch.Tensor:
        # Wrong when the stack calls it, right when the trunk does.
        calls.append(ids.dim())
        return own(embed, ids) * (3.0 if ids.dim() == 1 else 1.0)

    monkeypatch.setattr(embed, "forward", scaled)
    sampler = TreeSampler()
    assert sampled(lm, sampler) == truth
    assert 1 in calls
    assert sampler.blocks is not None
    assert sampler.blocks.stack_agrees is False


def test_without_kernels_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = families.tiny("llama")
    unfuse(lm.model)
    monkeypatch.setattr("trimtab.models.fused.library", lambda: None)
    assert set(fuse(lm.model).values()) == {0}
