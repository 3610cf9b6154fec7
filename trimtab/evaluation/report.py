"""A comparison in words, as a table, and as one page that opens anywhere.

:func:`verdict` and :func:`comparison_table` are what the terminal prints; :func:`write_report` puts the
same sentences and the same cells into ``report.html``, with curves, the KL–reward plane and samples.
The page has no scripts and asks the network for nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from trimtab.errors import InputError
from trimtab.evaluation.charts import SMOOTH_FROM, Mark, Series, line_chart, scatter_chart

MISSING = "–"
"""What a figure that was not measured shows as."""
ABBREVIATIONS = {
    name.lower(): name for name in ("SFT", "DPO", "PPO", "GRPO", "RLOO", "IPO", "KTO", "ORPO", "SimPO", "RM")
}
LENGTH_RATIO = 1.5
"""From this ratio of lengths on, the verdict says that length may explain a win."""
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
}
"""Metrics that mean the same for every method and so share one panel. Losses do not."""

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that HTML forbids or UTF-8 cannot hold; a sampled text may contain them."""


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """What the comparison showed, in sentences, the strongest method first.

    A method beats the reference, or loses to it, only if the whole interval of its win rate lies on one
    side of 50 %; otherwise no difference is shown. A win by a method whose responses are at least 1.5
    times as long as the reference's (or as short) is followed by a warning that length may explain it.

    >>> verdict({"reference": "sft", "methods": {"grpo": {"win_rate": 0.78, "win_rate_ci95": [0.73, 0.82]}}})
    ["GRPO beats SFT: win rate 78 % [73, 82]."]
    """
    methods = _methods(summary)
    reference = summary.get("reference")
    compared = {name: m for name, m in methods.items() if name != reference and _has(m, "win_rate")}
    sentences = []
    for name in sorted(compared, key=lambda name: -compared[name]["win_rate"]):
        sentences.append(_against_reference(name, compared[name], reference))
        warning = _length_warning(name, compared[name], reference, methods)
        if warning:
            sentences.append(warning)
    sentences += _best_gold(methods)
    for name, m in methods.items():
        if _has(m, "implicit_accuracy"):
            low, high = (100 * bound for bound in m["implicit_accuracy_ci95"])
            chance = (
                "above chance" if low > 50 else "below chance" if high < 50 else "no different from chance"
            )
            sentences.append(
                f"{display_name(name)}'s implicit reward prefers the chosen answer in "
                f"{100 * m['implicit_accuracy']:.1f} % [{low:.1f}, {high:.1f}] of held-out pairs: {chance}."
            )
    return sentences or ["Nothing was compared: no method has a win rate or a gold reward."]


def comparison_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and one row a method, every cell already in words; a missing figure is –.

    Columns that only some tasks have (accuracies) appear if any method has them.
    """
    methods = _methods(summary)
    reference = summary.get("reference")
    against = f" vs {display_name(reference)}" if reference else ""
    columns: list[tuple[str, str, Callable[[Mapping[str, Any], str], str]]] = [
        ("gold_reward", "Gold reward [95 %]", _plain_with_interval),
        ("win_rate", f"Win rate{against} [95 %]", _share_with_interval),
        ("preference_accuracy", "Preference accuracy [95 %]", _share_with_interval),
        ("implicit_accuracy", "Implicit-reward accuracy [95 %]", _share_with_interval),
        ("accuracy", "Accuracy [95 %]", _share_with_interval),
        ("kl_nats_per_token", "KL, nats per token", lambda m, key: _format(m, key, _decimals)),
        ("response_tokens", "Tokens per response", lambda m, key: _format(m, key, "{:,.1f}".format)),
        ("wall_s", "Wall time", lambda m, key: _format(m, key, _duration)),
        ("generated_tokens", "Generated tokens", lambda m, key: _format(m, key, "{:,.0f}".format)),
        ("peak_rss_mb", "Peak memory", lambda m, key: _format(m, key, _memory)),
        ("models_in_memory", "Models in memory", lambda m, key: _format(m, key, "{:,.0f}".format)),
        ("gradient_steps", "Gradient steps", lambda m, key: _format(m, key, "{:,.0f}".format)),
        ("reward_seen", "Reward seen", lambda m, key: str(m.get(key) or MISSING)),
    ]
    # These belong to some kinds of study only; a study of pairs alone answers no prompt.
    optional = {"preference_accuracy", "implicit_accuracy", "accuracy"}
    if any(_has(m, "preference_accuracy") for m in methods.values()):
        optional |= {"gold_reward", "win_rate", "kl_nats_per_token", "response_tokens"}
    shown = [c for c in columns if c[0] not in optional or any(_has(m, c[0]) for m in methods.values())]
    rows = []
    for name, m in methods.items():
        title = display_name(name) + (" (reference)" if name == reference else "")
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
    ``{"prompt", "columns", "outputs": {method: {"text", "score"}}}``. Every key of the summary besides
    the methods is listed under settings. Text from data is escaped, control characters become �.

    Raises InputError for a summary without methods.
    """
    methods = _methods(summary)
    reference = summary.get("reference")
    names = [*methods, *(name for name in curves if name not in methods)]
    keys = _colours(names, reference)
    header, rows = comparison_table(summary)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        name=display_name, nobreak=_no_break, cell=_cell, score=lambda value: _signed(_decimals(value))
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        verdict=verdict(summary),
        header=header,
        rows=rows,
        method_keys=[keys[name] for name in methods],
        sample_size=summary.get("sample_size"),
        reference=reference,
        panels=_shared_panels(curves, keys),
        loss_panels=_loss_panels(curves, keys),
        smooth_from=SMOOTH_FROM,
        plane=_plane(methods, reference, keys),
        samples=[_sample(sample, keys) for sample in samples],
        open_samples=OPEN_SAMPLES,
        settings={key: value for key, value in summary.items() if key not in ("title", "methods")},
        missing=MISSING,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CONTROL.sub("\ufffd", page), encoding="utf-8")
    return path


def display_name(name: str) -> str:
    """A method's name as the field writes it: "grpo" → "GRPO", "dpo-beta0.3" → "DPO-beta0.3"."""
    stem, rest = re.match(r"([A-Za-z]*)(.*)", str(name), re.DOTALL).groups()  # type: ignore[union-attr]
    return ABBREVIATIONS.get(stem.lower(), stem) + rest


# --- sentences


def _against_reference(name: str, method: Mapping[str, Any], reference: Any) -> str:
    ours, theirs = display_name(name), display_name(reference) if reference else "the reference"
    interval = _interval(method, "win_rate")
    shown = _share_with_interval(method, "win_rate")
    if interval is None:
        return f"{ours} against {theirs}: win rate {shown} without an interval, so no difference is shown."
    if interval[0] > 0.5:
        return f"{ours} beats {theirs}: win rate {shown}."
    if interval[1] < 0.5:
        return f"{ours} loses to {theirs}: win rate {shown}."
    return f"{ours} against {theirs}: no difference shown, win rate {shown}."


def _length_warning(
    name: str, method: Mapping[str, Any], reference: Any, methods: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """Judges and reward models favour length (Singhal et al., 2023): a longer winner needs a second look."""
    interval, other = _interval(method, "win_rate"), methods.get(reference, {})
    ours, theirs = _number(method.get("response_tokens")), _number(other.get("response_tokens"))
    if interval is None or interval[0] <= 0.5 or not ours or not theirs:
        return None
    ratio = max(ours / theirs, theirs / ours)
    if ratio < LENGTH_RATIO:
        return None
    way = "long" if ours > theirs else "short"
    return (
        f"{display_name(name)}'s responses are {ratio:.1f} times as {way} as {display_name(reference)}'s: "
        "length may explain part of its win."
    )


def _best_gold(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which method has the highest gold reward, and whether its interval stands clear of the others'."""
    scored = sorted(
        (name for name in methods if _has(methods[name], "gold_reward")),
        key=lambda name: -methods[name]["gold_reward"],
    )
    if len(scored) < 2:
        return []
    best = methods[scored[0]]
    kl = _format(best, "kl_nats_per_token", _decimals)
    sentence = f"Highest gold reward: {display_name(scored[0])}, {_plain_with_interval(best, 'gold_reward')}"
    sentence += "." if kl == MISSING else f", at a KL of {kl} nats per token."
    bounds = _interval(best, "gold_reward")
    near = []
    for name in scored[1:]:
        other = _interval(methods[name], "gold_reward")
        if bounds is None or other is None or other[1] >= bounds[0]:
            near.append(display_name(name))
    if near:
        listed = near[0] if len(near) == 1 else f"{', '.join(near[:-1])} and {near[-1]}"
        sentence += f" Its interval is not clear of {listed}, so their order is not settled."
    return [sentence]


# --- figures in words


def _methods(summary: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    methods = summary.get("methods")
    if not isinstance(methods, Mapping) or not methods:
        raise InputError("the summary has no methods: give summary.json as compare writes it")
    return methods


def _number(value: Any) -> float | None:
    """A finite number, or None for whatever else stands in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _has(method: Mapping[str, Any], key: str) -> bool:
    return _number(method.get(key)) is not None


def _interval(method: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    bounds = method.get(f"{key}_ci95")
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        return None
    lo, hi = _number(bounds[0]), _number(bounds[1])
    return None if lo is None or hi is None else (lo, hi)


def _format(method: Mapping[str, Any], key: str, write: Callable[[float], str]) -> str:
    value = _number(method.get(key))
    return MISSING if value is None else _signed(write(value))


def _signed(text: str) -> str:
    """With the typographic minus, and none before a rounded zero."""
    return re.sub(r"^-(?=[0.]*$)", "", text).replace("-", "−") if text != MISSING else text


def _decimals(value: Any) -> str:
    """Two decimals; three below 0.1, so that a small KL is not rounded to nothing."""
    number = _number(value)
    if number is None:
        return MISSING
    return f"{number:.3f}" if 0 < abs(number) < 0.1 else f"{number:,.2f}"


def _plain_with_interval(method: Mapping[str, Any], key: str) -> str:
    value, bounds = _number(method.get(key)), _interval(method, key)
    if value is None:
        return MISSING
    shown = _signed(f"{value:,.2f}")
    if bounds is None:
        return shown
    return f"{shown} [{_signed(f'{bounds[0]:,.2f}')}, {_signed(f'{bounds[1]:,.2f}')}]"


def _share_with_interval(method: Mapping[str, Any], key: str) -> str:
    """A share in per cent; with decimals where rounding would put a bound on 50 that lies beside it."""
    value, bounds = _number(method.get(key)), _interval(method, key)
    if value is None:
        return MISSING
    if bounds is None:
        return f"{100 * value:.0f} %"
    decimals = 0
    while decimals < 3 and any(
        bound != 0.5 and float(f"{100 * bound:.{decimals}f}") == 50 for bound in (value, *bounds)
    ):
        decimals += 1
    point, lo, hi = (f"{100 * share:.{decimals}f}" for share in (value, *bounds))
    return f"{point} % [{lo}, {hi}]"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _memory(megabytes: float) -> str:
    return f"{megabytes:,.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:,.1f} GB"


# --- parts of the page


def _colours(names: list[str], reference: Any) -> dict[str, str]:
    """A colour key for each method, the same throughout the page; the reference is the grey baseline."""
    others = [name for name in names if name != reference]
    return {name: "ref" if name == reference else str(others.index(name) % PALETTE) for name in names}


def _points(records: list[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    pairs = [(_number(record.get("step")), _number(record.get(metric))) for record in records]
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


def _loss_panels(
    curves: Mapping[str, list[dict[str, Any]]], keys: dict[str, str]
) -> list[tuple[str, Markup]]:
    panels = []
    for name, records in curves.items():
        points = _points(records, "loss")
        if points:
            title = f"Loss, {display_name(name)}"
            series = [Series(display_name(name), keys[name], points)]
            panels.append((title, line_chart(series, title=title, labels=False)))
    return panels


def _plane(methods: Mapping[str, Mapping[str, Any]], reference: Any, keys: dict[str, str]) -> Markup | None:
    marks = []
    for name, m in methods.items():
        x, y = _number(m.get("kl_nats_per_token")), _number(m.get("gold_reward"))
        lo, hi = _interval(m, "gold_reward") or (None, None)
        if x is not None and y is not None:
            marks.append(Mark(display_name(name), keys[name], x, y, lo, hi))
    if not marks:
        return None
    return scatter_chart(
        marks,
        title="Gold reward against KL",
        x_label="KL, nats per token",
        y_label="gold reward",
        baseline=_number(methods.get(reference, {}).get("gold_reward")),
    )


def _sample(sample: Mapping[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """One prompt with its outputs; the single highest score is marked."""
    outputs = sample.get("outputs", {})
    scores = {name: _number(output.get("score")) for name, output in outputs.items()}
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
    joined = re.sub(r"(?<=[\d%]) (?=[%\[])|(?<=\d,) (?=[^ ]*\])", "\u00a0", str(text))
    return escape(joined)


def _cell(text: str) -> Markup:
    """A table cell: the figure, and its interval in a quieter voice."""
    figure, bracket, interval = text.partition(" [")
    if not bracket:
        return escape(text)
    return Markup('{} <span class="interval">[{}</span>').format(figure, interval)
