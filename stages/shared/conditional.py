"""Label answers by their scores with control tokens, for conditional training.

An answer's score decides which control token its prompt ends with (Korbak 2023). Answers are those
of the demonstrations, or samples of the policy itself, which is then trained on what it has done
under the token that says how good that was: hindsight relabelling (Zhang 2023), in rounds with
reward quantiles as in Quark (Lu 2022).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from data.encode import decode_response, encode_prompts, encode_responses
from data.length_limit import LengthReport, fit_lengths
from data.streams import Stream, derive_seed, held_out
from data.turns import Turns, conversation_key, turns_of
from pipeline.errors import UserError
from pipeline.stage import Source
from stages.rollouts.engine import EngineSpec, SampleRequest
from stages.rollouts.transformers import TransformersEngine
from stages.scorers.labels import ToRank, rank_by_scorers, scorers_of
from stages.scorers.scorer import ScorerSpec
from stages.settings.sft import ConditionalSettings
from stages.shared.inputs import LengthLimit, fit_prompts, load_placed_records
from stages.shared.runtime import Runtime
from stages.training.batching import micro_batches
from stages.training.session import Session


@dataclass(frozen=True)
class Asked:
    """Prompts whose answers are scored."""

    prompts: list[Any]
    """P prompts, texts or messages."""
    ids: list[list[int]]
    """Their ids; each ends with the best control token."""
    rows: list[dict]
    """Their rows of data, for scorers."""
    places: list[str]
    """The location of each, for error lines."""

    def train_answers(self, count: int, fraction: float) -> int:
        """Return the number of answers to train on, of `count` to each prompt.

        Args:
            count: Answers to each prompt.
            fraction: The fraction of the conversations that is held out.
        """
        return count * len(held_out([conversation_key(prompt) for prompt in self.prompts], fraction)[0])

    def taken(self, indices: Sequence[int]) -> "Asked":
        """Return some of the prompts, in this order."""
        columns = (self.prompts, self.ids, self.rows, self.places)
        return Asked(*([column[i] for i in indices] for column in columns))


@dataclass(frozen=True)
class Scored:
    """The answers to some prompts, with their scores; JSON lists, which checkpoints carry."""

    answers: list[list[tuple[str, bool]]]
    """The text of each answer to each of P prompts, and whether it ended by itself."""
    scores: list[list[float]]
    """The score of each."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"answers": self.answers, "scores": self.scores}


@dataclass(frozen=True)
class Labelled:
    """Rows to train on, {input_ids, labels}, split by conversation, and figures of them."""

    train: list[dict]
    """Rows to train on."""
    held_out: list[dict]
    """Rows of the held-out evaluation."""
    figures: dict[str, float]
    """For the manifest."""

    def line(self, number: int, rounds: int) -> str:
        """Return the line that says what is learnt.

        Args:
            number: The round, from 0.
            rounds: All rounds.
        """
        levels = [str(self.figures[key]) for key in self.figures if key.startswith("level_")]
        line = f"{len(self.train)} answers to learn, {len(self.held_out)} held out; mean score "
        line += f"{self.figures['score']:.3f}; by control token, from worst to best: {', '.join(levels)}"
        if "0" in levels:
            line += "; equal scores have the same token, so one of them is not learnt"
        return line if rounds == 1 else f"round {number + 1} of {rounds}: {line}"


# -- which prompts, and their answers --------------------------------------------------------------


def asked_demonstrations(
    source: Source, turns: Turns, tokenizer: Any, session: Session
) -> tuple[Asked, list[list[tuple[str, bool]]]]:
    """Load demonstrations; each answer that is learnt is one answer to a prompt of its own.

    Args:
        source: Where they are.
        turns: Which answers are learnt.
        tokenizer: The tokenizer with its chat template.
        session: The run.

    Returns:
        The prompts, and the only answer to each.
    """
    records, locations = load_placed_records("demonstrations", source, session.notes)
    learnt = [
        (turn, place)
        for record, place in zip(records, locations, strict=True)
        for turn in turns_of(record, turns)
    ]  # fmt: skip
    prompts = [turn.prompt for turn, _ in learnt]
    places = [place for _, place in learnt]
    ids = encode_prompts(tokenizer, prompts, places)
    rows = [{"prompt": prompt if isinstance(prompt, str) else list(prompt)} for prompt in prompts]
    return Asked(prompts, ids, rows, places), [[(turn.answer, True)] for turn, _ in learnt]


def asked_prompts(
    source: Source, limit: LengthLimit, response_length: int, tokenizer: Any, session: Session
) -> Asked:  # fmt: skip
    """Load the prompts that leave room for an answer.

    Args:
        source: Where they are.
        limit: The limit of prompt and answer together.
        response_length: Tokens that an answer may take.
        tokenizer: The tokenizer with its chat template.
        session: The run.
    """
    records, locations = load_placed_records("prompts", source, session.notes)
    prompts = [record.prompt for record in records]
    kept, ids, report = fit_prompts(tokenizer, prompts, locations, limit, response_length)
    session.say(report.line("prompts"))
    places = [locations[i] for i in kept]
    return Asked([prompts[i] for i in kept], ids, [records[i].row() for i in kept], places)


def of_round(asked: Asked, count: int | None, number: int, seed: int) -> Asked:
    """Return the prompts of a round: the next ones of a random order of all.

    Args:
        asked: All prompts.
        count: Prompts of a round; None: all.
        number: The round, from 0.
        seed: The experiment's seed.
    """
    count = count or len(asked.prompts)
    order = Stream(len(asked.prompts), derive_seed(seed, "conditional prompts")).take((number + 1) * count)
    return asked.taken(order[number * count :])


@dataclass(frozen=True)
class Sampler:
    """What is needed to sample from the policy in training."""

    spec: EngineSpec
    """What the engine is built from."""
    tokenizer: Any
    """The policy's tokenizer."""
    settings: ConditionalSettings
    """How answers are sampled."""
    seed: int
    """The experiment's seed."""

    def answers(
        self, model: nn.Module, asked: Asked, number: int, poll: Callable[[], None]
    ) -> list[list[tuple[str, bool]]]:
        """Return K answers to each prompt, the same on all ranks.

        In the first round the policy has not learnt any control token, and none is put before its
        answers; later it is asked for the best.

        Args:
            model: The policy, on its device.
            asked: The prompts.
            number: The round, from 0.
            poll: Called between tokens; raises if the run is to stop.
        """
        count, settings, eos = self.settings.samples_per_prompt, self.settings, self.tokenizer.eos_token_id
        assert count is not None
        ids = asked.ids if number else [prompt[:-1] for prompt in asked.ids]
        engine = TransformersEngine(replace(self.spec, batch_size=settings.batch_size * count))
        engine.start(model, poll)
        found: list[list[tuple[str, bool]]] = []
        for indices in micro_batches(range(len(ids)), settings.batch_size):
            request = SampleRequest(
                prompts=[ids[i] for i in indices for _ in range(count)],
                seeds=[derive_seed(self.seed, "conditional", number, i, k) for i in indices for k in range(count)],
                samples_per_prompt=count,
                response_length=settings.longest_sample,
                temperature=settings.temperature or 1.0,
                eos_id=eos,
            )
            sampled = engine.sample(request, poll).responses
            for some in micro_batches(sampled, count):
                found.append([(decode_response(self.tokenizer, own), own[-1] == eos) for own in some])
        engine.close()
        return found


# -- scores ----------------------------------------------------------------------------------------


def score_answers(
    settings: ConditionalSettings,
    asked: Asked,
    answers: list[list[tuple[str, bool]]],
    tokenizer: Any,
    runtime: Runtime,
    session: Session,
) -> Scored:
    """Score answers by the weighted sum of the scorers.

    Args:
        settings: The scorers.
        asked: The prompts.
        answers: The answers to each.
        tokenizer: The policy's tokenizer.
        runtime: How reward models compute, with its accelerator.
        session: The run.
    """
    spec = ScorerSpec(
        reward_model=None,
        pad_id=tokenizer.pad_token_id,
        accelerator=runtime.accelerator,
        batch_size=settings.batch_size,
        records=session.checkpoints.folder.with_name("scores"),
        say=session.say,
        trust_remote_code=runtime.trust_remote_code,
    )
    scorer = scorers_of(settings.scorer, spec)
    to_score = [
        ToRank(prompt, own, row, place)
        for prompt, own, row, place in zip(asked.prompts, answers, asked.rows, asked.places, strict=True)
    ]
    poll = partial(session.leave_if_requested, 0, 0)
    rankings = rank_by_scorers(scorer, to_score, tokenizer, 0.0, poll)
    scorer.close()
    scores = [list(ranking.scores or ()) for ranking in rankings]
    if settings.missing_eos_score is not None:
        for own, of_prompt in zip(scores, answers, strict=True):
            own[:] = [
                score if ended else settings.missing_eos_score for score, (_, ended) in zip(own, of_prompt, strict=True)
            ]
    return Scored(answers, scores)


# -- labels ----------------------------------------------------------------------------------------


def levels_of(
    scores: Sequence[float], levels: int, thresholds: Sequence[float] | None
) -> tuple[list[int], list[float]]:
    """Return the level of each score, from 0, the worst, and the thresholds.

    Args:
        scores: The scores.
        levels: How many levels there are.
        thresholds: The lowest score of each level but the first, ascending; None: quantiles, so
            that levels have equally many answers as far as equal scores allow.
    """
    if thresholds is None:
        shares = [level / levels for level in range(1, levels)]
        thresholds = np.quantile(np.asarray(scores, dtype=np.float64), shares).tolist()
    found = np.searchsorted(np.asarray(thresholds), np.asarray(scores, dtype=np.float64), side="right")
    return found.tolist(), [float(one) for one in thresholds]


def label_rows(
    asked: Asked,
    scored: Scored,
    control: Sequence[int],
    thresholds: Sequence[float] | None,
    fraction: float,
    limit: LengthLimit,
    tokenizer: Any,
) -> tuple[Labelled, LengthReport]:
    """Return rows of prompt, control token and answer, of which only the answer is learnt.

    Args:
        asked: The prompts, whose ids end with the best control token.
        scored: Their answers.
        control: Ids of the control tokens, from worst to best.
        thresholds: As of `levels_of`.
        fraction: The fraction of the conversations to hold out.
        limit: The limit of a row.
        tokenizer: The tokenizer.
    """
    owners = [i for i, own in enumerate(scored.answers) for _ in own]
    flat = [answer for own in scored.answers for answer in own]
    scores = [score for own in scored.scores for score in own]
    levels, used = levels_of(scores, len(control), thresholds)
    prompts = [[*asked.ids[owner][:-1], control[level]] for owner, level in zip(owners, levels, strict=True)]
    responses = [[ids] for ids in encode_responses(tokenizer, flat)]
    kept, prompts, responses, report = fit_lengths(
        prompts,
        responses,
        max_length=limit.max_length,
        on_too_long=limit.on_too_long,
        what="answer",
        names=[asked.places[owner] for owner in owners],
        section=limit.section,
    )
    rows = [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for prompt, (answer,) in zip(prompts, responses, strict=True)
    ]
    kept = [i for i, row in zip(kept, rows, strict=True) if row["labels"][-1] != -100]  # cut off before any text
    rows = [row for row in rows if row["labels"][-1] != -100]
    train, held = held_out([conversation_key(asked.prompts[owners[i]]) for i in kept], fraction)
    if not held:
        raise UserError("sft.conditional: one prompt is left; at least 2 are needed, one of them to hold out")
    counts = np.bincount([levels[i] for i in kept], minlength=len(control))
    figures = {"score": float(np.mean(scores)), "finished": float(np.mean([ended for _, ended in flat]))}
    figures |= {f"level_{level}": int(count) for level, count in enumerate(counts)}
    figures |= {f"threshold_{level}": value for level, value in enumerate(used, 1)}
    return Labelled([rows[i] for i in train], [rows[i] for i in held], figures), report


def records_of(state: dict[str, Any]) -> Scored:
    """Return what `Scored.state` wrote."""
    return Scored([[(text, ended) for text, ended in own] for own in state["answers"]], state["scores"])
