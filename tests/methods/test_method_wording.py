"""Whole runs on prompts in several wordings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import assert_same_run, stop_at, train

from trimtab import methods
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared import offline
from trimtab.models.load import ModelConfig, load_model

Make = Callable[..., Any]

FORMATS = ["{prompt}", "x {prompt} y", "{prompt} z"]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[Group]]:
    """What every optimiser step of a method on given feedback was taken on."""
    seen: list[list[Group]] = []
    update = offline.update

    def spy(run: Any, state: Any, groups: list[Group], *rest: Any, **more: Any) -> Any:
        seen.append(groups)
        return update(run, state, groups, *rest, **more)

    monkeypatch.setattr(offline, "update", spy)
    return seen


def test_pairs_share_a_wording_and_its_reference(
    configured: Make, batches: list[list[Group]], tiny_model: Path
) -> None:
    """Three passes over eight pairs. Against the reference of another wording rewards would not be 0."""
    _, metrics = train(configured("dpo", data__formats=FORMATS, train__steps=6, train__lr=0.0), "dpo")
    for line in metrics:
        assert line["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert abs(line["chosen_reward"]) < 1e-5
    words = [str(group.prompt) for groups in batches for group in groups]
    given = {row["prompt"] for row in tiny.pairs()}
    kinds = {f: sum(w == f.format(prompt=g) for w in words for g in given) for f in FORMATS}
    assert len(words) == 24
    assert min(kinds.values()) >= 3
    lm = load_model(ModelConfig(path=str(tiny_model)))
    for group in batches[0]:
        for response in group.responses:
            theirs = tiny.text_logps(lm.model, lm.tokenizer, str(group.prompt), str(response.text))
            assert response.ref_logps == pytest.approx(theirs.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "changed"), [("dpo", {}), ("grpo", {"grpo__overlap": True}), ("sft", {"sft__loss_on": "all"})]
)
def test_resume_is_bit_exact(name: str, changed: dict[str, Any], configured: Make) -> None:
    options = {"train__save_every": 3, "train__eval_every": 1, "data__formats": FORMATS, **changed}
    module = methods.find(name)
    straight = module.train(configured(name, out="straight", **options))
    config = configured(name, out="stopped", **options)
    with pytest.raises(KeyboardInterrupt):
        module.train(config, on_eval=stop_at(5))
    config.run.resume = True
    assert_same_run(module.train(config).out, straight.out)


def test_the_reward_sees_what_the_policy_saw(configured: Make, tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'seen')!r}, 'a').write(prompt + chr(10)); return len(response)"
    reward = tiny.write_reward(tmp_path / "rewards.py", body)
    terms = [{"name": reward, "label": "length"}]
    train(configured("grpo", data__formats=FORMATS[1:], reward__terms=terms, train__steps=4), "grpo")
    seen = set((tmp_path / "seen").read_text().splitlines())
    given = {row["prompt"] for row in tiny.prompts()}
    assert seen <= {f.format(prompt=g) for f in FORMATS[1:] for g in given}
    assert {line.endswith(" z") for line in seen} == {True, False}


def test_held_out_rows_are_read_in_the_first_wording(configured: Make, tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
        for row in tiny.prompts(40)
    ]
    file = tiny.write_rows(tmp_path / "chats.jsonl", rows)
    found: list[list[Group]] = []

    def on_eval(lm: Any, heldout: list[Group], step: int) -> dict[str, float]:
        found.append(heldout)
        return {}

    options = {
        "data__sources": [{"path": str(file)}],
        "data__heldout_fraction": 0.3,
        "data__formats": ["x {prompt}", "{prompt}"],
        "data__system_prompts": ["s", ""],
        "train__steps": 1,
    }
    train(configured("grpo", **options), "grpo", on_eval=on_eval)
    assert len(found[0]) > 3
    for group in found[0]:
        assert isinstance(group.prompt, list)
        system, asked = group.prompt
        assert system == {"role": "system", "content": "s"}
        assert str(asked["content"]).startswith("x ")


def test_epochs_count_groups_and_not_wordings(configured: Make) -> None:
    _, metrics = train(configured("dpo", data__formats=FORMATS, train__steps=0, train__epochs=2), "dpo")
    assert len(metrics) == 4


def test_text_with_system_prompts_ends_the_run_at_its_start(configured: Make) -> None:
    with pytest.raises(InputError, match=r"prompts.jsonl:0: data.system_prompts needs conversations"):
        methods.find("grpo").train(configured("grpo", data__system_prompts=["s"]))
