"""Check that the quick tests notice faults, by making them one at a time in a copy of the code.

Each mutant is a realistic fault of one line: a sign, a split, a temperature, a denominator, a file,
an index. The tool copies the tree to a temporary folder, makes one mutant at a time there, and runs
the quick tests that should notice it in a new process.

    .venv/bin/python tests/mutants.py                  all mutants: about 10 s each on one core
    .venv/bin/python tests/mutants.py --file ppo       those of one stage
    .venv/bin/python tests/mutants.py --file ppo --only 3
    .venv/bin/python tests/mutants.py --list

For each mutant a line says whether it was noticed, and by which test first; the exit code is 1 if
one LIVES. tests/test_mutants.py checks that every mutant still fits the code.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "ppo": ("tests/stages/ppo/test_ppo_run.py", "tests/objectives/test_ppo_step.py"),
    "rm": ("tests/stages/test_rm_run.py",),
    "dpo": ("tests/stages/test_dpo_run.py",),
    "ties": ("tests/objectives/test_ties.py", "tests/stages/test_ties_run.py"),
    "rankings": ("tests/stages/test_rankings_run.py",),
    "evaluate": (
        "tests/stages/evaluation/test_results.py",
        "tests/stages/evaluation/test_forms.py",
        "tests/stages/test_evaluate_run.py",
    ),
    "scorers": ("tests/scorers/test_url.py", "tests/scorers/test_http.py", "tests/scorers/test_records.py"),
}

# Imported once, before the first mutant. None of our modules: each child imports those of its tree.
LIBRARIES = ["pytest", "accelerate", "transformers.trainer", "transformers.models.llama.modeling_llama"]


@cache
def sources() -> dict[str, str]:
    """Return {path: text} of every module in stages/."""
    paths = sorted((ROOT / "stages").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def holders(stage: str, text: str) -> list[str]:
    """Return the modules that contain a text: those of the stage, or if none does, of stages/."""
    paths = [path for path, source in sources().items() if text in source]
    own = [path for path in paths if path == f"stages/{stage}.py" or path.startswith(f"stages/{stage}/")]
    return own or paths


@dataclass(frozen=True)
class Mutant:
    """A fault, made by replacing one text."""

    stage: str
    """The stage whose tests (TESTS) have to notice it."""
    breaks: str
    """The fault in words."""
    old: str
    """A text that occurs once in the file."""
    new: str
    """The text that replaces it."""
    file: str = ""
    """The file; by default the only module of the stage, or of stages/, that contains `old`."""

    @property
    def path(self) -> str:
        """Return the file that contains `old`; test_mutants refuses several."""
        return self.file or next(iter(holders(self.stage, self.old)), f"stages/{self.stage}.py")


MUTANTS = [
    # ── ppo ───────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "ppo",
        "no KL in the reward",
        "token_rewards(rollout.scores, kl, mask, kl_coef)",
        "token_rewards(rollout.scores, kl, mask, 0.0)",
    ),
    Mutant(
        "ppo",
        "KL is rewarded",
        "token_rewards(rollout.scores, kl, mask, kl_coef)",
        "token_rewards(rollout.scores, kl, mask, -kl_coef)",
    ),
    Mutant(
        "ppo",
        "KL from the reference to the policy",
        "kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs, kl_estimator)",
        "kl = kl_per_token(rollout.ref_logprobs, rollout.logprobs, kl_estimator)",
    ),
    Mutant(
        "ppo",
        "kl_estimator is not read",
        "kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs, kl_estimator)",
        "kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs)",
    ),
    Mutant(
        "ppo",
        "whitened rewards lose their mean",
        "masked_whiten(rewards, mask, shift_mean=False)",
        "masked_whiten(rewards, mask)",
    ),
    Mutant(
        "ppo",
        "λ and γ of GAE change places",
        "gae(rewards, rollout.values, mask, options.lam, options.gamma)",
        "gae(rewards, rollout.values, mask, options.gamma, options.lam)",
    ),
    Mutant(
        "ppo",
        "advantages are whitened only when they were not to be",
        "if options.whiten_advantages:",
        "if not options.whiten_advantages:",
    ),
    Mutant(
        "ppo",
        "PPO's gradient is clipped before ptx is added",
        '            norms = {"grad_norm/ppo": total_norm(gradients_of(policy.parameters.values()))}\n',
        '            norms = {"grad_norm/ppo": total_norm(gradients_of(policy.parameters.values()))}\n'
        "            torch.nn.utils.clip_grad_norm_(policy.parameters.values(), policy.max_grad_norm)\n",
    ),
    Mutant(
        "ppo",
        "the update's log-probs at temperature 1",
        "            logprobs = response_logprobs(roles.policy, rows, options.temperature)\n        weights",
        "            logprobs = response_logprobs(roles.policy, rows)\n        weights",
    ),
    Mutant(
        "ppo",
        "the reference's log-probs at temperature 1",
        '"ref_logprobs": reference_logprobs(roles, rows, sampling.temperature)',
        '"ref_logprobs": reference_logprobs(roles, rows, 1.0)',
        "stages/rollouts/collect.py",
    ),
    Mutant(
        "ppo",
        "rollouts at temperature 1",
        "        temperature=sampling.temperature,\n        eos_id=eos_id",
        "        temperature=1.0,\n        eos_id=eos_id",
        "stages/rollouts/collect.py",
    ),
    Mutant(
        "ppo",
        "the value model steps at the policy's rate",
        "zip(trainees, steps, (rates.policy, rates.value), strict=False)",
        "zip(trainees, steps, (rates.policy, rates.policy), strict=False)",
    ),
    Mutant(
        "ppo",
        "the value model's schedule has the policy's peak",
        "c.value_schedule(run.updates)",
        "c.schedule(run.updates)",
    ),
    Mutant("ppo", "ptx on held-out text", "trains = np.asarray(positions) >", "trains = np.asarray(positions) <="),
    Mutant(
        "ppo",
        "ptx_coef does not weigh the gradient",
        "roles.accelerator.backward(parallel.for_sum((options.ptx.coef if is_own else 0.0) * loss))",
        "roles.accelerator.backward(parallel.for_sum((1.0 if is_own else 0.0) * loss))",
    ),
    Mutant(
        "ppo",
        "ptx divided by tokens that nothing predicts",
        "tokens = len(texts) * (len(texts[0]) - 1)",
        "tokens = len(texts) * len(texts[0])",
    ),
    Mutant(
        "ppo",
        "the same pretraining rows at every step",
        "return [self.ptx_rows[i] for i in self.ptx.take(count)]",
        "return self.ptx_rows[:count]",
    ),
    Mutant(
        "ppo",
        "the average follows no step",
        "                learners.average.step(policy)\n",
        "                pass\n",
    ),
    Mutant("ppo", "the published average is the last policy", "    policy.load(run.learners.average.tensors)\n", ""),
    Mutant(
        "ppo",
        "a minibatch's loss is divided by the batch's tokens",
        "tokens = sum(len(rollout.responses[i]) for i in index)",
        "tokens = sum(map(len, rollout.responses))",
    ),
    Mutant(
        "ppo",
        "figures are summed over minibatches",
        "means = {key: total / counts[key] if counts[key] else math.nan for key, total in totals.items()}",
        "means = {key: total / options.epochs for key, total in totals.items()}",
    ),
    Mutant(
        "ppo",
        "values are clipped by the policy's range",
        "value_loss(values, old_values, returns, mask, options.clipping.value, tokens)",
        "value_loss(values, old_values, returns, mask, options.clipping.ratio, tokens)",
    ),
    Mutant(
        "ppo",
        "the ratio is to the reference",
        "for x in (rollout.logprobs, rollout.ref_logprobs, batch.advantages)",
        "for x in (rollout.ref_logprobs, rollout.ref_logprobs, batch.advantages)",
    ),
    Mutant(
        "ppo",
        "every update draws from the same seeds",
        "seed = (self.seed, stream, step)",
        "seed = (self.seed, stream, 0)",
    ),
    Mutant(
        "ppo",
        "missing_eos_score is not read in rollouts",
        "sampling.scores.apply(rollout.scores, rollout.finished, lengths)",
        "replace(sampling.scores, missing_eos_score=None).apply(rollout.scores, rollout.finished, lengths)",
        "stages/rollouts/collect.py",
    ),
    Mutant(
        "ppo",
        "length_penalty is not read in rollouts",
        "sampling.scores.apply(rollout.scores, rollout.finished, lengths)",
        "replace(sampling.scores, length_penalty=0.0).apply(rollout.scores, rollout.finished, lengths)",
        "stages/rollouts/collect.py",
    ),
    Mutant(
        "ppo",
        "the held-out judge's scores are not clipped as the others are",
        "return sampling.scores.apply(scores, rollout.finished.cpu()",
        "return type(sampling.scores)(sampling.scores.missing_eos_score, None, sampling.scores.length_penalty).apply("
        "scores, rollout.finished.cpu()",
    ),
    Mutant(
        "ppo",
        "kl_coef is steered by the minibatch's episodes",
        "kl.target, c.batch_size, kl.horizon",
        "kl.target, c.mini_batch_size, kl.horizon",
    ),
    Mutant("ppo", "held-out prompts are trained on", "return part_of(prompts, ~is_held_out), ", "return prompts, "),
    Mutant(
        "ppo",
        "the best policy is the one of the highest score, whatever its KL",
        'value = figures["rlhf_reward"] - figures["score"] + judged',
        "value = judged",
    ),
    Mutant(
        "ppo",
        "the best policy is chosen by the reward that was climbed",
        'judged = figures.get("held_out_score", figures["score"])',
        'judged = figures["score"]',
    ),
    Mutant(
        "ppo",
        "the last policy is published as the best",
        "if keep_best and run.best.step != step:",
        "if keep_best and run.best.step == step:",
    ),
    Mutant(
        "ppo",
        "the manifest's figures are of the last policy, whichever is published",
        'run.evaluations[str(run.best.step if c.keep == "best" else step)]',
        "run.evaluations[str(step)]",
    ),
    Mutant(
        "ppo",
        "PPO starts from model/ though there is a ppo_init/",
        'sft / ("ppo_init" if has_ppo_init else "model")',
        'sft / "model"',
    ),
    Mutant("ppo", "an ensemble's mean is taken for its minimum", "how=settings.reward_ensemble)", 'how="mean")'),
    Mutant(
        "ppo",
        "rlhf_reward takes off k1 whatever is penalised",
        'kl = found["objective/kl_k3" if kl_estimator == "k3" else "objective/kl"]',
        'kl = found["objective/kl"]',
    ),
    # ── rm ────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "rm",
        "winner and loser change places in the figures",
        "        margins = (scores[batch.winners] - scores[batch.losers]).detach()",
        "        margins = (scores[batch.losers] - scores[batch.winners]).detach()",
    ),
    Mutant(
        "rm",
        "winner and loser change places in the loss",
        "return ranking_loss(scores, batch.winners, batch.losers, pair_weights",
        "return ranking_loss(scores, batch.losers, batch.winners, pair_weights",
        "stages/training/ranking.py",
    ),
    Mutant(
        "rm",
        "held-out figures are of the training split",
        'held_groups, held_report = load_groups(rankings / "validation.jsonl"',
        'held_groups, held_report = load_groups(rankings / "train.jsonl"',
    ),
    Mutant(
        "rm",
        "the training split is the held-out one",
        '    groups, report = load_groups(rankings / "train.jsonl"',
        '    groups, report = load_groups(rankings / "validation.jsonl"',
    ),
    Mutant(
        "rm",
        "the bias of the demonstrations is never taken",
        "        bias = demonstration_mean(config, ranker, tokenizer, data.demonstrations, ctx.seed)\n",
        "        bias = 0.0\n",
    ),
    Mutant(
        "rm",
        "the bias is taken twice over",
        "        bias = demonstration_mean(config, ranker, tokenizer, data.demonstrations, ctx.seed)\n",
        "        bias = 2 * demonstration_mean(config, ranker, tokenizer, data.demonstrations, ctx.seed)\n",
    ),
    Mutant(
        "rm",
        "the bias is over the prompts without their EOS",
        "encode_response(tokenizer, row.completion))",
        "encode_response(tokenizer, row.completion)[:-1])",
    ),
    Mutant(
        "rm",
        "demonstrations too long for the model are in the bias",
        "        if sum(map(len, pair)) <= config.max_length:\n            pairs.append(pair)",
        "        pairs.append((pair[0], pair[1][: config.max_length - len(pair[0])]))",
    ),
    Mutant(
        "rm",
        "bias_demonstrations is one more",
        "if len(pairs) == config.bias_demonstrations:",
        "if len(pairs) == config.bias_demonstrations + 1:",
    ),
    Mutant(
        "rm",
        "a micro-batch's loss is divided by its own prompts",
        "value, figures = ranker.loss(config, members, batch, scores, len(whole))",
        "value, figures = ranker.loss(config, members, batch, scores, len(rows))",
    ),
    Mutant(
        "rm",
        "a micro-batch's figures weigh as if all were as large",
        "weight = sum(paired[i] for i in rows) / max(1, sum(paired[i] for i in whole))",
        "weight = 0.5",
    ),
    Mutant(
        "rm",
        "the held-out loss is divided by the micro-batch's prompts",
        "value, figures = ranker.loss(config, members, batch, scores, len(held))",
        "value, figures = ranker.loss(config, members, batch, scores, len(rows))",
    ),
    Mutant(
        "rm",
        "margin_coef is not read",
        "margins = c.margin_coef * batch.pair_margins",
        "margins = 0.0 * batch.pair_margins",
    ),
    Mutant("rm", "label_smoothing is not read", ", prompts, margins, c.label_smoothing)", ", prompts, margins)"),
    Mutant(
        "rm", "loss_type plackett_luce is not read", 'if c.loss_type == "plackett_luce":', 'if c.loss_type == "other":'
    ),
    Mutant(
        "rm",
        "the best model is the one of the highest loss",
        'config.selection("loss", higher_is_better=False)',
        'config.selection("loss", higher_is_better=True)',
    ),
    Mutant(
        "rm",
        "every model of an ensemble has the same seeds",
        'return derive_seed(seed, "member", k) if k else seed',
        "return seed",
    ),
    Mutant(
        "rm",
        "every model of an ensemble has the same order",
        'batch_size, (ctx.seed, "rm"), k)',
        'batch_size, (ctx.seed, "rm"), 0)',
    ),
    Mutant(
        "rm",
        "an ensemble's first model is published for all",
        "folder = provenance.publish / name",
        'folder = provenance.publish / "model"',
    ),
    Mutant("rm", "weight_decay is not read", "        weight_decay=section.weight_decay,\n", ""),
    Mutant(
        "rm",
        "accuracy by rank distance has the sign of the winner",
        "distance = [r[pair.loser] - r[pair.winner]",
        "distance = [r[pair.winner] - r[pair.loser]",
    ),
    Mutant(
        "rm",
        "accuracy by K counts what was not judged",
        "[sum(x is not None for x in r) for r in ranks]",
        "[len(r) for r in ranks]",
    ),
    Mutant(
        "rm",
        "every pair is put down to the first labeler",
        'labelers.append(group.labelers[pair.labeler] or "unnamed")',
        'labelers.append(group.labelers[0] or "unnamed")',
    ),
    Mutant(
        "rm",
        "the ranks of the first labeler stand for all",
        "ranks.append(group.rankings()[pair.labeler])",
        "ranks.append(group.rankings()[0])",
    ),
    Mutant(
        "rm",
        "an ensemble's accuracy is its first model's",
        "mean = [sum(scores) / ensemble for scores in zip(*margins[:ensemble], strict=True)]",
        "mean = margins[0]",
    ),
    # ── ties ──────────────────────────────────────────────────────────────────────────────────
    Mutant("ties", "Davidson's gaps are not halved", "half = gaps / 2", "half = gaps"),
    Mutant(
        "ties",
        "a tie has the probability of a win",
        "return half - total, log_strength - total",
        "return half - total, half - total",
    ),
    Mutant(
        "ties",
        "worths of a set are multiplied without a root",
        "torch.where(is_open, u / size, NOTHING)",
        "torch.where(is_open, u, NOTHING)",
    ),
    Mutant(
        "ties",
        "the chosen set's worths are multiplied without a root",
        "torch.where(chosen, u, 0.0).sum(1) / sizes",
        "torch.where(chosen, u, 0.0).sum(1)",
    ),
    Mutant(
        "ties",
        "the strength of the chosen set is left out",
        "return of_size[sizes - 1] + mean - total",
        "return mean - total",
    ),
    Mutant(
        "ties",
        "the share of ties is that of what is not tied",
        '"ties": Share((shares * is_tie)',
        '"ties": Share((shares * ~is_tie)',
    ),
    Mutant("ties", "expected ties are those of single choices", "-torch.expm1(single)", "single.exp()"),
    Mutant("ties", "tie_learning_rate is not read", "section.tie_learning_rate or LEARNING_RATE", "LEARNING_RATE"),
    Mutant(
        "ties",
        "ties of three have no strength",
        'largest = 2 if named[0] == "davidson" else',
        "largest = 2 if named else",
    ),
    Mutant(
        "ties",
        "tie strengths learn at the model's rate",
        "dict.fromkeys(further or {}, further_rate / section.learning_rate)",
        "dict.fromkeys(further or {}, 1.0)",
    ),
    Mutant(
        "ties",
        "beta does not reach DPO's ties",
        "self.ties.loss(groups, config.beta * (logps - ref_logps), whole.prompts)",
        "self.ties.loss(groups, logps - ref_logps, whole.prompts)",
    ),
    Mutant(
        "ties",
        "prompts with ties only are left out of rm",
        "with_ties = config.loss_type in TIE_LOSSES",
        "with_ties = False",
    ),
    # ── dpo ───────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "dpo",
        "winner and loser change places in the loss",
        "pairs = (batch.winners, batch.losers, batch.pair_weights)",
        "pairs = (batch.losers, batch.winners, batch.pair_weights)",
    ),
    Mutant(
        "dpo",
        "chosen and rejected change places in the figures",
        "chosen, rejected = rewards[batch.winners], rewards[batch.losers]",
        "chosen, rejected = rewards[batch.losers], rewards[batch.winners]",
    ),
    Mutant(
        "dpo",
        "what is kept of the reference does not name the sft model",
        '        provenance.manifests["sft"]["digest"],\n',
        "",
    ),
    Mutant(
        "dpo",
        "what is kept of the reference does not name the rankings",
        "for value in (made_by, *([g.prompt, g.responses] for g in groups)):",
        "for value in (made_by,):",
    ),
    Mutant(
        "dpo",
        "both splits are kept under one name",
        'name = batches.groups, f"reference_logps_{split}"',
        'name = batches.groups, "reference_logps_train"',
    ),
    Mutant(
        "dpo",
        "no reference",
        'held_ref_logps = reference.logps("validation", cut(held))',
        'held_ref_logps = [0 * x for x in reference.logps("validation", cut(held))]',
    ),
    Mutant(
        "dpo",
        "the order of the reference's log-probs is that of the micro-batches",
        "ordered = [by_index[i] for i in range(len(groups))]",
        "ordered = list(by_index.values())",
    ),
    Mutant(
        "dpo",
        "held-out figures are of the training split",
        'held, held_report = load_groups(rankings / "validation.jsonl"',
        'held, held_report = load_groups(rankings / "train.jsonl"',
    ),
    Mutant(
        "dpo",
        "the training split is the held-out one",
        '    groups, report = load_groups(rankings / "train.jsonl"',
        '    groups, report = load_groups(rankings / "validation.jsonl"',
    ),
    Mutant(
        "dpo",
        "beta does not reach the loss",
        "name, logps, ref_logps, batch, config.beta, config.label_smoothing",
        "name, logps, ref_logps, batch, 0.1, config.label_smoothing",
    ),
    Mutant(
        "dpo", "beta does not reach the figures", "rewards = beta * (logps - ref_logps)", "rewards = logps - ref_logps"
    ),
    Mutant(
        "dpo",
        "beta does not reach whole orders",
        "return plackett_luce_loss(beta * (logps - ref_logps), *choices, prompts)",
        "return plackett_luce_loss(logps - ref_logps, *choices, prompts)",
    ),
    Mutant(
        "dpo",
        "whole orders without a reference",
        "return plackett_luce_loss(beta * (logps - ref_logps), *choices, prompts)",
        "return plackett_luce_loss(beta * logps, *choices, prompts)",
    ),
    Mutant("dpo", "label_smoothing is not read", "beta, prompts, name, label_smoothing)", "beta, prompts, name)"),
    Mutant(
        "dpo",
        "loss_weights are not read",
        "value = sum(weight * parts[name] for name, weight in config.losses().items())",
        "value = sum(parts[name] for name in config.losses())",
    ),
    Mutant(
        "dpo",
        "log-probs a token, not a response",
        "logps = sequence_logps(logprobs, batch.rows.response_mask)\n        if self.kto",
        "logps = sequence_logps(logprobs, batch.rows.response_mask) / batch.rows.lengths\n        if self.kto",
    ),
    Mutant(
        "dpo",
        "the likelihood of first responses is divided by prompts",
        "return chosen_loss(logps, batch.first, batch.first_weights, tokens or 1.0)",
        "return chosen_loss(logps, batch.first, batch.first_weights, prompts)",
    ),
    Mutant(
        "dpo",
        "the likelihood of first responses is divided by all tokens",
        "return sum(weight * len(group.responses[i]) for i, weight in group.first())",
        "return sum(map(len, group.responses))",
    ),
    Mutant("dpo", "a batch's loss is not divided by its prompts", "return Counts(len(members), ", "return Counts(1, "),
    Mutant(
        "dpo",
        "a micro-batch's figures weigh as if all were as large",
        "share = batch.paired / max(1, whole.paired)",
        "share = 0.5",
    ),
    Mutant(
        "dpo",
        "the best policy is the one of the highest loss",
        'config.selection("loss", higher_is_better=False)',
        'config.selection("loss", higher_is_better=True)',
    ),
    Mutant("dpo", "accuracy counts ties as right", "(chosen > rejected).float()", "(chosen >= rejected).float()"),
    Mutant(
        "dpo",
        "the warm-up is left out",
        "self.lr_scheduler_type, self.warmup_steps, steps)",
        "self.lr_scheduler_type, 0, steps)",
    ),
    Mutant("dpo", "weight_decay is not read", "        weight_decay=section.weight_decay,\n", ""),
    # ── rankings ──────────────────────────────────────────────────────────────────────────────
    Mutant(
        "rankings",
        "split by row and not by prompt",
        "held_out(keys, settings.validation_fraction)\n    sides",
        "held_out([row.id for row in rows], settings.validation_fraction)\n    sides",
    ),
    Mutant(
        "rankings",
        "split by the prompt as it is spaced",
        "position_of(prompt_key(ranking.prompt))",
        "position_of(str(ranking.prompt))",
    ),
    Mutant(
        "rankings",
        "the splits change names",
        '{"train": [rows[i] for i in train], "validation": [rows[i] for i in validation]}',
        '{"train": [rows[i] for i in validation], "validation": [rows[i] for i in train]}',
    ),
    Mutant("rankings", "all rows are trained on", '{"train": [rows[i] for i in train], ', '{"train": rows, '),
    Mutant(
        "rankings",
        "agreement is of all rows",
        "agreement_figures((rows[i] for i in validation),",
        "agreement_figures(rows,",
    ),
    Mutant(
        "rankings",
        "ties and unjudged pairs are counted as pairs",
        'return sum(verdict == "usable" for',
        'return sum(verdict != "identical" for',
    ),
    Mutant(
        "rankings",
        "responses that were cut off are judged as if they had ended",
        "columns = zip(responses.prompts, responses.texts, responses.finished, strict=True)",
        "columns = zip(responses.prompts, responses.texts, [[True] * len(f) for f in responses.finished], strict=True)",
    ),
    Mutant(
        "rankings",
        "every labeler has the taste of the first",
        "rank_some(utilities[i][k], judged[i]",
        "rank_some(utilities[i][0], judged[i]",
    ),
    Mutant(
        "rankings",
        "ranks begin with the worst",
        "rank_some(utilities[i][k], judged[i]",
        "rank_some(-utilities[i][k], judged[i]",
    ),
    Mutant(
        "rankings",
        "every row is signed by the first labeler",
        "name = labelers.LABELERS[k].name",
        "name = labelers.LABELERS[0].name",
    ),
    Mutant(
        "rankings",
        "the same noise for every prompt",
        'derive_seed(seed, "rank", number, k)',
        'derive_seed(seed, "rank", k)',
    ),
    Mutant(
        "rankings",
        "the same noise for every labeler",
        'derive_seed(seed, "rank", number, k)',
        'derive_seed(seed, "rank", number)',
    ),
    Mutant(
        "rankings",
        "the same labelers for every prompt",
        'derive_seed(seed, "labeler", number)',
        'derive_seed(seed, "labeler")',
    ),
    Mutant(
        "rankings",
        "two labelers for what is trained on, too",
        "2 if i in validation else settings.labelers_per_prompt",
        "2",
    ),
    Mutant(
        "rankings",
        "one labeler for what is held out",
        "2 if i in validation else settings.labelers_per_prompt",
        "settings.labelers_per_prompt",
    ),
    Mutant(
        "rankings",
        "the agreement that was asked for is not read",
        "labelers.calibrate_noise(ranked_utilities, ranked_answers, settings.agreement)",
        "labelers.calibrate_noise(ranked_utilities, ranked_answers)",
    ),
    Mutant(
        "rankings",
        "what was cut off is always ranked",
        "[k for k, ended in enumerate(row) if ended or every]",
        "[k for k, ended in enumerate(row)]",
    ),
    Mutant(
        "rankings",
        "the ceiling is of all rows",
        "held = [at for at, i in enumerate(ranked) if i in validation]",
        "held = list(range(len(ranked)))",
    ),
    Mutant(
        "rankings",
        "the ceiling is its mean over the noise",
        '"accuracy_ceiling": ceiling["realised"]',
        '"accuracy_ceiling": ceiling["expected"]',
    ),
    Mutant(
        "rankings",
        "the ceiling is of the prompts in order",
        "[utilities[ranked[at]] for at in held]",
        "[utilities[at % len(utilities)] for at in held]",
    ),
    Mutant(
        "rankings",
        "all samples of a prompt come from one seed",
        'derive_seed(self.seed, "sample", i, k)',
        'derive_seed(self.seed, "sample", i)',
    ),
    Mutant("rankings", "temperature is not read", "temperature=self.settings.temperature,", "temperature=1.0,"),
    Mutant(
        "rankings",
        "a response that ends with the last token counts as cut off",
        "[response[-1] == eos_id for response in responses]",
        "[len(response) < sampler.settings.response_length for response in responses]",
    ),
    Mutant(
        "rankings",
        "prompts that were dropped get the samples of others",
        "asked, count = [prompts[i] for i in kept], len(kept)",
        "asked, count = prompts[: len(kept)], len(kept)",
    ),
    Mutant(
        "rankings",
        "samples are dealt out to the prompts one by one",
        "[ids[i] for i in indices for _ in range(count)]",
        "[ids[i] for _ in range(count) for i in indices]",
    ),
    Mutant(
        "rankings",
        "each batch begins with the last prompt of the one before",
        "batch = range(len(texts), min(len(texts)",
        "batch = range(max(0, len(texts) - 1), min(len(texts)",
    ),
    # ── evaluate ──────────────────────────────────────────────────────────────────────────────
    Mutant(
        "evaluate",
        "perplexity of training text",
        "zip(texts_of(source), positions, strict=True) if position <= limit)",
        "zip(texts_of(source), positions, strict=True) if position > limit)",
    ),
    Mutant(
        "evaluate",
        "perplexity of all held-out rows",
        "np.empty(0, IDS), length)[:most]",
        "np.empty(0, IDS), length)[:]",
    ),
    Mutant(
        "evaluate",
        "perplexity of SFT for every policy",
        "text_losses(policy.model, text_rows",
        "text_losses(tools.reference(), text_rows",
    ),
    Mutant(
        "evaluate",
        "KL to SFT where PPO began elsewhere",
        "model = tools.reference()",
        'model = tools.policy_in(tools.folders["sft"])',
    ),
    Mutant(
        "evaluate",
        "KL to the policy itself",
        "torch.tensor(of_policy) - torch.tensor(of_reference)",
        "torch.tensor(of_policy) - torch.tensor(of_policy)",
    ),
    Mutant(
        "evaluate",
        "KL's sign turned",
        "torch.tensor(of_policy) - torch.tensor(of_reference)",
        "torch.tensor(of_reference) - torch.tensor(of_policy)",
    ),
    Mutant(
        "evaluate",
        "KL at temperature 1",
        "response_logprobs(model, rows, temperature)",
        "response_logprobs(model, rows)",
        "stages/evaluation/measuring.py",
    ),
    Mutant(
        "evaluate",
        "SFT reads base's answers behind base's plain prompt",
        "logps_of(tools, model, prompts.chat_ids, ids,",
        "logps_of(tools, model, [q.ids for q in prompts.queries(tools.tokenizer, answered.asked)], ids,",
    ),
    Mutant(
        "evaluate",
        "base's probability of its answer is taken in the chat",
        "query_ids = [query.ids for query in queries]",
        "query_ids = prompts.chat_ids",
    ),
    Mutant(
        "evaluate",
        "base is always asked through the chat",
        'form = form_of_base(settings.base_prompt, experiment.model.name_or_path) if name == "base" else "chat"',
        'form = "chat"',
    ),
    Mutant(
        "evaluate",
        "base's answers are judged behind its plain prompt",
        "some, chat_ids = flat(part, answers, prompts.chat_ids)\n        return split(",
        "some, chat_ids = flat(part, answers, [q.ids for q in prompts.queries(tools.tokenizer, answered.asked)])\n"
        "        return split(",
    ),
    Mutant("evaluate", "the examples leave no room for an answer", "context - settings.response_length", "context"),
    Mutant(
        "evaluate",
        "few_shot_examples is not read",
        "order.take(min(len(demonstrations), count))",
        "order.take(min(len(demonstrations), 1))",
    ),
    Mutant(
        "evaluate",
        "sampling at temperature 1",
        "temperature=settings.temperature,",
        "temperature=1.0,",
        "stages/evaluation/measuring.py",
    ),
    Mutant(
        "evaluate",
        "all samples of a prompt come from one seed",
        "derive_seed(seed, stream, i, k)",
        "derive_seed(seed, stream, i)",
    ),
    Mutant(
        "evaluate",
        "each sample has the same seed for all prompts",
        "derive_seed(seed, stream, i, k)",
        "derive_seed(seed, stream, k)",
    ),
    Mutant(
        "evaluate",
        "best of n draws the samples that SFT is measured by",
        'stream = "best_of_n" if best_of_n else "evaluate"',
        'stream = "evaluate"',
    ),
    Mutant("evaluate", "best of n is the worst", ".view(len(part), -1).argmax(-1)", ".view(len(part), -1).argmin(-1)"),
    Mutant(
        "evaluate",
        "best of n is chosen before cut responses are fined",
        "quality = tools.with_missing_eos(raw, some)",
        "quality = raw",
    ),
    Mutant(
        "evaluate",
        "best of n takes the samples of the first prompt",
        "sampled = [[row[k]] for row, k in zip(answered.sampled, best, strict=True)]",
        "sampled = [[answered.sampled[0][k]] for k in best]",
    ),
    Mutant(
        "evaluate",
        "missing_eos_score is not applied",
        "[tools.with_missing_eos(torch.tensor(raw), row).tolist() for raw, row in rows]",
        "[raw for raw, row in rows]",
    ),
    Mutant("evaluate", "reward_ensemble is not read", "settings.reward_ensemble, load_judge", '"mean", load_judge'),
    Mutant(
        "evaluate",
        "wins against itself",
        "summarise(name, of_policy, sft, clusters",
        "summarise(name, of_policy, of_policy, clusters",
    ),
    Mutant(
        "evaluate",
        "gold of another prompt",
        "for prompt, texts, ends in zip(prompts, responses",
        "for prompt, texts, ends in zip(prompts[::-1], responses",
    ),
    Mutant(
        "evaluate",
        "gold of a cut response as if it had ended",
        "world.gold(prompt, response, ended) for",
        "world.gold(prompt, response) for",
    ),
    Mutant(
        "evaluate",
        "prompts of one task are clusters of their own",
        "prompt_key(own) if world is None else str(world.task(own))",
        "prompt_key(own)",
    ),
    Mutant(
        "evaluate", "num_prompts is not read", "return records[:limit], locations[:limit]", "return records, locations"
    ),
    Mutant(
        "evaluate",
        "prompts that were dropped get the responses of others",
        "(records[i].prompt for i in kept)]",
        "(record.prompt for record in records[: len(kept)])]",
    ),
    Mutant("evaluate", "every prompt is leaked", '"leaked": sum(prompts.leaked)', '"leaked": len(prompts.leaked)'),
    Mutant(
        "evaluate",
        "leaked is only what is in all training data",
        "any(flags) for flags in zip(*copies",
        "all(flags) for flags in zip(*copies",
    ),
    Mutant(
        "evaluate",
        "PPO's prompts are no training data",
        'if "ppo" in stages or learns_samples(experiment):',
        "if learns_samples(experiment):",
    ),
    Mutant(
        "evaluate",
        "tasks that the corpus asks are unknown",
        "tasks = world.tasks_in(of_world(), documents)",
        "tasks = world.tasks_in(of_world(), [])",
    ),
    Mutant(
        "evaluate",
        "known tasks are said to be held out",
        "return self.leaked if self.world is not None else None",
        "return [not flag for flag in self.leaked] if self.world is not None else None",
    ),
    Mutant(
        "evaluate",
        "DPO is said to have climbed the judge",
        'policies = {"best_of_n"} if is_own and climbed.selector is None else set()',
        'policies = {"best_of_n", "dpo"} if is_own and climbed.selector is None else set()',
    ),
    Mutant("evaluate", "ppo.reward_model is not asked", "own=climbs_own_model(experiment)", "own=True"),
    Mutant(
        "evaluate",
        "gold is said to be climbed",
        "judges = {GOLD: Judge(GOLD)} if has_gold",
        'judges = {GOLD: Judge(GOLD, frozenset({"best_of_n"}))} if has_gold',
    ),
    Mutant(
        "evaluate",
        "no win rate for PPO",
        'selected=frozenset(policies & {"best_of_n"})',
        "selected=frozenset(policies)",
    ),
    Mutant(
        "evaluate", "every sample is published with the first one's score", '"score": own[i][k]', '"score": own[i][0]'
    ),
    Mutant(
        "evaluate",
        "a checkpoint of another version is taken for none",
        'raise UserError("evaluate: the checkpoint was written by another version; start again with --restart")',
        "return {}",
    ),
    Mutant(
        "evaluate",
        "the halves change places",
        "if which is None or known[i] == which]",
        "if which is None or known[i] != which]",
        "stages/evaluation/results.py",
    ),
    Mutant(
        "evaluate",
        "samples of a prompt are clusters of their own",
        "mean_estimate(values, of_cluster)",
        "mean_estimate(values, range(len(values)))",
        "stages/evaluation/results.py",
    ),
    Mutant(
        "evaluate",
        "the reward model judges where there is gold",
        "return deciding_first([*judges.values(), *panel])",
        "return deciding_first([*judges.values(), *panel])[::-1]",
        "stages/evaluation/climbed.py",
    ),
    Mutant(
        "evaluate",
        "the difference to SFT turned round",
        "ours.mean(1) - theirs.mean(1)",
        "theirs.mean(1) - ours.mean(1)",
        "stages/evaluation/results.py",
    ),
    Mutant(
        "evaluate",
        "the worse of two responses is the one to score higher",
        "(1 if gold[i] > gold[j] else -1)",
        "(1 if gold[i] < gold[j] else -1)",
        "stages/evaluation/results.py",
    ),
    Mutant(
        "evaluate",
        "perplexity is the mean loss",
        'value, error = _exp(estimate["value"]), estimate["se"]',
        'value, error = estimate["value"], estimate["se"]',
        "stages/evaluation/results.py",
    ),
    Mutant(
        "rankings",
        "the judge learns from validation",
        "is_judged = ~is_held_out & (",
        "is_judged = (",
        "stages/shared/kept_rankings.py",
    ),
    Mutant(
        "rm",
        "the judge learns from the rankings of all",
        "groups = data.judge if name == JUDGE else data.groups",
        "groups = data.groups",
    ),
    Mutant(
        "evaluate",
        "the judge that PPO chose its policy by is independent",
        'settings.held_out_reward_model is not None and settings.keep == "best"',
        "False",
        "stages/evaluate.py",
    ),
    # ── scorers ───────────────────────────────────────────────────────────────────────────────
    Mutant(
        "scorers",
        "a server's NaN is a score",
        "if not is_number(value) or not abs(value) <= LARGEST:",
        "if not is_number(value) or abs(value) > LARGEST:",
    ),
    Mutant(
        "scorers",
        "a server's true is a score",
        "isinstance(value, int | float) and not isinstance(value, bool)",
        "isinstance(value, int | float)",
    ),
    Mutant("scorers", "too few scores are taken", "if len(value) != count:", "if len(value) > count:"),
    Mutant(
        "scorers",
        "another server's records are taken",
        "key_of([self.settings.url, self.settings.protocol, one])",
        "key_of([self.settings.protocol, one])",
    ),
    Mutant(
        "scorers",
        "the row of data is not part of what was asked",
        '"rows": without_prompt(row), "ids": one}',
        '"rows": {}, "ids": one}',
    ),
    Mutant(
        "scorers",
        "the scores of batches are in the order of their arrival",
        "new = dict(zip(batches[index], found, strict=True))",
        "new = dict(zip(batches[len(answers) // size % len(batches)], found, strict=False))",
    ),
    Mutant(
        "scorers",
        "a lost server gets all attempts at every update",
        "retries=0 if self.is_lost else self.settings.retries",
        "retries=self.settings.retries",
    ),
    Mutant(
        "scorers",
        "a redirect is followed",
        "urllib.request.ProxyHandler(proxies), NoRedirect(), Handler(opened)",
        "urllib.request.ProxyHandler(proxies), Handler(opened)",
    ),
    Mutant(
        "scorers",
        "a proxy is used for this machine",
        'proxies = {} if is_this_machine(urllib.parse.urlsplit(url).hostname or "") else None',
        'proxies = None if is_this_machine(urllib.parse.urlsplit(url).hostname or "") else None',
    ),
    Mutant("scorers", "a server that drips holds the run", "    timer.start()\n", "    timer.cancel()\n"),
    Mutant(
        "scorers",
        "a key that the server repeats is printed",
        "{reason_in(without_keys(body, headers))}",
        "{reason_in(body)}",
    ),
    Mutant(
        "scorers",
        "the last answer to a question counts",
        'answers.setdefault(row["key"], row["answer"])',
        'answers[row["key"]] = row["answer"]',
    ),
    Mutant(
        "scorers",
        "an answer is used before it is on disk",
        "            os.fsync(self.file.fileno())\n",
        "            pass\n",
    ),
    Mutant("scorers", "a torn line spoils the next one", '        file.write(b"\\n")\n', '        file.write(b"")\n'),
    Mutant(
        "scorers",
        "signals wait for the server",
        "        poll()\n        try:\n            return done.get",
        "        try:\n            return done.get",
    ),
]


# ── the tool ──────────────────────────────────────────────────────────────────────────────────


def copy_tree(folder: Path) -> Path:
    """Copy the files that git knows or would add to a new folder, and return it."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_tests(tree: str, tests: tuple[str, ...], log: str) -> None:
    """Run pytest on a tree and exit with its code, or with 99 if it tested another tree's code."""
    os.chdir(tree)
    sys.path[:] = [tree, *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        import pytest

        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        import pipeline

        sys.exit(int(code) if Path(pipeline.__file__).is_relative_to(tree) else 99)


def tested(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Return pytest's exit code on a tree and the first line of failure, from a new process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    log = tree.parent / "log"
    child = context.Process(target=run_tests, args=(str(tree), tests, str(log)))
    child.start()
    child.join()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    first = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), "")
    return child.exitcode, first.partition(" - ")[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", choices=list(TESTS), help="only the mutants of this stage")
    parser.add_argument("--only", type=int, help="only the mutant with this number")
    parser.add_argument("--list", action="store_true", help="list the mutants, and run nothing")
    arguments = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if arguments.file in (None, m.stage)]
    numbered = [(n, m) for n, m in enumerate(chosen, 1) if arguments.only in (None, n)]
    if arguments.list:
        for n, mutant in numbered:
            print(f"{n:3} {mutant.stage:9} {mutant.path}: {mutant.breaks}")
        return 0
    os.environ["PYTHONDONTWRITEBYTECODE"] = (
        "1"  # otherwise a mutant of the same size and second is taken for the previous one
    )
    os.environ.pop("PYTHONPATH", None)
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="rlhf-mutants-") as folder:
        tree = copy_tree(Path(folder) / "tree")
        for stage in dict.fromkeys(mutant.stage for _, mutant in numbered):
            code, first = tested(tree, TESTS[stage])
            assert code == 0, f"the tests of {stage} fail without any mutant: {first or code}"
        for n, mutant in numbered:
            file = tree / mutant.path
            text = file.read_text(encoding="utf-8")
            assert text.count(mutant.old) == 1, f"{mutant.path}: {mutant.old!r} does not occur once"
            file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            code, first = tested(tree, TESTS[mutant.stage])
            file.write_text(text, encoding="utf-8")
            assert code in (0, 1, 2), f"pytest ended with {code}"
            survivors += code == 0
            verdict = "noticed" if code else "LIVES  "
            print(f"{n:3} {mutant.stage:9} {verdict} {mutant.breaks}  {first}", flush=True)
    print(f"{len(numbered) - survivors} of {len(numbered)} mutants noticed")
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main())
