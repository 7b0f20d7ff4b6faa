"""A stage of the sweeps: a policy → N samples a prompt with score, gold, KL and length, and its perplexity.

It runs under the pipeline as the nine of `rlhf` do: it skips itself when nothing changed. Prompts,
judge, seeds, form of asking and settings are evaluate's, whose samples of a prompt are the first of
these; evaluate takes too few of them to tell neighbours of a sweep apart.
"""

import json
from functools import partial
from typing import Literal

from pydantic import Field

from pipeline.config.section import setting
from pipeline.stage import Stage, StageRun
from stages import evaluate
from stages.evaluation.forms import form_of_base
from stages.evaluation.measuring import gold_scores, measure
from stages.evaluation.results import perplexity_estimate
from stages.evaluation.text import text_losses
from stages.settings import evaluate as evaluate_settings
from stages.settings.experiment import Experiment
from stages.shared.runtime import runtime_of
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

    Publishes samples.json: `scores`, `kl`, `gold` (null without a gold scorer), `lengths` and
    `finished`, each a list of N numbers for each of P prompts; `clusters`, the task of each prompt
    (the prompt itself where tasks are not known); `known`, whether training data set that task
    (null where tasks are not known); `asked`; `perplexity`.

    Returns:
        The figures of the manifest.
    """
    c = ctx.config
    session = session_of(ctx, trains=False)
    tools, prompts, text_rows = evaluate.prepare(c, ctx.experiment, session, runtime_of(ctx), ctx.inputs, ctx.sources)
    form = form_of_base(c.base_prompt, ctx.experiment.model.name_or_path) if c.policy == "base" else "chat"
    policy = tools.policy_of(c.policy)
    with ctx.tracker.progress(1, f"{c.samples_per_prompt} samples a prompt") as progress:
        queries = prompts.queries(tools.tokenizer, form)
        poll = partial(session.leave_if_requested, 0, 1)
        rows = measure(tools, policy, queries, prompts.chat_ids, c, seed=ctx.seed, poll=poll)
        progress.update(1)
    gold = gold_scores(prompts.world, prompts.prompts, rows["responses"], rows["finished"])
    if gold is not None:
        gold = [[scores["overall"] for scores in row] for row in gold]
    perplexity = perplexity_estimate(text_losses(policy.model, text_rows, tools.accelerator, c.batch_size))
    clusters = prompts.clusters
    if prompts.world is None:
        clusters = [f"prompt {i}" for i in range(len(prompts.prompts))]
    written = {
        **{key: rows[key] for key in ("scores", "kl", "lengths", "finished")},
        "gold": gold,
        "clusters": clusters,
        "known": prompts.known_tasks,
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
