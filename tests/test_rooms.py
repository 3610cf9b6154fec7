"""The walls between the rooms: which part of the package may import which, and what a walk passes through.

The arrows are those of the design. A room may import what stands below it: what it is allowed directly, and
whatever those rooms are allowed (so a study, which stands on methods, may use what methods stand on).
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny
import torch

import trimtab
from trimtab.data.collate import collate
from trimtab.data.convert import as_pairs
from trimtab.data.readers import read_groups
from trimtab.data.render import tokenise
from trimtab.groups import Group, Response
from trimtab.kernels.fused import rms_norm
from trimtab.kernels.logps import selected_logps
from trimtab.models.load import ModelConfig, load_model
from trimtab.objectives.preference import dpo_loss
from trimtab.objectives.reduce import reduce_items, response_sums
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser
from trimtab.training.schedule import learning_rate

PACKAGE = Path(trimtab.__file__).parent

LEAVES = {"groups", "errors", "config"}
"""The records that every room speaks, the one exception, the base of configuration sections."""

DIRECT: dict[str, set[str]] = {
    "groups": set(),
    "errors": set(),
    "config": {"errors"},
    "batch": {"groups"},
    "objectives": set(),
    "kernels": set(),
    "models": {"batch", "kernels", *LEAVES},
    "data": {"batch", *LEAVES},
    "planning": {*LEAVES},
    "newsroom": {"groups", "errors"},
    "sandbox": {"errors"},
    "rewards": {"models", "data", "sandbox", "spread", *LEAVES},
    "rollouts": {"models", "data", "batch", "kernels", "spread", *LEAVES},
    "registry": {*LEAVES},
    "parallel": {*LEAVES},
    "spread": {"objectives", "models", "data", "batch", "parallel", *LEAVES},
    "training": {"objectives", "models", "kernels", "batch", "registry", "parallel", *LEAVES},
    "methods": {
        "objectives",
        "training",
        "models",
        "data",
        "rewards",
        "rollouts",
        "spread",
        "batch",
        *LEAVES,
    },
    "evaluation": {"objectives", "rollouts", "rewards", "models", "data", "spread", "batch", *LEAVES},
    "studies": {"methods", "evaluation", "planning", *LEAVES},
    "cli": {"studies", "registry", *LEAVES},
    "__main__": {"cli"},
}

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("studies/quickstart.py", "newsroom"): "the newsroom is the world that the quickstart trains in",
    ("spread/passes.py", "training"): "memory.py, which imports nothing: what this process may still take",
    ("spread/share.py", "training"): "memory.py, which imports nothing: whether it was memory that ran out",
    ("planning/processes.py", "parallel"): "rule.py, which imports nothing: a run decides by it too",
}
"""Arrows beyond the map, one file each, with the reason."""

STANDARD = sys.stdlib_module_names
OUTSIDE: dict[str, set[str]] = {
    "groups": set(),
    "errors": set(),
    "config": {"pydantic"},
    "batch": {"torch"},
    "sandbox": set(),
    "objectives": {"torch"},
    "planning": {"pydantic", "numpy", "rich", "huggingface_hub"},
    "cli": {"rich", "tyro", "pydantic"},
}
"""Rooms that may use few packages of others; the rest may use what the project depends on."""


def below(room: str) -> set[str]:
    """Everything that stands below a room."""
    found: set[str] = set()
    waiting = [room]
    while waiting:
        for lower in DIRECT[waiting.pop()] - found:
            found.add(lower)
            waiting.append(lower)
    return found


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> Iterator[tuple[int, str, bool]]:
    """Every import: line, absolute dotted name, and whether it runs when the module is loaded.

    ``from trimtab import methods`` gives trimtab.methods. Those inside functions, under TYPE_CHECKING and in
    ``importlib.import_module("…")`` count too.
    """

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[int, str, bool]]:
        for child in ast.iter_child_nodes(node):
            inner = top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"line {child.lineno}: write the import out"
                for alias in child.names:
                    yield child.lineno, f"{child.module}.{alias.name}", top
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
                if isinstance(child.args[0], ast.Constant):
                    yield child.lineno, str(child.args[0].value), top
                yield from walk(child, inner)
            else:
                yield from walk(child, inner)

    yield from walk(ast.parse(source), True)


def forbidden(source: str, room: str, path: str) -> list[str]:
    """The arrows of one file that the map does not have."""
    allowed = below(room) | {room}
    found = []
    for line, name, top in imports(source):
        first, *rest = name.split(".")
        if first == "trimtab":
            target = rest[0] if rest else ""
            if target == "__version__":
                continue
            if room == "cli":
                # Anything, but lazily: --help must be instant.
                wrong = top and target not in ("errors", "config", "cli")
            else:
                wrong = target not in allowed and (path, target) not in EXCEPTIONS
            if room == "methods" and target == "methods" and Path(path).name != "__init__.py":
                wrong = rest[1:2] != ["shared"]
        else:
            wrong = first not in STANDARD and room in OUTSIDE and first not in OUTSIDE[room]
        if wrong:
            found.append(f"{path}:{line}: {room} may not import {name}")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_is_on_the_map() -> None:
    rooms = {room_of(file) for file in FILES} - {"__init__"}
    assert rooms == set(DIRECT)


def test_the_map_has_no_circle() -> None:
    for room in DIRECT:
        assert room not in below(room)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_import_leaves_its_room_by_another_door(file: Path) -> None:
    if file == PACKAGE / "__init__.py":
        assert not list(imports(file.read_text()))[1:]
        return
    assert forbidden(file.read_text(), room_of(file), str(file.relative_to(PACKAGE))) == []


def test_exceptions_are_needed() -> None:
    for path, target in EXCEPTIONS:
        names = [name for _, name, _ in imports((PACKAGE / path).read_text())]
        assert any(name.startswith(f"trimtab.{target}") for name in names)
        assert target not in below(path.split("/")[0])


@pytest.mark.parametrize(
    ("room", "path", "source"),
    [
        ("objectives", "objectives/kl.py", "from trimtab.groups import Group"),
        ("objectives", "objectives/kl.py", "import transformers"),
        ("groups", "groups.py", "import numpy as np"),
        ("config", "config.py", "def f():\n    import torch"),
        ("batch", "batch.py", "import trimtab.models.head"),
        ("data", "data/chat.py", "from trimtab.models import load"),
        ("models", "models/load.py", "if TYPE_CHECKING:\n    from trimtab.data.collate import collate"),
        ("models", "models/load.py", "import importlib\nimportlib.import_module('trimtab.training.run')"),
        ("rewards", "rewards/base.py", "class A:\n    def f(self):\n        from trimtab import rollouts"),
        ("training", "training/run.py", "from trimtab.data.collate import collate"),
        ("evaluation", "evaluation/policy.py", "from trimtab.methods.shared.setup import settle_layout"),
        ("evaluation", "evaluation/policy.py", "from trimtab.training.run import Run"),
        ("planning", "planning/memory.py", "def f():\n    import torch"),
        ("methods", "methods/dpo.py", "from trimtab.methods.sft import train"),
        ("methods", "methods/dpo.py", "from trimtab.methods import sft"),
        ("methods", "methods/shared/setup.py", "from trimtab.methods import grpo"),
        ("methods", "methods/dpo.py", "from trimtab.studies.compare import run_study"),
        ("studies", "studies/compare.py", "from trimtab.newsroom.world import prompt_of"),
        ("studies", "studies/compare.py", "from trimtab.cli.main import run"),
        ("cli", "cli/main.py", "from trimtab.methods import dpo"),
        ("cli", "cli/main.py", "import torch"),
    ],
)
def test_a_forbidden_arrow_is_seen(room: str, path: str, source: str) -> None:
    assert len(forbidden(source, room, path)) == 1


@pytest.mark.parametrize(
    ("room", "path", "source"),
    [
        (
            "objectives",
            "objectives/policy.py",
            "import math, torch\nfrom trimtab.objectives.kl import kl_loss",
        ),
        ("methods", "methods/dpo.py", "from trimtab.methods.shared.setup import Result"),
        ("studies", "studies/compare.py", "from trimtab.training.metrics import read_metrics"),
        ("studies", "studies/quickstart.py", "from trimtab.newsroom.files import write_world"),
        ("cli", "cli/main.py", "def f():\n    from trimtab.evaluation.pages import report"),
    ],
)
def test_an_allowed_arrow_is_let_through(room: str, path: str, source: str) -> None:
    assert forbidden(source, room, path) == []


def python(code: str) -> str:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


HEAVY = ("torch", "transformers", "numpy")


@pytest.mark.parametrize(
    "code",
    [
        "import trimtab.config, trimtab.planning, trimtab.groups, trimtab.errors",
        "from trimtab.cli.main import run\ntry:\n    run(['--help'])\nexcept SystemExit:\n    pass",
        "from trimtab.cli.main import run\nassert run([]) == 0",
        "from trimtab.cli.main import run\nassert run(['no-such-command']) == 2",
        "import trimtab.cli.launch",
    ],
    ids=["leaves", "--help", "no command", "unknown command", "launcher"],
)
def test_nothing_heavy_is_loaded_by(code: str) -> None:
    tail = f"\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert json.loads(python(code + tail)) == []


VOCABULARY = {*LEAVES, "batch", "parallel", "__init__"}
"""Records that are passed from room to room; calling a property of one is not entering a room.

Nor is asking who else takes part in the run, where nobody does.
"""


def walk(steps: Callable[[], Any]) -> list[str]:
    """The rooms whose functions are entered, in order, neighbours that repeat once.

    Kernels that models call are models' arithmetic, as PyTorch's functions are; from elsewhere they count.

    Only calls made by the code as it stands are counted. While autograd runs backward it calls again what
    the forward pass recorded (a chunk of the head is computed anew): that is a replay of steps already
    walked, which no reader follows, and on an accelerator it happens on other threads.
    """
    entered: list[str] = []

    def replayed(frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_name == "_engine_run_backward":
                return True
            frame = frame.f_back
        return False

    def profile(frame: FrameType, event: str, argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event != "call" or PACKAGE not in file.parents:
            return
        room = room_of(file)
        if room == "kernels" and entered[-1:] == ["models"]:
            return
        if room not in VOCABULARY and entered[-1:] != [room] and not replayed(frame):
            entered.append(room)

    sys.setprofile(profile)
    try:
        steps()
    finally:
        sys.setprofile(None)
    return entered


def test_one_pair_walks_through_few_rooms_and_none_twice(tiny_model: Path, tmp_path: Path) -> None:
    """From a file to the changed weights, by the steps of methods/dpo.py written out."""
    file = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.pairs(1))
    lm = load_model(ModelConfig(path=str(tiny_model), dtype="float32"))
    optimiser = Optimiser(lm.model, TrainConfig(lr=0.01), torch.float32)
    before = [p.detach().clone() for p in lm.model.parameters()]

    def steps() -> None:
        rows, _ = read_groups(str(file))
        pairs, _ = tokenise(as_pairs(rows), lm.tokenizer)
        batch = collate(pairs, layout=lm.layout)
        policy_logps_NT, _ = lm.token_logprobs(batch)
        policy_P2 = response_sums(policy_logps_NT, batch.mask_NT).view(-1, 2)
        ref_P2 = policy_P2.detach()
        loss_P, *_ = dpo_loss(policy_P2[:, 0], policy_P2[:, 1], ref_P2[:, 0], ref_P2[:, 1], beta=0.1)
        loss = reduce_items(loss_P, len(pairs), weights_P=batch.weights_N[::2])
        optimiser.backward(loss)
        optimiser.step(learning_rate(optimiser.config, 0, 1))

    entered = walk(steps)
    assert entered == ["data", "models", "objectives", "training"]
    assert len(entered) <= 6
    assert len(set(entered)) == len(entered)
    assert any(not torch.equal(p, b) for p, b in zip(lm.model.parameters(), before, strict=True))


def test_a_walk_that_returns_to_a_room_is_seen(tiny_model: Path) -> None:
    lm = load_model(ModelConfig(path=str(tiny_model), dtype="float32"))

    def steps() -> None:
        loss = reduce_items(torch.zeros(1), 1)
        lm.cast(torch.float32)
        response_sums(loss.view(1, 1), torch.ones(1, 1, dtype=torch.bool))

    assert walk(steps) == ["objectives", "models", "objectives"]

    def with_kernels() -> None:
        lm.token_logprobs(batch)
        reduce_items(selected_logps(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))[0], 1)

    batch = collate([Group(id="g", prompt_tokens=[5], responses=[Response(tokens=[6])])], layout=lm.layout)
    assert walk(with_kernels) == ["models", "objectives"]
    assert walk(lambda: [reduce_items(torch.zeros(1), 1), rms_norm(*torch.ones(2, 3), 1e-6)]) == [
        "objectives",
        "kernels",
    ]
