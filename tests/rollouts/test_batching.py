"""Continuous batching: slots, blocks, shared beginnings, budgets, interruptions; always the same tokens."""

from __future__ import annotations

import gc
import random
import resource
from collections import Counter
from typing import Any

import families
import numpy as np
import pytest
import torch
from test_engine import ENDS, SAMPLES, assert_same, sample

from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.kernels.decode import BLOCK
from trimtab.models.language_model import LanguageModel
from trimtab.rollouts import engine, schedule
from trimtab.rollouts.attention import Decode, Prefill
from trimtab.rollouts.cache import Blocks, Node, prompt_tree
from trimtab.rollouts.engine import TreeSampler
from trimtab.rollouts.plain import PlainSampler
from trimtab.rollouts.sampling import Sampler, SamplingConfig


def conversations() -> list[Group]:
    """A system prompt of 40 tokens before all but one, a turn of 25 common to three, one prompt twice."""
    draw = random.Random(5)
    system, turn = families.tokens(40, draw), families.tokens(25, draw)
    rests = [families.tokens(count, draw) for count in (3, 12, 1, 33, 7)]
    made = [
        [*system, *turn, *rests[0]],
        rests[1],
        [*system, *turn, *rests[2]],
        [*system, *rests[3]],
        [*system, *turn, *rests[4]],
        [*system, *rests[3]],
        system,
    ]
    return [Group(id=f"c{i}", prompt_tokens=tokens) for i, tokens in enumerate(made)]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts of what the engine does: prompt tokens run, passes, steps, the most rows and blocks at once."""
    seen: Counter[str] = Counter()
    prefill, decode = Prefill.__init__, Decode.__init__

    def on_prefill(self: Prefill, blocks: Blocks, segments: Any) -> None:
        seen["prompt tokens"] += sum(s.length for s in segments)
        seen["passes"] += 1
        prefill(self, blocks, segments)

    def on_decode(self: Decode, blocks: Blocks, plan: Any) -> None:
        seen["steps"] += 1
        seen["rows"] = max(seen["rows"], plan.rows)
        seen["blocks"] = max(seen["blocks"], blocks.live)
        seen["bytes"] = sum(
            t.numel() * t.element_size() for x in (blocks.keys, blocks.values) for t in x.values()
        )
        decode(self, blocks, plan)

    monkeypatch.setattr(Prefill, "__init__", on_prefill)
    monkeypatch.setattr(Decode, "__init__", on_decode)
    return seen


# The tree of prompts.


def test_prompts_are_cut_where_they_part() -> None:
    prompts = [g.prompt_tokens or [] for g in conversations()]
    leaves, order = prompt_tree(prompts)
    for prompt, leaf in zip(prompts, leaves, strict=True):
        chain = leaf.chain()
        assert [t for node in chain for t in node.tokens] == prompt
        assert [node.start for node in chain] == list(np.cumsum([0, *(len(n.tokens) for n in chain[:-1])]))
        assert leaf.tokens
    # The bare system prompt keeps its own last token, so 39 are common to six, and then 26 to three.
    assert [len(node.tokens) for node in leaves[0].chain()] == [39, 26, 3]
    assert [len(node.tokens) for node in leaves[6].chain()] == [39, 1]
    assert [len(node.tokens) for node in leaves[3].chain()] == [39, 33, 1]
    assert leaves[3].parent is leaves[5].parent
    assert [node.groups for node in leaves[0].chain()] == [6, 3, 1]
    # Neighbours in the tree are neighbours in the order, and the first prompt is the first.
    assert order[0] == 0
    assert [i for i in order if i in (0, 2, 4)] == order[:3]


def test_short_common_beginnings_are_not_worth_a_node() -> None:
    leaves, order = prompt_tree([[1] * 15 + [2], [1] * 15 + [3], [1] * 12 + [4], [5]])
    assert [leaf.parent for leaf in leaves] == [None] * 4
    assert sorted(order) == [0, 1, 2, 3]
    # Many that each go on where the last one ended: no recursion, every prompt whole.
    nested = [list(range(2, 3 + 20 * i)) for i in range(1, 400)]
    leaves, _ = prompt_tree(nested)
    assert [t for node in leaves[-1].chain() for t in node.tokens] == nested[-1]
    assert sum(len(n.tokens) for n in {id(n): n for x in leaves for n in x.chain()}.values()) < 9000


# The same tokens.


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "opt", "neox"])
def test_shared_beginnings_are_run_once_and_change_nothing(family: str, watched: Counter[str]) -> None:
    """Ancestors in full and windowed attention, with soft-capping, grouped queries, learned positions."""
    lm, prompts = families.tiny(family), conversations()
    ours = sample(lm, prompts)
    assert watched["passes"] == 1
    assert watched["prompt tokens"] == (39 + 26 + 3) + 12 + 1 + (33 + 1) + 7 + 1 + 1
    assert_same(ours, sample(lm, prompts, PlainSampler()))
    for prompt, group in zip(prompts, ours, strict=True):
        assert_same(sample(lm, [prompt]), [group])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("limit", [32, 64, 77])
def test_long_prompts_run_in_pieces(
    family: str, limit: int, watched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, prompts = families.tiny(family), [*conversations(), *families.prompts((150, 64))]
    whole = sample(lm, prompts)
    before = watched["passes"]
    monkeypatch.setattr(engine, "PREFILL_TOKENS", limit)
    assert_same(sample(lm, prompts), whole)
    assert watched["passes"] - before >= 375 // limit


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_a_free_slot_is_taken_by_the_next_response(n: int, rows: int, watched: Counter[str]) -> None:
    """An eighth of the draws is an end: responses of very unequal lengths, few rows."""
    lm, prompts = families.tiny("mistral"), families.prompts((3, 9, 5, 20, 14, 6))
    ends = list(range(0, 97, 12))
    expected = sample(lm, prompts, PlainSampler(), n=n, ends=ends)
    assert_same(sample(lm, prompts, n=n, ends=ends, max_rows=rows), expected)
    assert watched["rows"] <= rows
    # A row that has drawn t tokens was in t − 1 steps; full to the end, the steps are their sum by the rows.
    work = [len(r.tokens or []) - 1 for g in expected for r in g.responses]
    assert watched["steps"] <= -(-sum(work) // rows) + max(work)
    if rows == 1:
        assert watched["steps"] == sum(work)


@pytest.mark.parametrize("kernels", [True, False])
def test_any_budget_that_holds_one_sequence_will_do(
    kernels: bool, watched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From all at once down to one by one; the bytes allocated never exceed the budget."""
    if not kernels:
        monkeypatch.setattr("trimtab.kernels.decode.compiled", lambda *x: False)
    lm, prompts = families.tiny("llama"), conversations()
    block = 3 * 2 * BLOCK * (8 + 16) * 4
    monkeypatch.setattr(engine, "MIB", block)
    expected, sampler = sample(lm, prompts, PlainSampler(), max_new_tokens=40), TreeSampler()
    steps = []
    # One sequence: 39 + 33 + 1 tokens are 2 + 2 + 1 blocks, 39 new ones 2.
    for budget in (7, 9, 13, 30, 1000):
        watched.clear()
        assert_same(sample(lm, prompts, sampler, max_new_tokens=40, cache_mb=budget), expected)
        assert watched["blocks"] <= budget
        assert watched["bytes"] <= budget * block
        steps.append(watched["steps"])
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 3 * steps[-1]
    with pytest.raises(InputError, match=r"sampling.cache_mb is 6.* 73 prompt and 40 new tokens needs 1 MiB"):
        sample(lm, prompts, sampler, max_new_tokens=40, cache_mb=6)


def test_a_budget_too_small_for_one_sequence_is_an_error() -> None:
    lm = families.tiny("llama")
    lm.config.max_position_embeddings = 10_000
    with pytest.raises(InputError, match=r"one sequence of 3 prompt and 9000 new tokens needs 5 MiB"):
        sample(lm, families.prompts((3,)), max_new_tokens=9000, cache_mb=3)


@pytest.mark.parametrize("family", families.TREE)
def test_the_plain_forms_give_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, prompts = families.tiny(family), families.prompts()
    compiled = sample(lm, prompts, min_new_tokens=5)
    assert_same(compiled, sample(lm, prompts, PlainSampler(), min_new_tokens=5))
    monkeypatch.setattr("trimtab.kernels.decode.compiled", lambda *x: False)
    assert_same(sample(lm, prompts, min_new_tokens=5), compiled)


def test_one_new_token_needs_no_step(watched: Counter[str]) -> None:
    lm, prompts = families.tiny("llama"), families.prompts()
    ours = sample(lm, prompts, max_new_tokens=1)
    assert watched["steps"] == 0
    assert_same(ours, sample(lm, prompts, PlainSampler(), max_new_tokens=1))


# Groups handed out while others run.


@pytest.mark.parametrize("sampler", [TreeSampler(), PlainSampler()])
def test_a_group_is_handed_out_as_soon_as_it_is_finished(sampler: Sampler) -> None:
    lm, prompts = families.tiny("llama"), families.prompts((3, 9, 5, 20, 14, 6))
    handed: list[tuple[int, Group]] = []
    config = SamplingConfig(max_new_tokens=24, max_rows=6)

    def hand(index: int, group: Group) -> None:
        handed.append((index, group))

    result = sampler.sample(lm, prompts, SAMPLES, config, seed=1, end_tokens=ENDS, on_group=hand)
    assert sorted(i for i, _ in handed) == list(range(6))
    assert all(result[i] is group for i, group in handed)
    assert_same(result, sample(lm, prompts))


def test_the_first_group_comes_before_the_last_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, prompts = families.tiny("llama"), families.prompts((3, 9, 5, 20, 14, 6))
    events: list[str] = []
    admit = schedule.Queue.admit

    def on_admit(self: schedule.Queue, *rest: Any) -> Any:
        made = admit(self, *rest)
        events.extend(f"in {group}" for group, _ in made[0])
        return made

    monkeypatch.setattr(schedule.Queue, "admit", on_admit)
    config = SamplingConfig(max_new_tokens=24, max_rows=4)

    def hand(index: int, group: Group) -> None:
        events.append(f"out {index}")

    TreeSampler().sample(lm, prompts, 2, config, seed=1, end_tokens=ENDS, on_group=hand)
    assert events.index("out 0") < events.index("in 5")


# Breaking off.


class Interruption(BaseException):
    """As KeyboardInterrupt is."""


@pytest.mark.parametrize("where", ["callback", "step", "prompt"])
def test_an_interrupted_call_leaves_the_engine_usable(where: str) -> None:
    lm, prompts, sampler = families.tiny("mistral"), conversations(), TreeSampler()
    expected = sample(lm, prompts)
    calls = 0

    def interrupt(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if where == "callback" or calls == {"step": 12, "prompt": 2}[where]:
            raise Interruption

    handle = None if where == "callback" else lm.head.trunk.register_forward_hook(interrupt)
    config, callback = SamplingConfig(max_new_tokens=24, max_rows=9), interrupt if handle is None else None
    with pytest.raises(Interruption):
        sampler.sample(lm, prompts, SAMPLES, config, seed=1, end_tokens=ENDS, on_group=callback)
    if handle is not None:
        handle.remove()
    assert lm.config._attn_implementation == "sdpa"
    assert sampler.blocks is not None
    assert sampler.blocks.live == 0
    assert_same(sample(lm, prompts, sampler), expected)


def test_a_stale_entry_is_never_read() -> None:
    """The same sampler after an update: its blocks still hold the old weights' keys; nobody reads them."""
    lm, prompts, sampler = families.tiny("llama"), conversations(), TreeSampler()
    sample(lm, prompts, sampler)
    assert sampler.blocks is not None
    keys = sampler.blocks.keys[0]
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    lm.version += 1
    assert_same(sample(lm, prompts, sampler), sample(lm, prompts, PlainSampler()))
    assert sampler.blocks.keys[0] is keys
    with pytest.raises(RuntimeError, match="weights changed"):
        sampler.blocks.check(lm.version + 1)
    # Nor another model's, nor in another dtype.
    other = families.tiny("qwen3", seed=3)
    assert_same(sample(other, prompts, sampler), sample(other, prompts, PlainSampler()))
    lm.cast(torch.bfloat16)
    assert sample(lm, prompts, sampler)[0].responses[0].tokens
    assert sampler.blocks.keys[0].dtype == torch.bfloat16


def test_a_thousand_calls_leak_nothing() -> None:
    """Blocks, Python objects and resident memory; every tenth call is broken off in the middle."""
    config = families.hf.LlamaConfig(
        **{**families._GQA, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    )
    lm: LanguageModel = families.wrap(families.hf.LlamaForCausalLM(config), None)
    prompts, sampler = families.prompts((20, 4)), TreeSampler()
    options = SamplingConfig(max_new_tokens=3, max_rows=3)

    def fail(index: int, group: Group) -> None:
        raise Interruption

    def run(calls: int) -> tuple[int, int]:
        for i in range(calls):
            try:
                callback = fail if i % 10 == 9 else None
                sampler.sample(lm, prompts, 2, options, seed=i, end_tokens=[4], on_group=callback)
            except Interruption:
                assert i % 10 == 9
            assert sampler.blocks is not None
            assert sampler.blocks.live == 0
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(gc.get_objects())

    memory, objects = run(100)
    later, more = run(900)
    assert later - memory < 8 * 1024
    assert abs(more - objects) < 200


def test_nodes_are_freed_when_the_last_row_below_them_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, prompts = families.tiny("llama"), conversations()
    left: list[tuple[int, int]] = []
    release = schedule.Queue.release

    def spy(self: schedule.Queue, group: int, blocks: Blocks) -> None:
        release(self, group, blocks)
        nodes: dict[int, Node] = {id(n): n for leaf in self.leaves for n in leaf.chain()}
        left.append((sum(n.groups > 0 for n in nodes.values()), sum(bool(n.blocks) for n in nodes.values())))

    monkeypatch.setattr(schedule.Queue, "release", spy)
    sample(lm, prompts)
    assert len(left) == len(prompts)
    # All were computed at once, so those with blocks are those with groups to come.
    assert all(held == needed for needed, held in left)
    assert left[-1] == (0, 0)
