"""What the tests of spread weights build, in each process: a tiny model, groups, and a few steps on them."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import LlamaForCausalLM

from trimtab.groups import Group, Response
from trimtab.methods.shared.setup import settle_layout
from trimtab.models.adapters import AdapterConfig
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import ModelConfig, load_model
from trimtab.models.shards import whole
from trimtab.objectives.reduce import reduce_tokens
from trimtab.parallel.options import ParallelConfig
from trimtab.parallel.world import world
from trimtab.spread.deal import Sums, global_count, parts
from trimtab.spread.shard import Spread
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def save(folder: Path, **more: Any) -> Path:
    """The tiny model, its configuration changed."""
    torch.manual_seed(1)
    config = tiny.llama_config(0.3)
    for name, value in more.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


SIZES = ((16, (4, 4)), (7, (3, 3)), (9, (3, 1)))
"""Tokens of prompts and responses: 24, 13 and 13 in all, so that one process has one micro-batch of 24 and
the other two.
"""


def groups(seed: int = 0) -> list[Group]:
    """Of these sizes, of random tokens."""
    draw = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(6, 60) for _ in range(n)]

    return [
        Group(id=str(i), prompt_tokens=tokens(n), responses=[Response(tokens=tokens(k)) for k in own])
        for i, (n, own) in enumerate(SIZES)
    ]


def holder(dtype: str = "float64", **options: Any) -> Spread | None:
    """What spreads; None in a world of one, whose numbers the others are compared with."""
    if world().alone:
        return None
    return Spread(ParallelConfig(weights="shard", **options), DTYPES[dtype], "cpu")


def load(
    path: Path,
    *,
    dtype: str = "float64",
    adapter: str = "none",
    layout: str = "auto",
    **options: Any,
) -> LanguageModel:
    """The model as a run on these processes has it."""
    config = ModelConfig(path=str(path), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    lora = AdapterConfig(kind=adapter, rank=2) if adapter != "none" else AdapterConfig()  # type: ignore[arg-type]
    lm = load_model(config, lora, dtype=DTYPES[dtype], holder=holder(dtype, **options))
    settle_layout(lm, layout)
    return lm


def optimiser(lm: LanguageModel, dtype: str = "float64", **changed: Any) -> Optimiser:
    """Of a run that computes in ``dtype``."""
    return Optimiser(lm.model, TrainConfig(**{"lr": 0.01, "grad_clip": 0.5, **changed}), DTYPES[dtype])


def step(lm: LanguageModel, own: Optimiser, batch: list[Group]) -> tuple[float, float]:
    """One step on the mean loss of the batch's tokens; the loss and the gradient's norm."""
    max_tokens = 40 if lm.layout == "plain" else 24
    count, sums = global_count(batch, "token_mean"), Sums()
    # Else nothing would be seen of what a process does that has fewer of them.
    idle = sum(p.idle for p in parts(lm, batch, max_tokens))
    assert not lm.spread or sum(world().gather(idle)) > 0
    for part in parts(lm, batch, max_tokens):
        logps_NT, _ = lm.token_logprobs(part.batch)
        loss = reduce_tokens(-logps_NT, part.batch.mask_NT, count, "token_mean")
        sums.backward(own, loss, part)
    loss, _ = sums.total(count)
    return loss, own.step(0.01)


def weights(own: Optimiser) -> dict[str, list[float]]:
    """The masters, whole; collective."""
    return {name: whole(m.detach()).double().flatten().tolist() for name, m in sorted(own.masters.items())}


def trained(lm: LanguageModel, steps: int = 4, **changed: Any) -> dict[str, Any]:
    """Losses, norms and the weights that come of a few steps."""
    own, batch = optimiser(lm, **changed), groups()
    found = [step(lm, own, copy.deepcopy(batch)) for _ in range(steps)]
    return {"steps": found, "weights": weights(own)}


def gap(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest difference between two of :func:`trained`."""
    worst = 0.0
    for a, b in zip(ours["steps"], theirs["steps"], strict=True):
        worst = max(worst, *(abs(x - y) for x, y in zip(a, b, strict=True)))
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, row in ours["weights"].items():
        worst = max(worst, *(abs(x - y) for x, y in zip(row, theirs["weights"][name], strict=True)))
    return worst


def load_plain(path: Path, dtype: str = "float64", adapter: str = "none") -> LanguageModel:
    """The model whole in this process."""
    config = ModelConfig(path=str(path), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    lora = AdapterConfig(kind=adapter, rank=2) if adapter != "none" else AdapterConfig()  # type: ignore[arg-type]
    return load_model(config, lora)
