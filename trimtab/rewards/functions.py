"""Finding reward functions and scorers by name, and the built-in ones.

A name is one of the built-ins below, ``package.module:function``, or ``path/to/file.py:function``. Code
is loaded only because the configuration names it: nothing is looked for, downloaded or guessed.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from trimtab.config import load_config
from trimtab.errors import InputError
from trimtab.parallel.limits import machine_part
from trimtab.rewards.base import Mixture, RewardConfig, RewardFunction, RewardTerm, Scorer
from trimtab.rewards.matching import same_text, target
from trimtab.rewards.numbers import find_number
from trimtab.rewards.pool import Pool
from trimtab.rewards.verifiable import json_schema, rouge, tool_call


def build_mixture(config: RewardConfig, base: Any = None, *, spread: bool = False) -> Mixture:
    """The mixture that a configuration describes, every function and scorer loaded and checked.

    ``base``: a model that learns by an adapter; a reward model on the same base shares it. ``spread``: where
    the weights of ``base`` are spread over processes, those of models that score are too; then every process
    calls ``Mixture.score``, and this.
    Its workers, if it has any, are started by ``Mixture.start`` alone: an evaluation goes without.
    """
    terms, plain = [], []
    for term in config.terms:
        build = SCORERS.get(term.name)
        function = build(term.args, base, spread) if build else load_function(term.name, term.args)
        label = term.label or term.name.rpartition(":")[2]
        terms.append(RewardTerm(label, term.weight, function))
        if not build:
            plain.append((label, term.name, term.args))
    if config.workers and not plain:
        raise InputError(
            f"reward.workers has no effect without a reward function: {', '.join(SCORERS)} see whole groups "
            "and stay in the run's own process"
        )
    pool = functools.partial(Pool, machine_part(config.workers), plain, timeout_s=config.timeout_s)
    return Mixture(terms, config.on_error, pool if config.workers else None)


def load_function(name: str, args: dict[str, Any] | None = None) -> RewardFunction:
    """The reward function of that name, with ``args`` bound by name.

    Raises InputError, naming the reward, for an unknown name, a module or file that cannot be imported,
    something that is not callable, and parameters that the function does not take.
    """
    args = args or {}
    if ":" not in name:
        return _built_in(name, args)
    function = load_callable(name, f"reward {name!r}")
    check_call(f"reward {name!r}", function, {"prompt": "", "response": ""} | args)
    return _Bound(function, args) if args else function


def load_callable(name: str, what: str) -> Callable[..., Any]:
    """What ``package.module:function`` or ``path/to/file.py:function`` names; ``what`` opens messages."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise InputError(f"{what}: write package.module:function or path/to/file.py:function")
    module = _load_file(what, Path(place)) if place.endswith(".py") else _load_module(what, place)
    function = getattr(module, attribute, None)
    if function is None:
        near = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{what}: {place} has no {attribute!r}{_suggestion(attribute, near)}")
    if not callable(function):
        raise InputError(f"{what}: {attribute} is a {type(function).__name__}, not a function")
    return function


def exact_match(
    *, column: str | None = None, ignore_case: bool = False, normalise: bool = False
) -> RewardFunction:
    """1.0 if the response equals the row's answer, surrounding white space apart, else 0.0.

    ``normalise`` leaves case, punctuation and articles out (:func:`trimtab.rewards.matching.normalised`).
    """
    if ignore_case and normalise:
        raise InputError("reward 'exact_match': ignore_case has no effect with normalise; remove it")

    def reward(prompt: str, response: str, **columns: Any) -> float:
        ours, theirs = response.strip(), str(target(columns, column)).strip()
        if normalise:
            return float(same_text(ours, theirs))
        return float(ours.casefold() == theirs.casefold() if ignore_case else ours == theirs)

    return reward


def numeric(*, column: str | None = None, tolerance: float = 1e-6) -> RewardFunction:
    """1.0 if the response's number is within ``tolerance`` (absolute) of the row's, else 0.0.

    :func:`trimtab.rewards.numbers.find_number` says which number of a text counts. A response without
    one scores 0.0; a row's answer without one is a fault of the data and raises.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise InputError(f"reward 'numeric': tolerance must be 0 or more, got {tolerance!r}")

    def reward(prompt: str, response: str, **columns: Any) -> float:
        wanted = str(target(columns, column))
        right = find_number(wanted)
        if right is None:
            raise ValueError(f"no number in the row's answer {wanted[:60]!r}")
        found = find_number(response)
        return float(found is not None and abs(found - right) <= tolerance)

    return reward


def math(*, column: str | None = None) -> RewardFunction:
    """1.0 if the response's answer equals the row's as mathematics (``\\frac{1}{2}`` = 0.5), else 0.0.

    For expressions, sets and intervals; for plain numbers :func:`numeric` is far faster. Needs the
    math-verify library, which stops a hard comparison after 5 seconds and runs in the main thread only
    (of a worker process too).
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise InputError(
            "reward 'math' needs math-verify: pip install math-verify, or use 'numeric'"
        ) from error

    def reward(prompt: str, response: str, **columns: Any) -> float:
        wanted = str(target(columns, column)).rpartition("####")[2].strip()
        # A bare expression is not recognised as one; a box says that all of it is the answer.
        right = parse(wanted if "\\boxed" in wanted else f"\\boxed{{{wanted}}}")
        if not right:
            raise ValueError(f"no mathematics in the row's answer {wanted[:60]!r}")
        marked = response.rpartition("####")[2] if "####" in response else response
        return float(verify(right, parse(marked)))

    return reward


def format_match(*, pattern: str, full: bool = False) -> RewardFunction:
    """1.0 if the regular expression is found in the response (``full``: covers it), else 0.0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise InputError(f"reward 'format': the pattern {pattern!r} is not valid: {error}") from error
    match = compiled.fullmatch if full else compiled.search

    def reward(prompt: str, response: str, **columns: Any) -> float:
        return float(match(response) is not None)

    return reward


def length(
    *, limit: int, span: int, at_least: int = 0, unit: Literal["words", "characters"] = "words"
) -> RewardFunction:
    """A soft limit: 0.0 up to ``limit``, falling in a line to −1.0 at ``limit + span`` and beyond.

    The shape of DAPO's overlong penalty (Yu et al., 2025, equation 13), counted in words or characters. Below
    ``at_least`` it falls alike, to −1.0 at ``at_least − span``: with both at one number that is the target.
    """
    if unit not in ("words", "characters"):
        raise InputError(f"reward 'length': unit must be words or characters, got {unit!r}")
    if not (isinstance(limit, int) and isinstance(span, int) and limit >= 0 and span >= 1):
        raise InputError(
            f"reward 'length': needs whole numbers limit >= 0 and span >= 1, got {limit!r}, {span!r}"
        )
    if not (isinstance(at_least, int) and 0 <= at_least <= limit):
        raise InputError(
            f"reward 'length': at_least must be a whole number from 0 to limit, got {at_least!r}"
        )

    def reward(prompt: str, response: str, **columns: Any) -> float:
        size = len(response.split()) if unit == "words" else len(response)
        return -min(1.0, max(0.0, (size - limit) / span, (at_least - size) / span))

    return reward


def repetition(*, n: int = 3, unit: Literal["words", "characters"] = "words") -> RewardFunction:
    """Minus the share of the response's n-grams that repeat an earlier one: 0.0 where none does, above −1.0.

    −(1 − distinct / all), the portion of duplicates of Welleck et al., 2020 (seq-rep-n), over runs of n
    words, whatever their case, or characters. A response of fewer than n has no n-grams and repeats nothing.
    """
    if unit not in ("words", "characters"):
        raise InputError(f"reward 'repetition': unit must be words or characters, got {unit!r}")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(f"reward 'repetition': needs a whole number n >= 1, got {n!r}")

    def reward(prompt: str, response: str, **columns: Any) -> float:
        text = response.casefold()
        parts: Sequence[str] = text.split() if unit == "words" else text
        grams = [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

    return reward


BUILT_INS: dict[str, Callable[..., RewardFunction]] = {
    "exact_match": exact_match,
    "numeric": numeric,
    "math": math,
    "format": format_match,
    "length": length,
    "repetition": repetition,
    "json_schema": json_schema,
    "tool_call": tool_call,
    "rouge": rouge,
}
"""Each takes its parameters and gives the reward function."""


def _reward_model(args: dict[str, Any], base: Any = None, spread: bool = False) -> Scorer:
    from trimtab.rewards.models import build_reward_model  # torch is loaded only where it is used

    return build_reward_model(args, base, spread=spread)


def _judge(args: dict[str, Any], base: Any = None, spread: bool = False) -> Scorer:
    from trimtab.rewards.judges import build_judge_scorer

    return build_judge_scorer(args)


def _process_reward_model(args: dict[str, Any], base: Any = None, spread: bool = False) -> Scorer:
    from trimtab.rewards.steps import build_process_reward_model

    return build_process_reward_model(args, base, spread=spread)


def _steps(args: dict[str, Any], base: Any = None, spread: bool = False) -> Scorer:
    from trimtab.rewards.steps import StepFunction, StepFunctionArgs

    try:
        given = load_config(StepFunctionArgs, None, args)
    except InputError as error:
        raise InputError(f"reward 'steps': {error}") from None
    function = load_callable(given.function, f"reward {given.function!r}")
    check_call(f"reward {given.function!r}", function, {"prompt": "", "steps": []})
    return StepFunction(function, given, getattr(base, "tokenizer", None))


def _code(args: dict[str, Any], base: Any = None, spread: bool = False) -> Scorer:
    from trimtab.rewards.code import build_code_scorer

    return build_code_scorer(args)


SCORERS: dict[str, Callable[..., Scorer]] = {
    "reward_model": _reward_model,
    "process_reward_model": _process_reward_model,
    "steps": _steps,
    "judge": _judge,
    "code": _code,
}
"""Built-in terms that see whole groups; each takes ``args``, which it checks, and ``base``."""


class _Bound:
    """A user's function with its parameters; a column of the same name is refused, never overridden."""

    def __init__(self, function: RewardFunction, args: dict[str, Any]) -> None:
        self.function, self.args = function, args
        # What inspect.signature reports, so that the mixture still sees which columns are wanted.
        with contextlib.suppress(TypeError, ValueError):
            self.__signature__ = inspect.signature(functools.partial(function, **args))

    def __call__(self, **values: Any) -> Any:
        clash = sorted(values.keys() & self.args.keys())
        if clash:
            raise ValueError(
                f"{clash[0]!r} is both a column of the row and one of the term's args: rename one"
            )
        return self.function(**values, **self.args)


def _built_in(name: str, args: dict[str, Any]) -> RewardFunction:
    factory = BUILT_INS.get(name)
    if factory is None:
        hint = " (for a file write path/to/file.py:function)" if name.endswith(".py") else ""
        known = [*BUILT_INS, *SCORERS]
        raise InputError(f"reward {name!r} is not built in{hint}{_suggestion(name, known)}")
    check_call(f"reward {name!r}", factory, args)
    return factory(**args)


def check_call(what: str, function: Callable[..., Any], values: dict[str, Any]) -> None:
    """Refuses parameters that do not fit, before the run instead of at its first row."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind_partial(**values)
        if "prompt" not in values:
            signature.bind(**values)
    except TypeError as error:
        raise InputError(f"{what}: {error}: it takes {signature}") from error


def _load_module(what: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise InputError(
                f"{what}: no module {module!r}: install it, or write path/to/file.py:function"
            ) from error
        raise InputError(f"{what}: importing {module} failed: {error}") from error
    except Exception as error:
        raise InputError(f"{what}: importing {module} failed: {_failure(error)}") from error


def _load_file(what: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{what}: there is no file {path} (looked from {Path.cwd()})")
    # A name of its own, so that a file called random.py or json.py replaces no module.
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()
    spec = importlib.util.spec_from_file_location(f"trimtab_reward_{digest}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{what}: {path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a module up by its name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise InputError(f"{what}: importing {path} failed: {_failure(error)}") from error
    return module


def _failure(error: Exception) -> str:
    """The exception with the line that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:
        return f"{type(error).__name__}: {error}"
    return f"{type(error).__name__}: {error} ({frames[-1].filename}:{frames[-1].lineno})"


def _suggestion(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]!r}?" if near else f": choose from {', '.join(known) or 'nothing'}"
