"""Result files as Markdown tables: ``python -m benchmarks table`` writes them between the marks of a page.

A page asks for a table with ``<!-- results: NAME -->`` and ``<!-- end results -->`` on lines of their own;
what stands between them is replaced by the tables of ``NAME.json`` and every ``NAME-*.json`` in the results'
folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.plan import pages as plan_pages
from benchmarks.scale import pages as scale_pages

RESULTS = ROOT / "benchmarks" / "results"
PAGES = tuple(
    ROOT / "docs" / f"{name}.md" for name in ("performance", "dialects", "plan-accuracy", "scale-measured")
)
MARK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end results -->)", re.DOTALL)
Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def fill(page: str, results: Path = RESULTS) -> str:
    """The page with the tables of the results between its marks."""
    return MARK.sub(lambda mark: f"{mark[1]}{_block(mark[2], results)}{mark[3]}", page)


def write_pages(pages: tuple[Path, ...] = PAGES, results: Path = RESULTS) -> list[Path]:
    """Fill every page in place; returns those that changed."""
    changed = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if (new := fill(text, results)) != text:
            page.write_text(new, encoding="utf-8")
            changed.append(page)
    return changed


def _block(name: str, results: Path) -> str:
    files = sorted([*results.glob(f"{name}.json"), *results.glob(f"{name}-*.json")])
    files = [file for file in files if name != "plan" or not file.stem.startswith("plan-time")]
    parts = [_of_file(name, json.loads(file.read_text(encoding="utf-8")), file.name) for file in files]
    if parts and name == "precision":
        parts.insert(0, "## What bf16 costs in accuracy\n")
    if not parts and name != "precision":
        parts = [f"Not measured yet: `python -m benchmarks {name} --json {name}.json`.\n"]
    return "\n" + "\n".join(parts) + "\n" if parts else ""


def _of_file(name: str, result: dict[str, Any], file: str) -> str:
    rows = result["rows"]
    if name == "roles":
        _against_sft(rows)
    if name == "parity":
        return "\n".join([result["setting"], "", *_parity(rows), _where(result, file)]) + "\n"
    if name == "plan-time":
        return "\n".join([*plan_pages.step_tables(result), _where(result, file)]) + "\n"
    if name == "plan":
        return "\n".join([*plan_pages.tables(result), _where(result, file)]) + "\n"
    if name == "scale":
        return "\n".join([*scale_pages.tables(result), _where(result, file)]) + "\n"
    if name == "precision":
        return "\n".join([result["setting"], *map(_precision, rows), _where(result, file)]) + "\n"
    columns = [column for column in COLUMNS.get(name, STEP) if any(column[1](row) != "–" for row in rows)]
    lines = [_table(columns, [row for row in rows if "skipped" not in row])]
    lines += [f"{row['case']}: skipped, {row['skipped']}\n" for row in rows if "skipped" in row]
    return "\n".join([*lines, _where(result, file)]) + "\n"


def _against_sft(rows: list[Row]) -> None:
    """What each case's peak is of that of LoRA-SFT on the same model."""
    sft = {row["case"].split(",")[0]: row["ours_peak_mb"] for row in rows if "SFT" in row["case"]}
    for row in rows:
        if base := sft.get(row["case"].split(",")[0]):
            row["against_sft"] = row["ours_peak_mb"] / base


def _table(columns: list[Column], rows: list[Row], words: int = 1) -> str:
    """``words``: how many columns, from the first, hold text and stand on the left."""
    lines = ["| " + " | ".join(title for title, _ in columns) + " |"]
    lines.append("|---" * words + "|---:" * (len(columns) - words) + "|")
    lines += ["| " + " | ".join(show(row) for _, show in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _where(result: dict[str, Any], file: str) -> str:
    """The machine and the file, in one line."""
    machine = result["machine"]
    packages = {**(machine.get("peer") or {}), **(machine.get("ours") or {})}
    names = [f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages]
    parts = [f"{machine['cpu']}, {machine['cores']} cores", *names, f"load {machine['load']}", f"`{file}`"]
    return "*" + "; ".join(parts) + ".*"


def _number(key: str, unit: str = "", digits: int = 2) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(key)
        return "–" if value is None else f"{value:,.{digits}f}{unit}"

    return show


def _case(row: Row) -> str:
    return str(row["case"])


def _percent(row: Row) -> str:
    return "–" if row.get("fraction") is None else f"{100 * row['fraction']:.0f} %"


_SECONDS: list[Column] = [("ours", _number("ours_s", " s")), ("peer", _number("peer_s", " s"))]
_PEAKS: list[Column] = [
    ("our peak", _number("ours_peak_mb", " MB", 0)),
    ("its peak", _number("peer_peak_mb", " MB", 0)),
    ("ratio", _number("memory_ratio")),
]
STEP: list[Column] = [("case", _case), *_SECONDS, ("speedup", _number("speedup", "×", 1)), *_PEAKS]
COLUMNS: dict[str, list[Column]] = {
    "sampling": [
        ("case", _case),
        ("ours", _number("ours_tokens_per_s", " tokens/s", 0)),
        ("peer", _number("peer_tokens_per_s", " tokens/s", 0)),
        ("speedup", _number("speedup", "×", 1)),
        *_PEAKS,
    ],
    "peak": [
        ("case", _case),
        ("forward and backward", _number("ours_s", " s")),
        ("reached", _number("gflops", " GFLOP/s", 0)),
        ("fastest product", _number("peak_gflops", " GFLOP/s", 0)),
        ("fraction", _percent),
    ],
    "roles": [
        ("case", _case),
        ("step", _number("ours_s", " s")),
        ("peak above imports", _number("ours_peak_mb", " MB", 0)),
        ("of LoRA-SFT's", _number("against_sft", "×")),
    ],
    "growth": [
        ("point", _case),
        ("forward and backward", _number("ours_s", " s")),
        ("speed", _number("ours_tokens_per_s", " tokens/s", 0)),
        ("peak", _number("ours_peak_mb", " MB", 0)),
        ("above the model", _number("ours_above_model_mb", " MB", 0)),
    ],
}
"""Name → its columns; a column without any figure is left out. The rest have those of a step."""


PARITY: list[Column] = [
    ("case", _case),
    ("ours", lambda row: f"`{row['ours']}`"),
    ("TRL", lambda row: f"`{row['peer']}`"),
    ("loss", lambda row: _largest(row, "loss_difference", "value_loss_difference")),
    ("gradient norm", lambda row: _largest(row, "grad_norm_difference", "critic_grad_norm_difference")),
    ("loss moved", lambda row: f"{100 * row['loss_moved']:.0f} %"),
]
APART: list[Column] = [
    ("case", _case),
    ("why", lambda row: str(row["why"])),
    ("step", lambda row: str(row["at_step"])),
    ("loss", lambda row: _both(row, "loss")),
    ("gradient norm", lambda row: _both(row, "grad_norm")),
]
"""Where the two differ on purpose: ours and TRL's numbers at the first step that shows it."""


def _both(row: Row, name: str) -> str:
    """Ours and the peer's; what rounding has left of a 0 is shown as 0."""
    values = (row[f"{side}_{name}"] for side in ("ours", "peer"))
    return " and ".join(f"{value:.4g}" if abs(value) > 1e-6 else "0" for value in values)


def _largest(row: Row, *keys: str) -> str:
    return f"{max(row[key] for key in keys if key in row):.1e}"


def _parity(rows: list[Row]) -> list[str]:
    """What agrees, with its largest relative differences, what differs on purpose, and what failed."""
    apart = [row for row in rows if "why" in row]
    compared = [row for row in rows if "loss_difference" in row and "why" not in row]
    failed = [f"{row['case']}: {row['verdict']}\n" for row in rows if row not in apart + compared]
    wrong = [f"{row['case']}: {row['verdict']}\n" for row in compared if row["verdict"] != "agrees"]
    return [
        "Largest relative difference over the steps:\n",
        _table(PARITY, compared, words=3),
        *wrong,
        *failed,
        "Differing on purpose, ours and TRL's at the first step that shows it:\n",
        _table(APART, apart, words=2),
    ]


def _precision(row: Row) -> str:
    """One method: what each run ended with, and how far its curves lie from those of fp32."""
    lines = [
        f"\n{row['case']}:\n",
        "| | fp32 | bf16 | fp32, another seed | largest gap | mean gap | between seeds |",
    ]
    lines.append("|---" + "|---:" * 6 + "|")

    def of(found: dict[str, Any]) -> list[str]:
        return [f"{found[t]:.4g}" for t in ("float32", "bfloat16", "float32, another seed")]

    for metric in row["final"]["float32"]:
        shown = of({title: values[metric] for title, values in row["final"].items()})
        gaps = ("bfloat16_max", "bfloat16_mean", "between_seeds_mean")
        shown += [f"{row[f'{gap}_abs_difference'][metric]:.2g}" for gap in gaps]
        lines.append(f"| {metric} | " + " | ".join(shown) + " |")
    lines.append("| gold reward | " + " | ".join([*of(row["gold_reward"]), "–", "–", "–"]) + " |")
    return "\n".join(lines) + "\n"
