"""Short runs of every method as processes that can be killed, and the comparison of what they leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import load_file

from trimtab.config import dump_toml, load_config
from trimtab.methods import find
from trimtab.training.metrics import read_metrics

HERE = Path(__file__).parent
CLOCK = {"seconds", "tokens_per_s", "step_s", "sampling_s", "reward_wait_s"}
"""The metrics that a clock decides. Everything else is compared bit for bit."""
RESUME = ("--run.resume", "auto")
WAITING = ("--train.save_in_background", "false")
"""A checkpoint is there before the next step begins."""
LONG = os.environ.get("TRIMTAB_FAULTS") == "long"
"""Every case; otherwise those that the test command has time for."""

GRPO: dict[str, Any] = {"grpo__rollout_groups": 8, "grpo__epochs_per_rollout": 2}
PPO: dict[str, Any] = {"ppo__rollout_groups": 8, "ppo__epochs_per_rollout": 2}
SMALL = {"train__micro_batch_tokens": 24}
"""Several micro-batches a step."""
LORA: dict[str, Any] = {"adapter__kind": "lora", "adapter__rank": 4}
BF16: dict[str, Any] = {"model__dtype": "bfloat16"}
WATCH: dict[str, Any] = {
    "train__eval_every": 1,
    "train__save_every": 4,
    "train__lr": 0.02,
    "train__steps": 12,
    "watch__heldout": True,
    "watch__sampling": {"max_new_tokens": 4},
    "watch__stop_metric": "eval_entropy",
    "watch__stop_mode": "max",
    "watch__patience": 2,
    "watch__restore_best": True,
}
"""Static prompts, an early end, and the weights of another step than the last."""
TWO: dict[str, Any] = {"parallel__lost_after_s": 8.0, "parallel__wait_s": 15.0}
"""A run of two processes, of which one soon misses the other."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"train__schedule": "cosine", "train__warmup_steps": 2}),
    "sft bf16": ("sft", {**BF16, "train__kernels": "on"}),
    "reward": ("reward", {"train__weight_decay": 0.1, "train__save_every": 1}),
    "dpo": ("dpo", {**SMALL, "train__weight_decay": 0.1, "train__keep_checkpoints": 1}),
    "dpo bf16": ("dpo", {**BF16, **SMALL}),
    "grpo": ("grpo", {**GRPO, **SMALL, "grpo__refresh_reference_every": 3, "sampling__top_p": 0.8}),
    "grpo overlap": ("grpo", {**GRPO, "grpo__overlap": True, "train__save_every": 3}),
    "grpo workers": ("grpo", {"reward__workers": 2, "grpo__overlap": True}),
    "ppo": ("ppo", {**PPO, **SMALL, "ppo__kl_control": "adaptive", "ppo__kl_horizon": 20}),
    "sft adapter": ("sft", {"adapter__kind": "dora", "adapter__rank": 4}),
    "reward adapter": ("reward", {**LORA, **BF16}),
    "dpo adapter": ("dpo", {**LORA, **SMALL, "adapter__kind": "rslora"}),
    "grpo adapter": ("grpo", {**LORA, **GRPO, "grpo__overlap": True, "grpo__refresh_reference_every": 3}),
    "ppo adapter": ("ppo", {**LORA, **PPO, "ppo__kl_control": "adaptive", "ppo__kl_horizon": 20}),
    "ppo overlap": ("ppo", {**PPO, **BF16, "ppo__overlap": True, "critic__warmup_rollouts": 1}),
    "dpo watch": ("dpo", {**WATCH, "train__keep_checkpoints": 1}),
    "grpo watch": ("grpo", {**WATCH, **GRPO, "grpo__overlap": True}),
    "dpo two": ("dpo", {**SMALL, **TWO, "parallel__weights": "replicate"}),
    "ppo two": ("ppo", {**PPO, **TWO, "parallel__weights": "replicate"}),
    "dpo sharded": ("dpo", {**SMALL, **TWO, "train__save_every": 1, "parallel__weights": "shard"}),
    "grpo sharded": (
        "grpo",
        {**GRPO, **TWO, "grpo__refresh_reference_every": 3, "parallel__weights": "shard"},
    ),
}
"""Name → method and options. Checkpoints fall into rollouts; β, the reference and the critic move."""


@dataclass
class Ended:
    """How a process ended: its exit code (or minus a signal), what it wrote, the events in it.

    Of two processes the status is that of the killed one, or the larger code, −6 where one hung.
    """

    status: int
    wall_s: float
    out: str
    err: str
    events: list[str] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    """The events of process 1, where there are two."""

    @property
    def error(self) -> str:
        """The error, which has to be one line; fails on a traceback."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.rstrip().endswith(lines[0]), f"something follows the error:\n{self.err}"
        return lines[0]


class Server:
    """The process that forks runs (see faults_server.py); ``room_kb``: with a small tmpfs at ``folder``."""

    def __init__(self, folder: Path, room_kb: int = 0) -> None:
        command = [sys.executable, str(HERE / "faults_server.py")]
        if room_kb:
            mount = f'mount -t tmpfs -o size={room_kb}k none "$0" && exec "$@"'
            rights = ["-m"] if os.geteuid() == 0 else ["-rm"]
            command = ["unshare", *rights, "sh", "-c", mount, str(folder), *command]
        self.folder = folder
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise OSError("the server of forked runs did not start")

    def seen(self, path: Path) -> Path:
        """The path by which this process reaches what the server sees as ``path``."""
        return Path(f"/proc/{self.process.pid}/root{path}")

    def run(self, spec: dict[str, Any], arguments: list[str], scratch: Path, **how: Any) -> Ended:
        """Run ``trimtab ARGUMENTS`` with the driver's ``spec``; ``how`` goes to the server."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        ranks = ["", *(f"-{rank}" for rank in range(1, how.get("size", 1)))]
        files = {name: str(scratch / name) for name in ("stdout", "stderr")}
        spec = {"log": str(scratch / "events"), **spec}
        for file in (*files.values(), spec["log"]):  # a process may be killed before it has opened them
            for rank in ranks:
                Path(file + rank).write_text("")
        request = {"after_s": None, "signal": 9, "group": False, "limit_s": 60, **files, **how}
        request |= {"spec": spec, "arguments": arguments}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        text = {
            name: "".join(Path(file + rank).read_text(encoding="utf-8") for rank in ranks)
            for name, file in files.items()
        }
        statuses = answer["statuses"]
        hung = -signal.SIGABRT in statuses
        events = [Path(spec["log"] + rank).read_text().splitlines() for rank in ranks]
        return Ended(
            -signal.SIGABRT if hung else min(statuses) if min(statuses) < 0 else max(statuses),
            answer["wall_s"],
            text["stdout"],
            text["stderr"],
            events[0],
            statuses,
            events[-1],
        )

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def environment() -> dict[str, str]:
    """One thread, since a process with more cannot be forked; no huge pages, which would be copied whole."""
    kept = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    kept |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo"}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}


def fresh(spec: dict[str, Any], arguments: list[str], scratch: Path) -> Ended:
    """The same in a new interpreter: nothing is shared with the runs before it, hash seeds neither."""
    spec = {"log": str(scratch / "events"), **spec}
    (scratch / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(HERE / "faults_driver.py"), str(scratch / "spec.json"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment())
    events = Path(spec["log"]).read_text().splitlines()
    return Ended(done.returncode, 0.0, done.stdout, done.stderr, events)


class World:
    """The tiny model, its data, a configuration for each case, and the runs that nothing happened to."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        self.model, self.data = folder / "tiny-model", folder / "data"
        self.cases: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
            name: (method, changed, {"size": 2} if TWO.items() <= changed.items() else {})
            for name, (method, changed) in CASES.items()
        }
        """Method, options, and what every sitting of it is run with (see :meth:`run`)."""
        tiny.save_model(self.model)
        self.data.mkdir()
        for kind, rows in (
            ("pairs", tiny.pairs(16)),
            ("demonstrations", tiny.demonstrations(16)),
            ("prompts", tiny.prompts(16)),
        ):
            tiny.write_rows(self.data / f"{kind}.jsonl", rows)
        share = "return sum(w in 'aeiou' for w in response.split()) / max(len(response.split()), 1)"
        tiny.write_reward(self.data / "rewards.py", share)
        self._straight: dict[str, tuple[Path, Ended]] = {}
        self._number = 0

    def case(self, name: str, method: str, changed: dict[str, Any], **how: Any) -> str:
        """Add a case; its name."""
        self.cases[name] = method, changed, how
        return name

    def command(self, name: str, out: Path, *more: str) -> list[str]:
        """The arguments that run a case into ``out``: six steps, a checkpoint every two."""
        method, changed, _ = self.cases[name]
        common = {"train__save_every": 2, "train__eval_every": 3, "train__kernels": "off"}
        common |= {"data__heldout_fraction": 0.3, **changed}
        given = tiny.options(method, self.model, self.data, self.folder / "unused")
        given |= {key.replace("__", "."): value for key, value in common.items()}
        file = self.folder / f"{name.replace(' ', '-')}.toml"
        file.write_text(dump_toml(load_config(find(method).Config, None, given)), encoding="utf-8")
        return [method, str(file), "--run.out", str(out), *more]

    def scratch(self) -> Path:
        """A new folder, beside which a run directory may be."""
        self._number += 1
        folder = self.folder / f"run-{self._number:03d}"
        folder.mkdir()
        return folder

    def run(self, name: str, out: Path, *more: str, new: bool = False, **how: Any) -> Ended:
        """One sitting of a case, with the case's own ``how``: faults, memory, powerless (for the driver),
        after_s, signal, group, limit_s, size, rank, both (for the server), server, scratch; ``new``: in a new
        interpreter.
        """
        how = {**self.cases[name][2], **how}
        spec = {"out": str(out)} | {key: how.pop(key) for key in DRIVER if key in how}
        server, scratch = how.pop("server", self.server), how.pop("scratch", out.parent)
        arguments = self.command(name, out, *more)
        if new:
            return fresh(spec, arguments, scratch)
        return server.run(spec, arguments, scratch, **how)

    def straight(self, name: str) -> Path:
        """The run directory of the case's run that nothing happened to."""
        return self.timed(name)[0]

    def timed(self, name: str) -> tuple[Path, Ended]:
        """The same with its duration and its events."""
        if name not in self._straight:
            out = self.scratch() / "straight"
            ended = self.run(name, out)
            assert ended.status == 0, ended.err
            self._straight[name] = out, ended
        return self._straight[name]

    def finish(self, name: str, out: Path, **how: Any) -> Ended:
        """Resume, which has to go well and give the run that nothing happened to."""
        ended = self.run(name, out, *RESUME, **how)
        assert ended.status == 0, ended.err
        server = how.get("server")
        same(self.straight(name), server.seen(out) if server else out)
        return ended


DRIVER = ("faults", "memory", "powerless")


def fault(kind: str, do: str, n: int = 1, when: str = "before", path: str = "*") -> dict[str, Any]:
    """What the driver does there."""
    return {"kind": kind, "n": n, "when": when, "path": path, "do": do}


def kill(kind: str, n: int = 1, when: str = "before", path: str = "*") -> dict[str, Any]:
    """The fault that ends the process there."""
    return fault(kind, "kill", n, when, path)


def counts(events: list[str]) -> Counter[tuple[str, str]]:
    """How often each kind and moment of event came."""
    return Counter((kind, when) for kind, when, *_ in (line.split(" ") for line in events))


def chosen(every: Iterable[Any], short: Iterable[Any]) -> list[Any]:
    """The cases of a parametrised test."""
    return list(every if LONG else short)


def checkpoints(out: Path) -> list[str]:
    """Names of the checkpoints that look complete."""
    return sorted(p.name for p in (out / "checkpoints").glob("step-*"))


def logged(out: Path) -> list[int]:
    """The steps in the log."""
    file = out / "metrics.jsonl"
    return [m["step"] for m in read_metrics(file)] if file.exists() else []


def same(straight: Path, out: Path) -> None:
    """Fails unless both runs left the same metrics, checkpoints and model, and nothing half done."""
    ours, theirs = ([timeless(m) for m in read_metrics(o / "metrics.jsonl")] for o in (out, straight))
    for mine, other in zip(ours, theirs, strict=False):
        assert mine == other, f"metrics: {mine} instead of {other}"
    assert len(ours) == len(theirs), f"{len(ours)} lines of metrics instead of {len(theirs)}"
    # A run that SIGTERM ended has a checkpoint of that step in the place of an older one; a kill between the
    # last rename and the removal after it leaves the older one.
    mine, other = checkpoints(out), checkpoints(straight)
    assert mine[-1] == other[-1], f"checkpoints {mine} instead of {other}"
    assert len(other) <= len(mine) <= len(other) + 1, f"checkpoints {mine} instead of {other}"
    last = f"checkpoints/{checkpoints(straight)[-1]}"
    names = sorted(p.name for p in (straight / last).iterdir())
    assert sorted(p.name for p in (out / last).iterdir()) == names, last
    for file in (name for name in names if name.startswith("tensors")):
        mine, other = (load_file(o / last / file) for o in (out, straight))
        assert mine.keys() == other.keys(), f"{last}/{file}"
        for name, tensor in other.items():
            assert mine[name].dtype == tensor.dtype, name
            assert mine[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    mine, other = (json.loads((o / last / "state.json").read_text()) for o in (out, straight))
    assert timeless(mine) == timeless(other), f"{last}/state.json"
    said = [file.read_text() if (file := o / "samples.jsonl").exists() else "" for o in (out, straight)]
    assert said[0] == said[1], "samples.jsonl"
    models = {p.name for p in (straight / "model").iterdir()}
    assert {p.name for p in (out / "model").iterdir()} == models, "files in model/"
    for name in models:
        assert (out / "model" / name).read_bytes() == (straight / "model" / name).read_bytes(), name
    # What a killed process left half done is gone by the end.
    hidden = [str(p.relative_to(out)) for p in out.rglob("*") if p.name.startswith(".")]
    assert not hidden, f"left behind: {hidden}"
    json.loads((out / "lineage.json").read_text(encoding="utf-8"))


def timeless(values: dict[str, Any]) -> str:
    """As JSON (in which NaN equals itself), without what a clock decides."""
    return json.dumps({key: value for key, value in values.items() if key not in CLOCK})


def copied(out: Path, to: Path) -> Path:
    """A run directory once more."""
    return Path(shutil.copytree(out, to))
