"""Publish rankings of several responses to each prompt, split into training and validation.

Either people's rankings, checked and split; or, in the embedded world, K responses of SFT to each
prompt, ranked by simulated labelers. The split is by prompt, and in the embedded world by request.
There `labelers_per_prompt` of five labelers rank a training prompt, and two of them rank every
validation prompt, so that their agreement can be computed.
"""

import dataclasses
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data import sources
from data.encode import decode_response
from data.error_lines import shorten
from data.group_rows import ROWS_AT_ONCE
from data.records import Ranking, jsonl_writer, judged_pairs, prompt_key, write_jsonl
from data.row_reader import records
from data.source import Loaded
from data.streams import Stream, derive_seed, held_out, held_out_limit, position_of
from data.world.world import World, labelers
from pipeline.config.sections import LaunchSettings
from pipeline.errors import UserError
from pipeline.stage import Source, StageRun
from stages.evaluation.statistics import labeler_agreement
from stages.models.loading import load_policy, load_tokenizer
from stages.rollouts.engine import EngineLost, SampleRequest
from stages.rollouts.frozen import FrozenSampler
from stages.scorers.labels import ToRank, rank_by_scorers, scorers_of
from stages.scorers.scorer import ScorerSpec
from stages.settings.checks import reader_source
from stages.settings.experiment import Experiment
from stages.settings.rankings import RankingsSettings
from stages.settings.rollout import EngineSettings
from stages.settings.scorers.common import ScorerSection
from stages.shared.engines import engine_spec, make_frozen_sampler
from stages.shared.inputs import LengthLimit, fit_prompts, load_placed_records, published, read_world
from stages.shared.runtime import Runtime, can_pack_rows, check_context, place_frozen, runtime_of, with_accelerator
from stages.shared.source_words import recorded_rows
from stages.training.batching import micro_batches
from stages.training.session import Session, session_of

Item = TypeVar("Item")

MANY_ROWS = 10_000
"""Rankings from which on progress is shown."""
NO_NOISE = 1e-4
"""Temperature of the labelers' noise at which their rankings are certain."""
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

    @property
    def answers(self) -> list[list[tuple[str, bool]]]:
        """The text of each response and whether it is finished, as in `Ranking.answers`."""
        return [list(zip(*row, strict=True)) for row in zip(self.texts, self.finished, strict=True)]

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
    """Publish train.jsonl and validation.jsonl.

    Returns:
        The figures for the manifest.
    """
    settings, session = ctx.config, session_of(ctx, trains=False)
    if ctx.experiment.data.rankings is not None:
        rows = recorded_rows(ctx.data.get("rankings", {}))
        return split_given(ctx.source("rankings"), settings.validation_fraction, ctx.publish, session, rows)
    runtime, folder = with_accelerator(runtime_of(ctx)), ctx.inputs["sft"] / "model"
    responses = sample_responses(
        settings, session, runtime, folder, ctx.source("prompts"), launch=ctx.experiment.launch
    )
    if settings.scorer is not None:
        return publish_by_scorers(settings.scorer, responses, runtime, ctx)
    world = World.from_json(read_world(ctx.inputs))
    rows, figures = simulate(world, responses, settings, session)
    keys = request_keys(world, [row.prompt for row in rows], session.seed)
    train, validation = held_out(keys, settings.validation_fraction)
    for name, indices in (("train", train), ("validation", validation)):
        refuse_no_pair(name, len(indices), sum(usable_pairs(rows[i]) for i in indices))
        write_jsonl(ctx.publish / f"{name}.jsonl", (rows[i] for i in indices))
    return {
        "rankings": len(rows),
        "pairs": sum(usable_pairs(row) for row in rows),
        "train": len(train),
        "validation": len(validation),
        "labeler_agreement": labeler_agreement(rows[i] for i in validation),
        **figures,
        **session.notes.figures,
    }


# -- rankings by people --------------------------------------------------------------------------


def split_given(source: Source, fraction: float, folder: Path, session: Session, count: int | None) -> dict:
    """Check rankings by people and split them by prompt, without holding them in memory.

    All of them are written to one file first. Only then it is known which prompts are held out.

    Args:
        source: Where the rankings are.
        fraction: The share of prompts to hold out.
        folder: Where train.jsonl and validation.jsonl go.
        session: The run.
        count: The number of rankings, if it is known, for progress.

    Returns:
        The figures for the manifest.

    Raises:
        UserError: With the errors of the data; or one of the two files would have no usable pair.
    """
    whole, loaded = folder / ".tmp-all.jsonl", Loaded()
    positions, pairs = array("d"), array("i")  # of each ranking
    reader = reader_source(source)
    rankings = sources.stream("rankings", reader, loaded)
    with jsonl_writer(whole) as write:
        for _, ranking in with_progress(rankings, session, count):
            positions.append(position_of(prompt_key(ranking.prompt)))
            pairs.append(usable_pairs(ranking))
            write(ranking)
    if loaded.errors:
        raise UserError(shorten(loaded.errors))
    session.notes.take_down("rankings", reader.name, loaded)
    is_held_out = np.asarray(positions) <= held_out_limit(positions, fraction)
    counts = {"train": int((~is_held_out).sum()), "validation": int(is_held_out.sum())}
    for name, side in (("train", ~is_held_out), ("validation", is_held_out)):
        refuse_no_pair(name, counts[name], int(np.asarray(pairs)[side].sum()))
    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    with whole.open("rb") as lines, train.open("wb") as first, validation.open("wb") as second:
        for line, held in zip(lines, is_held_out, strict=True):
            (second if held else first).write(line)
    whole.unlink()
    again = records("rankings", published(validation), Loaded())
    return {
        "rankings": len(positions),
        "pairs": sum(pairs),
        **counts,
        "labeler_agreement": labeler_agreement(ranking for _, ranking in again),
        **session.notes.figures,
    }


def refuse_no_pair(name: str, rankings: int, pairs: int) -> None:
    """Raise UserError if a split has no usable pair.

    Args:
        name: The split.
        rankings: The number of its rankings.
        pairs: The number of its usable pairs.
    """
    if not pairs:
        raise UserError(
            [
                f"data.rankings: the {name} split ({rankings} rankings) has no usable pair; add rankings, or "
                f"change rankings.validation_fraction"
            ]
        )


def with_progress(rows: Iterable[Item], session: Session, count: int | None) -> Iterator[Item]:
    """Yield rows; of many, show progress.

    Args:
        rows: The rows.
        session: The run; a request to stop ends it.
        count: About how many there are; None if that is not known.
    """
    if count is None or count < MANY_ROWS:
        yield from rows
        return
    with session.tracker.progress(count, "rankings reading") as progress:
        for done, row in enumerate(rows, 1):
            yield row
            if done % ROWS_AT_ONCE == 0:
                session.leave_if_requested(0, 0)
                progress.update(min(done, count))


# -- rankings by scorers -------------------------------------------------------------------------


def publish_by_scorers(
    scorers: Sequence[ScorerSection],
    responses: SampledResponses,
    runtime: Runtime,
    ctx: StageRun[RankingsSettings, Experiment],
) -> dict:
    """Publish rankings of SFT's responses by scorers, split by prompt.

    Args:
        scorers: The settings of what scores.
        responses: SFT's responses.
        runtime: How reward models compute.
        ctx: The stage's context.

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
    prompts = [
        ToRank(*one) for one in zip(responses.prompts, responses.answers, responses.rows, responses.places, strict=True)
    ]
    poll = session.interrupt(0, 0, lambda: None)
    rankings = rank_by_scorers(scorer, prompts, tokenizer, settings.tie_within or 0.0, poll)
    scorer.close()
    train, validation = held_out([prompt_key(one.prompt) for one in rankings], settings.validation_fraction)
    for name, indices in {"train": train, "validation": validation}.items():
        refuse_no_pair(name, len(indices), sum(usable_pairs(rankings[i]) for i in indices))
        write_jsonl(ctx.publish / f"{name}.jsonl", (rankings[i] for i in indices))
    every = [score for ranking in rankings for score in ranking.scores or ()]
    return {
        "rankings": len(rankings),
        "pairs": sum(usable_pairs(ranking) for ranking in rankings),
        "train": len(train),
        "validation": len(validation),
        "score": float(np.mean(every)),
        "unfinished": responses.unfinished_share,
        **session.notes.figures,
    }


# -- rankings by simulated labelers --------------------------------------------------------------


def request_keys(world: World, prompts: Sequence[str], seed: int) -> list[str]:
    """Return a key for each of the world's prompts; prompts with one key are not split.

    The key is the request. Otherwise the same question after another greeting, and the same
    responses to it, would be on both sides.
    """
    return [f"{seed} {world.request(prompt)}" for prompt in prompts]


def usable_pairs(ranking: Ranking) -> int:
    """Count the pairs of a ranking that say which of two different responses is better."""
    return sum(verdict == "usable" for _, _, verdict in judged_pairs(ranking))


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
    prompts, texts, finished = responses.prompts, responses.texts, responses.finished
    answers = responses.answers
    utilities = [world.labeler_utilities(*row) for row in zip(prompts, texts, finished, strict=True)]
    try:
        noise = labelers.calibrate_noise(utilities, answers, settings.agreement)
    except ValueError as problem:
        # The responses of a poor SFT model hardly differ in quality, so only taste is left to
        # disagree on.
        session.say(f"{problem}: they rank without noise; train base and sft longer")
        noise = NO_NOISE
    if responses.unfinished_share > MANY_UNFINISHED:
        # Labelers rank a response as it is; no model learns from it how such a response should end.
        session.say(f"{responses.unfinished_share:.0%} of the responses were cut off; raise rankings.response_length")
    keys = request_keys(world, prompts, session.seed)
    validation = set(held_out(keys, settings.validation_fraction)[1])
    rows: list[Ranking] = []
    ranked: list[int] = []  # which prompt each row ranks
    for i, prompt in enumerate(prompts):
        count = 2 if i in validation else settings.labelers_per_prompt
        chooser = random.Random(derive_seed(session.seed, "labeler", i))
        for k in chooser.sample(range(len(labelers.LABELERS)), count):
            rng = np.random.default_rng(derive_seed(session.seed, "rank", i, k))
            ranks = tuple(int(rank) for rank in labelers.rank(utilities[i][k], noise, rng, answers[i]))
            name = labelers.LABELERS[k].name
            ended = tuple(finished[i])
            rows.append(Ranking(f"{i:05d}-{name}", prompt, tuple(texts[i]), ranks, name, finished=ended))
            ranked.append(i)
    held = [at for at, i in enumerate(ranked) if i in validation]
    ceiling = labelers.accuracy_ceiling(
        [utilities[ranked[at]] for at in held],
        [list(rows[at].ranks) for at in held],
        [list(rows[at].answers) for at in held],
        noise,
    )
    return rows, {
        "noise": noise,
        "unfinished": responses.unfinished_share,
        "expected_agreement": labelers.expected_agreement(utilities, answers, noise),
        "accuracy_ceiling": ceiling["realised"],
        "expected_accuracy_ceiling": ceiling["expected"],
    }


def sample_responses(
    settings: RankingsSettings, session: Session, runtime: Runtime, folder: Path, source: Source, launch: LaunchSettings
) -> SampledResponses:
    """Sample K responses of SFT to each prompt, with checkpoints between batches.

    Args:
        settings: The section rankings.
        session: The run; it resumes from its newest checkpoint.
        runtime: How the stage computes.
        folder: The folder of the SFT model.
        source: Where the prompts are.
        launch: The section launch, which says how another engine than SFT itself runs.
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
    responses = sample_in_batches(sampler, [prompts[i] for i in kept], ids, session)
    engine.close()
    rows = [chosen[i] for i in kept]
    return dataclasses.replace(responses, rows=[records[i].row() for i in rows], places=[locations[i] for i in rows])


def sample_in_batches(
    sampler: Sampler, prompts: list[str], ids: Sequence[list[int]], session: Session
) -> SampledResponses:
    """Sample responses to all prompts in batches.

    Args:
        sampler: SFT.
        prompts: P prompts.
        ids: Their ids through the chat template.
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
    total = first + -(-(len(prompts) - len(texts)) // size)  # batch_size may have changed since

    def save(step: int) -> None:
        if step:
            session.checkpoints.save(step, {}, {"texts": texts, "finished": finished}, total)

    with session.tracker.progress(total, "rankings", first) as progress:
        for step in range(first + 1, total + 1):
            batch = range(len(texts), min(len(texts) + size, len(prompts)))
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
