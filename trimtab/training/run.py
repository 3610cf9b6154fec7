"""The run directory: what is written where, and how a run begins, goes on and ends."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from trimtab.config import dump_toml
from trimtab.errors import InputError
from trimtab.models.tree_model import TreeModel
from trimtab.registry.lineage import surroundings
from trimtab.training.config import RunConfig, TrainConfig
from trimtab.training.export import save_model
from trimtab.training.memory import peak_rss_mb, reset_peak
from trimtab.training.metrics import MetricsLog
from trimtab.training.optimiser import Optimiser
from trimtab.training.precision import choose_dtype, choose_kernels
from trimtab.training.recompute import fit_activations
from trimtab.training.state import State, checkpoints, saved_environment

UNBOUNDED = 1 << 40
"""The number of steps of a run that only a budget of tokens or seconds ends."""


class Run:
    """One run: its log and its directory (config, metrics, checkpoints, model, lineage)."""

    def __init__(self, method: str, config: BaseModel, run: RunConfig, train: TrainConfig) -> None:
        self.method, self.run, self.train, self.config = method, run, train, config
        self.out = Path(run.out)
        self.lines: list[str] = []
        """What was said at the start (layout, engine, precision); kept in the lineage."""
        self._log: MetricsLog | None = None
        self._begin = time.perf_counter()
        held = (self.out / "config.toml").exists()
        if held and not run.resume:
            raise InputError(
                f"{self.out} already holds a run; give another run.out, or --run.resume true to go on with it"
            )
        if run.resume and held and not checkpoints(self.out / "checkpoints"):
            self.lines.append("no checkpoint yet: starting from the beginning")
        try:
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.out}: cannot write the run directory: {error.strerror}") from None
        self.environment = saved_environment(self.out / "checkpoints") if run.resume else {}
        threads = self.environment.get("threads") or train.threads
        if threads:
            torch.set_num_threads(threads)
        # A resumed run repeats the choice of its first sitting: the kernels round otherwise than PyTorch.
        before = self.environment.get("kernels")
        kernels = train.kernels if before is None else "on" if before else "off"
        self.kernels, line = choose_kernels(kernels, torch.device("cpu"))
        self.say(line)
        if before and not self.kernels:
            self.say(
                "the run began with compiled kernels: its numbers go on within rounding, not bit for bit"
            )
        torch.manual_seed(train.seed)
        random.seed(train.seed)
        reset_peak()

    def new_state(self, lm: TreeModel) -> State:
        """A fresh state around the model, which from here on computes in the run's dtype."""
        requested = self.environment.get("dtype") or lm.requested_dtype
        dtype, why = choose_dtype(requested, lm.config, lm.device, self.train.micro_batch_tokens)
        self.say(why)
        state = State(Optimiser(lm.model, self.train, dtype))
        state.environment = {
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
            "kernels": self.kernels,
        }
        self.say(fit_activations(lm, self.train))
        return state

    def add_role(self, state: State, role: str, lm: TreeModel, train: TrainConfig) -> None:
        """A further model that learns (a critic), with its own optimiser, computing in the run's dtype."""
        state.others[role] = Optimiser(lm.model, train, getattr(torch, state.environment["dtype"]))
        self.say(fit_activations(lm, self.train))

    def resume(self, state: State) -> State:
        """Take up the newest checkpoint, if the run goes on from one."""
        found = checkpoints(self.out / "checkpoints") if self.run.resume else []
        if found:
            state.restore(found[-1])
            self.say(f"going on from {found[-1].name}")
        return state

    def start(self, total: int, from_step: int) -> None:
        """Open the log; the live line counts to ``total`` steps. Raises InputError where it cannot write."""
        # Only now, model and data having been read: a first try that failed on them is no run to protect.
        try:
            (self.out / "config.toml").write_text(dump_toml(self.config), encoding="utf-8")
            shown = 0 if total >= UNBOUNDED else total
            self._log = MetricsLog(self.out / "metrics.jsonl", shown, self.method, from_step=from_step)
        except OSError as error:
            raise InputError(f"{self.out}: cannot write the run directory: {error.strerror}") from None
        for line in self.lines:
            self._log.say(f"{self.method}: {line}")

    def say(self, line: str | None) -> None:
        """Record and show a line; None is nothing to say."""
        if line is None:
            return
        self.lines.append(line)
        if self._log is not None:
            self._log.say(f"{self.method}: {line}")

    def log(self, state: State, metrics: dict[str, Any]) -> None:
        """Write one step's metrics; none (an evaluation without held-out data) is no line."""
        assert self._log is not None
        if metrics:
            self._log.write(state.step, metrics)

    def elapsed(self, state: State) -> float:
        """Seconds of training over all sittings."""
        return state.seconds + time.perf_counter() - self._begin

    def spent(self, state: State) -> bool:
        """The time budget or the token budget is spent."""
        return (
            0 < self.train.time_budget_s <= self.elapsed(state) or 0 < self.train.token_budget <= state.tokens
        )

    def checkpoint(self, state: State) -> None:
        """Save now, atomically."""
        now = time.perf_counter()
        state.seconds, self._begin = state.seconds + now - self._begin, now
        saved = checkpoints(self.out / "checkpoints")
        if saved and saved[-1].name == State.folder_name(state.step):
            return  # of this very step: replacing it would risk it for nothing
        try:
            state.save(self.out / "checkpoints", self.train.keep_checkpoints)
        except OSError as error:
            raise InputError(
                f"{self.out}/checkpoints: cannot save step {state.step}: {error.strerror}; "
                "earlier ones are kept"
            ) from None

    def due(self, every: int, state: State) -> bool:
        """True on every ``every``-th step."""
        return every > 0 and state.step % every == 0

    def finish(self, lm: TreeModel, state: State, facts: dict[str, Any]) -> None:
        """The last checkpoint, the model for others to load, and the lineage."""
        self.checkpoint(state)
        save_model(lm, state.optimiser, self.out / "model", self.run.save_dtype)
        lineage = {
            "method": self.method,
            "parent": self.run.parent,
            "seed": self.train.seed,
            "steps": state.step,
            "optimiser_tokens": state.tokens,
            "wall_s": state.seconds,
            "peak_rss_mb": peak_rss_mb(),
            "lines": self.lines,
            **facts,
            **surroundings(),
        }
        text = json.dumps(lineage, indent=2, default=str)
        (self.out / "lineage.json").write_text(text + "\n", encoding="utf-8")

    def close(self) -> None:
        """Stop the display; safe to call twice."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
