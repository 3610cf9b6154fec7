"""The quickstart: a world, a model from random weights, SFT, DPO and GRPO, and what each is worth.

DPO learns from what people would label in practice: two answers of the SFT model to each article, and a
simulated annotator's noisy choice. GRPO answers the same articles itself and sees the gold score.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from trimtab.config import load_config
from trimtab.data.chat import end_tokens
from trimtab.data.render import tokenise
from trimtab.data.sources import SourceConfig
from trimtab.errors import InputError
from trimtab.models.layout import probe_groups
from trimtab.models.load import ModelConfig, load_model
from trimtab.newsroom.annotators import compare
from trimtab.newsroom.files import write_world
from trimtab.newsroom.gold import score
from trimtab.newsroom.model import new_model
from trimtab.newsroom.tokenizer import build_tokenizer
from trimtab.rollouts.engine import choose_sampler
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.studies.compare import StudyConfig, run_study

FILE = Path(__file__).with_name("quickstart.toml")


def run_quickstart(
    out: str = "runs/quickstart",
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
    *,
    resume: bool = False,
) -> tuple[StudyConfig, dict[str, Any]]:
    """Make the world in ``out/world``, then run the study of ``quickstart.toml`` in ``out``.

    ``resume`` goes on with an interrupted quickstart. Returns (configuration, summary). Raises InputError
    when ``out`` already holds a study and ``resume`` is False.
    """
    folder = Path(out)
    if (folder / "study.toml").exists() and not resume:
        raise InputError(f"{out} already holds a study; give another --out, or --resume to go on with it")
    given = {"out": out, "seed": seed, "resume": resume, **(overrides or {})}
    config = load_config(StudyConfig, FILE, given)
    world = folder / "world"
    try:
        write_world(world, seed=seed, demonstrations=16000, pairs=0, prompts=3000, heldout=300)
    except OSError as error:
        raise InputError(f"{out}: cannot write there: {error.strerror}") from None
    tokenizer = build_tokenizer()
    new_model(len(tokenizer), seed).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    def before_stage(name: str) -> dict[str, float]:
        if name != "dpo":
            return {}
        return write_annotated_pairs(folder / "sft" / "model", world, seed)

    return config, run_study(config, before_stage)


def write_annotated_pairs(model: Path, world: Path, seed: int) -> dict[str, float]:
    """Two sampled answers to every prompt and an annotator's choice → ``world/annotated.jsonl``.

    Pairs of equal answers are left out. Returns the seconds and the tokens that it took.
    """
    began = time.perf_counter()
    lm = load_model(ModelConfig(path=str(model), dtype="float32"))
    groups, _ = SourceConfig(path=str(world / "prompts.jsonl")).read()
    groups, _ = tokenise(groups, lm.tokenizer)
    sampling = SamplingConfig(max_new_tokens=48)
    sampler, _ = choose_sampler(lm, sampling, probe_groups(lm.vocab_size))
    ends = end_tokens(lm.tokenizer)
    answered = sampler.sample(lm, groups, 2, sampling, seed=seed, step=-1, end_tokens=ends)
    kept, golds = [], []
    for group in answered:
        first, second = (str(r.text) for r in group.responses)
        if first.strip() and second.strip() and first != second:
            kept.append((str(group.prompt), first, second))
            facts = group.columns["facts"]
            golds.append((score("", first, facts=facts), score("", second, facts=facts)))
    choices = compare(golds, random.Random(f"annotators {seed}")).prefers_first
    rows = [
        {"prompt": prompt, "chosen": a if first else b, "rejected": b if first else a}
        for (prompt, a, b), first in zip(kept, choices, strict=True)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (world / "annotated.jsonl").write_text(text, encoding="utf-8")
    tokens = sum(len(r.tokens or ()) for group in answered for r in group.responses)
    return {"wall_s": time.perf_counter() - began, "generated_tokens": tokens}
