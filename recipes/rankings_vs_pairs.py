"""How much is a ranking worth against a pair? Reward models on equal annotators' effort, in the newsroom.

    python recipes/rankings_vs_pairs.py runs/quickstart/sft/model

Annotators read the same number of summaries: n pairs (2n read), or n/2 rankings of four (2n read), with the
same noise (a ranking's couples are ordered with a pair's probability). Each reward model starts from the
model that is given and is measured on the same held-out articles by the gold score itself, without noise: how
often does it put the better of two summaries first? Means over seeds, with the lowest and the highest.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

from trimtab.groups import Group, Response
from trimtab.methods import reward
from trimtab.newsroom.files import write_world
from trimtab.newsroom.gold import score
from trimtab.newsroom.summaries import write_summary
from trimtab.newsroom.world import make_article, prompt_of
from trimtab.rewards.models import build_reward_model

READ = (250, 500, 1000, 2000)
SEEDS = (0, 1, 2)
HELDOUT_SEED = 999
KINDS = {
    "pairs": ("pairs", 2, "pairs"),
    "rankings": ("rankings", 4, "pairs"),
    "listwise": ("rankings", 4, "listwise"),
}
"""Name → (file of the world, summaries in a row, loss)."""


def train(model: str, out: Path, source: Path, rows: int, loss: str, seed: int) -> str:
    """A reward model on the first ``rows`` rows, three times over; the folder of its model."""
    config = reward.Config.model_validate(
        {
            "model": {"path": model, "dtype": "float32"},
            "data": {"sources": [{"path": str(source), "limit": rows}]},
            "train": {"epochs": 3, "batch_groups": 16, "lr": 5e-4, "warmup_steps": 5, "seed": seed},
            "reward_model": {"loss": loss},
            "run": {"out": str(out)},
        }
    )
    return str(reward.train(config).out / "model")


def heldout_groups() -> list[Group]:
    """Four summaries of unlike quality to each of 200 articles of another world, with gold scores."""
    groups = []
    for index in range(200):
        article = make_article(HELDOUT_SEED, index)
        rng = random.Random(index)
        texts = {write_summary(article, rng, rng.uniform(0.3, 1.0)) for _ in range(4)}
        responses = [
            Response(text=text, reward=score("", text, facts=article.facts)) for text in sorted(texts)
        ]
        groups.append(Group(id=str(index), prompt=prompt_of(article), responses=responses))
    return groups


def gold_accuracy(model: str, groups: list[Group]) -> float:
    """Share of couples of different gold score that the model orders as gold does."""
    right = couples = 0.0
    for group, scored in zip(groups, build_reward_model({"path": model}).score(groups), strict=True):
        ours = [row[""] for row in scored if isinstance(row, dict)]
        gold = [r.reward or 0.0 for r in group.responses]
        for i in range(len(gold)):
            for j in range(i):
                if gold[i] != gold[j]:
                    couples += 1
                    right += (ours[i] - ours[j]) * (gold[i] - gold[j]) > 0
    return right / couples


def main(model: str) -> None:
    """Train, measure, print one line a budget."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        groups = heldout_groups()
        for read in READ:
            line: dict[str, object] = {"summaries_read": read}
            for kind, (file, size, loss) in KINDS.items():
                found = []
                for seed in SEEDS:
                    world = root / f"world-{seed}"
                    if not world.exists():
                        write_world(
                            world,
                            seed=seed,
                            demonstrations=0,
                            pairs=max(READ) // 2,
                            prompts=0,
                            heldout=0,
                            rankings=max(READ) // 4,
                            ratings=0,
                        )
                    out = root / f"{kind}-{read}-{seed}"
                    made = train(model, out, world / f"{file}.jsonl", read // size, loss, seed)
                    found.append(gold_accuracy(made, groups))
                line[kind] = {"mean": sum(found) / len(found), "low": min(found), "high": max(found)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
