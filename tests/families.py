"""Tiny random models of many architectures, for the tests of the forward pass and of sampling.

Weights are drawn wide (standard deviation 0.2): with the usual 0.02 such small models are next to uniform and
a wrong mask or position would move no log-probability beyond the tolerances.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from trimtab.groups import Group, Response
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import wrap

VOCAB = 97
WINDOW = 6
"""Sliding windows; shorter than every prompt with its response but the shortest."""
SPREAD = 0.2
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_WIDE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": SPREAD,
    **TOKENS,
}
_GQA = {**_WIDE, "num_key_value_heads": 2}
_GEMMA = {**_GQA, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": SPREAD,
    **TOKENS,
}
_OPT: dict[str, Any] = {**_WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": SPREAD}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_GQA),
    "qwen2": lambda: hf.Qwen2Config(**_GQA),
    "qwen3": lambda: hf.Qwen3Config(**_GQA, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**_GQA, sliding_window=WINDOW),
    "mixtral": lambda: hf.MixtralConfig(**_GQA, num_local_experts=4, sliding_window=WINDOW),
    "gemma2": lambda: hf.Gemma2Config(**_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": lambda: hf.Gemma3TextConfig(**_GEMMA, final_logit_softcapping=3.0),
    "neox": lambda: hf.GPTNeoXConfig(**_WIDE),
    "gpt2": lambda: hf.GPT2Config(**_GPT),
    "opt": lambda: hf.OPTConfig(**_OPT),
    "phi": lambda: hf.PhiConfig(**_WIDE),
    "phi3": lambda: hf.Phi3Config(**_GQA, sliding_window=WINDOW),
    "cohere": lambda: hf.CohereConfig(**_GQA, logit_scale=0.3),
    "granite": lambda: hf.GraniteConfig(**_GQA, logits_scaling=3.0, embedding_multiplier=2.0),
    "olmo2": lambda: hf.Olmo2Config(**_GQA),
    "gptj": lambda: hf.GPTJConfig(**_GPT, rotary_dim=4),
    "falcon": lambda: hf.FalconConfig(**_WIDE),
    "mamba": lambda: hf.MambaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        initializer_range=SPREAD,
        **TOKENS,
    ),
    # Chunked attention, its chunk wider than the probe of the layout check.
    "llama4": lambda: hf.Llama4TextConfig(
        **_GQA, head_dim=8, num_local_experts=2, attention_chunk_size=40, intermediate_size_mlp=64
    ),
    "bloom": lambda: hf.BloomConfig(**{**_GPT, "hidden_size": 32}),
    "deepseek": lambda: hf.DeepseekV3Config(
        **_WIDE,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    # Local layers whose window of 40 is wider than the probe of the layout check.
    "gptneo": lambda: hf.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=256,
        window_size=40,
        attention_types=[[["global", "local"], 1]],
        initializer_range=SPREAD,
        **TOKENS,
    ),
}

TREE = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "mixtral",
    "gemma2",
    "gemma3",
    "neox",
    "gpt2",
    "opt",
    "phi",
    "phi3",
    "cohere",
    "granite",
    "olmo2",
]
"""Families that take the tree layout and the tree engine."""
WINDOWED = ["mistral", "mixtral", "gemma2", "gemma3", "phi3"]
EAGER_ONLY = ["gemma2", "gptj", "bloom", "gptneo", "mamba"]
"""Where transformers refuses sdpa."""


def tiny(
    family: str, attention: str = "", *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LanguageModel:
    """A random model of the family; attention "" takes sdpa where there is one."""
    torch.manual_seed(seed)
    attention = attention or ("eager" if family in EAGER_ONLY else "sdpa")
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention)
    return wrap(model.to(dtype), None)


def tokens(count: int, draw: random.Random) -> list[int]:
    """Random ids that are no special tokens."""
    return [draw.randrange(3, VOCAB) for _ in range(count)]


def groups(seed: int = 1) -> list[Group]:
    """Unequal prompts and responses; one response is a single token, one group has a single response."""
    draw = random.Random(seed)

    def group(name: str, prompt: int, lengths: list[int]) -> Group:
        responses = [Response(tokens=tokens(n, draw)) for n in lengths]
        return Group(id=name, prompt_tokens=tokens(prompt, draw), responses=responses)

    return [group("a", 9, [7, 4, 11]), group("b", 3, [1, 5]), group("c", 14, [8])]


def prompts(lengths: tuple[int, ...] = (3, 9, 5, 20), seed: int = 2) -> list[Group]:
    """Tokenised prompts without responses."""
    draw = random.Random(seed)
    return [Group(id=f"p{i}", prompt_tokens=tokens(n, draw)) for i, n in enumerate(lengths)]


@torch.no_grad()
def direct_logprobs(lm: LanguageModel, given: list[Group], *, temperature: float = 1.0) -> torch.Tensor:
    """``[N, T]`` by one plain call of the model for each response, padded with 0: the truth."""
    rows = []
    for group in given:
        for response in group.responses:
            prompt, own = group.prompt_tokens or [], response.tokens or []
            ids = torch.tensor([prompt + own])
            logits = lm.model(input_ids=ids, use_cache=False).logits[0]
            logps = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(
                -1
            )
            rows.append(logps[len(prompt) - 1 : -1].gather(-1, torch.tensor(own)[:, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
