"""The run directory: what is written where, and how a run begins, goes on and ends."""

from __future__ import annotations

import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from torch import nn

from trimtab.config import dump_toml
from trimtab.errors import InputError
from trimtab.models.load import device_of
from trimtab.models.tree_model import TreeModel
from trimtab.parallel.same import check_size, same_run, same_weights
from trimtab.parallel.start import not_joined
from trimtab.parallel.watch import watch
from trimtab.parallel.world import world
from trimtab.registry.ancestry import read_lineage
from trimtab.registry.files import write_atomic
from trimtab.registry.lineage import Lineage
from trimtab.registry.process import this_process
from trimtab.training.checkpoint import Damaged, checkpoints, folder_name, verify
from trimtab.training.config import RunConfig, TrainConfig
from trimtab.training.export import save_model
from trimtab.training.measured import MeasuredMemory
from trimtab.training.memory import peak_rss_mb
from trimtab.training.metrics import MetricsLog, cut_back
from trimtab.training.optimiser import Optimiser
from trimtab.training.precision import choose_dtype, choose_kernels
from trimtab.training.processes import PROCESSES, ProcessLog, choose_threads
from trimtab.training.recompute import fit_activations
from trimtab.training.saver import Saver
from trimtab.training.state import State, saved_environment
from trimtab.training.stopping import StopOptions, Stopping
from trimtab.training.trackers import Trackers, check_installed

UNBOUNDED = 1 << 40
"""The number of steps of a run that only a budget of tokens or seconds ends."""
SAMPLES = "samples.jsonl"
"""What the policy answered at each evaluation, where the configuration has it answer static prompts."""


class Run:
    """One run: its log and its directory (config, metrics, checkpoints, model, lineage)."""

    def __init__(self, method: str, config: BaseModel, run: RunConfig, train: TrainConfig) -> None:
        self.method, self.run, self.train, self.config = method, run, train, config
        self.out = Path(run.out)
        self.lines: list[str] = []
        """What was said at the start (layout, engine, precision); kept in the lineage."""
        self._log: MetricsLog | None = None
        self._begin = time.perf_counter()
        self._saver = Saver(self.out / "checkpoints", train, self.say)
        self.stopping = Stopping(getattr(config, "watch", None) or StopOptions())
        if not_joined():
            raise InputError(
                "a launcher started several processes, and this one has not joined the others: train within "
                "trimtab.parallel.start.joined()"
            )
        device = device_of(config.model)  # type: ignore[attr-defined]
        same_run(method, config, device)
        options = getattr(config, "parallel", None)
        check_size(train.batch_groups, options.shard_over if options else 0)
        if world().first:
            check_installed(run.trackers)
        self._trackers = Trackers(self.say)
        self._own: ProcessLog | None = None
        self._unwatch: Callable[[], None] = lambda: None
        self.lineage = Lineage(self.out, method)
        self._state: State | None = None
        self._learning: list[TreeModel] = []
        self._layout = ""
        self._dtype: torch.dtype | None = None
        held = world().found_first(
            lambda: (self.out / "config.toml").exists() or bool(checkpoints(self.out / "checkpoints"))
        )
        if held and not run.resume:
            raise InputError(
                f"{self.out} already holds a run; give another run.out, or --resume auto to go on with it"
            )
        if run.resume and held:
            self._same_method()
            self._saver.choose()
            if self._saver.taken is None:
                self.lines.append("no checkpoint yet: starting from the beginning")
        try:
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.out}: cannot write the run directory: {error.strerror}") from None
        taken = self._saver.taken
        self.environment = {} if taken is None else saved_environment(taken)
        self.chosen: dict[str, Any] = {}
        """What was decided of this run before its state is made: a part of the state's environment."""
        threads = choose_threads(self.environment, train.threads)
        if threads:
            torch.set_num_threads(threads)
        # A resumed run repeats the choice of its first sitting: the kernels round otherwise than PyTorch.
        before = self.environment.get("kernels")
        kernels = train.kernels if before is None else "on" if before else "off"
        # Before any model is loaded: loading puts the kernels in.
        self.kernels, line = choose_kernels(kernels, device)
        self._shown = self._show_plan(run)
        self.say(line)
        if before and not self.kernels:
            self.say(
                "the run began with compiled kernels: its numbers go on within rounding, not bit for bit"
            )
        torch.manual_seed(train.seed)
        random.seed(train.seed)
        self._memory = MeasuredMemory(device, run.plan)

    def _same_method(self) -> None:
        """What is there is of this method. Raises InputError; a run that has no lineage yet is taken."""

        def method() -> Any:
            with suppress(InputError):
                return read_lineage(self.out).get("method")
            return None

        there = world().found_first(method)
        if there not in (None, self.method):
            raise InputError(
                f"{self.out} holds a run of {there}, with which {self.method} cannot go on: give another "
                "run.out"
            )

    def compute_dtype(self, requested: str, config: Any, device: torch.device) -> torch.dtype:
        """What the run computes in, chosen once; ``config``: the model's, which need not be loaded yet."""
        if self._dtype is None:
            requested = self.environment.get("dtype") or requested
            self._dtype, why = choose_dtype(requested, config, device, self.train.micro_batch_tokens)
            self.say(why)
        return self._dtype

    def new_state(
        self, lm: TreeModel, *, beside: Mapping[str, nn.Parameter] | None = None, beside_lr: float = 0.0
    ) -> State:
        """A fresh state around the model, which from here on computes in the run's dtype.

        ``beside``, ``beside_lr``: parameters that one optimiser moves with the model's (see ``Optimiser``).
        """
        dtype = self.compute_dtype(lm.requested_dtype, lm.config, lm.device)
        state = State(Optimiser(lm.model, self.train, dtype, beside=beside, beside_lr=beside_lr))
        state.environment = {
            **({} if world().alone else {PROCESSES: world().size}),
            **self.chosen,
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
            "kernels": self.kernels,
            "micro_batch_option": self.train.micro_batch_tokens,
            "micro_batch_tokens": self.train.micro_batch_tokens,
        }
        self._state, self._layout = state, lm.layout
        self._learning.append(lm)
        # Halved for lack of memory it stays so, unless the option has been changed since.
        if self.environment.get("micro_batch_option") == self.train.micro_batch_tokens:
            state.micro_batch_tokens = self.environment["micro_batch_tokens"]
        self.say(fit_activations(lm, self.train))
        if not lm.spread:
            same_weights(lm.model)
        return state

    def add_role(self, state: State, role: str, lm: TreeModel, train: TrainConfig) -> None:
        """A further model that learns (a critic), with its own optimiser, computing in the run's dtype."""
        state.others[role] = Optimiser(lm.model, train, getattr(torch, state.environment["dtype"]))
        self._learning.append(lm)
        self.say(fit_activations(lm, self.train))
        if not lm.spread:
            same_weights(lm.model)

    def resume(self, state: State) -> State:
        """Take up the newest checkpoint that is whole, if the run goes on from one."""
        taken = self._saver.taken
        if taken is not None:
            state.restore(taken)
            for checkpoint, why in self._saver.damaged.items():
                self.say(f"{checkpoint.name} is damaged ({why})")
            self.say(f"going on from {taken.name}")
        return state

    def start(self, total: int, from_step: int) -> None:
        """Open the log; the live line counts to ``total`` steps. Raises InputError where it cannot write."""
        assert self._state is not None
        counts = self._counts(self._state)
        watch().at(from_step)
        self._unwatch = watch().on_end(self._cut_off)
        if not world().first:
            self._own = ProcessLog(self.out, world().rank, self.lines)
            return
        # First: an account that cannot be opened leaves nothing that a second try would be refused for.
        self._trackers.start(
            self.run.trackers,
            self.out,
            self.config,
            self.run.tracker_project or "trimtab",
            from_step,
            resumed=self._saver.taken is not None,
        )
        # Only now, model and data having been read: a first try that failed on them is no run to protect.
        try:
            write_atomic(self.out / "config.toml", dump_toml(self.config))
            shown = 0 if total >= UNBOUNDED else total
            self._log = MetricsLog(self.out / "metrics.jsonl", shown, self.method, from_step=from_step)
            if (self.out / SAMPLES).exists():
                cut_back(self.out / SAMPLES, from_step)
        except OSError as error:
            raise InputError(f"{self.out}: cannot write the run directory: {error.strerror}") from None
        for line in self.lines:
            if line not in self._shown:
                self._log.say(f"{self.method}: {line}")
        self.lineage.begin(
            counts,
            self._state.environment,
            total=shown or None,
            resumed=bool(self.run.resume),
            parent=self.run.parent,
            plan=self.run.plan,
        )

    def _show_plan(self, run: RunConfig) -> tuple[str, ...]:
        """Before anything is loaded, since that may be what memory ends; why there is none waits its turn."""
        self.lines += run.plan_lines
        if run.plan is None or not world().first:
            return ()
        for line in run.plan_lines:
            print(f"{self.method}: {line}", file=sys.stderr, flush=True)
        return run.plan_lines

    def say(self, line: str | None) -> None:
        """Record and show a line; None is nothing to say. Of many processes the first shows it."""
        if line is None:
            return
        self.lines.append(line)
        if self._log is not None:
            self._log.say(f"{self.method}: {line}")
        if self._own is not None:
            self._own.say(line)

    def log(self, state: State, metrics: dict[str, Any]) -> None:
        """Write one step's metrics; none (an evaluation without held-out data) is no line."""
        self._saver.check()
        watch().at(state.step)
        if metrics:
            if self._log is not None:
                with self._written("metrics.jsonl"):
                    self._log.write(state.step, metrics)
            self._saver.note(state.step, metrics)
            self._trackers.log(state.step, metrics)

    def elapsed(self, state: State) -> float:
        """Seconds of training over all sittings."""
        return state.seconds + time.perf_counter() - self._begin

    def spent(self, state: State) -> bool:
        """The time budget or the token budget is spent; by the first process's clock."""
        seconds, tokens = self.train.time_budget_s, self.train.token_budget
        return (0 < seconds <= (world().agreed(self.elapsed(state)) if seconds else 0.0)) or (
            0 < tokens <= state.tokens
        )

    def checkpoint(self, state: State, *, wait: bool = False) -> None:
        """Save this step. ``wait``: it is on the disk on return, else it may be written as training goes on.

        Raises InputError when it could not be written, or the one before it; a background save's failure is
        raised by the next call of this, ``log``, ``finish`` or ``close``.
        """
        state.seconds, self._begin = world().agreed(self.elapsed(state)), time.perf_counter()
        if self._log is not None:
            with self._written("metrics.jsonl"):
                self._log.sync()
        self._trackers.flush()
        self._saver.save(state, wait=wait, kept=self.stopping.kept(state))
        self.lineage.update(self._counts(state))

    def due(self, every: int, state: State) -> bool:
        """True on every ``every``-th step."""
        return every > 0 and state.step % every == 0

    def end(self, state: State, total: int) -> None:
        """The steps are done: say what ended them early, and with ``watch.restore_best`` take its weights."""
        state.ended = self.stopping.reason(state) if state.step < total else ""
        if state.ended:
            self.say(f"stopped after step {state.step}: {state.ended}")
        kept, best = self.stopping.kept(state), self.stopping.best(state)
        if kept is None or best is None or kept == state.step:
            return
        self.checkpoint(
            state, wait=True
        )  # with the weights of the last step, which a longer run goes on from
        checkpoint = self.out / "checkpoints" / folder_name(kept)
        what = f"{self.stopping.options.stop_metric} {best[1]:.4g}"
        try:
            verify(checkpoint, world())
        except Damaged as why:
            self.say(
                f"the best checkpoint, {checkpoint.name} with {what}, cannot be taken ({why}): model/ is "
                f"that of the last step, {state.step}"
            )
            return
        state.restore_weights(checkpoint)
        state.weights_of = kept
        for lm in self._learning:
            lm.version += 1
        self.say(f"model/ is that of step {kept}, the best: {what}")

    def finish(
        self,
        lm: TreeModel,
        state: State,
        facts: dict[str, Any],
        *,
        beside: Mapping[str, Callable[[Path], None]] | None = None,
    ) -> None:
        """The last checkpoint, the model for others to load, and the lineage.

        ``beside``: by the name of its folder, what writes a further model of the run (its critic).
        """
        # Nothing is left to do beside it: a copy of the state would only take memory.
        self.checkpoint(state, wait=True)
        with self._written("model"):
            save_model(lm, state.optimiser, self.out / "model", self.run.save_dtype)
        for name, write in (beside or {}).items():
            with self._written(name):
                write(self.out / name)
        facts = facts | self.stopping.facts(state) | self._memory.beside_plan()
        counts = self._counts(state)
        if world().first:
            self.lineage.finish(counts, facts)
        world().barrier()  # whoever goes on finds all that the first has written

    def _counts(self, state: State) -> dict[str, Any]:
        """What the lineage says of how far the run is; of many processes all take part."""
        here = world()
        own = {"peak_rss_mb": peak_rss_mb(), **self._memory.figures()}
        each = here.gather({"rank": here.rank, **this_process(), "host": platform.node(), **own})
        if self._own is not None:
            self._own.memory(state.step, own)
        return {
            "seed": self.train.seed,
            "steps": state.step,
            "optimiser_tokens": state.tokens,
            "wall_s": state.seconds,
            **own,
            **({} if here.alone else {PROCESSES: each}),
            "layout": self._layout,
            "lines": self.lines,
        }

    def _ended(self, reason: BaseException | None) -> None:
        """Another process has ended this one's run: what is to be written before it ends too."""
        self.lineage.stop(reason)
        if self._own is not None:
            self._own.close(reason)

    def _cut_off(self, reason: BaseException) -> None:
        """The process is about to be ended by another thread: the terminal is given back as it was."""
        try:
            self._ended(reason)
        finally:
            if self._log is not None:
                with suppress(Exception):
                    self._log.close()

    @contextmanager
    def _written(self, name: str) -> Iterator[None]:
        """What cannot be written ends the run by one line."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.out / name}: cannot write: {reason}; checkpoints are kept") from None

    def close(self) -> None:
        """Finish a save under way and stop the display; safe to call twice. Raises what the save raised."""
        try:
            self._saver.close()
        finally:
            self._trackers.close()
            self._unwatch()
            if self._log is not None:
                self._log.close()
                self._log = None
            if self._own is not None:
                self._own.close(None)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, reason: BaseException | None, *_: object) -> None:
        if kind is not None:
            watch().leaving()
            reason = watch().cause(reason)
            self._trackers.close(failed=True)
            # What ended the run is the news; that a save failed beside it is a line.
            try:
                self._saver.close()
            except (InputError, RuntimeError) as error:  # of messages, where other processes are gone
                self.say(" ".join(str(error).split())[:200])
        self._ended(reason)
        self.close()
