"""Our side as a worker: ``python -m benchmarks.ours NAME MODEL_DIR DATA_FILE [VARIANT]``.

What is timed is ``trimtab.methods.NAME.train`` as it ships, from the files that a user would give it: the
evaluation callback, called once after every step (PPO: after the last step on a rollout), holds the loop up
until the next request. A timed step is whole turns of the loop, logging included.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import settings
from benchmarks.protocol import Channel, versions
from trimtab.data.convert import as_pairs
from trimtab.data.render import tokenise
from trimtab.data.sources import SourceConfig
from trimtab.groups import Group
from trimtab.methods import dpo, grpo, ppo, reward, sft
from trimtab.methods.shared import anchor, relative
from trimtab.methods.shared import pairs as offline_pairs
from trimtab.models.language_model import LanguageModel
from trimtab.models.tree_model import TreeModel

Data = dict[str, list[Any]]
BeforeStep = Callable[[Any, int], None]
ENDLESS = 1_000_000


class StepOnRequest:
    """The evaluation callback: one turn of the loop per request.

    ``before_step(policy, steps done)`` is work that belongs to a step and that the loop does elsewhere; it is
    timed with the step. ``facts`` are announced with the worker.
    """

    def __init__(self, channel: Channel, before_step: BeforeStep | None = None, **facts: Any) -> None:
        self.channel = channel
        self.before_step = before_step
        self.facts = facts

    def __call__(self, lm: TreeModel, heldout: list[Group], step: int) -> dict[str, float]:
        """Report the step that ended, if any, and wait for the next request."""
        if step == 0:
            self.channel.ready(**facts_of(lm), **self.facts)
        else:
            self.channel.done()
        if not self.channel.wait():
            raise SystemExit(0)
        if self.before_step is not None:
            self.before_step(lm, step)
        return {}


def facts_of(lm: TreeModel) -> dict[str, Any]:
    """What our side says of itself: threads, packages, the form of the computation, the policy's size."""
    return {
        "threads": torch.get_num_threads(),
        **versions("torch", "transformers"),
        "computes_in": str(lm.dtype),
        "layout": lm.layout,
        "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
    }


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


def exact_length() -> dict[str, Any]:
    """The section ``sampling``: responses of RESPONSE_TOKENS, neither more nor fewer."""
    tokens = settings.RESPONSE_TOKENS
    return {"temperature": settings.TEMPERATURE, "max_new_tokens": tokens, "min_new_tokens": tokens}


def run_grpo(model_dir: str, data: Data, channel: Channel) -> None:
    """GRPO until told to stop."""
    rows = [{"prompt": settings.to_text(ids)} for ids in data["prompts"]]
    sources = write_rows(rows, Path("prompts.jsonl"))
    sections = {
        **shared_sections(model_dir, sources, settings.GRPO_PROMPTS),
        "sampling": exact_length(),
        "reward": {"terms": [{"name": "benchmarks.ours:even_share"}]},
        "grpo": {"group_size": settings.GRPO_RESPONSES, "beta": settings.GRPO_BETA},
    }
    config = grpo.Config.model_validate(sections)
    grpo.train(config, on_eval=StepOnRequest(channel))


def run_ppo(model_dir: str, data: Data, channel: Channel, variant: str) -> None:
    """PPO until told to stop, one rollout per request."""
    shape, epochs, _ = settings.rollout_of(variant)
    rows = [{"prompt": settings.to_text(ids[: shape.prompt_tokens])} for ids in data["prompts"]]
    sources = write_rows(rows, Path("prompts.jsonl"))
    reward_dir = str(Path(model_dir).with_name("reward"))
    scorer = {"path": reward_dir, "dtype": "bfloat16"}
    sections = shared_sections(model_dir, sources, shape.mini_batch)
    sections["train"]["eval_every"] = epochs * shape.prompts // shape.mini_batch
    config = ppo.Config.model_validate(
        {
            **sections,
            "sampling": exact_length(),
            "reward": {"terms": [{"name": "reward_model", "label": "learned", "args": scorer}]},
            "critic": {"path": reward_dir},
            "ppo": {
                "rollout_groups": shape.prompts,
                "epochs_per_rollout": epochs,
                "beta": settings.PPO_BETA,
                "missing_end_penalty": 0.0,
            },
        }
    )
    if config.train.eval_every != config.steps_per_rollout:
        raise RuntimeError(f"a rollout has {config.steps_per_rollout} steps, not {config.train.eval_every}")
    ppo.train(config, on_eval=StepOnRequest(channel))


def pair_rows(pairs: list[dict[str, list[int]]]) -> list[dict[str, str]]:
    """The pairs as a user's file has them; the end token is added when they are read."""
    return [
        {
            "prompt": settings.to_text(pair["prompt"]),
            **{side: settings.to_text(pair[side][:-1]) for side in ("chosen", "rejected")},
        }
        for pair in pairs
    ]


def run_dpo(model_dir: str, data: Data, channel: Channel, variant: str) -> None:
    """DPO until told to stop, on the pairs that the variant names.

    ``train`` computes the reference of every pair before its first step, where the peer computes it in each
    step. The work is the same over an epoch, so each timed step is charged with it here: one forward of as
    many pairs.
    """
    given = data[settings.PAIRS[variant].key]
    sources = write_rows(pair_rows(given), Path("pairs.jsonl"))
    sections = shared_sections(model_dir, sources, settings.DPO_PAIRS)
    config = dpo.Config.model_validate({**sections, "dpo": {"beta": settings.DPO_BETA}})
    groups: list[Group] = []

    def reference_of_next_pairs(lm: LanguageModel, step: int) -> None:
        if not groups:
            groups.extend(tokenised_pairs(sources[0], lm, given[0]))
        first = step * settings.DPO_PAIRS % len(groups)
        pairs = groups[first : first + settings.DPO_PAIRS]
        anchor.attach_reference(lm, pairs, config.train.micro_batch_tokens)

    dpo.train(config, on_eval=StepOnRequest(channel, reference_of_next_pairs))


def tokenised_pairs(source: dict[str, Any], lm: LanguageModel, first: dict[str, list[int]]) -> list[Group]:
    """The pairs as ``train`` sees them.

    Raises RuntimeError if the first is not made of the ids that the peer trains on.
    """
    pairs, _ = tokenise(as_pairs(SourceConfig(**source).read()[0]), lm.tokenizer)
    pair = pairs[0]
    found = {"prompt": pair.prompt_tokens, "chosen": pair.chosen.tokens, "rejected": pair.rejected.tokens}
    if found != first:
        raise RuntimeError("the tokenised row is not the pair's ids")
    return pairs


def run_sft(model_dir: str, data: Data, channel: Channel, variant: str) -> None:
    """SFT until told to stop; every step is all the demonstrations. The variant is the peer's."""
    rows = [
        {
            "prompt": settings.to_text(row["prompt"]),
            "completion": settings.to_text(row["completion"][:-1]),
        }
        for row in data["demonstrations"]
    ]
    sources = write_rows(rows, Path("demonstrations.jsonl"))
    config = sft.Config.model_validate(shared_sections(model_dir, sources, len(rows)))
    sft.train(config, on_eval=StepOnRequest(channel, tokens_per_step=settings.SFT_TOKENS))


def run_reward(model_dir: str, data: Data, channel: Channel) -> None:
    """Reward modelling until told to stop."""
    sources = write_rows(pair_rows(data["pairs"]), Path("pairs.jsonl"))
    sections = shared_sections(model_dir, sources, settings.DPO_PAIRS)
    config = reward.Config.model_validate({**sections, "reward_model": {"centre": settings.CENTRE}})
    reward.train(config, on_eval=StepOnRequest(channel))


RUN: dict[str, tuple[ModuleType, Callable[..., None]]] = {
    "grpo": (relative, run_grpo),
    "dpo": (offline_pairs, run_dpo),
    "ppo": (ppo, run_ppo),
    "sft": (sft, run_sft),
    "reward": (reward, run_reward),
}
"""Name → the module with the method's loop, whose loading of the model is watched, and what runs it."""


def watch_loading(method: ModuleType, channel: Channel) -> None:
    """Have the channel told as soon as the method has loaded its first model."""
    name = "load_scalar_model" if method is reward else "load_model"
    load = getattr(method, name)

    @functools.wraps(load)
    def watched(*arguments: Any, **keywords: Any) -> Any:
        lm = load(*arguments, **keywords)
        channel.loaded(lm.model.parameters())
        return lm

    setattr(method, name, watched)


def main(name: str, model_dir: str, data_file: str, *variant: str) -> None:
    """Take the reply channel before anything prints, then train."""
    channel = Channel()
    method, run = RUN[name]
    watch_loading(method, channel)
    run(model_dir, json.loads(Path(data_file).read_text()), channel, *variant)


if __name__ == "__main__":
    main(*sys.argv[1:])
