"""What the documentation shows of a command is what the command prints: ``docs/options.py`` puts it there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "<!-- output -->" in page.read_text("utf-8")]


@pytest.fixture(scope="module")
def options() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_options", DOCS / "options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pages are built anywhere: no measurement of this machine, a terminal of another width."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "133")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_mark_is_filled(page: Path, options: ModuleType) -> None:
    text = page.read_text("utf-8")
    filled = options.fill(text)
    assert "<!-- output -->" not in filled, f"{page.name}: a mark stands behind no block of one command"
    assert all(len(line) <= 80 for found in options.OUTPUT.findall(text) for line in shown(options, found))


def shown(options: ModuleType, command: str) -> list[str]:
    lines: list[str] = options.printed(command).splitlines()
    return lines


def test_the_plan_in_the_docs(options: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory, time, cost and advice: what the page goes on to explain."""
    [command] = options.OUTPUT.findall((DOCS / "plan.md").read_text("utf-8"))
    lines = shown(options, command)
    assert lines[0] == "ppo of Qwen/Qwen3-0.6B"
    starts = ("does not fit: peak", "W weights", "F framework", "  reward model", "  training W", "update")
    for start in (*starts, "  cost ", "with these changes it fits", "  all at once: --"):
        assert [line for line in lines if line.startswith(start)], start
    assert capsys.readouterr() == ("", "")


def test_a_command_that_is_refused_stops_the_docs(options: ModuleType) -> None:
    page = "```\ntrimtab plan ppo --model qwen3-0.6b \\\n    --promt 3\n```\n\n<!-- output -->\n"
    refuse: Callable[[str], str] = options.fill
    with pytest.raises(ValueError, match="did you mean --prompt"):
        refuse(page)
