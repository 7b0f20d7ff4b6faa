"""Rank sampled responses by scorers: prompts with K responses → Ranking records.

So `rm` and `dpo` can be trained without people: a rule, a function, a server, a judge or another
reward model ranks what SFT samples.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from data.encode import encode_prompts, encode_responses
from data.forms.scores import ranks_of_scores
from data.records import Ranking
from data.streams import derive_seed
from data.world import labelers
from pipeline.errors import UserError
from pipeline.launch import parallel
from stages.scorers.scorer import ScorerDropped, ScoreRequest, ScorerLost, ScorerSpec
from stages.scorers.scorers import make_scorer
from stages.scorers.weighted import WeightedScorer, WeightedSum
from stages.settings.scorers.common import ScorerSection
from stages.settings.scorers.scorer import names_of

PROMPTS_AT_ONCE = 32
"""Prompts whose responses are scored in one request."""


@dataclass(frozen=True)
class ToRank:
    """A prompt and its K responses."""

    prompt: Any
    """Text or messages."""
    answers: Sequence[tuple[str, bool]]
    """The text of each response and whether it is finished, as in `Ranking.answers`."""
    data_row: dict
    """The prompt's row of data."""
    place: str
    """The location of that row, for error lines."""


def scorers_of(settings: Sequence[ScorerSection], spec: ScorerSpec) -> WeightedSum:
    """Return the weighted sum of scorers that read texts; reward models load their folders.

    Args:
        settings: The settings of the scorers.
        spec: What they are built from, without settings and name.
    """
    scorers = []
    for name, one in zip(names_of(settings), settings, strict=True):
        scorers.append(WeightedScorer(name, one.weight, make_scorer(replace(spec, settings=one, name=name))))
    return WeightedSum(tuple(scorers))


def rank_by_scorers(
    scorer: WeightedSum, prompts: Sequence[ToRank], tokenizer: Any, tie_within: float, poll: Callable[[], None]
) -> list[Ranking]:
    """Return a ranking of each prompt's responses by their scores, each rank scoring its share.

    Args:
        scorer: What scores.
        prompts: The prompts with their responses.
        tokenizer: The tokenizer.
        tie_within: The largest difference of two scores that are a tie.
        poll: Is called while waiting; what it raises ends the scoring.

    Raises:
        ScorerLost, UserError: On all ranks, if a scorer has failed on one of them.
    """
    costs = [float(sum(len(text) for text, _ in one.answers)) for one in prompts]
    compute = partial(score_share, scorer, tokenizer, poll)
    scores = parallel.compute_and_all_gather(prompts, costs, compute)
    for outcome in scores:
        if isinstance(outcome, Exception):
            raise outcome
    rankings = []
    for index, (one, of_responses) in enumerate(zip(prompts, scores, strict=True)):
        rankings.append(
            Ranking(
                id=f"{index:05d}",
                prompt=one.prompt if isinstance(one.prompt, str) else tuple(one.prompt),
                responses=tuple(text for text, _ in one.answers),
                ranks=tuple(ranks_of_scores(of_responses, tie_within)),
                finished=tuple(is_finished for _, is_finished in one.answers),
                scores=tuple(of_responses),
            )
        )
    return rankings


def finished_only(ranking: Ranking) -> Ranking:
    """Return a ranking of the finished responses; the others have neither rank nor score.

    Args:
        ranking: A ranking of all responses.
    """
    worth = [
        -rank if ended and rank is not None else None
        for rank, ended in zip(ranking.ranks, ranking.finished, strict=True)
    ]
    scores = ranking.scores and tuple(
        score if ended else None for score, ended in zip(ranking.scores, ranking.finished, strict=True)
    )
    return replace(ranking, ranks=tuple(ranks_of_scores(worth)), scores=scores)


def rank_some(
    utilities: np.ndarray, judged: Sequence[int], noise: float, rng: np.random.Generator, answers: Sequence[Hashable]
) -> tuple[int | None, ...]:
    """Let a labeler rank some of the responses to a prompt.

    Args:
        utilities: What the labeler thinks of each response, (K,).
        judged: Indices of the responses that are ranked.
        noise: The temperature of the labeler's noise.
        rng: Draws it.
        answers: The K responses; equal ones get equal ranks.

    Returns:
        K ranks; None: not judged.
    """
    if not judged:
        return (None,) * len(answers)
    ranks = labelers.rank(utilities[list(judged)], noise, rng, [answers[i] for i in judged])
    placed = dict(zip(judged, map(int, ranks), strict=True))
    return tuple(placed.get(i) for i in range(len(answers)))


def with_noise(
    rankings: Sequence[Ranking], counts: Sequence[int], agreement: float, seed: int
) -> tuple[list[list[Ranking]], dict[str, float]]:
    """Rank responses again as labelers do who see their scores with noise.

    A labeler ranks by score / temperature + Gumbel noise (Plackett–Luce); the temperature is such
    that two labelers agree on as many pairs as asked.

    Args:
        rankings: Rankings of the responses to each prompt by their scores. Responses without a rank
            are not judged by labelers either, and do not count in their agreement.
        counts: The number of labelers who rank each prompt.
        agreement: How often two labelers agree on a pair of different responses.
        seed: The experiment's seed.

    Returns:
        For each prompt a ranking by each of its labelers, without scores, which no labeler gives;
        figures for the manifest: the noise (a temperature), what agreement it leads to, and the
        share of pairs of different responses that have the same score.

    Raises:
        UserError: Labelers cannot agree so often, as too many responses have the same score.
    """
    judged = [[i for i, rank in enumerate(one.ranks) if rank is not None] for one in rankings]
    # as any two labelers see them, who are of one taste
    seen = [np.array([[one.scores[i] for i in own]] * 2, float) for one, own in zip(rankings, judged, strict=True)]
    answers = [[one.answers[i] for i in own] for one, own in zip(rankings, judged, strict=True)]
    try:
        noise = labelers.calibrate_noise(seen, answers, agreement)
    except ValueError as problem:
        raise UserError(
            f"rankings.scorer_agreement: {problem}; lower it, or choose a scorer that tells more responses apart"
        ) from None
    noisy = []
    for index, (one, count) in enumerate(zip(rankings, counts, strict=True)):
        by_labeler = []
        for k in range(count):
            rng = np.random.default_rng(derive_seed(seed, "rank", index, k))
            ranks = rank_some(np.array(one.scores, float), judged[index], noise, rng, one.answers)
            name = f"labeler {k + 1}"
            by_labeler.append(replace(one, id=f"{one.id}-{k + 1}", ranks=ranks, labeler=name, scores=None))
        noisy.append(by_labeler)
    equal = [own[0][i] == own[0][j] for own, texts in zip(seen, answers, strict=True) for i, j in labelers.pairs(texts)]
    return noisy, {
        "noise": noise,
        "expected_agreement": labelers.expected_agreement(seen, answers, noise),
        "equal_scores": float(np.mean(equal)),
    }


def score_share(
    scorer: WeightedSum, tokenizer: Any, poll: Callable[[], None], prompts: Sequence[ToRank]
) -> list[list[float] | Exception]:
    """Return the scores of the responses to each prompt, or for each the error that came first.

    Args:
        scorer: What scores.
        tokenizer: The tokenizer.
        poll: Is called while waiting.
        prompts: The prompts with their responses.
    """
    scores: list[list[float] | Exception] = []
    try:
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            poll()
            scores += score_some(scorer, tokenizer, poll, prompts[start : start + PROMPTS_AT_ONCE])
    except ScorerDropped as error:  # a ranking has to be by all scorers
        return [ScorerLost(str(error))] * len(prompts)
    except (ScorerLost, UserError) as error:  # the other ranks have to hear of it
        return [error] * len(prompts)
    return scores


def score_some(
    scorer: WeightedSum, tokenizer: Any, poll: Callable[[], None], prompts: Sequence[ToRank]
) -> list[list[float]]:
    """Return the scores of the responses to each of some prompts, from one request.

    Args:
        scorer: What scores.
        tokenizer: The tokenizer.
        poll: Is called while waiting.
        prompts: The prompts with their responses.
    """
    ids = encode_prompts(tokenizer, [one.prompt for one in prompts], [one.place for one in prompts])
    counts = [len(one.answers) for one in prompts]
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    request = ScoreRequest(
        prompts=[ids[i] for i in owners],
        responses=encode_responses(tokenizer, [answer for one in prompts for answer in one.answers]),
        tokenizer=tokenizer,
        data_rows=[prompts[i].data_row for i in owners],
        places=[prompts[i].place for i in owners],
        poll=poll,
    )
    flat = scorer.score(request).total.tolist()
    scores: list[list[float]] = [[] for _ in prompts]
    for owner, score in zip(owners, flat, strict=True):
        scores[owner].append(score)
    return scores
