"""A stage of the sweeps: a policy → N samples a prompt with score, gold, KL and length, and its perplexity.

It runs under the pipeline as the nine of `rlhf` do: it skips itself when nothing changed. Prompts, judge, seeds, form
of asking and settings are evaluate's, whose samples of a prompt are the first of these; evaluate takes too few of them
to tell neighbours of a sweep apart.
"""

import json
from functools import partial
from typing import Literal

from pydantic import Field

from data.world.world import World
from pipeline.config.section import setting
from pipeline.stage import Stage, StageRun
from stages import evaluate
from stages.evaluation.asking import form_of_base
from stages.evaluation.results import perplexity_estimate
from stages.models.packing import can_pack
from stages.settings import evaluate as evaluate_settings
from stages.settings.experiment import Experiment
from stages.shared.inputs import read_world
from stages.training.session import session_of


class SamplesSettings(evaluate_settings.EvaluateSettings):
    """evaluate's settings (its `policies` and `best_of` mean nothing here), and whose samples."""

    policy: Literal["base", "sft", "ppo", "dpo"] = setting("sft", "who answers")


class SweepExperiment(Experiment):
    """Hold an experiment that has the stage samples, too."""

    samples: SamplesSettings = Field(default_factory=SamplesSettings)


def needs(experiment) -> list[str]:
    return list(dict.fromkeys([experiment.samples.policy, "sft", "rm"]))


def reads(experiment) -> list[str]:
    return evaluate_settings.reads(experiment)


def run(ctx: StageRun) -> dict:
    """Sample a policy and measure the samples.

    Publishes samples.json: `scores`, `kl`, `gold` (null without a gold scorer), `lengths` and `finished`, each a list
    of N numbers for each of P prompts; `clusters`, the task of each prompt (the prompt itself where tasks are not
    known); `known`, whether training data set that task (null where tasks are not known); `asked`; `perplexity`.

    Returns:
        The figures of the manifest.
    """
    c = ctx.config
    tools = evaluate.load_tools(ctx)
    prompts, ids = evaluate.load_prompts(ctx, tools.tokenizer)
    world = None if ctx.experiment.data.evaluation_prompts != "world" else World.from_json(read_world(ctx.inputs))
    form = form_of_base(c.base_prompt, ctx.experiment.model.name_or_path) if c.policy == "base" else "chat"
    model = tools.sft if c.policy == "sft" else tools.load(ctx.inputs[c.policy] / "model")
    policy = evaluate.Policy(c.policy, model, tools.packed and can_pack(model, c.max_length))
    with ctx.tracker.progress(1, f"{c.samples_per_prompt} samples a prompt") as progress:
        asked = evaluate.ask_all(ctx, tools, prompts, ids, form)
        rows = evaluate.measure(
            ctx, tools, policy, asked, ids, partial(session_of(ctx, trains=False).leave_if_requested, 0, 1)
        )
        progress.update(1)
    gold = None if world is None else [
        [world.gold(prompt, text, end)["overall"] for text, end in zip(texts, ends, strict=True)]
        for prompt, texts, ends in zip(prompts, rows["responses"], rows["finished"], strict=True)
    ]  # fmt: skip
    text_rows = evaluate.held_out_text(ctx, tools.tokenizer)
    perplexity = perplexity_estimate(evaluate.text_losses(model, text_rows, tools.accelerator, c.batch_size))
    written = {
        **{key: rows[key] for key in ("scores", "kl", "lengths", "finished")},
        "gold": gold,
        "clusters": [str(world.task(p)) if world else f"prompt {i}" for i, p in enumerate(prompts)],
        "known": evaluate.find_leaked(ctx, prompts, world) if world else None,
        "asked": form,
        "perplexity": perplexity and perplexity["value"],
    }
    (ctx.publish / "samples.json").write_text(json.dumps(written) + "\n", encoding="utf-8")
    found = {"score": _mean(rows["scores"]), "gold": gold and _mean(gold), "kl": _mean(rows["kl"])}
    return found | {"perplexity": written["perplexity"]}


def _mean(rows: list[list[float]]) -> float:
    return sum(map(sum, rows)) / sum(map(len, rows))


STAGE = Stage(
    name="samples",
    summary="Sample a policy, score and measure the samples.",
    settings=SamplesSettings,
    run=run,
    needs=needs,
    reads=reads,
    headline=("score", "gold", "kl", "perplexity"),
)
