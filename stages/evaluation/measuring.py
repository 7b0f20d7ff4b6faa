"""Let a policy answer the evaluation prompts, and let other models say what they make of it.

Only one model at a time is on the device, so a policy's answers are kept until the reference and
each judge has had its turn: `answer_prompts`, then `with_reference` and `with_judge` in any order,
then `measured_of`.

Array shapes: P prompts, S samples of each, B answers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data.groups import make_rows
from data.streams import derive_seed
from data.world.world import World
from pipeline.launch import parallel
from stages.evaluation.forms import Answer, Form, Query, parse_answer
from stages.evaluation.judges import REWARD_MODEL
from stages.evaluation.prompts import EvaluationPrompts
from stages.evaluation.results import Measured
from stages.evaluation.text import text_losses
from stages.evaluation.tools import Policy, Tools, most_sampled
from stages.models.forward import response_logprobs
from stages.objectives.logprobs import sequence_logps
from stages.rollouts.engine import SampleRequest
from stages.settings.evaluate import EvaluateSettings
from stages.training.batching import micro_batches


@dataclass(frozen=True)
class Answered:
    """A policy's answers to the evaluation prompts, and what models said of them: (P, S) lists."""

    asked: Form
    """The form in which the policy was prompted."""
    drawn: int
    """Samples drawn of each prompt: S, or n of best of n."""
    sampled: list[list[list[int]]]
    """The ids of each answer as the policy sampled them; of best of n all n until one is `kept`."""
    logps: list[list[float]] | None
    """log π(y|x) of each; None for best of n, and with top-k or top-p."""
    text_losses: list[float] | None
    """Mean cross-entropy per token of N rows of held-out pretraining text; None for best of n."""
    reference_logps: list[list[float]] | None = None
    """log π_ref(y|x) of each; None until the reference was asked."""
    raw_scores: dict[str, list[list[float]]] = field(default_factory=dict)
    """Each judge's own scores, before `missing_eos_score`."""
    kept: bool = True
    """Whether the best of n samples is chosen already; True for other policies."""

    def state(self) -> dict:
        """Return the fields as JSON values, for a checkpoint."""
        return dict(vars(self))

    @property
    def lacks_reference(self) -> bool:
        """Whether the reference has still to be asked."""
        return self.logps is not None and self.reference_logps is None


# -- what the policy says ------------------------------------------------------------------------


@torch.no_grad()
def answer_prompts(
    tools: Tools,
    name: str,
    form: Form,
    prompts: EvaluationPrompts,
    text_rows: Sequence[list[int]],
    settings: EvaluateSettings,
    *,
    seed: int,
    poll: Callable[[], None],
) -> Answered:
    """Load a policy, sample its answers, and compute its log-probabilities and losses.

    Args:
        tools: The sampler, and how policies are loaded.
        name: Name of the policy; "best_of_n" draws `best_of` samples from SFT.
        form: How it is prompted.
        prompts: The P evaluation prompts.
        text_rows: Packed rows of held-out pretraining text.
        settings: The section evaluate.
        seed: The experiment's seed.
        poll: Called between tokens; raises if the run is to stop.
    """
    policy, best_of_n = tools.policy_of(name), name == "best_of_n"
    queries = prompts.queries(tools.tokenizer, form)
    sampled = sample_answers(tools, policy, queries, settings, seed, poll)
    count = settings.best_of if best_of_n else settings.samples_per_prompt
    logps = losses = None
    if not best_of_n:  # the probabilities of the best of n samples are not those of any model
        losses = text_losses(policy.model, text_rows, tools.accelerator, settings.batch_size)
        if not settings.truncates:
            answers = parsed(tools.tokenizer, queries, sampled)
            ids = [[answer.sampled for answer in row] for row in answers]
            query_ids = [query.ids for query in queries]
            logps = logps_of(tools, policy.model, query_ids, ids, count, settings.temperature, poll)
    return Answered(form, count, sampled, logps, losses, kept=not best_of_n)


def sample_answers(
    tools: Tools,
    policy: Policy,
    queries: Sequence[Query],
    settings: EvaluateSettings,
    seed: int,
    poll: Callable[[], None],
) -> list[list[list[int]]]:
    """Sample a policy's answers to P queries, on all ranks together; return their ids, (P, S).

    Args:
        tools: The sampler.
        policy: The policy.
        queries: The prompts in the form in which the policy is prompted.
        settings: The section evaluate.
        seed: The experiment's seed.
        poll: Called between tokens; raises if the run is to stop.
    """
    best_of_n = policy.name == "best_of_n"
    count = settings.best_of if best_of_n else settings.samples_per_prompt
    # Best of n draws from another stream than SFT's own samples, because it is compared with them.
    stream = "best_of_n" if best_of_n else "evaluate"
    at_a_time = most_sampled(settings, several=count > 1)
    found: list[list[list[int]]] = []
    for parts in parts_of(len(queries), count, settings.batch_size):
        indices = [i for part in parts for i in part]
        request = SampleRequest(
            prompts=[queries[i].ids for i in indices for _ in range(count)],
            seeds=[derive_seed(seed, stream, i, k) for i in indices for k in range(count)],
            samples_per_prompt=count,
            response_length=settings.response_length,
            temperature=settings.temperature,
            eos_id=queries[indices[0]].end_id,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        sampled = tools.sampler.sample(policy.weights, policy.model, request, at_a_time, poll)
        found += micro_batches(sampled, count)
    return found


def parsed(tokenizer: Any, queries: Sequence[Query], sampled: list[list[list[int]]]) -> list[list[Answer]]:
    """Return the answers (P, S) to P queries from their ids."""
    return [[parse_answer(tokenizer, query, ids) for ids in row] for query, row in zip(queries, sampled, strict=True)]


# -- what other models say -----------------------------------------------------------------------


@torch.no_grad()
def with_reference(
    tools: Tools, answered: Answered, prompts: EvaluationPrompts, temperature: float, poll: Callable[[], None]
) -> Answered:
    """Return a policy's answers with the log-probabilities of the reference.

    It reads each answer as a response in a chat, whatever form the policy was prompted in.

    Args:
        tools: The reference.
        answered: The policy's answers.
        prompts: The P evaluation prompts.
        temperature: Divides the logits, as in sampling.
        poll: Called between parts of the answers; raises if the run is to stop.
    """
    answers = parsed(tools.tokenizer, prompts.queries(tools.tokenizer, answered.asked), answered.sampled)
    ids = [[answer.response for answer in row] for row in answers]
    model = tools.reference()
    logps = logps_of(tools, model, prompts.chat_ids, ids, answered.drawn, temperature, poll)
    return replace(answered, reference_logps=logps)


@torch.no_grad()
def with_judge(
    tools: Tools, answered: Answered, judge: str, prompts: EvaluationPrompts, poll: Callable[[], None]
) -> Answered:
    """Return a policy's answers with the scores of a judge.

    Args:
        tools: The judges.
        answered: The policy's answers.
        judge: Name of the judge.
        prompts: The P evaluation prompts.
        poll: Called between parts of the answers; raises if the run is to stop.
    """
    model = tools.judge(judge)
    answers = parsed(tools.tokenizer, prompts.queries(tools.tokenizer, answered.asked), answered.sampled)

    def score_part(part: Sequence[int]) -> list[list[float]]:
        some, chat_ids = flat(part, answers, prompts.chat_ids)
        return split(tools.raw_scores(model, chat_ids, some).tolist(), len(part))

    rows = by_parts(tools, len(answers), answered.drawn, score_part, poll)
    return replace(answered, raw_scores=answered.raw_scores | {judge: rows})


@torch.no_grad()
def with_best(tools: Tools, answered: Answered, prompts: EvaluationPrompts, poll: Callable[[], None]) -> Answered:
    """Return the best of each prompt's n samples, by the selector or else the reward model.

    Args:
        tools: The selector; without one, the reward model has scored the samples.
        answered: The n samples of each prompt.
        prompts: The P evaluation prompts.
        poll: Called between parts of the answers; raises if the run is to stop.
    """
    answers = parsed(tools.tokenizer, prompts.queries(tools.tokenizer, answered.asked), answered.sampled)
    own = answered.raw_scores.get(REWARD_MODEL)

    def choose_part(part: Sequence[int]) -> list[int]:
        some, chat_ids = flat(part, answers, prompts.chat_ids)
        if tools.selector is not None:
            quality = tools.selector.scores(chat_ids, some)
        else:
            assert own is not None, "the reward model has scored them"
            raw = torch.tensor([score for i in part for score in own[i]])
            quality = tools.with_missing_eos(raw, some)
        return quality.view(len(part), -1).argmax(-1).tolist()

    best = by_parts(tools, len(answers), answered.drawn, choose_part, poll)
    chosen = {
        judge: [[row[k]] for row, k in zip(rows, best, strict=True)] for judge, rows in answered.raw_scores.items()
    }
    sampled = [[row[k]] for row, k in zip(answered.sampled, best, strict=True)]
    return replace(answered, sampled=sampled, raw_scores=chosen, kept=True)


def logps_of(
    tools: Tools,
    model: Any,
    prompts: Sequence[list[int]],
    responses: Sequence[Sequence[list[int]]],
    drawn: int,
    temperature: float,
    poll: Callable[[], None],
) -> list[list[float]]:
    """Compute log π(y|x) of S responses to each of P prompts, in nats; each rank its share.

    Args:
        tools: The tokenizer and the accelerator.
        model: The policy or the reference.
        prompts: The ids of each prompt as the model reads it.
        responses: The ids of each response, (P, S).
        drawn: Samples drawn of each prompt.
        temperature: Divides the logits, as in sampling.
        poll: Called between parts; raises if the run is to stop.
    """

    def compute(part: Sequence[int]) -> list[list[float]]:
        some, repeated = flat(part, responses, prompts)
        return split(answer_logps(tools, model, repeated, some, temperature), len(part))

    return by_parts(tools, len(prompts), drawn, compute, poll)


@torch.no_grad()
def answer_logps(
    tools: Tools,
    model: Any,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    temperature: float,
    packed: bool | None = None,
) -> list[float]:
    """Compute log π(y|x) of B responses in nats, `batch_size` rows at a time.

    Args:
        tools: The tokenizer and the accelerator.
        model: The policy or the reference.
        prompts: The ids of each response's prompt.
        responses: The ids of each response.
        temperature: Divides the logits, as in sampling.
        packed: Whether rows are packed; None: if the model reads packed rows.
    """
    packed = tools.packs(model) if packed is None else packed
    found: list[float] = []
    pairs = list(zip(prompts, responses, strict=True))
    for some in micro_batches(pairs, tools.batch_size):
        rows = make_rows(*zip(*some, strict=True), tools.tokenizer.pad_token_id, packed=packed)
        rows = rows.to(tools.accelerator.device)
        with tools.accelerator.autocast():
            logprobs = response_logprobs(model, rows, temperature)
        found += sequence_logps(logprobs, rows.response_mask).float().cpu().tolist()
    return found


# -- parts of the prompts ------------------------------------------------------------------------


def parts_of(prompts: int, drawn: int, batch_size: int) -> Iterator[list[Sequence[int]]]:
    """Yield P prompts in parts, one a rank at a time.

    Small parts share the prompts evenly among ranks, and let a stop take effect soon. A part of
    several samples per prompt samples up to four batches at a time, and is scored in batches.

    Args:
        prompts: P.
        drawn: Samples drawn of each prompt.
        batch_size: `evaluate.batch_size`.
    """
    ranks = parallel.data_rank_and_size()[1]
    size = max(1, min(-(-prompts // ranks), batch_size // min(drawn, 4)))
    for indices in micro_batches(range(prompts), ranks * size):
        yield list(micro_batches(indices, size))


def by_parts(
    tools: Tools, prompts: int, drawn: int, compute: Callable[[Sequence[int]], list], poll: Callable[[], None]
) -> list:
    """Compute a result for each of P prompts, each rank its share of the parts.

    Args:
        tools: Says how many rows are in a pass, and whether one takes all ranks.
        prompts: P.
        drawn: Samples drawn of each prompt.
        compute: Returns the results of a part of the prompts.
        poll: Called before each part; raises if the run is to stop.
    """

    def compute_own(parts: list[Sequence[int]]) -> list[list]:
        found = []
        # A pass of sharded models takes all ranks: one without parts computes prompt 0 once more.
        for part, is_own in parallel.padded_micro_batches(parts, [0] if tools.sharded else None):
            poll()
            of_part = compute(part)
            if is_own:
                found.append(of_part)
        return found

    rows: list = []
    for parts in parts_of(prompts, drawn, tools.batch_size):
        costs = [len(part) for part in parts]
        by_part = parallel.compute_and_all_gather(parts, costs, compute_own, idle=tools.sharded)
        rows += [row for part in by_part for row in part]
    return rows


def flat(part: Sequence[int], rows: Sequence[Sequence[Any]], prompts: Sequence[list[int]]) -> tuple[list, list]:
    """Return the items of some of P rows one after the other, and with each its prompt."""
    return [item for i in part for item in rows[i]], [prompts[i] for i in part for _ in rows[i]]


def split(values: list, prompts: int) -> list[list]:
    """Return P·S values as P lists of S."""
    return list(micro_batches(values, len(values) // prompts))


# -- all of it -----------------------------------------------------------------------------------


def measured_of(tools: Tools, answered: Answered, prompts: EvaluationPrompts) -> Measured:
    """Return what was measured of a policy, after all models have had their turn.

    Args:
        tools: The tokenizer and the judges' names.
        answered: The policy's answers and what models said of them.
        prompts: The P evaluation prompts.
    """
    answers = parsed(tools.tokenizer, prompts.queries(tools.tokenizer, answered.asked), answered.sampled)
    texts = [[answer.text for answer in row] for row in answers]
    finished = [[answer.finished for answer in row] for row in answers]
    scores = {}
    for judge in tools.judges:
        rows = zip(answered.raw_scores[judge], answers, strict=True)
        scores[judge] = [tools.with_missing_eos(torch.tensor(raw), row).tolist() for raw, row in rows]
    kl = None
    if answered.logps is not None:
        assert answered.reference_logps is not None, "the reference was asked"
        kl = log_ratios(answered.logps, answered.reference_logps)
    return Measured(
        asked=answered.asked,
        responses=texts,
        finished=finished,
        scores=scores,
        raw_scores=answered.raw_scores.get(REWARD_MODEL),
        kl=kl,
        lengths=[[len(answer.sampled) for answer in row] for row in answers],
        gold=gold_scores(prompts.world, prompts.prompts, texts, finished),
        text_losses=answered.text_losses,
    )


def log_ratios(of_policy: list[list[float]], of_reference: list[list[float]]) -> list[list[float]]:
    """Return log π(y|x) − log π_ref(y|x) of each answer, in nats; their mean estimates the KL."""
    return (torch.tensor(of_policy) - torch.tensor(of_reference)).tolist()


def gold_scores(
    world: World | None, prompts: Sequence[str], responses: list[list[str]], finished: list[list[bool]]
) -> list[list[dict[str, float]]] | None:
    """Score responses (P, S) by the embedded world's gold scorer; None without a world."""
    if world is None:
        return None
    return [
        [world.gold(prompt, response, ended) for response, ended in zip(texts, ends, strict=True)]
        for prompt, texts, ends in zip(prompts, responses, finished, strict=True)
    ]
