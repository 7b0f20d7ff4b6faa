"""Parse a row of our own form into a record, or raise ValueError("what is wrong; what to do").

Only a response of a ranking may be blank: a policy can answer nothing at all and be ranked last for
it. A blank document, prompt, message or completion is an error of some export, and would teach the
model to say nothing.
"""

import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import replace

from data.records import Demonstration, Document, Prompt, Ranking, content_id

ROLES = ("system", "user", "assistant")
METADATA = ("meta", "metadata", "id", "source", "url", "timestamp")
"""Keys that any row may have; they are not read."""

# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


def parse_demonstration(row: dict) -> Demonstration:
    """Parse a row {prompt, completion}."""
    return Demonstration(parse_prompt_value(row), parse_text(row, "completion"))


def parse_document(row: dict) -> Document:
    """Parse a row {text}."""
    return Document(parse_text(row, "text"))


def parse_prompt(row: dict) -> Prompt:
    """Parse a row {prompt}."""
    return Prompt(parse_prompt_value(row))


def parse_ranking(row: dict) -> Ranking:
    """Parse a row {prompt, responses, ranks, …}; without an id it gets one from its content."""
    prompt, responses, ranks = parse_prompt_value(row), parse_list(row, "responses"), parse_list(row, "ranks")
    if len(responses) < 2:
        raise ValueError(f"a ranking needs at least 2 responses, not {len(responses)}; add one, or delete it")
    for position, response in enumerate(responses, 1):
        if not isinstance(response, str):
            raise ValueError(f"response {position} is {describe(response)}; expected a string")
    if len(ranks) != len(responses):
        raise ValueError(f"{len(responses)} responses, {len(ranks)} ranks; expected one rank per response")
    for position, rank in enumerate(ranks, 1):
        if rank is not None and (type(rank) is not int or rank < 1):
            raise ValueError(f"rank {position} is {describe(rank)}; expected 1 (best), 2, … or null (not judged)")
    identifier, labeler = row.get("id"), row.get("labeler")
    if (identifier is not None and type(identifier) not in (str, int)) or identifier == "":
        raise ValueError(f"'id' is {describe(identifier)}; expected a string, or no id")
    if not isinstance(labeler, str | None):
        raise ValueError(f"'labeler' is {describe(labeler)}; expected a string, or no labeler")
    ranking = Ranking(
        id=str(identifier),
        prompt=prompt,
        responses=tuple(responses),
        ranks=tuple(ranks),
        labeler=labeler,
        margin=parse_margin(row),
        finished=parse_finished(row, len(responses)),
    )
    return ranking if identifier is not None else replace(ranking, id=content_id(ranking))


def refuse_unknown_keys(row: dict, known: Iterable[str]) -> None:
    """Raise ValueError for a key that is neither known nor metadata.

    Meant for rows of our own forms, where a misspelt `labeler` would otherwise be lost silently.
    """
    for key in row:
        if key not in known and key not in METADATA:
            similar = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean '{similar[0]}'?" if similar else "remove it or put it under 'meta' (not read)"
            raise ValueError(f"unknown key '{key}'; {hint}")


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
    """Return the list under a key of a ranking."""
    if not isinstance(row.get(key), list):
        raise ValueError(f"'{key}' is {describe_key(row, key)}; expected a list with one entry per response")
    return row[key]


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
