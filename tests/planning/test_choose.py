"""``trimtab choose`` decides as the sources have it; bad input; every value has a source."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from situations import REWARD, SITUATIONS, VERIFIER, at

from trimtab import methods
from trimtab.cli.main import METHODS
from trimtab.config import fields, load_config
from trimtab.errors import InputError
from trimtab.planning.choosing import situation as choose_situation
from trimtab.planning.choosing.decide import Choice, decide
from trimtab.planning.choosing.needs import NEEDS, ORDER
from trimtab.planning.choosing.pilot import commands, heldout_fraction, pilot
from trimtab.planning.choosing.rules import RULES
from trimtab.planning.choosing.situation import (
    HELD_OUT,
    KINDS,
    TOO_FEW,
    Situation,
    heldout_needed,
    parse_have,
    with_thumbs,
)
from trimtab.planning.choosing.sources import SECTION, START
from trimtab.planning.choosing.switch import SWITCH, keys_of, switch
from trimtab.planning.choosing.watch import WATCH

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("why", "s", "method", "runner_up"), SITUATIONS, ids=[s[0][:40] for s in SITUATIONS])
def test_the_method_and_the_runner_up(why: str, s: Situation, method: str, runner_up: str | None) -> None:
    choice = decide(s)
    assert choice.method == method, choice.points
    assert choice.runner_up == runner_up, choice.points


def test_every_method_can_be_chosen() -> None:
    assert set(ORDER) == set(METHODS) == set(START) == set(WATCH)
    # IPO, SimPO and ORPO stay below DPO in our own results: they come second, with something to see.
    below = {"ipo", "simpo", "orpo"}
    assert {decide(s).method for _, s, _, _ in SITUATIONS} == set(METHODS) - below
    assert below <= {decide(s).runner_up for _, s, _, _ in SITUATIONS}


def test_ruled_out_methods_say_why_and_nobody_is_forgotten() -> None:
    for _, s, _, _ in SITUATIONS:
        choice = decide(s)
        assert set(choice.points) | set(choice.ruled_out) == set(METHODS)
        assert not set(choice.points) & set(choice.ruled_out)
        assert all(choice.ruled_out.values())
        assert [choice.method, *([choice.runner_up] if choice.runner_up else [])] == list(choice.points)[
            : 1 + bool(choice.runner_up)
        ]


def test_points_are_the_sum_of_the_rules_that_applied() -> None:
    choice = decide(at("pairs:20k", noisy="yes"))
    # pairs 6 + noisy labels 1; a decision that overwrote instead of adding would give 1 or 6.
    assert choice.points["dpo"] == 7
    assert sum(r.points for r in choice.reasons) == 7
    assert {r.rule for r in choice.reasons} == {"pairs", "noisy labels"}


def test_equal_points_go_to_fewer_models() -> None:
    choice = decide(at("prompts:20k", **REWARD))
    assert choice.points["rloo"] == choice.points["ppo"] == 5
    assert choice.method == "rloo"


def test_memory_takes_ppo_back_and_is_said() -> None:
    s = at("prompts:20k", exploration="yes", **REWARD)
    assert decide(s, {"ppo": True, "rloo": True, "grpo": True}).method == "ppo"
    tight = decide(s, {"ppo": False, "rloo": True, "grpo": True})
    assert (tight.method, tight.points["ppo"]) == ("rloo", 7)
    # Where nothing fits, memory decides nothing.
    assert decide(s, {"ppo": False, "rloo": False, "grpo": False}).method == "ppo"


def test_memory_is_no_reason_for_simpo_and_it_is_said() -> None:
    choice = decide(at("pairs:20k"))
    assert any("computes its reference once" in text for text in choice.disagreements)


def test_stages() -> None:
    assert decide(at("pairs:60k", exploration="yes")).stages == ("reward", "ppo")
    assert decide(at("pairs:60k", exploration="yes", tuned="no")).stages == ("sft", "reward", "ppo")
    assert decide(at("pairs:20k,demonstrations:5k", tuned="no")).stages == ("sft", "dpo")
    assert decide(at("pairs:20k", tuned="no")).stages == ("sft", "dpo")
    assert decide(at("steps:5k")).stages == ("process-reward", "grpo")
    assert decide(at("prompts:8k", tuned="no", **VERIFIER)).stages == ("grpo",)  # nothing to imitate
    assert decide(at("steps:5k", exploration="yes")).stages == ("process-reward", "grpo")
    assert decide(at("scores:20k")).stages == ("reward", "rloo")


def value(choice: Choice, key: str, stage: str = "") -> Any:
    """A starting value, None where it is left at its default."""
    return next((h.value for h in choice.hypers[stage or choice.method] if h.key == key), None)


def test_imbalanced_thumbs_are_weighed() -> None:
    # λ_D·9000 / (λ_U·1000) = 1 for λ_U = 9; the wrong way round it would be λ_D = 9, and 81 in all.
    up = decide(at("ups:9k,downs:1k"))
    assert value(up, "kto.undesirable_weight") == 9.0
    assert value(up, "kto.desirable_weight") is None
    down = decide(at("ups:1k,downs:9k"))
    assert value(down, "kto.desirable_weight") == 9.0
    assert value(down, "kto.undesirable_weight") is None
    within = decide(at("ups:5k,downs:4k"))  # 1.25, within 1 to 4/3
    assert value(within, "kto.desirable_weight") is value(within, "kto.undesirable_weight") is None
    assert value(decide(at("thumbs:9k")), "kto.balance") is True


def test_noise_becomes_a_loss_that_expects_it() -> None:
    known = decide(at("pairs:20k", noisy="yes", flips=0.15))
    assert (value(known, "dpo.loss"), value(known, "dpo.label_smoothing")) == ("robust", 0.15)
    guessed = decide(at("pairs:20k", noisy="yes"))
    assert (value(guessed, "dpo.loss"), value(guessed, "dpo.label_smoothing")) == (None, 0.1)


def test_few_rows_take_smaller_batches() -> None:
    # 2,000 pairs at 64 are 31 steps; at least 50 a pass: 2000 // 50 = 40, the power of two below is 32.
    choice = decide(at("pairs:2k"))
    assert value(choice, "train.batch_groups") == 32
    # 2000 // 32 = 62 steps, of which a tenth: 6, not the 150 of the paper, which the run would refuse.
    assert value(choice, "train.warmup_steps") == 6
    assert value(decide(at("pairs:100k")), "train.warmup_steps") == 150


def test_what_must_be_held_out() -> None:
    # ((1.96·0.5 + 0.8416·√0.24) / 0.1)² = (0.98 + 0.41230)² / 0.01 = 193.85
    assert heldout_needed(0.6) == HELD_OUT == 194
    assert TOO_FEW == 388
    assert decide(at("pairs:387")).method == "sft"
    assert decide(at("pairs:388")).method == "dpo"
    told = " ".join(decide(at("pairs:50")).notes)
    assert "194" in told
    assert "388" in told
    assert "trimtab label" in told


def test_pilot_holds_enough_out_and_its_bar_is_a_coins_interval() -> None:
    made = pilot(decide(at("pairs:20k")))
    assert made.heldout == 400  # 2 % of 20,000, the least share
    assert "0.549" in made.stop[0]  # 0.5 + 0.98/√400
    few = pilot(decide(at("pairs:400")))
    assert few.heldout >= HELD_OUT  # 49 %, not 2 % of 400 = 8
    assert few.rows + few.heldout <= 400


def test_a_pilot_is_a_part_or_says_that_it_is_the_whole() -> None:
    part = pilot(decide(at("pairs:10k")))
    assert (part.rows, part.whole) == (1280, False)  # 20 steps of 64; a tenth would be 1,000, no limit 2,000
    assert pilot(decide(at("pairs:16k"))).rows == 1600
    assert pilot(decide(at("pairs:100k"))).rows == 2000
    choice = decide(at("pairs:400"))
    whole = pilot(choice)
    assert (whole.rows, whole.whole, whole.overrides) == (204, True, {})
    told = commands(choice, whole, "r.toml", "r")
    assert told == ["trimtab plan dpo r.toml", "trimtab dpo r.toml", "trimtab eval runs/r"]
    # 50 steps of 16 prompts, four passes over each rollout: 200 prompts; without the passes it would say 800.
    assert pilot(decide(at("prompts:20k", exploration="yes", **REWARD))).rows == 200


def test_demonstrations_are_not_held_out_by_the_half() -> None:
    # What a preference accuracy needs, 194, would be 65 % of 300 and is cut at 50 %.
    few, many = decide(at("demonstrations:300")), decide(at("demonstrations:50k"))
    assert heldout_fraction("sft", few.situation) == 0.1
    assert heldout_fraction("spin", few.situation) == 0.1
    assert pilot(many).heldout == 200
    assert pilot(decide(at("demonstrations:4k"))).heldout == 200  # 5 %


def test_a_switch_names_what_the_chosen_method_logs() -> None:
    metrics = {name for watched in WATCH.values() for name, _ in watched} | {"clip_fraction", "sampler_gap"}
    named = 0
    given = {(c.method, c.runner_up) for c in (decide(s) for _, s, _, _ in SITUATIONS)}
    pairs = {(a, b) for a in ORDER for b in ORDER if a != b} | {(a, b) for a, b in given if b}
    for method, runner_up in pairs:
        text = switch(method, runner_up, at("pairs:20k"))
        found = [m for m in metrics if re.search(rf"(?<![\w/]){re.escape(m)}(?!\w)", text)]
        assert set(found) <= {name for name, _ in WATCH[method]}, (method, runner_up, text)
        assert found, (method, runner_up, text)
        named += len(found)
    assert named > len(pairs)
    for first, second in SWITCH:  # no key that stands for nothing
        assert any(first in keys_of(name) for name in ORDER), first
        assert any(second in keys_of(name) for name in ORDER), second
    assert "critic is too dear" not in switch("dapo", "grpo", at("prompts:8k", **VERIFIER))


def test_the_pilot_switches_as_the_runner_up_says() -> None:
    for _, s, _, _ in SITUATIONS:
        choice = decide(s)
        if choice.runner_up:
            expected = switch(choice.method, choice.runner_up, s)
            assert pilot(choice).switch == f"to {choice.runner_up}, if {expected}"


def test_a_stop_names_what_the_method_logs() -> None:
    metrics = {name for watched in WATCH.values() for name, _ in watched}
    for _, s, _, _ in SITUATIONS:
        choice = decide(s)
        logged = {name for name, _ in WATCH[choice.method]}
        logged |= {"rejected_tokens", "accuracy"} if choice.method in ("online-dpo", "reward") else set()
        for text in pilot(choice).stop:
            found = {m for m in metrics if re.search(rf"(?<![\w/]){re.escape(m)}(?!\w)", text)}
            found -= {"accuracy"} if "held-out accuracy" in text else set()
            assert found <= logged, (choice.method, text)


def test_rows_on_both_sides_of_the_length() -> None:
    longer = decide(at("pairs:20k", longer=0.8))
    assert any("dpo.logps = mean" in text for text in longer.notes)
    assert not any("logps" in text for text in decide(at("pairs:20k", longer=0.5)).notes)


def test_long_horizons_are_a_disagreement() -> None:
    told = decide(at("prompts:20k", long_horizon="yes", **VERIFIER)).disagreements
    assert any(text.startswith("Long horizons") for text in told)


@pytest.mark.parametrize(
    ("s", "told"),
    [
        (Situation(), "nothing is given"),
        (Situation(verifier="math"), "prompts are missing"),
        (at("prompts:500"), "prompts alone hold no feedback"),
        (at("demonstrations:5k", exploration="yes"), "trimtab label"),
        (at("pairs:100", exploration="yes"), "388 comparisons"),
        (at("thumbs:5k", exploration="yes"), "--verifier, a --judge or a --reward-model"),
        (at("ups:0,downs:500"), "add thumbs up"),
        (at("scores:20"), "single ratings"),
        (at("pairs:50", goal="reward"), "388"),
        (at("prompts:50", goal="reward", verifier="math"), "teach no reward model"),
        (at("pairs:2k", noisy="no", flips=0.3), "30 %"),
        (at("steps:10"), "10 answers in labelled steps are too few"),
        (at("steps:10", goal="reward"), "10 answers in labelled steps are too few"),
        (at("pairs:2k", judge="j.py:f", verifier="math"), "--judge beside --verifier"),
        (at("pairs:2k", judge="j.py:f", reward_model="rm"), "--judge beside --reward-model"),
        (
            at("pairs:2k", goal="reward", verifier="math", reasoning="no"),
            "--verifier, --reasoning with --goal",
        ),
        (at("pairs:2k", goal="reward", exploration="yes"), "--exploration with --goal reward"),
        (at("pairs:2k", tuned="these"), "--tuned these has no effect without demonstrations"),
        (at("thumbs:2k", keep_short="yes"), "--keep-short has no effect"),
        (at("pairs:2k", reuse="yes"), "--reuse is about rollouts"),
    ],
)
def test_what_nothing_can_be_made_of(s: Situation, told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        decide(s)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pears:3", "did you mean 'pairs'"),
        ("pairs", "how much"),
        ("pairs:-5", "not above 0"),
        ("pairs:0", "not above 0"),
        ("pairs:1.5", "no amount"),
        ("pairs:many", "no amount"),
        ("pairs:nan", "no amount"),
        ("pairs:3,pairs:4", "twice"),
        ("thumbs:3,ups:4", "not both"),
        ("", "no kind"),
    ],
)
def test_amounts_that_are_none(text: str, told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        parse_have(text)


def test_amounts() -> None:
    assert parse_have("pairs:20k, prompts:1.5M,thumbs:2_000") == {
        "pairs": 20_000,
        "prompts": 1_500_000,
        "thumbs": 2_000,
    }
    assert with_thumbs({"ups": 3, "downs": 0}) == ({"thumbs": 3}, 3, 0)


def test_every_value_is_an_option_and_has_a_source() -> None:
    words = "ours|et al., 20|DeepSeekMath|MiniMax|TRL|the same|authors|Zephyr|alignment-handbook"
    words += "|guide|chapter|Bradley|measured|policy's own|no KL|wrong labels|errors|docs/"
    sourced = re.compile(words)
    for _, s, _, _ in SITUATIONS:
        choice = decide(s)
        for stage, values in choice.hypers.items():
            known = {key for key, *_ in fields(methods.find(stage).Config)}
            for h in values:
                assert h.key in known, (stage, h.key)
                assert sourced.search(h.source), h


def test_rules_are_sound() -> None:
    for rule in RULES:
        assert rule.source
        assert rule.condition
        assert set(rule.points) <= set(METHODS)
        assert all(rule.points.values()), f"{rule.name}: 0 points say nothing"
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert {name for need in NEEDS for name in need.methods} == set(METHODS)
    choices = [decide(s) for _, s, _, _ in SITUATIONS]
    applied = {r.rule for c in choices for r in (*c.reasons, *c.runner_up_reasons)}
    every = {rule.name for rule in RULES}
    # What decides nothing in any situation would be a rule that no test holds.
    assert every - applied <= {"several kinds"}, every - applied


def test_watched_metrics_stand_on_the_methods_pages() -> None:
    more = (DOCS / "methods" / "dpo.md").read_text() + (DOCS / "methods" / "grpo.md").read_text()
    for name, watched in WATCH.items():
        page = (DOCS / "methods" / f"{name}.md").read_text() + more
        for metric, _ in watched:
            short = metric.replace("eval_accuracy_implicit_reward", "…_implicit_reward")
            short = short.replace("eval_accuracy_per_token", "…_per_token")
            assert f"`{short}`" in page, (name, metric)


def test_the_page_shows_every_rule_with_its_points() -> None:
    page = (DOCS / "choose.md").read_text()
    for rule in RULES:
        points = ", ".join(f"{name} {points:+d}" for name, points in rule.points.items())
        assert f"| {rule.name} | {rule.condition} | {points} |" in page, rule.name
        assert f"| {rule.name} | {rule.source} |" in page, rule.name
    for name in re.findall(r"^\| ([^|`]+) \| [^|]+\|$", page, re.MULTILINE):
        known = {rule.name for rule in RULES} | {"rule", "figure", "line"}
        assert name.strip("- ") in known or name in FIGURES, name  # no row for a rule that is gone
    for kind, what in KINDS.items():
        assert f"| `{kind}` | {what} |" in page
    assert all(f"`--{key}" in page for key in ("have", "data", "write", "json", "time"))


FIGURES = (
    "kinds and amounts",
    "prompts, share with several answers",
    "wrong labels",
    "the better answer is the longer",
    "longest answer",
    "a verifier",
    "---",
)
"""Rows of the page's other table of two columns."""


def test_sections_of_papers_stand_in_our_recipes_or_pages() -> None:
    """A section, an appendix or an equation is named only where the project's own files name it too."""
    files = [*(DOCS.parent / "recipes" / "papers").glob("*.toml"), *(DOCS / "methods").glob("*.md")]
    ours = " ".join(re.sub(r"\s+", " ", file.read_text().lower()) for file in files)
    sources = [h.source for _, s, _, _ in SITUATIONS for values in decide(s).hypers.values() for h in values]
    sources += [h.source for values in START.values() for h in values] + [rule.source for rule in RULES]
    places = {found for text in sources for found in re.findall(PLACE, text.replace("’", "'"))}
    assert len(places) > 10
    for place in places:
        assert place.lower() in ours, place


PLACE = r"(?:section|appendix|equation|table) [A-Z]?[\d.]*[\dA-Z]\b"


def test_deciding_needs_no_torch() -> None:
    code = (
        "import sys; from trimtab.planning.choosing.decide import decide; "
        "from trimtab.planning.choosing.recipe import Setting, recipe; "
        "from trimtab.planning.choosing.situation import Situation; "
        "c = decide(Situation({'pairs': 20000})); recipe(c, Setting(), 'r.toml'); "
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sections_are_the_methods_own() -> None:
    for name, section in SECTION.items():
        config = methods.find(name).Config
        own = {"reward": "reward_model"}.get(name, section)
        assert own in config.model_fields
    assert choose_situation.GUIDE_FEW == 10_000
    assert load_config is not None
