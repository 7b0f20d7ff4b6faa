"""Answer prompts greedily, for people to read.

Samples at temperature 1 show a policy's whole distribution; the greedy answer shows what a user at
a low temperature would get. It may be longer than the responses that are scored, so that people see
how it ends.
"""

from collections.abc import Callable, Sequence

from data.streams import derive_seed
from stages.evaluation.forms import Answer, Query, parse_answer
from stages.evaluation.judges import REWARD_MODEL
from stages.evaluation.prompts import EvaluationPrompts
from stages.evaluation.results import Measured
from stages.evaluation.shown_prompts import chosen_prompts
from stages.evaluation.tools import Tools
from stages.rollouts.engine import SampleRequest
from stages.settings.evaluate import EvaluateSettings

SHOWN = 12
"""Prompts that are answered where `evaluate.greedy_prompts` is null."""


def greedy_rows(
    tools: Tools,
    prompts: EvaluationPrompts,
    measured: dict[str, Measured],
    settings: EvaluateSettings,
    context: int | None,
    poll: Callable[[], None],
) -> list[dict]:
    """Let each policy except best of n answer the prompts that the report shows.

    Args:
        tools: The judges, and how to load policies.
        prompts: The evaluation prompts.
        measured: What was measured of each policy.
        settings: The section evaluate.
        context: The longest row the models can read, in tokens; None if that is unknown.
        poll: Called between tokens; raises if the run is to stop.

    Returns:
        Rows of greedy.jsonl: {policy, index (of the prompt), prompt, response, finished, length,
        score, gold?}. `score` is None without a reward model, and for an answer too long for
        max_length.
    """
    indices = sorted({i for _, group in chosen_prompts(measured, greedy_prompts(settings)) for i in group})
    if not indices:
        return []
    names = [name for name in measured if name != "best_of_n"]
    chat_ids = [prompts.chat_ids[i] for i in indices]
    answers = {}
    for name in names:  # all policies answer before the reward model takes their place on the device
        queries = prompts.queries(tools.tokenizer, measured[name].asked, indices)
        answers[name] = answer_greedily(tools, name, queries, settings, context, poll)
    rows = []
    for name in names:
        scores = score_those_that_fit(tools, chat_ids, answers[name])
        for i, answer, score in zip(indices, answers[name], scores, strict=True):
            prompt = prompts.prompts[i]
            row = {
                "policy": name,
                "index": i,
                "prompt": prompt,
                "response": answer.text,
                "finished": answer.finished,
                "length": len(answer.sampled),
                "score": score,
            }
            if prompts.world is not None:
                row["gold"] = prompts.world.gold(prompt, answer.text, answer.finished)
            rows.append(row)
    return rows


def greedy_prompts(settings: EvaluateSettings) -> int:
    """Return how many prompts are answered greedily, at most; four if that is less."""
    return SHOWN if settings.greedy_prompts is None else settings.greedy_prompts


def greedy_length(settings: EvaluateSettings) -> int:
    """Return the longest greedy answer, in tokens, as far as the context allows."""
    return 4 * settings.response_length if settings.greedy_length is None else settings.greedy_length


def score_those_that_fit(tools: Tools, chat_ids: Sequence[list[int]], answers: Sequence[Answer]) -> list[float | None]:
    """Score the answers that fit into max_length together with their prompt.

    Args:
        tools: The judges.
        chat_ids: The ids of each answer's prompt through the chat template.
        answers: B answers.

    Returns:
        B scores; None for an answer that does not fit, and without a reward model.
    """
    scores: list[float | None] = [None] * len(answers)
    fitting = [
        k
        for k, (ids, answer) in enumerate(zip(chat_ids, answers, strict=True))
        if len(ids) + len(answer.response) <= tools.max_length
    ]
    if REWARD_MODEL not in tools.judges or not fitting:
        return scores
    scored = [answers[k] for k in fitting]
    raw = tools.raw_scores(tools.judge(REWARD_MODEL), [chat_ids[k] for k in fitting], scored)
    for k, score in zip(fitting, tools.with_missing_eos(raw, scored).tolist(), strict=True):
        scores[k] = score
    return scores


def answer_greedily(
    tools: Tools,
    name: str,
    queries: Sequence[Query],
    settings: EvaluateSettings,
    context: int | None,
    poll: Callable[[], None],
) -> list[Answer]:
    """Load a policy, and let it answer with the likeliest token at each position.

    Args:
        tools: The sampler, the tokenizer, and how policies are loaded.
        name: Name of the policy.
        queries: The prompts, all in the same form.
        settings: The section evaluate.
        context: The longest row the model can read, in tokens; None if that is unknown.
        poll: Called between tokens; raises if the run is to stop.

    Returns:
        One answer per query. All have the room that the longest query leaves.
    """
    policy, length = tools.policy_of(name), greedy_length(settings)
    if context is not None:
        length = max(1, min(length, context - max(len(query.ids) for query in queries)))
    request = SampleRequest(
        prompts=[query.ids for query in queries],
        seeds=[derive_seed(0, "greedy", i) for i in range(len(queries))],  # they have no effect
        samples_per_prompt=1,
        response_length=length,
        temperature=0.0,
        eos_id=queries[0].end_id,
    )
    sampled = tools.sampler.sample(policy.weights, policy.model, request, settings.batch_size, poll)
    return [parse_answer(tools.tokenizer, query, ids) for query, ids in zip(queries, sampled, strict=True)]
