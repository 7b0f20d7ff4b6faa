"""rm: rankings → a reward model, r(x, y) a scalar read at the last token of the response.

    loss = − 1/C(K,2) · Σ_pairs log σ( r(x, y_w) − r(x, y_l) )     mean over prompts (InstructGPT, eq. 1)

All pairs of a prompt are one batch element: one forward pass over the prompt and its K responses, and each response is
seen by one gradient. loss_type: plackett_luce takes the likelihood of the whole order instead.
Afterwards a bias makes the demonstrations score 0 on average; it is `reward_bias` in config.json.
A held-out model of another seed (rm.held_out) is climbed by nothing: evaluate tells over-optimisation by it.
"""

from functools import partial

import torch

from data import sources
from data.encode import decode_response, encode_prompt, encode_response
from data.groups import Pair, batch_groups, make_rows
from data.records import prompt_key
from data.streams import Stream, derive_seed
from data.world.world import World
from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun
from stages.evaluation.statistics import (
    accuracy_by,
    agreements,
    expected_calibration_error,
    labeler_agreement,
    pair_accuracy,
    reliability,
    rights,
)
from stages.models.adapters import plain, save_merged, with_adapter
from stages.models.families import is_own_head, off_the_gpu
from stages.models.forward import response_scores, score_all
from stages.models.loading import load_tokenizer, new_reward_model
from stages.models.sharding import full, is_sharded, publishable
from stages.objectives.losses import plackett_luce_loss, ranking_loss
from stages.settings.experiment import Experiment
from stages.settings.policies import reward_models
from stages.settings.rm import RMSettings
from stages.settings.training import total_steps
from stages.shared.cards import SCORE, card
from stages.shared.disk import say_written
from stages.shared.inputs import cut_by_tokens, group_order, in_parts, load_groups, read, read_world
from stages.shared.publishing import adapter_base, publish_dtype
from stages.shared.runtime import (
    adapter_settings,
    check_context,
    device_of,
    dtype_of,
    note_default_rate,
    packing,
    place,
)
from stages.training.loop import fit, make_accelerator, make_trainee
from stages.training.schedule import learning_rate_at


def run(ctx: StageRun[RMSettings, Experiment]) -> dict:
    """→ model/, an AutoModelForSequenceClassification with one label and reward_bias; ensemble/1/, … and held_out/model
    if asked for."""
    c, source = ctx.config, ctx.inputs["sft"] / "model"
    check_context(ctx, source)
    tokenizer = load_tokenizer(source, trust_remote_code=ctx.trust_remote_code)
    accelerator = make_accelerator(device_of(ctx.experiment), dtype_of(ctx.experiment))
    limits = {"max_length": c.max_length, "on_too_long": c.on_too_long}
    groups, report = load_groups(ctx, tokenizer, "train", **limits)
    held, held_report = load_groups(ctx, tokenizer, "validation", **limits)
    report += held_report
    steps, names = total_steps(c, len(groups)), reward_models(ctx.experiment)
    ctx.tracker.say(
        f"rm: {report.line('rankings')}; {sum(len(g.pairs()) for g in groups)} pairs; "
        f"{len(held)} rankings held out; {steps} steps" + f" for each of {len(names)} models" * (len(names) > 1)
    )
    note_default_rate(ctx)
    validation = sources.load("rankings", path=ctx.inputs["rankings"] / "validation.jsonl")
    shown = {ranking.id: ranking.prompt for ranking in validation}

    found = ctx.checkpoints.newest()
    if found and found.state.get("steps", steps) != steps:
        was = found.state["steps"]
        raise UserError(
            f"rm: each model of the interrupted run takes {was} steps, and rm.max_steps or rm.num_train_epochs now ask "
            f"for {steps}; set them back to go on, --restart begins anew"
        )
    done = list(found.state.get("members", [])) if found else []  # figures of the models that are trained
    kept = {f"member_{k}": found.tensors(f"member_{k}") for k in range(len(done))} if found else {}
    margins, told = [], []
    clusters = tasks_of_prompts(ctx, validation)
    for k, name in enumerate(names):
        # 1 the policy's trunk, a fresh scalar head
        model, trainee = make_member(ctx, source, accelerator, k, steps)
        if k == 0:
            sets = len(names) - 1 + (c.keep == "best")
            say_written(ctx, [model], [model], len(names) * steps, sets=sets, copies=len(names))
        tools = (model, tokenizer.pad_token_id, accelerator, packing(ctx, model))
        if fresh := k == len(done):
            # 2 train
            order = group_order(ctx, groups, steps, c.per_device_train_batch_size * c.gradient_accumulation_steps, k)
            state = {"members": done} | ({"steps": steps} if len(names) > 1 else {})
            rest = {"first": k * steps, "total": len(names) * steps, "carried": (kept, state)}
            done.append(train(ctx, trainee, tools, groups, held, order, steps, **rest))
            if len(names) > 1:
                kept[f"member_{k}"] = {name: x.clone() for name, x in trainee.tensors().items()}
        else:
            trainee.load(kept[f"member_{k}"])
        # 3 how far it can be trusted
        found_margins, owners, _ = look_at_held(ctx, tools, held)
        margins.append(found_margins)
        told.append(trust(found_margins, owners, held, validation, clusters))
        # 4 the bias: demonstrations score 0 on average
        plain(model).config.reward_bias = demonstration_mean(ctx, model, tokenizer, accelerator)
        if fresh:
            done[k]["reward_bias"] = plain(model).config.reward_bias
        if fresh and k == 0:
            write_samples(ctx, model, tokenizer, held[:4], shown, done[0]["steps"], accelerator)
        model = publishable(model, partial(make_model, ctx, source, k))
        if parallel.is_rank_zero():
            refuse_another_logit(model, min(held, key=lambda g: len(g.prompt)), tokenizer.pad_token_id)
        folder = ctx.publish / name
        base = adapter_base(ctx, folder, source)
        told_of = {"figures": done[k] | told[k], "source": source, "adapter": base}
        text = card(ctx, "a reward model", SCORE, own_head=is_own_head(plain(model)), **told_of)
        options = {"base": base or ("", None), "dtype": publish_dtype(ctx, source)}
        save_merged(model, tokenizer, folder, card=text, **options)
        if fresh and k + 1 < len(names) and ctx.checkpoints.every:
            held_whole = {name: full(tensors) for name, tensors in kept.items()}
            ctx.checkpoints.save((k + 1) * steps, held_whole, {"members": done, "steps": steps}, len(names) * steps)
    figures = done[0] | told[0]
    if c.ensemble > 1:
        mean = [sum(part) / c.ensemble for part in zip(*margins[: c.ensemble], strict=True)]
        figures["ensemble_accuracy"] = float(rights(mean).mean())  # of their mean
    if names[-1] == "held_out/model":
        figures["held_out_accuracy"] = float(rights(margins[-1]).mean())
    figures["accuracy_ceiling"] = ctx.manifests["rankings"]["metrics"].get("accuracy_ceiling")
    return {**figures, "truncated": report.truncated, "dropped": report.dropped}


def make_model(ctx: StageRun, source, k: int):
    """The k-th reward model before training, with its adapter: all differ in their seeds."""
    m = ctx.experiment.model
    seed = derive_seed(ctx.seed, "member", k) if k else ctx.seed
    model = new_reward_model(
        source, seed=seed, attn_implementation=m.attn_implementation, trust_remote_code=ctx.trust_remote_code
    )
    return with_adapter(model, **(adapter_settings(m) or {"method": None}), scalar=True, seed=seed)


def make_member(ctx: StageRun, source, accelerator, k: int, steps: int):
    """The k-th reward model, where it computes, and its trainee for `steps` steps."""
    c, model = ctx.config, place(ctx, partial(make_model, ctx, source, k), accelerator)
    trainee = make_trainee(
        "model",
        model,
        learning_rate=c.learning_rate,
        max_grad_norm=c.max_grad_norm,
        weight_decay=c.weight_decay,
        adam_beta2=c.adam_beta2,
        steps=steps,
    )
    return model, trainee


def train(ctx: StageRun, trainee, tools, groups, held, order: list[int], steps: int, **rest) -> dict:
    """Train one reward model; → its held-out figures. tools: the model, the padding's id, where it computes, and
    whether it packs."""
    c, (model, pad_id, accelerator, packed) = ctx.config, tools

    def loss(rows: list[int], whole: list[int]):
        batch = batch_groups([groups[i] for i in rows], pad_id, packed=packed).to(accelerator.device)
        with accelerator.autocast():
            scores = response_scores(model, batch.rows)
        value = loss_of(c, batch, scores, len(whole))
        margins = (scores[batch.winners] - scores[batch.losers]).detach()
        weight = len(rows) / len(whole)
        return value, {
            "loss": value.item(),
            "accuracy": weight * batch.mean((margins > 0).float()),
            "margin": weight * batch.mean(margins),
        }

    def evaluate(poll) -> dict:
        margins, _, value = look_at_held(ctx, tools, held, poll)
        return {"loss": value, "accuracy": float(rights(margins).mean()), "margin": sum(margins) / len(margins)}

    return fit(
        ctx,
        trainee,
        accelerator,
        order=order,
        batch_size=c.per_device_train_batch_size * c.gradient_accumulation_steps,
        costs=[g.tokens() for g in groups],
        cut=cut_by_tokens(ctx, groups, packed)[0],
        loss=loss,
        evaluate=evaluate,
        judge="loss",
        higher_is_better=False,
        keep=c.keep,
        patience=c.patience,
        eval_steps=c.eval_steps,
        learning_rate=lambda s: learning_rate_at(s, steps, c.learning_rate, c.lr_scheduler_type, c.warmup_steps),
        **rest,
    )


@torch.no_grad()
def look_at_held(ctx: StageRun, tools, held, poll=lambda: None) -> tuple[list[float], list[tuple[int, Pair]], float]:
    """Score margins of all held-out pairs, whose they are (group, pair), and the mean loss a prompt."""
    model, pad_id, accelerator, packed = tools

    sharded = is_sharded(model)
    parts, costs = in_parts(ctx, held, packed)

    def look(rows: list[int]) -> tuple[list[float], float]:
        poll()
        batch = batch_groups([held[i] for i in rows], pad_id, packed=packed).to(accelerator.device)
        with accelerator.autocast():
            scores = response_scores(model, batch.rows)
        margins = (scores[batch.winners] - scores[batch.losers]).tolist()
        return margins, loss_of(ctx.config, batch, scores, len(held)).item()

    def looks(own: list[list[int]]) -> list[tuple[list[float], float]]:
        every = [(look(rows), mine) for rows, mine in parallel.padded_micro_batches(own, parts[0] if sharded else None)]
        return [found for found, mine in every if mine]

    found = parallel.compute_and_all_gather(parts, costs, looks, idle=sharded)
    margins = [x for some, _ in found for x in some]
    owners = [(i, pair) for rows in parts for i in rows for pair in held[i].pairs()]
    return margins, owners, sum(value for _, value in found)


def loss_of(c: RMSettings, batch, scores, prompts: int):
    """The loss of a micro-batch, divided by the whole batch's prompts."""
    if c.loss_type == "plackett_luce":
        return plackett_luce_loss(scores, batch.winners, batch.losers, batch.choice, batch.choice_weights, prompts)
    margins = c.margin_coef * batch.pair_margins
    return ranking_loss(scores, batch.winners, batch.losers, batch.pair_weights, prompts, margins, c.label_smoothing)


def tasks_of_prompts(ctx: StageRun, validation) -> dict[str, str]:
    """Return the cluster of each validation prompt, by the ranking's id: its task where the embedded world's labelers
    ranked, otherwise the prompt itself."""
    world = World.from_json(read_world(ctx)) if ctx.experiment.data.rankings is None else None
    return {r.id: str(world.task(r.prompt)) if world else prompt_key(r.prompt) for r in validation}


def trust(margins: list[float], owners: list[tuple[int, Pair]], held, validation, clusters: dict[str, str]) -> dict:
    """Say how far the reward model can be trusted: accuracy, in all and in parts, calibration, labelers' agreement.

    Args:
        margins: Score of the preferred response minus score of the other one, for every held-out pair.
        owners: The held-out group (its number) and the pair of each margin.
        held: The held-out groups.
        validation: The rankings that they were made of.
        clusters: The cluster of each ranking by its id; intervals are over clusters.

    Returns:
        Figures for the manifest.
    """
    of = [clusters[held[g].id] for g, _ in owners]
    ranks = [held[g].rankings()[pair.labeler] for g, pair in owners]
    names = [held[g].labelers[pair.labeler] or "unnamed" for g, pair in owners]
    distance = [r[pair.loser] - r[pair.winner] for r, (_, pair) in zip(ranks, owners, strict=True)]
    return {
        **pair_accuracy(margins, of),
        "ece": expected_calibration_error(margins),
        "reliability": reliability(margins),
        "accuracy_by_k": accuracy_by(margins, [sum(x is not None for x in r) for r in ranks], of),
        "accuracy_by_rank_distance": accuracy_by(margins, distance, of),
        "accuracy_by_labeler": accuracy_by(margins, names, of),
        "labeler_agreement": labeler_agreement(validation),
        "agreement_by_labelers": {
            f"{one} / {other}": {"agreement": same / total, "n_pairs": total}
            for (one, other), (same, total) in sorted(agreements(validation).items())
        },
    }


@torch.no_grad()
def demonstration_mean(ctx: StageRun, model, tokenizer, accelerator) -> float:
    """Mean score of the demonstrations that fit (at most `bias_demonstrations`), the bias not yet subtracted."""
    c, rows, pairs = ctx.config, read(ctx, "demonstrations"), []
    for i in Stream(len(rows), derive_seed(ctx.seed, "bias")).take(len(rows)):
        pair = (encode_prompt(tokenizer, rows[i].prompt), encode_response(tokenizer, rows[i].completion))
        if sum(map(len, pair)) <= c.max_length:
            pairs.append(pair)
        if len(pairs) == c.bias_demonstrations:
            break
    if not pairs:
        raise UserError(
            [
                f"data.demonstrations: none of them fits in rm.max_length {c.max_length}, and the mean score 0 "
                f"is taken over them; raise it"
            ]
        )
    prompts, responses = zip(*pairs, strict=True)
    size = 4 * c.per_device_train_batch_size
    scores = score_all(
        model, prompts, responses, pad_id=tokenizer.pad_token_id, batch_size=size, accelerator=accelerator
    )
    return scores.double().mean().item()


@torch.no_grad()
def refuse_another_logit(model, group, pad_id: int) -> None:
    """See to it that who uses the published model as its card says reads the score that PPO will climb.

    Args:
        model: the reward model as it will be published, on the CPU.
        group: a held-out prompt and its responses; the first that has a token is scored, alone in its row.
        pad_id: the id that pads rows.

    Raises:
        UserError: the model's own logit, less reward_bias, is another number.
    """
    response = next((r for r in group.responses if r), [])
    inner = plain(model)
    with off_the_gpu(inner):
        ours = response_scores(model, make_rows([group.prompt], [response], pad_id)).item()
        inner.eval()
        logit = inner(input_ids=torch.tensor([group.prompt + response])).logits[0, 0].item()
    theirs = logit - inner.config.reward_bias
    if not abs(ours - theirs) <= 1e-4 * max(1.0, abs(ours)):
        raise UserError(
            f"rm: {type(inner).__name__} gives a response the logit {theirs:.5f} (less reward_bias), its score here "
            f"is {ours:.5f}: the published model would be another one; take a family whose logit is its head on the "
            f"last hidden state, or dpo, which needs no reward model"
        )


@torch.no_grad()
def write_samples(ctx: StageRun, model, tokenizer, groups, texts: dict, step: int, accelerator) -> None:
    """A few held-out responses with their scores, for a person to look at. texts: prompts as recorded, by id."""
    rows = []
    for group in groups:
        scores = score_all(
            model,
            [group.prompt] * len(group.responses),
            group.responses,
            pad_id=tokenizer.pad_token_id,
            batch_size=len(group.responses),
            accelerator=accelerator,
        )
        rows += [
            {"prompt": texts[group.id], "response": decode_response(tokenizer, r), "score": s}
            for r, s in zip(group.responses, scores.tolist(), strict=True)
        ]
    ctx.tracker.samples(step, rows)
