"""Studies with reward models: the judge, the learned reward, and what may not be claimed with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from trimtab.cli.main import run
from trimtab.config import dump_toml, load_config
from trimtab.errors import InputError
from trimtab.evaluation.verdict import one_sentence
from trimtab.studies.compare import StudyConfig, run_study

JUDGE = {"terms": [{"name": "reward_model", "label": "judge", "args": {"path": "{out}/judge/model"}}]}


def study(model: Path, data: Path, out: Path, **changed: Any) -> StudyConfig:
    """A judge, SFT, and GRPO that answers the same prompts."""

    def stage(name: str, file: str, lr: float, **more: Any) -> dict[str, Any]:
        train = {"steps": 4, "batch_groups": 4, "lr": lr, "threads": 1}
        return {
            "method": name,
            "data": {"sources": [{"path": str(data / f"{file}.jsonl")}]},
            "train": train,
            **more,
        }

    sampled = {"sampling": {"max_new_tokens": 5}, "grpo": {"group_size": 4}}
    values = {
        "out": str(out),
        "model": {"path": str(model), "dtype": "float32"},
        "stages": {
            "judge": stage("reward", "pairs", 0.05),
            "sft": stage("sft", "demonstrations", 0.02),
            "grpo": stage("grpo", "prompts", 0.05, start="sft", reward=JUDGE, **sampled),
        },
        "evaluation": {
            "prompts": [{"path": str(data / "prompts.jsonl")}],
            "pairs": [{"path": str(data / "pairs.jsonl")}],
            "reward": JUDGE,
            "proxy": {"terms": [{"name": f"{data / 'rewards.py'}:score", "label": "vowels"}]},
            "judge_stage": "judge",
            "sampling": {"max_new_tokens": 5},
            "samples": 2,
        },
    }
    return load_config(StudyConfig, None, values | {k.replace("__", "."): v for k, v in changed.items()})


def constant(folder: Path) -> dict[str, Any]:
    """A reward that tells nothing apart."""
    return {"terms": [{"name": tiny.write_reward(folder / "constant.py", "return 1.0")}]}


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    # Its reward's folder does not exist when the configurations are checked; that may not fail early.
    changed = {
        "stages__grpo__sees_judge": True,
        "stages__grpo__train": {"steps": 60, "batch_groups": 4, "lr": 0.02, "threads": 1},
        "stages__grpo__grpo": {"group_size": 8, "beta": 0.0},
        # Eight prompts show no difference, however large it is.
        "evaluation__prompts": [{"path": str(tiny.write_rows(folder / "more.jsonl", tiny.prompts(40)))}],
    }
    run_study(study(tiny_model, tiny_data, folder / "out", **changed))
    return folder / "out"


def test_a_reward_model_is_no_row_but_is_measured(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary["methods"]) == ["sft", "grpo"]
    judge = summary["reward_models"]["judge"]
    assert summary["judge"] == judge
    assert judge["pairs"] == 8
    assert 0 <= judge["accuracy_ci95"][0] <= judge["accuracy"] <= judge["accuracy_ci95"][1] <= 1
    assert judge["gradient_steps"] == 4
    assert judge["feedback_items"] == 8
    assert judge["optimiser_tokens"] > 50
    assert summary["score_name"] == "Gold reward"
    for name, row in summary["methods"].items():
        # Two rewards of the same answers: vowels are a share, the judge's score is no such thing.
        assert 0 <= row["proxy_reward"] <= 1
        assert row["gold_reward"] != row["proxy_reward"]
        assert row["sees_judge"] == (name == "grpo")


def test_a_method_that_sees_the_judge_never_wins(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    low, _ = summary["methods"]["grpo"]["win_rate_ci95"]
    assert low > 0.5, "the test needs a win that must not be claimed"
    # As if the judge were good: whether it is, is not the question here.
    summary["judge"] = {"accuracy": 0.9, "accuracy_ci95": [0.8, 0.95], "pairs": 100}
    sentence = one_sentence(summary)
    assert not sentence.startswith("GRPO")
    assert "beats" not in sentence
    summary["methods"]["grpo"]["sees_judge"] = False
    assert one_sentence(summary).startswith("GRPO beats SFT")


def test_a_judge_no_better_than_chance_shows_nothing(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {"stages__judge__train__lr": 0.0, "stages__grpo__train__steps": 20}
    config = study(tiny_model, tiny_data, tmp_path / "out", **changed)
    file = tmp_path / "study.toml"
    file.write_text(dump_toml(config))
    assert run(["compare", str(file)]) == 0
    printed, errors = capsys.readouterr()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    low, high = summary["judge"]["accuracy_ci95"]
    assert low < 0.5 < high, "the test needs a judge at chance"
    assert "judge is not shown to be better than chance" in errors, "not said as soon as it was known"
    said = " ".join(printed.split())
    assert "Nothing is shown" in said
    assert not any(claim in said for claim in ("beats", "loses to", "no difference shown", "Highest"))
    assert said.index("judge: ") < said.index("SFT (reference)"), "the judge's quality comes first"


def test_equal_rewards_are_noted_and_tell_nothing_apart(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    same = constant(tmp_path)
    changed = {"stages__grpo__reward": same, "evaluation__reward": same, "evaluation__proxy": None}
    changed |= {"evaluation__judge_stage": ""}
    summary = run_study(study(tiny_model, tiny_data, tmp_path / "out", **changed))
    row = summary["methods"]["grpo"]
    assert row["gold_reward"] == 1.0
    assert row["win_rate"] == 0.5
    assert "proxy_reward" not in row
    assert "judge" not in summary
    assert len(summary["notes"]) == 2
    assert "GRPO: in 100 % of its groups all responses got the same reward" in summary["notes"][0]
    assert "Gold reward is 1 for every answer" in summary["notes"][1]
    assert one_sentence(summary).startswith("No difference shown")


def test_a_stage_that_ran_out_of_time_is_noted(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Its tokens are then not those of the others."""
    changed = {
        "stages__grpo__train__steps": 0,
        "stages__grpo__train__token_budget": 100_000,
        "stages__grpo__train__time_budget_s": 0.2,
        "stages__grpo__reward": constant(tmp_path),
    }
    summary = run_study(study(tiny_model, tiny_data, tmp_path / "out", **changed))
    assert any(
        line.startswith("GRPO was stopped by its time limit after ") and "100,000 optimiser tokens" in line
        for line in summary["notes"]
    )
    assert summary["methods"]["grpo"]["optimiser_tokens"] < 100_000


def test_answers_without_a_score_are_counted_and_not_taken_for_zero(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    body = "return 5.0 if len(response) > 4 else None"
    reward = {"terms": [{"name": tiny.write_reward(tmp_path / "some.py", body)}], "on_error": "skip"}
    changed = {"evaluation__reward": reward, "evaluation__judge_stage": "", "evaluation__proxy": None}
    changed |= {"stages__grpo__reward": constant(tmp_path)}
    summary = run_study(study(tiny_model, tiny_data, tmp_path / "out", **changed))
    rows = summary["methods"]
    assert 0 < rows["sft"]["unscored"] < 16
    assert rows["sft"]["gold_reward"] == 5.0, "an unscored answer was counted as 0"
    assert any("answers could not be scored" in note for note in summary["notes"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"stages__grpo__start": "judge"},
            "'judge' is a reward model, no policy; a critic may",
        ),
        ({"evaluation__reference": "judge"}, "evaluation.reference: 'judge' is a reward model"),
        ({"evaluation__judge_stage": "sft"}, "'sft' is no stage of method reward"),
        ({"evaluation__pairs": []}, "judge_stage needs"),
        ({"evaluation__prompts": []}, "evaluation.proxy has no effect"),
        ({"stages__judge__sees_judge": True}, "sees_judge has no effect on a reward model"),
    ],
)
def test_studies_that_make_no_sense(
    changed: dict[str, Any], message: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        study(tiny_model, tiny_data, tmp_path / "out", **changed)


def test_a_study_file_with_any_names_reads_back(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = study(tiny_model, tiny_data, tmp_path / "out")
    grpo = config.stages.pop("grpo")
    named = config.model_dump() | {"stages": {**config.stages, 'grpo 2.0 "x"': grpo.model_dump()}}
    named = load_config(StudyConfig, None, named)
    from trimtab.studies.config import study_file

    (tmp_path / "study.toml").write_text(study_file(named))
    again = load_config(StudyConfig, tmp_path / "study.toml")
    assert again == named
