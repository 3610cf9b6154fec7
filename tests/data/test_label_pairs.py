"""Labels as pairs: a thumbs-up with its prompt's thumbs-downs, or with a random other response."""

from __future__ import annotations

from collections import Counter

from trimtab.data.convert import as_labelled, by_feedback, pair_labels, pairs_or_labels
from trimtab.data.sources import split_by_prompt
from trimtab.groups import Group, Response


def thumb(id: str, prompt: str, text: str, label: bool, weight: float = 1.0) -> Group:
    return Group(id=id, prompt=prompt, responses=[Response(text=text, label=label)], weight=weight)


def texts(pairs: list[Group]) -> list[tuple[object, object, object]]:
    return [(p.prompt, p.chosen.text, p.rejected.text) for p in pairs]


def test_each_up_meets_every_down_of_its_prompt() -> None:
    rows = [
        thumb("0", "x", "good", True, weight=2.0),
        thumb("1", "x", "bad", False),
        thumb("2", "x", "worse", False),
        thumb("3", "x", "fine", True),
        thumb("4", "y", "elsewhere", False),
    ]
    pairs = pair_labels(rows, seed=0)
    assert texts(pairs) == [
        ("x", "good", "bad"),
        ("x", "good", "worse"),
        ("x", "fine", "bad"),
        ("x", "fine", "worse"),
    ]
    assert [p.weight for p in pairs] == [2.0, 2.0, 1.0, 1.0]
    assert [p.id for p in pairs] == ["0/0", "0/1", "3/0", "3/1"]
    assert all([r.preferred for r in p.responses] == [True, False] for p in pairs)


def test_a_random_negative_is_another_prompts_and_never_the_same_text() -> None:
    rows = [thumb(str(i), f"prompt {i}", f"answer {i % 5}", True) for i in range(40)]
    pairs = pair_labels(rows, seed=0)
    assert len(pairs) == 40
    assert all(p.chosen.text != p.rejected.text for p in pairs)
    # Spread over what there is, not the next row each time.
    assert set(Counter(str(p.rejected.text) for p in pairs)) == {f"answer {i}" for i in range(5)}
    assert len({(p.chosen.text, p.rejected.text) for p in pairs}) > 10


def test_random_negatives_depend_on_seed_and_id_alone() -> None:
    rows = [thumb(str(i), f"prompt {i}", f"answer {i}", True) for i in range(20)]
    first, again = pair_labels(rows, seed=0), pair_labels(rows, seed=0)
    assert texts(first) == texts(again)
    assert texts(first) != texts(pair_labels(rows, seed=1))


def test_a_random_negative_says_nothing_that_was_said_to_its_prompt() -> None:
    # "a" is a thumbs-up of both prompts, and would be chosen and rejected at once.
    rows = [thumb("0", "x", "a", True), thumb("1", "y", "a", True), thumb("2", "y", "b", True)]
    assert texts(pair_labels(rows, seed=0)) == [("x", "a", "b")]


def test_a_text_with_both_labels_is_no_rejected_answer() -> None:
    rows = [thumb("0", "x", "a", True), thumb("1", "x", "a", False), thumb("2", "z", "c", False)]
    assert texts(pair_labels(rows, seed=0)) == [("x", "a", "c")]


def test_pairs_stay_and_downs_alone_are_left_out() -> None:
    pair = Group(
        id="p", prompt="x", responses=[Response("a", preferred=True), Response("b", preferred=False)]
    )
    assert pair_labels([pair, thumb("0", "y", "c", False)], seed=0) == [pair]


def test_one_row_by_what_its_feedback_is() -> None:
    pair = Group(
        id="p", prompt="x", responses=[Response("a", preferred=True), Response("b", preferred=False)]
    )
    ranked = Group(id="r", prompt="x", responses=[Response("a", rank=2), Response("b", rank=1)])
    several = Group(id="l", prompt="x", responses=[Response("a", label=True), Response("b", label=False)])
    shown = Group(id="d", prompt="x", responses=[Response("a")])
    assert [g.id for g in by_feedback([pair, ranked, several, shown])] == ["p", "r/0", "l/0", "l/1", "d"]
    assert [g.id for g in pairs_or_labels([pair, ranked, several, shown])] == ["p", "r/0", "l/0", "l/1"]
    # Feedback that orders nothing is no reason to imitate: a tie, a rating alone, labelled steps.
    tied = Group(id="t", prompt="x", responses=[Response("a", rank=1), Response("b", rank=1)])
    rated = Group(id="o", prompt="x", responses=[Response("a", ratings={"overall": 1.0})])
    steps = Group(id="s", prompt="x", responses=[Response("a", step_texts=["a"], step_labels=[0.0])])
    assert by_feedback([tied, rated, steps]) == []
    # A pair's sides, and nothing of a ranking or a demonstration.
    labelled = as_labelled([pair, ranked, several, shown])
    assert [(g.id, g.responses[0].label) for g in labelled] == [
        ("p/0", True),
        ("p/1", False),
        ("l/0", True),
        ("l/1", False),
    ]


def test_no_text_crosses_the_held_out_split() -> None:
    rows = [thumb(str(i), f"prompt {i}", f"answer {i}", True) for i in range(30)]
    kept, held = split_by_prompt(rows, 0.3, 0)
    mine = {str(r.text) for g in held for r in g.responses}
    assert held
    assert not mine & {str(r.text) for p in pair_labels(kept, seed=0) for r in p.responses}
