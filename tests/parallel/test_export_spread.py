"""model/ of a run whose weights are spread: gathered tensor by tensor, the same files as of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import Processes
from torch.distributed.tensor import DTensor

from trimtab.models.adapters import AdapterConfig
from trimtab.models.load import ModelConfig, load_model, load_scalar_model
from trimtab.models.shards import put
from trimtab.parallel.options import ParallelConfig
from trimtab.parallel.world import world
from trimtab.spread.shard import Spread
from trimtab.training import export, pieces
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser

KINDS = ("tied", "untied", "scalar", "adapter")


def _exported(kind: str, model: Path, out: Path, dtype: str, spread: bool) -> dict[str, Any]:
    """Load, change every weight that learns by a rule, export; what this process held of it at most."""
    config = ModelConfig(path=str(model), dtype="float32")
    holder = Spread(ParallelConfig(weights="shard"), torch.float32, "cpu") if spread else None
    lm: Any
    if kind == "scalar":
        lm = load_scalar_model(config, holder=holder)
    else:
        adapter = AdapterConfig(kind="lora", rank=4) if kind == "adapter" else None
        lm = load_model(config, adapter, holder=holder, seed=0)
    optimiser = Optimiser(lm.model, TrainConfig(), torch.float32)
    assert any(isinstance(m, DTensor) for m in optimiser.masters.values()) == spread
    for number, master in enumerate(optimiser.masters.values()):
        value = torch.sin(torch.arange(master.numel(), dtype=torch.float32) + number).view(master.shape)
        put(master, value)
    held: list[int] = []
    own = pieces.gathered

    def watched(*given: Any, **named: Any) -> dict[str, torch.Tensor]:
        found = own(*given, **named)
        held.append(sum(t.numel() for t in found.values()))
        return found

    export.gathered = watched
    try:
        export.save_model(lm, optimiser, out, dtype)
    finally:
        export.gathered = own
    return {"held": held, "first": world().first}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    untied = LlamaForCausalLM(tiny.llama_config(0.3))
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(torch.randn_like(untied.lm_head.weight))
    untied.save_pretrained(folder / "untied")
    tiny.tokenizer().save_pretrained(folder / "untied")
    tied = tiny.save_model(folder / "tied")
    return {
        "tied": tied,
        "untied": folder / "untied",
        "scalar": tiny.save_reward_model(folder / "scalar"),
        "adapter": tied,
    }


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float32") for kind in KINDS), ("tied", "bfloat16")])
def test_the_files_are_those_of_one_process(
    kind: str, dtype: str, models: dict[str, Path], processes: Processes, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"kind": kind, "model": models[kind], "dtype": dtype}
    processes.run(_exported, size=1, out=tmp_path / "one", spread=False, **given)
    found = processes.run(_exported, out=tmp_path / "two", spread=True, **given)
    names = {p.name for p in (tmp_path / "one").iterdir()}
    assert {p.name for p in (tmp_path / "two").iterdir()} == names
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    assert found[0]["held"][0] > 0
    assert found[1]["held"] == [0], "a process that writes nothing keeps nothing"


def _fails(kind: str, model: Path, out: Path) -> str:
    if world().first:
        out.write_text("in the way")
    world().barrier()
    try:
        _exported(kind, model, out / "model", "float32", spread=True)
    except OSError as error:
        return str(error)
    return ""


def test_what_cannot_be_written_is_said_by_all(
    models: dict[str, Path], processes: Processes, tmp_path: Path
) -> None:
    said = processes.run(_fails, kind="tied", model=models["tied"], out=tmp_path / "file")
    assert said[0] == said[1]
    assert said[0].startswith("process 0: ")
