"""The page of one evaluated model, from ``eval.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.evaluation.figures import MISSING, has, number
from trimtab.evaluation.pages.blocks import (
    Block,
    Folded,
    Grid,
    Line,
    Page,
    Part,
    Values,
    write_page,
)
from trimtab.evaluation.pages.drifted import decoding_part, drift_part
from trimtab.evaluation.pages.findings import audit_summary
from trimtab.evaluation.pages.quality import calibration_blocks, preference_part
from trimtab.evaluation.pages.side_by_side import samples_part, watched_part
from trimtab.evaluation.pages.suites import safety_part, tasks_part
from trimtab.evaluation.pages.training import memory_part, training_part
from trimtab.evaluation.pages.values import (
    Table,
    any_of,
    change,
    count,
    decimal,
    name_of,
    share,
    table,
    tables,
    texts,
    words,
)
from trimtab.evaluation.pages.wins import judged_part, plane_part, reward_part, win_part


def write_eval(
    path: str | Path,
    sections: Mapping[str, Any],
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    audit: Mapping[str, Any] | None = None,
    lineage: Mapping[str, Any] | None = None,
    watched: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes the page of ``eval.json`` and returns its path.

    ``metrics`` holds the lines of the run's ``metrics.jsonl``, ``audit`` its ``audit.json``, and ``lineage``
    its ``lineage.json``, shown where the sections have none, ``watched`` the lines of its ``samples.jsonl``.
    A section that is absent or null is left out.
    """
    ours, theirs = name_of(sections.get("model"), "the model"), other_name(sections)
    judged, reward = table(sections.get("judged")), table(sections.get("reward"))
    calibration = calibration_blocks(table(sections.get("reward_model")), "reward model")
    parts = [
        win_part(table(sections.get("win_rate"))),
        judged_part(judged),
        reward_part(reward, table(sections.get("attributes"))),
        plane_part([(ours, "0", sections)], baseline(sections)),
        preference_part(table(sections.get("preference"))),
        Part("reward-model", "Reward model", calibration) if calibration else None,
        drift_part(table(sections.get("drift"))),
        decoding_part(table(sections.get("decoding"))),
        tasks_part(sections.get("tasks")),
        safety_part(sections.get("safety")),
        audit_summary(audit or table(sections.get("audit"))),
        training_part([(ours, "0", metrics)]),
        memory_part(lineage or sections.get("lineage")),
        watched_part(watched),
        samples_part(sections.get("samples_shown"), ours, theirs),
        problems_part(sections.get("problems")),
        settings_part(sections.get("configuration"), sections.get("lineage") or lineage),
    ]
    verdict = table(sections.get("verdict"))
    page = Page(
        title=words(sections.get("title") or f"Evaluation of {ours}"),
        sentence=sentence_of(sections),
        lines=[said(text) for text in texts(verdict.get("lines"))],
        badges=badges(verdict, theirs),
        key_figures=key_figures(sections),
        facts=facts(sections),
        parts=[part for part in parts if part is not None],
    )
    return write_page(path, page)


def other_name(sections: Table) -> str:
    return name_of(sections.get("against"), name_of(sections.get("reference"), "the reference"))


def sentence_of(sections: Table) -> str:
    return words(table(sections.get("verdict")).get("sentence") or "This file holds no verdict.")


def said(text: str) -> Line:
    """A line of the verdict, marked where it says itself that it warns."""
    return Line(text, "warning" if text.lower().startswith("warning") else "")


def badges(verdict: Table, theirs: str) -> list[tuple[str, str]]:
    found = []
    gate = verdict.get("gate")
    if gate in ("passed", "failed"):
        found.append(("good", "✓ Gate passed") if gate == "passed" else ("bad", "✗ Gate failed"))
    if verdict.get("worse") is True:
        found.append(("bad", f"▼ Worse than {theirs}"))
    return found


def baseline(sections: Table) -> Table | None:
    """The reference's reward, for the plane: only if the reward was compared with the KL's reference."""
    against, reference = table(sections.get("against")), table(sections.get("reference"))
    reward = table(sections.get("reward"))
    if not against or against.get("path") != reference.get("path") or not has(reward, "reference_mean"):
        return None
    name = name_of(against, "reference")
    return {"name": name, "mean": reward["reference_mean"], "ci95": reward.get("reference_ci95")}


def key_figures(sections: Table) -> list[tuple[str, str, str]]:
    """What is asked first: who wins, by how much, how far it moved, how long it talks."""
    wins, drift = table(sections.get("win_rate")), table(sections.get("drift"))
    overall, controlled = table(wins.get("overall")), table(wins.get("length_controlled"))
    judged = table(table(sections.get("judged")).get("win_rate"))
    reward, length = table(sections.get("reward")), table(drift.get("length"))
    ratio = number(length.get("ratio"))
    figures = [
        ("Win rate", share(overall.get("rate"), overall.get("ci95")), "50 % is a draw"),
        ("Length-controlled", share(controlled.get("rate"), controlled.get("ci95")), "at equal length"),
        ("Judged win rate", share(judged.get("rate"), judged.get("ci95")), "by the judge"),
        ("Reward", decimal(reward.get("mean"), reward.get("ci95")), _against(reward)),
        ("KL", decimal(drift.get("kl_per_token"), drift.get("kl_per_token_ci95")), "nats per token"),
        ("Length", MISSING if ratio is None else f"{ratio:.2f} ×", _lengths(length)),
    ]
    return [one for one in figures if one[1] != MISSING]


def facts(sections: Table) -> list[tuple[str, str]]:
    """What was compared with what, and on how much."""
    found = []
    for key, label in (("model", "Model"), ("against", "Compared with"), ("reference", "KL to")):
        one = table(sections.get(key))
        if one and not (key == "reference" and one == table(sections.get("against"))):
            name, path = words(one.get("name")), words(one.get("path"))
            found.append((label, path if name in (path, MISSING) else f"{name} ({path})"))
    if has(sections, "prompts"):
        samples = f" × {count(sections['samples'])} answers" if has(sections, "samples") else ""
        found.append(("Prompts", count(sections["prompts"]) + samples))
    sampling = table(sections.get("sampling"))
    if sampling:
        found.append(("Sampling", ", ".join(f"{k} {words(v)}" for k, v in sampling.items() if v is not None)))
    if has(sections, "seed"):
        found.append(("Seed", words(sections["seed"])))
    return found


def problems_part(problems: Any) -> Part | None:
    """What could not be scored, judged or matched, with how often."""
    rows = [
        [words(one.get("what")), words(one.get("where")), count(one.get("count"))] for one in tables(problems)
    ]
    if not rows:
        return None
    note = "Counted, and left out of the figures above."
    return Part(
        "problems", "What could not be measured", [Grid("", ["What", "Where", "How often"], rows)], note
    )


def settings_part(configuration: Any, lineage: Any) -> Part | None:
    """Configuration and lineage, folded; paper leaves them out."""
    blocks: list[Block] = []
    for title, tree in (("Configuration", configuration), ("Lineage", lineage)):
        if table(tree):
            blocks.append(Folded(title, [Values(tree)], printed=False))
    return Part("settings", "Settings", blocks) if blocks else None


def _against(reward: Table) -> str:
    if not any_of(reward, ["difference"]):
        return ""
    return f"difference {change(reward.get('difference'), reward.get('difference_ci95'))}"


def _lengths(length: Table) -> str:
    ours, theirs = (decimal(length.get(key), places=1) for key in ("mean", "reference_mean"))
    return f"{ours} tokens against {theirs}"
