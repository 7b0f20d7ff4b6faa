"""Collect what a run's artifacts say of how they were made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.stage import StageRun
from stages.settings.peft import model_of


@dataclass(frozen=True)
class Provenance:
    """What a published model was made of: settings, inputs and data."""

    experiment: str
    """Name of the experiment."""
    stage: str
    """Name of the stage."""
    section: BaseModel
    """The stage's settings."""
    model: Any
    """The section `model`, with the adapter settings of the stage."""
    seed: int
    """The experiment's seed."""
    inputs: dict[str, Path]
    """The artifact folders that the stage reads, by stage."""
    manifests: dict[str, dict[str, Any]]
    """The manifests of those stages."""
    data: dict[str, Any]
    """What the manifest will record of each kind of data: path, rows, …"""
    model_revision: str | None
    """Commit of the model on the Hub that the stage starts from; None where it is not known."""
    publish: Path
    """The folder whose contents become the artifact."""


def provenance_of(ctx: StageRun) -> Provenance:
    """Return the provenance of what a run publishes."""
    return Provenance(
        experiment=ctx.experiment.name,
        stage=ctx.stage,
        section=ctx.config,
        model=model_of(ctx.experiment, ctx.stage),
        seed=ctx.seed,
        inputs=ctx.inputs,
        manifests=ctx.manifests,
        data=ctx.data,
        model_revision=ctx.model_revision,
        publish=ctx.publish,
    )
