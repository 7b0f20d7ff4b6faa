"""Declare the sweeps' own stage `samples`, which draws N samples of each prompt and measures them.

The stage runs in the pipeline like the nine of `rlhf`, so it is skipped if nothing changed.
Prompts, judge, seeds, form of the prompts and settings are those of evaluate, whose samples of a
prompt are the first of these. Evaluate draws too few samples to tell neighbouring settings of a
sweep apart.
"""

import json
from functools import partial
from typing import Any, Literal

from pydantic import Field

from pipeline.config.section import setting
from pipeline.errors import UserError
from pipeline.stage import Stage, StageRun
from stages import evaluate
from stages.evaluation.forms import form_of_base
from stages.evaluation.judges import REWARD_MODEL
from stages.evaluation.measuring import answer_prompts, measured_of, with_judge, with_reference
from stages.evaluation.panel import Panel, PeoplesPairs, judge_all
from stages.evaluation.results import perplexity_estimate
from stages.settings import evaluate as evaluate_settings
from stages.settings.experiment import Experiment
from stages.shared.runtime import runtime_of
from stages.training.session import session_of


class SamplesSettings(evaluate_settings.EvaluateSettings):
    """Configure the stage: evaluate's settings (`policies` and `best_of` unused), and a policy."""

    policy: Literal["base", "sft", "ppo", "dpo"] = setting("sft", "policy that is sampled")
    gold_judge: str | None = setting(None, "judge of `judges` whose scores are gold, where there is no gold scorer")


class SweepExperiment(Experiment):
    """Declare an experiment that also has the stage samples."""

    samples: SamplesSettings = Field(default_factory=SamplesSettings)


def needs(experiment: Any) -> list[str]:
    """Return the stages that must be finished first."""
    return list(dict.fromkeys([experiment.samples.policy, "sft", "rm"]))


def reads(experiment: Any) -> list[str]:
    """Return the data settings that the stage reads."""
    return evaluate_settings.reads(experiment)


def run(ctx: StageRun) -> dict:
    """Sample a policy and measure the samples.

    Publishes samples.json: `scores`, `kl`, `gold` (null without a gold scorer and a `gold_judge`),
    `lengths` and `finished` are lists of N values for each of P prompts. `clusters` has the task of
    each prompt (the prompt itself if tasks are not known), `known` whether training data contains
    that task (null if tasks are not known). `asked` is the form of the prompts.

    Args:
        ctx: The run of the stage.

    Returns:
        The figures of the manifest.

    Raises:
        UserError: `gold_judge` names no judge that gives scores.
    """
    c = ctx.config
    if c.gold_judge is not None and (c.gold_judge not in c.named_judges or c.named_judges[c.gold_judge].compares()):
        known = ", ".join(name for name, one in c.named_judges.items() if not one.compares()) or "none"
        raise UserError(f"samples.gold_judge: {c.gold_judge!r} is no judge that gives scores; there are: {known}")
    session = session_of(ctx, trains=False)
    tools, prompts, text_rows = evaluate.prepare(c, ctx.experiment, session, runtime_of(ctx), ctx.inputs, ctx.sources)
    form = form_of_base(c.base_prompt, ctx.experiment.model.name_or_path) if c.policy == "base" else "chat"
    poll = partial(session.leave_if_requested, 0, 1)
    with ctx.tracker.progress(1, f"{c.samples_per_prompt} samples a prompt") as progress:
        answered = answer_prompts(tools, c.policy, form, prompts, text_rows, c, seed=ctx.seed, poll=poll)
        answered = with_reference(tools, answered, prompts, c.temperature, poll)
        for judge in tools.judges:
            answered = with_judge(tools, answered, judge, prompts, poll)
        progress.update(1)
    measured = measured_of(tools, answered, prompts)
    gold = measured.gold and [[scores["overall"] for scores in row] for row in measured.gold]
    if c.gold_judge is not None:
        nobody = PeoplesPairs([], [], [], [])
        records = session.checkpoints.folder / "scores"
        panel = Panel(c.named_judges, nobody, 0.0, records, session.seed, session.say, ctx.trust_remote_code)
        gold = judge_all(panel, c.gold_judge, tools, prompts, {c.policy: measured}, poll).scores[c.policy]
    perplexity = perplexity_estimate(measured.text_losses)
    clusters = prompts.clusters
    if prompts.world is None:
        clusters = [f"prompt {i}" for i in range(len(prompts.prompts))]
    scores = measured.scores[REWARD_MODEL]  # the sweeps follow what PPO climbs; other judges are not read
    content = {
        "scores": scores,
        **{key: getattr(measured, key) for key in ("kl", "lengths", "finished")},
        "gold": gold,
        "clusters": clusters,
        "known": prompts.known_tasks,
        "asked": form,
        "perplexity": perplexity and perplexity["value"],
    }
    (ctx.publish / "samples.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    figures = {"score": _mean(scores), "gold": gold and _mean(gold), "kl": _mean(measured.kl)}
    return figures | {"perplexity": content["perplexity"]}


def _mean(rows: list[list[float]]) -> float:
    """Return the mean of all values."""
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
