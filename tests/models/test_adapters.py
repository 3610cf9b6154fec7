"""Adapters: PEFT's numbers, one frozen base under every role, and files that go both ways."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab.cli.main import run
from trimtab.config import load_config
from trimtab.data.collate import collate
from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.kernels.build import library
from trimtab.models import fused
from trimtab.models.adapters import AdapterConfig, shared_copy
from trimtab.models.fused import fuse, unfuse
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import set_attention_kernel
from trimtab.models.lean import Lean, lean_of
from trimtab.models.load import ModelConfig, load_model, load_scalar_model
from trimtab.models.roles import bases, frozen_copy, reference_of, scalar_on
from trimtab.rewards.models import RewardModel, build_reward_model
from trimtab.rollouts.engine import TreeSampler
from trimtab.rollouts.plain import PlainSampler
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.rollouts.stack import decode_stack
from trimtab.training.config import TrainConfig
from trimtab.training.export import save_model
from trimtab.training.optimiser import Optimiser

peft = pytest.importorskip("peft")

KINDS: dict[str, dict[str, bool]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
SLACK = 2e-5
"""Of a log-probability in fp32."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each family that is asked for here."""
    folder = tmp_path_factory.mktemp("bases")
    for family in ("llama", "qwen3", "gpt2", "gemma2"):
        families.tiny(family).model.save_pretrained(folder / family)  # type: ignore[operator]
        tiny.tokenizer().save_pretrained(folder / family)
    return folder


def loaded(path: Path, kind: str = "lora", **options: Any) -> LanguageModel:
    """With an adapter whose second factor is not zero, so that it does something."""
    dtype = options.pop("dtype", None)
    config = ModelConfig(path=str(path), dtype="float32")
    return stirred(load_model(config, AdapterConfig(kind=kind, rank=4, **options), dtype=dtype))  # type: ignore[arg-type]


def stirred(lm: Any) -> Any:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=draw))
    return lm


def saved(lm: Any, folder: Path) -> Path:
    """What a run in fp32 would leave."""
    save_model(lm, Optimiser(lm.model, TrainConfig(), torch.float32), folder, "float32")
    return folder


def learnt(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def told(model: Any, groups: list[Group]) -> torch.Tensor:
    """Each response's log-probabilities by plain calls of the model, differentiable; no code of ours."""
    rows = []
    for group in groups:
        for response in group.responses:
            prompt, own = group.prompt_tokens or [], response.tokens or []
            logits = model(input_ids=torch.tensor([prompt + own]), use_cache=False).logits[0]
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            rows.append(logps.gather(-1, torch.tensor(own)[:, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


# --- the numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "tree", "packed"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_and_gradients_are_pefts(
    family: str, kind: str, layout: Any, folders: Path, tmp_path: Path
) -> None:
    lm = loaded(folders / family, kind)
    base = AutoModelForCausalLM.from_pretrained(folders / family, dtype=torch.float32)
    # PEFT draws its own adapter; then it gets our tensors, matched by PEFT.
    targets = ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else "all-linear"
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=32, target_modules=targets, **KINDS[kind])
    ).eval()
    files = load_file(saved(lm, tmp_path / "ours") / "adapter_model.safetensors")
    found = peft.set_peft_model_state_dict(theirs, files)
    assert not found.unexpected_keys
    groups = families.groups()
    truth = told(theirs, groups)
    lm.layout = layout
    if layout == "packed":
        set_attention_kernel(lm, "trimtab")
    ours, _ = lm.token_logprobs(collate(groups, layout=layout))
    assert (ours - truth).abs().max() < SLACK
    assert (ours - told(lm.adapter.base, groups)).abs().max() > 0.1  # type: ignore[union-attr]
    weights = torch.linspace(-1, 1, truth.numel()).view(truth.shape)
    (truth * weights).sum().backward()
    (ours * weights).sum().backward()
    gradients = {name.removeprefix("base_model.model."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in learnt(lm.model).items():
        expected = gradients[name]
        assert expected.abs().max() > 1e-4
        assert (parameter.grad - expected).abs().max() < 1e-3 * expected.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(kind: str, folders: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        config = ModelConfig(path=str(folders / "llama"))
        lm = load_model(config, AdapterConfig(kind=kind), dtype=dtype)  # type: ignore[arg-type]
        if dtype == torch.bfloat16:
            Optimiser(lm.model, TrainConfig(), dtype)
        batch = collate(families.groups())
        with torch.no_grad():
            ours, base = (m.token_logprobs(batch)[0] for m in (lm, reference_of(lm)))
        assert torch.equal(ours, base)


def test_the_seed_draws_the_adapter_and_nothing_else_moves(folders: Path) -> None:
    config, options = ModelConfig(path=str(folders / "llama")), AdapterConfig(kind="lora")
    torch.manual_seed(5)
    first = torch.rand(1)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        drawn.append(learnt(load_model(config, options, seed=seed).model))
        assert torch.equal(torch.rand(1), first)
    name = next(name for name in drawn[0] if "lora_A" in name)
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_adapter_on_the_head(family: str, folders: Path, tmp_path: Path) -> None:
    """The chunked head calls it, its gradient flows; and merged it leaves tied embeddings alone."""
    lm = loaded(folders / family, targets=["lm_head", "q_proj"])
    groups = families.groups()
    set_attention_kernel(lm, "eager")
    ours, _ = lm.token_logprobs(collate(groups))
    assert (ours.detach() - families.direct_logprobs(lm, groups)).abs().max() < SLACK
    on_head = [p for name, p in learnt(lm.model).items() if "lm_head" in name]
    assert len(on_head) == 2
    assert all(g.abs().max() > 1e-3 for g in torch.autograd.grad(ours.sum(), on_head))
    # Reading the base's weight, as one might, misses it.
    before = lm.model.lm_head.base_layer.weight  # type: ignore[union-attr]
    with torch.no_grad():
        hidden = lm.head.trunk(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state[0]
        assert (torch.nn.functional.linear(hidden, before) - lm.head(hidden)).abs().max() > 0.1  # type: ignore[arg-type]
    merged = load_model(ModelConfig(path=str(saved(lm, tmp_path / "a")), attention="eager"))
    assert (families.direct_logprobs(merged, groups) - ours.detach()).abs().max() < SLACK
    save_model(merged, Optimiser(merged.model, TrainConfig(), torch.float32), tmp_path / "whole", "float32")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", attn_implementation="eager")
    assert torch.equal(back.get_input_embeddings().weight, lm.model.get_input_embeddings().weight)  # type: ignore[operator]
    assert (told(back, groups) - ours).abs().max() < SLACK


# --- roles --------------------------------------------------------------------------------------------------


def test_switching_an_adapter_before_the_backward_pass(folders: Path) -> None:
    """With PEFT's switch the policy gets no gradient; a role of its own leaves it whole."""
    groups = families.groups()
    base = AutoModelForCausalLM.from_pretrained(folders / "llama", dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    switched = peft.get_peft_model(base, config, adapter_name="policy").eval()
    switched.add_adapter("reference", config)
    switched.set_adapter("policy")
    policy = [p for name, p in switched.named_parameters() if ".policy." in name]
    loss = told(switched, groups).sum()
    switched.set_adapter("reference")
    try:
        loss.backward()
        lost = all(p.grad is None or not p.grad.any() for p in policy)
    except RuntimeError:
        lost = True
    assert lost

    lm = loaded(folders / "llama")
    batch = collate(groups)
    lm.token_logprobs(batch)[0].sum().backward()
    alone = {name: p.grad.clone() for name, p in learnt(lm.model).items() if p.grad is not None}
    lm.model.zero_grad()
    reference = frozen_copy(lm)
    loss = lm.token_logprobs(batch)[0].sum()
    with torch.no_grad():
        reference.token_logprobs(batch)
    loss.backward()
    assert len(alone) == len(learnt(lm.model))
    for name, parameter in learnt(lm.model).items():
        assert parameter.grad is not None
        assert alone[name].any()
        assert torch.equal(parameter.grad, alone[name])


def test_the_reference_of_an_adapter_that_goes_on_has_it(folders: Path, tmp_path: Path) -> None:
    """Reported elsewhere: the base alone was taken, so that the KL began far from 0."""
    path = saved(loaded(folders / "llama"), tmp_path / "sft")
    lm = load_model(ModelConfig(path=str(path)), AdapterConfig(kind="lora"))
    reference = reference_of(lm)
    groups = families.groups()
    batch = collate(groups)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        policy, ref = (m.token_logprobs(batch)[0] for m in (lm, reference))
        truth = told(theirs, groups)
        wrong = told(AutoModelForCausalLM.from_pretrained(folders / "llama", dtype=torch.float32), groups)
    assert torch.equal(policy, ref)
    assert (ref - truth).abs().max() < SLACK
    assert (wrong - truth).abs().max() > 0.1
    # It stays when the policy moves.
    stirred(lm)
    with torch.no_grad():
        for parameter in learnt(lm.model).values():
            parameter.add_(0.1)
        assert torch.equal(reference.token_logprobs(batch)[0], ref)
        assert not torch.equal(lm.token_logprobs(batch)[0], ref)


def bytes_of(*models: Any) -> int:
    """Of all tensors, each place in memory once."""
    tensors = [t for m in models for t in (*m.parameters(), *m.buffers())]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_roles_hold_one_base_that_never_moves(dtype: torch.dtype, folders: Path, tmp_path: Path) -> None:
    rewarded = scored(folders / "llama", tmp_path / "reward")
    lm = loaded(folders / "llama", dtype=dtype)
    base = lm.adapter.base  # type: ignore[union-attr]
    alone = bytes_of(base)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    assert {p.dtype for p in base.parameters()} == {dtype}
    assert {b.dtype for b in base.buffers() if b.is_floating_point()} == {torch.float32}
    assert {p.dtype for p in learnt(lm.model).values()} == {torch.float32}
    reference, critic = reference_of(lm), scalar_on(lm, seed=1)
    reward = build_reward_model({"path": str(rewarded)}, lm)
    assert reward.models == 0
    optimisers = [Optimiser(m.model, TrainConfig(), dtype) for m in (lm, critic)]
    models = [lm.model, reference.model, critic.model, reward.model]
    adapters = sum(bytes_of(m) for m in models) - 4 * alone
    assert bytes_of(*models) == alone + adapters
    assert adapters < alone
    batch = collate(families.groups())
    for m, optimiser in zip((lm, critic), optimisers, strict=True):
        own = {name: p.detach().clone() for name, p in learnt(m.model).items()}
        for _ in range(2):
            out = m.token_logprobs(batch)[0] if m is lm else m.values(batch)  # type: ignore[union-attr]
            optimiser.backward((out + 1).square().sum())
            optimiser.step(1e-2)
        assert not any(torch.equal(p, own[name]) for name, p in learnt(m.model).items())
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name])
        for model in (lm.model, reference.model):
            path = name if model is reference.model else adapted_name(lm.model, name)
            assert model.get_parameter(path).data_ptr() == parameter.data_ptr()
    count, line = bases({"policy": lm, "reference": reference, "critic": critic})
    assert count == 1
    assert "policy, reference and critic share one base" in (line or "")


def adapted_name(model: Any, name: str) -> str:
    """Where the base's parameter is in a tree with an adapter."""
    layer, _, leaf = name.rpartition(".")
    return f"{layer}.base_layer.{leaf}" if hasattr(model.get_submodule(layer), "base_layer") else name


def test_full_models_share_nothing(folders: Path) -> None:
    lm = load_model(ModelConfig(path=str(folders / "llama")))
    reference = reference_of(lm)
    assert bases({"policy": lm, "reference": reference}) == (2, None)
    shared = {p.data_ptr() for p in lm.model.parameters()} & {
        p.data_ptr() for p in reference.model.parameters()
    }
    assert not shared


def test_a_copy_s_kernels_are_not_checked_again(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("no compiled kernels")
    lm = loaded(folders / "llama")
    counts = fuse(lm.model)

    def refuse(_: Any) -> None:
        raise AssertionError("checked again")

    model = shared_copy(lm.model)
    bare = dict.fromkeys(fused.BUILDERS, lambda _: None)
    monkeypatch.setattr(fused, "BUILDERS", bare)
    assert fuse(model) == counts
    assert counts["norms"] == 7
    assert counts["gates"] == 3
    copied = model.model.layers[0]
    assert copied.forward.__self__ is copied


# --- sampling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_engine_draws_what_the_plain_sampler_draws(
    family: str, kind: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = loaded(folders / family, kind)
    calls: list[int] = []
    own = Lean.__call__
    monkeypatch.setattr(Lean, "__call__", lambda self, *a: calls.append(1) or own(self, *a))  # type: ignore[func-returns-value]
    config = SamplingConfig(max_new_tokens=8)
    drawn = [
        sampler.sample(lm, families.prompts(), 3, config, seed=0, end_tokens=[])
        for sampler in (TreeSampler(), PlainSampler())
    ]
    ours, plain = ([r for g in groups for r in g.responses] for groups in drawn)
    assert [r.tokens for r in ours] == [r.tokens for r in plain]
    for a, b in zip(ours, plain, strict=True):
        assert a.sampler_logps == pytest.approx(b.sampler_logps, abs=1e-4)
    # DoRA's layers are their own modules.
    assert bool(calls) == (kind == "lora" and library() is not None)


def test_a_lean_layer_with_an_adapter_is_the_layer(folders: Path) -> None:
    if library() is None:
        pytest.skip("no compiled kernels")
    for dtype in (torch.float32, torch.bfloat16):
        lm = loaded(folders / "llama", dtype=dtype)
        Optimiser(lm.model, TrainConfig(), dtype)
        trunk: Any = lm.trunk
        hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        named = {"position_embeddings": trunk.rotary_emb(hidden, torch.arange(5)[None])}
        with torch.no_grad():
            ours = trunk.layers[0](hidden, attention_mask=None, **named)
            lean = lean_of(trunk.layers[0])
            unfuse(lm.model)
            own = trunk.layers[0](hidden, attention_mask=None, **named)
        assert lean is not None
        assert all(part.lora is not None for part in lean.linears)
        assert (ours - own).abs().max() < (1e-5 if dtype == torch.float32 else 5e-2)


def test_the_compiled_stack_does_not_take_adapters(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.rollouts.stack.matrix_unit", lambda: True)
    monkeypatch.setattr("trimtab.rollouts.stack.DecodeStack", lambda *_: "made")
    bare = load_model(ModelConfig(path=str(folders / "llama")))
    lm = loaded(folders / "llama", dtype=torch.bfloat16)
    if lean_of(lm.trunk.layers[0]) is None:  # type: ignore[union-attr, index]
        pytest.skip("no compiled kernels")
    bare.cast(torch.bfloat16)
    blocks: Any = None
    assert decode_stack(bare, blocks) == "made"
    assert decode_stack(lm, blocks) is None
