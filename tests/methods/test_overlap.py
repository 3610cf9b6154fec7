"""Sampling one rollout ahead: what is drawn, from which weights, when; and how it ends."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import ValidationError
from tiny import assert_same_run, stop_at, train

from trimtab import methods
from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.methods import grpo, ppo
from trimtab.methods.shared import ahead, relative
from trimtab.methods.shared.scored import sample_and_score
from trimtab.rewards.base import RewardConfig
from trimtab.rewards.functions import build_mixture
from trimtab.rollouts.plain import PlainSampler
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.training.metrics import read_metrics

Make = Callable[..., Any]

LATER = {"train__batch_groups": 2}
"""Two steps on each rollout of four prompts."""
BOTH = [("grpo", {}), ("grpo", LATER | {"grpo__rollout_groups": 4}), ("ppo", {"ppo__epochs_per_rollout": 2})]


class Seen:
    """What every call of ``sample_and_score`` was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.prompts: list[list[str]] = []
        self.weights: list[torch.Tensor] = []
        self.threads: list[str] = []

        def spy(lm: Any, sampler: Any, mixture: Any, prompts: list[Group], *rest: Any, **more: Any) -> Any:
            self.steps.append(more["step"])
            self.prompts.append([group.id for group in prompts])
            self.weights.append(next(lm.model.parameters()).detach().clone())
            self.threads.append(threading.current_thread().name)
            rollout = sample_and_score(lm, sampler, mixture, prompts, *rest, **more)
            # A copy that changed while it was read would show here.
            assert torch.equal(next(lm.model.parameters()), self.weights[-1])
            return rollout

        monkeypatch.setattr(ahead, "sample_and_score", spy)


@pytest.mark.parametrize(("name", "changed"), BOTH)
def test_the_next_rollout_is_drawn_from_the_weights_before_this_one_was_learned(
    name: str, changed: dict[str, Any], configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        plain = Seen(patched)
        config = configured(name, out="plain", **changed)
        train(config, name)
    with monkeypatch.context() as patched:
        seen = Seen(patched)
        result, metrics = train(configured(name, **changed, **{f"{name}__overlap": True}), name)
    each = config.steps_per_rollout
    assert seen.steps == plain.steps == list(range(0, 6, each))
    assert seen.prompts == plain.prompts
    # The first rollout is as without overlap, the second from the same weights, then always one behind.
    assert torch.equal(seen.weights[0], plain.weights[0])
    assert torch.equal(seen.weights[1], seen.weights[0])
    assert not torch.equal(seen.weights[2], seen.weights[1])
    assert [thread.startswith("rollout") for thread in seen.threads] == [False] + [True] * (6 // each - 1)
    gaps = [line["sampler_gap"] for line in metrics]
    assert max(gaps[:each]) < 1e-5 < 1e-3 < min(gaps[each:])
    models = json.loads((result.out / "lineage.json").read_text())["models_in_memory"]
    assert models == {"grpo": 3, "ppo": 4}[name]
    assert metrics[-1]["generated_tokens"] > 0
    assert result.state.position == 4 * 6 // each
    assert not result.state.ahead


@pytest.mark.parametrize(("name", "changed"), BOTH)
def test_the_run_does_not_depend_on_the_threads_timing(
    name: str, changed: dict[str, Any], configured: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changed = changed | {f"{name}__overlap": True, "train__threads": 2}
    threaded = train(configured(name, out="threaded", **changed), name)[0]

    class AtOnce:
        """An executor without a thread: the rollout is done before the step begins."""

        def __init__(self, *_: object) -> None: ...

        def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(function(*arguments))
            return future

        def shutdown(self, **_: object) -> None: ...

    with monkeypatch.context() as patched:
        patched.setattr(ahead, "ThreadPoolExecutor", AtOnce)
        at_once = train(configured(name, out="at_once", **changed), name)[0]
    assert_same_run(threaded.out, at_once.out)
    # Reward functions in processes, and so slow that every step waits for them: the same run.
    body = (
        "import time; time.sleep(0.01); words = response.split(); "
        "return sum(w in 'aeiou' for w in words) / max(len(words), 1)"
    )
    term = {"name": tiny.write_reward(tmp_path / "slow.py", body), "label": "vowels"}
    workers = {"reward__terms": [term], "reward__workers": 2}
    assert_same_run(threaded.out, train(configured(name, out="slow", **changed, **workers), name)[0].out)


def test_a_slow_reward_is_hidden_behind_the_step(
    configured: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A reward that sleeps, as one that waits for a judge does; and a step that takes as long."""
    term = {
        "name": tiny.write_reward(tmp_path / "slow.py", "import time; time.sleep(0.02); return len(response)")
    }
    learn = relative.learn

    def slowly(*arguments: Any, **more: Any) -> dict[str, float]:
        time.sleep(0.5)
        return learn(*arguments, **more)

    monkeypatch.setattr(relative, "learn", slowly)
    seconds = {}
    for overlap in (False, True):
        options = {"out": str(overlap), "grpo__overlap": overlap, "reward__terms": [term], "train__steps": 4}
        metrics = train(configured("grpo", **options), "grpo")[1]
        seconds[overlap] = [line["sampling_s"] for line in metrics[1:]]
        assert min(line["reward_wait_s"] for line in metrics) >= 16 * 0.02
    assert min(seconds[False]) > 0.32
    assert max(seconds[True]) < 0.16


def test_rewards_of_a_rollout_are_found_while_it_is_sampled(tmp_path: Path) -> None:
    """Against a sampler that does nothing but take its time."""

    class Sampler:
        def sample(self, lm: Any, groups: list[Group], n: int, config: Any, **more: Any) -> list[Group]:
            sampled = [
                Group(g.id, g.prompt, [Response(text="a", tokens=[1]) for _ in range(n)]) for g in groups
            ]
            for index in reversed(range(len(groups))):  # they finish in an order of their own
                time.sleep(0.2)
                more["on_group"](index, sampled[index])
            return sampled

    term = {"name": tiny.write_reward(tmp_path / "slow.py", "import time; time.sleep(0.05); return 1.0")}
    prompts = [Group(f"p:{i % 4}", "x") for i in range(5)]
    waited = []
    for workers in (0, 1):
        mixture = build_mixture(RewardConfig.model_validate({"terms": [term], "workers": workers}))
        try:
            mixture.start()
            rollout = sample_and_score(
                None,  # type: ignore[arg-type]
                Sampler(),
                mixture,
                [Group(g.id, g.prompt) for g in prompts],
                2,
                SamplingConfig(),
                ends=[],
                seed=0,
                step=3,
                on_group=lambda _, group, mixture=mixture: mixture.submit(group),
            )
        finally:
            mixture.close()
        waited.append(rollout.reward_wait_s)
        assert [group.id for group in rollout.groups] == ["p:0", "p:1", "p:2", "p:3", "p:0#1"]
        assert rollout.counts == {"generated_tokens": 10, "skipped_groups": 0}
        assert all(r.reward == 1.0 for group in rollout.groups for r in group.responses)
    assert waited[0] > 0.5
    assert waited[1] < 0.25


def test_what_fails_in_the_thread_ends_the_run_after_the_step_before_it(
    configured: Make, tmp_path: Path
) -> None:
    count = tmp_path / "count"
    count.write_text("")
    body = f"open({str(count)!r}, 'a').write('.'); return 1 / (os.path.getsize({str(count)!r}) <= 40)"
    term = {"name": tiny.write_reward(tmp_path / "fails.py", body)}
    config = configured("grpo", grpo__overlap=True, reward__terms=[term], train__save_every=1)
    with pytest.raises(InputError, match=r"reward 'score' on .*ZeroDivisionError"):
        methods.find("grpo").train(config)
    # 16 responses a rollout: the third failed, while the second was learned from and saved.
    assert [line["step"] for line in read_metrics(Path(config.run.out) / "metrics.jsonl")] == [1, 2]
    assert tiny.saved_state(Path(config.run.out), 2)["ahead"] == []


def test_a_stopped_run_leaves_no_thread(configured: Make, tmp_path: Path) -> None:
    term = {
        "name": tiny.write_reward(tmp_path / "slow.py", "import time; time.sleep(0.01); return len(response)")
    }
    config = configured(
        "grpo",
        grpo__overlap=True,
        reward__terms=[term],
        reward__workers=1,
        train__eval_every=1,
        train__steps=9,
    )
    with pytest.raises(KeyboardInterrupt):
        methods.find("grpo").train(config, on_eval=stop_at(3))
    left = [thread.name for thread in threading.enumerate()]
    assert not [name for name in left if name.startswith(("rollout", "rewards"))]


def test_a_stopped_run_waits_for_one_group_at_most(configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(PlainSampler):
        """A second for every group of the rollout that is sampled ahead."""

        def sample(self, *arguments: Any, on_group: Any = None, **more: Any) -> list[Group]:
            groups = super().sample(*arguments, **more)
            for index, group in enumerate(groups):
                time.sleep(threading.current_thread().name.startswith("rollout"))
                on_group(index, group)
            return groups

    stopped: list[float] = []

    def stop(*_: Any, **__: Any) -> None:
        time.sleep(0.2)
        stopped.append(time.perf_counter())
        raise KeyboardInterrupt

    monkeypatch.setattr(relative, "choose_sampler", lambda *_: (Slow(), None))
    monkeypatch.setattr(relative, "learn", stop)
    with pytest.raises(KeyboardInterrupt):
        methods.find("grpo").train(configured("grpo", grpo__overlap=True))
    assert time.perf_counter() - stopped[0] < 2


def test_a_checkpoint_holds_the_rollout_in_flight(configured: Make) -> None:
    config = configured("grpo", grpo__overlap=True, train__save_every=2, train__steps=4)
    result, metrics = train(config, "grpo")
    saved = tiny.saved_state(result.out, 2)
    assert (saved["position"], len(saved["pending"]), len(saved["ahead"])) == (8, 0, 4)
    # Its tokens are counted when it is taken up.
    assert saved["controllers"]["generated_tokens"] == metrics[1]["generated_tokens"]
    assert saved["controllers"]["ahead/generated_tokens"] > 0
    assert tiny.saved_state(result.out, 4)["ahead"] == []


@pytest.mark.parametrize("module", [grpo, ppo])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"M__overlap": True, "M__importance": "never"}, 'importance = "never" with overlap = true'),
        ({"M__overlap": True, "reward__terms": [{"name": "math"}]}, "give it a process with reward.workers"),
        ({"M__importance_cap": 3.0}, "untruncated sampling without overlap"),
    ],
)
def test_refused(configured: Make, module: Any, changed: dict[str, Any], message: str) -> None:
    name = module.Config.section
    with pytest.raises((InputError, ValidationError), match=message):
        configured(name, **{key.replace("M", name): value for key, value in changed.items()})


def test_accepted(configured: Make) -> None:
    old, sampler = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.0]])
    on = configured("grpo", grpo__overlap=True, grpo__importance_cap=3.0).importance_weights(old, sampler)
    torch.testing.assert_close(on, torch.tensor([[torch.e, 1 / torch.e]]))
    assert configured("grpo").importance_weights(old, sampler) is None
    terms = [{"name": "math"}]
    assert configured("grpo", grpo__overlap=True, reward__terms=terms, reward__workers=1).options.overlap
