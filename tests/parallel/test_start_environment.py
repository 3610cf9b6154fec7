"""What a launcher leaves in the environment, read without a process."""

from __future__ import annotations

import doctest

import pytest

from trimtab.errors import InputError, Lost
from trimtab.parallel import environment
from trimtab.parallel.environment import Place, place

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "6",
}


def test_torchrun() -> None:
    assert place(TORCHRUN) == Place(3, 4, 1, 2, "a1", 29500)
    elastic = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    found = place(TORCHRUN | elastic)
    assert found is not None
    assert found.store_is_there
    assert found.attempt == "2"


def test_srun() -> None:
    found = place(SRUN)
    assert found == Place(5, 6, 1, 2, "gpu07", 20000 + 7 * 12345 % 10000, "srun")
    # torchrun within a step counts.
    assert place(SRUN | TORCHRUN) == Place(3, 4, 1, 2, "a1", 29500)
    given = place(SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "1234"})
    assert given is not None
    assert (given.address, given.port) == ("here", 1234)
    # The script that sbatch starts has the job's tasks in its environment, and is one process.
    script = {key: value for key, value in SRUN.items() if "STEP" not in key} | {"SLURM_PROCID": "0"}
    assert place(script) is None


@pytest.mark.parametrize("alone", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process(alone: dict[str, str]) -> None:
    assert place(alone) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": None}, "has RANK without WORLD_SIZE"),
        ({"RANK": None}, "has WORLD_SIZE without RANK"),
        ({"RANK": "two"}, "RANK is 'two': it has to be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "-4"}, "WORLD_SIZE is '-4': it has to be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK = 0 and WORLD_SIZE = 0"),
        ({"RANK": "4"}, "RANK = 4 and WORLD_SIZE = 4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK = 2 and LOCAL_WORLD_SIZE = 2"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE = 9 of 4"),
        ({"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "99999"}, "MASTER_PORT = 99999"),
        ({"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": None}, "WORLD_SIZE = 4 without MASTER_ADDR"),
    ],
)
def test_what_cannot_be(changed: dict[str, str | None], words: str) -> None:
    given = {key: value for key, value in (TORCHRUN | changed).items() if value is not None}
    with pytest.raises(InputError) as refused:
        place(given)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "changed", [{"MASTER_ADDR": ""}, {"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "0"}, {"MASTER_PORT": "x"}]
)
def test_what_all_have_wrong_one_says(changed: dict[str, str]) -> None:
    with pytest.raises(Lost) as refused:
        place(TORCHRUN | changed)
    assert refused.value.code == 2
    assert not str(refused.value)


def test_examples() -> None:
    assert doctest.testmod(environment).failed == 0
