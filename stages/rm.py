"""Train a reward model on rankings: r(x, y), a scalar read at the last token of the response.

    loss = − 1/C(K,2) · Σ_pairs log σ( r(x, y_w) − r(x, y_l) )     (InstructGPT, eq. 1)

The batch's loss is the mean over its prompts. All pairs of a prompt are one batch element: one
forward pass over the prompt and its K responses, so each response contributes to one gradient.
(With loss_type: plackett_luce it is the likelihood of the whole order instead; davidson and
davidson_luce are the same two with ties.) Afterwards, a bias
makes the demonstrations score 0 on average: `reward_bias` in config.json.

With rm.start_from the models start as a reward model that is there, head and all.

Where rankings were kept for it (rankings.judge_fraction), one more model learns from those alone:
judge/model, with as many passes over its rankings as the others make over theirs. No policy climbs
it, so evaluate judges by it. With rm.held_out, a model of another seed learns from the rankings of
the first one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import sources
from data.encode import decode_response, encode_prompt, encode_response
from data.group_rows import count_pairs
from data.groups import PromptGroup, make_rows
from data.length_limit import LengthReport
from data.records import Demonstration, Ranking, prompt_key
from data.streams import Stream, derive_seed
from data.world.world import World
from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.stage import Source, StageRun
from stages.evaluation.statistics import pair_accuracy
from stages.evaluation.trust import trust
from stages.models.adapters import AdapterSettings, unwrapped, with_adapter
from stages.models.families import is_own_head, off_the_gpu
from stages.models.forward import response_scores
from stages.models.loading import load_scalar_model, load_tokenizer, new_reward_model
from stages.models.precision import require_finite
from stages.models.same_tokenizer import check_same_tokenizer
from stages.models.sharding import publishable
from stages.scorers.scorer import ScoreRequest
from stages.settings.experiment import Experiment
from stages.settings.policies import reward_models
from stages.settings.reward_base import trunk_stage
from stages.settings.rm import RMSettings
from stages.settings.training import TIE_LOSSES, total_steps
from stages.shared.cards import SCORE, ModelCard
from stages.shared.data_notes import DataNotes
from stages.shared.disk import say_written
from stages.shared.inputs import LengthLimit, load_groups, load_records, published, read_world
from stages.shared.provenance import Provenance, provenance_of
from stages.shared.publishing import adapter_base, publish_model
from stages.shared.row_cache import RowCache
from stages.shared.runtime import (
    Runtime,
    adapter_settings,
    can_pack_rows,
    check_context,
    compiling_of,
    note_default_rate,
    place_model,
    runtime_of,
    with_accelerator,
)
from stages.training.batching import group_order
from stages.training.checkpoint import save_groups
from stages.training.loop import Phase, fit
from stages.training.ranking import RankingModel, evaluate, ranking_task
from stages.training.session import Session, session_of
from stages.training.ties import learned_ties, tie_model, tie_note
from stages.training.trainee import trainee_of

JUDGE, HELD_OUT = "judge/model", "held_out/model"
"""The folders of the models that only judge."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out rankings."""

    groups: Sequence[PromptGroup]
    """The prompts with their responses, encoded."""
    rankings: list[Ranking]
    """The rankings that they were made of."""
    clusters: dict[str, str]
    """Cluster of each ranking, by its id, for intervals."""


@dataclass(frozen=True)
class Data:
    """Hold the data that the stage reads."""

    groups: Sequence[PromptGroup]
    """The prompts to train on, with their responses."""
    held_out: HeldOut
    """The held-out rankings."""
    judge: Sequence[PromptGroup]
    """The prompts that only the judge trains on; none where no rankings were kept for it."""
    demonstrations: list[Demonstration]
    """The demonstrations that score 0 on average."""
    report: LengthReport
    """How many rankings were cut or dropped."""

    tie_note: str = ""
    """What is said of ties, if there are any."""

    def all_groups(self) -> list[Sequence[PromptGroup]]:
        """Return the groups of every kind."""
        return [self.groups, self.held_out.groups, self.judge]


@dataclass
class Members:
    """The models of the stage that are trained already, with their figures."""

    figures: list[dict] = field(default_factory=list)
    """Figures of each trained model."""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Weights of each, under "member_K"; only where there are several."""


def run(ctx: StageRun[RMSettings, Experiment]) -> dict:
    """Publish model/, and ensemble/1/, …, held_out/model/ and judge/model/ if asked for.

    Each is an AutoModelForSequenceClassification with one label and reward_bias.
    """
    config, source = ctx.config, ctx.inputs[trunk_stage(ctx.experiment)] / "model"
    session, runtime, provenance = session_of(ctx), with_accelerator(runtime_of(ctx)), provenance_of(ctx)
    check_context(session, config, source)
    tokenizer = load_tokenizer(source, trust_remote_code=runtime.trust_remote_code)
    world = World.from_json(read_world(ctx.inputs)) if "world" in ctx.inputs else None
    cache = RowCache(ctx.cache, source, session.tracker, partial(session.leave_if_requested, 0, 0))
    data = load_data(
        config, tokenizer, ctx.inputs["rankings"], ctx.source("demonstrations"), world, cache, session.notes
    )
    held, steps = data.held_out, total_steps(config, len(data.groups))
    check_new_rows(ctx.manifests, provenance.model.peft and provenance.model.peft.method, tokenizer)
    names = reward_models(ctx.experiment, has_judge=len(data.judge) > 0)
    plan = [judge_steps(steps, data) if name == JUDGE else steps for name in names]
    session.say(plan_line(data, plan, names))
    if provenance.model.peft is not None:
        note_default_rate(session, config)
    members, margins, trusted = restore_members(session, steps), [], []
    for k, name in enumerate(names):
        # 1 the policy's trunk, or that of a base of its own; a new scalar head
        seed = member_seed(ctx.seed, k)
        start = None if name in (JUDGE, HELD_OUT) else config.start_from  # these owe earlier rounds nothing
        make = partial(
            make_model, source, runtime, adapter_settings(provenance.model), seed, start, config.head_init == "zero"
        )
        model = place_model(make, runtime, config.max_length, compiling_of(runtime, session))
        groups = data.judge if name == JUDGE else data.groups
        ties = tie_model(config, [config.loss_type], groups, data.all_groups(), runtime.accelerator.device, model)
        ctx.confirm_folders()
        trainee = trainee_of(
            config, model, plan[k], config.head_learning_rate, layout=runtime.layout, **learned_ties(config, ties)
        )
        if k == 0:
            sets = len(names) - 1 + (config.keep == "best")
            say_written(session, provenance, [model], [model], sum(plan), sets=sets, copies=len(names))
        packed = can_pack_rows(session, [model], config.max_length)
        ranker = RankingModel(model, tokenizer.pad_token_id, replace(runtime, packed=packed), ties)
        # 2 train
        is_new = k == len(members.figures)
        if is_new:
            batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
            order = group_order(groups, plan[k], batch_size, (ctx.seed, "rm"), k)
            task = ranking_task(config, ranker, groups, held.groups, order)
            phase = phase_of(members, k, plan)
            selection = config.selection("loss", higher_is_better=False)
            figures = fit(session, runtime.accelerator, trainee, task, config.schedule(plan[k]), selection, phase)
            members.figures.append(figures | (ties.published() if ties else {}))
            if len(names) > 1:
                members.tensors[f"member_{k}"] = {name: x.clone() for name, x in trainee.tensors().items()}
        else:
            trainee.load(members.tensors[f"member_{k}"])
        # 3 how far it can be trusted
        found = evaluate(config, ranker, held.groups)
        margins.append(found.margins)
        trusted.append(trust(found.margins, found.owners, held.groups, held.rankings, held.clusters))
        # 4 the bias: demonstrations score 0 on average
        bias = demonstration_mean(config, ranker, tokenizer, data.demonstrations, ctx.seed)
        unwrapped(model).config.reward_bias = bias
        if is_new:
            members.figures[k]["reward_bias"] = bias
        if is_new and k == 0:
            write_samples(session, ranker, tokenizer, held, members.figures[0]["steps"])
        # 5 publish
        model = publishable(model, make)
        if parallel.is_rank_zero():
            shortest = min(held.groups, key=lambda g: len(g.prompt))
            check_published_score(model, shortest, tokenizer.pad_token_id)
        publish(provenance, source, model, tokenizer, name, members.figures[k] | trusted[k])
        if is_new and k + 1 < len(names) and session.checkpoints.every:
            save_members(session, members, k, plan)
    pair_clusters = [held.clusters[held.groups[g].id] for g, _ in found.owners]
    figures = members.figures[0] | trusted[0] | accuracy_of_others(names, config.ensemble, margins, pair_clusters)
    ranked = ctx.manifests["rankings"]["metrics"]
    for key in ("accuracy_ceiling", "accuracy_ceiling_ci95"):
        figures[key] = ranked.get(key)
    if others := judge_figures(names, trusted, ranked):
        figures["judges"] = others
    return {**figures, "truncated": data.report.truncated, "dropped": data.report.dropped, **session.notes.figures}


def load_data(
    config: RMSettings,
    tokenizer: Any,
    rankings: Path,
    demonstrations: Source,
    world: World | None,
    cache: RowCache | None = None,
    notes: DataNotes | None = None,
) -> Data:
    """Load the rankings and the demonstrations.

    Args:
        config: The stage's settings.
        tokenizer: The tokenizer with its chat template.
        rankings: The artifact folder of the stage rankings.
        demonstrations: Where the demonstrations are.
        world: The embedded world, where the stage reads it: it knows the tasks of its prompts.
        cache: Where encoded rankings are kept.
        notes: Where it is said what is not taken of the data.
    """
    limit = LengthLimit(config.max_length, config.on_too_long, "rm")
    with_ties = config.loss_type in TIE_LOSSES
    groups, report = load_groups(rankings / "train.jsonl", tokenizer, limit, cache, with_ties)
    held_groups, held_report = load_groups(rankings / "validation.jsonl", tokenizer, limit, cache, with_ties)
    ties = report.ties
    judge, file = [], rankings / "judge.jsonl"
    if file.is_file():
        judge, judge_report = load_groups(file, tokenizer, limit, cache, with_ties)
        report += judge_report
    validation = sources.load("rankings", published(rankings / "validation.jsonl"))
    return Data(
        groups=groups,
        held_out=HeldOut(held_groups, validation, clusters_of(validation, world)),
        judge=judge,
        demonstrations=load_records("demonstrations", demonstrations, notes),
        report=report + held_report,
        tie_note=tie_note(ties, with_ties),
    )


# -- several models, one after the other ---------------------------------------------------------


def judge_steps(steps: int, data: Data) -> int:
    """Return the judge's steps: as many passes over its rankings as others make over theirs.

    Args:
        steps: Steps of each of the others.
        data: The data.
    """
    return max(1, round(steps * len(data.judge) / len(data.groups)))


def plan_line(data: Data, plan: list[int], names: list[str]) -> str:
    """Return the line that says what is trained on what, for how long.

    Args:
        data: The data.
        plan: Steps of each model.
        names: Folders of the models.
    """
    others = len(names) - (JUDGE in names)
    pairs = f"{count_pairs(data.groups)} pairs{data.tie_note}"
    line = f"{data.report.line('rankings')}; {pairs}; {len(data.held_out.groups)} rankings held out"
    line += f"; {plan[0]} steps" + (f" for each of {others} models" if others > 1 else "")
    return f"{line}; {plan[-1]} for a judge, on {len(data.judge)} rankings of its own" if JUDGE in names else line


def restore_members(session: Session, steps: int) -> Members:
    """Return the models that an interrupted run has trained.

    Args:
        session: The run.
        steps: Steps of each model, as the settings ask.

    Raises:
        UserError: Each model of the interrupted run takes another number of steps.
    """
    checkpoint = session.checkpoints.newest()
    if checkpoint is None:
        return Members()
    before = checkpoint.state.get("steps", steps)
    if before != steps:
        raise UserError(
            f"rm: each model of the interrupted run takes {before} steps, and rm.max_steps or rm.num_train_epochs now "
            f"ask for {steps}; set them back to resume, --restart starts again"
        )
    figures = list(checkpoint.state.get("members", []))
    tensors = {f"member_{k}": checkpoint.tensors(f"member_{k}") for k in range(len(figures))}
    return Members(figures, tensors)


def phase_of(members: Members, k: int, plan: list[int]) -> Phase:
    """Return the place of a model's training in the stage.

    Args:
        members: The models that are trained already.
        k: Index of the model.
        plan: Steps of each model.
    """
    state: dict[str, Any] = {"members": members.figures}
    if len(plan) > 1:
        state["steps"] = plan[0]
    return Phase(first=sum(plan[:k]), total=sum(plan), tensors=members.tensors, state=state)


def save_members(session: Session, members: Members, k: int, plan: list[int]) -> None:
    """Save a checkpoint between two models.

    Args:
        session: The run.
        members: The models that are trained.
        k: Index of the last of them.
        plan: Steps of each model.
    """
    state = {"members": members.figures, "steps": plan[0]}
    save_groups(session, sum(plan[: k + 1]), sum(plan), members.tensors, state)
    session.finish_saves()  # the next model's training looks for the newest checkpoint


def accuracy_of_others(
    names: list[str], ensemble: int, margins: list[list[float]], clusters: list[str]
) -> dict[str, Any]:
    """Return the accuracy of the ensemble, by the mean of its scores, and of the held-out model.

    Args:
        names: Folders of all models.
        ensemble: How many of them, from the first, are the ensemble.
        margins: Margins of all held-out pairs, for each model.
        clusters: The cluster of each pair.
    """
    figures: dict[str, Any] = {}
    if ensemble > 1:
        mean = [sum(scores) / ensemble for scores in zip(*margins[:ensemble], strict=True)]
        together = pair_accuracy(mean, clusters)
        figures |= {"ensemble_accuracy": together["accuracy"], "ensemble_accuracy_ci95": together["accuracy_ci95"]}
    if HELD_OUT in names:
        other = pair_accuracy(margins[names.index(HELD_OUT)], clusters)
        figures |= {"held_out_accuracy": other["accuracy"], "held_out_accuracy_ci95": other["accuracy_ci95"]}
    return figures


def judge_figures(names: list[str], trusted: list[dict], ranked: dict[str, Any]) -> dict[str, dict]:
    """Return what is known of the models that only judge, by judge.

    Args:
        names: Folders of all models.
        trusted: How far each of them can be trusted.
        ranked: The figures of the stage rankings.
    """
    figures = {}
    for judge, folder in (("kept", JUDGE), ("held_out", HELD_OUT)):
        if folder in names:
            own = trusted[names.index(folder)]
            figures[judge] = {key: own[key] for key in ("accuracy", "accuracy_ci95", "n_pairs", "ece")}
    if "kept" in figures:
        figures["kept"] |= {"rankings": ranked.get("judge"), "labelers_apart": ranked.get("judge_labelers_apart")}
    return figures


def member_seed(seed: int, k: int) -> int:
    """Return the seed of the k-th model: the experiment's for the first, others for the rest."""
    return derive_seed(seed, "member", k) if k else seed


def check_new_rows(manifests: dict[str, dict], method: str | None, tokenizer: Any) -> None:
    """Check that no adapter is trained on a base of rm's own whose new rows nothing has trained.

    Args:
        manifests: Of the upstream stages; rm_base is there only where rm starts from it as it is.
        method: Of the adapter; None: all weights train.
        tokenizer: Gives the tokens' names.

    Raises:
        UserError: There are such rows.
    """
    new = manifests.get("rm_base", {}).get("metrics", {}).get("new_tokens", [])
    if new and method is not None:
        tokens = ", ".join(tokenizer.convert_ids_to_tokens(new[:8]))
        raise UserError(
            f"rm.base.sft: false leaves the new rows of {tokens} random, which {method} does not train in rm; set it "
            f"to true, or rm.peft: full"
        )


def make_model(
    source: Path,
    runtime: Runtime,
    adapter: AdapterSettings,
    seed: int,
    start: str | None = None,
    zero_head: bool = False,
) -> nn.Module:
    """Return an untrained reward model: the policy's trunk, a new scalar head, an adapter if any.

    Args:
        source: The folder of the policy.
        runtime: How the stage computes.
        adapter: As `adapter_settings` gives it.
        seed: Seed of the head and the adapter.
        start: The folder of a reward model to start from instead; None: none.
        zero_head: Whether a new head starts at zero.

    Raises:
        UserError: That folder is of another tokenizer.
    """
    if start is not None:
        folder, trust = Path(start).expanduser(), {"trust_remote_code": runtime.trust_remote_code}
        check_same_tokenizer(load_tokenizer(source, **trust), load_tokenizer(folder, **trust), "rm.start_from")
        model = load_scalar_model(folder, **runtime.load_options())
        model.config.reward_bias = 0.0  # another one is measured at the end
        return model
    model = new_reward_model(source, seed=seed, zero_head=zero_head, **runtime.load_options())
    return with_adapter(model, adapter, scalar=True, seed=seed)


# -- training ------------------------------------------------------------------------------------


# -- held-out rankings ---------------------------------------------------------------------------


def clusters_of(validation: list[Ranking], world: World | None) -> dict[str, str]:
    """Return the cluster of each ranking, by its id: its task if known, otherwise its prompt.

    Args:
        validation: The held-out rankings.
        world: The embedded world, where the stage reads it; rankings may be of other prompts.
    """
    if world is None or not all(world.knows(r.prompt) for r in validation):
        return {r.id: prompt_key(r.prompt) for r in validation}
    return {r.id: str(world.task(r.prompt)) for r in validation}


@torch.no_grad()
def write_samples(session: Session, ranker: RankingModel, tokenizer: Any, held: HeldOut, step: int) -> None:
    """Write a few held-out responses with their scores to samples.jsonl.

    Args:
        session: The run.
        ranker: The model.
        tokenizer: Its tokenizer.
        held: The held-out rankings.
        step: The step that the samples are recorded under.
    """
    prompts = {ranking.id: ranking.prompt for ranking in held.rankings}
    rows = []
    for group in held.groups[:4]:
        count = len(group.responses)
        request = ScoreRequest([group.prompt] * count, group.responses, tokenizer)
        scores = ranker.scorer(batch_size=count).score(request).total
        rows += [
            {"prompt": prompts[group.id], "response": decode_response(tokenizer, r), "score": s}
            for r, s in zip(group.responses, scores.tolist(), strict=True)
        ]
    session.tracker.samples(step, rows)


# -- the published score -------------------------------------------------------------------------


@torch.no_grad()
def demonstration_mean(
    config: RMSettings, ranker: RankingModel, tokenizer: Any, demonstrations: list[Demonstration], seed: int
) -> float:
    """Return the mean score of demonstrations, before the bias is subtracted.

    Args:
        config: The stage's settings: `bias_demonstrations` are scored that fit in max_length.
        ranker: The model.
        tokenizer: Its tokenizer.
        demonstrations: The demonstrations to draw from.
        seed: The experiment's seed.

    Raises:
        UserError: No demonstration fits.
    """
    pairs = []
    for i in Stream(len(demonstrations), derive_seed(seed, "bias")).take(len(demonstrations)):
        row = demonstrations[i]
        pair = (encode_prompt(tokenizer, row.prompt), encode_response(tokenizer, row.completion))
        if sum(map(len, pair)) <= config.max_length:
            pairs.append(pair)
        if len(pairs) == config.bias_demonstrations:
            break
    if not pairs:
        raise UserError(
            [
                f"data.demonstrations: none of them fits in rm.max_length {config.max_length}, and the mean score 0 "
                f"is taken over them; raise it"
            ]
        )
    prompts, responses = zip(*pairs, strict=True)
    scorer = ranker.scorer(batch_size=4 * config.per_device_train_batch_size)
    scores = scorer.score(ScoreRequest(prompts, responses, tokenizer)).total
    require_finite(scores, "rm: scores of demonstrations")
    return scores.double().mean().item()


@torch.no_grad()
def check_published_score(model: nn.Module, group: PromptGroup, pad_id: int) -> None:
    """Check that the published model, used as its card says, gives the score that PPO optimizes.

    Args:
        model: The reward model as it will be published, on the CPU.
        group: A held-out prompt and its responses; the first that is not empty is scored.
        pad_id: Id of the padding.

    Raises:
        UserError: The model's own logit minus reward_bias is another value.
    """
    response = next((r for r in group.responses if r), [])
    inner = unwrapped(model)
    with off_the_gpu(inner):
        ours = response_scores(model, make_rows([group.prompt], [response], pad_id)).item()
        inner.eval()
        logit = inner(input_ids=torch.tensor([group.prompt + response])).logits[0, 0].item()
    theirs = logit - inner.config.reward_bias
    if not abs(ours - theirs) <= 1e-4 * max(1.0, abs(ours)):
        raise UserError(
            f"rm: {type(inner).__name__} gives a response the logit {theirs:.5f} (minus reward_bias), but its score "
            f"here is {ours:.5f}, so the published model would give other scores; take a family whose logit is its "
            f"head on the last hidden state, or dpo, which needs no reward model"
        )


def publish(provenance: Provenance, source: Path, model: nn.Module, tokenizer: Any, name: str, figures: dict) -> None:
    """Write a reward model to its folder.

    Args:
        provenance: What the model was made of.
        source: The folder of the model that it started as.
        model: The model, whole.
        tokenizer: Its tokenizer.
        name: Name of the folder.
        figures: What was measured.
    """
    folder = provenance.publish / name
    card = ModelCard(
        "a reward model",
        SCORE,
        figures=figures,
        source=source,
        adapter=adapter_base(provenance, folder, source),
        own_head=is_own_head(unwrapped(model)),
    )
    publish_model(provenance, model, tokenizer, folder, card)
