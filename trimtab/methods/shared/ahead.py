"""Where a sampling method's scored groups come from: a rollout when it is wanted, or one rollout ahead.

With ``overlap`` a thread samples and scores rollout k+1 while rollout k is learned from. It reads a copy of
the weights as they were when rollout k was taken up: the samples are a rollout old, which is what the
importance weights min(old/sampler, cap) correct for. What is drawn depends on that copy, the prompts, the
seed and the step, never on how fast either thread is: a run with overlap repeats bit for bit as others do.

Of many processes each samples and scores its share of the prompts; what follows (which groups teach, how many
more prompts are taken, what is counted) is decided in each of them from all groups, so it is the same.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from trimtab.data.sources import Stream
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.online import SampledConfig, copy_weights, count, next_groups
from trimtab.methods.shared.scored import Rollout, sample_and_score
from trimtab.models.language_model import LanguageModel
from trimtab.models.roles import whole_copy
from trimtab.parallel.world import world
from trimtab.rewards.base import Mixture
from trimtab.rollouts.sampling import Sampler
from trimtab.rollouts.strategies import at, mix_of
from trimtab.training.schedule import ramp, run_progress
from trimtab.training.state import State

SAVED = "ahead/"
"""Prefix, in a checkpoint's controllers, of what a rollout that is still to be taken up has counted."""
DRAWN = "ahead_drawn"
"""How many prompts of the stream such a rollout took, where that may be more than a rollout's."""
REFILLED = "refilled_groups"
"""Counted: groups that were dropped since they teach nothing."""


class Rollouts:
    """The rollouts of a run, in order. A context: the reward's workers live from its entry to its exit."""

    def __init__(
        self,
        lm: LanguageModel,
        sampler: Sampler,
        mixture: Mixture,
        stream: Stream,
        config: SampledConfig,
        *,
        samples: int,
        ends: list[int],
        total: int,
        teaches: Callable[[Group], bool] | None = None,
        max_refills: int = 0,
    ) -> None:
        """``samples`` responses to each prompt; ``ends`` end a response; ``total`` steps end the run.

        With ``teaches`` a group that does not is replaced, in at most ``max_refills`` rounds (DAPO's dynamic
        sampling; Yu et al., 2025, section 3.2).
        """
        self.lm, self.sampler, self.mixture, self.stream = lm, sampler, mixture, stream
        self.config, self.samples, self.ends, self.total = config, samples, ends, total
        self.teaches, self.max_refills = teaches, max_refills
        mix_of(config.sampling, samples)  # refuses a mix that so few samples cannot hold
        overlap = config.options.overlap
        if overlap and mixture.spread:
            raise InputError(
                f"{config.section}.overlap scores in a thread, and the reward {mixture.spread[0]!r} is an "
                "adapter on the policy's base, which is spread over processes: give its args another dtype "
                "than the policy's, so that it has a base of its own, or set overlap = false"
            )
        self.snapshot = whole_copy(lm) if overlap else None
        self._here = world().apart() if overlap else world()
        """The processes that share a rollout's prompts; of a thread's own beside the main one's messages."""
        self.models = mixture.models + (overlap and lm.adapter is None)
        """Models in memory beside the method's own: the reward's, and the copy that is sampled from.

        Such a copy of a model with an adapter is an adapter more.
        """
        self._thread = ThreadPoolExecutor(1, "rollout", _same_threads, (torch.get_num_threads(),))
        self._future: Future[Rollout] | None = None
        self._stop = threading.Event()
        self._reward_wait_s = 0.0

    def __enter__(self) -> Rollouts:
        self.mixture.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # In this order: a thread that waits for a worker goes on when the worker is gone.
        self._stop.set()
        self.mixture.close()
        # One that waits for other processes, to which nothing may have happened, goes on when they end.
        self._thread.shutdown(wait=kind is None or self._here.alone, cancel_futures=True)

    def take(self, state: State) -> list[Group]:
        """The next rollout's scored groups; with overlap the one after it is begun.

        Raises what sampling or scoring it raised, in whichever thread that was.
        """
        self.settle(state)
        if self._future is not None:
            self._future.result()  # it failed: this raises
        if not state.ahead:
            self._store(self._sample(self.lm, state.position, state.step, state.tokens), state)
        groups, state.ahead = state.ahead, []
        state.position += int(state.controllers.pop(DRAWN, self.config.rollout))
        for key in [key for key in state.controllers if key.startswith(SAVED)]:
            count(state, key.removeprefix(SAVED), state.controllers.pop(key))
        then = state.step + self.config.steps_per_rollout
        if self.snapshot is not None and then < self.total:
            copy_weights(self.snapshot, self.lm)
            place = (state.position, then, state.tokens)
            self._future = self._thread.submit(self._sample, self.snapshot, *place)
        return groups

    def step(
        self,
        state: State,
        ready: Callable[[list[Group]], None],
        learn: Callable[[list[Group]], dict[str, float]],
    ) -> dict[str, Any]:
        """One optimiser step on the next groups of a rollout, which is taken up first where none is left.

        ``ready`` fills in what is read of a whole rollout; ``learn`` takes the step and returns its metrics,
        to which those of every sampling method are added.
        """
        began = time.perf_counter()
        if not state.pending:
            groups = self.take(state)
            ready(groups)
            state.pending, state.controllers["cursor"] = groups, 0
        sampled_s = time.perf_counter() - began
        train = self.config.train
        groups = next_groups(
            state, batch_groups=train.batch_groups, rollout=self.config.rollout, seed=train.seed
        )
        metrics = learn(groups)
        state.controllers["cursor"] += 1
        if state.controllers["cursor"] >= self.config.steps_per_rollout:
            state.pending = []
        return {
            **metrics,
            "epoch": self.stream.epoch(state.position),
            "generated_tokens": int(state.controllers["generated_tokens"]),
            "sampling_s": sampled_s,
            "reward_wait_s": self.reward_wait_s(),
            "step_s": time.perf_counter() - began,
        }

    def facts(self, state: State) -> dict[str, Any]:
        """What the lineage says of every run that samples."""
        return {
            "rewards": [term.name for term in self.config.reward.terms],
            "generated_tokens": int(state.controllers.get("generated_tokens", 0)),
            "skipped_groups": int(state.controllers.get("skipped_groups", 0)),
        }

    def settle(self, state: State) -> None:
        """Wait for the rollout in flight, if there is one, and make it part of the state: for a checkpoint.

        Also before anything else samples (an evaluation), since a sampler serves one caller at a time.
        """
        if self._future is None or self._future.exception() is not None:
            return  # what it raised is for the step that needs the rollout: this one is saved first
        self._store(self._future.result(), state)
        self._future = None

    def _store(self, rollout: Rollout, state: State) -> None:
        state.ahead = rollout.groups
        state.controllers |= {SAVED + key: value for key, value in rollout.counts.items()}
        if self.teaches is not None:
            state.controllers[DRAWN] = rollout.drawn
        self._reward_wait_s = rollout.reward_wait_s

    def reward_wait_s(self) -> float:
        """Seconds between the end of sampling and the last reward, of a rollout taken up since last asked."""
        waited, self._reward_wait_s = self._reward_wait_s, 0.0
        return waited

    def _sample(self, lm: LanguageModel, position: int, step: int, tokens: int) -> Rollout:
        """The rollout of a step, from the stream's ``position`` on.

        ``tokens`` learned from when it was begun say how far a token budget is.
        """
        times: dict[str, int] = {}
        rollout = self._round(lm, self.stream.batch(position, self.config.rollout), step, tokens, times)
        if self.teaches is None:
            return rollout
        for refill in range(self.max_refills + 1):
            sampled = len(rollout.groups)
            rollout.groups = [group for group in rollout.groups if self.teaches(group)]
            dropped = rollout.counts.get(REFILLED, 0) + sampled - len(rollout.groups)
            rollout.counts[REFILLED] = dropped
            missing = self.config.rollout - len(rollout.groups)
            if refill == self.max_refills or not missing:
                break
            prompts = self.stream.batch(position + rollout.drawn, missing)
            more = self._round(lm, prompts, step, tokens, times)
            rollout.groups += more.groups
            rollout.drawn += more.drawn
            rollout.reward_wait_s += more.reward_wait_s
            for key, value in more.counts.items():
                rollout.counts[key] = rollout.counts.get(key, 0) + value
        if not rollout.groups:
            raise InputError(
                f"step {step + 1}: dynamic sampling found no contrast: within each of {dropped:g} groups all "
                f"rewards are equal, after {self.max_refills} refills; use easier or harder prompts, a "
                "reward with gradations, or a larger group_size"
            )
        return rollout

    def _round(
        self, lm: LanguageModel, prompts: list[Group], step: int, tokens: int, times: dict[str, int]
    ) -> Rollout:
        progress = run_progress(self.config.train, step, self.total, tokens)
        return sample_and_score(
            lm,
            self.sampler,
            self.mixture,
            prompts,
            self.samples,
            at(self.config.sampling, functools.partial(ramp, progress=progress)),
            ends=self.ends,
            seed=self.config.train.seed,
            step=step,
            on_group=self._finished,
            times=times,
            here=self._here,
        )

    def _finished(self, index: int, group: Group) -> None:
        if self._stop.is_set():
            raise RuntimeError("the run has ended")  # seen by nobody: it ends the sampling thread
        self.mixture.submit(group)


def _same_threads(threads: int) -> None:
    # OpenMP counts threads for each calling thread: without this another number could round otherwise.
    torch.set_num_threads(threads)
