"""What goes wrong in one process while all sample: one line in all, and nobody waits for ever."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import tiny
from processes import Processes, ProcessFailed

from trimtab import methods
from trimtab.errors import InputError
from trimtab.evaluation.answering import answered
from trimtab.groups import Group, Response
from trimtab.methods.shared import relative
from trimtab.methods.shared.scored import _all_counts
from trimtab.parallel.limits import machine_part, own_part
from trimtab.parallel.limits import processes as processes_here
from trimtab.parallel.world import world
from trimtab.rewards.answer_cache import Answer, AnswerCache
from trimtab.rewards.base import Mixture, OnError, RewardTerm
from trimtab.rewards.chat_client import ChatClient
from trimtab.rewards.judge_config import JudgeConfig
from trimtab.rewards.judges import Costs
from trimtab.rollouts.engine import TreeSampler
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.rollouts.schedule import Queue


def _refused(model: Path, data: Path, out: Path, changed: dict[str, Any], method: str = "grpo") -> list[str]:
    """What the run says in this process."""
    config = tiny.configure(method, model, data, out, **changed)
    try:
        methods.find(method).train(config)
    except InputError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("overlap", [False, True])
def test_a_reward_that_fails_in_one_process_is_one_line_in_all(
    overlap: bool, processes: Processes, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    body = "assert columns['answer'] != 'd', 'no d'; return 1.0 * len(response)"
    term = {"name": tiny.write_reward(tmp_path / "picky.py", body)}
    changed = {"reward__terms": [term], "train__batch_groups": 2, "grpo__overlap": overlap}
    given: dict[str, Any] = {"model": tiny_model, "data": tiny_data, "changed": changed}
    first, second = processes.run(_refused, out=tmp_path / "two", **given)
    [alone] = processes.run(_refused, size=1, out=tmp_path / "one", **given)
    assert first == second == alone
    assert "no d" in first[0]


def _no_memory(model: Path, data: Path, out: Path) -> list[str]:
    sample = TreeSampler.sample

    def short(self: TreeSampler, lm: Any, groups: list[Group], *rest: Any, **more: Any) -> Any:
        if world().rank == 1 and more.get("step") == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return sample(self, lm, groups, *rest, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TreeSampler, "sample", short)
        return _refused(model, data, out, {})


def test_memory_that_runs_out_in_one_process_is_one_line_in_all(
    processes: Processes, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    first, second = processes.run(_no_memory, model=tiny_model, data=tiny_data, out=tmp_path / "run")
    assert first == second
    assert "out of memory while sampling" in first[0]


def _ends_while_a_thread_samples(model: Path, data: Path, out: Path, term: dict[str, str]) -> None:
    """The second step fails in one process, while threads of both are in the middle of a rollout."""
    learn = relative.learn

    def fails(*given: Any, **more: Any) -> Any:
        if world().rank == 1 and given[4].step == 1:
            assert any(thread.name.startswith("rollout") for thread in threading.enumerate())
            raise InputError("the reason")
        return learn(*given, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(relative, "learn", fails)
        config = tiny.configure("grpo", model, data, out, grpo__overlap=True, reward__terms=[term])
        methods.find("grpo").train(config)


def test_a_run_that_ends_in_one_process_leaves_no_thread_waiting(
    processes: Processes, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    slow = {"name": tiny.write_reward(tmp_path / "slow.py", "import time; time.sleep(0.05); return 1.0")}
    began = time.monotonic()
    with pytest.raises(ProcessFailed) as failed:
        processes.run(
            _ends_while_a_thread_samples,
            model=tiny_model,
            data=tiny_data,
            out=tmp_path / "run",
            term=slow,
        )
    assert "the reason" in (failed.value.errors[1] or "")
    assert failed.value.errors[0] is not None, "it did not wait for ever"
    assert "Lost" in failed.value.errors[0]
    assert time.monotonic() - began < 45


def _before_a_reward_model(model: Path, data: Path, out: Path, rm: Path, picky: str, how: str) -> list[str]:
    """A function fails on a prompt of one process, and the other goes on to a reward model."""
    terms = [{"name": picky}, {"name": "reward_model", "args": {"path": str(rm)}}]
    changed = {"reward__terms": terms, "train__batch_groups": 2, "train__steps": 2}
    return _refused(model, data, out, changed | {"parallel__weights": "shard", "parallel__gather": how})


def _first_of_two_players(model: Path, data: Path, out: Path, how: str) -> list[str]:
    """One process is refused its share by the policy's sampler, and the other goes on to the reference's."""

    def check(self: Queue, *_: Any) -> None:
        if world().rank == 1 and len(self.leaves) == 1:  # no probes
            raise InputError("too small a cache")

    changed = {"online_dpo__opponents": "both", "online_dpo__samples": 4, "train__batch_groups": 2}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Queue, "check", check)
        given = changed | {"parallel__weights": "shard", "parallel__gather": how}
        return _refused(model, data, out, given, "online-dpo")


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_a_refusal_before_another_models_passes_is_one_line_in_all(
    how: str, processes: Processes, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    body = "assert columns['answer'] != 'd', 'no d'; return 1.0 * len(response)"
    picky = tiny.write_reward(tmp_path / "picky.py", body)
    rm = tiny.save_reward_model(tmp_path / "rm", seed=3)
    given: dict[str, Any] = {"model": tiny_model, "data": tiny_data, "how": how}
    first, second = processes.run(_before_a_reward_model, out=tmp_path / "one", rm=rm, picky=picky, **given)
    assert first == second
    assert "no d" in first[0]
    first, second = processes.run(_first_of_two_players, out=tmp_path / "two", **given)
    assert first == second == ["too small a cache"]


def _evaluated(spread: bool) -> list[str]:
    """Memory runs out in one process while all answer the prompts of an evaluation."""

    def sample(_: Any, groups: list[Group], *__: Any, **___: Any) -> list[Group]:
        if world().rank == 1:
            raise MemoryError("too much")
        return groups

    lm, sampler = SimpleNamespace(spread=spread), SimpleNamespace(sample=sample)
    prompts = [Group(id=str(i), prompt_tokens=[0]) for i in range(4)]
    try:
        answered(lm, sampler, prompts, 1, SamplingConfig(), seed=0, end_tokens=[])  # type: ignore[arg-type]
    except InputError as error:
        if spread:
            raise
        return [str(error)]
    return []


def test_an_evaluation_short_of_memory_in_one_process_ends_all(processes: Processes) -> None:
    first, second = processes.run(_evaluated, spread=False)
    assert first == second
    assert "out of memory while an evaluation samples (too much): lower" in first[0]
    # Nobody can be told in the middle of a pass of all processes.
    with pytest.raises(ProcessFailed) as failed:
        processes.run(_evaluated, spread=True)
    assert "out of memory while an evaluation samples" in (failed.value.errors[1] or "")
    assert "Lost" in (failed.value.errors[0] or "")


class _Odd:
    """A scorer that fails, maybe amid a pass of all processes."""

    def __init__(self, spread: bool) -> None:
        self.outputs, self.notes, self.spread = {"": 1.0}, list[str](), spread

    def score(self, groups: list[Group]) -> Any:
        raise ValueError("odd")

    def facts(self) -> dict[str, float]:
        return {}


def test_what_a_spread_scorer_raises_is_not_skipped() -> None:
    groups = [Group(id="g", responses=[Response(text="a")])]
    assert Mixture([RewardTerm("odd", 1.0, _Odd(False))], "skip").score(groups).skipped == 1
    for on_error in get_args(OnError):
        with pytest.raises(ValueError, match="odd"):
            Mixture([RewardTerm("odd", 1.0, _Odd(True))], on_error).score(groups)


def test_wall_time_is_of_the_slowest_process() -> None:
    each = [{"reward_fact/judge_seconds": 2.0, "calls": 3}, {"reward_fact/judge_seconds": 5.0, "calls": 4}]
    assert _all_counts(each) == {"reward_fact/judge_seconds": 5.0, "calls": 7}


def _append(path: Path) -> int:
    """Each process asks for the same keys in turn, and answers those that nobody has."""
    cache = AnswerCache(str(path))
    for k in range(400):
        key = f"{world().rank}/{k}"
        cache.put(key, Answer("x" * (k % 97), prompt_tokens=k))
    world().barrier()
    other = 1 - world().rank
    return sum(cache.get(f"{other}/{k}") == Answer("x" * (k % 97), prompt_tokens=k) for k in range(400))


def test_a_cache_that_two_processes_write_is_whole_and_known_to_both(
    processes: Processes, tmp_path: Path
) -> None:
    path = tmp_path / "cache.jsonl"
    path.write_text('{"key": "cut sho')
    assert processes.run(_append, path=path) == [400, 400]
    lines = [line for line in path.read_text().splitlines()[1:] if line]
    assert len(lines) == 800
    assert len({json.loads(line)["key"] for line in lines}) == 800


def _limits() -> list[Any]:
    config = JudgeConfig(kind="endpoint", base_url="http://localhost:1/v1", model="m", requests_per_minute=60)
    waited: list[float] = []
    client = ChatClient(config, Costs(), clock=lambda: 0.0, sleep=waited.append)
    client._wait_for_turn()
    client._wait_for_turn()
    return [processes_here(), own_part(5), own_part(1), machine_part(3), waited]


def test_limits_are_the_runs_not_each_processs(processes: Processes) -> None:
    first, second = processes.run(_limits)
    assert first == [2, 3, 1, 2, [2.0]]
    assert second == [2, 2, 1, 1, [2.0]]
    assert "RANK" not in os.environ
    assert _limits() == [1, 5, 1, 3, [1.0]]
