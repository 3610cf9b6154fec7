"""How a step of equally long groups is cut into micro-batches: formulas, which can be traced.

The cutting itself is ``data/collate.py``'s: longest first, each micro-batch filled up to the budget. A tree
is a prompt with some of its responses. ``cutting.py`` does the same to lengths as they are in a file; both
count attention as it is computed, a causal triangle of n tokens as n·(n + 1)/2 pairs, and under a mask (the
tree layout, rows of unequal length) every pair of the square.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import InputError
from trimtab.planning.cutting import Recompute, batch_from, batch_over, forward_times, with_forward
from trimtab.planning.job import Batch, Layout
from trimtab.planning.numbers import Number, ceil, choose, floor, largest, smallest

__all__ = ["batch_from", "batch_of", "batch_over", "check_fits", "forward_times", "smallest_budget"]


def batch_of(
    prompt: Number,
    response: Number,
    *,
    groups: Number,
    responses: Number,
    micro_batch_tokens: Number,
    layout: Layout,
    divisible: bool,
    layers: Number,
    recompute: Recompute = "none",
    forward_groups: Number | None = None,
) -> Batch:
    """A step of ``groups`` prompts with ``responses`` to each, all prompts and all responses equally long.

    ``divisible``: a group's responses may be spread over several trees. ``forward_groups``: how many groups
    are passed through without gradient at once (a rollout's, or all of the data), if any. Whether one tree
    fits into the budget is not asked (see :func:`check_fits`): one that does not is a micro-batch of its own.
    """
    sizes = (prompt, response, groups, responses)
    step = _uniform(*sizes, micro_batch_tokens, layout, divisible)
    times = forward_times(layers, recompute)
    found = Batch(
        groups=groups,
        responses=groups * responses,
        tokens=step.tokens,
        targets=groups * responses * response,
        scores=step.scores,
        micro_batches=step.micro_batches,
        widest=step.widest,
        widest_targets=step.widest_targets,
        rows=step.rows,
        longest=prompt + response,
        forward_times=times,
    )
    if forward_groups is None:
        return found
    sizes = (prompt, response, forward_groups, responses)
    more = _uniform(*sizes, micro_batch_tokens * times, layout, divisible)
    return with_forward(found, more.widest, more.widest_targets, more.rows)


def check_fits(
    prompt: int, response: int, *, responses: int, micro_batch_tokens: int, layout: Layout, divisible: bool
) -> None:
    """Raises InputError where the run would be refused: a tree that cannot be cut is over the budget."""
    least = smallest_budget(prompt, response, responses=responses, layout=layout, divisible=divisible)
    if least > micro_batch_tokens:
        raise InputError(
            f"one group needs {least} tokens but micro_batch_tokens is {micro_batch_tokens}; raise it to at "
            f"least {least}, or shorten prompt or response"
        )


def smallest_budget(
    prompt: Number, response: Number, *, responses: Number, layout: Layout, divisible: bool
) -> Number:
    """The least ``train.micro_batch_tokens`` that holds such a group, cut as far as it may be."""
    if divisible:
        return prompt + response
    return (prompt + response) * responses if layout == "plain" else prompt + response * responses


@dataclass(frozen=True, slots=True)
class _Step:
    tokens: Number
    scores: Number
    micro_batches: Number
    widest: Number
    widest_targets: Number
    rows: Number


def _uniform(
    prompt: Number,
    response: Number,
    groups: Number,
    responses: Number,
    budget: Number,
    layout: Layout,
    divisible: bool,
) -> _Step:
    """The cut of equal groups. Each is ``whole`` trees of ``each`` responses and perhaps one of ``rest``.

    Sorted by length the large trees come first, ``per`` to a micro-batch; small ones fill up the last of
    those, then they stand ``small`` to a micro-batch of their own.
    """
    width = prompt + response
    if not divisible:
        each = responses
    elif layout == "plain":
        each = smallest(responses, largest(1, floor(budget / width)))
    else:
        each = smallest(responses, largest(1, floor((budget - prompt) / response)))
    whole = floor(responses / each)
    rest = responses - each * whole
    # At least 1, so that nothing is divided by 0 where there is no small tree.
    few = largest(1, rest)
    large, little = groups * whole, choose(rest, groups, 0)
    size, small_size = prompt + each * response, prompt + few * response

    if layout == "plain":
        seats = floor(budget / width)
        per, small = largest(1, floor(seats / each)), largest(1, floor(seats / few))
    else:
        per, small = largest(1, floor(budget / size)), largest(1, floor(budget / small_size))
    full = ceil(large / per)
    left = large - per * (full - 1)
    if layout == "packed":
        room = floor((budget - left * size) / small_size)
    elif layout == "tree":
        room = per - left
    else:
        room = floor((seats - left * each) / few)
    joined = smallest(little, largest(0, room))
    alone = little - joined
    first, last = smallest(large, per), smallest(alone, small)

    def tokens(large: Number, little: Number) -> Number:
        """Of a micro-batch of both."""
        if layout == "packed":
            return large * size + little * small_size
        return (large + little) * size if layout == "tree" else (large * each + little * few) * width

    def targets(large: Number, little: Number) -> Number:
        return (large * each + little * few) * response

    def rows(large: Number, little: Number) -> Number:
        if layout == "packed":
            return 1
        return large + little if layout == "tree" else large * each + little * few

    # Three kinds of micro-batch, in the order in which they are met: full, the one that is filled up, small.
    one, two = tokens(first, 0), tokens(left, joined)
    three = last * small_size if layout == "tree" else tokens(0, last)
    widest = largest(one, two, three)

    def of_widest(first_is: Number, second_is: Number, third_is: Number) -> Number:
        return choose(widest - one, choose(widest - two, third_is, second_is), first_is)

    if layout == "tree":
        computed = (large + joined) * size + alone * small_size
        dense = choose(each - 1, size, (size + 1) / 2)
        small_dense = choose(few - 1, small_size, (small_size + 1) / 2)
        scores = (large + joined) * size * dense + alone * small_size * small_dense
    elif layout == "packed":
        computed = large * size + little * small_size
        own = groups * responses * (response * (response + 1) / 2 + response * prompt)
        scores = (large + little) * prompt * (prompt + 1) / 2 + own
    else:
        computed = groups * responses * width
        scores = groups * responses * width * (width + 1) / 2
    return _Step(
        tokens=computed,
        scores=scores,
        micro_batches=full + ceil(alone / small),
        widest=widest,
        widest_targets=of_widest(targets(first, 0), targets(left, joined), targets(0, last)),
        rows=of_widest(rows(first, 0), rows(left, joined), rows(0, last)),
    )
