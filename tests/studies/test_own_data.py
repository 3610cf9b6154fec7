"""Comparing on the user's own feedback: the split, the plan, equal tokens, going on after an interruption."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from trimtab.cli.main import run
from trimtab.config import load_config
from trimtab.data.convert import as_comparisons
from trimtab.data.readers import read_groups
from trimtab.data.sources import SourceConfig
from trimtab.errors import InputError
from trimtab.groups import prompt_text
from trimtab.studies import own_data
from trimtab.studies.config import StudyConfig
from trimtab.studies.evaluate import Evaluator
from trimtab.studies.own_data import OwnDataConfig, run_own_data
from trimtab.studies.own_split import read_own_data, to_row
from trimtab.training.run import Run

PARTS = ("heldout", "judge", "methods")
Finished = tuple[Path, list[str]]
TIMES = {"wall_s", "learned_reward_s", "evaluation_s", "peak_rss_mb", "measured_peak_mb", "seconds"}


def own_rows(count: int = 140) -> list[dict[str, Any]]:
    """Prompts of three letters, all different; but the last ten rows have the first ten's, other answers."""
    words, rows = tiny.WORDS, []
    for i in range(count):
        k = i - count + 10 if i >= count - 10 else i
        prompt = f"{words[k % 26]} {words[k // 26]} {words[7 * k % 26]}"
        good, bad = words[k % 26], words[(k + 7 + i - k) % 26]
        rows.append({"prompt": prompt, "chosen": f"{good} {good}", "rejected": f"{bad} {bad} {bad}"})
    return rows


def configure(model: Path, data: Path, out: Path, **changed: Any) -> OwnDataConfig:
    values: dict[str, Any] = {
        "model.path": str(model),
        "model.dtype": "float32",
        "data.path": str(data),
        "out": str(out),
        "budget": "600 tokens",
        "max_prompts": 20,
    }
    return load_config(OwnDataConfig, None, values | {k.replace("__", "."): v for k, v in changed.items()})


def timeless(value: Any) -> Any:
    """Without what a clock, or the folder, decides."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("own") / "pairs.jsonl", own_rows())


@pytest.fixture(scope="module")
def finished(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Folder of a finished comparison, and what was said before it."""
    out, said = tmp_path_factory.mktemp("compared") / "out", list[str]()
    run_own_data(configure(tiny_model, pairs, out), said.append)
    return out, said


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def prompts_in(file: Path) -> set[str]:
    return {prompt_text(group.prompt) for group in read_groups(str(file))[0]}


# ---------------------------------------------------------------- data


def test_the_split_leaks_no_prompt(pairs: Path, tiny_model: Path, finished: Finished) -> None:
    def split(seed: int) -> dict[str, set[str]]:
        source = SourceConfig(path=str(pairs))
        shares = {"heldout_share": 0.2, "judge_share": 0.3}
        options = {"max_tokens": 48, "max_new_tokens": 0, "seed": seed, **shares}
        found = read_own_data(source, tiny.tokenizer(), **options)
        assert sum(map(len, found.parts.values())) == 140
        return {name: {prompt_text(g.prompt) for g in found.parts[name]} for name in PARTS}

    for seed in range(3):
        parts = split(seed)
        assert sum(map(len, parts.values())) == 130, "a prompt of two rows is in two parts"
        assert not parts["heldout"] & parts["judge"]
        # In expectation 26, 39 and 65: a second split by the first one's hash would leave the judge nothing.
        assert all(abs(len(parts[name]) - n) < 20 for name, n in zip(PARTS, (26, 39, 65), strict=True)), parts
    out, _ = finished
    files = {name: prompts_in(out / "data" / f"{name}.jsonl") for name in PARTS}
    assert all(files[name] <= split(0)[name] for name in PARTS)
    assert len(prompts_in(out / "data" / "prompts.jsonl")) == 20
    assert prompts_in(out / "data" / "prompts.jsonl") <= split(0)["heldout"]
    lines = (out / "data" / "prompts.jsonl").read_text().splitlines()
    assert len(lines) == 20, "a prompt is answered twice"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a b", "chosen": "c", "rejected": "d", "topic": "letters"},
        {"prompt": "a b", "chosen": "c", "rejected": "d", "group_weight": 2.0},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        },
        {
            "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
        },
        {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [2, 1, 2]},
        {"prompt": "a", "responses": ["b", "c", "d"], "ratings": [1.0, 3.5, 2.0]},
        {"prompt": "a", "responses": ["b", "c"], "rewards": [0.1, -0.5], "answer": "b"},
    ],
)
def test_rows_in_our_own_format_say_the_same(row: dict[str, Any], tmp_path: Path) -> None:
    """Also of a conversation, of which prompt and answers must not be cut apart elsewhere the second time."""
    [before] = as_comparisons(read_groups(str(tiny.write_rows(tmp_path / "a.jsonl", [row])))[0])
    [after] = as_comparisons(read_groups(str(tiny.write_rows(tmp_path / "b.jsonl", [to_row(before)])))[0])
    assert after.prompt == before.prompt
    assert [(r.text, r.rank, r.preferred) for r in after.responses] == [
        (r.text, r.rank, r.preferred) for r in before.responses
    ]
    assert (after.columns, after.weight) == (before.columns, before.weight)


def test_too_long_rows_are_left_out_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    rows = own_rows(150)
    for row in rows[::10]:
        row["rejected"] = " ".join(["a"] * 60)  # the model holds 48 tokens
    file = tiny.write_rows(tmp_path / "long.jsonl", rows)
    options = {"max_tokens": 48, "max_new_tokens": 0, "seed": 0}
    data = read_own_data(
        SourceConfig(path=str(file)), tiny.tokenizer(), heldout_share=0.2, judge_share=0.3, **options
    )
    assert "% are left out, longer than 48 tokens" in data.lines[0]
    assert data.new == 4, "three words and the end: the long ones must not count"
    kept = data.take("methods", 1000)
    assert 0 < len(kept) < len(data.parts["methods"])
    assert max(len(r.tokens or ()) for g in kept for r in g.responses) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (own_rows(40), r"pairs\.jsonl: 100 prompts are needed.*there are 30 in 40 comparisons"),
        (tiny.demonstrations(30), r"none of its 30 rows compares responses"),
        ([{"prompt": "a", "responses": ["b", "c"], "ratings": [2, 2]}] * 9, "none of its 9 rows compares"),
    ],
)
def test_too_little_data(rows: list[dict[str, Any]], message: str, tiny_model: Path, tmp_path: Path) -> None:
    file = tiny.write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(InputError, match=message):
        run_own_data(configure(tiny_model, file, tmp_path / "out"))
    assert not (tmp_path / "out").exists(), "nothing is left behind that a second try would stumble over"


# ---------------------------------------------------------------- the comparison


def test_every_method_has_the_same_tokens_and_feedback(finished: Finished) -> None:
    out, _ = finished
    rows = summary_of(out)["methods"]
    assert list(rows) == ["sft", "dpo", "ppo", "grpo"]
    for name in ("dpo", "ppo", "grpo"):
        used, steps = rows[name]["optimiser_tokens"], rows[name]["gradient_steps"]
        assert steps > 3
        # A run stops with the step that spends its budget; no step is twice as long as the mean.
        assert 600 <= used < 600 + 2 * used / steps, name
    items = {row["feedback_items"] for row in rows.values()}
    assert items == {len((out / "data" / "methods.jsonl").read_text().splitlines())}
    assert summary_of(out)["reward_models"]["rm"]["feedback_items"] in items


def test_what_each_stage_learned_from(finished: Finished, tiny_model: Path) -> None:
    out, _ = finished

    def lineage(name: str) -> dict[str, Any]:
        return json.loads((out / name / "lineage.json").read_text())

    assert [Path(next(iter(lineage(n)["data"]))).name for n in ("judge", "rm", "sft")] == [
        "judge.jsonl",
        "methods.jsonl",
        "methods.jsonl",
    ]
    assert lineage("judge")["model"] == lineage("sft")["model"] == str(tiny_model)
    for name in ("dpo", "ppo", "grpo"):
        assert lineage(name)["model"] == str(out / "sft" / "model")
        values = json.dumps(tomllib.loads((out / name / "config.toml").read_text()))
        assert "judge" not in values, "a method may see neither the judge nor its data"
        assert (f"{out}/rm/model" in values) == (name != "dpo")
    assert lineage("ppo")["critic"] == str(out / "rm" / "model")


def test_summary_of_a_comparison(finished: Finished) -> None:
    out, _ = finished
    summary = summary_of(out)
    assert summary["score_name"] == "Judge's score"
    assert set(summary["reward_models"]) == {"judge", "rm"}
    assert summary["judge"] == summary["reward_models"]["judge"]
    assert summary["judge"]["pairs"] == len((out / "data" / "heldout.jsonl").read_text().splitlines())
    for row in summary["methods"].values():
        low, high = row["proxy_reward_ci95"]
        assert low <= row["proxy_reward"] <= high
        assert row["proxy_reward"] != row["gold_reward"], "two reward models, one number"
    assert set(summary["head_to_head"]) == {"dpo>ppo", "dpo>grpo", "ppo>grpo"}
    assert summary["budget"]["optimiser_tokens_of_each_method"] == 600
    assert summary["sample_size"] == 20


def test_what_a_newcomer_reads_first(finished: Finished) -> None:
    out, said = finished
    text = "\n".join(said)
    for part in (
        "140 compare responses, to 130 prompts",
        "split by prompt",
        "plan for 600 optimiser tokens a method",
        "learning rates: SFT",
        "20 held-out prompts",
    ):
        assert part in text, text
    assert json.loads((out / "plan.json").read_text())["lines"] == said


def test_the_study_file_repeats_it_with_models_of_its_own(finished: Finished, tmp_path: Path) -> None:
    out, _ = finished
    again = load_config(StudyConfig, out / "study.toml", {"out": str(tmp_path / "again")})
    assert again.evaluation.reward is not None
    assert again.evaluation.reward.terms[0].args["path"] == f"{tmp_path}/again/judge/model"
    ppo = again.stages["ppo"].model_extra or {}
    assert ppo["critic"]["path"] == f"{tmp_path}/again/rm/model"
    assert ppo["data"]["sources"][0]["path"] == f"{out}/data/methods.jsonl"
    assert not again.resume
    # The folder stands once for itself and once for what is made in it.
    assert (out / "study.toml").read_text().count("{out}/rm/model") == 4


def test_an_interrupted_comparison_goes_on_from_every_stage(
    finished: Finished,
    tiny_model: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight, out = finished[0], tmp_path / "out"
    log, measure_policy = Run.log, Evaluator._policy

    def interrupt(place: str) -> None:
        def stop_at_step_2(self: Run, state: Any, metrics: dict[str, Any]) -> None:
            if self.out.name == place and state.step == 2:
                raise KeyboardInterrupt
            log(self, state, metrics)

        def stop_at_policy(self: Evaluator, name: str) -> dict[str, Any]:
            if place == f"evaluation of {name}":
                raise KeyboardInterrupt
            return measure_policy(self, name)

        with monkeypatch.context() as patched:
            patched.setattr(Run, "log", stop_at_step_2)
            patched.setattr(Evaluator, "_policy", stop_at_policy)
            with pytest.raises(KeyboardInterrupt):
                run_own_data(configure(tiny_model, pairs, out, resume=True), said.append)

    said: list[str] = []
    interrupt("judge")
    plan = (out / "plan.json").read_bytes()
    monkeypatch.setattr(own_data, "measure", lambda *_: pytest.fail("the stored plan was not used"))
    for place in ("rm", "sft", "dpo", "ppo", "grpo", "evaluation of sft", "evaluation of ppo"):
        interrupt(place)
        assert not (out / "summary.json").exists()
    sft = (out / "eval" / "sft.json").stat().st_mtime_ns
    summary = run_own_data(configure(tiny_model, pairs, out, resume=True), said.append)
    assert (out / "eval" / "sft.json").stat().st_mtime_ns == sft, "a finished evaluation was made again"
    assert (out / "plan.json").read_bytes() == plan
    assert timeless(summary) == timeless(summary_of(straight))


def test_an_evaluation_is_kept_only_while_it_fits(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model in the stage's folder, or another reward, and the kept answers no longer stand."""
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    values = {"out": str(out), "resume": True}
    config = load_config(StudyConfig, out / "study.toml", values)

    def key(changed: StudyConfig) -> dict[str, Any]:
        stages = {n: _Stage(out / n) for n in changed.stages}
        return Evaluator(changed, stages)._key(["dpo", "sft"], policies=True)

    before = key(config)
    assert key(config) == before
    more = load_config(StudyConfig, out / "study.toml", {**values, "evaluation.samples": 2})
    assert key(more) != before
    shutil.copytree(out / "grpo" / "model", out / "dpo" / "model", dirs_exist_ok=True)
    assert key(config) != before
    shutil.copytree(finished[0] / "dpo" / "model", out / "dpo" / "model", dirs_exist_ok=True)
    assert key(config) == before
    shutil.copytree(out / "rm" / "model", out / "judge" / "model", dirs_exist_ok=True)
    assert key(config) != before, "the judge has changed"


class _Stage:
    """As much of a stage's configuration as a key needs."""

    def __init__(self, out: Path) -> None:
        self.run = self
        self.out = str(out)


# ---------------------------------------------------------------- options


def test_a_conversation_with_ratings_and_two_methods_from_the_command_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without PPO and GRPO nothing needs a learned reward, so none is trained."""
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "responses": [row["chosen"], row["rejected"], "a"],
            "ratings": [5, 1, 3],
            "group_weight": 1 + i % 2,  # rows of one file have the same columns: also where it is 1
        }
        for i, row in enumerate(own_rows(120))
    ]
    file = tiny.write_rows(tmp_path / "ratings.jsonl", rows)
    words = ["compare", "--model", str(tiny_model), f"--data={file}", "--budget", "500 tokens"]
    words += ["--methods", "dpo", "--out", str(tmp_path / "out"), "--model.dtype", "float32"]
    words += ["--max_prompts", "20", "--lr.dpo", "1e-3", "--data.limit", "115"]
    assert run(words) == 0
    printed = capsys.readouterr().out
    order = ["data: ", "split by prompt", "plan for", "judge: ", "SFT (reference)", "summary  "]
    assert [printed.index(part) for part in order] == sorted(printed.index(part) for part in order)
    last = printed.split("\n\nsummary")[0].splitlines()[-1]
    assert last.rstrip().endswith(".")
    summary = summary_of(tmp_path / "out")
    assert list(summary["methods"]) == ["sft", "dpo"]
    assert list(summary["reward_models"]) == ["judge"]
    assert "proxy_reward" not in summary["methods"]["dpo"]
    assert "head_to_head" not in summary
    assert "lr = 0.001" in (tmp_path / "out" / "dpo" / "config.toml").read_text()
    assert run(words) == 2
    assert "already holds a comparison" in capsys.readouterr().err
    assert run([*words, "--resume", "true", "--seed", "1"]) == 2
    assert "seed: the comparison in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": "sft,kto"}, "methods: 'kto' is none of sft, dpo, ppo, grpo"),
        ({"methods": "sft"}, "name one besides sft"),
        ({"methods": "dpo,dpo"}, "'dpo' is named twice"),
        ({"methods": "dpo", "lr__ppo": 1e-6}, r"lr\.ppo has no effect"),
        ({"lr__rm": 1e-6}, r"lr\.rm: is none of sft, reward, dpo, ppo, grpo"),
        ({"lr__dpo": 0}, r"lr\.dpo: give a number above 0"),
        ({"heldout_share": 0.6, "judge_share": 0.4}, "leave the methods nothing"),
        ({"budget": "30"}, "'30' is no budget"),
        ({"data__weight": 2.0}, "data.weight has no effect"),
        ({"model__path": ""}, "path is required"),
    ],
)
def test_options_that_make_no_sense(
    changed: dict[str, Any], message: str, tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        configure(tiny_model, pairs, tmp_path / "out", **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"budget": "0.1s"}, r'the smallest that would do is about .*budget = "[0-9]+s"'),
        (
            {"budget": "10 tokens"},
            r"10 tokens are less than one step.*that would do is [0-9]+ tokens",
        ),
        ({"max_new_tokens": 48}, "max_new_tokens: 48 leaves no room for a prompt in 48 tokens"),
        ({"max_tokens": 4}, r"none of the first [0-9]+ rows fits 4 tokens"),
    ],
)
def test_what_cannot_be_planned(
    changed: dict[str, Any], message: str, tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run_own_data(configure(tiny_model, pairs, tmp_path / "out", **changed))
    assert not (tmp_path / "out").exists()


def test_a_time_budget_limits_every_stage(
    tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies: list[StudyConfig] = []
    monkeypatch.setattr(own_data, "run_study", lambda study: studies.append(study) or {})
    said: list[str] = []
    run_own_data(configure(tiny_model, pairs, tmp_path / "out", budget="100s"), said.append)
    train = {name: (stage.model_extra or {})["train"] for name, stage in studies[0].stages.items()}
    limits = {name: options["time_budget_s"] for name, options in train.items()}
    assert set(limits) == {"judge", "rm", "sft", "dpo", "ppo", "grpo"}
    assert all(limit > 0 for limit in limits.values())
    assert sum(limits.values()) < 115
    budgets = {
        (studies[0].stages[n].model_extra or {})["train"]["token_budget"] for n in ("dpo", "ppo", "grpo")
    }
    assert len(budgets) == 1
    assert any("more would go through the data more than max_epochs times" in line for line in said)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The runs say nothing about threads; two runs that are compared must not differ in them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
