"""How much is tried: a few hundred cases in the test command, with ``TRIMTAB_FUZZ=long`` over ten thousand.

Hostile input may be refused in one line; it may not be crashed on, waited for, or believed in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from hypothesis import HealthCheck, settings

from trimtab.errors import CONTROL, InputError

LONG = os.environ.get("TRIMTAB_FUZZ") == "long"
HEALTH = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
HEALTH += [HealthCheck.filter_too_much, HealthCheck.large_base_example]

settings.register_profile(
    "trimtab-short", max_examples=8, derandomize=True, database=None, suppress_health_check=HEALTH
)
settings.register_profile("trimtab-long", max_examples=120, print_blob=True, suppress_health_check=HEALTH)

T = TypeVar("T", bound=Callable[..., object])


def fuzzed(share: float = 1.0, seconds: float = 5.0) -> Callable[[T], T]:
    """This share of the profile's cases; one that takes longer than ``seconds`` fails as a traceback does."""
    profile = settings.get_profile("trimtab-long" if LONG else "trimtab-short")
    count = max(1, round(profile.max_examples * share))
    return settings(profile, max_examples=count, deadline=timedelta(seconds=seconds * (4 if LONG else 1)))


def one_line(error: InputError) -> None:
    """What a user is told fits on a line, and drives no terminal."""
    message = str(error)
    assert message
    assert len(message.splitlines()) == 1
    assert not CONTROL.search(message)
