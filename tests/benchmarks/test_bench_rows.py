"""What rows say beyond the contract: memory above the model, tokens a second, the fraction of the peak."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.catalogue import BENCHMARKS
from benchmarks.rows import FIGURES, Side, skipped_row, to_row


def test_above_model_takes_the_loaded_weights_off_both_sides() -> None:
    sides = {
        "ours": Side([1.0], 900.0, 500.0, {"parameters": 2**20}),
        "peer": Side([2.0], 2100.0, 500.0, {"parameters": 2**20}),
    }
    row = to_row("a case", sides, 1, above_model=True)
    assert (row["ours_peak_mb"], row["peer_peak_mb"], row["memory_ratio"]) == (400, 1600, 0.25)
    # 12 bytes for each of 2^20 parameters are 12 MB
    assert (row["ours_above_states_mb"], row["peer_above_states_mb"]) == (388, 1588)
    plain = to_row("a case", sides, 1)
    assert (plain["ours_peak_mb"], plain["ours_above_model_mb"]) == (900, 400)
    assert "ours_above_states_mb" not in plain


def test_tokens_and_flops_are_divided_by_the_median() -> None:
    facts = {"tokens_per_step": 800, "flops_per_step": 4e12, "peak_gflops": 4000.0}
    row = to_row("a case", {"ours": Side([1.0, 2.0, 30.0], None, None, facts)}, 3)
    assert row["ours_tokens_per_s"] == 400
    assert (row["gflops"], row["peak_gflops"], row["fraction"]) == (2000, 4000, 0.5)


def test_a_skipped_row_has_every_key_of_the_contract() -> None:
    row = skipped_row("a case", "no such package")
    assert {"case", "runs", *FIGURES} <= row.keys()
    assert all(row[key] is None for key in FIGURES)


RESULT = """{"name": "dpo", "setting": "words", "machine": {"cpu": "A", "cores": 2, "load": 1.5,
 "ours": {"torch": "2.13.0"}, "peer": null}, "rows": [
 {"case": "tuned allocator", "ours_s": 2.0, "peer_s": 8.0, "speedup": 4.0, "ours_peak_mb": 1234.5,
  "peer_peak_mb": null, "memory_ratio": null, "runs": 7},
 {"case": "other", "ours_s": null, "peer_s": null, "speedup": null, "ours_peak_mb": null,
  "peer_peak_mb": null, "memory_ratio": null, "runs": 0, "skipped": "not installed"}]}"""


def test_tables_are_written_between_the_marks(tmp_path: Path) -> None:
    (tmp_path / "dpo-cpu.json").write_text(RESULT)
    page = "before\n<!-- results: dpo -->\nold\n<!-- end results -->\nafter\n"
    filled = tables.fill(page, tmp_path)
    assert filled.startswith("before\n<!-- results: dpo -->\n")
    assert filled.endswith("<!-- end results -->\nafter\n")
    assert "old" not in filled
    # columns without any figure are left out
    assert "| case | ours | peer | speedup | our peak |\n" in filled
    assert "| tuned allocator | 2.00 s | 8.00 s | 4.0× | 1,234 MB |\n" in filled
    assert "other: skipped, not installed" in filled
    assert "A, 2 cores; torch 2.13.0; load 1.5; `dpo-cpu.json`" in filled
    assert tables.fill(filled, tmp_path) == filled


def test_what_was_not_measured_says_how(tmp_path: Path) -> None:
    page = "<!-- results: sft -->\n<!-- end results -->\n<!-- results: precision -->\n<!-- end results -->\n"
    filled = tables.fill(page, tmp_path)
    assert "Not measured yet: `python -m benchmarks sft --json sft.json`." in filled
    # its section exists only with its result
    assert filled.endswith("<!-- results: precision -->\n<!-- end results -->\n")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_pages_show_the_results_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.fill(text) == text, "run python -m benchmarks table"


def test_every_benchmark_is_on_a_page() -> None:
    texts = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    marks = {mark[2] for text in texts for mark in tables.MARK.finditer(text)}
    assert marks >= {*BENCHMARKS, "precision", "parity"}
