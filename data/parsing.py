"""Parse a row of our own form into a record, or raise ValueError("what is wrong; what to do").

Only a response of a ranking may be blank: a policy can answer nothing at all and be ranked last for
it. A blank document, prompt, message or completion is an error of some export, and would teach the
model to say nothing.
"""

import hashlib
import json
import math
import re
from contextlib import suppress
from typing import Any

from data.records import Demonstration, Document, Prompt, Ranking, id_of_content

ROLES = ("system", "user", "assistant")
EMAIL = re.compile(r"[^\s@]+@[^\s@]+\.[^\s@]+")
"""An e-mail address, and whatever sticks to it."""
METADATA = (
    "meta", "metadata", "id", "source", "url", "timestamp", "user_id", "kind", "use_case", "category", "row_text",
)  # fmt: skip
"""Keys that any row may have. `meta`, `user_id`, `kind` and `row_text` are kept, and `use_case` and
`category` under `meta`; `source` where it is a text in a ranking of our own form. Others are not
read."""

# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


def parse_demonstration(row: dict) -> Demonstration:
    """Parse a row {prompt, completion}."""
    prompt = parse_prompt_value(row)
    completion, learnt = parse_text(row, "completion"), parse_learnt(row, prompt)
    return Demonstration(prompt, completion, learnt, **parse_about(row), row_text=parse_row_text(row))


def parse_document(row: dict) -> Document:
    """Parse a row {text}."""
    return Document(parse_text(row, "text"), **parse_about(row))


def parse_prompt(row: dict) -> Prompt:
    """Parse a row {prompt}."""
    return Prompt(parse_prompt_value(row), **parse_about(row), row_text=parse_row_text(row))


def parse_ranking(row: dict) -> Ranking:
    """Parse a row {prompt, responses, ranks, …}; without an id it gets one from its content.

    With labels one response is enough.
    """
    prompt, responses = parse_prompt_value(row), parse_list(row, "responses")
    given_ranks = parse_list(row, "ranks")
    if len(responses) < (2 if row.get("labels") is None else 1):
        raise ValueError(f"a ranking needs at least 2 responses, not {len(responses)}; add one, or delete it")
    for position, response in enumerate(responses, 1):
        if not isinstance(response, str):
            raise ValueError(f"response {position} is {describe(response)}; expected a string")
    ranks = parse_ranks(given_ranks, len(responses))
    identifier = row.get("id")
    if (identifier is not None and type(identifier) not in (str, int)) or identifier == "":
        raise ValueError(f"'id' is {describe(identifier)}; expected a string, or no id")
    fields: dict[str, Any] = {
        "prompt": prompt,
        "responses": tuple(responses),
        "ranks": ranks,
        "labeler": parse_name(row, "labeler"),
        "margin": parse_margin(row),
        "finished": parse_finished(row, len(responses)),
        "scores": parse_scores(row, ranks),
        "labels": parse_labels(row, ranks),
        "source": row["source"] if isinstance(row.get("source"), str) and row["source"] else None,
        **parse_about(row),
    }
    name = id_of_content(fields) if identifier is None else without_emails(str(identifier))
    return Ranking(name, **fields)


# ── fields ───────────────────────────────────────────────────────────────────────────────────────


def parse_prompt_value(row: dict) -> str | tuple[dict, ...]:
    """Return the checked `prompt` of a row: a string, or messages that end with the user's."""
    if not isinstance(row.get("prompt"), list):
        return parse_text(row, "prompt", "a text or a list of {role, content}")
    messages = [parse_message(message, position) for position, message in enumerate(row["prompt"], 1)]
    if not messages:
        raise ValueError("the prompt has no messages; it must end with the user's message")
    if messages[-1]["role"] != "user":
        last = messages[-1]["role"]
        raise ValueError(f"the prompt ends with the {last}'s message; it must end with the user's message")
    if any(message["role"] == "system" for message in messages[1:]):
        raise ValueError("a system message comes after the first message; only the first may be one")
    return tuple(messages)


def parse_message(value: object, position: int, allow_blank: bool = False) -> dict:
    """Return a checked message {role, content}; its other keys are dropped.

    Args:
        value: The value in the row.
        position: Its position among the messages, from 1; for the error line.
        allow_blank: Whether the content may be blank.
    """
    if not isinstance(value, dict):
        raise ValueError(f"message {position} is {describe(value)}; expected {{role, content}}")
    if value.get("role") not in ROLES:
        role = describe(value["role"]) if "role" in value else "missing"
        raise ValueError(f"the role of message {position} is {role}; expected system, user or assistant")
    content = value.get("content")
    if not isinstance(content, str) or not (allow_blank or content.strip()):
        raise ValueError(f"the content of message {position} is {describe(content)}; expected a text")
    return {"role": value["role"], "content": content}


def parse_text(row: dict, key: str, expected: str = "a text") -> str:
    """Return the text under a key, which must not be blank.

    Args:
        row: The row.
        key: The key to read.
        expected: What the error line asks for.
    """
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise ValueError(f"'{key}' is {describe_key(row, key)}; expected {expected}")
    return row[key]


def parse_list(row: dict, key: str) -> list:
    """Return the list under a key of a ranking; a cell of a table may hold its JSON text."""
    value = row.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise ValueError(f"'{key}' is {describe_key(row, key)}; expected a list with one entry per response")
    return value


def parse_ranks(ranks: list, count: int) -> tuple[int | None, ...]:
    """Return checked ranks: whole numbers from 1 (best) to K, or null for a response not judged.

    Competition ranks (1, 2, 2, 4) and dense ranks (1, 2, 2, 3) are both read. Numbers that do not
    begin with 1, or go beyond K, are refused: they are probably scores, which mean the opposite.

    Args:
        ranks: The value in the row.
        count: The number of responses, K.
    """
    if len(ranks) != count:
        raise ValueError(f"{count} responses, {len(ranks)} ranks; expected one rank per response")
    checked: list[int | None] = []
    for position, rank in enumerate(ranks, 1):
        if type(rank) is int:  # nearly all
            checked.append(rank)
            continue
        if type(rank) is float and rank.is_integer():  # tables hold whole numbers as floats beside nulls
            rank = int(rank)
        if rank is not None and type(rank) is not int:
            raise ValueError(f"rank {position} is {describe(rank)}; expected 1 (best), 2, … or null (not judged)")
        checked.append(rank)
    judged = [rank for rank in checked if rank is not None]
    if judged and (min(judged) != 1 or max(judged) > count):
        raise ValueError(
            f"the ranks go from {min(judged)} to {max(judged)} among {count} responses; expected 1 (best) to at most "
            f"{count}. Are these scores (higher is better)? Then call them 'scores'"
        )
    return tuple(checked)


def parse_scores(row: dict, ranks: tuple[int | None, ...]) -> tuple[float | None, ...] | None:
    """Return the scores that ranks were made from; None if the row has none.

    Args:
        row: The row.
        ranks: Its checked ranks. A response with a better rank must not have a lower score.
    """
    if row.get("scores") is None:
        return None
    scores = check_scores(parse_list(row, "scores"), len(ranks))
    pairs = [(rank, score) for rank, score in zip(ranks, scores, strict=True) if rank is not None and score is not None]
    for rank, score in pairs:
        if any(other_rank > rank and other_score > score for other_rank, other_score in pairs):
            raise ValueError("'ranks' and 'scores' contradict each other (1 is the best rank, higher the better score)")
    return scores


def parse_labels(row: dict, ranks: tuple[int | None, ...]) -> tuple[bool | None, ...] | None:
    """Return whether each response is good by itself; None if the row does not say.

    Args:
        row: The row.
        ranks: Its checked ranks. A bad response must not have a better rank than a good one.
    """
    if row.get("labels") is None:
        return None
    labels = check_labels(parse_list(row, "labels"), len(ranks))
    good = [rank for rank, label in zip(ranks, labels, strict=True) if label is True and rank is not None]
    bad = [rank for rank, label in zip(ranks, labels, strict=True) if label is False and rank is not None]
    if good and bad and max(good) > min(bad):
        raise ValueError("'ranks' and 'labels' contradict each other (1 is the best rank, true a good response)")
    return labels


def check_labels(labels: list, count: int) -> tuple[bool | None, ...]:
    """Return labels as true (good) or false (bad), or null for a response that was not judged.

    Args:
        labels: The value in the row.
        count: The number of responses, K.
    """
    if len(labels) != count:
        raise ValueError(f"{count} responses, {len(labels)} labels; expected one label per response")
    for position, label in enumerate(labels, 1):
        if label is not None and type(label) is not bool:
            raise ValueError(f"label {position} is {describe(label)}; expected true (good), false (bad) or null")
    return tuple(labels)


def check_scores(scores: list, count: int) -> tuple[float | None, ...]:
    """Return scores as finite numbers, or null for a response that was not scored.

    Args:
        scores: The value in the row.
        count: The number of responses, K.
    """
    if len(scores) != count:
        raise ValueError(f"{count} responses, {len(scores)} scores; expected one score per response")
    for position, score in enumerate(scores, 1):
        if score is not None and (type(score) not in (int, float) or not math.isfinite(score)):
            raise ValueError(f"score {position} is {describe(score)}; expected a number, or null (not scored)")
    return tuple(None if score is None else float(score) for score in scores)


def parse_name(row: dict, key: str) -> str | None:
    """Return a name or number under a key as a string without addresses; None if there is none."""
    value = row.get(key)
    if value is None:
        return None
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) not in (str, int):
        raise ValueError(f"'{key}' is {describe(value)}; expected a string, or no {key}")
    return without_emails(str(value))


def without_emails(name: str) -> str:
    """Return a name of a person with 8 hexadecimal digits of its SHA-256 for each e-mail address.

    What people are called goes into published files; who they are must not.
    """
    return EMAIL.sub(lambda match: digest_of_name(match[0]), name) if "@" in name else name


def digest_of_name(name: str) -> str:
    """Return 8 hexadecimal digits that stand for a person's name or address."""
    return hashlib.sha256(name.lower().encode()).hexdigest()[:8]


def parse_about(row: dict) -> dict[str, Any]:
    """Return what a row of any kind may say beside its content: user_id, kind and meta."""
    meta = row.get("meta")
    return {
        "user_id": parse_name(row, "user_id"),
        "kind": row["kind"] if isinstance(row.get("kind"), str) else None,
        "meta": meta if isinstance(meta, dict) and meta else None,
    }


def parse_row_text(row: dict) -> str | None:
    """Return what the row of a task says, of a worded prompt; None if it is none."""
    if row.get("row_text") is None:
        return None
    return parse_text(row, "row_text")


def parse_learnt(row: dict, prompt: str | tuple[dict, ...]) -> tuple[int, ...]:
    """Return the indices of the assistant messages inside a prompt that are taught too.

    Args:
        row: The row.
        prompt: Its checked prompt.
    """
    learnt = row.get("learnt")
    if learnt is None:
        return ()
    roles = [] if isinstance(prompt, str) else [message["role"] for message in prompt]
    answers = [i for i in range(1, len(roles)) if roles[i - 1 : i + 1] == ["user", "assistant"]]
    if not isinstance(learnt, list | tuple) or any(type(index) is not int or index not in answers for index in learnt):
        raise ValueError(f"'learnt' is {describe(learnt)}; expected indices (from 0) of answers in the prompt")
    return tuple(sorted(set(learnt)))


def parse_margin(row: dict) -> float | None:
    """Return the margin of a ranking, a finite number of at least 0; None if there is none."""
    margin = row.get("margin")
    if margin is None:
        return None
    if type(margin) not in (int, float) or not 0 <= margin < math.inf:
        raise ValueError(f"'margin' is {describe(margin)}; expected a number of at least 0, or no margin")
    return float(margin)


def parse_finished(row: dict, count: int) -> tuple[bool, ...] | None:
    """Return which responses of a ranking ended by themselves; None if the row does not say.

    Args:
        row: The row.
        count: The number of responses.
    """
    finished = row.get("finished")
    if finished is None:
        return None
    expected = "true (it ended by itself) or false (it was cut off) for each response"
    if not isinstance(finished, list):
        raise ValueError(f"'finished' is {describe(finished)}; expected a list with {expected}")
    if len(finished) != count:
        raise ValueError(f"{count} responses, {len(finished)} in 'finished'; expected {expected}")
    for position, value in enumerate(finished, 1):
        if not isinstance(value, bool):
            raise ValueError(f"entry {position} of 'finished' is {describe(value)}; expected {expected}")
    return tuple(finished)


def describe_key(row: dict, key: str) -> str:
    """Describe the value under a key for an error line: "missing" where the row has no such key."""
    return describe(row[key]) if key in row else "missing"


def describe(value: object) -> str:
    """Describe a JSON value for an error line: "null", "blank", "a list", "'a short text'"."""
    if isinstance(value, str):
        if not value.strip():
            return "blank"
        return repr(value if len(value) <= 40 else value[:37] + "...")
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return json.dumps(value, default=str)
