"""Sizes from configurations: each against the modules that transformers builds of it on the meta device."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

from trimtab.data.collate import in_each_layout
from trimtab.errors import InputError
from trimtab.models.layout import choose_layout, probe_groups
from trimtab.models.load import wrap
from trimtab.planning import models
from trimtab.planning.cards import families
from trimtab.planning.job import Model
from trimtab.planning.models import cards, find_model, find_reward_model, model_of, nearest, reward_model_of

hf.logging.set_verbosity_error()

# --- the oracle: what a model has, counted on its modules ---------------------------------------------------


def built(config: dict[str, Any], auto: Any = hf.AutoModelForCausalLM) -> Any:
    """The model of a configuration, without weights."""
    with torch.device("meta"):
        return auto.from_config(hf.AutoConfig.for_model(**copy.deepcopy(config)))


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder's layers."""
    count = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def numel(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def linear_modules(model: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear module but the head, by name."""
    head, found = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and name != "score":
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.weight.shape[0], module.weight.shape[1])
    return found


def counted(model: Any) -> dict[str, Any]:
    """What the planner says of it, from modules and parameters alone."""
    layers, modules = layers_of(model), linear_modules(model)
    parameters = dict(model.named_parameters())
    stacked = {n: p for n, p in parameters.items() if ".experts." in n}
    matrices = {n: p for n, p in stacked.items() if p.dim() == 3}
    routers = {n: p for n, p in parameters.items() if n.endswith((".gate.weight", ".router.weight"))}
    routers = {n: p for n, p in routers.items() if n.removesuffix(".weight") not in modules}
    config, head, table = (
        model.config.get_text_config(),
        model.get_output_embeddings(),
        model.get_input_embeddings(),
    )
    idle = 0.0
    if stacked:
        many = next(iter(matrices.values())).shape[0]
        idle = 1 - config.num_experts_per_tok / many
    linear = sum(i * o for i, o in modules.values()) + sum(
        p.numel() for p in (*matrices.values(), *routers.values())
    )
    positions = [p for n, p in parameters.items() if n.endswith(("wpe.weight", "embed_positions.weight"))]
    own = head is not None and head.weight is not table.weight
    normed = [n for n, _ in layers.named_modules() if n.endswith((".q_norm", ".q_layernorm", ".qk_norm"))]
    kinds = {type(m).__name__ for m in layers[0].children() if "Norm" in type(m).__name__}
    return {
        "parameters": sum(p.numel() for p in parameters.values()),
        "active": numel(model) - round(idle * sum(p.numel() for p in stacked.values())),
        "layers": len(layers),
        "width": config.hidden_size,
        "linear": linear,
        "active_linear": linear - round(idle * sum(p.numel() for p in matrices.values())),
        "linear_ends": sum(i + o for i, o in modules.values()),
        "linears": Counter((n.split(".")[-1], i, o) for n, (i, o) in modules.items()),
        "tensor": max(p.numel() for p in parameters.values()),
        "layer": max(numel(layer) for layer in layers),
        "vocabulary": table.weight.shape[0],
        "embedding": table.weight.numel() + sum(p.numel() for p in positions),
        "head": numel(head) if own else (head.bias.numel() if getattr(head, "bias", None) is not None else 0),
        "tied": not own,
        "norms": sum("Norm" in type(m).__name__ for m in layers[0].children()),
        "norm": "rms" if any("RMS" in kind or "TextRMS" in kind for kind in kinds) else "layer",
        "head_norms": int(bool(normed)),
        "windowed": windowed(config),
    }


def windowed(config: Any) -> int:
    """Layers whose cache slides, as transformers makes caches."""
    return sum("Sliding" in type(layer).__name__ for layer in hf.DynamicCache(config=config).layers)


def said(model: Model) -> dict[str, Any]:
    found = dataclasses.asdict(model)
    found["linears"] = Counter({(n, i, o): count for n, i, o, count in model.linears})
    return found


def agree(config: dict[str, Any]) -> Model:
    made = built(config)
    model, truth = model_of(config), counted(made)
    found = said(model)
    assert {key: found[key] for key in truth} == truth
    # What transformers writes of it, every field filled in, says the same.
    assert model_of(json.loads(made.config.to_json_string(use_diff=False))) == model
    assert model_of(json.loads(made.config.to_json_string())) == model
    return model


# --- odd configurations of every family ---------------------------------------------------------------------

FLAGS = (
    "attention_bias",
    "mlp_bias",
    "qkv_bias",
    "use_qkv_bias",
    "use_bias",
    "use_qk_norm",
    "qk_layernorm",
    "use_parallel_residual",
    "tie_word_embeddings",
    "use_sliding_window",
    "multi_query",
    "parallel_attn",
    "new_decoder_architecture",
    "bias",
    "lm_head_bias",
    "enable_bias",
)
OLDER = ("gpt2", "gptj", "gpt_bigcode", "bloom", "gpt_neo")
TIED_ANYWAY = ("gpt_oss",)


def drawn(family: str, seed: int) -> dict[str, Any]:
    """A small configuration whose every size is odd enough to be told from the others."""
    draw = random.Random(f"{family}{seed}")
    keys, groups, layers = draw.choice([1, 2, 3]), draw.choice([1, 2, 4]), draw.choice([2, 3, 5])
    heads = keys * groups
    width = heads * 2 * draw.choice([3, 5, 7])
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": draw.choice([97, 101, 131]),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": draw.choice([22, 34, 46]),
        "max_position_embeddings": draw.choice([64, 80]),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    names = {f.name for f in dataclasses.fields(hf.CONFIG_MAPPING[family])}
    config |= {flag: draw.random() < 0.5 for flag in FLAGS if flag in names}
    always = family == "ministral"  # transformers fails without
    if "head_dim" in names and "deepseek" not in family and (always or draw.random() < 0.7):
        config["head_dim"] = 2 * draw.choice([2, 4, 6])
    if "sliding_window" in names and draw.random() < 0.8:
        config |= {"sliding_window": 7, "max_window_layers": draw.choice([0, 1, 2])}
    if families.DEFAULTS[family].get("num_experts"):
        many = "n_routed_experts" if "deepseek" in family else "num_experts"
        many = "num_local_experts" if family in ("mixtral", "phimoe", "gpt_oss", "llama4_text") else many
        config |= {many: 6, "num_experts_per_tok": draw.choice([1, 2, 3]), "moe_intermediate_size": 18}
        config |= {
            "shared_expert_intermediate_size": 26,
            "mlp_only_layers": [0],
            "decoder_sparse_step": draw.choice([1, 2]),
        }
        config |= {"intermediate_size_mlp": 50, "interleave_moe_layer_step": draw.choice([1, 2])}
    if "deepseek" in family:
        config |= {"num_key_value_heads": heads, "kv_lora_rank": 9, "q_lora_rank": draw.choice([None, 11])}
        config |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 7, "n_shared_experts": 2}
        config |= {"first_k_dense_replace": draw.choice([0, 1, layers]), "n_group": 2, "topk_group": 1}
    if family in OLDER:
        config["n_inner"] = draw.choice([None, 38]) if family in ("gpt2", "gptj", "gpt_bigcode") else None
        config |= {"rotary_dim": 2, "attention_types": [[["global", "local"], 1], [["global"], layers - 2]]}
    if family in (*OLDER, "gpt_neox", "opt", "falcon"):
        del config["num_key_value_heads"]
    if family in (*OLDER, "opt", "falcon"):
        del config["intermediate_size"]
    if family == "opt":
        config |= {
            "ffn_dim": 34,
            "word_embed_proj_dim": draw.choice([width, 12]),
            "do_layer_norm_before": draw.random() < 0.5,
        }
    if family == "falcon":
        config |= {"num_kv_heads": keys, "num_ln_in_parallel_attn": draw.choice([None, 1, 2])}
        config["ffn_hidden_size"] = draw.choice([None, 38])
    return config


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_small_model_of_each_family_is_counted_exactly(family: str, seed: int) -> None:
    agree(drawn(family, seed))


def runnable(family: str) -> dict[str, Any]:
    """The same in sizes that kernels take."""
    config = drawn(family, 1)
    heads = config["num_attention_heads"]
    config |= {"hidden_size": 16 * heads, "initializer_range": 0.2, "init_std": 0.2}
    config |= {
        key: 16 for key in ("head_dim", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim") if key in config
    }
    for key in config:
        if "intermediate" in key or key in ("n_inner", "ffn_hidden_size", "qk_nope_head_dim", "q_lora_rank"):
            config[key] = 32
    if family == "opt":
        config["word_embed_proj_dim"] = 16 * heads
    if "sliding_window" in {f.name for f in dataclasses.fields(hf.CONFIG_MAPPING[family])}:
        config |= {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}
    return config | {"max_position_embeddings": 256}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_a_family_keeps_of_a_token_and_whether_its_trees_pack(family: str) -> None:
    torch.manual_seed(0)
    config = runnable(family)
    own = hf.AutoConfig.for_model(**copy.deepcopy(config))
    kernel = "eager" if family in ("gemma2", "gptj", "bloom", "gpt_neo", "gpt_oss") else "sdpa"
    lm = wrap(hf.AutoModelForCausalLM.from_config(own, attn_implementation=kernel), None)
    model = model_of(config)
    cache: Any = hf.DynamicCache(config=own)
    with torch.no_grad():
        lm.model(torch.arange(8)[None] + 3, use_cache=True, past_key_values=cache)
    kept = {layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in cache.layers}
    assert kept == {model.key + model.value}
    choose_layout(lm, in_each_layout(probe_groups(lm.vocab_size)), "auto")
    assert model.packed is (lm.layout == "packed")


def test_what_a_file_leaves_out_is_what_transformers_takes() -> None:
    """Every default in defaults.json is its configuration class's, and none that is read is left out."""
    read = {name for family in families.DEFAULTS.values() for name in family}
    first = {other: names[0] for names in families.ALIASES for other in names}
    assert set(families.DEFAULTS) == set(families.FAMILIES)
    for family, ours in families.DEFAULTS.items():
        theirs = {
            first.get(f.name, f.name): f.default
            for f in dataclasses.fields(hf.CONFIG_MAPPING[family])
            if f.default is not None and f.default is not False
        }
        theirs = {name: theirs[name] for name in theirs if name in read}
        if family == "bloom":
            theirs["max_position_embeddings"] = 2048  # ALiBi: it has none; what BLOOM was trained at
        assert {k: v for k, v in theirs.items() if k not in REQUIRED} == ours, family
    # Mistral's key heads are 8 where the file does not say, Llama's as many as its heads.
    sizes = {"hidden_size": 64, "num_hidden_layers": 2}
    assert model_of({"model_type": "mistral", **sizes}).kv_heads == 8
    assert model_of({"model_type": "llama", **sizes}).kv_heads == 32


REQUIRED = ("hidden_size", "num_hidden_layers")


# --- the cards ----------------------------------------------------------------------------------------------

PUBLISHED: dict[str, tuple[float, float]] = {
    # 1e9 parameters in all and that a token goes through, as the models' own pages and papers say.
    "openai-community/gpt2": (0.124, 0.124),
    "HuggingFaceTB/SmolLM2-135M": (0.135, 0.135),
    "HuggingFaceTB/SmolLM2-1.7B": (1.71, 1.71),
    "HuggingFaceTB/SmolLM3-3B": (3.08, 3.08),
    "EleutherAI/pythia-410m": (0.405334016, 0.405334016),
    "EleutherAI/pythia-1.4b": (1.414647808, 1.414647808),
    "EleutherAI/pythia-6.9b": (6.857302016, 6.857302016),
    "Qwen/Qwen2.5-0.5B": (0.49, 0.49),
    "Qwen/Qwen2.5-7B": (7.61, 7.61),
    "Qwen/Qwen2.5-72B": (72.7, 72.7),
    "Qwen/Qwen3-8B": (8.2, 8.2),
    "Qwen/Qwen3-30B-A3B": (30.5, 3.3),
    "Qwen/Qwen3-235B-A22B": (235, 22),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": (14.3, 2.7),
    "meta-llama/Llama-3.2-1B": (1.23, 1.23),
    "meta-llama/Llama-3.1-8B": (8.03, 8.03),
    "meta-llama/Llama-3.1-70B": (70.6, 70.6),
    "meta-llama/Llama-3.1-405B": (406, 406),
    "mistralai/Mixtral-8x7B-v0.1": (46.7, 12.9),
    "mistralai/Mixtral-8x22B-v0.1": (141, 39),
    "google/gemma-2-2b": (2.61, 2.61),
    "google/gemma-2-27b": (27.2, 27.2),
    "google/gemma-3-1b-it": (1.0, 1.0),
    "microsoft/Phi-3-mini-4k-instruct": (3.821079552, 3.821079552),
    "microsoft/phi-4": (14.7, 14.7),
    "allenai/OLMo-2-1124-7B": (7.3, 7.3),
    "allenai/OLMo-2-1124-13B": (13.7, 13.7),
    "openai/gpt-oss-20b": (20.9, 4.19),  # 3.61 without the input embedding's 0.58
    "openai/gpt-oss-120b": (116.8, 5.71),  # 5.13 without
    "deepseek-ai/DeepSeek-V3": (671, 37.5),  # 36.6 without the input embedding's 0.93
}


@pytest.mark.parametrize("name", cards())
def test_every_card_is_counted_exactly(name: str) -> None:
    model = agree(models._configurations()[name])
    assert cards()[name] == dataclasses.replace(model, name=name)


def test_the_cards_are_the_models_that_were_published() -> None:
    assert set(PUBLISHED) <= set(cards())
    for name, (total, active) in PUBLISHED.items():
        card = cards()[name]
        assert card.parameters == pytest.approx(total * 1e9, rel=0.01), name
        assert card.active == pytest.approx(active * 1e9, rel=0.02), name
    sizes = [card.parameters for card in cards().values()]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.13e9
    assert 405.8e9 < cards()["meta-llama/Llama-3.1-405B"].parameters < 405.9e9


def test_qwen3_by_hand() -> None:
    """Qwen3-0.6B, and what usual mistakes would give."""
    card = find_model("qwen3-0.6b", online=False)
    table = 151936 * 1024
    attention = 1024 * 2048 + 2 * 1024 * 1024 + 2048 * 1024  # 16 heads of 128, 8 of keys: not 1024 / 16 wide
    layer = attention + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
    assert card.parameters == table + 28 * layer + 1024 == 596_049_920
    assert card.parameters + table == 751_632_384  # a tied head counted again
    assert card.parameters + 28 * 2 * 1024 * 1024 == 654_770_176  # as many key heads as heads
    assert (card.query, card.key, card.value, card.head_width) == (2048, 1024, 1024, 128)
    assert (card.tied, card.head, card.embedding, card.tensor) == (True, 0, table, table)
    assert (card.layer, card.linear) == (layer, 28 * (attention + 3 * 1024 * 3072))
    assert card.linear_ends * 16 == 10_092_544  # a LoRA of rank 16
    assert (card.norms, card.head_norms, card.norm, card.gate, card.matrices) == (2, 1, "rms", "silu", 3)
    assert card.linears[0] == ("q_proj", 1024, 2048, 28)


def test_windows() -> None:
    """As the models' papers have them: all layers, every other, five of six, none."""
    found = {name: (card.window, card.windowed, card.layers) for name, card in cards().items()}
    assert found["mistralai/Mistral-7B-v0.1"] == (4096, 32, 32)
    assert found["mistralai/Mistral-7B-v0.3"] == (0, 0, 32)
    assert found["google/gemma-2-9b"] == (4096, 21, 42)
    assert found["google/gemma-3-1b-it"] == (512, 22, 26)
    assert found["openai/gpt-oss-20b"] == (128, 12, 24)
    assert found["Qwen/Qwen2.5-7B"] == (0, 0, 28)


def test_experts() -> None:
    """DeepSeek-V3: 61 layers, the first 3 dense; 8 of 256 experts and a shared one, each 2,048 wide."""
    card = cards()["deepseek-ai/DeepSeek-V3"]
    assert (card.experts, card.experts_used, card.inner) == (256, 8, (3 * 18432 + 58 * 9 * 2048) / 61)
    assert (card.key, card.value, card.head_width) == (512 + 64, 0, 192)
    one = 3 * 7168 * 2048
    assert card.parameters - card.active == 58 * 248 * one
    # The router too is multiplied by; stacked experts and routers take no adapter.
    assert card.linear - card.active_linear == 58 * 248 * one
    assert "gate_up_proj" not in {name for name, *_ in card.linears}
    assert card.tensor == 256 * 2 * 7168 * 2048


# --- models of scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gpt2", "phi", "opt", "mixtral", "gemma3_text", "gpt_neox"]
)
def test_a_reward_model_is_counted_exactly(family: str) -> None:
    config = drawn(family, 0) | ({"word_embed_proj_dim": 12} if family == "opt" else {})
    model = reward_model_of(model_of(config), 3)
    truth = counted(built({**config, "num_labels": 3}, hf.AutoModelForSequenceClassification))
    found = said(model)
    for key in ("parameters", "active", "linear", "tensor", "layer", "embedding"):
        assert found[key] == truth[key], key
    assert model.head == 3 * (12 if family == "opt" else model.width)


def test_a_reward_model_s_folder(tmp_path: Path) -> None:
    config = models._configurations()["Qwen/Qwen2.5-0.5B"]
    saved = {**config, "architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    model = find_reward_model(str(tmp_path), online=False)
    assert (model.head, model.parameters) == (2 * 896, 494_032_768 + 2 * 896)
    assert find_reward_model("qwen2.5-0.5b", online=False, outputs=1).head == 896
    with pytest.raises(InputError, match="0 outputs"):
        find_reward_model("qwen2.5-0.5b", online=False, outputs=0)


# --- by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "qwen/qwen3-0.6b", "qwen3-0.6b", "QWEN3-0.6B"])
def test_a_card_by_its_names(name: str) -> None:
    assert find_model(name, online=False) is not None
    assert find_model(name, online=False) == cards()["Qwen/Qwen3-0.6B"]


def test_short_names_are_of_one_card_each() -> None:
    short = [name.split("/")[1].lower() for name in cards()]
    assert len(set(short)) == len(short)
    assert not set(short) & {name.lower() for name in cards()}


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
        ("gemma-3-1b-pt", "google/gemma-3-1b-it"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_a_relative_of_a_card_says_so(name: str, card: str) -> None:
    assert find_model(name, online=False) == dataclasses.replace(cards()[card], name=f"{name} (as {card})")


def test_a_relative_is_not_meant_where_the_hub_knows_better(hub: Hub) -> None:
    import huggingface_hub.errors as errors

    hub.error = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    with pytest.raises(InputError, match="no such model"):
        find_model("Qwen/Qwen2.5-7B-Instruct")
    hub.error = errors.GatedRepoError.__new__(errors.GatedRepoError)
    assert find_model("Qwen/Qwen2.5-7B-Instruct").layers == 28


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps(drawn("llama", 0)))
    assert find_model(str(base)).parameters == model_of(drawn("llama", 0)).parameters
    assert find_model(str(base / "config.json")).layers == model_of(drawn("llama", 0)).layers
    for where in (str(base), "../base", "Qwen/Qwen3-0.6B"):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": where}))
        found = find_model(str(adapter), online=False)
        assert found.name.startswith(f"{adapter} (an adapter of ")
        assert (found.family == "llama") is (where != "Qwen/Qwen3-0.6B")
    monkeypatch.chdir(tmp_path)
    # A folder is meant before a card, as where a model is loaded.
    (tmp_path / "qwen3-0.6b").mkdir()
    (tmp_path / "qwen3-0.6b" / "config.json").write_text(json.dumps(drawn("gpt2", 0)))
    assert find_model("qwen3-0.6b").family == "gpt2"


def test_the_text_part_of_a_model_of_images(tmp_path: Path) -> None:
    """Gemma 3 4B's file leaves most sizes out; its table has 262,208 rows, 64 more than there are words."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    text |= {"num_hidden_layers": 34, "sliding_window": 1024}
    model = model_of(
        {"model_type": "gemma3", "text_config": text, "vision_config": {}}, "google/gemma-3-4b-it"
    )
    assert (model.name, model.parameters) == ("google/gemma-3-4b-it (its text model)", 3_880_263_168)
    assert model.windowed == 29


class Hub:
    """In the hub's place."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.folder, self.error = folder, error

    def __call__(self, name: str, file: str, **options: Any) -> str:
        self.asked.append((name, file, options))
        if self.error is not None:
            raise self.error
        return str(self.folder / file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub
    import huggingface_hub.constants

    (tmp_path / "config.json").write_text(json.dumps(drawn("qwen3", 0)))
    made = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "hub_answers", lambda: True)
    return made


def test_the_hub_is_asked_for_one_file(hub: Hub) -> None:
    assert find_model("someone/model", revision="v2").parameters == model_of(drawn("qwen3", 0)).parameters
    ((name, file, options),) = hub.asked
    assert (name, file, options["revision"]) == ("someone/model", "config.json", "v2")
    assert options["local_files_only"] is False
    assert options["etag_timeout"] <= 10
    find_model("qwen3-0.6b")
    assert len(hub.asked) == 1  # not for a card


def test_offline_only_the_cache_is_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    find_model("someone/model", online=False)
    monkeypatch.setattr(models, "hub_answers", lambda: False)
    find_model("someone/model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models, "hub_answers", lambda: pytest.fail("the hub was asked"))
    find_model("someone/model")
    assert [options["local_files_only"] for *_, options in hub.asked] == [True] * 3


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("RepositoryNotFoundError", "no such model"),
        ("GatedRepoError", "licence"),
        ("RevisionNotFoundError", "no such revision"),
        ("RemoteEntryNotFoundError", "no config.json"),
        ("OSError", "gave no answer"),
    ],
)
def test_why_the_hub_gives_nothing(hub: Hub, kind: str, says: str) -> None:
    import huggingface_hub.errors as errors

    made = getattr(errors, kind, OSError)
    hub.error = made.__new__(made)
    with pytest.raises(InputError, match=says) as caught:
        find_model("someone/qwen3-0.6")
    assert "Qwen/Qwen3-0.6B" in str(caught.value)


def test_nothing_heavy_is_imported_for_a_card() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from trimtab.planning.models import find_model\n"
        "assert find_model('qwen3-0.6b').layers == 28\n"
        "took = time.perf_counter() - start\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'huggingface_hub') if m in sys.modules], took)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, _, took = done.stdout.strip().rpartition(" ")
    assert loaded == "[]"
    assert float(took) < 1.0  # 0.06 on a quiet machine


# --- bad input ----------------------------------------------------------------------------------------------

GOOD = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": None}, "no model_type"),
        ({"model_type": "qwen33"}, "nearest are qwen3"),
        (
            {"model_type": "wondernet", "auto_map": {"AutoConfig": "x.Y"}},
            "code that comes with it is not run",
        ),
        ({"model_type": "bert"}, "no causal language model"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder and a decoder"),
        ({"model_type": "gemma3"}, "no text_config"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": -48}, "hidden_size is -48"),
        ({"hidden_size": 48.5}, "hidden_size is 48.5"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_size": 50}, "hidden_size 50 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok is 9, but"),
        ({"model_type": "deepseek_v2"}, "num_experts_per_tok is missing"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types names 1 layers of 2"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window is -1"),
        ({"model_type": ["llama"]}, "no model_type"),
    ],
)
def test_a_configuration_that_cannot_be_is_one_line(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        model_of(GOOD | change, "my/model")
    assert says in str(caught.value)
    assert str(caught.value).startswith("my/model")
    assert model_of(GOOD).kv_heads == 2


def test_names_that_are_nothing(tmp_path: Path) -> None:
    for name, says in {
        "": "no model is named",
        "./nowhere": "no such folder",
        "a/b/c": "no such folder",
        str(tmp_path): "neither config.json nor adapter_config.json",
        "qwen3-0.6": "qwen3-0.6b",
        "Qwen/Qwen3-06B": "Qwen/Qwen3-0.6B",
    }.items():
        with pytest.raises(InputError, match=says):
            find_model(name, online=False)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="not a table"):
        find_model(str(tmp_path))


def test_nearest() -> None:
    assert nearest("grop", ["grpo", "gspo", "dpo"]).startswith("grpo")
    assert nearest("H100", ["h100", "A100"]).startswith("h100")
    assert nearest("b", ["a"]) == "a"
    assert nearest("x", []) == ""
    assert nearest("dp", ["dpo"]) == "dpo"
