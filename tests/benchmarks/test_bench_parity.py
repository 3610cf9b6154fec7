"""Parity: how curves are compared, what is injected, the table of cases; both numbers where we differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tables
from benchmarks.__main__ import main
from benchmarks.parity import command, compare, ours, world
from benchmarks.parity.case import Case
from benchmarks.parity.cases import CASES, NAMES
from trimtab import methods
from trimtab.data.collate import collate
from trimtab.groups import Group, Response
from trimtab.methods.shared.labels import mismatched
from trimtab.methods.shared.pairs import PairOptions, pair_losses
from trimtab.objectives.advantages import group_advantages
from trimtab.objectives.policy import relative_loss
from trimtab.objectives.preference import ipo_loss
from trimtab.objectives.reduce import global_count, reduce_tokens
from trimtab.objectives.unpaired import mismatched_kl
from trimtab.objectives.value import gae
from trimtab.rollouts.sampling import SamplingConfig


def test_a_difference_is_relative_to_each_step_or_to_a_curve_that_meets_0() -> None:
    # The last step is 2 % off its own 0.5; by the largest value it would be 0.5 %.
    assert compare.largest_difference([2.0, 0.51], [2.0, 0.5]) == pytest.approx(0.02)
    # The root mean square is 1; relative to the step itself the first would be infinitely far off.
    assert compare.largest_difference([1e-7, 1.0, -1.0], [0.0, 1.0, -1.0]) == pytest.approx(1e-7, rel=0.3)
    assert compare.largest_difference([0.0, 0.0], [0.0, 0.0]) == 0.0
    assert compare.largest_difference([1e-9, 0.0], [0.0, 0.0]) == math.inf
    assert compare.largest_difference([math.nan], [1.0]) == math.inf


def test_curves_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 steps of ours, 1 of the peer's"):
        compare.largest_difference([1.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="expected as many, 1 or more"):
        compare.largest_difference([], [])
    with pytest.raises(ValueError, match="our side has no curve value_loss"):
        compare.differences({"loss": [1.0]}, {"loss": [1.0], "value_loss": [1.0]})


def test_how_far_a_curve_went() -> None:
    assert compare.moved([1.0, 3.0, 1.0, 1.0], 2) == pytest.approx(0.5)
    assert compare.moved([0.0, 1.0], 1) == math.inf
    assert compare.spread([0.0, -2.0, 1.0]) == pytest.approx(1.5)
    assert compare.spread([0.0, 0.0]) == 0.0


def test_a_row_says_whether_both_agree() -> None:
    peer = {"loss": [1.0, 0.5], "grad_norm": [1.0, 1.0]}
    near = compare.row_of({"loss": [1.0, 0.5 + 4e-5], "grad_norm": [1.0, 1.0]}, peer, period=1)
    assert near["verdict"] == "agrees"
    assert near["loss_moved"] == 0.5
    assert compare.row_of(peer, peer, period=1, differs="why")["verdict"].startswith("agrees, though")
    far = {"loss": [1.0, 0.5 + 6e-5], "grad_norm": [1.0, 1.0]}
    assert compare.row_of(far, peer, period=1)["verdict"] == "DIFFERS: loss"
    row = compare.row_of(far, peer, period=1, differs="a reason")
    assert (row["verdict"], row["why"], row["at_step"]) == ("differs on purpose", "a reason", 2)
    assert (row["ours_loss"], row["peer_loss"]) == (0.50006, 0.5)


def test_a_row_that_is_not_finite_agrees_with_nothing() -> None:
    row = compare.row_of(
        {"loss": [math.nan], "grad_norm": [1.0]}, {"loss": [1.0], "grad_norm": [1.0]}, period=1
    )
    assert row["verdict"] == "DIFFERS: loss"
    assert json.loads(json.dumps(row, allow_nan=False))["loss_difference"] is None


def test_every_case_is_named_once_and_has_a_method() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert {case.method for case in CASES} <= set(methods.names())


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_our_side_takes_the_configuration(case: Case, tmp_path: Path) -> None:
    sections = ours.sections(case, tmp_path, tmp_path / "run")
    config = methods.find(case.method).Config.model_validate(sections)
    assert config.train.kernels == "off"
    assert config.model.dtype == "float32"
    assert config.train.warmup_steps == 0
    words = case.in_words()
    assert words["ours"].startswith(f"trimtab {case.method}")
    assert "Trainer(" in words["peer"]


def group(prompt: str, *tokens: list[int], **more: Any) -> Group:
    """A prompt of one token with these responses."""
    responses = [Response(text="", tokens=row) for row in tokens]
    return Group(id=prompt, prompt=prompt, prompt_tokens=[1], responses=responses, **more)


def test_the_replay_gives_the_fixed_responses_and_writes_them_down() -> None:
    fixed = [{"tokens": [5, 2], "text": "a", "finish": "stop", "reward": 0.5}]
    drawn: list[list[dict[str, Any]]] = []
    replay = ours.Replay({"p": fixed}, drawn)
    seen = []
    lm: Any = None

    def note(index: int, found: Group) -> None:
        seen.append((index, found))

    how: dict[str, Any] = {"seed": 0, "end_tokens": [2], "on_group": note}
    [found] = replay.sample(lm, [group("p")], 1, SamplingConfig(), **how)
    assert [r.tokens for r in found.responses] == [[5, 2]]
    assert found.responses[0].finish == "stop"
    assert seen == [(0, found)]
    assert drawn[0][0]["rewards"] == [0.5]
    assert drawn[0][0]["responses"][0]["ids"] == [5, 2]
    with pytest.raises(ValueError, match="p: 2 responses are asked for, 1 are there"):
        replay.sample(lm, [group("p")], 2, SamplingConfig(), **how)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small world, and three steps a case."""
    small = {"SFT_STEPS": 2, "ROWS": 8, "POOL": 4, "BATCH": 2, "PROMPTS": 2, "STEPS": 3, "WIDTH": 16}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(world, name, value)
        yield world.build(tmp_path_factory.mktemp("parity") / "world")


def of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_our_side_hands_over_what_it_trained_on(files: Path, tmp_path: Path) -> None:
    outcome = ours.run(of("dpo"), files, tmp_path / "dpo")
    assert set(outcome.curves) == {"loss", "grad_norm"}
    assert [len(batch) for batch in outcome.batches] == [2, 2, 2]
    assert outcome.curves["loss"][0] == pytest.approx(math.log(2))
    rows = {json.loads(line)["chosen"] for line in (files / "pairs.jsonl").read_text().splitlines()}
    row = outcome.batches[0][0]
    assert row["responses"][0]["text"] in rows
    assert row["responses"][0]["preferred"]
    # The peer gets the end token's id to compare with, and adds the token itself.
    assert row["responses"][0]["ids"][-1] == 2


def test_our_side_learns_from_the_fixed_rollouts(files: Path, tmp_path: Path) -> None:
    outcome = ours.run(of("grpo"), files, tmp_path / "grpo")
    fixed = json.loads((files / "rollouts.json").read_text())["mixed"]
    assert len(outcome.batches) == 1  # five steps are taken on each
    for row in outcome.batches[0]:
        assert [r["ids"] for r in row["responses"]] == [r["tokens"] for r in fixed[row["prompt"]]]
        assert row["rewards"] == [r["reward"] for r in fixed[row["prompt"]]]
    steps = [line for line in outcome.metrics if "grad_norm" in line]
    mean = sum(sum(row["rewards"]) for row in outcome.batches[0]) / 8
    assert steps[0]["reward_mean"] == pytest.approx(mean)


def test_rows_may_be_handed_over_in_reverse(tmp_path: Path) -> None:
    batches = [[{"prompt": "a"}, {"prompt": "b"}], [{"prompt": "c"}]]
    outcome = ours.Outcome({"loss": [1.0]}, batches, [])
    for name, first in (("kto", "b"), ("kto, rows in one order", "a")):
        (tmp_path / name).mkdir()
        task = command._write_task(of(name), outcome, tmp_path, tmp_path / name)
        assert json.loads(task.read_text())["batches"][0][0] == {"prompt": first}


def test_an_unknown_case_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--case", "dp"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --case 'dp': expected a part of dpo; ")
    assert len(said.splitlines()) == 1


def test_the_tables_of_a_result(tmp_path: Path) -> None:
    curves = {"loss": [1.0, 0.5], "grad_norm": [1.0, 1.0]}
    other = {"loss": [1.0, 0.6], "grad_norm": [1.0, 1.0]}
    words = {"ours": "trimtab dpo", "peer": "DPOTrainer()"}
    rows = [
        {"case": "same", **words, **compare.row_of(curves, curves, period=1)},
        {"case": "apart", **words, **compare.row_of(other, curves, period=1, differs="a reason")},
        {"case": "wrong", **words, **compare.row_of(other, curves, period=1)},
        {"case": "gone", **words, "verdict": "peer failed: no memory"},
    ]
    result = {"setting": "Words.", "rows": rows, "machine": {"cpu": "A", "cores": 1, "load": 1}}
    (tmp_path / "parity.json").write_text(json.dumps(result))
    page = tables.fill("<!-- results: parity -->\n<!-- end results -->\n", tmp_path)
    assert "| same | `trimtab dpo` | `DPOTrainer()` | 0.0e+00 | 0.0e+00 | 50 % |" in page
    assert "| apart | a reason | 2 | 0.6 and 0.5 | 1 and 1 |" in page
    assert "wrong: DIFFERS: loss" in page
    assert "gone: peer failed: no memory" in page


# Where we differ on purpose: one batch, our number and TRL's.


class Table:
    """A language model that says the log-probabilities that it was given, a row a response."""

    def __init__(self, *rows: list[float]) -> None:
        self.rows = rows

    def token_logprobs(self, batch: Any) -> tuple[torch.Tensor, None]:
        return batch.padded([list(row) for row in self.rows]), None


def likelihood_of(options: dict[str, Any]) -> float:
    """The likelihood term of two pairs: chosen −1 over 1 token, and −6 over 3."""
    pairs = [group("a", [3], [4]), group("b", [3, 4, 5], [4])]
    lm: Any = Table([-1.0], [-1.0], [-1.0, -2.0, -3.0], [-1.0])
    batch = collate(pairs, layout="plain")
    with_it, without = (
        pair_losses(lm, pairs, batch, PairOptions(reference_free=True, nll_weight=w, **given), beta=0.1)[0]
        for w, given in ((1.0, options), (0.0, {}))
    )
    return float((with_it - without).mean())


def pin_likelihood() -> tuple[float, float]:
    """Ours: (1/1 + 6/3)/2. TRL: 7 nats over 4 tokens."""
    assert likelihood_of({"nll_reduction": "token_mean"}) == pytest.approx(1.75)
    return likelihood_of({}), 7 / 4


def pin_ipo() -> tuple[float, float]:
    """h is 2 over 4 tokens and −1 over 2: (3 − 5)², and (½ + ½ − 5)² a token."""
    chosen, rejected, lengths = torch.tensor([2.0]), torch.tensor([-1.0]), (4, 2)
    theirs = float(ipo_loss(chosen / lengths[0], rejected / lengths[1], beta=0.1))
    return float(ipo_loss(chosen, rejected, beta=0.1)), theirs


def pin_orpo() -> tuple[float, float]:
    """A prompt whose second and third token have −4 and −5, a response of −0.5 and −1.5.

    Ours: 2/2. TRL, whose first token nothing predicts: 11 nats over 4 tokens.
    """
    pairs = [group("a", [3, 4], [5])]
    lm: Any = Table([-0.5, -1.5], [-1.0])
    options = PairOptions(loss="odds", reference_free=True, logps="mean", nll_weight=1.0)
    _, shown = pair_losses(lm, pairs, collate(pairs, layout="plain"), options, beta=0.1)
    return float(shown["nll"]), (4 + 5 + 0.5 + 1.5) / 4


def pin_kto() -> tuple[float, float]:
    """log π/π_ref is 1 for each prompt with the next row's response, 4 with the one before's."""
    groups = [group(name, [k]) for k, name in enumerate("xyz")]
    ratio = {("x", 1): 1.0, ("y", 2): 1.0, ("z", 0): 1.0, ("x", 2): 4.0, ("y", 0): 4.0, ("z", 1): 4.0}
    paired = [(g.id, (g.responses[0].tokens or [])[0]) for g in mismatched(groups, 10)]
    z_ref = mismatched_kl(torch.tensor([ratio[pair] for pair in paired]), torch.zeros(3))
    return float(z_ref), sum(ratio[g.id, (k - 1) % 3] for k, g in enumerate(groups)) / 3


def pin_deviation() -> tuple[float, float]:
    """Rewards 0, 0, 0, 4: the best's is 3/√3, and 3/2 by the sample deviation (ε 1e-4)."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 4.0]], dtype=torch.float64)
    unbiased = float(group_advantages(rewards, scale="std_unbiased")[0, 3])
    assert unbiased == pytest.approx(3 / 2.0001)
    return float(group_advantages(rewards, scale="std")[0, 3]), 3 / (2 + 1e-4)


def pin_batch_deviation() -> tuple[float, float]:
    """Groups (0, 2) and (0, 0): of all four the deviation is √¾, by n − 1 it is 1."""
    rewards = torch.tensor([[0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    return float(group_advantages(rewards, scale="batch_reward_std")[0, 1]), 1 / (1 + 1e-4)


def pin_kl() -> tuple[float, float]:
    """log π −1, π_old −1.5, π_ref −1.2: k3 is e^−0.2 − 0.8 = 0.018731; TRL's is e^0.5 times that."""
    policy, old, ref = (torch.tensor([[x]], dtype=torch.float64) for x in (-1.0, -1.5, -1.2))
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _, _ = relative_loss(policy, old, ref, torch.zeros(1, dtype=torch.float64), mask, beta=1.0)
    return float(loss), math.exp(0.5) * (math.exp(-0.2) - 0.8)


def pin_steps() -> tuple[float, float]:
    """The first of two steps has 2 tokens with 1 nat each, the second 6: 2/2, and 2/4 in TRL."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    count = global_count([mask], "token_mean")
    return float(reduce_tokens(torch.ones(1, 2), mask, count, "token_mean")), 2 / ((2 + 6) / 2)


def pin_masked() -> tuple[float, float]:
    """Two responses with a mean of 3, one of them masked: 3/1, and 3/2 in TRL."""
    mask = torch.tensor([[True, True], [False, False]])
    count = global_count([mask], "response_mean")
    return float(reduce_tokens(torch.full((2, 2), 3.0), mask, count, "response_mean")), 3 / 2


def pin_end() -> tuple[float, float]:
    """A word and the end token, values 1 and 2, and 4 behind the end; score 5, γ 1, λ ½.

    Ours: δ = 1, 3, so that the word's advantage is 1 + ½·3. TRL: δ = 1, 2, 1: 1 + ½·(2 + ½·1).
    """

    def first(rewards: list[float], values: list[float]) -> float:
        mask = torch.ones(1, len(values), dtype=torch.bool)
        return float(gae(torch.tensor([rewards]), torch.tensor([values]), mask, gamma=1.0, lam=0.5)[0][0, 0])

    theirs = first([0.0, 0.0, 5.0], [1.0, 2.0, 4.0])
    return first([0.0, 5.0], [1.0, 2.0]), theirs


PINS = {
    "dpo, with likelihood a response": (pin_likelihood, 1.5, 1.75),
    "ipo, as published": (pin_ipo, 4.0, 16.0),
    "orpo": (pin_orpo, 1.0, 2.75),
    "kto, rows in one order": (pin_kto, 1.0, 4.0),
    "grpo, population deviation": (pin_deviation, 1.731951, 1.499925),
    "grpo, scaled by the batch": (pin_batch_deviation, 1.154567, 0.99990),
    "grpo, KL as TRL has it": (pin_kl, 0.018731, 0.030882),
    "dapo, 2 steps a pass": (pin_steps, 1.0, 0.5),
    "grpo, cut-off masked": (pin_masked, 3.0, 1.5),
    "ppo, unequal lengths": (pin_end, 2.5, 2.25),
}
"""Case → what computes both numbers, ours and TRL's."""


@pytest.mark.parametrize("name", [case.name for case in CASES if case.differs])
def test_both_numbers_where_we_differ_on_purpose(name: str) -> None:
    compute, ours_is, theirs_is = PINS[name]
    found, theirs = compute()
    assert found == pytest.approx(ours_is, rel=2e-5)
    assert theirs == pytest.approx(theirs_is, rel=2e-5)
