"""When a run ends before its last step, and which of its evaluations was the best.

Decided by what was logged, so by the same numbers that can be read in metrics.jsonl. What has to be
remembered are a few numbers in the state's ``controllers``: a run that was stopped anywhere and goes on
decides as one that was not.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import Field, model_validator

from trimtab.config import Section
from trimtab.errors import InputError
from trimtab.parallel.world import world
from trimtab.training.state import State

EVALUATED = "eval_"
"""How the names of what an evaluation measures begin; all others are those of training steps."""
KL_METRICS = ("kl", "eval_kl")
"""What ``max_kl`` bounds: of a rollout that was learned from, and of the answers to the static prompts."""
LOWER = {"loss", "nll", "ece", "brier", "kl", "unscored", "refusal", "error", "rejected", "perplexity", "off"}
HIGHER = {"accuracy", "reward", "rate", "auc", "margin", "spearman", "pearson", "f1"}
"""Words of metrics' names that say which way is better; one of LOWER decides."""


def better_way(metric: str) -> Literal["max", "min"] | None:
    """Whether more or less of a metric is better, by its name; None where the name does not tell.

    >>> better_way("eval_win_rate"), better_way("eval_loss"), better_way("response_tokens")
    ('max', 'min', None)
    """
    words = set(re.split(r"[_/]", metric))
    return "min" if words & LOWER else "max" if words & HIGHER else None


class StopOptions(Section):
    """When to end early, and which weights to keep."""

    stop_metric: str = Field(
        "", description="metric that patience and restore_best go by: eval_accuracy, eval_reward, eval_loss …"
    )
    stop_mode: Literal["auto", "max", "min"] = Field(
        "auto", description="whether more or less of stop_metric is better; auto goes by its name"
    )
    patience: int = Field(
        0, ge=0, description="end after this many evaluations in a row without a better one; 0 never does"
    )
    min_delta: float = Field(
        0.0, ge=0, description="what counts as better for patience: by more than this, in the metric's unit"
    )
    max_kl: float = Field(
        0.0, ge=0, description="end when the KL from the reference, in nats per token, is above; 0 no limit"
    )
    restore_best: bool = Field(
        False, description="model/ gets the weights of the best evaluation by stop_metric, not the last ones"
    )

    @model_validator(mode="after")
    def _stopping(self) -> StopOptions:
        if not self.stop_metric:
            for name in ("patience", "restore_best", "stop_mode"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect without stop_metric: name a metric, or remove it")
        elif not self.patience and not self.restore_best:
            raise ValueError("stop_metric has no effect without patience or restore_best")
        elif self.stop_mode == "auto" and better_way(self.stop_metric) is None:
            raise ValueError(
                f"the name {self.stop_metric!r} does not tell whether more or less of it is better: set "
                'stop_mode to "max" or "min"'
            )
        if self.min_delta and not self.patience:
            raise ValueError("min_delta has no effect without patience")
        return self

    @property
    def stops(self) -> bool:
        """Something here may end the run, or choose its weights."""
        return bool(self.stop_metric or self.max_kl)


class Stopping:
    """Told of every step and every evaluation; says which is the best, and when to end.

    Of a metric of training steps what counts at an evaluation is the mean since the one before. A value that
    is missing or not finite is never better, and counts for ``patience``.
    """

    def __init__(self, options: StopOptions) -> None:
        self.options = options
        mode = options.stop_mode if options.stop_mode != "auto" else better_way(options.stop_metric)
        self._sign = -1.0 if mode == "min" else 1.0
        self._of_steps = not options.stop_metric.startswith(EVALUATED)

    def stepped(self, state: State, metrics: dict[str, Any]) -> None:
        """Take in what a training step logged. Raises InputError for a metric that such steps do not log."""
        name = self.options.stop_metric
        metrics = self._agreed(metrics)
        if name and self._of_steps and name in metrics:
            if (value := _number(metrics[name])) is not None:
                _add(state, "sum", value)
                _add(state, "count", 1)
            _put(state, "logged", 1)
        self._bound(state, metrics)
        if "loss" not in metrics:  # skipped, or a critic warming up: nothing is known of the policy yet
            return
        if name and self._of_steps and _get(state, "logged") is None:
            raise self._unknown("stop_metric", name, metrics)
        if self.options.max_kl and _get(state, "kl_logged") is None:
            raise self._unknown("max_kl", " or ".join(KL_METRICS), metrics)

    def evaluated(self, state: State, metrics: dict[str, Any]) -> bool:
        """Take in the metrics of a step that was evaluated; whether it is the best so far.

        Raises InputError at the first evaluation where it does not measure what was named.
        """
        name = self.options.stop_metric
        metrics = self._agreed(metrics)
        self._bound(state, metrics)
        if not name or _get(state, "judged") == state.step:
            return False  # the latter: a run that goes on from its step 0 evaluates that again
        if self._of_steps:
            if state.step == 0:
                return False  # nothing was trained on
            count = _get(state, "count")
            value = _get(state, "sum", 0.0) / count if count else None  # type: ignore[operator]
            for key in ("sum", "count"):
                state.controllers.pop(_key(key), None)
        else:
            if name not in metrics and _get(state, "judged") is None:
                raise self._unknown("stop_metric", name, metrics)
            value = _number(metrics.get(name))
        _put(state, "judged", state.step)
        return self._compare(state, value)

    def _agreed(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What is decided by, as the first process has it: processes that differ would stop apart."""
        names = [name for name in (self.options.stop_metric, *KL_METRICS) if name in metrics]
        if not self.options.stops or not names:
            return metrics
        return metrics | world().agreed({name: _number(metrics[name]) for name in names})

    def _compare(self, state: State, value: float | None) -> bool:
        best, mark = _get(state, "best"), _get(state, "mark")
        if self.options.max_kl and (_get(state, "kl") or 0.0) > self.options.max_kl:
            return False  # what went too far is no candidate, however good it looks
        if value is not None and (mark is None or self._sign * (value - mark) > self.options.min_delta):
            _put(state, "mark", value)
            _put(state, "waited", 0)
        else:
            _add(state, "waited", 1)
        if value is None or (best is not None and self._sign * (value - best) <= 0):
            return False
        _put(state, "best", value)
        _put(state, "best_step", state.step)
        return True

    def _bound(self, state: State, metrics: dict[str, Any]) -> None:
        if not self.options.max_kl:
            return
        found = [metrics[name] for name in KL_METRICS if name in metrics]
        if found:
            _put(state, "kl_logged", 1)
        values = [value for value in map(_number, found) if value is not None]
        if values:
            _put(state, "kl", max(values))

    def reason(self, state: State) -> str:
        """Why the run ends here, in words; empty as long as it goes on.

        A pure function of the state and the options: with more patience a run that had ended goes on.
        """
        options = self.options
        kl, waited = _get(state, "kl"), _get(state, "waited")
        if options.max_kl and kl is not None and kl > options.max_kl:
            return f"the KL of {kl:.4g} nats per token is above watch.max_kl = {options.max_kl:g}"
        if options.patience and waited is not None and waited >= options.patience:
            mark = _get(state, "mark")
            by = f" by more than {options.min_delta:g}" if options.min_delta else ""
            than = "a number" if mark is None else f"better than {mark:.4g}{by}"
            return f"{options.stop_metric} was not {than} in {waited:.0f} evaluations (watch.patience)"
        return ""

    def best(self, state: State) -> tuple[int, float] | None:
        """Step and value of the best evaluation, the earliest of equals; None where there is none."""
        step, value = _get(state, "best_step"), _get(state, "best")
        return None if step is None or value is None else (int(step), value)

    def kept(self, state: State) -> int | None:
        """The step whose checkpoint has to stay, since ``model/`` may get its weights."""
        best = self.best(state)
        return best[0] if best is not None and self.options.restore_best else None

    def facts(self, state: State) -> dict[str, Any]:
        """For the lineage of a run that has ended; nothing of one without these options."""
        if not self.options.stops:
            return {}
        found: dict[str, Any] = {"stopped_early": state.ended}
        if (best := self.best(state)) is not None:
            found["best"] = {"metric": self.options.stop_metric, "step": best[0], "value": best[1]}
        return found | {"model_step": state.step if state.weights_of is None else state.weights_of}

    def _unknown(self, option: str, name: str, metrics: dict[str, Any]) -> InputError:
        there = ", ".join(sorted(key for key in metrics if key != "step"))
        found = f"there are {there}" if there else "nothing was measured"
        hint = ""
        if name.startswith(EVALUATED) or option == "max_kl":
            hint = "; give data.heldout, data.heldout_fraction or watch.prompts for what is not trained on"
        return InputError(f"watch.{option}: no metric is called {name}: {found}{hint}")


PREFIX = "watch/"
"""Of the numbers that are kept here, among the state's controllers."""


def _key(name: str) -> str:
    return f"{PREFIX}{name}"


def _get(state: State, name: str, default: float | None = None) -> float | None:
    return state.controllers.get(_key(name), default)


def _put(state: State, name: str, value: float) -> None:
    state.controllers[_key(name)] = value


def _add(state: State, name: str, value: float) -> None:
    state.controllers[_key(name)] = state.controllers.get(_key(name), 0) + value


def _number(value: Any) -> float | None:
    """The value, unless it is missing or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
