"""Publish rankings of several responses to each prompt: for training, validation and a judge.

Either people's rankings, checked and split; or, in the embedded world, K responses of SFT to each
prompt, ranked by simulated labelers. The split is by prompt, and in the embedded world by request.
There `labelers_per_prompt` of five labelers rank a training prompt, and two of them rank every
validation prompt, so that their agreement can be computed.

With `judge_fraction` some rankings train a reward model that only judges (judge.jsonl). Of people's
rankings they are a part; in the embedded world they are of further prompts, so that training keeps
all of its own.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.encode import decode_response
from data.error_lines import shorten
from data.records import Ranking, prompt_key, write_jsonl
from data.streams import Stream, derive_seed, held_out, position_of
from data.world.world import World, labelers
from pipeline.config.sections import LaunchSettings
from pipeline.errors import UserError
from pipeline.stage import Source, StageRun
from stages.evaluation.statistics import agreement_figures, prompt_of, share_of_counts
from stages.models.loading import load_policy, load_tokenizer
from stages.rollouts.engine import EngineLost, SampleRequest
from stages.rollouts.frozen import FrozenSampler
from stages.scorers.labels import ToRank, finished_only, rank_by_scorers, rank_some, scorers_of, with_noise
from stages.scorers.scorer import ScorerSpec
from stages.settings.experiment import Experiment
from stages.settings.policies import judge_share
from stages.settings.rankings import RankingsSettings
from stages.settings.rollout import EngineSettings
from stages.settings.scorers.common import ScorerSection
from stages.shared import kept_rankings
from stages.shared.engines import engine_spec, make_frozen_sampler
from stages.shared.given_rankings import Shares, refuse_no_pair, split_given, usable_pairs
from stages.shared.inputs import LengthLimit, fit_prompts, load_placed_records, read_world
from stages.shared.kept_rankings import split_rankings
from stages.shared.runtime import Runtime, can_pack_rows, check_context, place_frozen, runtime_of, with_accelerator
from stages.shared.source_words import recorded_rows
from stages.training.batching import micro_batches
from stages.training.session import Session, session_of

MANY_UNFINISHED = 0.1
"""Share of unfinished responses above which a warning is printed."""


@dataclasses.dataclass(frozen=True)
class SampledResponses:
    """K responses of SFT to each of P prompts."""

    prompts: list[str]
    """The prompts."""
    texts: list[list[str]]
    """The responses, (P, K)."""
    finished: list[list[bool]]
    """Whether each response ended with EOS, (P, K)."""
    rows: list[dict] = dataclasses.field(default_factory=list)
    """The row of data of each prompt, with all its keys, for scorers."""
    places: list[str] = dataclasses.field(default_factory=list)
    """The location of each row, for error lines."""

    def part(self, start: int, end: int) -> "SampledResponses":
        """Return the responses to some of the prompts."""
        chosen = slice(start, end)
        return SampledResponses(
            self.prompts[chosen], self.texts[chosen], self.finished[chosen], self.rows[chosen], self.places[chosen]
        )

    @property
    def answers(self) -> list[list[tuple[str, bool]]]:
        """The text of each response and whether it is finished, as in `Ranking.answers`."""
        return [self.answers_to(i) for i in range(len(self.prompts))]

    def answers_to(self, prompt: int) -> list[tuple[str, bool]]:
        """Return the text of each response to a prompt and whether it is finished."""
        return list(zip(self.texts[prompt], self.finished[prompt], strict=True))

    @property
    def unfinished_share(self) -> float:
        """The share of responses that were cut off."""
        flags = [ended for row in self.finished for ended in row]
        return sum(not ended for ended in flags) / len(flags)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """SFT and what is needed to sample from it."""

    engine: FrozenSampler
    """What samples from SFT."""
    policy: Any
    """The SFT model, whole or sharded."""
    tokenizer: Any
    """Its tokenizer."""
    settings: RankingsSettings
    """The section rankings."""
    seed: int
    """The experiment's seed."""

    def sample(self, indices: Sequence[int], ids: Sequence[list[int]], poll: Callable) -> list[list[list[int]]]:
        """Sample K responses to each of some prompts, on all ranks together.

        Args:
            indices: Which prompts.
            ids: The ids of all prompts.
            poll: Called between tokens; raises if the run is to stop.

        Returns:
            The ids of K responses for each index.

        Raises:
            EngineLost: Another engine than SFT itself fails.
        """
        count = self.settings.samples_per_prompt
        seeds = [derive_seed(self.seed, "sample", i, k) for i in indices for k in range(count)]
        request = SampleRequest(
            prompts=[ids[i] for i in indices for _ in range(count)],
            seeds=seeds,
            samples_per_prompt=count,
            response_length=self.settings.response_length,
            temperature=self.settings.temperature,
            eos_id=self.tokenizer.eos_token_id,
            top_k=self.settings.top_k,
            top_p=self.settings.top_p,
        )
        flat = self.engine.sample("sft", self.policy, request, len(seeds), poll)
        return list(micro_batches(flat, count))


def run(ctx: StageRun[RankingsSettings, Experiment]) -> dict:
    """Publish train.jsonl and validation.jsonl, and judge.jsonl if some are kept for a judge.

    Returns:
        The figures for the manifest.
    """
    settings, session = ctx.config, session_of(ctx, trains=False)
    share = judge_share(ctx.experiment)
    if ctx.experiment.data.rankings is not None:
        rows = recorded_rows(ctx.data.get("rankings", {}))
        shares = Shares(settings.validation_fraction, share, is_set=settings.judge_fraction is not None)
        return split_given(ctx.source("rankings"), shares, ctx.publish, session, rows)
    world = None if settings.scorer is not None else World.from_json(read_world(ctx.inputs))
    runtime, folder = with_accelerator(runtime_of(ctx)), ctx.inputs["sft"] / "model"
    responses, count = sample_responses(
        settings, session, runtime, folder, ctx.source("prompts"), ctx.experiment.launch, world, share
    )
    if settings.scorer is not None:
        return publish_by_scorers(settings.scorer, responses, runtime, ctx, share)
    assert world is not None, "nobody else ranks"
    rows, figures = simulate(world, responses.part(0, count), settings, session)
    keys = request_keys(world, [row.prompt for row in rows], session.seed)
    train, validation = held_out(keys, settings.validation_fraction)
    sides = {"train": [rows[i] for i in train], "validation": [rows[i] for i in validation]}
    further = responses.part(count, len(responses.prompts))
    if further.prompts:
        labelers_of = [settings.labelers_per_prompt] * len(further.prompts)
        judged, noise = judged_of(further, settings), figures["noise"]
        ranked = rank_all(further, utilities_of(world, further), judged, labelers_of, noise, session.seed, count)
        sides["judge"] = [row for _, row in ranked]
        session.say(f"{len(further.prompts)} further prompts are ranked to train a judge")
    for name, some in sides.items():
        refuse_no_pair(name, len(some), sum(usable_pairs(row) for row in some), responses.unfinished_share)
        write_jsonl(ctx.publish / f"{name}.jsonl", some)
    return {
        "rankings": len(rows),
        "pairs": sum(usable_pairs(row) for row in rows),
        **{name: len(some) for name, some in sides.items()},
        **agreement_figures((rows[i] for i in validation), lambda row: str(world.task(row.prompt))),
        **figures,
        **session.notes.figures,
    }


def warn_of_cut_off(responses: SampledResponses, settings: RankingsSettings, session: Session) -> None:
    """Say so if many responses were cut off.

    Where they are ranked, no model learns from them how to end. The reward model scores them at a
    token that is no end of turn, and learns first to tell them from the others.

    Args:
        responses: SFT's responses.
        settings: The section rankings.
        session: Where lines go.
    """
    if responses.unfinished_share > MANY_UNFINISHED:
        remedy = "raise rankings.response_length"
        if ranks_unfinished(settings):
            remedy += ", or set rankings.rank_unfinished=false"
        session.say(f"{responses.unfinished_share:.0%} of the responses were cut off; {remedy}")


def ranks_unfinished(settings: RankingsSettings) -> bool:
    """Return whether labelers rank responses that were cut off."""
    return settings.rank_unfinished is not False


def judged_of(responses: SampledResponses, settings: RankingsSettings) -> list[list[int]]:
    """Return for each prompt the indices of the responses that labelers rank."""
    every = ranks_unfinished(settings)
    return [[k for k, ended in enumerate(row) if ended or every] for row in responses.finished]


# -- rankings by scorers -------------------------------------------------------------------------


def publish_by_scorers(
    scorers: Sequence[ScorerSection],
    responses: SampledResponses,
    runtime: Runtime,
    ctx: StageRun[RankingsSettings, Experiment],
    judge: float,
) -> dict:
    """Publish rankings of SFT's responses by scorers, split by prompt.

    Args:
        scorers: The settings of what scores.
        responses: SFT's responses.
        runtime: How reward models compute.
        ctx: The stage's context.
        judge: The share of prompts whose rankings are kept for a judge.

    Returns:
        The figures for the manifest.
    """
    settings, session = ctx.config, session_of(ctx, trains=False)
    lines = [line for one in scorers for line in one.row_problems(responses.rows, responses.places)]
    if lines:
        raise UserError(shorten(lines))
    tokenizer = load_tokenizer(ctx.inputs["sft"] / "model", trust_remote_code=runtime.trust_remote_code)
    spec = ScorerSpec(
        reward_model=None,
        pad_id=tokenizer.pad_token_id,
        accelerator=runtime.accelerator,
        batch_size=settings.batch_size,
        records=session.checkpoints.folder.with_name("scores"),
        say=session.say,
        trust_remote_code=runtime.trust_remote_code,
    )
    scorer = scorers_of(scorers, spec)
    ctx.confirm_folders()  # the named ones have been loaded
    warn_of_cut_off(responses, settings, session)
    prompts = [
        ToRank(*one) for one in zip(responses.prompts, responses.answers, responses.rows, responses.places, strict=True)
    ]
    poll = session.interrupt(0, 0, lambda: None)
    rankings = rank_by_scorers(scorer, prompts, tokenizer, settings.tie_within or 0.0, poll)
    scorer.close()
    if not ranks_unfinished(settings):
        rankings = [finished_only(one) for one in rankings]
    keys = {  # wordings of one row are on one side
        prompt_key(prompt): prompt_key(row.get("row_text") or prompt)
        for prompt, row in zip(responses.prompts, responses.rows, strict=True)
    }
    positions = np.array([position_of(keys[prompt_key(one.prompt)]) for one in rankings])
    split = split_rankings(positions, np.full(len(rankings), -1), [], settings.validation_fraction, judge)
    by_prompt, figures = [[one] for one in rankings], {}
    if settings.scorer_agreement is not None:
        counts = [2 if s == kept_rankings.VALIDATION else settings.labelers_per_prompt for s in split.sides]
        by_prompt, figures = with_noise(rankings, counts, settings.scorer_agreement, session.seed)
        held = [(i, one) for i in np.flatnonzero(split.sides == kept_rankings.VALIDATION) for one in by_prompt[i]]
        scores = [np.array([rankings[i].scores], float) for i, _ in held]  # labelers differ in their noise alone
        rows = [one for _, one in held]
        figures |= agreement_figures(rows)
        figures |= ceiling_figures(scores, rows, [prompt_of(one) for one in rows], figures["noise"])
    sides = {"train": kept_rankings.TRAIN, "validation": kept_rankings.VALIDATION}
    if judge:
        sides["judge"] = kept_rankings.JUDGE
    published, pairs = {}, 0
    for name, side in sides.items():
        published[name] = [one for i in np.flatnonzero(split.sides == side) for one in by_prompt[i]]
        own_pairs = sum(map(usable_pairs, published[name]))
        refuse_no_pair(name, len(published[name]), own_pairs, responses.unfinished_share)
        pairs += own_pairs
        write_jsonl(ctx.publish / f"{name}.jsonl", published[name])
    every = [score for ranking in rankings for score in ranking.scores or () if score is not None]
    return {
        "rankings": sum(map(len, published.values())),
        "pairs": pairs,
        **{name: len(some) for name, some in published.items()},
        "score": float(np.mean(every)),
        "unfinished": responses.unfinished_share,
        **figures,
        **session.notes.figures,
    }


# -- rankings by simulated labelers --------------------------------------------------------------


def request_keys(world: World, prompts: Sequence[str], seed: int) -> list[str]:
    """Return a key for each of the world's prompts; prompts with one key are not split.

    The key is the request. Otherwise the same question after another greeting, and the same
    responses to it, would be on both sides.
    """
    return [f"{seed} {world.request(prompt)}" for prompt in prompts]


def simulate(
    world: World, responses: SampledResponses, settings: RankingsSettings, session: Session
) -> tuple[list[Ranking], dict[str, float]]:
    """Let simulated labelers rank responses.

    Their noise is calibrated on these responses, so that two labelers agree as often as
    `rankings.agreement` says.

    Args:
        world: The embedded world, which knows how good a response is.
        responses: SFT's responses.
        settings: The section rankings.
        session: The run: its seed, and where lines go.

    Returns:
        The rankings, and figures for the manifest.
    """
    prompts, utilities, judged = responses.prompts, utilities_of(world, responses), judged_of(responses, settings)
    ranked_utilities = [utility[:, own] for utility, own in zip(utilities, judged, strict=True)]
    ranked_answers = [[row[k] for k in own] for row, own in zip(responses.answers, judged, strict=True)]
    try:
        noise = labelers.calibrate_noise(ranked_utilities, ranked_answers, settings.agreement)
    except ValueError as problem:
        # The responses of a poor SFT model hardly differ in quality, so only taste is left to
        # disagree on.
        session.say(f"{problem}: they rank without noise; train base and sft longer")
        noise = labelers.NO_NOISE
    warn_of_cut_off(responses, settings, session)
    keys = request_keys(world, prompts, session.seed)
    validation = set(held_out(keys, settings.validation_fraction)[1])
    labelers_of = [2 if i in validation else settings.labelers_per_prompt for i in range(len(prompts))]
    ranked_rows = rank_all(responses, utilities, judged, labelers_of, noise, session.seed)
    ranked, rows = [i for i, _ in ranked_rows], [row for _, row in ranked_rows]
    held = [at for at, i in enumerate(ranked) if i in validation]
    rows_held = [rows[at] for at in held]
    tasks = [str(world.task(row.prompt)) for row in rows_held]
    return rows, {
        "noise": noise,
        "unfinished": responses.unfinished_share,
        "expected_agreement": labelers.expected_agreement(ranked_utilities, ranked_answers, noise),
        **ceiling_figures([utilities[ranked[at]] for at in held], rows_held, tasks, noise),
    }


def ceiling_figures(
    utilities: Sequence[np.ndarray], rankings: Sequence[Ranking], clusters: Sequence[str], noise: float
) -> dict[str, Any]:
    """Return the best accuracy that is possible on held-out rankings, for the manifest.

    Args:
        utilities: For each ranking what every labeler thinks of its responses, (labelers, K).
        rankings: The held-out rankings.
        clusters: The cluster of each.
        noise: The temperature of the labelers' noise.
    """
    ranks, answers = [list(one.ranks) for one in rankings], [list(one.answers) for one in rankings]
    ceiling = labelers.accuracy_ceiling(utilities, ranks, answers, noise)
    return {
        "accuracy_ceiling": ceiling["realised"],
        "accuracy_ceiling_ci95": ceiling_interval(ceiling["by_prompt"], clusters),
        "expected_accuracy_ceiling": ceiling["expected"],
    }


def ceiling_interval(by_ranking: Sequence[tuple[float, int]], keys: Sequence[str]) -> list[float] | None:
    """Return the 95 % interval of the accuracy ceiling over clusters; None without a pair.

    Args:
        by_ranking: For each held-out ranking, (pairs that are right, pairs).
        keys: The cluster of each: its task, or its prompt.
    """
    counts: dict[str, tuple[float, int]] = {}
    for (right, pairs), key in zip(by_ranking, keys, strict=True):
        before = counts.get(key, (0.0, 0))
        counts[key] = (before[0] + right, before[1] + pairs)
    counts = {key: own for key, own in counts.items() if own[1]}
    return share_of_counts(counts)["ci95"] if counts else None


def utilities_of(world: World, responses: SampledResponses) -> list[np.ndarray]:
    """Return what each labeler thinks of the responses to each prompt, (labelers, K) each."""
    columns = zip(responses.prompts, responses.texts, responses.finished, strict=True)
    return [world.labeler_utilities(*row) for row in columns]


def rank_all(
    responses: SampledResponses,
    utilities: Sequence[np.ndarray],
    judged: Sequence[Sequence[int]],
    labelers_of: Sequence[int],
    noise: float,
    seed: int,
    first: int = 0,
) -> list[tuple[int, Ranking]]:
    """Let some labelers rank the responses to each prompt.

    Args:
        responses: SFT's responses to P prompts.
        utilities: What each labeler thinks of them, as of `utilities_of`.
        judged: Indices of the responses to each prompt that are ranked.
        labelers_of: The number of labelers who rank each prompt, (P,).
        noise: The temperature of their noise.
        seed: The experiment's seed.
        first: The number of the first prompt, which labelers and noise are drawn by.

    Returns:
        (index of the prompt, ranking) of each.
    """
    rows: list[tuple[int, Ranking]] = []
    for i, prompt in enumerate(responses.prompts):
        number = first + i
        chooser = random.Random(derive_seed(seed, "labeler", number))
        for k in chooser.sample(range(len(labelers.LABELERS)), labelers_of[i]):
            rng = np.random.default_rng(derive_seed(seed, "rank", number, k))
            ranks = rank_some(utilities[i][k], judged[i], noise, rng, responses.answers_to(i))
            name = labelers.LABELERS[k].name
            texts, ended = tuple(responses.texts[i]), tuple(responses.finished[i])
            rows.append((i, Ranking(f"{number:05d}-{name}", prompt, texts, ranks, name, finished=ended)))
    return rows


def sample_responses(
    settings: RankingsSettings,
    session: Session,
    runtime: Runtime,
    folder: Path,
    source: Source,
    launch: LaunchSettings,
    world: World | None,
    judge: float,
) -> tuple[SampledResponses, int]:
    """Sample K responses of SFT to each prompt, with checkpoints between batches.

    Args:
        settings: The section rankings.
        session: The run; it resumes from its newest checkpoint.
        runtime: How the stage computes.
        folder: The folder of the SFT model.
        source: Where the prompts are.
        launch: The section launch, which says how another engine than SFT itself runs.
        world: The embedded world, which has further prompts; None where scorers rank.
        judge: As many prompts more, as a share of the prompts, are for the judge.

    Returns:
        The responses, those for the judge last; the number of prompts that are not for the judge.
    """
    check_context(session, settings, folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=runtime.trust_remote_code)
    policy = place_frozen(partial(load_policy, folder, **runtime.load_options()), runtime, settings.max_length)
    can_pack_rows(
        session, [policy], settings.max_length
    )  # lets the sampler compute each prompt once for all of its samples

    records, locations = load_placed_records("prompts", source, session.notes)
    count = min(len(records), settings.num_prompts or len(records))
    chosen = Stream(len(records), derive_seed(session.seed, "prompts")).take(count)
    prompts = [records[i].prompt for i in chosen]
    limit = LengthLimit(settings.max_length, settings.on_too_long, session.stage)
    kept, ids, report = fit_prompts(tokenizer, prompts, [locations[i] for i in chosen], limit, settings.response_length)
    session.say(f"{report.line('prompts')}; {settings.samples_per_prompt} samples each")

    asked, count = [prompts[i] for i in kept], len(kept)
    if world is not None and round(judge * count):
        further = further_prompts(world, asked, round(judge * count), settings.validation_fraction, session.seed)
        names = [f"further prompt {i} of the embedded world" for i in range(1, len(further) + 1)]
        fitting, further_ids, _ = fit_prompts(tokenizer, further, names, limit, settings.response_length)
        asked, ids = asked + [further[i] for i in fitting], [*ids, *further_ids]

    rollout = settings.rollout or EngineSettings()
    spec = engine_spec(
        rollout.engine,
        folder,
        runtime,
        launch,
        work=session.checkpoints.folder.parent,
        pad_id=tokenizer.pad_token_id,
        max_length=settings.max_length,
        batch_size=settings.batch_size * settings.samples_per_prompt,
    )
    engine = make_frozen_sampler("rankings", rollout, spec, session.say)
    sampler = Sampler(engine, policy, tokenizer, settings, session.seed)
    responses = sample_in_batches(sampler, asked, ids, count, session)
    engine.close()
    places = [locations[chosen[i]] for i in kept]
    rows = [records[chosen[i]].row() for i in kept]
    return dataclasses.replace(responses, rows=rows, places=places), count


def further_prompts(world: World, prompts: list[str], count: int, validation: float, seed: int) -> list[str]:
    """Return prompts of the embedded world for a judge, whose requests are not in validation.

    Its requests are few, so training has most of them too, in other words.

    Args:
        world: The embedded world.
        prompts: The prompts whose rankings train, and are held out.
        count: How many prompts to return.
        validation: The share of requests that is held out.
        seed: The experiment's seed.

    Raises:
        UserError: There are not so many.
    """
    keys = request_keys(world, prompts, seed)
    held = {world.request(prompts[i]) for i in held_out(keys, validation)[1]}
    try:
        return world.further_prompts(count, without=held)
    except ValueError as problem:
        raise UserError(f"rankings.judge_fraction: {problem}; lower it, or world.prompts") from None


def sample_in_batches(
    sampler: Sampler, prompts: list[str], ids: Sequence[list[int]], count: int, session: Session
) -> SampledResponses:
    """Sample responses to all prompts in batches.

    Args:
        sampler: SFT.
        prompts: P prompts.
        ids: Their ids through the chat template.
        count: How many of them, from the first, are not for the judge. No batch has both kinds, so
            that those are sampled as they are without a judge.
        session: The run; it resumes from its newest checkpoint.

    Returns:
        The responses.
    """
    checkpoint = session.checkpoints.newest()
    texts: list[list[str]] = checkpoint.state["texts"] if checkpoint else []
    finished: list[list[bool]] = checkpoint.state["finished"] if checkpoint else []
    if len(texts) > len(prompts):
        raise UserError(
            f"rankings.num_prompts: the interrupted run has responses to {len(texts)} prompts, and only "
            f"{len(prompts)} are set now; set more, or use --restart"
        )
    size, eos_id = sampler.settings.batch_size, sampler.tokenizer.eos_token_id
    first = checkpoint.step if checkpoint else 0
    # batch_size may have changed since
    total = first + sum(
        -(-left // size) for left in (max(0, count - len(texts)), len(prompts) - max(count, len(texts)))
    )

    def save(step: int) -> None:
        if step:
            session.checkpoints.save(step, {}, {"texts": texts, "finished": finished}, total)

    with session.tracker.progress(total, "rankings", first) as progress:
        for step in range(first + 1, total + 1):
            end = count if len(texts) < count else len(prompts)
            batch = range(len(texts), min(len(texts) + size, end))
            poll = session.interrupt(step - 1, total, partial(save, step - 1))
            try:
                sampled = sampler.sample(batch, ids, poll)
            except EngineLost:
                save(step - 1)
                raise
            for responses in sampled:
                texts.append([decode_response(sampler.tokenizer, response) for response in responses])
                finished.append([response[-1] == eos_id for response in responses])
            progress.update(step)
            if step < total and session.save_is_due(step):
                save(step)
    return SampledResponses(prompts, texts, finished)
