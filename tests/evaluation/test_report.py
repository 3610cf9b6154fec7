"""The report: what the verdict may claim, what the table says, and a page that is safe and readable."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import trimtab.evaluation.report as report
from trimtab.errors import InputError
from trimtab.evaluation.report import comparison_table, display_name, verdict, write_report

SUMMARY: dict[str, Any] = {
    "title": "Demo",
    "reference": "sft",
    "sample_size": 400,
    "budget": {"generated_tokens": 1_200_000},
    "lineage": {"packages": {"torch": "2.13.0"}, "seeds": [1, 2]},
    "methods": {
        "sft": {
            "gold_reward": 0.41,
            "gold_reward_ci95": [0.38, 0.44],
            "win_rate": None,
            "win_rate_ci95": None,
            "kl_nats_per_token": 0.0,
            "response_tokens": 38.2,
            "wall_s": 61.0,
            "generated_tokens": 0,
            "peak_rss_mb": 812.0,
            "models_in_memory": 1,
            "gradient_steps": 300,
            "reward_seen": "demonstrations",
        },
        "grpo": {
            "gold_reward": 0.71,
            "gold_reward_ci95": [0.68, 0.74],
            "win_rate": 0.78,
            "win_rate_ci95": [0.73, 0.82],
            "kl_nats_per_token": 0.0124,
            "response_tokens": 45.0,
            "wall_s": 4000.0,
            "generated_tokens": 1_048_576,
            "peak_rss_mb": 1490.0,
            "models_in_memory": 2,
            "gradient_steps": 150,
            "reward_seen": "gold",
        },
    },
}


def changed(**figures: Any) -> dict[str, Any]:
    summary = copy.deepcopy(SUMMARY)
    summary["methods"]["grpo"].update(figures)
    return summary


def test_verdict_of_a_clear_win() -> None:
    assert verdict(SUMMARY) == [
        "GRPO beats SFT: win rate 78 % [73, 82].",
        "Highest gold reward: GRPO, 0.71 [0.68, 0.74], at a KL of 0.012 nats per token.",
    ]


@pytest.mark.parametrize(
    ("rate", "interval", "sentence"),
    [
        (0.53, [0.48, 0.58], "GRPO against SFT: no difference shown, win rate 53 % [48, 58]."),
        (0.55, [0.5, 0.6], "GRPO against SFT: no difference shown, win rate 55 % [50, 60]."),
        (0.40, [0.35, 0.45], "GRPO loses to SFT: win rate 40 % [35, 45]."),
        (0.55, [0.503, 0.6], "GRPO beats SFT: win rate 55.0 % [50.3, 60.0]."),  # never "beats … [50, 60]"
        (0.45, [0.40, 0.4997], "GRPO loses to SFT: win rate 45.00 % [40.00, 49.97]."),
        (0.9, None, "GRPO against SFT: win rate 90 % without an interval, so no difference is shown."),
    ],
)
def test_verdict_claims_what_the_interval_allows(
    rate: float, interval: list[float] | None, sentence: str
) -> None:
    assert verdict(changed(win_rate=rate, win_rate_ci95=interval))[0] == sentence


def test_verdict_orders_by_strength_and_warns_of_length() -> None:
    summary = changed(win_rate=0.6, win_rate_ci95=[0.55, 0.65])
    summary["methods"]["dpo"] = {"win_rate": 0.7, "win_rate_ci95": [0.65, 0.75], "response_tokens": 76.4}
    assert verdict(summary)[:3] == [
        "DPO beats SFT: win rate 70 % [65, 75].",
        "DPO's responses are 2.0 times as long as SFT's: length may explain part of its win.",
        "GRPO beats SFT: win rate 60 % [55, 65].",
    ]
    shorter = verdict(changed(response_tokens=19.1))
    assert (
        shorter[1] == "GRPO's responses are 2.0 times as short as SFT's: length may explain part of its win."
    )
    assert len(verdict(changed(response_tokens=19.1, win_rate=0.5, win_rate_ci95=[0.45, 0.55]))) == 2


def test_overlapping_gold_rewards_are_not_ordered() -> None:
    summary = changed()
    summary["methods"]["ppo"] = {"gold_reward": 0.70, "gold_reward_ci95": [0.67, 0.73]}
    summary["methods"]["dpo"] = {"gold_reward": 0.60}
    assert verdict(summary)[-1].endswith(
        "Its interval is not clear of PPO and DPO, so their order is not settled."
    )


def test_verdict_without_a_comparison() -> None:
    assert verdict({"methods": {"sft": {}}}) == [
        "Nothing was compared: no method has a win rate or a gold reward."
    ]


def test_table_cells() -> None:
    header, rows = comparison_table(SUMMARY)
    assert header[:3] == ["Method", "Gold reward [95 %]", "Win rate vs SFT [95 %]"]
    assert "Accuracy [95 %]" not in header
    sft = "SFT (reference)|0.41 [0.38, 0.44]|–|0.00|38.2|1 min 01 s|0|812 MB|1|300|demonstrations"
    grpo = "GRPO|0.71 [0.68, 0.74]|78 % [73, 82]|0.012|45.0|1 h 06 min|1,048,576|1.5 GB|2|150|gold"
    assert rows == [sft.split("|"), grpo.split("|")]
    assert all(len(row) == len(header) for row in rows)


def test_optional_columns_appear_for_all_if_one_has_them() -> None:
    header, rows = comparison_table(
        changed(accuracy=0.625, accuracy_ci95=[0.6, 0.65], preference_accuracy=0.7)
    )
    place = header.index("Accuracy [95 %]")
    assert [row[place] for row in rows] == ["–", "62 % [60, 65]"]
    assert [row[place - 1] for row in rows] == ["–", "70 %"]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, "0.7", True, []])
def test_a_figure_that_is_no_number_is_missing(bad: Any) -> None:
    _, rows = comparison_table(changed(gold_reward=bad, kl_nats_per_token=bad, win_rate=bad, wall_s=bad))
    assert [rows[1][i] for i in (1, 2, 3, 5)] == ["–"] * 4


def test_negative_figures_have_a_real_minus() -> None:
    _, rows = comparison_table(changed(gold_reward=-1.5, gold_reward_ci95=[-2.0, -0.001]))
    assert rows[1][1] == "−1.50 [−2.00, 0.00]"


@pytest.mark.parametrize("summary", [{}, {"methods": {}}, {"methods": []}])
def test_a_summary_without_methods_is_refused(summary: dict[str, Any]) -> None:
    for use in (verdict, comparison_table):
        with pytest.raises(InputError, match="no methods"):
            use(summary)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("grpo", "GRPO"),
        ("simpo", "SimPO"),
        ("dpo-beta0.3", "DPO-beta0.3"),
        ("my_run", "my_run"),
        ("2nd", "2nd"),
    ],
)
def test_display_name(name: str, shown: str) -> None:
    assert display_name(name) == shown


# --- the page


class Page(HTMLParser):
    """Tags with attributes, the text between them, and whether every tag was closed in order."""

    VOID = ("meta", "link", "br", "circle", "path")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; \x00\x1b[31m \ud800 end"


@pytest.fixture
def curves() -> dict[str, list[dict[str, Any]]]:
    steps = range(1, 61)
    return {
        "sft": [{"step": i, "loss": 2 / i} for i in steps],
        "grpo": [{"step": i, "loss": math.nan, "reward_mean": i / 60, "kl": None} for i in steps]
        + [{"time": 3}],
    }


def build(
    path: Path, curves: dict[str, list[dict[str, Any]]], samples: list[dict[str, Any]], **more: Any
) -> tuple[str, Page]:
    target = write_report(
        path / "new" / "report.html", SUMMARY | more, curves=curves, samples=samples, title="A demo"
    )
    html = target.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    return html, page


def sample(text: str = "fine", score: float | None = 0.5) -> dict[str, Any]:
    return {
        "prompt": "Summarise",
        "columns": {"answer": "42"},
        "outputs": {"sft": {"text": "plain", "score": 0.25}, "grpo": {"text": text, "score": score}},
    }


def test_the_page_in_its_order(tmp_path: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    html, page = build(tmp_path, curves, [sample()])
    parts = ["beats SFT", "Comparison", "Learning curves", "Mean reward", "Loss, SFT", "Reward gained"]
    parts += ["Samples side by side", "Settings and lineage", "2.13.0"]
    body = html.partition("<body>")[2]
    assert [body.index(part) for part in parts] == sorted(body.index(part) for part in parts)
    assert "GRPO beats SFT: win rate 78\u00a0%\u00a0[73,\u00a082]." in page.text
    assert page.names().count("h1") == 1
    assert "caption" in page.names()
    # Only what was logged is drawn: one shared panel, one loss, the plane.
    assert page.names().count("svg") == 3
    assert "Loss, GRPO" not in html


def test_the_page_asks_the_network_for_nothing(
    tmp_path: Path, curves: dict[str, list[dict[str, Any]]]
) -> None:
    html, page = build(tmp_path, curves, [sample()])
    assert not re.search(r"https?://|//[a-z]|@import|url\(", html)
    assert {"script", "img", "iframe", "object", "embed"}.isdisjoint(page.names())
    assert [attributes.get("href") for tag, attributes in page.tags if tag == "link"] == ["data:,"]
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in page.tags)


def test_text_from_data_is_only_text(tmp_path: Path) -> None:
    evil_sample = {"prompt": EVIL, "columns": {EVIL: EVIL}, "outputs": {EVIL: {"text": EVIL, "score": None}}}
    summary = copy.deepcopy(SUMMARY)
    summary["methods"][EVIL] = dict(summary["methods"]["grpo"], reward_seen=EVIL)
    summary["settings"] = {EVIL: [EVIL, {"a": EVIL}]}
    curves = {EVIL: [{"step": i, "reward_mean": float(i), "loss": 1.0} for i in range(3)]}
    path = write_report(tmp_path / "report.html", summary, curves=curves, samples=[evil_sample], title=EVIL)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.names()
    assert "img" not in page.names()
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert (
        "<script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; \ufffd\ufffd[31m \ufffd end"
        in page.text
    )
    assert "\x00" not in html


def test_charts_and_regions_have_names(tmp_path: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    _, page = build(tmp_path, curves, [sample()])
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if attributes.get("role") == "region":
            assert attributes["aria-label"]
            assert attributes["tabindex"] == "0"  # or a keyboard could not scroll it
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert any(
        "GRPO from 0.01667 at step 1 to 1 at step 60" in (a.get("aria-label") or "") for _, a in page.tags
    )


def test_the_best_output_is_marked_only_if_alone(tmp_path: Path) -> None:
    assert build(tmp_path, {}, [sample(score=0.5)])[1].text.count("best") == 1
    assert build(tmp_path, {}, [sample(score=0.25)])[1].text.count("best") == 0
    assert build(tmp_path, {}, [sample(score=None)])[1].text.count("best") == 0


def test_further_samples_are_folded(tmp_path: Path) -> None:
    html, page = build(tmp_path, {}, [sample(text=f"output {i}") for i in range(7)])
    assert "3 more" in page.text
    folded = html.partition("<details>")[2].partition("</details>")[0]
    assert [i for i in range(7) if f"output {i}" in folded] == [4, 5, 6]


def test_empty_sections_are_left_out(tmp_path: Path) -> None:
    bare: dict[str, Any] = {"methods": {"sft": {}}}
    page = Page(
        write_report(tmp_path / "r.html", bare, curves={"sft": []}, samples=[], title="Bare").read_text()
    )
    assert "Nothing was compared" in page.text
    assert page.names().count("h2") == 1
    assert "svg" not in page.names()


def test_colours_follow_the_method_through_the_page() -> None:
    keys = report._colours(["dpo", "sft", "grpo", *(f"m{i}" for i in range(9))], "sft")
    assert (keys["dpo"], keys["sft"], keys["grpo"]) == ("0", "ref", "1")
    assert set(keys.values()) == {"ref", *map(str, range(report.PALETTE))}


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_text_colour_has_enough_contrast() -> None:
    source = (Path(report.__file__).parent / "templates" / "report.html.j2").read_text()
    blocks = re.findall(r":root \{(.*?)\}", source, re.DOTALL)
    assert len(blocks) == 3  # light, dark, print
    for block in blocks:
        colours = {
            k: (v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]))
            for k, v in re.findall(r"--([\w-]+): (#\w+)", block)
        }
        assert len(colours) == 6 + report.PALETTE + 1
        for name in ("ink", "quiet", *(n for n in colours if n.startswith("series"))):
            for ground in ("page", "card", "faint") if name == "ink" else ("page", "card"):
                light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)
