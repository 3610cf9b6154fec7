"""What is measured while a run trains, on the tiny world: early stops, the best weights, static prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import assert_same_run
from transformers import AutoModelForCausalLM

from trimtab import methods
from trimtab.cli.main import run as command
from trimtab.config import dump_toml
from trimtab.errors import InputError
from trimtab.evaluation.safety.refusals import Found, Verdict
from trimtab.evaluation.watching import static_prompts, static_suites
from trimtab.evaluation.watching.during import heldout_evaluation
from trimtab.groups import Group
from trimtab.registry.ancestry import read_lineage
from trimtab.registry.scores import scores
from trimtab.studies.verify import verify
from trimtab.training.metrics import read_metrics

Make = Callable[..., Any]

RISE_AND_FALL = [0.5, 0.6, 0.8, 0.7, 0.75, 0.9, 0.1]
STOPS = {
    "train__eval_every": 1,
    "train__schedule": "constant",
    "watch__stop_metric": "eval_accuracy",
    "watch__patience": 2,
    "watch__restore_best": True,
}


def scripted(values: list[float], stop: int | None = None) -> Callable[..., dict[str, float]]:
    """An ``on_eval`` whose accuracy is given by step; at step ``stop`` it ends the run as Ctrl-C does."""

    def on_eval(lm: object, heldout: object, step: int) -> dict[str, float]:
        if step == stop:
            raise KeyboardInterrupt
        return {"eval_accuracy": values[step]}

    return on_eval


def weights(out: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Of ``model/``, or of the masters of a step's checkpoint."""
    if step is None:
        return load_file(out / "model" / "model.safetensors")
    found = load_file(out / f"checkpoints/step-{step:08d}/tensors.safetensors")
    return {k.removeprefix("master."): v for k, v in found.items() if k.startswith("master.")}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# ---------------------------------------------------------------- ends, and which weights are kept


def test_a_metric_that_rises_and_falls(configured: Make) -> None:
    """The best is step 2, the end comes after step 4; the model is the one that two steps make."""
    config = configured("sft", train__keep_checkpoints=1, **STOPS)
    result = methods.find("sft").train(config, on_eval=scripted(RISE_AND_FALL))
    assert [m["step"] for m in read_metrics(result.out / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert [p.name for p in sorted((result.out / "checkpoints").iterdir())] == [
        "step-00000002",
        "step-00000004",
    ]
    two = methods.find("sft").train(configured("sft", out="two", train__steps=2, train__schedule="constant"))
    assert same(weights(result.out), weights(two.out))
    assert not same(weights(result.out), weights(result.out, 4)), "step 4 was meant to be another model"
    # The model in memory is the same one, in its compute weights too.
    assert all(
        torch.equal(p, dict(two.lm.model.named_parameters())[n])
        for n, p in result.lm.model.named_parameters()
    )
    assert (result.state.step, result.model_step) == (4, 2)
    assert result.stopped == "eval_accuracy was not better than 0.8 in 2 evaluations (watch.patience)"
    lineage = read_lineage(result.out)
    assert (lineage["status"], lineage["steps"], lineage["model_step"]) == ("finished", 4, 2)
    assert lineage["stopped_early"] == result.stopped
    assert lineage["best"] == {"metric": "eval_accuracy", "step": 2, "value": 0.8}
    assert lineage["scores"]["eval"] == {"eval_accuracy": 0.8}, "what is said of the model is of the model"
    assert f"stopped after step 4: {result.stopped}" in lineage["lines"]
    assert "model/ is that of step 2, the best: eval_accuracy 0.8" in lineage["lines"]


@pytest.mark.parametrize(("name", "stop"), [("dpo", 1), ("grpo", 3), ("ppo", 4)])
def test_a_resumed_run_stops_where_it_would_have_and_keeps_the_same(
    name: str, stop: int, configured: Make
) -> None:
    options = {**STOPS, "train__save_every": 2, "train__batch_groups": 2}
    if name != "dpo":
        options[f"{name}__overlap"] = True
    straight = methods.find(name).train(
        configured(name, out="straight", **options), on_eval=scripted(RISE_AND_FALL)
    )
    with pytest.raises(KeyboardInterrupt):
        methods.find(name).train(configured(name, **options), on_eval=scripted(RISE_AND_FALL, stop))
    result = methods.find(name).train(
        configured(name, run__resume=True, **options), on_eval=scripted(RISE_AND_FALL)
    )
    assert_same_run(straight.out, result.out)
    assert same(weights(result.out), weights(result.out, 2))
    assert result.stopped == straight.stopped != ""
    states = [tiny.saved_state(r.out, 4)["controllers"] for r in (straight, result)]
    assert states[0] == states[1]
    if name == "ppo":
        return
    # Once more, finished as it is: nothing moves.
    again = methods.find(name).train(
        configured(name, run__resume=True, **options), on_eval=scripted(RISE_AND_FALL)
    )
    assert (again.state.step, again.stopped) == (4, straight.stopped)
    assert_same_run(straight.out, again.out)


def test_a_run_that_only_gets_worse_ends_as_what_it_began_with(configured: Make, tiny_model: Path) -> None:
    config = configured("sft", train__keep_checkpoints=1, **STOPS)
    result = methods.find("sft").train(config, on_eval=scripted([0.9, 0.5, 0.4]))
    assert (result.state.step, result.model_step) == (2, 0)
    assert same(weights(result.out), load_file(tiny_model / "model.safetensors"))


def test_with_more_patience_a_run_that_had_ended_goes_on(configured: Make) -> None:
    methods.find("sft").train(configured("sft", **STOPS), on_eval=scripted(RISE_AND_FALL))
    options = {**STOPS, "watch__patience": 3, "run__resume": True}
    result = methods.find("sft").train(configured("sft", **options), on_eval=scripted(RISE_AND_FALL))
    straight = methods.find("sft").train(
        configured("sft", out="straight", **STOPS | {"watch__patience": 3}), on_eval=scripted(RISE_AND_FALL)
    )
    assert (result.state.step, result.model_step, result.stopped) == (6, 5, "")
    assert_same_run(straight.out, result.out)


def test_a_best_checkpoint_that_is_damaged_is_said_and_the_last_weights_stay(configured: Make) -> None:
    values = scripted(RISE_AND_FALL)
    # Not in the background: step 2 has to be on the disk when it is damaged.
    config = configured("sft", **STOPS, train__save_in_background=False)

    def on_eval(lm: object, heldout: object, step: int) -> dict[str, float]:
        if step == 4:
            (Path(config.run.out) / "checkpoints/step-00000002/tensors.safetensors").write_bytes(b"")
        return values(lm, heldout, step)

    result = methods.find("sft").train(config, on_eval=on_eval)
    assert result.model_step == 4
    assert same(weights(result.out), weights(result.out, 4))
    [line] = [line for line in read_lineage(result.out)["lines"] if "cannot be taken" in line]
    assert line.endswith("(tensors.safetensors: 0 of 30,184 bytes): model/ is that of the last step, 4") or (
        "tensors.safetensors: 0 of " in line
    )


def test_the_critic_is_that_of_the_best_step_too(configured: Make) -> None:
    options = {**STOPS, "critic__save": True, "train__batch_groups": 2}
    result = methods.find("ppo").train(configured("ppo", **options), on_eval=scripted(RISE_AND_FALL))
    saved = load_file(result.out / "checkpoints/step-00000002/tensors.safetensors")
    critic = load_file(result.out / "critic" / "model.safetensors")
    assert torch.equal(critic["score.weight"], saved["critic/master.score.weight"])


def test_a_reward_model_is_calibrated_as_the_best_one(configured: Make) -> None:
    """The temperature is fitted after training: on the weights that are kept, not on those of the end."""
    common: dict[str, Any] = {"data__heldout_fraction": 0.5, "reward_model__calibrate": True}
    common |= {"train__schedule": "constant", "train__lr": 0.05}
    options = {**STOPS, **common}
    best = methods.find("reward").train(configured("reward", **options), on_eval=scripted(RISE_AND_FALL))
    two = methods.find("reward").train(configured("reward", out="two", train__steps=2, **common))
    assert best.model_step == 2
    assert (best.out / "model/reward.json").read_text() == (two.out / "model/reward.json").read_text()


def test_a_ceiling_on_the_kl(configured: Make) -> None:
    """GRPO's own, of its rollouts; DPO has none without static prompts, and says so at its first step."""
    free = tiny.train(configured("grpo", out="free"), "grpo")[1]
    over = next(m for m in free if m["kl"] > 0)
    assert over["step"] < 6
    result, metrics = tiny.train(configured("grpo", watch__max_kl=over["kl"] / 2), "grpo")
    assert [m["step"] for m in metrics] == list(range(1, over["step"] + 1))
    assert result.stopped.startswith(f"the KL of {over['kl']:.4g} nats per token is above watch.max_kl")
    with pytest.raises(InputError, match="no metric is called kl or eval_kl"):
        methods.find("dpo").train(configured("dpo", watch__max_kl=0.1))


def test_a_metric_that_is_not_there_ends_the_run_at_its_first_evaluation(configured: Make) -> None:
    options = {
        "data__heldout_fraction": 0.3,
        "watch__stop_metric": "eval_reward",
        "watch__restore_best": True,
    }
    config = configured("dpo", **options)
    with pytest.raises(InputError, match="eval_reward: there are eval_accuracy_implicit_reward, "):
        methods.find("dpo").train(config, on_eval=heldout_evaluation(config))
    assert not list((Path(config.run.out) / "checkpoints").iterdir())


# ---------------------------------------------------------------- static prompts


@pytest.fixture
def watched(configured: Make, tiny_data: Path) -> Make:
    """``configured`` with static prompts, evaluated every second step."""

    def make(name: str, out: str = "", **changed: Any) -> Any:
        options = {
            "train__eval_every": 2,
            "watch__prompts": [{"path": str(tiny_data / "prompts.jsonl")}],
            "watch__sampling": {"max_new_tokens": 6},
            "watch__reward": {"terms": [{"name": f"{tiny_data / 'rewards.py'}:score", "label": "vowels"}]},
        }
        if changed.pop("bare", False):
            options = {"train__eval_every": 2}
        return configured(name, out=out, **{**options, **changed})

    return make


def evaluated(config: Any, name: str) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    """A run with its evaluation: its folder, the evaluations, the lines of samples.jsonl."""
    result, metrics = tiny.train(config, name, on_eval=heldout_evaluation(config))
    file = result.out / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return result.out, [m for m in metrics if any(k.startswith("eval_") for k in m)], rows


def test_static_prompts_of_a_dpo_run(watched: Make, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[Group]] = {}
    own = static_prompts.rows_of

    def rows_of(step: int, groups: list[Group]) -> Any:
        seen[step] = groups
        return own(step, groups)

    monkeypatch.setattr(static_prompts, "rows_of", rows_of)
    config = watched("dpo", train__lr=0.02)
    out, metrics, rows = evaluated(config, "dpo")
    assert [m["step"] for m in metrics] == [0, 2, 4, 6]
    assert [(row["step"], row["id"]) for row in rows[:2]] == [(0, "prompts.jsonl:0"), (0, "prompts.jsonl:1")]
    assert len(rows) == 4 * 8
    first, last = metrics[0], metrics[-1]
    # The policy is the reference still: the KL is 0 and every answer ties with itself.
    assert (first["eval_kl"], first["eval_kl_sequence"], first["eval_win_rate"]) == (0.0, 0.0, 0.5)
    begun, ended = ([row for row in rows if row["step"] == step] for step in (0, 6))
    assert last["eval_response_tokens"] == sum(row["tokens"] for row in ended) / 8
    assert last["eval_cut_off"] == sum(row["finish"] == "length" for row in ended) / 8
    assert last["eval_reward"] == pytest.approx(sum(row["reward"] for row in ended) / 8)
    won = [
        (a["reward"] > b["reward"]) + 0.5 * (a["reward"] == b["reward"])
        for a, b in zip(ended, begun, strict=True)
    ]
    assert last["eval_win_rate"] == sum(won) / 8
    assert last["eval_win_rate_low"] <= last["eval_win_rate"] <= last["eval_win_rate_high"]

    # KL and entropy by two ordinary models, response by response, over the whole vocabulary.
    ours = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    base = AutoModelForCausalLM.from_pretrained(config.model.path).eval()
    kls, entropies, sums = [], [], []
    for group in seen[6]:
        [response] = group.responses
        ids = torch.tensor([[*(group.prompt_tokens or []), *(response.tokens or [])]])
        with torch.no_grad():
            p, q = (
                m(ids).logits[0, -1 - len(response.tokens or []) : -1].double().log_softmax(-1)
                for m in (ours, base)
            )
        kl = (p.exp() * (p - q)).sum(-1)
        kls += kl.tolist()
        sums.append(float(kl.sum()))
        entropies += (-(p.exp() * p).sum(-1)).tolist()
    assert last["eval_kl"] > 0.01
    assert last["eval_kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert last["eval_kl_sequence"] == pytest.approx(sum(sums) / 8, rel=1e-4)
    assert last["eval_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


RESUMED: list[tuple[str, dict[str, Any]]] = [
    ("dpo", {"model__dtype": "bfloat16", "watch__kl": False}),
    ("sft", {"adapter__kind": "lora", "adapter__rank": 2, "train__lr": 0.1}),
    ("grpo", {"grpo__overlap": True, "watch__samples": 2}),
]


@pytest.mark.parametrize(("name", "changed"), RESUMED)
def test_a_resumed_run_measures_the_same(name: str, changed: dict[str, Any], watched: Make) -> None:
    """Also the win rate, whose other side was answered in a sitting that has ended."""
    options = {"train__save_every": 3, **changed}
    straight, metrics, rows = evaluated(watched(name, out="straight", **options), name)
    config = watched(name, **options)
    evaluate = heldout_evaluation(config)

    def interrupted(lm: Any, heldout: Any, step: int) -> dict[str, float]:
        found = evaluate(lm, heldout, step)  # its samples are written, its metrics are not
        if step == 4:
            raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        methods.find(name).train(config, on_eval=interrupted)
    out, again, samples = evaluated(watched(name, run__resume=True, **options), name)
    assert tiny.comparable(again) == tiny.comparable(metrics)
    assert samples == rows
    if "adapter__kind" not in changed:
        assert_same_run(straight, out)
    rates = [m["eval_win_rate"] for m in metrics]
    assert rates[0] == 0.5
    assert set(rates) != {0.5}, "nothing was shown by answers that never change"
    if changed.get("watch__kl", True):
        assert metrics[0]["eval_kl"] == 0.0
        assert metrics[-1]["eval_kl"] > 0
    else:
        assert "eval_kl" not in metrics[-1]


def test_an_adapter_that_goes_on_is_held_against_itself_as_it_was(watched: Make) -> None:
    adapter = {"adapter__kind": "lora", "adapter__rank": 2, "train__lr": 0.1}
    first, _, _ = evaluated(watched("sft", out="first", **adapter), "sft")
    _, metrics, _ = evaluated(watched("sft", model__path=str(first / "model"), **adapter), "sft")
    # Against the base it would be far from 0 at once.
    assert metrics[0]["eval_kl"] == 0.0
    assert metrics[-1]["eval_kl"] > 0
    named = watched(
        "sft", out="named", model__path=str(first / "model"), watch__reference=str(first / "model"), **adapter
    )
    _, metrics, _ = evaluated(named, "sft")
    assert metrics[0]["eval_kl"] == pytest.approx(0.0, abs=1e-6)


def test_a_named_reference_answers_too(watched: Make, tmp_path: Path) -> None:
    other = tiny.save_model(tmp_path / "other", seed=7)
    longer = {"terms": [{"name": tiny.write_reward(tmp_path / "longer.py", "return float(len(response))")}]}
    _, metrics, _ = evaluated(watched("dpo", watch__reference=str(other), watch__reward=longer), "dpo")
    assert metrics[0]["eval_kl"] > 0.1
    assert metrics[0]["eval_win_rate"] != 0.5


def test_a_judge_decides_the_win_rate(watched: Make, tmp_path: Path, tiny_data: Path) -> None:
    """A judge who always prefers the longer answer, against a reward that says otherwise."""
    longer = tiny.write_reward(tmp_path / "longer.py", "return float(len(response))")
    judge = {"kind": "function", "name": longer}
    _, metrics, rows = evaluated(watched("dpo", watch__judge=judge, train__lr=0.02), "dpo")
    begun, ended = ([len(r["answer"]) for r in rows if r["step"] == step] for step in (0, 6))
    won = [(a > b) + 0.5 * (a == b) for a, b in zip(ended, begun, strict=True)]
    assert metrics[0]["eval_win_rate"] == 0.5
    assert metrics[-1]["eval_win_rate"] == sum(won) / 8
    assert "eval_reward" in metrics[-1]


def test_held_out_prompts_are_answered_where_that_is_asked_for(watched: Make) -> None:
    options = {"data__heldout_fraction": 0.5, "watch__heldout": True, "watch__limit": 3}
    _, metrics, rows = evaluated(
        watched("dpo", bare=True, watch__sampling={"max_new_tokens": 4}, **options), "dpo"
    )
    assert "eval_accuracy_implicit_reward" in metrics[0]
    assert "eval_reward" not in metrics[0]
    assert "eval_win_rate" not in metrics[0], "without a reward or a judge nobody wins"
    assert len({row["id"] for row in rows}) == 3
    assert all(row["reward"] is None for row in rows)
    # A sampling method answers what it draws with, and once: not by the evaluation that it has anyway.
    _, metrics, rows = evaluated(watched("grpo", bare=True, **options), "grpo")
    assert metrics[0].keys() >= {"eval_reward", "eval_kl", "eval_win_rate"}
    assert max(row["tokens"] for row in rows) <= 6
    assert len(rows) == 4 * 3


def test_answers_without_a_reward_are_counted(watched: Make, tmp_path: Path) -> None:
    name = tiny.write_reward(tmp_path / "none.py", "raise ValueError('cannot say')")
    config = watched("dpo", watch__reward={"terms": [{"name": name}], "on_error": "skip"})
    _, metrics, _ = evaluated(config, "dpo")
    assert metrics[-1]["eval_unscored"] == 8
    assert metrics[-1]["eval_reward"] is None
    assert metrics[-1]["eval_win_rate"] is None


def test_win_rate_stops_and_restores(watched: Make) -> None:
    """The whole of it together: static prompts, their win rate, an early end, the best weights, verified."""
    options = {"watch__stop_metric": "eval_win_rate", "watch__patience": 1, "watch__restore_best": True}
    config = watched("grpo", train__eval_every=1, train__steps=12, train__lr=0.05, **options)
    result, metrics = tiny.train(config, "grpo", on_eval=heldout_evaluation(config))
    rates = [m["eval_win_rate"] for m in metrics]
    best = max(range(len(rates)), key=lambda step: (rates[step], -step))
    assert result.model_step == best
    assert len(rates) < 13
    assert all(later <= rates[best] for later in rates[best:])
    assert scores(result.out / "metrics.jsonl", best)["eval_step"] == best
    # Evaluated again, model/ gives the figures of the step that it is said to be of.
    found = verify(result.out)
    assert found.holds, [check for check in [*found.digests, *found.figures] if not check.holds]
    assert {check.what for check in found.figures} >= {"eval_win_rate", "eval_kl", "eval_reward"}


# ---------------------------------------------------------------- safety suites


def test_a_safety_suite(configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five harmless prompts of which the second is refused, two harmful ones of which one is answered."""
    lines = ["prompt,type,label", *(f"{letter},t,safe" for letter in "abcde"), "f,t,unsafe", "g,t,unsafe"]
    (tmp_path / "suite.csv").write_text("\n".join(lines) + "\n")
    verdicts: list[Verdict] = [
        "compliance",
        "refusal",
        "compliance",
        "unclear",
        "partial",
        "compliance",
        "refusal",
    ]
    monkeypatch.setattr(
        static_suites, "by_rules", lambda items: [Found(v) for v, _ in zip(verdicts, items, strict=True)]
    )
    config = configured(
        "dpo", watch__safety=[{"path": str(tmp_path / "suite.csv")}], watch__sampling={"max_new_tokens": 4}
    )
    _, metrics, rows = evaluated(config, "dpo")
    expected = {
        "eval_over_refusal/suite": 2
        / 4,  # partial refusals count, unclear answers do not: 2 of 5 would be 0.4
        "eval_under_refusal/suite": 1 / 2,
        "eval_unclear/suite": 1 / 7,
    }
    assert {k: v for k, v in metrics[-1].items() if "/suite" in k} == pytest.approx(expected)
    assert [row["verdict"] for row in rows[:7]] == verdicts
    assert [row["expected"] for row in rows[:7]] == ["comply"] * 5 + ["refuse"] * 2
    assert {row["suite"] for row in rows} == {"suite"}
    suite = static_suites.read_suite(static_suites.SafetyConfig(path=str(tmp_path / "suite.csv")))
    # The first three would all be harmless.
    assert [group.prompt for group in static_suites.spread(suite, 3).prompts] == ["a", "c", "e"]
    assert list(static_suites.spread(suite, 4).expected.values()) == ["comply"] * 3 + ["refuse"]
    assert static_suites.spread(suite, 0) is static_suites.spread(suite, 9) is suite


# ---------------------------------------------------------------- bad input

PROMPTS = {"watch__prompts": [{"path": "p.jsonl"}]}


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("dpo", {"watch__stop_metric": "eval_loss", "watch__patience": 1}, "set train.eval_every"),
        ("dpo", {"watch__limit": 3}, "limit has no effect without prompts"),
        ("dpo", {"watch__kl": False}, "kl has no effect without prompts"),
        ("dpo", {"watch__sampling": {"temperature": 0.5}}, "sampling has no effect without prompts"),
        ("dpo", {"watch__heldout": True}, "watch.heldout has no effect without data.heldout"),
        ("reward", PROMPTS, "watch.prompts has no effect on a reward model"),
        ("process-reward", {"watch__safety": [{"path": "s.csv"}]}, "watch.safety has no effect"),
        ("grpo", {**PROMPTS, "data__heldout_fraction": 0.5}, "watch.heldout = true to answer both"),
        ("dpo", {**PROMPTS, "watch__judge": {"kind": "function", "name": "f", "mode": "score"}}, "pairwise"),
        ("dpo", {"watch__safety": [{"path": "a/s.csv"}, {"path": "b/s.csv"}]}, "two suites have one name"),
    ],
)
def test_options_that_do_nothing_are_refused(
    name: str, options: dict[str, Any], problem: str, configured: Make
) -> None:
    with pytest.raises(InputError, match=problem):
        configured(name, **options)


def test_files_that_cannot_be_used(watched: Make, configured: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"watch\.prompts\.0: no such file or folder: gone\.jsonl"):
        heldout_evaluation(configured("dpo", watch__prompts=[{"path": "gone.jsonl"}]))
    with pytest.raises(InputError, match=r"watch\.safety\.0: no such file or folder"):
        heldout_evaluation(configured("dpo", watch__safety=[{"path": "gone.csv"}]))
    (tmp_path / "empty.jsonl").write_text("")
    long = tiny.write_rows(tmp_path / "long.jsonl", [{"prompt": " ".join("a" * 45)}])
    twice = []
    for letter in "ab":
        (tmp_path / letter).mkdir()
        twice.append(tiny.write_rows(tmp_path / letter / "p.jsonl", [{"prompt": letter}]))
    for file, problem in (
        (tmp_path / "empty.jsonl", "watch.prompts.0: "),
        (long, "watch.prompts.0: .*45 tokens"),
    ):
        config = watched("dpo", out=file.stem, watch__prompts=[{"path": str(file)}])
        with pytest.raises(InputError, match=problem):
            methods.find("dpo").train(config, on_eval=heldout_evaluation(config))
    config = watched("dpo", out="twice", watch__prompts=[{"path": str(file)} for file in twice])
    with pytest.raises(InputError, match="two prompts have the id"):
        methods.find("dpo").train(config, on_eval=heldout_evaluation(config))
    config = watched("dpo", out="room", watch__sampling={"max_new_tokens": 256})
    with pytest.raises(InputError, match=r"watch\.sampling\.max_new_tokens: 256 new tokens leave no room"):
        methods.find("dpo").train(config, on_eval=heldout_evaluation(config))
    config = watched("dpo", out="none")
    with pytest.raises(InputError, match="train was called without"):
        methods.find("dpo").train(config)


def test_the_command_says_it_in_one_line(
    watched: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dpo.toml"
    file.write_text(dump_toml(watched("dpo")))
    options = ["--watch.stop_metric", "eval_acc", "--watch.stop_mode=max", "--watch.patience", "1"]
    assert command(["dpo", str(file), *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: watch.stop_metric: no metric is called eval_acc: there are eval_cut_off, ")
    assert command(["dpo", str(file), "--watch.patience", "1"]) == 2
    assert "patience has no effect without stop_metric" in capsys.readouterr().err
