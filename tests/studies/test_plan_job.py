"""The job that is planned of a run, held against the run itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from trimtab import methods
from trimtab.batch import TreeBatch
from trimtab.data import collate as collation
from trimtab.errors import InputError
from trimtab.planning.job import Job
from trimtab.planning.methods import find_card
from trimtab.planning.models import find_model, find_reward_model
from trimtab.spread import deal
from trimtab.studies import job_rows
from trimtab.studies.job import job_of

STEPS = 2
DISTINCT = "return sum((i + 1) * ord(c) for i, c in enumerate(response)) % 1009 / 1009"
"""A reward that hardly ever says the same of two responses."""


@dataclass
class Seen:
    """What a run collated."""

    trained: list[TreeBatch] = field(default_factory=list)
    passed: list[TreeBatch] = field(default_factory=list)
    """Without gradient."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()

    def recorded(*arguments: Any, **named: Any) -> TreeBatch:
        batch = collation.collate(*arguments, **named)
        (found.trained if torch.is_grad_enabled() else found.passed).append(batch)
        return batch

    monkeypatch.setattr(deal, "collate", recorded)
    return found


@pytest.fixture
def settings(configured: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """A short run whose samples are all as long as they may be, in several micro-batches a step."""

    def make(name: str, **changed: Any) -> Any:
        given: dict[str, Any] = {"train__steps": STEPS, "train__micro_batch_tokens": 40}
        if name == "spin":
            given["spin__iterations"] = 1
        if find_card(name).rollouts:
            given |= {"sampling__min_new_tokens": 6, "sampling__max_new_tokens": 6}
        if name in tiny.SAMPLES:
            term = tiny.write_reward(tmp_path / "distinct.py", DISTINCT)
            given["reward__terms"] = [{"name": term, "label": "distinct"}]
        return configured(name, **given | changed)

    return make


def lineage(config: Any) -> dict[str, Any]:
    return json.loads((Path(config.run.out) / "lineage.json").read_text())


def count(batches: list[TreeBatch]) -> int:
    return sum(int(batch.mask_NT.sum()) for batch in batches)


@pytest.mark.parametrize("name", methods.names())
def test_the_job_is_the_run(name: str, settings: Callable[..., Any], seen: Seen) -> None:
    config = settings(name)
    job, facts, warnings = job_of(name, config)
    tiny.train(config, name)
    ran = lineage(config)

    assert facts["models_in_memory"] == ran["models_in_memory"] == find_card(name).models_in_memory
    assert job.layout == ran["layout"]
    assert job.compute == "float32"
    assert (job.steps, facts["lengths"]) == (STEPS, "all rows")
    assert [line for line in warnings if "responses are taken" not in line and "dynamic" not in line] == []

    # PPO's critic reads the same micro-batches once more.
    again = 2 if name == "ppo" else 1
    batch = job.batch
    assert batch.tokens * STEPS * again == sum(b.tokens for b in seen.trained)
    assert batch.micro_batches * STEPS * again == len(seen.trained)
    assert batch.targets * STEPS * again == count(seen.trained)
    widest = max(seen.trained, key=lambda b: b.tokens)
    assert (batch.widest, batch.rows) == (widest.tokens, widest.input_ids_BL.shape[0])
    assert batch.forward_widest == max((b.tokens for b in seen.passed), default=0)
    assert bool(seen.passed) == (job.reference_pass or job.old_pass)


@pytest.mark.parametrize("layout", ["tree", "plain"])
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_other_layouts(name: str, layout: str, settings: Callable[..., Any], seen: Seen) -> None:
    config = settings(name, model__layout=layout, train__micro_batch_tokens=64)
    job, _, _ = job_of(name, config)
    tiny.train(config, name)
    assert job.layout == layout == lineage(config)["layout"]
    assert job.batch.tokens * STEPS == sum(b.tokens for b in seen.trained)
    assert job.batch.rows == max(seen.trained, key=lambda b: b.tokens).input_ids_BL.shape[0]
    assert job.batch.forward_widest == max(b.tokens for b in seen.passed)


@pytest.mark.parametrize("name", ["ppo", "kto"])
def test_over_an_adapter_all_stand_on_one_base(name: str, settings: Callable[..., Any]) -> None:
    config = settings(name, adapter__kind="lora", adapter__rank=4)
    job, facts, _ = job_of(name, config)
    tiny.train(config, name)
    assert facts["models_in_memory"] == lineage(config)["models_in_memory"] == 1
    assert all(role.shares_base for role in job.roles)
    # q, k, v and o of 16 and 8 wide, gate, up and down of 16 and 32: (32+24+24+32+48+48+48) in each layer.
    assert (job.adapter.ends, job.adapter.layers) == (2 * 256, 2 * 7)


def roles(job: Job) -> list[tuple[str, bool, bool, Any, str]]:
    return [(r.name, r.learns, r.shares_base, r.bytes, r.when) for r in job.roles]


REFERENCE = ("reference", False, False, None, "always")
NAMED = ("reference", False, False, None, "before")
CRITIC = ("critic", True, False, None, "always")
SNAPSHOT = ("snapshot", False, False, None, "always")
JUDGE = ("reward model", False, False, 4, "always")


@pytest.mark.parametrize(
    ("name", "changed", "expected"),
    [
        ("dpo", {"dpo__reference": "MODEL"}, [NAMED]),
        ("dpo", {"dpo__reference_free": True}, []),
        ("rank", {"rank__reference": "MODEL"}, [NAMED]),
        ("kto", {"kto__kl": "none"}, []),
        ("kto", {"kto__reference": "MODEL"}, [REFERENCE]),
        ("kto", {"kto__reference": "MODEL", "kto__kl": "none"}, [NAMED]),
        ("mixed", {"mixed__labels__kl": "none"}, []),
        ("mixed", {"mixed__reference": "MODEL", "mixed__labels__kl": "none"}, [NAMED]),
        ("gspo", {"gspo__log_kl": False}, []),
        ("grpo", {"grpo__overlap": True}, [REFERENCE, SNAPSHOT]),
        ("grpo", {"reward__terms": [{"name": "reward_model", "args": {"path": "RM"}}]}, [REFERENCE, JUDGE]),
        ("ppo", {"critic__path": "RM"}, [REFERENCE, CRITIC]),
        ("ppo", {"critic__share": "trunk"}, [REFERENCE]),
    ],
)
def test_roles_of_options(
    name: str,
    changed: dict[str, Any],
    expected: list[Any],
    settings: Callable[..., Any],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """Each held against the count of a run's own lineage."""
    rewarding = tiny.save_reward_model(tmp_path / "rm")
    text = json.dumps(changed).replace("MODEL", str(tiny_model)).replace("RM", str(rewarding))
    config = settings(name, **json.loads(text))
    job, facts, _ = job_of(name, config)
    assert roles(job) == expected
    tiny.train(config, name)
    assert facts["models_in_memory"] == lineage(config)["models_in_memory"]
    assert job.value_head == (changed.get("critic__share") == "trunk")


@pytest.mark.parametrize(
    ("term", "overlap", "whole"),
    [
        ({"name": "reward_model", "args": {}}, False, False),
        ({"name": "reward_model", "args": {}}, True, True),
        ({"name": "reward_model", "args": {"input": "pair"}}, False, True),
        ({"name": "judge", "args": {"kind": "reward_model", "args": {}}}, False, True),
    ],
)
def test_reward_models_that_a_run_does_not_cut(
    term: dict[str, Any], overlap: bool, whole: bool, settings: Callable[..., Any], tmp_path: Path
) -> None:
    args = term["args"].get("args", term["args"])
    args["path"] = str(tiny.save_reward_model(tmp_path / "rm"))
    job, _, _ = job_of("grpo", settings("grpo", reward__terms=[term], grpo__overlap=overlap))
    assert [role.whole for role in job.roles if role.name == "reward model"] == [whole]


def test_reward_models_and_critics_have_no_vocabulary(settings: Callable[..., Any], tmp_path: Path) -> None:
    rewarding = tiny.save_reward_model(tmp_path / "rm")
    terms = [
        {"name": "reward_model", "args": {"path": str(rewarding), "dtype": "bfloat16", "batch_tokens": 99}}
    ]
    job, _, _ = job_of("ppo", settings("ppo", reward__terms=terms))
    critic_role, reward = job.roles[1:]
    # The embedding is tied, so that nothing is saved and 16 weights of a score come on top.
    assert critic_role.model.parameters == reward.model.parameters == job.model.parameters + 16
    assert (reward.bytes, job.reward_tokens) == (2, 99)
    job, _, _ = job_of("reward", settings("reward"))
    assert (job.scalar, job.model.parameters) == (True, find_reward_model(str(rewarding)).parameters)


def test_a_refreshed_reference(settings: Callable[..., Any]) -> None:
    """By an average its fp32 weights are kept beside those that are computed with: 4 + 4 bytes."""
    changed: dict[str, Any] = {"grpo__refresh_reference_every": 1, "grpo__reference_average": 0.5}
    [reference] = job_of("grpo", settings("grpo", **changed))[0].roles
    assert reference.bytes == 8
    lora = settings("grpo", adapter__kind="lora", **changed)
    [reference] = job_of("grpo", lora)[0].roles
    assert (reference.shares_base, reference.adapter) == (True, True)
    [reference] = job_of("grpo", settings("grpo", adapter__kind="lora"))[0].roles
    assert (reference.shares_base, reference.adapter) == (True, False)


def test_what_is_watched_is_loaded_too(settings: Callable[..., Any], tiny_data: Path, tmp_path: Path) -> None:
    """Against KL one more model, and the reward a second time, beside those that the lineage counts."""
    rewarding = tiny.save_reward_model(tmp_path / "rm")
    prompts = [{"path": str(tiny_data / "prompts.jsonl")}]
    terms = [{"name": "reward_model", "args": {"path": str(rewarding)}}]
    config = settings("sft", watch__prompts=prompts, watch__reward={"terms": terms})
    job, facts, _ = job_of("sft", config)
    assert [role.name for role in job.roles] == ["reference", "reward model"]
    assert (facts["models_in_memory"], facts["models_to_watch"]) == (1, ["reference", "reward model"])
    assert job_of("sft", settings("sft", watch__prompts=prompts, watch__kl=False))[0].roles == ()
    held_out = settings("grpo", reward__terms=terms, data__heldout=prompts)
    assert [role.name for role in job_of("grpo", held_out)[0].roles] == ["reference", *["reward model"] * 2]


def test_only_the_head_of_the_data_is_read(settings: Callable[..., Any], tmp_path: Path) -> None:
    """600 rows of which 10 are read: the last line is no JSON, and nobody minds."""
    rows = tiny.pairs(600)
    file = tiny.write_rows(tmp_path / "many.jsonl", rows)
    with file.open("a") as more:
        more.write("no json\n")
    config = settings("dpo", data__sources=[{"path": str(file)}], train__steps=0, train__epochs=2.0)
    job, facts, _ = job_of("dpo", config, sample_rows=10)
    # 601 lines in batches of 4, twice over; a blank or broken line counts.
    assert (job.steps, facts["rows"], facts["rows_read"]) == (301, 601, 10)
    assert job.data_passes == pytest.approx(2, rel=0.01)
    # A pass over all of the data fills its micro-batches, though ten rows would not.
    assert 30 < job.batch.forward_widest <= 40
    config.train.token_budget = 1000
    per_step = (
        sum(len(row["prompt"].split()) + 4 + len(row["rejected"].split()) - 1 for row in rows[:10]) * 0.4
    )
    assert job_of("dpo", config, sample_rows=10)[0].steps == -(-1000 // per_step)


def test_a_very_long_file_is_not_counted_to_its_end(
    settings: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four equal blocks are read, of 3 lines each: 12 rows."""
    line = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}).encode() + b"\n"
    file = tmp_path / "long.jsonl"
    file.write_bytes(12 * line)
    monkeypatch.setattr(job_rows, "BLOCK", 3 * len(line))
    monkeypatch.setattr(job_rows, "MOST_BYTES", 4 * len(line))
    config = settings("dpo", data__sources=[{"path": str(file)}])
    assert job_of("dpo", config, sample_rows=2)[1]["rows"] == 12


def test_rows_that_do_not_fit_are_left_out(settings: Callable[..., Any]) -> None:
    config = settings("dpo", data__max_prompt_tokens=3, data__on_long="skip")
    _, facts, warnings = job_of("dpo", config)
    # The prompts have 1, 2, 3, 4, 5, 1, 2 and 3 words.
    assert (facts["rows"], warnings) == (6, [])
    assert "6 of 8 groups kept" in facts["left_out"][0]


def test_how_a_run_samples(settings: Callable[..., Any]) -> None:
    """The sampler of its options and of its model, whatever the layout of its training."""
    for engine, expected in (("auto", "tree"), ("tree", "tree"), ("plain", "plain")):
        drawn = job_of("grpo", settings("grpo", sampling__engine=engine, model__layout="plain"))[0].sampling
        assert drawn is not None
        assert (drawn.engine, drawn.filtered) == (expected, False)
    drawn = job_of("grpo", settings("grpo", sampling__top_p=0.9))[0].sampling
    assert drawn is not None
    assert drawn.filtered


def test_which_passes_a_method_makes(settings: Callable[..., Any]) -> None:
    kto = job_of("kto", settings("kto"))[0]
    # Before the first step over all data, then the baseline's at every step; without one there are none.
    assert (kto.reference_once, kto.reference_each, kto.old_pass) == (True, True, True)
    without = job_of("kto", settings("kto", kto__kl="none"))[0]
    assert (without.reference_once, without.reference_each, without.old_pass) == (True, False, False)
    # With its KL in the reward RLOO reads all groups of a rollout again, GRPO those after the first step's.
    whole = {
        name: job_of(name, settings(name, **{f"{name}__rollout_groups": 8}))[0].old_pass_whole
        for name in ("ppo", "rloo", "grpo")
    }
    assert whole == {"ppo": True, "rloo": True, "grpo": False}
    assert not job_of("rloo", settings("rloo", rloo__beta=0.0))[0].old_pass_whole


def test_answers_of_an_evaluation_are_said_to_be_beside(
    settings: Callable[..., Any], tiny_data: Path
) -> None:
    prompts = [{"path": str(tiny_data / "prompts.jsonl")}]
    sampling = {"max_new_tokens": 40, "cache_mb": 1024}
    config = settings("sft", watch__prompts=prompts, watch__samples=2, watch__sampling=sampling)
    job, _, warnings = job_of("sft", config)
    [line] = [line for line in warnings if "evaluations" in line]
    assert "128 of up to" in line
    # Each has a block of 32 tokens for its prompt and two for its answer: 2 layers · (8 + 16) · 4 bytes.
    assert f"hold {128 * 3 * 32 * 2 * (8 + 16) * 4 / 2**20:,.0f} MiB" in line
    held_out = settings("grpo", data__heldout=prompts)
    assert any("64 of up to" in line for line in job_of("grpo", held_out)[2])
    assert not any("evaluations" in line for line in job_of("dpo", settings("dpo"))[2])
    assert job.sampling is None


def test_a_budget_that_the_run_refuses_is_refused(settings: Callable[..., Any]) -> None:
    """8,192 tokens · (2 layers' inputs, two more of 16 numbers, a scale) · 4 bytes: 2.03 MiB; 1 is given."""
    config = settings("dpo", train__micro_batch_tokens=8192, train__activation_mb=1)
    with pytest.raises(
        InputError, match=r"train\.activation_mb = 1 is too small .* it takes \d; raise it or lower"
    ):
        job_of("dpo", config)
    with pytest.raises(
        InputError, match=r"train\.activation_mb = 1 is too small .* it takes \d; raise it or lower"
    ):
        tiny.train(config, "dpo")


def test_what_is_watched_is_not_timed_and_files_are_weighed(
    settings: Callable[..., Any], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    rewarding = tiny.save_reward_model(tmp_path / "rm")
    prompts = [{"path": str(tiny_data / "prompts.jsonl")}]
    terms = [{"name": "reward_model", "args": {"path": str(rewarding), "dtype": "bfloat16"}}]
    config = settings("grpo", reward__terms=terms, watch__prompts=prompts)
    found = [(r.name, r.watched, r.file, int(r.file_bytes or 0)) for r in job_of("grpo", config)[0].roles]
    own = [("reference", False, False, 0), ("reward model", False, True, 4)]
    # The tiny models are saved in fp32.
    assert found == [*own, ("reference", True, False, 0), ("reward model", True, True, 4)]
    [named] = job_of("dpo", settings("dpo", dpo__reference=str(tiny_model)))[0].roles
    assert (named.file, int(named.file_bytes or 0)) == (True, 4)


def test_before_there_is_data(settings: Callable[..., Any]) -> None:
    sources = [{"path": "nowhere/pairs.jsonl"}]
    config = settings("dpo", data__sources=sources, train__micro_batch_tokens=4096, data__max_tokens=40)
    job, facts, warnings = job_of("dpo", config)
    assert warnings[0].startswith("no such file or folder: nowhere/pairs.jsonl")
    assert (job.batch.longest, facts["lengths"]) == (40, "the limits of the configuration")
    # Half of it prompt: a pair is 20 + 2·20 tokens, 4 a step.
    assert (job.batch.tokens, job.batch.widest) == (4 * 60, 4 * 60)
    # Limits over the budget would be refused by the run, so that what it takes is no larger.
    tight, _, _ = job_of("dpo", settings("dpo", data__sources=sources, train__micro_batch_tokens=50))
    assert tight.batch.widest <= 50
    drawn, _, _ = job_of("grpo", settings("grpo", data__sources=sources))
    assert drawn.sampling is not None
    assert (drawn.batch.widest, drawn.sampling.longest_prompt, drawn.sampling.response) == (40, 34, 6)


def test_what_the_run_would_refuse_is_refused(settings: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path: .*no-such"):
        job_of("dpo", settings("dpo", model__path=str(tmp_path / "no-such")))
    with pytest.raises(InputError, match=r"one group needs .* tokens but"):
        job_of("dpo", settings("dpo", train__micro_batch_tokens=3))
    silent = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompts())
    config = settings("kto", data__sources=[{"path": str(silent)}])
    with pytest.raises(InputError, match="none of its rows gives"):
        job_of("kto", config)
    with pytest.raises(InputError, match="exceeds max_prompt_tokens 1"):
        job_of("dpo", settings("dpo", data__max_prompt_tokens=1))
    with pytest.raises(InputError, match="unknown method 'dpoo': did you mean dpo"):
        job_of("dpoo", settings("dpo"))


def test_an_adapter_that_goes_on(settings: Callable[..., Any], tiny_model: Path) -> None:
    """Its own options count, and its start is a reference with an adapter of its own."""
    first = settings("sft", adapter__kind="lora", adapter__rank=3, train__steps=1)
    tiny.train(first, "sft")
    path = str(Path(first.run.out) / "model")
    job, _, _ = job_of("grpo", settings("grpo", model__path=path, adapter__kind="lora"))
    [reference] = job.roles
    assert (job.adapter.rank, reference.shares_base, reference.adapter) == (3, True, True)
    assert job.model.parameters == find_model(str(tiny_model)).parameters
    merged, _, _ = job_of("grpo", settings("grpo", model__path=path))
    assert (merged.adapter.kind, merged.roles[0].shares_base) == ("none", False)
