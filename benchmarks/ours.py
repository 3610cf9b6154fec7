"""Our side as a worker: ``python -m benchmarks.ours NAME MODEL_DIR DATA_FILE [VARIANT]``.

What is timed is ``trimtab.methods.NAME.train`` as it ships, from the files that a user would give it: the
evaluation callback, called once after every step (PPO: after the last step on a rollout), holds the loop up
until the next request. A timed step is whole turns of the loop, logging included.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import settings
from benchmarks.protocol import Channel, versions
from trimtab.data.convert import as_pairs
from trimtab.data.render import tokenise
from trimtab.data.sources import SourceConfig
from trimtab.groups import Group
from trimtab.methods import dpo, grpo, ppo
from trimtab.models.language_model import LanguageModel

Data = dict[str, list[Any]]
BeforeStep = Callable[[LanguageModel, int], None]
ENDLESS = 1_000_000


class StepOnRequest:
    """The evaluation callback: one turn of the loop per request.

    ``before_step(policy, steps done)`` is work that belongs to a step and that the loop does elsewhere; it is
    timed with the step.
    """

    def __init__(self, channel: Channel, before_step: BeforeStep | None = None) -> None:
        self.channel = channel
        self.before_step = before_step

    def __call__(self, lm: LanguageModel, heldout: list[Group], step: int) -> dict[str, float]:
        """Report the step that ended, if any, and wait for the next request."""
        if step == 0:
            facts = {"computes_in": str(lm.dtype), "layout": lm.layout}
            self.channel.ready(threads=torch.get_num_threads(), **versions("torch", "transformers"), **facts)
        else:
            self.channel.done()
        if not self.channel.wait():
            raise SystemExit(0)
        if self.before_step is not None:
            self.before_step(lm, step)
        return {}


def even_share(prompt: str, response: str) -> float:
    """The common reward, in the form that a configuration names."""
    return settings.reward(response)


def write_rows(rows: list[dict[str, str]], file: Path) -> list[dict[str, Any]]:
    """Write a source file; what ``data.sources`` is given for it."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(file)}]


def shared_sections(model_dir: str, sources: list[dict[str, Any]], groups_per_step: int) -> dict[str, Any]:
    """The configuration that all methods have in common; what is not named stays at its default."""
    return {
        "model": {"path": model_dir, "dtype": "bfloat16"},
        "data": {"sources": sources},
        "train": {
            "steps": ENDLESS,
            "batch_groups": groups_per_step,
            "lr": settings.LEARNING_RATE,
            "schedule": "constant",
            "eval_every": 1,
            "seed": settings.SEED,
        },
        "run": {"out": "run"},
    }


def run_grpo(model_dir: str, data: Data, channel: Channel) -> None:
    """GRPO until told to stop."""
    rows = [{"prompt": settings.to_text(ids)} for ids in data["prompts"]]
    sources = write_rows(rows, Path("prompts.jsonl"))
    sections = {
        **shared_sections(model_dir, sources, settings.GRPO_PROMPTS),
        "sampling": {
            "temperature": settings.TEMPERATURE,
            "max_new_tokens": settings.RESPONSE_TOKENS,
            "min_new_tokens": settings.RESPONSE_TOKENS,
        },
        "reward": {"terms": [{"name": "benchmarks.ours:even_share"}]},
        "grpo": {"group_size": settings.GRPO_RESPONSES, "beta": settings.GRPO_BETA},
    }
    config = grpo.Config.model_validate(sections)
    grpo.train(config, on_eval=StepOnRequest(channel))


def run_ppo(model_dir: str, data: Data, channel: Channel, variant: str) -> None:
    """PPO until told to stop, one rollout per request; of ``variant`` only the epochs concern this side."""
    epochs = variant.split()[0]
    rows = [{"prompt": settings.to_text(ids)} for ids in data["prompts"]]
    sources = write_rows(rows, Path("prompts.jsonl"))
    reward_dir = str(Path(model_dir).with_name("reward"))
    scorer = {"path": reward_dir, "dtype": "bfloat16"}
    sections = shared_sections(model_dir, sources, settings.PPO_MINI_BATCH)
    sections["train"]["eval_every"] = int(epochs) * settings.PPO_PROMPTS // settings.PPO_MINI_BATCH
    config = ppo.Config.model_validate(
        {
            **sections,
            "sampling": {
                "temperature": settings.TEMPERATURE,
                "max_new_tokens": settings.RESPONSE_TOKENS,
                "min_new_tokens": settings.RESPONSE_TOKENS,
            },
            "reward": {"terms": [{"name": "reward_model", "label": "learned", "args": scorer}]},
            "critic": {"path": reward_dir},
            "ppo": {
                "rollout_groups": settings.PPO_PROMPTS,
                "epochs_per_rollout": int(epochs),
                "beta": settings.PPO_BETA,
                "missing_end_penalty": 0.0,
            },
        }
    )
    if config.train.eval_every != config.steps_per_rollout:
        raise RuntimeError(f"a rollout has {config.steps_per_rollout} steps, not {config.train.eval_every}")
    ppo.train(config, on_eval=StepOnRequest(channel))


def run_dpo(model_dir: str, data: Data, channel: Channel) -> None:
    """DPO until told to stop.

    ``train`` computes the reference of every pair before its first step, where the peer computes it in each
    step. The work is the same over an epoch, so each timed step is charged with it here: one forward of as
    many pairs.
    """
    rows = [
        {
            "prompt": settings.to_text(pair["prompt"]),
            **{side: settings.to_text(pair[side][:-1]) for side in ("chosen", "rejected")},
        }
        for pair in data["pairs"]
    ]
    sources = write_rows(rows, Path("pairs.jsonl"))
    sections = shared_sections(model_dir, sources, settings.DPO_PAIRS)
    config = dpo.Config.model_validate({**sections, "dpo": {"beta": settings.DPO_BETA}})
    groups: list[Group] = []

    def reference_of_next_pairs(lm: LanguageModel, step: int) -> None:
        if not groups:
            groups.extend(tokenised_pairs(sources[0], lm, data))
        first = step * settings.DPO_PAIRS % len(groups)
        pairs = groups[first : first + settings.DPO_PAIRS]
        dpo.attach_reference(lm, pairs, config.train.micro_batch_tokens)

    dpo.train(config, on_eval=StepOnRequest(channel, reference_of_next_pairs))


def tokenised_pairs(source: dict[str, Any], lm: LanguageModel, data: Data) -> list[Group]:
    """The pairs as ``train`` sees them.

    Raises RuntimeError if they are not the ids that the peer trains on.
    """
    pairs, _ = tokenise(as_pairs(SourceConfig(**source).read()[0]), lm.tokenizer)
    first = {"prompt": pairs[0].prompt_tokens, "chosen": pairs[0].chosen.tokens}
    first["rejected"] = pairs[0].rejected.tokens
    if first != data["pairs"][0]:
        raise RuntimeError("the tokenised row is not the pair's ids")
    return pairs


RUN: dict[str, Callable[..., None]] = {"grpo": run_grpo, "dpo": run_dpo, "ppo": run_ppo}


def main(name: str, model_dir: str, data_file: str, *variant: str) -> None:
    """Take the reply channel before anything prints, then train."""
    channel = Channel()
    RUN[name](model_dir, json.loads(Path(data_file).read_text()), channel, *variant)


if __name__ == "__main__":
    main(*sys.argv[1:])
