"""rankings: K responses of SFT to each prompt, ranked by labelers; or people's own rankings, validated and split.

The split is by prompt, never within one, and in the embedded world by request. There `labelers_per_prompt` of five
simulated labelers rank a training prompt, and two of them every validation prompt, so that their agreement can be
read from the file.
"""

import random
from functools import partial

import numpy as np

from data.encode import decode_response
from data.records import Ranking, judged_pairs, prompt_key, to_json, write_jsonl
from data.streams import Stream, derive_seed, held_out
from data.world.world import World, labelers
from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun
from stages.evaluation.statistics import labeler_agreement
from stages.models.loading import load_policy, load_tokenizer
from stages.rollouts.transformers import sample
from stages.settings.experiment import Experiment
from stages.settings.rankings import RankingsSettings
from stages.shared.inputs import LengthLimit, fit_prompts, load_placed_records, load_records, read_world
from stages.shared.runtime import can_pack_rows, check_context, device_of, dtype_of, make_accelerator
from stages.training.batching import micro_batches
from stages.training.session import session_of

NO_NOISE = 1e-4


def run(ctx: StageRun[RankingsSettings, Experiment]) -> dict:
    """→ train.jsonl, validation.jsonl."""
    if ctx.experiment.data.rankings is not None:
        rows, figures = load_records("rankings", ctx.source("rankings")), {}
    else:
        rows, figures = simulate(ctx)
    train, valid = held_out(split_keys(ctx, [r.prompt for r in rows]), ctx.config.validation_fraction)
    for name, part in (("train", train), ("validation", valid)):
        part = [rows[i] for i in part]
        if not any(usable_pairs(r) for r in part):
            raise UserError(
                [
                    f"data.rankings: the {name} split ({len(part)} rankings) has no usable pair; give more "
                    f"rankings, or change rankings.validation_fraction"
                ]
            )
        write_jsonl(ctx.publish / f"{name}.jsonl", (to_json(r) for r in part))
    held = [rows[i] for i in valid]
    return {
        "rankings": len(rows),
        "pairs": sum(map(usable_pairs, rows)),
        "train": len(train),
        "validation": len(valid),
        "labeler_agreement": labeler_agreement(held),
        **figures,
    }


def split_keys(ctx: StageRun, prompts) -> list[str]:
    """Return a key for each prompt; prompts of one key stay on one side of the split.

    The key is the request where simulated labelers rank the embedded world's prompts: the same question behind another
    greeting, and the same answers to it, would otherwise stand on both sides. Elsewhere it is the prompt.
    """
    if ctx.experiment.data.rankings is not None:
        return [prompt_key(p) for p in prompts]
    world = World.from_json(read_world(ctx.inputs))
    return [f"{ctx.seed} {world.request(p)}" for p in prompts]


def usable_pairs(r: Ranking) -> int:
    return sum(verdict == "usable" for _, _, verdict in judged_pairs(r))


def simulate(ctx: StageRun) -> tuple[list[Ranking], dict]:
    """Sample K responses a prompt from SFT, calibrate the labelers' noise on them, and rank."""
    c = ctx.config
    prompts, texts, finished = sample_responses(ctx)
    answers = [list(zip(*row, strict=True)) for row in zip(texts, finished, strict=True)]  # as of a Ranking
    world = World.from_json(read_world(ctx.inputs))
    utilities = [world.labeler_utilities(*row) for row in zip(prompts, texts, finished, strict=True)]
    try:
        noise = labelers.calibrate_noise(utilities, answers, c.agreement)
    except ValueError as problem:  # an SFT model that babbles: tastes differ more than its answers do
        ctx.tracker.say(f"rankings: {problem}; ranked without noise. Train base and sft longer")
        noise = NO_NOISE
    valid = set(held_out(split_keys(ctx, prompts), c.validation_fraction)[1])
    unfinished = sum(not f for fs in finished for f in fs) / sum(map(len, finished))
    if unfinished > 0.1:  # labelers judge what is there, and no model learns how such a response ends
        ctx.tracker.say(f"rankings: {unfinished:.0%} of the responses were cut off; raise rankings.response_length")
    rows, owner = [], []
    for i, (prompt, responses) in enumerate(zip(prompts, texts, strict=True)):
        chooser = random.Random(derive_seed(ctx.seed, "labeler", i))
        for who in chooser.sample(range(len(labelers.LABELERS)), 2 if i in valid else c.labelers_per_prompt):
            rng = np.random.default_rng(derive_seed(ctx.seed, "rank", i, who))
            ranks = tuple(map(int, labelers.rank(utilities[i][who], noise, rng, answers[i])))
            name, ended = labelers.LABELERS[who].name, tuple(finished[i])
            rows.append(Ranking(f"{i:05d}-{name}", prompt, tuple(responses), ranks, name, finished=ended))
            owner.append(i)
    judged = [k for k, i in enumerate(owner) if i in valid]
    ceiling = labelers.accuracy_ceiling(
        [utilities[owner[k]] for k in judged],
        [list(rows[k].ranks) for k in judged],
        [list(rows[k].answers) for k in judged],
        noise,
    )
    return rows, {
        "noise": noise,
        "unfinished": unfinished,
        "expected_agreement": labelers.expected_agreement(utilities, answers, noise),
        "accuracy_ceiling": ceiling["realised"],
        "expected_accuracy_ceiling": ceiling["expected"],
    }


def sample_responses(ctx: StageRun) -> tuple[list[str], list[list[str]], list[list[bool]]]:
    """(prompts, K response texts of each, whether each ended with EOS), by SFT; a checkpoint every
    `checkpoints.every` batches."""
    c, m = ctx.config, ctx.experiment.model
    accelerator = make_accelerator(device_of(ctx.experiment), dtype_of(ctx.experiment))
    source = ctx.inputs["sft"] / "model"
    session = session_of(ctx, trains=False)
    check_context(session, c, source)
    tokenizer = load_tokenizer(source, trust_remote_code=ctx.trust_remote_code)
    policy = load_policy(source, attn_implementation=m.attn_implementation, trust_remote_code=ctx.trust_remote_code).to(
        accelerator.device
    )
    can_pack_rows(session, [policy], c.max_length)  # then its prompts are read once for all their samples
    records, places = load_placed_records("prompts", ctx.source("prompts"))
    chosen = Stream(len(records), derive_seed(ctx.seed, "prompts")).take(
        min(len(records), c.num_prompts or len(records))
    )
    prompts = [records[i].prompt for i in chosen]
    names = [places[i] for i in chosen]
    kept, ids, report = fit_prompts(
        tokenizer, prompts, names, LengthLimit(c.max_length, c.on_too_long, "rankings"), c.response_length
    )
    prompts = [prompts[i] for i in kept]
    ctx.tracker.say(f"rankings: {report.line('prompts')}; {c.samples_per_prompt} samples each")
    found = ctx.checkpoints.newest()
    texts: list[list[str]] = found.state["texts"] if found else []
    finished: list[list[bool]] = found.state["finished"] if found else []
    if len(texts) > len(prompts):
        raise UserError(
            f"rankings.num_prompts: {len(texts)} prompts have their responses and {len(prompts)} are asked for now; "
            f"ask for more, or --restart"
        )
    begun = found.step if found else 0
    total = begun + -(-(len(prompts) - len(texts)) // c.batch_size)  # batch_size may be another than before

    def save(step: int) -> None:
        if step:
            ctx.checkpoints.save(step, {}, {"texts": texts, "finished": finished}, total)

    def responses_to(part: list[int], poll) -> list[list[list[int]]]:
        seeds = [derive_seed(ctx.seed, "sample", i, k) for i in part for k in range(c.samples_per_prompt)]
        with accelerator.autocast():
            flat = sample(
                policy,
                [ids[i] for i in part for _ in range(c.samples_per_prompt)],
                seeds,
                response_length=c.response_length,
                temperature=c.temperature,
                batch_size=len(seeds),
                eos_id=tokenizer.eos_token_id,
                pad_id=tokenizer.pad_token_id,
                poll=poll,
            )
        return list(micro_batches(flat, c.samples_per_prompt))

    with ctx.tracker.progress(total, "rankings", begun) as progress:
        for step in range(begun + 1, total + 1):
            part = range(len(texts), min(len(texts) + c.batch_size, len(prompts)))
            poll = session.interrupt(step - 1, total, partial(save, step - 1))
            sampled = parallel.compute_and_all_gather(
                part, [len(ids[i]) for i in part], partial(responses_to, poll=poll)
            )
            for group in sampled:
                texts.append([decode_response(tokenizer, r) for r in group])
                finished.append([r[-1] == tokenizer.eos_token_id for r in group])
            progress.update(step)
            if step < total and ctx.checkpoints.due(step):
                save(step)
    return prompts, texts, finished
