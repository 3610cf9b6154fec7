"""What a pipeline is made of: the stages that its file states, and the steps that are run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trimtab.config import Section
from trimtab.data.sources import SourceConfig
from trimtab.studies.config import BASE, StageConfig, StudyFile

SAMPLE = "sample"
"""Not a method: the stage that answers prompts with a policy and has a judge label the answers."""
ROWS = "rows.jsonl"
"""What a sample stage writes, in its folder."""
START = "start"
"""The policy that a stage starts from, as a reference."""

Kind = Literal["policy", "reward", "data"]


class PipelineStage(StageConfig):
    """A stage of a pipeline. All other keys are its method's own sections, or those of a labelling."""

    method: str = Field(
        description="sft, dpo, grpo, reward, …, or sample: answer prompts and label the answers"
    )
    start: str = Field(
        "", description="stage whose model this one starts from, or base; empty takes the newest policy"
    )
    reference: str = Field(
        "",
        description="what a method is anchored to: start (the policy that it starts from), base, or a stage",
    )
    replaces: str = Field("", description="earlier stage whose name stands for this one from here on")
    replay: float = Field(
        0.0, ge=0, le=1, description="share of the rows of earlier versions that is mixed into the data"
    )


class Repeat(Section):
    """A block of stages that is run several times."""

    stages: list[str] = Field(description="stages that follow each other in the file")
    times: int = Field(ge=1, description="how often the block is run")


@dataclass(slots=True)
class Step:
    """One run of one stage."""

    folder: str
    """Its folder in the study: NAME, or NAME-1, NAME-2, … in a repeated block."""
    key: str
    """Its place in the file, for messages."""
    stage: PipelineStage
    kind: Kind
    config: Any
    """The method's configuration, or the labelling's."""
    start: str
    """Folder of the step that it starts from, or base."""
    reference: str
    """The same of what it is anchored to; empty where a method has no reference."""
    fresh: list[SourceConfig] = field(default_factory=list)
    """What its file says it learns from."""
    history: list[SourceConfig] = field(default_factory=list)
    """What the versions before it learned from."""


@dataclass(slots=True)
class Order:
    """Every step, in order, and what the names stand for once all have run."""

    steps: list[Step] = field(default_factory=list)
    latest: dict[str, Step] = field(default_factory=dict)
    """Stage → its newest run."""
    policy: str = BASE
    """Folder of the newest policy."""

    def places(self, study: StudyFile) -> dict[str, str]:
        """What ``{NAME}`` stands for in a string."""
        out = Path(study.out)
        return {f"{{{BASE}}}": study.base_path} | {
            f"{{{name}}}": str(out / step.folder) for name, step in self.latest.items()
        }

    def model(self, study: StudyFile, folder: str) -> str:
        """The model of a step's folder, or the base."""
        return study.base_path if folder == BASE else str(Path(study.out) / folder / "model")
