"""SIGTERM ends a run behind the step in hand, with a checkpoint and exit code 143; Ctrl-C ends it at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from faults_runs import GRPO, WAITING, World, checkpoints, chosen, fault, logged

SIGNALLING = """
import os, signal
from pathlib import Path

FLAG = Path(__file__).with_name("flag")


def score(prompt, response, **columns):
    words = response.split()
    if FLAG.exists():
        whom, after, done = FLAG.read_text().split()
        FLAG.write_text(f"{whom} {after} {int(done) + 1}")
        if int(done) + 1 == int(after):
            os.kill(os.getppid() if whom == "parent" else os.getpid(), signal.SIGTERM)
    return sum(word in "aeiou" for word in words) / max(len(words), 1)
"""
"""A reward whose n-th call sends the run SIGTERM, where a file says so."""


MOMENTS = {
    "sft": fault("adam", "", n=3),
    "reward": fault("backward", "", n=5, when="after"),
    "dpo": fault("backward", "", n=8),
    "grpo overlap": fault("write", "", n=2, when="after", path="metrics*"),
    "ppo": fault("adam", "", n=5, when="after"),
}


@pytest.mark.parametrize("do", chosen(["term", "group"], ["group"]))
@pytest.mark.parametrize("name", chosen(MOMENTS, ["dpo", "grpo overlap", "ppo"]))
def test_sigterm(name: str, do: str, world: World, out: Path) -> None:
    ended = world.run(name, out, faults=[MOMENTS[name] | {"do": do}])
    assert ended.status == 143, ended.err
    assert "Traceback" not in ended.err
    assert not (out / "model").exists()
    assert checkpoints(out)[-1] == f"step-{logged(out)[-1]:08d}", "the last step done is saved"
    world.finish(name, out)


@pytest.mark.parametrize(
    ("workers", "overlap"), chosen([(0, False), (0, True), (1, False), (1, True)], [(1, True)])
)
def test_sigterm_while_rewards_are_computed(workers: int, overlap: bool, world: World, out: Path) -> None:
    """The second rollout is being scored, by the run itself or by a worker, beside a step or not."""
    file = world.folder / f"signalling-{workers}-{overlap}" / "rewards.py"
    file.parent.mkdir()
    file.write_text(SIGNALLING)
    changed = GRPO | {
        "reward__workers": workers,
        "grpo__overlap": overlap,
        "reward__terms": [{"name": f"{file}:score", "label": "vowels"}],
    }
    name = world.case(f"grpo signal {workers} {overlap}", "grpo", changed)
    (file.parent / "flag").write_text(f"{'parent' if workers else 'self'} 40 0")
    ended = world.run(name, out)
    assert ended.status == 143, ended.err
    assert "Traceback" not in ended.err
    assert checkpoints(out)[-1] == f"step-{logged(out)[-1]:08d}"
    (file.parent / "flag").unlink()
    world.finish(name, out)


def test_a_second_sigterm_ends_at_once(world: World, out: Path) -> None:
    faults = [fault("adam", "term", n=3), fault("adam", "term", n=3, when="after")]
    ended = world.run("sft", out, *WAITING, faults=faults)
    assert ended.status in (-15, 143)
    assert checkpoints(out) == ["step-00000002"]
    world.finish("sft", out)


@pytest.mark.parametrize("share", chosen([0.05 * n for n in range(20)], [0.5]))
def test_sigterm_at_any_moment(share: float, world: World, out: Path) -> None:
    """Before the first step and behind the last there is nothing to save: the signal ends the process."""
    _, unhurt = world.timed("ppo overlap")
    ended = world.run("ppo overlap", out, after_s=share * unhurt.wall_s, signal=15, group=True)
    assert ended.status in (0, -15, 143), ended.err
    if ended.status == 143:
        assert checkpoints(out)[-1] == f"step-{logged(out)[-1]:08d}"
    world.finish("ppo overlap", out)


def test_ctrl_c(world: World, out: Path) -> None:
    ended = world.run("sft", out, faults=[fault("adam", "int", n=6)])
    assert ended.status == 130
    assert ended.err.splitlines()[-1].startswith("interrupted; go on with --")
    world.finish("sft", out)


def test_a_worker_that_crashes_and_one_that_hangs(world: World, out: Path) -> None:
    """Both cost their group alone; the rest of the run goes on."""
    file = world.folder / "faulty.py"
    body = "\n    ".join(
        (
            "if prompt.split()[-1] == 'e': import time; time.sleep(60)",
            "if prompt.split()[-1] == 'g': os._exit(3)",
            "return len(response.split()) / 6",
        )
    )
    changed = {
        "reward__terms": [{"name": tiny.write_reward(file, body), "label": "length"}],
        "reward__workers": 2,
        "reward__timeout_s": 0.5,
        "reward__on_error": "skip",
        "train__steps": 4,
        "data__heldout_fraction": 0.0,
    }
    name = world.case("grpo faulty", "grpo", changed)
    ended = world.run(name, out)
    assert ended.status == 0, ended.err
    assert logged(out)[-1] == 4
    assert '"skipped_groups": 2' in (out / "lineage.json").read_text()
