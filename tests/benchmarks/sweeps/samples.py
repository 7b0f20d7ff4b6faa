"""A stage of the sweeps: a policy → N samples a prompt with score, gold, KL and length, and its perplexity.

It runs under the pipeline as the nine of `rlhf` do: it skips itself when nothing changed. evaluate takes one sample a
prompt, which is too few to tell neighbours of a sweep apart: on 240 prompts the mean gold of SFT has a standard error
of 0.02. Prompts, judge, perplexity and settings are evaluate's; so are the seeds of its best of n, whose first samples
of a prompt these are.
"""

import json
from typing import Literal

import torch

from data.encode import decode_response
from data.groups import make_rows
from data.streams import derive_seed
from pipeline.errors import Interrupted
from pipeline.stage import StageRun
from stages import evaluate
from stages.common import check_context, device_of, dtype_of, packing
from stages.engine import make_accelerator, micro_batches
from stages.models.ensemble import load_reward_model
from stages.models.forward import response_logprobs, score_all
from stages.models.loading import load_policy, load_tokenizer
from stages.objectives.logprobs import sequence_logps
from stages.objectives.rewards import final_scores
from stages.rollouts.transformers import sample
from stages.settings import setting

NAME = "samples"
METRICS: dict[str, str] = {}
HEADLINE = ("score", "gold", "kl", "perplexity")
ROWS = 512  # sampled at a time: throughput is all that counts


class Config(evaluate.Config):
    """evaluate's settings (its `policies` and `best_of` mean nothing here), and whose samples, how many."""

    policy: Literal["base", "sft", "ppo", "dpo"] = setting("sft", "who answers")
    samples: int = setting(8, "responses to each prompt", ge=1)


def needs(experiment) -> list[str]:
    return list(dict.fromkeys([experiment.samples.policy, "sft", "rm"]))


def reads(experiment) -> list[str]:
    return [kind for kind in evaluate.reads(experiment) if kind not in evaluate.trained_on(experiment)]


def run(ctx: StageRun) -> dict:
    """→ samples.json: scores, kl (null for SFT itself), gold (null without a gold scorer), lengths and finished, each a
    list of N numbers for each prompt; and perplexity."""
    c, n = ctx.config, ctx.config.samples
    accelerator = make_accelerator(device_of(ctx.experiment), dtype_of(ctx.experiment))
    check_context(ctx, ctx.inputs["sft"] / "model")
    tokenizer = load_tokenizer(ctx.inputs["sft"] / "model", trust_remote_code=ctx.trust_remote_code)
    reward_model = load(ctx, "rm", accelerator)
    # KL is to what PPO's penalty is to, as in evaluate
    reference = load(ctx, "sft", accelerator, "model" if ctx.experiment.sft.ppo_init is None else "ppo_init")
    is_reference = c.policy == "sft" and ctx.experiment.sft.ppo_init is None
    policy = reference if is_reference else load(ctx, c.policy, accelerator)
    packed = packing(ctx, policy, reference, reward_model)
    prompts, ids = evaluate.load_prompts(ctx, tokenizer)
    judge, text = evaluate.gold_judge(ctx), evaluate.held_out_text(ctx, tokenizer)
    out: dict[str, list] = {"scores": [], "kl": [], "gold": [], "lengths": [], "finished": []}
    with ctx.tracker.progress(len(ids), f"{n} samples a prompt") as progress:
        for part in micro_batches(list(range(len(ids))), max(1, ROWS // n)):
            if ctx.stop.requested:
                raise Interrupted()
            asked = [i for i in part for _ in range(n)]
            with accelerator.autocast():
                responses = sample(
                    policy,
                    [ids[i] for i in asked],
                    [derive_seed(ctx.seed, "best_of_n", i, k) for i in part for k in range(n)],
                    response_length=c.response_length,
                    temperature=c.temperature,
                    batch_size=ROWS,
                    eos_id=tokenizer.eos_token_id,
                    pad_id=tokenizer.pad_token_id,
                )
            finished = [r[-1] == tokenizer.eos_token_id for r in responses]
            rows, tools = ([ids[i] for i in asked], responses), (tokenizer, accelerator, packed)
            measured = {
                "scores": scores(c, reward_model, *rows, finished, *tools),
                "kl": None if is_reference else log_ratios(c, (policy, reference), *rows, *tools),
                "gold": judge and [
                    judge(prompts[i], decode_response(tokenizer, r), f)["overall"]
                    for i, r, f in zip(asked, responses, finished, strict=True)
                ],
                "lengths": [len(r) for r in responses],
                "finished": finished,
            }  # fmt: skip
            for key, values in measured.items():
                out[key] += [values[at : at + n] for at in range(0, len(values or ()), n)]
            progress.update(part[-1] + 1)
    perplexity = evaluate.perplexity(policy, text, accelerator, c.batch_size)
    written = {key: values or None for key, values in out.items()} | {"perplexity": perplexity}
    (ctx.publish / "samples.json").write_text(json.dumps(written) + "\n", encoding="utf-8")
    mean = lambda rows: None if not rows else sum(map(sum, rows)) / (n * len(rows))  # noqa: E731
    return {"score": mean(out["scores"]), "gold": mean(out["gold"]), "kl": mean(out["kl"]), "perplexity": perplexity}


def load(ctx: StageRun, stage: str, accelerator, folder: str = "model"):
    """The model of an upstream stage, where it computes."""
    options = {"attn_implementation": ctx.experiment.model.attn_implementation}
    options["trust_remote_code"] = ctx.trust_remote_code
    if stage == "rm":
        model = load_reward_model(ctx.inputs[stage] / folder, ctx.config.reward_ensemble, **options)
    else:
        model = load_policy(ctx.inputs[stage] / folder, **options)
    return model.to(accelerator.device)


def scores(c: Config, reward_model, prompts, responses, finished, tokenizer, accelerator, packed) -> list[float]:
    """As PPO and evaluate score: a response without EOS gets missing_eos_score."""
    options = {"pad_id": tokenizer.pad_token_id, "batch_size": c.batch_size, "accelerator": accelerator}
    own = score_all(reward_model, prompts, responses, packed=packed, **options)
    return final_scores(own, torch.tensor(finished), c.missing_eos_score).tolist()


@torch.no_grad()
def log_ratios(c: Config, models, prompts, responses, tokenizer, accelerator, packed: bool) -> list[float]:
    """log π(y|x) − log π_ref(y|x) of each response, whose mean is the KL; models: π, π_ref."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))  # little padding
    found = torch.empty(len(prompts))
    for part in micro_batches(order, c.batch_size):
        texts = [prompts[i] for i in part], [responses[i] for i in part]
        rows = make_rows(*texts, tokenizer.pad_token_id, packed=packed).to(accelerator.device)
        with accelerator.autocast():
            ours, theirs = (
                sequence_logps(response_logprobs(model, rows, c.temperature), rows.response_mask) for model in models
            )
        found[part] = (ours - theirs).float().cpu()
    return found.tolist()
