"""Evaluate the policy on held-out prompts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.encode import decode_response
from data.prompt_rows import EncodedPrompt
from pipeline.errors import UserError
from pipeline.launch import parallel
from stages.models.sharding import is_sharded
from stages.ppo.figures import DROPPED, OF_PARTS, describe
from stages.ppo.options import KlControl
from stages.ppo.prompts import drawn_prompt
from stages.ppo.sampling import Sampler
from stages.ppo.scoring import scorer_spec
from stages.ppo.state import Run
from stages.rollouts.engine import EngineLost
from stages.rollouts.rollout import Rollout
from stages.scorers.reward_model import RewardModelScorer
from stages.scorers.scorer import ScoreRequest, ScorerLost

FIGURES = {  # name in evaluations.jsonl → name in metrics.jsonl
    "score": "objective/scores",
    "kl": "objective/kl",
    "rlhf_reward": "objective/rlhf_reward",
    "length": "objective/length",
    "eos_rate": "objective/eos_rate",
    "entropy": "objective/entropy",
}


def evaluate(run: Run, sampler: Sampler, held_out: Sequence[EncodedPrompt], kl: KlControl, step: int) -> None:
    """Evaluate the policy after an update.

    Figures and samples are recorded, the policy is compared with the best one, alarms are raised.

    A signal, or the loss of the engine, ends it with a checkpoint that says that the evaluation is
    owed.

    Args:
        run: The run, whose evaluations, best policy and alarms are updated.
        sampler: Samples the responses.
        held_out: The prompts.
        kl: Weight and estimator of the KL in `rlhf_reward`.
        step: Updates so far.
    """
    with run.pending.running():
        try:
            rollout = sampler.rollout(
                [drawn_prompt(one, i) for i, one in enumerate(held_out)],
                0,  # whatever the update: the same seeds at every evaluation
                stream="held-out",
                samples_per_prompt=1,
                recompute=run.recompute,
                poll=run.poll(step),
            )
        except (EngineLost, ScorerLost):
            run.save_before_failure(step)
            raise
        except UserError:  # of a function that scores: with on_error: score the run can go on
            if step:
                run.save_before_failure(step)
            raise
        # β of the settings, not the steered one, so that evaluations are comparable
        all_figures = describe(rollout, rollout.values, kl.coef, kl.estimator)
        figures = {name: all_figures[key] for name, key in FIGURES.items()}
        figures |= {key: figure for key, figure in all_figures.items() if key.startswith((OF_PARTS, DROPPED))}
        if sampler.roles.judge is not None:
            figures["held_out_score"] = held_out_scores(sampler, rollout).mean().item()
        tracker = run.session.tracker
        tracker.evaluation(step, figures)
        # chosen by the reward model that PPO does not climb, if there is one
        judged = figures.get("held_out_score", figures["score"])
        value = figures["rlhf_reward"] - figures["score"] + judged
        # a score without all of its parts compares with no other one
        is_partial = bool(rollout.dropped) and "held_out_score" not in figures
        if is_partial:
            run.session.say(f"update {step}: held-out scores lack {', '.join(rollout.dropped)}, and choose no policy")
        if not is_partial or run.best.value is None:
            run.best.offer(math.nan if is_partial else value, step, run.learners.policy)
        tracker.samples(step, shown_samples(sampler, rollout, held_out))
        run.evaluations[str(step)] = figures
        run.sound(run.alarms.evaluated(step, figures))


def held_out_scores(sampler: Sampler, rollout: Rollout) -> Tensor:
    """Return the scores (B,) of the reward model that PPO does not climb, under the same rules."""
    roles, sampling = sampler.roles, sampler.sampling
    scorer = RewardModelScorer(scorer_spec(roles, roles.judge, sampling.micro_batch_size))
    request = ScoreRequest(rollout.prompts, rollout.responses, roles.tokenizer)

    # rank 0's scores on all ranks: the best policy and the end of the run depend on them
    if is_sharded(roles.judge):  # its forward pass takes all ranks
        scores = scorer.score(request).total
        scores = parallel.from_rank_zero(lambda: scores)
    else:
        scores = parallel.from_rank_zero(lambda: scorer.score(request).total)
    return sampling.scores.apply(scores, rollout.finished.cpu(), rollout.mask.sum(-1).cpu())


def shown_samples(sampler: Sampler, rollout: Rollout, held_out: Sequence[EncodedPrompt]) -> list[dict[str, Any]]:
    """Return the two best and the two worst responses, as rows of samples.jsonl."""
    kl = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(-1).tolist()
    order = rollout.scores.argsort().tolist()
    rows = []
    for i in dict.fromkeys([*order[-2:], *order[:2]]):  # each once, if there are fewer than four
        row = {
            "prompt": held_out[i].prompt,
            "response": decode_response(sampler.roles.tokenizer, rollout.responses[i]),
            "score": rollout.scores[i].item(),
            "kl": kl[i],
        }
        if rollout.parts:
            row["parts"] = {name: scores[i].item() for name, scores in rollout.parts.items()}
        rows.append(row)
    return rows
