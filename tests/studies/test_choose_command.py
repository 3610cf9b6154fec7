"""``trimtab choose``: what a file holds, recipes that validate, and some that run."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny
from situations import SITUATIONS

from trimtab import methods
from trimtab.cli.main import run
from trimtab.config import load_config
from trimtab.errors import InputError
from trimtab.evaluation.audit.config import AuditConfig
from trimtab.planning.choosing.decide import decide
from trimtab.planning.choosing.pilot import flags, pilot
from trimtab.planning.choosing.recipe import Setting, Source, audit_recipe, recipe, several, to_fill_in
from trimtab.planning.choosing.situation import Situation
from trimtab.studies.choose_command import check, run_choose
from trimtab.studies.choose_config import ChooseConfig
from trimtab.studies.choose_data import look
from trimtab.studies.pipeline import PipelineConfig

MANY = 400


@pytest.mark.parametrize("s", [s for _, s, _, _ in SITUATIONS], ids=[s[0][:40] for s in SITUATIONS])
def test_every_recipe_validates_and_so_does_its_pilot(s: Situation, tmp_path: Path) -> None:
    choice = decide(s)
    text = recipe(choice, Setting(model="M", name="try"), "recipe.toml")
    check(choice, text)
    made = pilot(choice)
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    if several(choice):
        prefix = f"stages.{choice.method}."
        config = load_config(PipelineConfig, file, {prefix + k: str(v) for k, v in made.overrides.items()})
        assert list(config.stages) == list(choice.stages)
        check(choice, text)
    else:
        config = load_config(methods.find(choice.method).Config, file, dict(made.overrides))
        assert made.whole or config.train.steps == made.steps
    assert made.whole == ("train.steps" not in made.overrides)
    assert flags(made.overrides, "x.").count("--x.") == len(made.overrides)
    # Every value with a source stands in the file with it.
    for values in choice.hypers.values():
        for h in values:
            assert f"# {h.source}" in text, h


def test_a_recipe_without_files_says_what_to_fill_in() -> None:
    text = recipe(decide(Situation({"prompts": 8000}, verifier="yes")), Setting(), "r.toml")
    assert to_fill_in(text) == ["rewards.py:score", "MODEL", "data/prompts.jsonl"]


def test_a_recipe_with_odd_names_is_still_toml() -> None:
    sources = [Source('a "b"\\c.jsonl', "pairs", {"die Frage": "prompt"}, 3)]
    text = recipe(decide(Situation({"pairs": 20000})), Setting(sources=sources), "r.toml")
    [source] = tomllib.loads(text)["data"]["sources"]
    assert source == {"path": 'a "b"\\c.jsonl', "columns": {"die Frage": "prompt"}, "on_bad_row": "skip"}


# ---------------------------------------------------------------- what a file holds


def pair(prompt: str, better: str, worse: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": better, "rejected": worse}


def test_contradictions_give_the_share_of_wrong_labels(tmp_path: Path) -> None:
    # 100 couples judged twice, 18 of them differently: 2ε(1 − ε) = 0.18, ε = (1 − √0.64)/2 = 0.1.
    # A count of differing couples alone would say 0.18; half of it 0.09.
    rows = [pair(f"p{i}", "aa", "b") for i in range(100)]
    rows += [pair(f"p{i}", *(("b", "aa") if i < 18 else ("aa", "b"))) for i in range(100)]
    found = look([str(tiny.write_rows(tmp_path / "twice.jsonl", rows))])
    assert (found.repeats, found.contradictions) == (100, 18)
    assert found.flips == pytest.approx(0.1)
    assert found.noisy == "yes"
    assert (found.prompts, found.shared) == (100, 100)
    assert found.longer_share == pytest.approx(182 / 200)


def test_one_couple_judged_thrice_counts_three_times(tmp_path: Path) -> None:
    rows = [pair("p", "a", "b"), pair("p", "a", "b"), pair("p", "b", "a")]
    found = look([str(tiny.write_rows(tmp_path / "thrice.jsonl", rows))])
    assert (found.repeats, found.contradictions) == (3, 2)
    assert found.flips is None
    assert found.noisy == "unknown"


def test_kinds_ties_and_thumbs(tmp_path: Path) -> None:
    ranked = [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]},
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]},  # a ranking of two is a pair
        {"prompt": "r", "responses": ["a", "b"], "ranks": [1, 1]},  # a tie orders nothing
    ]
    found = look([str(tiny.write_rows(tmp_path / "ranked.jsonl", ranked))])
    assert dict(found.rows) == {"rankings": 1, "pairs": 1, "ties": 1}
    rated = [{"prompt": "p", "responses": ["a"], "ratings": [3]}]
    assert dict(look([str(tiny.write_rows(tmp_path / "rated.jsonl", rated))]).rows) == {"scores": 1}
    thumbs = [{"prompt": "p", "completion": "a", "label": i % 4 != 0} for i in range(8)]
    found = look([str(tiny.write_rows(tmp_path / "thumbs.jsonl", thumbs))])
    assert (found.ups, found.downs) == (6, 2)
    assert (found.repeats, found.contradictions) == (28, 12)  # 8·7/2, 6·2
    assert dict(look([str(tiny.write_rows(tmp_path / "s.jsonl", tiny.steps()))]).rows) == {"steps": 8}


def test_a_file_of_ties_is_no_feedback(tmp_path: Path) -> None:
    rows = [{"prompt": "r", "responses": ["a", "b"], "ranks": [1, 1]}]
    with pytest.raises(InputError, match="ties"):
        look([str(tiny.write_rows(tmp_path / "ties.jsonl", rows))])


def test_answers_name_their_verifier(tmp_path: Path) -> None:
    def verifier(rows: list[dict[str, Any]]) -> str:
        return look([str(tiny.write_rows(tmp_path / "rows.jsonl", rows))]).verifier()

    assert verifier([{"prompt": "2+2", "answer": "steps\n#### 4"}]) == "numeric"
    assert verifier([{"prompt": "who", "answer": "Ada"}]) == "exact_match"
    assert verifier([{"prompt": "write", "tests": ["assert f()"]}]) == "code"
    assert verifier([{"prompt": "who"}]) == ""


# ---------------------------------------------------------------- the command


def rows_of(kind: str, tmp_path: Path) -> Path:
    return tiny.write_rows(tmp_path / f"{kind}.jsonl", getattr(tiny, kind)(MANY))


def written(tmp_path: Path, tiny_model: Path, kind: str, *more: str) -> Path:
    file = tmp_path / "recipe.toml"
    data = str(rows_of(kind, tmp_path))
    assert run(["choose", "--model", str(tiny_model), "--data", data, "--write", str(file), *more]) == 0
    return file


def two_steps(file: Path, name: str, tmp_path: Path, **more: Any) -> Path:
    given: dict[str, Any] = {
        "train.steps": 2,
        "train.batch_groups": 4,
        "train.warmup_steps": 0,
        "train.eval_every": 0,
    }
    given |= {"train.threads": 1, "model.dtype": "float32", "data.heldout_fraction": 0.0, **more}
    config = load_config(methods.find(name).Config, file, {"run.out": str(tmp_path / "run"), **given})
    result, metrics = tiny.train(config, name)
    assert [line["step"] for line in metrics][-1] == 2
    return result.out


def test_pairs_are_read_and_the_recipe_runs(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, tiny_model, "pairs")
    told = capsys.readouterr().out
    assert told.startswith("DPO\n")
    assert "read 400 rows: 400 pairs" in told
    assert "Runner-up: ipo" in told
    assert max(len(line) for line in told.splitlines() if "/" not in line) < 80  # paths stay whole
    values = tomllib.loads(file.read_text())
    # 194 of 400 rows are held out, and a model this small takes our own rule, not the paper's 1e-6.
    assert values["data"]["heldout_fraction"] == 0.49
    assert values["train"]["lr"] > 1e-4
    assert (two_steps(file, "dpo", tmp_path) / "model").is_dir()


def test_a_verifier_of_the_users_own_runs(tmp_path: Path, tiny_model: Path) -> None:
    reward = tiny.write_reward(tmp_path / "rewards.py", "return float(response.count('a'))")
    file = written(tmp_path, tiny_model, "prompts", "--verifier", reward, "--max-new-tokens", "6")
    two_steps(file, "grpo", tmp_path)
    values = tomllib.loads(file.read_text())
    assert values["reward"]["terms"] == [{"name": reward}]
    assert values["sampling"]["max_new_tokens"] == 6


def test_a_pipeline_with_a_reward_model_and_its_audit(tmp_path: Path, tiny_model: Path) -> None:
    options = ("--exploration", "--max-new-tokens", "6")
    values = tomllib.loads(written(tmp_path, tiny_model, "pairs", *options).read_text())
    assert list(values["stages"]) == ["reward", "ppo"]
    audit = load_config(AuditConfig, tmp_path / "recipe-audit.toml")
    assert audit.heldout_fraction == values["stages"]["reward"]["data"]["heldout_fraction"] == 0.49
    assert audit.reward is not None
    # The pilot's folder: that of the whole run is not there yet when the audit is run.
    assert audit.reward.terms[0].args["path"] == "runs/recipe-pilot/reward/model"


def test_json_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["choose", "--have", "pairs:60k", "--exploration", "yes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["method"], told["runner_up"], told["stages"]) == ("ppo", "rloo", ["reward", "ppo"])
    assert {v["key"] for v in told["values"]["ppo"]} >= {"ppo.beta", "train.lr", "sampling.max_new_tokens"}
    check(decide(Situation({"pairs": 60_000}, exploration="yes")), told["recipe"])


def test_what_does_not_fit_gets_an_adapter() -> None:
    def plan(memory: str) -> Any:
        config = ChooseConfig(model="Qwen/Qwen2.5-0.5B", have="pairs:20k", memory=memory)
        return run_choose(config)

    roomy, tight = plan("64GiB"), plan("5GiB")
    assert "adapter.kind" not in [h.key for h in roomy.choice.hypers["dpo"]]
    values = {h.key: h.value for h in tight.choice.hypers["dpo"]}
    assert values["adapter.kind"] == "lora"
    assert values["train.lr"] == pytest.approx(1e-5)  # ten times 1e-6
    assert tight.fit.plan is not None
    assert tight.fit.plan.fits
    assert "does not fit" in plan("64MiB").fit.line


def test_time_is_shared_out() -> None:
    told = run_choose(ChooseConfig(have="pairs:60k", exploration="yes", time="2h"))
    budgets = {
        stage: next(h.value for h in values if h.key == "train.time_budget_s")
        for stage, values in told.choice.hypers.items()
    }
    assert budgets == {"reward": 3600, "ppo": 3600}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing is given"),
        (["--have", "pairs:20k", "--data", "x.jsonl"], "give one of them"),
        (["--have", "pairs:20k", "--memory", "24GiB"], "no effect without model"),
        (["--have", "pairs:20k", "--verifier", "numerik"], "did you mean 'numeric'"),
        (["--have", "pairs:20k", "--noisy", "0.7"], "less than 0.5"),
        (["--have", "pairs:20k", "--time", "100 tokens"], "is no time"),
        (["--have", "pairs:20k", "--exploration", "maybe"], "'yes', 'no' or 'unknown'"),
        (["--have", "pairs:20k", "--model", "./nothere"], "no such"),
        (["--have", "pairs:20k", "--model", "gpt2", "--device", "h1000"], "H100"),
        (["--have", "pairs:20k", "--model", "gpt2", "--max-new-tokens", "5000"], "no room for a prompt"),
        (["--data", "nothere.jsonl"], "no such file"),
        (["--data", "x.jsonl", "--columns", "a"], "YOURS=OURS"),
        (["--have", "pairs:20k", "--devices", "0"], "greater than or equal to 1"),
        (["--have", "prompts:2k", "--judge", "foo"], "is no judge"),
        (["--have", "prompts:2k", "--verifier", "exact_match:x"], "is no verifier"),
        (["--have", "prompts:2k", "--have", "prompts:3k", "--verifier", "math"], "twice"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(["choose", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_prompts_with_answers_ask_for_the_verifier(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(50)]
    file = str(tiny.write_rows(tmp_path / "q.jsonl", rows))
    with pytest.raises(InputError, match="--verifier numeric"):
        run_choose(ChooseConfig(data=[file]))
    assert run_choose(ChooseConfig(data=[file], verifier="yes")).choice.situation.verifier == "numeric"


def test_a_verifier_needs_its_column(tmp_path: Path) -> None:
    pairs = str(rows_of("pairs", tmp_path))
    for verifier in ("numeric", "math", "exact_match"):
        with pytest.raises(InputError, match="none of the rows has a column answer or reference"):
            run_choose(ChooseConfig(data=[pairs], verifier=verifier))
    with pytest.raises(InputError, match=r"none of the rows has unit tests.* prompt, chosen, rejected"):
        run_choose(ChooseConfig(data=[pairs], verifier="code"))
    words = [{"prompt": f"who {i}", "answer": "Ada"} for i in range(20)]
    file = str(tiny.write_rows(tmp_path / "words.jsonl", words))
    with pytest.raises(InputError, match="none of the rows' answers is a number"):
        run_choose(ChooseConfig(data=[file], verifier="numeric"))
    assert run_choose(ChooseConfig(data=[file], verifier="exact_match")).choice.method == "grpo"
    mixed = [*words, {"prompt": "no answer", "answer": ""}]
    file = str(tiny.write_rows(tmp_path / "mixed.jsonl", mixed))
    told = run_choose(ChooseConfig(data=[file], verifier="exact_match")).warnings
    assert any("only 20 of 21 rows" in text for text in told)


def test_columns_that_make_no_format_are_named(tmp_path: Path) -> None:
    rows = [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(20)]
    file = str(tiny.write_rows(tmp_path / "q.jsonl", rows))
    with pytest.raises(InputError, match=r"columns are question, answer.*--columns question=prompt"):
        run_choose(ChooseConfig(data=[file]))
    with pytest.raises(InputError, match="--columns answer=completion"):
        run_choose(ChooseConfig(data=[file], columns={"question": "prompt"}))
    tests = [{"prompt": "write", "test": "assert f()", "entry_point": "f", "canonical_solution": "1"}] * 20
    file = str(tiny.write_rows(tmp_path / "t.jsonl", tests))
    with pytest.raises(InputError, match=r"--verifier code; .*--columns canonical_solution=completion"):
        run_choose(ChooseConfig(data=[file]))
    bare = [{"prompt": "write", "tests": ["assert f()"]}] * 20
    file = str(tiny.write_rows(tmp_path / "b.jsonl", bare))
    with pytest.raises(InputError, match=r"--verifier code$"):
        run_choose(ChooseConfig(data=[file]))


def test_amounts_in_several_options_are_joined(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["choose", "--have", "pairs:5k", "--have", "thumbs:6k", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["method"], told["runner_up"]) == ("dpo", "kto")  # the last alone: kto, then dpo


def test_all_devices_are_planned_for_and_the_plan_is_told_which() -> None:
    def choose(**more: Any) -> Any:
        return run_choose(ChooseConfig(model="Qwen/Qwen2.5-0.5B", have="pairs:20k", **more))

    one, eight = choose(memory="24GiB"), choose(memory="24GiB", devices=8)
    # In 10 GiB half a billion weights are sharded, as the run would.
    short = {"memory": "10GiB", "device": "H100"}
    assert choose(**short, devices=8).fit.plan.memory.peak < choose(**short).fit.plan.memory.peak
    assert "on each of 8 devices" in eight.fit.line
    assert any("which torchrun starts" in text for text in eight.warnings)
    assert not any("torchrun" in text for text in one.warnings)
    assert one.commands[0] == "trimtab plan dpo recipe.toml --memory 24GiB"
    assert eight.commands[0] == "trimtab plan dpo recipe.toml --memory 24GiB --devices 8"
    # No more devices than groups: the plan that is printed must not be refused.
    many = choose(memory="24GiB", devices=500).commands[0].rpartition(" ")[2]
    assert int(many) < 500
    assert choose(device="H100").commands[0] == "trimtab plan dpo recipe.toml --device H100"
    assert "devices" not in choose(memory="64MiB").fit.line


SHORT = {"batch_groups": 4, "steps": 1, "eval_every": 0, "threads": 1, "warmup_steps": 0}


@pytest.mark.parametrize("goal", ["policy", "reward"])
def test_the_printed_commands_run_in_their_order(
    goal: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(tiny.write_rows(tmp_path / "p.jsonl", tiny.pairs(900)))
    asked = {"exploration": "yes"} if goal == "policy" else {"goal": "reward"}
    asked |= {"max_new_tokens": "4", "memory": "8GiB", "write": "r.toml"}
    told = run_choose(load_config(ChooseConfig, None, {"model": str(tiny_model), "data": [data], **asked}))
    stages = [f"stages.{name}." for name in told.choice.stages] if goal == "policy" else [""]
    short = [f"--{stage}train.{key}={value}" for stage in stages for key, value in SHORT.items()]
    names = [line.split()[1] for line in told.commands]
    expected = ["pipeline", "audit", "eval", "pipeline"]
    assert names == (expected if goal == "policy" else ["plan", "reward", "audit", "reward"])
    for line in told.commands:
        words = line.split()[1:]
        more = {"audit": ["--probes.prompts=4"], "eval": ["--limit=4"]}.get(words[0], [])
        given = words + (short if words[0] in ("pipeline", "reward") else more)
        assert run(given) == 0, line
    assert Path("runs/r/ppo/model" if goal == "policy" else "runs/r/model").is_dir()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("mine")
    with pytest.raises(InputError, match="there already"):
        run_choose(ChooseConfig(have="pairs:20k", write=str(file)))
    assert file.read_text() == "mine"


def test_no_audit_without_comparisons() -> None:
    assert audit_recipe(decide(Situation({"scores": 20_000})), Setting(), "runs/x") == ""
