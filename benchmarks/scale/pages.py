"""What docs/scale-measured.md shows of a result of ``scale``."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def tables(result: dict[str, Any]) -> list[str]:
    """Case by case and way by way: seconds and what messages took, then memory beside the plan."""
    rows = [row for row in result["rows"] if "step_s" in row]
    failed = [row for row in result["rows"] if "step_s" not in row]
    lines = [
        "| case | way | a step | tokens/s | speedup | in messages | of it waiting |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(_time(row) for row in rows),
        "",
        "| case | way | measured, each process | planned | planned over measured, less 1 |",
        "|---|---|---:|---:|---:|",
        *(_memory(row) for row in rows),
    ]
    lines += [f"\n{row['case']}, {row['way']}: failed: {row['failed']}" for row in failed]
    if noisy := [row for row in rows if row.get("noisy")]:
        lines.append(
            f"\n† Other programs kept up to {max(row['others'] for row in noisy):.1f} cores busy meanwhile: "
            "these seconds are too long."
        )
    loads = [row["load"] for row in rows]
    counts = sorted({row["runs"] for row in rows})
    if rows:
        many = " or ".join(map(str, counts))
        lines.append(f"\nRuns a row: {many}. Load before a run: {min(loads):.1f} to {max(loads):.1f}.")
    return [*lines, ""]


def _time(row: Row) -> str:
    mark = " †" if row.get("noisy") else ""
    speedup = f"{row['speedup']:.2f}×" if "speedup" in row else "–"
    sent = ["–", "–"] if row["processes"] == 1 else [f"{row[k]:.2f} s" for k in ("messages_s", "waiting_s")]
    cells = [row["case"], row["way"], f"{row['step_s']:.2f} s{mark}", f"{row['tokens_per_s']:,.0f}", speedup]
    return "| " + " | ".join([*cells, *sent]) + " |"


def _memory(row: Row) -> str:
    peaks = " and ".join(f"{peak:,}" for peak in row["peak_mb"])
    return f"| {row['case']} | {row['way']} | {peaks} MB | {row['planned_mb']:,} MB | {row['error']:+.1%} |"
