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
from trimtab.models.adapter_files import HEAD
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_roles_hold_one_base_that_never_moves(dtype: torch.dtype, folders: Path, tmp_path: Path) -> None:
    rewarded = scored(folders / "llama", tmp_path / "reward")
    lm = loaded(folders / "llama", dtype=dtype)
    base = lm.adapter.base  # type: ignore[union-attr]
    places = {t.data_ptr() for t in (*base.parameters(), *base.buffers())}
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    assert {p.dtype for p in base.parameters()} == {dtype}
    assert {b.dtype for b in base.buffers() if b.is_floating_point()} == {torch.float32}
    assert {p.dtype for p in learnt(lm.model).values()} == {torch.float32}
    reference, critic = reference_of(lm), scalar_on(lm, seed=1)
    reward = build_reward_model({"path": str(rewarded)}, lm)
    assert reward.models == 0
    optimisers = [Optimiser(m.model, TrainConfig(), dtype) for m in (lm, critic)]
    models = [lm.model, reference.model, critic.model, reward.model]
    for model in models:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert (tensor.data_ptr() in places) != ("lora_" in name or name.startswith("score.")), name
    batch = collate(families.groups())
    for m, optimiser in zip((lm, critic), optimisers, strict=True):
        own = {name: p.detach().clone() for name, p in learnt(m.model).items()}
        # Three: a head of zeros lets nothing through at first, then a second factor of zeros does not.
        for _ in range(3):
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
        assert (ours - own).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2) * own.abs().max()


# --- files --------------------------------------------------------------------------------------------------


def scored(base: Path, folder: Path, kind: str = "lora", seed: int = 0) -> Path:
    """A reward model's adapter."""
    config = ModelConfig(path=str(base), dtype="float32")
    made = load_scalar_model(config, AdapterConfig(kind=kind, rank=4), new_head="normal", seed=seed)  # type: ignore[arg-type]
    return saved(stirred(made), folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saved_loads_here(family: str, kind: str, folders: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders / family, dtype=torch.float32)
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, lora_dropout=0.1, **KINDS[kind]
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    groups = families.groups()
    truth = told(theirs, groups).detach()
    on = load_model(ModelConfig(path=str(tmp_path / "theirs")), AdapterConfig(kind=kind))  # type: ignore[arg-type]
    assert on.adapter is not None
    assert (on.adapter.config.rank, on.adapter.config.alpha) == (3, 5.0)
    merged = load_model(ModelConfig(path=str(tmp_path / "theirs")))
    assert merged.adapter is None
    assert "merged" in merged.notes[0]
    with torch.no_grad():
        for lm in (on, merged):
            assert (lm.token_logprobs(collate(groups))[0] - truth).abs().max() < SLACK


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_saved_loads_with_peft_alone(kind: str, folders: Path, tmp_path: Path) -> None:
    lm = loaded(folders / "llama", kind)
    path = saved(lm, tmp_path / "ours")
    groups = families.groups()
    with torch.no_grad():
        ours = lm.token_logprobs(collate(groups))[0]
    base = AutoModelForCausalLM.from_pretrained(folders / "llama", dtype=torch.float32)
    both = [
        peft.PeftModel.from_pretrained(base, path),
        peft.AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32),
    ]
    for theirs in both:
        with torch.no_grad():
            assert (told(theirs.eval(), groups) - ours).abs().max() < SLACK
    values = json.loads((path / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(folders / "llama")
    assert values["peft_version"] == peft.__version__
    assert (path / "tokenizer_config.json").is_file()
    # What PEFT itself would have written, name for name.
    both[0].save_pretrained(tmp_path / "theirs")
    named = [load_file(f / "adapter_model.safetensors").keys() for f in (path, tmp_path / "theirs")]
    assert named[0] == named[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_adapter_goes_both_ways(kind: str, folders: Path, tmp_path: Path) -> None:
    path = scored(folders / "llama", tmp_path / "ours", kind)
    rm = load_scalar_model(ModelConfig(path=str(path)))
    groups = families.groups()
    batch = collate(groups)
    with torch.no_grad():
        ours = rm.scores(batch)[:, 0]
        theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=torch.float32
        ).eval()
        ids = [[*(g.prompt_tokens or []), *(r.tokens or [])] for g in groups for r in g.responses]
        truth = torch.cat([theirs(input_ids=torch.tensor([row])).logits[0] for row in ids])
    assert (ours - truth).abs().max() < SLACK
    assert ours.std() > 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    critic = load_scalar_model(ModelConfig(path=str(tmp_path / "theirs")), AdapterConfig(kind=kind))  # type: ignore[arg-type]
    with torch.no_grad():
        assert (critic.scores(batch)[:, 0] - truth).abs().max() < SLACK
    assert {name.rpartition(".lora_")[0] == "" for name in learnt(critic.model)} == {True, False}


def test_the_head_learns_in_fp32_over_a_base_in_bf16(folders: Path, tmp_path: Path) -> None:
    path = scored(folders / "llama", tmp_path / "ours")
    head = load_file(path / "adapter_model.safetensors")["base_model.model.score.weight"]
    config = ModelConfig(path=str(path))
    rm = load_scalar_model(config, AdapterConfig(kind="lora"), dtype=torch.bfloat16)
    assert torch.equal(rm.head.weight, head)
    assert rm.dtype == torch.bfloat16


def test_a_reward_model_on_the_policys_base(folders: Path, tmp_path: Path) -> None:
    """The same scores as with a base of its own; another dtype, or another base, is a model of its own."""
    path = scored(folders / "llama", tmp_path / "reward")
    lm = loaded(folders / "llama")
    groups = [Group(id="g", prompt="a b", responses=[Response(text="c d"), Response(text="e")])]

    def of(scorer: RewardModel) -> list[float]:
        return [float(value[""]) for value in scorer.score(groups)[0]]  # type: ignore[index, call-overload]

    shared, own = build_reward_model({"path": str(path)}, lm), build_reward_model({"path": str(path)})
    assert (shared.models, own.models) == (0, 1)
    assert of(shared) == pytest.approx(of(own), abs=1e-5)
    assert shared.scalar is not None
    assert "on the policy's base" in shared.notes[0]
    apart = build_reward_model({"path": str(path), "dtype": "bfloat16"}, lm)
    assert apart.models == 1
    assert "base of its own" in apart.notes[0]
    elsewhere = scored(folders / "qwen3", tmp_path / "elsewhere")
    assert build_reward_model({"path": str(elsewhere)}, lm).models == 1
    assert build_reward_model(
        {"path": str(path)}, load_model(ModelConfig(path=str(folders / "llama")))
    ).models


def test_an_adapters_base_is_found_from_its_own_folder(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(loaded(folders / "llama"), tmp_path / "adapter")
    shutil.copytree(folders / "llama", tmp_path / "base")
    edit(path, base_model_name_or_path="../base")
    lm = load_model(ModelConfig(path=str(path)), AdapterConfig(kind="lora"))
    assert lm.adapter is not None
    assert lm.adapter.name == str(tmp_path / "base")
    monkeypatch.chdir(folders)
    edit(path, base_model_name_or_path="llama")
    assert load_model(ModelConfig(path=str(path)), AdapterConfig(kind="lora")).adapter.name == "llama"  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_export_merges_exactly(kind: str, folders: Path, tmp_path: Path) -> None:
    lm = loaded(folders / "llama", kind)
    path = saved(lm, tmp_path / "adapter")
    assert run(["export", str(path), str(tmp_path / "new" / "whole")]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "whole")
    ids = torch.tensor([families.tokens(40, random.Random(0))])
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits for m in (lm.model, whole))
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
    assert not hasattr(whole, "peft_config")
    assert whole.dtype == torch.float32
    # And as a model like any other.
    assert load_model(ModelConfig(path=str(tmp_path / "new" / "whole"))).tokenizer.eos_token_id == 2


def test_export_of_scores_of_a_whole_model_and_to_bf16(folders: Path, tmp_path: Path) -> None:
    path = scored(folders / "llama", tmp_path / "adapter")
    assert run(["export", str(path), str(tmp_path / "rm"), "--dtype", "bfloat16"]) == 0
    rm = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert rm.dtype == torch.bfloat16
    assert rm.config.num_labels == 1
    (tmp_path / "empty").mkdir()
    assert run(["export", str(folders / "gemma2"), str(tmp_path / "empty")]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (folders / "gemma2", tmp_path / "empty"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_export_refuses(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    base = str(folders / "llama")
    for arguments, said in (
        ([base, base], "already holds"),
        ([base, str(tmp_path / "file")], "already holds"),
        ([base, str(tmp_path / "file" / "below")], "cannot write"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "out")], "no such folder"),
        ([str(tmp_path), str(tmp_path / "out")], "no config.json"),
        ([base, str(tmp_path / "out"), "--dtype", "int4"], "invalid choice"),
    ):
        assert run(["export", *arguments]) == 2
        line = capsys.readouterr().err
        assert said in line
        assert line.count("\n") == 1
        assert not (tmp_path / "out").exists()


# --- what cannot be -----------------------------------------------------------------------------------------


def edit(path: Path, **changed: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def lose(path: Path, part: str = "", more: dict[str, torch.Tensor] | None = None) -> None:
    """Write the weights again without those that have ``part`` in their names, and with ``more``."""
    tensors = load_file(path / "adapter_model.safetensors")
    kept = {name: t for name, t in tensors.items() if not part or part not in name}
    save_file(kept | (more or {}), path / "adapter_model.safetensors")


def spoil(path: Path) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path / "adapter_model.safetensors")


def pickled(path: Path) -> None:
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (pickled, "pickles are not loaded"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"\x08" + bytes(20)), "cannot be read"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "adapter_config.json").write_text("[1]"), "not a table"),
        (lambda p: edit(p, base_model_name_or_path=None), "names no base"),
        (lambda p: edit(p, base_model_name_or_path="/no/where"), "no base at /no/where"),
        (lambda p: edit(p, base_model_name_or_path=str(p)), "itself an adapter"),
        (lambda p: edit(p, peft_type="IA3"), "are known here"),
        (lambda p: edit(p, modules_to_save=["embed_tokens"]), "modules_to_save"),
        (lambda p: edit(p, init_lora_weights="pissa_niter_4"), "init_lora_weights"),
        (lambda p: edit(p, bias="all"), "bias"),
        (lambda p: edit(p, lora_bias=True), "lora_bias"),
        (lambda p: edit(p, trainable_token_indices=[1]), "trainable_token_indices"),
        (lambda p: edit(p, a_new_kind={"x": 1}), "a_new_kind"),
        (lambda p: edit(p, lora_alpha=0), "lora_alpha"),
        (lambda p: edit(p, lora_alpha=float("nan")), "lora_alpha"),
        (lambda p: edit(p, target_modules=[1, "a"]), "target_modules"),
        (lambda p: lose(p, more={f"{HEAD}bias": torch.ones(1)}), "no score head as a whole"),
        (lambda p: lose(p, more={f"{HEAD}weight": torch.tensor(1.0)}), "no score head as a whole"),
        (lambda p: spoil(p), "not finite"),
        (lambda p: edit(p, r=2), "rank"),
        (lambda p: edit(p, r=10**9), "rank 1000000000"),
        (lambda p: edit(p, r="4"), "r = "),
        (lambda p: edit(p, rank_pattern=[1]), "rank_pattern"),
        (lambda p: edit(p, target_modules=["nothing"]), "names no linear layer"),
        (lambda p: edit(p, target_modules="*("), "names no linear layer"),
        (lambda p: edit(p, target_modules=["q_proj", "embed_tokens"]), "embed_tokens"),
        (lambda p: lose(p, "layers.1.mlp.up_proj.lora_A"), "no weights for 1 of"),
        (
            lambda p: lose(p, more={"base_model.model.model.layers.9.x.lora_A.weight": torch.ones(4, 4)}),
            "no place",
        ),
    ],
)
def test_a_damaged_adapter_is_one_line(damage: Any, said: str, folders: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    shutil.copytree(made_once(folders), path)
    damage(path)
    for options in (None, AdapterConfig(kind="lora")):
        with pytest.raises(InputError) as caught:
            load_model(ModelConfig(path=str(path)), options)
        assert said in str(caught.value)
        assert str(caught.value).startswith("model.path: ")
        assert "\n" not in str(caught.value)


def made_once(folders: Path) -> Path:
    """A sound adapter on the llama base; not to be changed."""
    if not (folders / "adapter").exists():
        saved(loaded(folders / "llama"), folders / "adapter")
    return folders / "adapter"


def test_an_adapter_of_another_architecture(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(made_once(folders), tmp_path / "a")
    config = families.CONFIGS["llama"]()
    config.intermediate_size = 48
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrow")
    tiny.tokenizer().save_pretrained(tmp_path / "narrow")
    for base, said in ((folders / "gpt2", "names no linear layer"), (tmp_path / "narrow", "another base")):
        edit(tmp_path / "a", base_model_name_or_path=str(base))
        with pytest.raises(InputError, match=said):
            load_model(ModelConfig(path=str(tmp_path / "a")))


def test_a_reward_adapter_is_no_policy_and_a_policy_gives_no_scores(folders: Path, tmp_path: Path) -> None:
    reward = scored(folders / "llama", tmp_path / "reward")
    with pytest.raises(InputError, match="reward model's adapter"):
        load_model(ModelConfig(path=str(reward)))
    with pytest.raises(InputError, match="no reward head"):
        load_scalar_model(ModelConfig(path=str(made_once(folders))))
    with pytest.raises(InputError, match="no weights for score"):
        build_reward_model({"path": str(made_once(folders))})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 8}, "adapter.rank = 8"),
        ({"alpha": 1.0}, "adapter.alpha = 1.0"),
        ({"kind": "dora"}, "adapter.kind = 'dora'"),
        ({"targets": ["q_proj"]}, "adapter.targets"),
    ],
)
def test_other_options_than_the_adapters_that_goes_on(options: Any, said: str, folders: Path) -> None:
    path = made_once(folders)
    on = load_model(ModelConfig(path=str(path)), AdapterConfig(kind="lora", rank=4))
    settled = on.adapter.config  # type: ignore[union-attr]
    # A run that is begun again from its own config.toml gives every option.
    load_model(ModelConfig(path=str(path)), AdapterConfig(**settled.model_dump()))
    with pytest.raises(InputError) as caught:
        load_model(ModelConfig(path=str(path)), AdapterConfig(**{"kind": "lora", **options}))
    assert str(caught.value).startswith(said)
    assert "trimtab export" in str(caught.value)


@pytest.mark.parametrize("targets", [["nothing"], ["q_proj", "nothing"], ["embed_tokens"], ["norm"]])
def test_targets_that_are_no_linear_layers(targets: list[str], folders: Path) -> None:
    config = ModelConfig(path=str(folders / "llama"))
    with pytest.raises(InputError, match=r"adapter\.targets: .*(nothing|embed_tokens|norm)"):
        load_model(config, AdapterConfig(kind="lora", targets=targets))


@pytest.mark.parametrize("option", ["rank = 8", "alpha = 1.0", 'targets = ["q_proj"]', 'quantise = "nf4"'])
def test_an_option_without_an_adapter(option: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(option)
    with pytest.raises(InputError, match='has no effect with kind = "none"'):
        load_config(AdapterConfig, tmp_path / "a.toml")
