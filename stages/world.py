"""Publish the embedded world as ordinary files, which other stages read like a user's own files."""

import json

from data.records import write_jsonl
from data.world.world import World
from pipeline.config.sections import OF_WORLD
from pipeline.errors import UserError
from pipeline.stage import StageRun
from stages.settings.experiment import Experiment
from stages.settings.world import WorldSettings


def run(ctx: StageRun[WorldSettings, Experiment]) -> dict:
    """Publish a JSONL file of each kind of data, and world.json, from which gold is computed.

    Returns:
        The number of rows of each kind, for the manifest.
    """
    settings = ctx.config
    world = World.build(
        ctx.experiment.seed,
        documents=settings.documents,
        demonstrations=settings.demonstrations,
        prompts=settings.prompts,
        evaluation_prompts=settings.evaluation_prompts,
    )
    counts = {}
    for kind in OF_WORLD:
        try:
            rows = list(getattr(world, kind)())
        except ValueError as problem:  # the world has a limited number of different prompts
            remedy = "lower it, or the other numbers of prompts in the section world"
            raise UserError(f"world.{problem}; {remedy}") from None
        counts[kind] = len(rows)
        write_jsonl(ctx.publish / f"{kind}.jsonl", rows)
    (ctx.publish / "world.json").write_text(json.dumps(world.to_json(), indent=1), encoding="utf-8")
    return counts
