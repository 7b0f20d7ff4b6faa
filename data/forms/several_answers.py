"""Convert data sets that rank or score several answers to a prompt."""

import re
from collections.abc import Sequence

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.instructions import read_instruction
from data.forms.judged import NO_PREFERENCE, choice, number
from data.forms.messages import SYSTEM_KEYS, read_prompt
from data.forms.plain import RANKING_KEYS
from data.forms.scores import ranks_of_scores
from data.forms.transcripts import hh_prompt, is_hh
from data.parsing import describe, parse_list, parse_text

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
"""What UltraFeedback rates each completion for."""
WIDE = re.compile(r"(?:response|answer|completion)_(\w+)")
"""A column that holds a response, and the name of the response in it."""


def objects_of(row: Row, key: str, expected: str) -> list[dict]:
    """Return a list of objects under a key.

    Args:
        row: The row.
        key: The key.
        expected: The keys of each object, for the error line.
    """
    value = row[key]
    if not isinstance(value, list) or any(not isinstance(one, dict) for one in value):
        raise ValueError(f"'{key}' is {describe(value)}; expected a list of {{{expected}}}")
    return value


def scored(prompt: object, responses: Sequence[object], scores: Sequence[float | None], options: Options) -> Row:
    """Return a row of our ranking form for answers with scores; those without a text are left out.

    Args:
        prompt: The prompt.
        responses: The answers.
        scores: The score of each; None was not scored.
        options: What the source says.
    """
    if len(responses) != len(scores):
        raise ValueError(f"{len(responses)} answers, {len(scores)} scores; expected one score per answer")
    kept = [(answer, score) for answer, score in zip(responses, scores, strict=True) if answer is not None]
    if sum(score is not None for _, score in kept) < 2:
        raise LeftOut("fewer than two answers with a score")
    return {
        "prompt": prompt,
        "responses": [answer for answer, _ in kept],
        "ranks": ranks_of_scores([score for _, score in kept], options.tie_within),
        "scores": [score for _, score in kept],
    }


# ── Nectar, RewardBench 2, Stack Exchange ────────────────────────────────────────────────────────


def nectar(row: Row, options: Options) -> Row:
    """Convert {prompt, answers: [{answer, rank}]}; ranks begin with 1, and may be tied."""
    answers = objects_of(row, "answers", "answer, rank")
    ranks = [number(one.get("rank"), "rank") for one in answers]
    return {**nectar_prompt(row, options), "responses": [one.get("answer") for one in answers], "ranks": ranks}


def nectar_prompt(row: Row, options: Options) -> Row:
    """Take the prompt, a transcript that ends with "Assistant:"."""
    return {"prompt": hh_prompt(row["prompt"]) if is_hh(row["prompt"]) else row["prompt"]}


def lists_of_answers(row: Row) -> bool:
    """Return whether `chosen` and `rejected` are answers, at least one of them several."""
    several = [row["chosen"], row["rejected"]]
    texts = (isinstance(answer, str) for value in several if isinstance(value, list) for answer in value)
    return any(isinstance(value, list) and value for value in several) and all(texts)


def good_and_bad(row: Row, options: Options) -> Row:
    """Convert {prompt, chosen, rejected}, lists of answers: the chosen ones are all ranked 1."""
    chosen, rejected = (value if isinstance(value, list) else [value] for value in (row["chosen"], row["rejected"]))
    expected = choice(row.get("num_correct"), "num_correct", range(1, len(chosen) + len(rejected) + 1))
    if expected is not None and expected + 1 != len(chosen):
        raise ValueError(f"'num_correct' is {expected + 1}, and 'chosen' holds {len(chosen)} answers; correct one")
    ranks = [1] * len(chosen) + [len(chosen) + 1] * len(rejected)
    return {"prompt": read_prompt(row), "responses": [*chosen, *rejected], "ranks": ranks, "id": row.get("id")}


def exchange(row: Row, options: Options) -> Row:
    """Convert {question, answers: [{text, pm_score}]} of Stack Exchange; authors are not read."""
    answers = objects_of(row, "answers", "text, pm_score")
    scores = [number(one.get("pm_score"), "pm_score") for one in answers]
    return scored(row["question"], [one.get("text") for one in answers], scores, options)


def exchange_prompt(row: Row, options: Options) -> Row:
    """Take the question."""
    return {"prompt": row["question"]}


# ── UltraFeedback and CodeUltraFeedback ──────────────────────────────────────────────────────────


def aspect_rating(completion: Row, aspect: str) -> float | None:
    """Return the rating of a completion for one aspect; None where it has none ("N/A")."""
    annotations = completion.get("annotations")
    annotation = annotations.get(aspect) if isinstance(annotations, dict) else None
    if isinstance(annotation, list):  # in some files one judgment of several
        annotation = annotation[0] if annotation else None
    return number(annotation.get("Rating"), f"Rating of {aspect}") if isinstance(annotation, dict) else None


def completion_score(completion: Row, by: str) -> float | None:
    """Return the score of a completion.

    Args:
        completion: The completion.
        by: "mean" (of the aspects that are rated), "overall_score", or an aspect.
    """
    if by == "overall_score":
        return number(completion.get("overall_score"), "overall_score")
    if by != "mean":
        return aspect_rating(completion, by)
    ratings = [rating for aspect in ASPECTS if (rating := aspect_rating(completion, aspect)) is not None]
    return sum(ratings) / len(ratings) if ratings else None


def ultrafeedback(row: Row, options: Options) -> Row:
    """Convert {instruction, completions: [{response, annotations, overall_score}]}."""
    completions = objects_of(row, "completions", "response, annotations, overall_score")
    scores = [completion_score(completion, options.by or "mean") for completion in completions]
    return scored(read_instruction(row), [one.get("response") for one in completions], scores, options)


def code_ultrafeedback(row: Row, options: Options) -> Row:
    """Convert {instruction, responses: [{model, response}], annotations: [{model, rating}]}."""
    responses = objects_of(row, "responses", "model, response")
    annotations = row["annotations"]
    if not isinstance(annotations, list):
        raise ValueError(f"'annotations' is {describe(annotations)}; expected a list of {{model, rating}}")
    ratings = {one.get("model"): number(one.get("rating"), "rating") for one in annotations if isinstance(one, dict)}
    scores = [ratings.get(one.get("model")) for one in responses]
    return scored(read_instruction(row), [one.get("response") for one in responses], scores, options)


def instruction_prompt(row: Row, options: Options) -> Row:
    """Take the instruction."""
    return {"prompt": read_instruction(row)}


# ── distilabel ───────────────────────────────────────────────────────────────────────────────────


def distilabel_prompt(row: Row, options: Options) -> Row:
    """Take `instruction`, or `input` of older versions, with its system message."""
    return {"prompt": read_prompt(row, "instruction" if "instruction" in row else "input")}


def distilabel(row: Row, options: Options) -> Row:
    """Convert {instruction, generations, ratings}; a generation that failed is null."""
    ratings = row.get("ratings") if row.get("ratings") is not None else row.get("rating")
    if ratings is None:
        raise LeftOut(NO_PREFERENCE)
    if not isinstance(ratings, list):
        raise ValueError(f"the ratings are {describe(ratings)}; expected a list with one number per generation")
    scores = [number(rating, "rating") for rating in ratings]
    answers_key = "generations" if "generations" in row else "responses"
    return scored(distilabel_prompt(row, options)["prompt"], parse_list(row, answers_key), scores, options)


def ranked_candidates(row: Row, options: Options) -> Row:
    """Convert {instruction, candidates, ranks} of PairRM: the rank of each candidate, from 1."""
    prompt = distilabel_prompt(row, options)["prompt"]
    return {"prompt": prompt, "responses": row["candidates"], "ranks": row["ranks"]}


# ── a table with a column for each response ──────────────────────────────────────────────────────


def columns_of(row: Row) -> dict[str, str]:
    """Return {name of a response: its column}, of those that have a rank or a score."""
    columns = {match[1]: key for key in row if (match := WIDE.fullmatch(key))}
    return {name: key for name, key in columns.items() if f"rank_{name}" in row or f"score_{name}" in row}


def wide_keys(row: Row) -> list[str]:
    """Return the columns of responses, ranks and scores."""
    columns = columns_of(row)
    return [*columns.values(), *(f"{by}_{name}" for name in columns for by in ("rank", "score"))]


def is_wide(row: Row) -> bool:
    """Return whether a row has at least two responses with a rank or a score each."""
    return len(columns_of(row)) > 1


def wide(row: Row, options: Options) -> Row:
    """Convert {prompt, response_1, rank_1, …} or {prompt, response_1, score_1, …}.

    A response that is missing, with a rank that is missing too, is none: K may differ.
    """
    columns = columns_of(row)
    by = "rank" if f"rank_{next(iter(columns))}" in row else "score"
    judged = [(row[column], number(row.get(f"{by}_{name}"), f"{by}_{name}")) for name, column in columns.items()]
    kept = [("" if text is None else text, value) for text, value in judged if text or value is not None]
    about = {key: row.get(key) for key in RANKING_KEYS if row.get(key) != ""}
    about["margin"] = number(row.get("margin"), "margin")
    prompt, texts, values = read_prompt(row), [text for text, _ in kept], [value for _, value in kept]
    if by == "rank":
        return {"prompt": prompt, "responses": texts, "ranks": values, **about}
    return {**scored(prompt, texts, values, options), **about}


def prompt_of(row: Row, options: Options) -> Row:
    """Take the prompt."""
    return {"prompt": read_prompt(row)}


def preferences_with_candidates(row: Row, options: Options) -> Row:
    """Convert OpenHermesPreferences' {prompt, candidates_completions, ranks}."""
    ranks = [number(rank, "rank") for rank in parse_list(row, "ranks")]
    return {"prompt": parse_text(row, "prompt"), "responses": row["candidates_completions"], "ranks": ranks}


NECTAR = Form(("prompt", "answers"), (), nectar, name="Nectar", prompt=nectar_prompt)
GOOD_AND_BAD = Form(
    ("prompt", "chosen", "rejected"),
    ("id", "num_correct", *SYSTEM_KEYS),
    good_and_bad,
    name="RewardBench 2",
    fits=lists_of_answers,
    prompt=prompt_of,
)
EXCHANGE_SCORES = Form(("question", "answers"), (), exchange, name="stack-exchange-preferences", prompt=exchange_prompt)
ULTRAFEEDBACK = Form(
    ("instruction", "completions"),
    (),
    ultrafeedback,
    name="UltraFeedback",
    by=("mean", "overall_score", *ASPECTS),
    prompt=instruction_prompt,
)
CODE_ULTRAFEEDBACK = Form(
    ("instruction", "responses", "annotations"),
    (),
    code_ultrafeedback,
    name="CodeUltraFeedback",
    prompt=instruction_prompt,
)
DISTILABEL = Form(
    ("instruction", "generations"),
    ("ratings", *SYSTEM_KEYS),
    distilabel,
    name="distilabel",
    prompt=distilabel_prompt,
    harmless=frozenset(["chosen", "rejected"]),
)
DISTILABEL_RESPONSES = Form(
    ("instruction", "responses", "ratings"), SYSTEM_KEYS, distilabel, name="distilabel", prompt=distilabel_prompt
)
DISTILABEL_OLD = Form(
    ("input", "generations", "rating"),
    SYSTEM_KEYS,
    distilabel,
    name="distilabel",
    prompt=distilabel_prompt,
    harmless=frozenset(["chosen", "rejected"]),
)
DISTILABEL_RANKS = Form(
    ("candidates", "ranks"),
    ("instruction", "input", *SYSTEM_KEYS),
    ranked_candidates,
    name="PairRM",
    fits=lambda row: "instruction" in row or "input" in row,
    prompt=distilabel_prompt,
)
HERMES_PREFERENCES = Form(
    ("prompt", "candidates_completions", "ranks"),
    ("chosen", "rejected"),
    preferences_with_candidates,
    name="OpenHermesPreferences",
    prompt=prompt_of,
)
WIDE_TABLE = Form(
    ("prompt",),
    (*RANKING_KEYS, *SYSTEM_KEYS),
    wide,
    name="a wide table",
    fits=is_wide,
    prompt=prompt_of,
    reads=wide_keys,
)
SEVERAL_ANSWERS = (
    NECTAR,
    EXCHANGE_SCORES,
    ULTRAFEEDBACK,
    CODE_ULTRAFEEDBACK,
    DISTILABEL,
    DISTILABEL_RESPONSES,
    DISTILABEL_OLD,
    DISTILABEL_RANKS,
    HERMES_PREFERENCES,
)
FEW_KEYS = (GOOD_AND_BAD, WIDE_TABLE)
"""Forms with few keys, which come after those with more."""
