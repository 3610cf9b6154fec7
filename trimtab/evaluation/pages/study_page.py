"""A comparison as a table, and as one page that opens anywhere.

:func:`comparison_table` is what the terminal prints, beside the sentences of
:mod:`trimtab.evaluation.verdict`; :func:`write_report` puts the same sentences and the same cells into
``report.html``, with what the judge is worth, curves, the KL–reward plane and samples. The page has no
scripts and asks the network for nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from trimtab.evaluation.figures import (
    MISSING,
    decimals,
    display_name,
    duration,
    has,
    interval,
    lowered,
    memory,
    number,
    plain_with_interval,
    share_with_interval,
    signed,
    written,
)
from trimtab.evaluation.pages.charts import (
    SMOOTH_FROM,
    Mark,
    Series,
    line_chart,
    reliability_chart,
    scatter_chart,
)
from trimtab.evaluation.pages.planned import memory_rows
from trimtab.evaluation.reward_model import judge_lines
from trimtab.evaluation.verdict import (
    GOLD,
    Rows,
    head_to_head,
    marked_name,
    one_sentence,
    rows_of,
    score_name,
    verdict,
)

PALETTE = 7
"""Colours in the page, besides the reference's grey; further methods start over."""
OPEN_SAMPLES = 4
"""Samples shown at once; the rest is folded."""

SHARED_CURVES = {
    "reward_mean": "Mean reward",
    "accuracy": "Preference accuracy",
    "reward_margin": "Reward margin, chosen − rejected",
    "kl": "KL to the reference",
    "response_tokens": "Tokens per response trained on",
    "explained_variance": "Variance explained by the critic",
    "beta": "KL coefficient β",
}
"""Metrics that mean the same for every method and so share one panel. Losses do not."""
OWN_CURVES = {"loss": "Loss", "policy_loss": "Policy loss", "value_loss": "Value loss"}
"""Metrics that each method has on a scale of its own, one panel a method."""
SHOWN_ELSEWHERE = ("title", "methods", "judge", "reward_models", "head_to_head", "score_name")
"""Keys of the summary with a place on the page; the others are listed under settings."""

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that HTML forbids or UTF-8 cannot hold; a sampled text may contain them."""

NO_BREAK = re.compile(
    r"(?<=[\d%]) (?=[%\[])|(?<=\d,) (?=[^ ]*\])|(?<=\d) (?=(?:h|min|s)\b)|(?<=\d min) (?=\d)|(?<=\d h) (?=\d)"
)
"""Spaces within "78 % [73, 82]" and within "5 min 00 s"."""


def comparison_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and one row a method, every cell already in words; a missing figure is –.

    Columns that only some studies have (accuracies, a learned reward) appear if any method has them. The
    gold reward's heading is the summary's ``score_name``; a method that learned from the judge is marked.
    """
    methods = rows_of(summary)
    reference = summary.get("reference")
    against = f" vs {display_name(reference)}" if reference else ""

    def count(m: Mapping[str, Any], key: str) -> str:
        return written(m, key, "{:,.0f}".format)

    columns: list[tuple[str, str, Callable[[Mapping[str, Any], str], str]]] = [
        ("proxy_reward", "Proxy reward [95 %]", plain_with_interval),
        ("gold_reward", f"{score_name(summary)} [95 %]", plain_with_interval),
        ("win_rate", f"Win rate{against} [95 %]", share_with_interval),
        ("judged_win_rate", f"Win rate{against} by an outside judge [95 %]", share_with_interval),
        ("preference_accuracy", "Preference accuracy [95 %]", share_with_interval),
        ("implicit_accuracy", "Implicit-reward accuracy [95 %]", share_with_interval),
        ("accuracy", "Accuracy [95 %]", share_with_interval),
        ("kl_nats_per_token", "KL, nats per token", lambda m, key: written(m, key, decimals)),
        ("response_tokens", "Tokens per response", lambda m, key: written(m, key, "{:,.1f}".format)),
        ("wall_s", "Wall time", lambda m, key: written(m, key, duration)),
        ("learned_reward_s", "Learned reward", lambda m, key: written(m, key, duration)),
        ("generated_tokens", "Generated tokens", count),
        ("optimiser_tokens", "Optimiser tokens", count),
        ("feedback_items", "Feedback items", count),
        ("unscored", "Answers without a score", count),
        ("peak_rss_mb", "Peak memory", lambda m, key: written(m, key, memory)),
        ("models_in_memory", "Models in memory", count),
        ("gradient_steps", "Gradient steps", count),
        ("reward_seen", "Reward seen", lambda m, key: str(m.get(key) or MISSING)),
    ]
    # These belong to some kinds of study only; a study of pairs alone answers no prompt.
    optional = {"proxy_reward", "judged_win_rate", "optimiser_tokens", "feedback_items", "unscored"}
    optional |= {"preference_accuracy", "implicit_accuracy", "accuracy", "learned_reward_s"}
    if any(has(m, "preference_accuracy") for m in methods.values()):
        optional |= {"gold_reward", "win_rate", "kl_nats_per_token", "response_tokens"}
    shown = [c for c in columns if c[0] not in optional or any(has(m, c[0]) for m in methods.values())]
    rows = []
    for name, m in methods.items():
        title = marked_name(name, m) + (" (reference)" if name == reference else "")
        rows.append([title, *(write(m, key) for key, _, write in shown)])
    return ["Method", *(title for _, title, _ in shown)], rows


def write_report(
    path: str | Path,
    summary: Mapping[str, Any],
    *,
    curves: Mapping[str, list[dict[str, Any]]],
    samples: list[dict[str, Any]],
    title: str,
) -> Path:
    """Writes the page and returns its path.

    ``curves[method]`` holds the lines of ``metrics.jsonl``; ``samples`` holds
    ``{"prompt", "columns", "outputs": {method: {"text", "score"}}}``. Every key of the summary that has
    no place of its own is listed under settings. Text from data is escaped, control characters become �.

    Raises InputError for a summary without methods.
    """
    methods = rows_of(summary)
    reference = summary.get("reference")
    names = [*methods, *(name for name in curves if name not in methods)]
    keys = _colours(names, reference)
    header, rows = comparison_table(summary)
    page = page_template("report.html.j2").render(
        title=title,
        verdict=_sentences(summary),
        duels=head_to_head(summary),
        header=header,
        rows=rows,
        method_keys=[keys[name] for name in methods],
        sample_size=summary.get("sample_size"),
        reference=reference,
        score_name=score_name(summary),
        score_label="gold" if score_name(summary) == GOLD else "score",
        judge=judge_panel(summary["judge"], "judge") if summary.get("judge") else None,
        reward_models=[
            (name, judge_panel(model, display_name(name)))
            for name, model in (summary.get("reward_models") or {}).items()
            if model != summary.get("judge")  # it has a panel of its own
        ],
        panels=_shared_panels(curves, keys),
        own_panels=_own_panels(curves, keys),
        smooth_from=SMOOTH_FROM,
        memory=memory_rows({**(summary.get("reward_models") or {}), **methods}),
        plane=_plane(methods, reference, keys, score_name(summary)),
        proxy_plane=_proxy_plane(methods, reference, keys, score_name(summary)),
        samples=[_sample(sample, keys) for sample in samples],
        open_samples=OPEN_SAMPLES,
        settings={key: value for key, value in summary.items() if key not in SHOWN_ELSEWHERE},
        missing=MISSING,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CONTROL.sub("\ufffd", page), encoding="utf-8")
    return path


# --- parts of the page


@functools.cache
def page_template(name: str) -> Template:
    """A page's template, with the filters that write figures."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        name=display_name,
        lowered=lowered,
        nobreak=_no_break,
        cell=_cell,
        score=lambda value: signed(decimals(value)),
    )
    return environment.get_template(name)


def _colours(names: list[str], reference: Any) -> dict[str, str]:
    """A colour key for each method, the same throughout the page; the reference is the grey baseline."""
    others = [name for name in names if name != reference]
    return {name: "ref" if name == reference else str(others.index(name) % PALETTE) for name in names}


def _points(records: list[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    pairs = [(number(record.get("step")), number(record.get(metric))) for record in records]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def _shared_panels(
    curves: Mapping[str, list[dict[str, Any]]], keys: dict[str, str]
) -> list[tuple[str, Markup]]:
    panels = []
    for metric, title in SHARED_CURVES.items():
        series = [Series(display_name(n), keys[n], _points(records, metric)) for n, records in curves.items()]
        series = [one for one in series if one.points]
        if series:
            panels.append((title, line_chart(series, title=title)))
    return panels


def _own_panels(curves: Mapping[str, list[dict[str, Any]]], keys: dict[str, str]) -> list[tuple[str, Markup]]:
    panels = []
    for metric, what in OWN_CURVES.items():
        for name, records in curves.items():
            points = _points(records, metric)
            if points:
                title = f"{what}, {display_name(name)}"
                series = [Series(display_name(name), keys[name], points)]
                panels.append((title, line_chart(series, title=title, labels=False)))
    return panels


def _plane(methods: Rows, reference: Any, keys: dict[str, str], score: str) -> Markup | None:
    marks = []
    for name, m in methods.items():
        x, y = number(m.get("kl_nats_per_token")), number(m.get("gold_reward"))
        lo, hi = interval(m, "gold_reward") or (None, None)
        if x is not None and y is not None:
            marks.append(Mark(display_name(name), keys[name], x, y, lo, hi))
    if not marks:
        return None
    return scatter_chart(
        marks,
        title=f"{score} against KL",
        x_label="KL, nats per token",
        y_label=lowered(score),
        baseline=number(methods.get(reference, {}).get("gold_reward")),
    )


def _proxy_plane(methods: Rows, reference: Any, keys: dict[str, str], score: str) -> Markup | None:
    """The learned reward against the score that it stands for, with arrows from the reference."""
    marks: list[Mark] = []
    origin = None
    for name, m in methods.items():
        x, y = number(m.get("proxy_reward")), number(m.get("gold_reward"))
        if x is None or y is None:
            continue
        if name == reference:
            origin = len(marks)
        y_bounds, x_bounds = (interval(m, key) or (None, None) for key in ("gold_reward", "proxy_reward"))
        marks.append(Mark(display_name(name), keys[name], x, y, *y_bounds, *x_bounds))
    if origin is None or len(marks) < 2:
        return None
    return scatter_chart(
        marks,
        title=f"{score} against the proxy reward",
        x_label="proxy reward",
        y_label=lowered(score),
        origin=origin,
    )


def _sentences(summary: Mapping[str, Any]) -> list[str]:
    """The verdict; of a study with a judge or with rows that saw it, under the sentence that ends it."""
    sentences = verdict(summary)
    judged = any(summary.get(key) for key in ("judge", "head_to_head"))
    if not judged and not any(m.get("sees_judge") for m in rows_of(summary).values()):
        return sentences
    headline = one_sentence(summary)
    return [headline, *(s for s in sentences if not headline.startswith(s.removesuffix(".")))]


def judge_panel(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a reward model is worth: sentences, the reliability diagram, and two small tables."""
    return {
        "lines": judge_lines(report, name),
        "chart": reliability_diagram(report.get("reliability") or [], title=f"Reliability, {name}"),
        "tables": [
            ("Score against length", _length_rows(report.get("length") or {})),
            ("Calibration and scale", _scale_rows(report)),
        ],
    }


def reliability_diagram(bins: Sequence[Mapping[str, Any]], *, title: str) -> Markup | None:
    """Accuracy against confidence, a larger mark for more pairs; None where no bin holds a pair."""
    marks = []
    largest = max((number(b.get("count")) or 0.0 for b in bins), default=0.0)
    for b in bins:
        x, y, count = number(b.get("confidence")), number(b.get("accuracy")), number(b.get("count"))
        if x is None or y is None or not count:
            continue
        lo, hi = interval(b, "accuracy") or (None, None)
        note = f"confidence {x:.2f}, accuracy {share_with_interval(b, 'accuracy')}, {count:,.0f} pairs"
        marks.append(Mark(note, "ink", x, y, lo, hi, radius=round(2 + 5 * (count / largest) ** 0.5, 1)))
    return reliability_chart(marks, title=title) if marks else None


def _length_rows(length: Mapping[str, Any]) -> list[tuple[str, str]]:
    def points(key: str) -> str:
        value, bounds = number(length.get(key)), interval(length, key)
        if value is None:
            return MISSING
        shown = [signed(f"{100 * share:.1f}") for share in (value, *(bounds or ()))]
        return shown[0] + (f" [{shown[1]}, {shown[2]}]" if bounds else "")

    def part(key: str) -> str:
        figures = length.get(key) or {}
        return f"{share_with_interval(figures, 'accuracy')} ({written(figures, 'count', '{:,.0f}'.format)})"

    pairs = f" of {length['unequal']:,} pairs" if has(length, "unequal") else ""
    return [
        ("Score with length, Spearman", written(length, "spearman", decimals)),
        ("Score with length, Pearson", written(length, "pearson", decimals)),
        ("Margin with difference in length, Spearman", written(length, "margin_spearman", decimals)),
        ("Margin with difference in length, Pearson", written(length, "margin_pearson", decimals)),
        (f"Longer one scored higher,{pairs}", share_with_interval(length, "longer_preferred")),
        ("Longer one chosen by the labels", share_with_interval(length, "longer_chosen")),
        ("Bias to the longer one, in points", points("longer_bias")),
        ("Accuracy where the longer one is chosen (pairs)", part("chosen_longer")),
        ("Accuracy where the shorter one is chosen (pairs)", part("chosen_shorter")),
    ]


def _scale_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    temperature = report.get("temperature") or {}
    return [
        ("Calibration error, bins of equal width", written(report, "ece", decimals)),
        ("Calibration error, bins of equal count", written(report, "ece_equal_mass", decimals)),
        ("Mean confidence minus accuracy", plain_with_interval(report, "over_confidence")),
        ("Brier score (a coin has 0.25)", written(report, "brier", decimals)),
        ("Negative log-likelihood, nats (a coin has 0.69)", written(report, "nll", decimals)),
        ("Best temperature, fitted on the same pairs", written(temperature, "value", decimals)),
        ("Mean score", written(report, "score_mean", decimals)),
        ("Standard deviation of the score", written(report, "score_std", decimals)),
        ("Pairs scored equal", written(report, "ties", "{:,.0f}".format)),
    ]


def _sample(sample: Mapping[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """One prompt with its outputs; the single highest score is marked."""
    outputs = sample.get("outputs", {})
    scores = {name: number(output.get("score")) for name, output in outputs.items()}
    known = sorted((score for score in scores.values() if score is not None), reverse=True)
    alone = len(known) > 1 and known[0] > known[1]
    return {
        "prompt": sample.get("prompt", ""),
        "columns": sample.get("columns") or {},
        "outputs": [
            {
                "name": name,
                "key": keys.get(name, "ref"),
                "text": output.get("text", ""),
                "score": scores[name],
                "best": alone and scores[name] == known[0],
            }
            for name, output in outputs.items()
        ],
    }


def _no_break(text: str) -> Markup:
    """Keeps a figure with its unit and its interval on one line."""
    joined = NO_BREAK.sub("\u00a0", str(text))
    return escape(joined)


def _cell(text: str) -> Markup:
    """A table cell: the figure, and its interval in a quieter voice."""
    figure, bracket, interval = text.partition(" [")
    if not bracket:
        return escape(text)
    return Markup('{} <span class="interval">[{}</span>').format(figure, interval)
