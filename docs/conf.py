"""Sphinx configuration: ``make docs`` builds the pages into docs/_build."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import options  # noqa: E402 - found through the line above

import trimtab  # noqa: E402

project = "Trimtab"
release = version = trimtab.__version__
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 4
myst_enable_extensions = ["fieldlist"]
language = "en"
html_theme = "furo"
html_title = "Trimtab"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = False
html_copy_source = False
nitpicky = True


def _fill(app: Any, docname: str, source: list[str]) -> None:
    source[0] = options.fill(source[0])


def setup(app: Any) -> dict[str, bool]:
    """Put the option tables where pages ask for them."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True}
