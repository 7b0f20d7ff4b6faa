"""world: the embedded world, written out as ordinary files that every other stage reads as it would read a user's."""

import json

from data.records import write_jsonl
from data.world.world import World
from pipeline.config.sections import OF_WORLD
from pipeline.errors import UserError
from pipeline.stage import StageRun
from stages.settings.training import Section, setting

NAME = "world"
METRICS: dict[str, str] = {}
HEADLINE = ("documents", "demonstrations", "prompts", "evaluation_prompts")


class Config(Section):
    """Sizes of the embedded world."""

    documents: int = setting(15000, "pretraining documents", "documents", ge=100)
    demonstrations: int = setting(1500, "demonstrations by labelers of mixed quality", "rows", ge=20)
    prompts: int = setting(2000, "prompts for rankings and PPO", "prompts", ge=20)
    evaluation_prompts: int = setting(400, "prompts that nothing trains on", "prompts", ge=20)


def needs(experiment) -> list[str]:
    return []


def reads(experiment) -> list[str]:
    return []


def check(experiment) -> list[str]:
    data = experiment.data
    return [
        f"data.{k}: world takes no split, skip or limit; write {k}: world, and set its size in the section world"
        for k in OF_WORLD
        if getattr(getattr(data, k), "path", None) == "world"
    ]


def run(ctx: StageRun) -> dict:
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
    for kind in HEADLINE:
        try:
            rows = list(getattr(world, kind)())
        except ValueError as problem:  # it has so many different prompts and no more
            remedy = "lower it, or the other numbers of prompts in the section world"
            raise UserError(f"world.{problem}; {remedy}") from None
        counts[kind] = len(rows)
        write_jsonl(ctx.publish / f"{kind}.jsonl", rows)
    (ctx.publish / "world.json").write_text(json.dumps(world.to_json(), indent=1), encoding="utf-8")
    return counts
