"""What the benchmark ``sampling`` asks of every sampler. Standard library only, for the peers'
environments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks import settings


@dataclass(frozen=True, slots=True)
class Workload:
    """One call: for each prompt ``responses`` samples of exactly ``new`` tokens."""

    prompts: list[list[int]]
    new: list[int]
    responses: int

    @property
    def tokens(self) -> int:
        """The tokens that are asked for."""
        return sum(self.new) * self.responses


def workload_of(data: dict[str, Any], variant: str, step: int) -> Workload:
    """The call of this step; ``variant`` is "groups WAY" or "requests WAY".

    Groups take the next prompts of the data at each step, requests are always the same.
    """
    if variant.split()[0] == "requests":
        rows = data["requests"]
        return Workload([row["prompt"] for row in rows], [row["new"] for row in rows], 1)
    prompts = data["prompts"]
    first = step * settings.SAMPLING_PROMPTS % len(prompts)
    taken = prompts[first : first + settings.SAMPLING_PROMPTS]
    return Workload(taken, [settings.RESPONSE_TOKENS] * len(taken), settings.SAMPLING_RESPONSES)


def sorted_batches(workload: Workload, size: int) -> list[Workload]:
    """Requests of like length together, each batch run to its longest: what a batch sampler can do at
    best."""
    order = sorted(range(len(workload.prompts)), key=lambda i: -workload.new[i])
    batches = []
    for first in range(0, len(order), size):
        taken = order[first : first + size]
        longest = max(workload.new[i] for i in taken)
        prompts = [workload.prompts[i] for i in taken]
        batches.append(Workload(prompts, [longest] * len(taken), workload.responses))
    return batches
