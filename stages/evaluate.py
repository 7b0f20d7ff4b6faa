"""evaluate: every policy on the evaluation prompts → results.json and responses.jsonl.

Policies are sampled at temperature 1. The judge is the gold scorer in the embedded world, otherwise the reward model;
where the data allow none, there are no scores, and without documents no perplexity.
A response without EOS scores `missing_eos_score`, if one is given. best_of_n is the SFT sample with the highest reward
model score out of n. A base model that never saw the chat template is asked in plain text (`evaluation/asking.py`).
Intervals are over tasks in the embedded world, elsewhere over prompts (`evaluation/statistics.py`).
Three checks of over-optimisation need no gold (`evaluation/overoptimisation.py`); some prompts are answered greedily
too, for people to read (`evaluation/greedy.py`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.documents import wrap_documents
from data.groups import make_rows
from data.near_copies import near_copies
from data.records import prompt_key
from data.streams import Stream, derive_seed, held_out
from data.world.world import World
from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun
from pipeline.store import integrity
from pipeline.tracking import json_value
from stages.evaluation import overoptimisation
from stages.evaluation.asking import DESCRIPTIONS, Answer, Asked, answer_of, ask, form_of_base
from stages.evaluation.greedy import answer_greedily
from stages.evaluation.results import Measured, order_by_gold, summarise
from stages.evaluation.shown_prompts import chosen_prompts
from stages.models.ensemble import load_reward_model
from stages.models.forward import response_logprobs, score_all, text_logprobs
from stages.models.loading import load_policy, load_scalar_model, load_tokenizer
from stages.models.packing import can_pack
from stages.objectives.logprobs import sequence_logps
from stages.objectives.rewards import final_scores
from stages.rollouts.transformers import sample
from stages.settings.checks import context_of
from stages.settings.evaluate import (
    RM_FIGURES,
    STAGES,
    EvaluateSettings,
    prompt_kind,
    text_lengths,
    training_prompt_kinds,
)
from stages.settings.experiment import Experiment
from stages.settings.policies import compared_policies, has_rankings
from stages.shared.inputs import (
    LengthLimit,
    fit_prompts,
    load_placed_records,
    load_records,
    read_world,
    split_documents,
)
from stages.shared.runtime import can_pack_rows, check_context, device_of, dtype_of, make_accelerator
from stages.training.batching import micro_batches
from stages.training.session import session_of


def run(ctx: StageRun[EvaluateSettings, Experiment]) -> dict:
    """Measure every policy on the same prompts, and compare.

    Publishes results.json and responses.jsonl (every sample, with its judgements).

    Returns:
        The figures of the manifest.
    """
    c, m = ctx.config, ctx.experiment.model
    session = session_of(ctx, trains=False)
    tools = load_tools(ctx)
    prompts, ids = load_prompts(ctx, tools.tokenizer)
    of_world = getattr(ctx.experiment.data, prompt_kind(ctx.experiment)) == "world"
    world = World.from_json(read_world(ctx.inputs)) if of_world else None
    clusters = [str(world.task(p)) if world else prompt_key(p) for p in prompts]
    leaked = find_leaked(ctx, prompts, world)
    text_rows = held_out_text(ctx, tools.tokenizer)
    names = [s for s in STAGES if s in ctx.inputs]
    if c.best_of > 1 and "best_of_n" in compared_policies(ctx.experiment):
        names.append("best_of_n")
    for line in left_out(ctx):
        ctx.tracker.say(f"evaluate: {line}")

    done = {name: Measured(**fields) for name, fields in measured_before(ctx).items()}
    with ctx.tracker.progress(len(names), "evaluate", len(done)) as progress:
        for name in (name for name in names if name not in done):  # others may be asked for than before
            form = form_of_base(c.base_prompt, m.name_or_path) if name == "base" else "chat"
            if form != "chat":
                ctx.tracker.say(f"evaluate: base is asked {DESCRIPTIONS[form]}")
            asked = ask_all(ctx, tools, prompts, ids, form)
            model = tools.sft if name in ("sft", "best_of_n") else tools.load(ctx.inputs[name] / "model")
            here = Policy(name, model, tools.packed and can_pack(model, c.max_length))
            poll = partial(session.leave_if_requested, len(done), len(names))
            rows = measure(ctx, tools, here, asked, ids, poll)
            losses = None if name == "best_of_n" else text_losses(model, text_rows, tools.accelerator, c.batch_size)
            gold = None if world is None else [
                [world.gold(p, r, f) for r, f in zip(texts, ends, strict=True)]
                for p, texts, ends in zip(prompts, rows["responses"], rows["finished"], strict=True)
            ]  # fmt: skip
            done[name] = Measured(asked=form, gold=gold, text_losses=losses, **rows)
            progress.update(len(done))
            if len(done) < len(names):
                state = {"measured": {name: measured.state() for name, measured in done.items()}}
                ctx.checkpoints.save(len(done), {}, state, len(names))
                session.leave_if_requested(len(done), len(names))

    greedy = greedy_rows(ctx, tools, prompts, ids, {name: done[name] for name in names}, world)
    known = leaked if world else None
    climbed = climbed_by_judge(ctx, names) if world is None else set()
    results = {
        "judge": "gold" if world else "reward_model" if tools.reward_model is not None else None,
        "leaked": sum(leaked),
        "leaked_by": "task" if world else "near copy",
        "prompts": len(prompts),
        "samples_per_prompt": c.samples_per_prompt,
        "clusters": len(set(clusters)),
        "policies": {
            name: summarise(
                done[name], done["sft"], clusters, known,
                judge_climbed=name in climbed, selected=name in climbed and name == "best_of_n",
            )
            for name in names
        },
        "reward_model": {key: figures_of_rm(ctx).get(key) for key in RM_FIGURES}
        | {"orders_as_gold": order_by_gold(done["sft"], clusters, known)},
        "overoptimisation": {name: overoptimisation.check(done[name], done["sft"], clusters) for name in names},
        "missing_eos_score": c.missing_eos_score,
        "response_length": c.response_length,
    }  # fmt: skip
    (ctx.publish / "results.json").write_text(json.dumps(json_value(results), indent=1) + "\n", encoding="utf-8")
    write_responses(ctx, prompts, clusters, known, {name: done[name] for name in names})
    with (ctx.publish / "greedy.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in greedy)
    main = "ppo" if "ppo" in names else names[-1]
    last = results["policies"][main]
    return {
        "policy": main,
        "judged": "by the reward model that it was trained to please or selected by" if main in climbed else None,
        "score": last["score"],
        "win_rate_vs_sft": last["win_rate_vs_sft"] and last["win_rate_vs_sft"]["value"],
        "gold": last["gold"] and last["gold"]["overall"],
        "eos_rate": last["eos_rate"],
        "prompts": len(prompts),
        "leaked": sum(leaked),
    }


def figures_of_rm(ctx: StageRun) -> dict:
    """The figures of the reward model that judges; {} without one."""
    return ctx.manifests["rm"]["metrics"] if "rm" in ctx.manifests else {}


def left_out(ctx: StageRun) -> list[str]:
    """Say which figures the experiment's data do not give."""
    lines = []
    if "rm" not in ctx.inputs:
        way = (
            "; to get scores, add best_of_n to evaluate.policies: that trains one"
            if has_rankings(ctx.experiment)
            else ""
        )
        lines.append(f"no reward model judges, so there are no scores{way}")
    if ctx.experiment.data.documents is None:
        lines.append("no documents (data.documents): no perplexity of pretraining text")
    return lines


@dataclass(frozen=True)
class Tools:
    """What every policy is measured with."""

    tokenizer: Any
    accelerator: Any
    load: Callable
    """Folder → the policy in it, where it computes."""
    sft: Any
    reference: Any
    """The policy that KL is measured to: the one that PPO's penalty is to."""
    reward_model: Any
    """What scores; None where no reward model is asked for."""
    held_out: Any
    """rm's held-out model, which nothing was trained to please; None where rm trained none."""
    packed: bool
    """Whether rows go through these models packed."""


@dataclass(frozen=True)
class Policy:
    """A policy that is being measured."""

    name: str
    model: Any
    packed: bool


def load_tools(ctx: StageRun) -> Tools:
    """Load SFT, the reference and the reward model, each where it computes."""
    c, m, folder = ctx.config, ctx.experiment.model, ctx.inputs["sft"] / "model"
    check_context(session_of(ctx, trains=False), c, folder, *text_lengths(ctx.experiment))
    accelerator = make_accelerator(device_of(ctx.experiment), dtype_of(ctx.experiment))
    options = {"attn_implementation": m.attn_implementation, "trust_remote_code": ctx.trust_remote_code}

    def load(source):
        return load_policy(source, **options).to(accelerator.device)

    tokenizer = load_tokenizer(folder, trust_remote_code=ctx.trust_remote_code)
    reward_model = other = None
    if "rm" in ctx.inputs:
        reward_model = load_reward_model(ctx.inputs["rm"] / "model", c.reward_ensemble, **options)
        reward_model = reward_model.to(accelerator.device)
        if (ctx.inputs["rm"] / "held_out" / "model").is_dir():
            other = load_scalar_model(ctx.inputs["rm"] / "held_out" / "model", **options).to(accelerator.device)
    sft = load(folder)
    reference = sft if ctx.experiment.sft.ppo_init is None else load(ctx.inputs["sft"] / "ppo_init")
    packed = can_pack_rows(
        session_of(ctx, trains=False),
        [sft, reference, *(model for model in (reward_model, other) if model is not None)],
        c.max_length,
    )
    return Tools(tokenizer, accelerator, load, sft, reference, reward_model, other, packed)


def load_prompts(ctx: StageRun, tokenizer) -> tuple[list, list[list[int]]]:
    """Return the evaluation prompts that leave room for a response, and their ids through the chat template. Without
    a file of them: the prompts of the demonstrations that sft held out, each once."""
    kind = prompt_kind(ctx.experiment)
    records, places = load_placed_records(kind, ctx.source(kind))
    if kind == "demonstrations":
        first = {prompt_key(records[i].prompt): i for i in reversed(held_back(ctx, records)[1])}
        records, places = ([part[i] for i in sorted(first.values())] for part in (records, places))
    if ctx.config.num_prompts is not None and ctx.config.num_prompts < len(records):
        ctx.tracker.say(
            f"evaluate: the first {ctx.config.num_prompts} of {len(records)} evaluation prompts; evaluate.num_prompts "
            f"takes more (null: all)"
        )
    records, places = (part[: ctx.config.num_prompts] for part in (records, places))
    kept, ids, report = fit_prompts(
        tokenizer,
        (r.prompt for r in records),
        places,
        LengthLimit(ctx.config.max_length, ctx.config.on_too_long, "evaluate"),
        ctx.config.response_length,
    )
    ctx.tracker.say(f"evaluate: {report.line('evaluation prompts')}")
    if kind == "demonstrations":
        ctx.tracker.say(
            "evaluate: data.evaluation_prompts gives none, so these are the demonstrations that sft held out; more "
            "prompts of a file make intervals narrower"
        )
    return [p if isinstance(p, str) else list(p) for p in (records[i].prompt for i in kept)], ids


def ask_all(ctx: StageRun, tools: Tools, prompts, ids: list[list[int]], form: str) -> list[Asked]:
    """Put every prompt into the form in which a policy is asked."""
    if form == "chat":
        return [Asked("chat", own, tools.tokenizer.eos_token_id) for own in ids]
    examples = []
    if form == "few_shot":
        rows = load_records("demonstrations", ctx.source("demonstrations"))
        order = Stream(len(rows), derive_seed(ctx.seed, "few_shot")).take(min(len(rows), ctx.config.few_shot_examples))
        examples = [rows[i] for i in order]
    config = json.loads((ctx.inputs["sft"] / "model" / "config.json").read_text(encoding="utf-8"))
    context = context_of(config)
    room = None if context is None else context - ctx.config.response_length
    return [ask(tools.tokenizer, form, prompt, examples, room) for prompt in prompts]


def held_back(ctx: StageRun, demonstrations) -> tuple[list[int], list[int]]:
    """Return which demonstrations sft may train on, and which it does not: its own split, whatever it drops."""
    return held_out([prompt_key(d.prompt) for d in demonstrations], ctx.experiment.data.validation_fraction)


def find_leaked(ctx: StageRun, prompts, world: World | None) -> list[bool]:
    """Find the prompts whose task training set too (in the embedded world), or that are near copies of training
    prompts (elsewhere), and say how many there are.

    Args:
        ctx: The stage's context.
        prompts: The evaluation prompts, P of them.
        world: The embedded world if the prompts are its own, otherwise None.

    Returns:
        (P,) flags.
    """
    trained = {
        kind: [record.prompt for record in load_records(kind, ctx.source(kind))]
        for kind in training_prompt_kinds(ctx.experiment)
    }
    if prompt_kind(ctx.experiment) == "demonstrations":
        rows = load_records("demonstrations", ctx.source("demonstrations"))
        trained["demonstrations"] = [rows[i].prompt for i in held_back(ctx, rows)[0]]
    if world is not None:
        everything = [prompt for some in trained.values() for prompt in some]
        own = [prompt for prompt in everything if world.knows(prompt)]
        documents = (
            load_records("documents", ctx.source("documents")) if ctx.experiment.data.documents is not None else []
        )
        asked = world.tasks_in(own, [document.text for document in documents])
        copies = near_copies(prompts, [prompt for prompt in everything if not world.knows(prompt)])
        known = [world.task(p) in asked or copied for p, copied in zip(prompts, copies, strict=True)]
        ctx.tracker.say(
            f"evaluate: {sum(known)} of {len(prompts)} prompts set tasks that training data set too, in other words; "
            f"{len(prompts) - sum(known)} set tasks that no training data set"
        )
        return known
    copies = {kind: near_copies(prompts, some) for kind, some in trained.items()}
    leaked = [any(flags) for flags in zip(*copies.values(), strict=True)]
    if any(leaked):
        where = ", ".join(f"{kind} {sum(flags)}" for kind, flags in copies.items() if any(flags))
        ctx.tracker.say(
            f"evaluate: {sum(leaked)} of {len(prompts)} evaluation prompts are near copies of training prompts "
            f"({where}): what is measured on them is memory too; give others (`rlhf data check FILE -c CONFIG` names "
            f"these)"
        )
    return leaked


def climbed_by_judge(ctx: StageRun, names: Sequence[str]) -> set[str]:
    """Return the policies for which the judge, rm's reward model, is no independent judge.

    Best of n is selected by it. PPO is trained to please it, unless `ppo.reward_model` names a folder whose weights
    are none of rm's (a copy of rm's model is still rm's model).
    """
    if "rm" not in ctx.inputs:  # nothing judges
        return set()
    folder = ctx.experiment.ppo.reward_model
    climbed = {"best_of_n"}
    if folder is None:
        climbed.add("ppo")
    else:
        ours, theirs = (
            {integrity.sha256_file(path) for path in place.rglob("*.safetensors")}
            for place in (ctx.inputs["rm"] / "model", Path(folder).expanduser())
        )
        if ours & theirs:
            climbed.add("ppo")
    return climbed & set(names)


def held_out_text(ctx: StageRun, tokenizer) -> list[list[int]]:
    """Return packed rows of the documents that base and PPO-ptx did not train on; none without documents."""
    if ctx.experiment.data.documents is None:
        return []
    _, held = split_documents(ctx.source("documents"), ctx.experiment.data.validation_fraction)
    rows = wrap_documents(tokenizer, held, length=ctx.config.perplexity_length)
    return rows[: ctx.config.perplexity_rows]


def measured_before(ctx: StageRun) -> dict[str, dict]:
    """Return what an interrupted run had measured, by policy."""
    checkpoint = ctx.checkpoints.newest()
    if checkpoint is None:
        return {}
    if "measured" not in checkpoint.state:
        raise UserError("evaluate: the checkpoint was written by another version; start again with --restart")
    return checkpoint.state["measured"]


@torch.no_grad()
def measure(
    ctx: StageRun, tools: Tools, policy: Policy, asked: list[Asked], chat_ids: list[list[int]], poll: Callable
) -> dict:
    """Sample a policy's answers and score them.

    Args:
        ctx: The stage's context.
        tools: What policies are measured with.
        policy: The policy; "best_of_n" keeps the best of `best_of` samples by score.
        asked: The P prompts in the form in which this policy is asked.
        chat_ids: The ids of the same prompts through the chat template: what the judges read.
        poll: Called between tokens; raises to leave.

    Returns:
        `responses`, `finished`, `scores`, `raw_scores`, `held_out_scores` (None without a reward model), `kl` (None for
        best of n) and `lengths`, as in `Measured`.
    """
    c, pad_id = ctx.config, tools.tokenizer.pad_token_id
    best_of_n = policy.name == "best_of_n"
    n = c.best_of if best_of_n else c.samples_per_prompt
    # another stream than SFT's own samples, which the best of n are compared with
    stream = "best_of_n" if best_of_n else "evaluate"

    def measure_part(part: list[int]) -> list[dict]:
        """Measure the prompts of a part; a dict a prompt."""
        index = [i for i in part for _ in range(n)]
        seeds = [derive_seed(ctx.seed, stream, i, k) for i in part for k in range(n)]
        with tools.accelerator.autocast():
            sampled = sample(
                policy.model,
                [asked[i].ids for i in index],
                seeds,
                response_length=c.response_length,
                temperature=c.temperature,
                batch_size=(4 if n > 1 else 1) * c.batch_size,
                eos_id=asked[part[0]].end_id,
                pad_id=pad_id,
                poll=poll,
            )
        answers = [answer_of(tools.tokenizer, asked[i], ids) for i, ids in zip(index, sampled, strict=True)]
        prompts, responses = [chat_ids[i] for i in index], [a.response for a in answers]
        finished, own, scores = torch.tensor([a.finished for a in answers]), None, None
        if tools.reward_model is not None:
            own = score(ctx, tools, tools.reward_model, prompts, responses, policy.packed)
            scores = final_scores(own, finished, c.missing_eos_score)
        kept = list(range(len(answers)))
        if best_of_n:
            best = scores.view(-1, n).argmax(-1).tolist()
            kept = [g * n + b for g, b in enumerate(best)]
        other = None
        if tools.held_out is not None:
            those = ([prompts[i] for i in kept], [responses[i] for i in kept])
            other = score(ctx, tools, tools.held_out, *those, policy.packed)
            other = final_scores(other, finished[kept], c.missing_eos_score).tolist()
        kl = None if best_of_n else log_ratios(ctx, tools, policy, [asked[i].ids for i in index], prompts, answers)
        rows = {
            "responses": [answers[i].text for i in kept],
            "finished": [answers[i].finished for i in kept],
            "scores": None if scores is None else [scores[i].item() for i in kept],
            "raw_scores": None if own is None else [own[i].item() for i in kept],
            "held_out_scores": other,
            "kl": kl,
            "lengths": [len(answers[i].sampled) for i in kept],
        }
        each = len(kept) // len(part)
        return [
            {key: None if values is None else values[k * each : (k + 1) * each] for key, values in rows.items()}
            for k in range(len(part))
        ]

    of_each = -(-len(asked) // parallel.rank_and_world_size()[1])
    size = max(1, min(of_each, c.batch_size // min(n, 4)))
    parts = list(micro_batches(list(range(len(asked))), size))
    found = parallel.compute_and_all_gather(
        parts, [len(part) for part in parts], lambda own: list(map(measure_part, own))
    )
    rows = [row for part in found for row in part]
    return {key: None if rows[0][key] is None else [row[key] for row in rows] for key in rows[0]}


def score(ctx: StageRun, tools: Tools, reward_model, prompts, responses, packed: bool) -> torch.Tensor:
    """Score responses, (B,), as the reward model itself does: `missing_eos_score` is not applied."""
    return score_all(
        reward_model,
        prompts,
        responses,
        pad_id=tools.tokenizer.pad_token_id,
        batch_size=ctx.config.batch_size,
        accelerator=tools.accelerator,
        packed=packed,
    )


def greedy_rows(
    ctx: StageRun, tools: Tools, prompts, ids: list[list[int]], done: dict[str, Measured], world: World | None
) -> list[dict]:
    """Answer the prompts that the report shows greedily, by each policy but best of n.

    Args:
        ctx: The stage's context.
        tools: What policies are measured with.
        prompts: The P evaluation prompts.
        ids: Their ids through the chat template.
        done: What was measured of each policy.
        world: The embedded world, if the prompts are its own.

    Returns:
        Rows of greedy.jsonl: {policy, index (of the prompt), prompt, response, finished, length, score, gold?}; score
        is None for an answer that is longer than max_length, and where there is no reward model.
    """
    c, rows = ctx.config, []
    count = 12 if c.greedy_prompts is None else c.greedy_prompts
    chosen = sorted({i for _, some in chosen_prompts(done, count) for i in some})
    longest = 4 * c.response_length if c.greedy_length is None else c.greedy_length
    context = context_of(json.loads((ctx.inputs["sft"] / "model" / "config.json").read_text(encoding="utf-8")))
    for name in (name for name in done if name != "best_of_n" and chosen):
        form = done[name].asked
        asked = ask_all(ctx, tools, [prompts[i] for i in chosen], [ids[i] for i in chosen], form)
        model = tools.sft if name == "sft" else tools.load(ctx.inputs[name] / "model")
        with tools.accelerator.autocast():
            answers = answer_greedily(
                model, tools.tokenizer, asked, longest, context,
                batch_size=c.batch_size, poll=partial(session_of(ctx, trains=False).leave_if_requested, len(done) - 1, len(done)),
            )  # fmt: skip
        fits = [k for k, (i, a) in enumerate(zip(chosen, answers, strict=True))
                if len(ids[i]) + len(a.response) <= c.max_length and tools.reward_model is not None]  # fmt: skip
        scores: dict[int, float] = {}
        if fits:
            packed = tools.packed and can_pack(model, c.max_length)
            those = [ids[chosen[k]] for k in fits], [answers[k].response for k in fits]
            found = score(ctx, tools, tools.reward_model, *those, packed)
            ends = torch.tensor([answers[k].finished for k in fits])
            scores = dict(zip(fits, final_scores(found, ends, c.missing_eos_score).tolist(), strict=True))
        for k, (i, answer) in enumerate(zip(chosen, answers, strict=True)):
            row = {"policy": name, "index": i, "prompt": prompts[i], "response": answer.text}
            row |= {"finished": answer.finished, "length": len(answer.sampled), "score": scores.get(k)}
            gold = {} if world is None else {"gold": world.gold(prompts[i], answer.text, answer.finished)}
            rows.append(row | gold)
    return rows


def log_ratios(
    ctx: StageRun, tools: Tools, policy: Policy, own_prompts, chat_prompts, answers: Sequence[Answer]
) -> list[float]:
    """Compute log π(y|x) − log π_ref(y|x) of each answer, in nats; its mean over answers is the KL.

    The policy reads the ids that it sampled, in the form in which it was asked; the reference reads the same answer as
    a response of the chat.

    Args:
        ctx: The stage's context.
        tools: What policies are measured with.
        policy: The policy that answered.
        own_prompts: The ids that each answer followed.
        chat_prompts: The ids of the same prompts through the chat template.
        answers: The answers, B of them.

    Returns:
        B numbers.
    """

    def logps(model, prompts, responses):
        rows = make_rows(prompts, responses, tools.tokenizer.pad_token_id, packed=policy.packed)
        rows = rows.to(tools.accelerator.device)
        with tools.accelerator.autocast():
            logprobs = response_logprobs(model, rows, ctx.config.temperature)
        return sequence_logps(logprobs, rows.response_mask).float().cpu()

    ours = logps(policy.model, own_prompts, [a.sampled for a in answers])
    theirs = logps(tools.reference, chat_prompts, [a.response for a in answers])
    return (ours - theirs).tolist()


@torch.no_grad()
def text_losses(model, rows: list[list[int]], accelerator, size: int) -> list[float] | None:
    """Compute the mean cross-entropy a token of each packed row.

    Args:
        model: The policy.
        rows: N rows of T ids.
        accelerator: Where it computes.
        size: Rows of a forward pass.

    Returns:
        N numbers, in nats; None without rows.
    """
    if not rows:
        return None

    def losses(parts: list[list[list[int]]]) -> list[list[float]]:
        found = []
        for part in parts:
            with accelerator.autocast():
                logprobs = text_logprobs(model, torch.tensor(part, device=accelerator.device))
            found.append((-logprobs.double().mean(-1)).tolist())
        return found

    parts = list(micro_batches(rows, size))
    return [loss for some in parallel.compute_and_all_gather(parts, list(map(len, parts)), losses) for loss in some]


def write_responses(
    ctx: StageRun, prompts, clusters: list[str], known: list[bool] | None, done: dict[str, Measured]
) -> None:
    """Write responses.jsonl: a line a policy, prompt and sample, with its judgements."""
    with (ctx.publish / "responses.jsonl").open("w", encoding="utf-8") as file:
        for name, measured in done.items():
            for i, prompt in enumerate(prompts):
                for k, response in enumerate(measured.responses[i]):
                    row = {
                        "policy": name,
                        "prompt": prompt,
                        "sample": k,
                        "response": response,
                        "finished": measured.finished[i][k],
                        "score": measured.scores[i][k] if measured.scores is not None else None,
                        "length": measured.lengths[i][k],
                    }
                    for key in ("raw_scores", "held_out_scores"):
                        if (values := getattr(measured, key)) is not None:
                            row[key.removesuffix("s")] = values[i][k]
                    if measured.gold is not None:
                        row |= {"gold": measured.gold[i][k], "cluster": clusters[i], "known_task": known[i]}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
