"""evaluate: every policy on the evaluation prompts → results.json.

One sample a prompt at temperature 1; the judge is the gold scorer in the embedded world, else the reward model.
Prompts that the training data hold too are kept, counted and told.
best_of_n is the SFT sample with the highest reward model score out of n. A response
without EOS scores `missing_eos_score`, if one is given. Intervals: bootstrap over prompts.
"""

import json
from functools import partial

import torch

from data.encode import decode_response, wrap_documents
from data.groups import make_rows
from data.records import prompt_key
from data.streams import derive_seed
from data.world import World
from pipeline.stage import StageRun
from stages import parallel
from stages.common import (
    check_context,
    device_of,
    dtype_of,
    fit_prompts,
    packing,
    read,
    read_placed,
    read_world,
    split_documents,
    unreadable,
)
from stages.engine import make_accelerator, micro_batches, pause_if_asked, perplexity_of
from stages.models.ensemble import How, load_reward_model
from stages.models.forward import response_logprobs, score_all
from stages.models.loading import load_policy, load_tokenizer
from stages.models.packing import can_pack
from stages.objectives.logprobs import sequence_logps
from stages.objectives.losses import language_model_loss
from stages.objectives.rewards import final_scores
from stages.rollouts.transformers import sample
from stages.settings import Section, TooLong, no_room, over_context, setting, too_long_prompt
from stages.statistics import win_rate

NAME = "evaluate"
METRICS: dict[str, str] = {}
HEADLINE = ("score", "win_rate_vs_sft", "gold")
SHARED = True
FIXED = tuple(
    f"evaluate.{key}"
    for key in ("num_prompts", "max_length", "response_length", "on_too_long", "temperature", "best_of")
)
STAGES = ("base", "sft", "ppo", "dpo")
GOLD = ("helpful", "honest", "harmless", "overall")
RM_FIGURES = ("accuracy", "accuracy_ci95", "accuracy_ceiling", "n_pairs", "labeler_agreement", "ece")


class Config(Section):
    """Which policies are compared, and how."""

    policies: list[str] = setting(
        ["base", "sft", "ppo", "dpo", "best_of_n"], "of base, sft, ppo, dpo, best_of_n; sft is always in"
    )
    best_of: int = setting(16, "n of best_of_n; 1 leaves it out", "samples", ge=1)
    num_prompts: int | None = setting(None, "how many evaluation prompts; null: all", "prompts", ge=2)
    response_length: int = setting(128, "longest response, EOS included", "tokens", ge=1)
    max_length: int = setting(512, "longest prompt and response together", "tokens", ge=8)
    on_too_long: TooLong = too_long_prompt()
    temperature: float = setting(1.0, "sampling temperature", gt=0)
    missing_eos_score: float | None = setting(
        -1.0, "score of a response without EOS; the same as ppo's; null: its own", "reward"
    )
    reward_ensemble: How = setting("mean", "how the models of rm.ensemble score as one; the same as ppo's")
    batch_size: int = setting(64, "rows sampled and scored at a time", "rows", ge=1)
    perplexity_rows: int = setting(256, "held-out pretraining rows at most", "rows", ge=1)
    perplexity_length: int = setting(128, "length of such a row", "tokens", ge=8)


def needs(experiment) -> list[str]:
    return [s for s in STAGES if s in experiment.evaluate.policies or s == "sft"] + ["rm"]


def reads(experiment) -> list[str]:
    return ["evaluation_prompts", "documents", *trained_on(experiment)]


def trained_on(experiment) -> list[str]:
    """The kinds of data with prompts that policies and reward model trained on. Left out: a kind that comes from the
    embedded world, if the evaluation prompts do too: the world keeps them apart."""
    data = experiment.data
    kinds = ["demonstrations", *["prompts"] * ("ppo" in needs(experiment)), *["rankings"] * (data.rankings is not None)]
    return [kind for kind in kinds if not getattr(data, kind) == data.evaluation_prompts == "world"]


def check(experiment) -> list[str]:
    c, known = experiment.evaluate, (*STAGES, "best_of_n")
    wrong = [
        f"evaluate.policies: {p!r} is no policy; choose of {', '.join(known)}" for p in c.policies if p not in known
    ]
    for key in ("missing_eos_score", "reward_ensemble") if "ppo" in c.policies else ():
        own, raised = getattr(c, key), getattr(experiment.ppo, key)
        if own != raised:
            what = "scores would not be the ones that PPO raised; set both alike"
            wrong.append(f"evaluate.{key}: is {own}, and ppo.{key} {raised}: {what}")
    wrong += no_room(experiment, "evaluate")
    return wrong + over_context(experiment, "evaluate", "perplexity_length")


def lacks(experiment) -> list[str]:
    return unreadable(experiment, reads(experiment))


def run(ctx: StageRun) -> dict:
    """→ results.json and responses.jsonl (every sample, with its judgements)."""
    c, m = ctx.config, ctx.experiment.model
    accelerator = make_accelerator(device_of(ctx.experiment), dtype_of(ctx.experiment))
    options = {"attn_implementation": m.attn_implementation, "trust_remote_code": ctx.trust_remote_code}
    check_context(ctx, ctx.inputs["sft"] / "model", "perplexity_length")
    tokenizer = load_tokenizer(ctx.inputs["sft"] / "model", trust_remote_code=ctx.trust_remote_code)
    reward_model = load_reward_model(ctx.inputs["rm"] / "model", c.reward_ensemble, **options).to(accelerator.device)
    sft = load_policy(ctx.inputs["sft"] / "model", **options).to(accelerator.device)
    reference = sft  # KL is to what PPO's penalty is to
    if ctx.experiment.sft.ppo_init is not None:
        reference = load_policy(ctx.inputs["sft"] / "ppo_init", **options).to(accelerator.device)
    packed = packing(ctx, sft, reference, reward_model)
    prompts, ids = load_prompts(ctx, tokenizer)
    leaked = count_leaked(ctx, prompts)
    text_rows = held_out_text(ctx, tokenizer)
    judge = gold_judge(ctx)
    names = [s for s in STAGES if s in ctx.inputs]
    if c.best_of > 1 and "best_of_n" in c.policies:
        names.append("best_of_n")

    found = ctx.checkpoints.newest()
    done: dict[str, dict] = found.state["done"] if found else {}
    with ctx.tracker.progress(len(names), "evaluate", len(done)) as progress:
        for name in (name for name in names if name not in done):  # others may be asked for than before
            model = (
                sft
                if name in ("sft", "best_of_n")
                else load_policy(ctx.inputs[name] / "model", **options).to(accelerator.device)
            )
            packed = packed and can_pack(model, c.max_length)
            tools = (model, reference, reward_model, tokenizer, accelerator, packed)
            n = c.best_of if name == "best_of_n" else 1
            done[name] = measure(ctx, n, ids, tools, (len(done), len(names)))
            done[name]["perplexity"] = None if n > 1 else perplexity(model, text_rows, accelerator, c.batch_size)
            done[name]["gold"] = (
                [
                    judge(p, r, f)
                    for p, r, f in zip(prompts, done[name]["responses"], done[name]["finished"], strict=True)
                ]
                if judge
                else None
            )
            progress.update(len(done))
            if not set(names) <= set(done):
                ctx.checkpoints.save(len(done), {}, {"done": done}, len(names))
                pause_if_asked(ctx, len(done), len(names), lambda: None)

    results = {
        "judge": "gold" if judge else "reward_model",
        "leaked": leaked,
        "policies": {name: summary(done[name], done["sft"], ctx.seed) for name in names},
        "reward_model": {k: ctx.manifests["rm"]["metrics"].get(k) for k in RM_FIGURES},
    }
    (ctx.publish / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with (ctx.publish / "responses.jsonl").open("w", encoding="utf-8") as file:
        for name in names:
            for i, prompt in enumerate(prompts):
                row = {
                    "policy": name,
                    "prompt": prompt,
                    "response": done[name]["responses"][i],
                    "finished": done[name]["finished"][i],
                    "score": done[name]["scores"][i],
                }
                file.write(
                    json.dumps(row | ({"gold": done[name]["gold"][i]} if judge else {}), ensure_ascii=False) + "\n"
                )
    last = results["policies"]["ppo" if "ppo" in names else names[-1]]
    return {
        "score": last["score"],
        "win_rate_vs_sft": last["win_rate_vs_sft"]["value"],
        "gold": last["gold"]["overall"] if last["gold"] else None,
        "prompts": len(prompts),
        "leaked": leaked,
    }


def load_prompts(ctx: StageRun, tokenizer):
    """(prompts as they are in the file, their ids)."""
    records, places = (part[: ctx.config.num_prompts] for part in read_placed(ctx, "evaluation_prompts"))
    kept, ids, report = fit_prompts(ctx, tokenizer, (r.prompt for r in records), places)
    ctx.tracker.say(f"evaluate: {report.line('evaluation prompts')}")
    return [p if isinstance(p, str) else list(p) for p in (records[i].prompt for i in kept)], ids


def count_leaked(ctx: StageRun, prompts) -> int:
    """How many of the prompts stand in the training data; if any do, a line says where."""
    keys = {prompt_key(p) for p in prompts}
    found = {kind: keys & {prompt_key(r.prompt) for r in read(ctx, kind)} for kind in trained_on(ctx.experiment)}
    leaked = len(set().union(*found.values()))
    if leaked:
        where = ", ".join(f"{kind} {len(some)}" for kind, some in found.items() if some)
        ctx.tracker.say(
            f"evaluate: {leaked} of {len(prompts)} evaluation prompts are in the training data ({where}): what is "
            f"measured on them is memory too; give others (`rlhf data check FILE -c CONFIG` names these)"
        )
    return leaked


def held_out_text(ctx: StageRun, tokenizer) -> list[list[int]]:
    """Packed rows of the documents that base and ptx did not train on."""
    _, held = split_documents(ctx)
    rows = wrap_documents(tokenizer, held, length=ctx.config.perplexity_length)
    return rows[: ctx.config.perplexity_rows]


def gold_judge(ctx: StageRun):
    """(prompt, response, finished) → {helpful, honest, harmless, overall}, if the prompts are the world's."""
    if ctx.experiment.data.evaluation_prompts != "world":
        return None
    return World.from_json(read_world(ctx)).gold


@torch.no_grad()
def measure(ctx: StageRun, n: int, ids, tools, progress: tuple[int, int]) -> dict:
    """One response a prompt (the best of n by score): texts, finished, scores, kl in nats and length in tokens.

    progress: policies done and in all, for the word at a stop."""
    c = ctx.config
    model, reference, reward_model, tokenizer, accelerator, packed = tools

    def look(part: list[int]) -> dict[str, list]:
        prompts = [ids[i] for i in part for _ in range(n)]
        stream = "evaluate" if n == 1 else "best_of_n"  # else SFT's own response would be among the n that it meets
        seeds = [derive_seed(ctx.seed, stream, i, k) for i in part for k in range(n)]
        with accelerator.autocast():
            responses = sample(
                model,
                prompts,
                seeds,
                response_length=c.response_length,
                temperature=c.temperature,
                batch_size=max(c.batch_size, 4 * c.batch_size if n > 1 else 0),
                eos_id=tokenizer.eos_token_id,
                pad_id=tokenizer.pad_token_id,
                poll=partial(pause_if_asked, ctx, *progress, lambda: None),
            )
        scores = score_all(
            reward_model,
            prompts,
            responses,
            pad_id=tokenizer.pad_token_id,
            batch_size=c.batch_size,
            accelerator=accelerator,
            packed=packed,
        )
        finished = torch.tensor([r[-1] == tokenizer.eos_token_id for r in responses])
        scores = final_scores(scores, finished, c.missing_eos_score)
        best = scores.view(-1, n).argmax(-1).tolist()
        chosen = [g * n + b for g, b in enumerate(best)]
        texts = [prompts[i] for i in chosen], [responses[i] for i in chosen]
        rows = make_rows(*texts, tokenizer.pad_token_id, packed=packed).to(accelerator.device)
        found = {
            "responses": [decode_response(tokenizer, responses[i]) for i in chosen],
            "finished": finished[chosen].tolist(),
            "scores": scores[chosen].tolist(),
            "kl": [],
            "lengths": rows.lengths.tolist(),
        }
        if n == 1:
            with accelerator.autocast():
                logps = [
                    sequence_logps(response_logprobs(x, rows, c.temperature), rows.response_mask)
                    for x in (model, reference)
                ]
            found["kl"] = (logps[0] - logps[1]).tolist()
        return found

    of_each = -(-len(ids) // parallel.rank_and_size()[1])
    parts = list(micro_batches(list(range(len(ids))), max(1, min(of_each, c.batch_size // min(n, 4)))))
    found = parallel.spread(parts, [len(part) for part in parts], lambda own: list(map(look, own)))
    return {key: [x for some in found for x in some[key]] for key in found[0]}


@torch.no_grad()
def perplexity(model, rows: list[list[int]], accelerator, size: int) -> float | None:
    """exp of the mean cross-entropy a token over packed rows; None without any."""
    if not rows:
        return None
    total, tokens = 0.0, len(rows) * (len(rows[0]) - 1)
    for part in micro_batches(parallel.share(rows, [1] * len(rows)), size):
        ids = torch.tensor(part, device=accelerator.device)
        with accelerator.autocast():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += language_model_loss(logits, ids[:, 1:], tokens).item()
    return perplexity_of(parallel.total({"loss": total})["loss"])


def summary(own: dict, sft: dict, seed: int) -> dict:
    """A policy's line of results.json."""
    mean = lambda xs: sum(xs) / len(xs)  # noqa: E731
    judged = (lambda d: [g["overall"] for g in d["gold"]]) if own["gold"] else (lambda d: d["scores"])
    return {
        "score": mean(own["scores"]),
        "kl_to_sft": mean(own["kl"]) if own["kl"] else None,
        "length": mean(own["lengths"]),
        "eos_rate": mean(own["finished"]),
        "pretrain_perplexity": own["perplexity"],
        "win_rate_vs_sft": win_rate(judged(own), judged(sft), seed),
        "gold": {k: mean([g[k] for g in own["gold"]]) for k in GOLD} if own["gold"] else None,
    }
