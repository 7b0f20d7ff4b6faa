"""Sample a policy's answers to the evaluation prompts, and score them.

Array shapes: P prompts, S samples of each, B answers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from data.groups import make_rows
from data.streams import derive_seed
from data.world.world import World
from pipeline.launch import parallel
from stages.evaluation.forms import Answer, Query, parse_answer
from stages.evaluation.tools import Policy, Tools, most_sampled
from stages.models.forward import response_logprobs
from stages.objectives.logprobs import sequence_logps
from stages.rollouts.engine import SampleRequest
from stages.settings.evaluate import EvaluateSettings
from stages.training.batching import micro_batches


@torch.no_grad()
def measure(
    tools: Tools,
    policy: Policy,
    queries: Sequence[Query],
    chat_ids: Sequence[list[int]],
    settings: EvaluateSettings,
    *,
    seed: int,
    poll: Callable[[], None],
) -> dict[str, Any]:
    """Sample a policy's answers and score them, each rank its share of the prompts.

    Args:
        tools: The sampler, the judges and the reference.
        policy: The policy; "best_of_n" keeps the sample of each prompt that scores highest.
        queries: The P prompts in the form in which the policy is prompted.
        chat_ids: The ids of the same prompts through the chat template, which the judges read.
        settings: The section evaluate.
        seed: The experiment's seed.
        poll: Called between tokens; raises if the run is to stop.

    Returns:
        `responses`, `finished`, `raw_scores` (None without a reward model), `kl` (None for best of
        n, and with top-k or top-p) and `lengths`: (P, S) lists; `scores`: such a list of each
        judge. All as in `Measured`.
    """
    best_of_n = policy.name == "best_of_n"
    count = settings.best_of if best_of_n else settings.samples_per_prompt
    # Best of n draws from another stream than SFT's own samples, because it is compared with them.
    stream = "best_of_n" if best_of_n else "evaluate"

    answered: dict[int, list[Answer]] = {}  # (S,) answers by prompt

    def sample_answers(indices: Sequence[int]) -> None:
        """Sample the answers to some prompts, on all ranks together."""
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
        at_a_time = most_sampled(settings, several=count > 1)
        sampled = tools.sampler.sample(policy.weights, policy.model, request, at_a_time, poll)
        for i, of_prompt in zip(indices, micro_batches(sampled, count), strict=True):
            answered[i] = [parse_answer(tools.tokenizer, queries[i], ids) for ids in of_prompt]

    def measure_part(indices: Sequence[int]) -> list[dict[str, Any]]:
        """Measure the answers to some prompts; return one dictionary of (S,) lists per prompt."""
        answers = [answer for i in indices for answer in answered[i]]
        repeated = [i for i in indices for _ in range(count)]
        prompts = [chat_ids[i] for i in repeated]
        columns = score(tools, policy, prompts, answers, best_of=count if best_of_n else None)
        if not best_of_n and not settings.truncates:
            query_ids = [queries[i].ids for i in repeated]
            columns["kl"] = log_ratios(tools, policy, query_ids, prompts, answers, settings.temperature)
        return split_columns(columns, len(indices))

    def measure_parts(parts: list[Sequence[int]]) -> list[list[dict[str, Any]]]:
        """Measure the answers to this rank's parts of the prompts."""
        measured = []
        # A pass of sharded models takes all ranks: one without parts measures prompt 0 once more.
        for part, is_own in parallel.padded_micro_batches(parts, [0] if tools.sharded else None):
            poll()
            of_part = measure_part(part)
            if is_own:
                measured.append(of_part)
        return measured

    # Small parts share the prompts evenly among ranks, and let a stop take effect soon. A part of
    # several samples per prompt samples up to four batches at a time, and is scored in batches.
    ranks = parallel.data_rank_and_size()[1]
    size = max(1, min(-(-len(queries) // ranks), settings.batch_size // min(count, 4)))
    rows: list[dict[str, Any]] = []
    for indices in micro_batches(range(len(queries)), ranks * size):
        sample_answers(indices)
        parts = list(micro_batches(indices, size))
        costs = [len(part) for part in parts]
        by_part = parallel.compute_and_all_gather(parts, costs, measure_parts, idle=tools.sharded)
        rows += [row for part in by_part for row in part]
    return {key: join([row[key] for row in rows]) for key in rows[0]}


def score(
    tools: Tools, policy: Policy, chat_ids: Sequence[list[int]], answers: Sequence[Answer], best_of: int | None = None
) -> dict[str, Any]:
    """Score answers by every judge that is a model.

    Args:
        tools: The judges.
        policy: The policy that answered.
        chat_ids: The ids of each answer's prompt through the chat template.
        answers: B answers, those to one prompt next to each other.
        best_of: Keep the answer of each `best_of` neighbours that the selector, or else the reward
            model, scores highest; None keeps all.

    Returns:
        The columns of `measure`, a value per answer that is kept; `kl` is None.
    """
    raw, kept = None, list(range(len(answers)))
    if tools.reward_model is not None:
        raw = tools.raw_scores(tools.reward_model, chat_ids, answers, policy.packed)
    if best_of is not None:
        if tools.selector is None:
            quality = tools.with_missing_eos(raw, answers)
        else:
            quality = tools.selector.scores(chat_ids, answers)
        best = quality.view(-1, best_of).argmax(-1).tolist()
        kept = [group * best_of + position for group, position in enumerate(best)]
        raw = None if raw is None else raw[kept]
    kept_answers, prompts = [answers[i] for i in kept], [chat_ids[i] for i in kept]
    scores = {}
    for name, model in tools.judges.items():
        own = raw if model is tools.reward_model else tools.raw_scores(model, prompts, kept_answers, policy.packed)
        scores[name] = tools.with_missing_eos(own, kept_answers).tolist()
    return {
        "responses": [answer.text for answer in kept_answers],
        "finished": [answer.finished for answer in kept_answers],
        "scores": scores,
        "raw_scores": None if raw is None else raw.tolist(),
        "kl": None,
        "lengths": [len(answer.sampled) for answer in kept_answers],
    }


def split_columns(columns: dict[str, Any], prompts: int) -> list[dict[str, Any]]:
    """Split columns of P·S values into one dictionary of (S,) lists for each of P prompts."""
    each = len(columns["responses"]) // prompts
    return [{key: part(values, k * each, (k + 1) * each) for key, values in columns.items()} for k in range(prompts)]


def part(values: Any, start: int, end: int) -> Any:
    """Return a part of a column; of columns by judge, that part of each; None of none."""
    if isinstance(values, dict):
        return {name: part(own, start, end) for name, own in values.items()}
    return None if values is None else values[start:end]


def join(parts: list[Any]) -> Any:
    """Return the list of some parts; of parts by judge, that list of each judge; None of none."""
    if isinstance(parts[0], dict):
        return {name: [own[name] for own in parts] for name in parts[0]}
    return None if parts[0] is None else parts


def log_ratios(
    tools: Tools,
    policy: Policy,
    query_ids: Sequence[list[int]],
    chat_ids: Sequence[list[int]],
    answers: Sequence[Answer],
    temperature: float,
) -> list[float]:
    """Compute log π(y|x) − log π_ref(y|x) of each answer, in nats; their mean estimates the KL.

    The policy reads the ids that it sampled, in the form in which it was prompted; the reference
    reads the same answer as a response in a chat.

    Args:
        tools: The tokenizer, the reference and the accelerator.
        policy: The policy that answered.
        query_ids: The ids that each answer continued.
        chat_ids: The ids of the same prompts through the chat template.
        answers: B answers.
        temperature: Divides the logits, as in sampling.

    Returns:
        B log-ratios.
    """

    def logps(model: Any, prompts: Sequence[list[int]], responses: list[list[int]]) -> torch.Tensor:
        rows = make_rows(prompts, responses, tools.tokenizer.pad_token_id, packed=policy.packed)
        rows = rows.to(tools.accelerator.device)
        with tools.accelerator.autocast():
            logprobs = response_logprobs(model, rows, temperature)
        return sequence_logps(logprobs, rows.response_mask).float().cpu()

    of_policy = logps(policy.model, query_ids, [answer.sampled for answer in answers])
    of_reference = logps(tools.reference, chat_ids, [answer.response for answer in answers])
    return (of_policy - of_reference).tolist()


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
