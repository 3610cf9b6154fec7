"""The cases by name."""

from __future__ import annotations

from benchmarks.parity.case import Case
from benchmarks.parity.given_cases import OTHER_CASES, PAIR_CASES
from benchmarks.parity.sampled_cases import PPO_CASES, SAMPLED_CASES

CASES: list[Case] = [*PAIR_CASES, *OTHER_CASES, *SAMPLED_CASES, *PPO_CASES]

NAMES = [case.name for case in CASES]
