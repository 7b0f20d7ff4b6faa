"""Answer prompts greedily, for people to read.

Samples at temperature 1 show a policy's whole distribution; the greedy answer shows what a user at
a low temperature would get. It may be longer than the responses that are scored, so that people see
how it ends.
"""

from collections.abc import Callable, Sequence
from typing import Any

from data.streams import derive_seed
from stages.evaluation.forms import Answer, Query, parse_answer
from stages.evaluation.prompts import EvaluationPrompts
from stages.evaluation.results import Measured
from stages.evaluation.shown_prompts import chosen_prompts
from stages.evaluation.tools import Tools
from stages.rollouts.transformers import sample
from stages.settings.evaluate import EvaluateSettings

LIKELIEST = 1e-9
"""A top_p that keeps only the likeliest token."""
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
    count = SHOWN if settings.greedy_prompts is None else settings.greedy_prompts
    indices = sorted({i for _, group in chosen_prompts(measured, count) for i in group})
    if not indices:
        return []
    length = 4 * settings.response_length if settings.greedy_length is None else settings.greedy_length
    rows = []
    for name, of_policy in measured.items():
        if name == "best_of_n":
            continue
        model = tools.model_of(name)
        queries = prompts.queries(tools.tokenizer, of_policy.asked, indices)
        with tools.accelerator.autocast():
            answers = answer_greedily(
                model, tools.tokenizer, queries, length, context, batch_size=settings.batch_size, poll=poll
            )
        scores = score_those_that_fit(tools, model, [prompts.chat_ids[i] for i in indices], answers)
        for i, answer, score in zip(indices, answers, scores, strict=True):
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


def score_those_that_fit(
    tools: Tools, model: Any, chat_ids: Sequence[list[int]], answers: Sequence[Answer]
) -> list[float | None]:
    """Score the answers that fit into max_length together with their prompt.

    Args:
        tools: The judges.
        model: The policy that answered.
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
    if tools.reward_model is None or not fitting:
        return scores
    scored = [answers[k] for k in fitting]
    raw = tools.raw_scores(tools.reward_model, [chat_ids[k] for k in fitting], scored, tools.packs(model))
    for k, score in zip(fitting, tools.with_missing_eos(raw, scored).tolist(), strict=True):
        scores[k] = score
    return scores


def answer_greedily(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Query],
    length: int,
    context: int | None,
    *,
    batch_size: int,
    poll: Callable[[], None] | None = None,
) -> list[Answer]:
    """Answer queries with the likeliest token at each position.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        queries: The prompts, all in the same form.
        length: The longest answer, in tokens.
        context: The longest row the model can read, in tokens; None if that is unknown.
        batch_size: Rows sampled at a time.
        poll: Called between tokens; raises if the run is to stop.

    Returns:
        One answer per query. All have the room that the longest query leaves.
    """
    if not queries:
        return []
    if context is not None:
        length = max(1, min(length, context - max(len(query.ids) for query in queries)))
    sampled = sample(
        model,
        [query.ids for query in queries],
        # The seeds have no effect: only one token is left to draw.
        [derive_seed(0, "greedy", i) for i in range(len(queries))],
        response_length=length,
        top_p=LIKELIEST,
        batch_size=batch_size,
        eos_id=queries[0].end_id,
        pad_id=tokenizer.pad_token_id,
        poll=poll,
    )
    return [parse_answer(tokenizer, query, ids) for query, ids in zip(queries, sampled, strict=True)]
