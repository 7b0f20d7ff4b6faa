"""Write the request of a reward server and read its answer, in the form of each protocol.

    rlhf      {prompts, responses, finished, rows,
               ids}                                 → {scores, parts?}       many responses
    openrlhf  {query, prompts, labels}              → {rewards, extra_logs?} many responses
    slime     {prompt, response, label}             → number, or {score}     one response
    vllm      {messages, use_activation: false}     → {data: [{probs}]}      one response

README.md has them whole. What is sent of a response is its `Asked`: it depends on nothing else in
the request, so its digest names the recorded score.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.errors import UserError
from stages.models.same_tokenizer import tokenizer_fingerprint
from stages.scorers.scorer import ScoreRequest
from stages.settings.scorers.url import UrlScorer

SHOWN = 60
"""The most characters of an answer or a prompt in an error line."""

LARGEST = 3.4e38
"""The largest score; scores are float32."""

PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,99}")
"""The names of parts: they are names of metrics."""

Asked = dict[str, Any]
"""What is sent of one response: name of a field of the request → value."""


class WrongAnswer(ValueError):
    """Say that an answer is not what the protocol asks for."""


class WrongScore(WrongAnswer):
    """Say that the score of one response is no number."""

    def __init__(self, text: str, index: int) -> None:
        """Build the error from its text and the index of the response in its request."""
        self.index = index
        super().__init__(text)


@dataclass(frozen=True)
class Answer:
    """The score of one response, as a server gave it."""

    score: float
    """A finite number."""
    parts: Mapping[str, float]
    """Name → number: what the score was made of, as far as the server says."""


@dataclass(frozen=True)
class Protocol:
    """How a server is asked, and how its answer is read."""

    asked: Callable[[ScoreRequest, UrlScorer], list[Asked]]
    """Returns what is sent of each response."""
    body: Callable[[Sequence[Asked]], dict[str, Any]]
    """Returns the body of a request for some of them."""
    read: Callable[[Any, int], list[Answer]]
    """Returns the answers in the JSON value that came back, given how many responses were sent.

    Raises WrongAnswer."""
    one_a_request: bool
    """Whether a request has one response only."""


def columns(asked: Sequence[Asked]) -> dict[str, Any]:
    """Return a list a field, with an entry a response."""
    return {name: [one[name] for one in asked] for name in asked[0]}


def only(asked: Sequence[Asked]) -> dict[str, Any]:
    """Return the fields of the only response."""
    (one,) = asked
    return one


def labels_of(request: ScoreRequest, settings: UrlScorer) -> list[Any]:
    """Return the label of each response: a key of its row of data, None where it has none.

    Raises:
        UserError: If a row lacks the key that the settings name.
    """
    key, rows = settings.label_key, request.data_rows or [{} for _ in request.responses]
    if key is None:
        return [row.get("label") for row in rows]
    for row in rows:
        if key not in row:
            prompt = shown(row.get("prompt"))
            raise UserError(f"label_key: the row of prompt {prompt} has no {key}; add it, or name another key")
    return [row[key] for row in rows]


# -- rlhf ------------------------------------------------------------------------------------------


def ask_rlhf(request: ScoreRequest, settings: UrlScorer) -> list[Asked]:
    """Return prompts as messages, responses as texts, whole rows of data, and the policy's ids."""
    name = tokenizer_name(request.tokenizer)
    ids = [
        {"tokenizer": name, "prompt": list(prompt), "response": list(response)}
        for prompt, response in zip(request.prompts, request.responses, strict=True)
    ]
    fields = (request.conversations(), request.response_texts(), request.finished(), request.data_rows or [], ids)
    return [
        {"prompts": messages, "responses": text, "finished": finished, "rows": without_prompt(row), "ids": one}
        for messages, text, finished, row, one in zip(*fields, strict=True)
    ]


@lru_cache(maxsize=2)
def tokenizer_name(tokenizer: Any) -> str:
    """Return what tells tokenizers apart. A large one takes half a second; a run has one."""
    return tokenizer_fingerprint(tokenizer)


def without_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of data without its prompt, which is sent as messages."""
    return {key: value for key, value in row.items() if key != "prompt"}


def read_rlhf(value: Any, count: int) -> list[Answer]:
    """Read {scores: [number], parts: {NAME: [number]}}."""
    scores = numbers_of(field_of(value, "scores"), "scores", count)
    parts = value.get("parts") or {}
    if not isinstance(parts, dict):
        raise WrongAnswer(f"parts is {shown(parts)}; it should be an object, name → list of numbers")
    named = {part_name(name): numbers_of(given, f"parts.{name}", count) for name, given in parts.items()}
    return rows_of(scores, named)


# -- openrlhf --------------------------------------------------------------------------------------


def ask_openrlhf(request: ScoreRequest, settings: UrlScorer) -> list[Asked]:
    """Return prompts through the chat template, and prompts with their responses as one text."""
    decode = request.tokenizer.decode
    return [
        {"query": decode([*prompt, *response]), "prompts": decode(prompt), "labels": label}
        for prompt, response, label in zip(
            request.prompts, request.responses, labels_of(request, settings), strict=True
        )
    ]


def read_openrlhf(value: Any, count: int) -> list[Answer]:
    """Read {rewards: [number], extra_logs: {NAME: [number]}}; numbers may be in lists of one."""
    scores = numbers_of(unnested(field_of(value, "rewards")), "rewards", count)
    logs = value.get("extra_logs") or {}
    if not isinstance(logs, dict):
        raise WrongAnswer(f"extra_logs is {shown(logs)}; it should be an object, name → list of numbers")
    named = {part_name(name): numbers_of(unnested(given), f"extra_logs.{name}", count) for name, given in logs.items()}
    return rows_of(scores, named)


def unnested(value: Any) -> Any:
    """Return [[1.0], [2.0]], the form of a tensor (B, 1), as [1.0, 2.0]."""
    if isinstance(value, list) and all(isinstance(one, list) and len(one) == 1 for one in value):
        return [one for (one,) in value]
    return value


# -- slime -----------------------------------------------------------------------------------------


def ask_slime(request: ScoreRequest, settings: UrlScorer) -> list[Asked]:
    """Return a prompt (text or messages, as the data have it), its response and its label."""
    rows = request.data_rows or []
    return [
        {"prompt": row["prompt"], "response": text, "label": label}
        for row, text, label in zip(rows, request.response_texts(), labels_of(request, settings), strict=True)
    ]


def read_slime(value: Any, count: int) -> list[Answer]:
    """Read a number, or {score: number} or {reward: number} whose other numbers are parts."""
    if not isinstance(value, dict):
        return [Answer(number_of(value, "the answer"), {})]
    key = next((key for key in ("score", "reward") if key in value), None)
    if key is None:
        raise WrongAnswer(f"has neither score nor reward: {shown(value)}")
    others = {name: one for name, one in value.items() if name != key and is_number(one)}
    parts = {part_name(name): number_of(one, name) for name, one in others.items()}
    return [Answer(number_of(value[key], key), parts)]


# -- vllm ------------------------------------------------------------------------------------------


def ask_vllm(request: ScoreRequest, settings: UrlScorer) -> list[Asked]:
    """Return conversations; the server applies the template of its own model."""
    named = {} if settings.served_model is None else {"model": settings.served_model}
    return [
        {"messages": [*messages, {"role": "assistant", "content": text}], "use_activation": False, **named}
        for messages, text in zip(request.conversations(), request.response_texts(), strict=True)
    ]


def read_vllm(value: Any, count: int) -> list[Answer]:
    """Read {data: [{probs: [number]}]}, in which `probs` is the logit of the only class."""
    data = field_of(value, "data")
    if not (isinstance(data, list) and len(data) == 1 and isinstance(data[0], dict)):
        raise WrongAnswer(f"data is {shown(data)}; it should have one object")
    logits = field_of(data[0], "probs")
    if not (isinstance(logits, list) and len(logits) == 1):
        raise WrongAnswer(f"probs is {shown(logits)}; the model should have one class, as a reward model has")
    return [Answer(number_of(logits[0], "probs"), {})]


PROTOCOLS: dict[str, Protocol] = {
    "rlhf": Protocol(ask_rlhf, columns, read_rlhf, one_a_request=False),
    "openrlhf": Protocol(ask_openrlhf, columns, read_openrlhf, one_a_request=False),
    "slime": Protocol(ask_slime, only, read_slime, one_a_request=True),
    "vllm": Protocol(ask_vllm, only, read_vllm, one_a_request=True),
}
"""Value of the setting `protocol` → how it is spoken."""


# -- reading ---------------------------------------------------------------------------------------


def field_of(value: Any, name: str) -> Any:
    """Return a field of an object that must have it."""
    if not isinstance(value, dict):
        raise WrongAnswer(f"is {shown(value)}; it should be an object with {name}")
    if name not in value:
        raise WrongAnswer(f"has no {name}: {shown(value)}")
    return value[name]


def numbers_of(value: Any, name: str, count: int) -> list[float]:
    """Return a list of `count` finite numbers.

    Args:
        value: What the server gave.
        name: Its field, for error lines.
        count: How many responses were sent.
    """
    if not isinstance(value, list):
        raise WrongAnswer(f"{name} is {shown(value)}; it should be a list of {count} numbers")
    if len(value) != count:
        raise WrongAnswer(f"{name} has {len(value)} entries for {count} responses")
    return [number_of(one, f"{name}[{index}]", index) for index, one in enumerate(value)]


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number_of(value: Any, name: str, index: int = 0) -> float:
    """Return a finite number.

    Args:
        value: What the server gave.
        name: Its field, for error lines.
        index: Index of the response in its request.
    """
    if not is_number(value) or not abs(value) <= LARGEST:  # `not <=` is also true of NaN
        raise WrongScore(f"{name} is {shown(value)}; it should be a finite number", index)
    return float(value)


def part_name(name: str) -> str:
    """Return the name of a part if it can be the name of a metric."""
    if not PART.fullmatch(name):
        raise WrongAnswer(f"a part is called {shown(name)}; its name should have letters, digits and `_./-` only")
    return name


def rows_of(scores: Sequence[float], parts: Mapping[str, Sequence[float]]) -> list[Answer]:
    """Return the answer of each response from lists with an entry a response."""
    return [Answer(score, {name: part[i] for name, part in parts.items()}) for i, score in enumerate(scores)]


def shown(value: Any) -> str:
    """Return the beginning of a value for an error line, in one line."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
    return repr(text) if isinstance(value, str) else text
