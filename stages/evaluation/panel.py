"""Let the judges of `evaluate.judges` judge the policies' responses, and pairs that people ranked.

A judge gives each response a score, or (`mode: pairwise`) compares each with SFT's, in both orders.
It is asked again about some prompts, to see whether it says the same. Array shapes: P prompts, S
samples of each.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from data.encode import encode_prompt, encode_response
from data.records import Ranking, as_messages, prompt_key
from data.streams import derive_seed
from data.world.world import World
from pipeline.errors import UserError
from pipeline.launch import parallel
from stages.evaluation.forms import Answer
from stages.evaluation.judges import GOLD
from stages.evaluation.judging import Verdict
from stages.evaluation.prompts import EvaluationPrompts
from stages.evaluation.results import Measured
from stages.evaluation.tools import Tools
from stages.scorers.judge import JudgeScorer, PairRequest
from stages.scorers.scorer import Scorer, ScoreRequest, ScorerLost, ScorerSpec
from stages.scorers.scorers import make_scorer
from stages.scorers.url_protocols import shown
from stages.settings.scorers.common import ScorerSection

Item = TypeVar("Item")
Result = TypeVar("Result")

MAIN = ("ppo", "dpo", "best_of_n", "base", "sft")
"""The policies, those first about whose responses a judge is asked again."""


@dataclass(frozen=True)
class PeoplesPairs:
    """N pairs of responses of which people preferred one."""

    rows: list[dict]
    """The row of data of each pair's prompt, with `prompt`."""
    better: list[tuple[str, bool]]
    """The response that was preferred, and whether it is finished."""
    worse: list[tuple[str, bool]]
    """The other one."""
    clusters: list[str]
    """The cluster of each pair: its prompt."""


@dataclass(frozen=True)
class Opinion:
    """All that a judge has said, as JSON values."""

    scores: dict[str, list[list[float]]] = field(default_factory=dict)
    """Policy → (P, S) scores; {} for a judge that compares."""
    compared: dict[str, list[list[list[Verdict | None]]]] = field(default_factory=dict)
    """Policy → (P, S, 2) verdicts on its sample and SFT's of the same number: with its own shown
    first, then with SFT's shown first; {} for a judge that gives scores. None: no valid verdict, or
    the texts are equal, and nobody is asked."""
    people: list[list[Any]] = field(default_factory=list)
    """Of each of people's pairs: the scores of the preferred and the other response, or the
    verdicts in both orders."""
    repeated: list[list[Any]] = field(default_factory=list)
    """What the judge said at first and again."""
    repeated_prompts: list[int] = field(default_factory=list)
    """The prompt of each of these."""
    asked: int = 0
    """How many responses it scored, or pairs it compared in one order."""
    invalid: int | None = None
    """How many of these without a valid verdict; None for a scorer that is no language model."""

    def state(self) -> dict:
        """Return the fields, for a checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class Panel:
    """The judges of `evaluate.judges` and what they are asked."""

    settings: Mapping[str, ScorerSection]
    """Name → settings of each judge."""
    people: PeoplesPairs
    """Pairs that people ranked; may be none."""
    repeat: float
    """The share of prompts about which each judge is asked again."""
    records: Path
    """Folder for answers that a resumed run must get again."""
    seed: int
    """The experiment's seed."""
    say: Callable[[str], None]
    """Prints a line."""
    trust_remote_code: bool = False
    """Whether code that a model brings may run."""


def peoples_pairs(
    rankings: Sequence[Ranking], tokenizer: Any, *, count: int, max_length: int, seed: int
) -> PeoplesPairs:
    """Draw pairs of responses of which people preferred one: at most one of each ranking.

    Args:
        rankings: The held-out rankings.
        tokenizer: The tokenizer of the models that judge too.
        count: The most pairs.
        max_length: The most tokens of prompt and response.
        seed: The experiment's seed.
    """
    stream = random.Random(derive_seed(seed, "judge_pairs"))
    order = list(range(len(rankings)))
    stream.shuffle(order)
    rows, better, worse, clusters = [], [], [], []
    for index in order:
        if len(rows) == count:
            break
        ranking = rankings[index]
        ranks, answers = ranking.ranks, ranking.answers
        pairs = [
            (i, j)
            for i in range(len(ranks))
            for j in range(len(ranks))
            if ranks[i] is not None and ranks[j] is not None and ranks[i] < ranks[j]  # type: ignore[operator]
        ]
        if not pairs:
            continue
        i, j = stream.choice(pairs)
        prompt_length = len(encode_prompt(tokenizer, ranking.prompt))
        if any(prompt_length + len(encode_response(tokenizer, *answers[k])) > max_length for k in (i, j)):
            continue
        prompt = ranking.prompt if isinstance(ranking.prompt, str) else as_messages(ranking.prompt)
        rows.append({"prompt": prompt})
        better.append(answers[i])
        worse.append(answers[j])
        clusters.append(prompt_key(ranking.prompt))
    return PeoplesPairs(rows, better, worse, clusters)


def repeated_prompts(panel: Panel, count: int) -> list[int]:
    """Return the prompts, of `count`, about which a judge is asked again, in ascending order."""
    number = min(count, math.ceil(panel.repeat * count))
    return sorted(random.Random(derive_seed(panel.seed, "judge_again")).sample(range(count), number))


def judge_all(
    panel: Panel,
    name: str,
    tools: Tools,
    prompts: EvaluationPrompts,
    measured: Mapping[str, Measured],
    poll: Callable[[], None],
) -> Opinion:
    """Ask a judge about everything.

    Args:
        panel: The judges and what they are asked.
        name: The judge.
        tools: The tokenizer, and where models run.
        prompts: The evaluation prompts.
        measured: What was measured of each policy; "sft" is among them.
        poll: Is called while waiting; raises if the run is to stop.

    Raises:
        ScorerLost: If the judge does not answer for now.
        UserError: If the user has to change something; if no answer of a language model has a valid
            verdict, since all would be ties.
    """
    spec = ScorerSpec(
        reward_model=None,
        pad_id=tools.tokenizer.pad_token_id,
        accelerator=tools.accelerator,
        batch_size=tools.batch_size,
        settings=panel.settings[name],
        name=name,
        records=panel.records,
        say=panel.say,
        trust_remote_code=panel.trust_remote_code,
    )
    scorer = make_scorer(spec)
    again = None
    indices = repeated_prompts(panel, len(prompts.prompts))
    if indices:
        again = make_scorer(replace(spec, records=panel.records / "again"))
    try:
        if panel.settings[name].compares():
            assert isinstance(scorer, JudgeScorer) and (again is None or isinstance(again, JudgeScorer))
            opinion = compare_all(panel, scorer, again, indices, prompts, measured, poll)
        else:
            opinion = score_all(panel, scorer, again, indices, prompts, measured, poll, tools.tokenizer, name)
        if isinstance(scorer, JudgeScorer) and opinion.invalid == opinion.asked > 0:
            raise UserError(
                f"evaluate.judges: {name}: none of its {opinion.asked} answers has a valid verdict, as "
                f"{shown(scorer.invalid_answer)}; correct prompt, verdict or max_tokens, or name another model"
            )
        return opinion
    finally:
        scorer.close()
        if again is not None:
            again.close()


# -- judges that compare ---------------------------------------------------------------------------


def compare_all(
    panel: Panel,
    judge: JudgeScorer,
    again: JudgeScorer | None,
    indices: Sequence[int],
    prompts: EvaluationPrompts,
    measured: Mapping[str, Measured],
    poll: Callable[[], None],
) -> Opinion:
    """Compare each policy's samples with SFT's, and the responses of people's pairs.

    Args:
        panel: What the judges are asked.
        judge: The judge.
        again: The same judge, which knows none of its answers; None if nothing is asked again.
        indices: The prompts about which it is asked again.
        prompts: The evaluation prompts.
        measured: What was measured of each policy.
        poll: Is called while waiting.
    """
    sft, pairs, owners = measured["sft"], [], []
    for policy, of_policy in measured.items():
        if policy == "sft":
            continue
        for i, (ours, theirs) in enumerate(zip(of_policy.responses, sft.responses, strict=True)):
            for a, b in zip(ours, theirs, strict=False):  # best of n has one sample
                pairs.append((prompts.rows[i], a, b))
                owners.append((policy, i))
    people = panel.people
    pairs += [
        (row, better[0], worse[0]) for row, better, worse in zip(people.rows, people.better, people.worse, strict=True)
    ]
    asked = [k for k, (_, ours, theirs) in enumerate(pairs) if ours != theirs]
    forward = [pairs[k] for k in asked]
    backward = [(row, theirs, ours) for row, ours, theirs in forward]
    panel.say(f"{judge.name}: compares {len(asked)} pairs of responses in both orders")
    found = shared_out([*forward, *backward], partial(verdicts_of, judge, poll=poll))
    orders: list[list[Verdict | None]] = [[None, None] for _ in pairs]
    for position, k in enumerate(asked):
        orders[k] = [found[position], found[len(asked) + position]]
    compared: dict[str, list[list[list[Verdict | None]]]] = {
        policy: [[] for _ in prompts.prompts] for policy in measured if policy != "sft"
    }
    for (policy, i), verdicts in zip(owners, orders, strict=False):
        compared[policy][i].append(verdicts)

    first = {owner: k for k, owner in reversed(list(enumerate(owners)))}  # the first sample's pair
    main = next((policy for policy in MAIN if policy in compared), None)
    chosen = [] if main is None or again is None else [first[main, i] for i in indices]
    chosen = [k for k in chosen if pairs[k][1] != pairs[k][2]]
    repeated: list[list[Any]] = []
    if again is not None and chosen:
        second = shared_out([pairs[k] for k in chosen], partial(verdicts_of, again, poll=poll))
        repeated = [[orders[k][0], verdict] for k, verdict in zip(chosen, second, strict=True)]
    return Opinion(
        compared=compared,
        people=orders[len(owners) :],
        repeated=repeated,
        repeated_prompts=[owners[k][1] for k in chosen] if repeated else [],
        asked=len(found),
        invalid=sum(verdict is None for verdict in found),
    )


def verdicts_of(
    judge: JudgeScorer, pairs: Sequence[tuple[dict, str, str]], poll: Callable[[], None]
) -> list[Verdict | None]:
    """Return a judge's verdict on each (row, first response, second response)."""
    rows, first, second = zip(*pairs, strict=True)
    return judge.compare(PairRequest(rows, first, second, poll))


# -- judges that score -----------------------------------------------------------------------------


def score_all(
    panel: Panel,
    scorer: Scorer,
    again: Scorer | None,
    indices: Sequence[int],
    prompts: EvaluationPrompts,
    measured: Mapping[str, Measured],
    poll: Callable[[], None],
    tokenizer: Any,
    name: str,
) -> Opinion:
    """Score each policy's samples, and the responses of people's pairs.

    Args:
        panel: What the judges are asked.
        scorer: The judge.
        again: The same judge, which knows none of its answers; None if nothing is asked again.
        indices: The prompts about which it is asked again.
        prompts: The evaluation prompts.
        measured: What was measured of each policy.
        poll: Is called while waiting.
        tokenizer: The policies' tokenizer.
        name: The judge's name.
    """
    items, owners = [], []
    for policy, of_policy in measured.items():
        for i, (texts, ended) in enumerate(zip(of_policy.responses, of_policy.finished, strict=True)):
            for text, finished in zip(texts, ended, strict=True):
                items.append((prompts.rows[i], prompts.chat_ids[i], text, finished))
                owners.append((policy, i))
    people = panel.people
    for row, better, worse in zip(people.rows, people.better, people.worse, strict=True):
        ids = encode_prompt(tokenizer, row["prompt"])
        items += [(row, ids, *better), (row, ids, *worse)]
    panel.say(f"{name}: scores {len(items)} responses")
    ask = partial(scores_of, tokenizer=tokenizer, poll=poll)
    found = shared_out(items, partial(ask, scorer))
    for item, (score, _) in zip(items, found, strict=True):
        if not math.isfinite(score):
            raise UserError(
                f"evaluate.judges: {name} gives {score} to a response to {str(item[0]['prompt'])[:60]!r}; leave it "
                f"out, or give it rows that it can judge"
            )
    scores: dict[str, list[list[float]]] = {policy: [[] for _ in prompts.prompts] for policy in measured}
    for (policy, i), (score, _) in zip(owners, found, strict=False):
        scores[policy][i].append(score)
    of_people = [score for score, _ in found[len(owners) :]]
    invalid = [flag for _, flag in found]

    main = next(policy for policy in MAIN if policy in measured)
    first = {owner: k for k, owner in reversed(list(enumerate(owners)))}
    chosen = [first[main, i] for i in indices] if again is not None else []
    repeated: list[list[Any]] = []
    if again is not None and chosen:
        second = shared_out([items[k] for k in chosen], partial(ask, again))
        repeated = [[found[k][0], score] for k, (score, _) in zip(chosen, second, strict=True)]
    return Opinion(
        scores=scores,
        people=[of_people[k : k + 2] for k in range(0, len(of_people), 2)],
        repeated=repeated,
        repeated_prompts=[owners[k][1] for k in chosen] if repeated else [],
        asked=len(items),
        invalid=None if None in invalid else int(sum(invalid)),  # type: ignore[arg-type]
    )


def scores_of(
    scorer: Scorer, items: Sequence[tuple[dict, list[int], str, bool]], tokenizer: Any, poll: Callable[[], None]
) -> list[tuple[float, float | None]]:
    """Return a scorer's score of each (row, ids of the prompt, response, whether it is finished).

    Returns:
        With each score 1 if it stands for an answer that was no valid verdict, 0 if not, and None
        for a scorer that says nothing of this.
    """
    rows, ids, texts, finished = zip(*items, strict=True)
    responses = [encode_response(tokenizer, *answer) for answer in zip(texts, finished, strict=True)]
    scores = scorer.score(ScoreRequest(ids, responses, tokenizer, data_rows=rows, poll=poll))
    invalid = scores.parts.get("invalid") if isinstance(scorer, JudgeScorer) else None
    flags = [None] * len(items) if invalid is None else invalid.tolist()
    return list(zip(scores.total.tolist(), flags, strict=True))


def with_opinions(measured: Mapping[str, Measured], opinions: Mapping[str, Opinion]) -> dict[str, Measured]:
    """Return what was measured of each policy with what judges said of it."""
    found = {}
    for policy, own in measured.items():
        scores = {judge: opinion.scores[policy] for judge, opinion in opinions.items() if opinion.scores}
        compared = {
            judge: opinion.compared[policy] for judge, opinion in opinions.items() if policy in opinion.compared
        }
        found[policy] = replace(own, scores=own.scores | scores, compared=compared)
    return found


# -- models and gold on people's pairs -------------------------------------------------------------


def people_by_models(tools: Tools, world: World | None, people: PeoplesPairs) -> dict[str, list[list[float]]]:
    """Score people's pairs by the judges that are there anyway: reward models, and gold.

    Args:
        tools: The reward models.
        world: The embedded world; None without gold.
        people: N pairs.

    Returns:
        Judge → the scores of the preferred and the other response of each pair.
    """
    if not people.rows:
        return {}
    prompts = [encode_prompt(tools.tokenizer, row["prompt"]) for row in people.rows]
    tools = tools.with_asked(prompts, [row["prompt"] for row in people.rows])
    sides = []
    for answers in (people.better, people.worse):
        ids = [encode_response(tools.tokenizer, *answer) for answer in answers]
        sides.append([Answer(text, ended, own, own) for (text, ended), own in zip(answers, ids, strict=True)])
    found = {}
    if world is not None:
        found[GOLD] = [
            [world.gold(row["prompt"], *answer)["overall"] for answer in (better, worse)]
            for row, better, worse in zip(people.rows, people.better, people.worse, strict=True)
        ]
    for name in tools.judges:
        columns = []
        for answers in sides:
            raw = tools.raw_scores(tools.judge(name), prompts, answers, packed=False)
            columns.append(tools.with_missing_eos(raw, answers).tolist())
        found[name] = [list(pair) for pair in zip(*columns, strict=True)]
    return found


def shared_out(items: Sequence[Item], compute: Callable[[list[Item]], list[Result]]) -> list[Result]:
    """Compute a result per item, each rank for its share; an error on one rank is raised on all.

    Args:
        items: All items, the same on every rank.
        compute: Returns a result per item of a share.
    """
    rank, size = parallel.rank_and_world_size()
    share = range(rank, len(items), size)

    def outcome() -> tuple[list[Result], Exception | None]:
        try:
            return compute([items[i] for i in share]) if share else [], None
        except (ScorerLost, UserError) as error:
            return [], error

    found = parallel.all_gather(outcome())
    for _, error in found:
        if error is not None:
            raise error
    results: list[Any] = [None] * len(items)
    for of_rank, (own, _) in enumerate(found):
        results[of_rank::size] = own
    return results
