"""world: the embedded world, written out as ordinary files that every other stage reads as it would read a user's."""

import json

from data.records import write_jsonl
from data.world.world import World
from pipeline.config.sections import OF_WORLD
from pipeline.errors import UserError
from pipeline.stage import StageRun
from stages.settings.experiment import Experiment
from stages.settings.world import WorldSettings


def run(ctx: StageRun[WorldSettings, Experiment]) -> dict:
    """→ {documents,demonstrations,prompts,evaluation_prompts}.jsonl, and world.json, from which gold is computed."""
    c = ctx.config
    world = World.build(
        ctx.experiment.seed,
        documents=c.documents,
        demonstrations=c.demonstrations,
        prompts=c.prompts,
        evaluation_prompts=c.evaluation_prompts,
    )
    counts = {}
    for kind in OF_WORLD:
        try:
            rows = list(getattr(world, kind)())
        except ValueError as problem:  # it has so many different prompts and no more
            remedy = "lower it, or the other numbers of prompts in the section world"
            raise UserError(f"world.{problem}; {remedy}") from None
        counts[kind] = len(rows)
        write_jsonl(ctx.publish / f"{kind}.jsonl", rows)
    (ctx.publish / "world.json").write_text(json.dumps(world.to_json(), indent=1), encoding="utf-8")
    return counts
