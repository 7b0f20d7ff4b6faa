"""Read what a request asks for: numbers within bounds, texts, messages."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.people.playground.engine import Options

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of OpenAI's interface → ours."""
MOST_STOPS = 4
"""Stop texts of a request, as in OpenAI's interface."""
HOTTEST = 10.0
"""The highest temperature."""


class BadField(ValueError):
    """Report a key of a request that is wrong."""

    def __init__(self, key: str, sentence: str) -> None:
        """Build the error from the key and what is wrong with it."""
        super().__init__(f"{key}: {sentence}")
        self.key = key


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing, and the limit of what it may say."""

    temperature: float
    """Sampling temperature."""
    top_p: float
    """Total probability of the tokens that are drawn from."""
    top_k: int
    """Number of the tokens that are drawn from; 0: all."""
    max_tokens: int
    """The longest answer."""
    max_tokens_limit: int
    """The longest answer that may be asked for."""


def options_of(body: Mapping[str, Any], defaults: Defaults, length_key: str = "max_tokens") -> Options:
    """Return how a request wants answers sampled; null stands for the default.

    Args:
        body: The request.
        defaults: What holds where it says nothing; a seed is then drawn.
        length_key: Its key of the longest answer.

    Raises:
        BadField: A value is none, or out of bounds.
    """
    most = defaults.max_tokens_limit
    seed = integer(body, "seed", secrets.randbits(31), -(2**63), 2**63 - 1)
    top_p = number(body, "top_p", defaults.top_p, 0.0, 1.0)
    if top_p == 0:
        raise BadField("top_p", "is 0; use more than 0 and at most 1")
    return Options(
        temperature=number(body, "temperature", defaults.temperature, 0.0, HOTTEST),
        top_p=top_p,
        top_k=integer(body, "top_k", defaults.top_k, 0, 10**9),
        max_tokens=integer(body, length_key, min(defaults.max_tokens, most), 1, most),
        seed=seed,
        stop=stops_of(body.get("stop")),
    )


def number(body: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    """Return a number of a request.

    Raises:
        BadField: It is none, or out of bounds.
    """
    value = body.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise BadField(key, f"is {str(value)[:40]}; use a number from {low:g} to {high:g}")
    return float(value)


def integer(body: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    """Return a whole number of a request.

    Raises:
        BadField: It is none, or out of bounds.
    """
    value = body.get(key)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise BadField(key, f"is {str(value)[:40]}; use a whole number from {low:,} to {high:,}")
    return value


def stops_of(value: Any) -> tuple[str, ...]:
    """Return the stop texts of a request: a text, or a list of them.

    Raises:
        BadField: They are something else.
    """
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise BadField("stop", "use a text that is not empty, or a list of such texts")
    if len(stops) > MOST_STOPS:
        raise BadField("stop", f"{len(stops)} texts are more than {MOST_STOPS}")
    return tuple(stops)


def messages_of(value: Any) -> tuple[dict[str, str], ...]:
    """Return the messages of a request, in the form of OpenAI's interface, as ours.

    Raises:
        BadField: They are none, hold something that is not text, or do not end with the user's.
    """
    if not isinstance(value, list) or not value:
        raise BadField("messages", "a list of {role, content} is needed")
    messages = []
    for index, message in enumerate(value):
        place = f"messages[{index}]"
        if not isinstance(message, dict):
            raise BadField(place, "is no object {role, content}")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise BadField(f"{place}.role", f"is {str(role)[:40]!r}; use system, user or assistant")
        for key, other in message.items():
            if key not in ("role", "content") and other not in (None, [], ""):
                raise BadField(f"{place}.{key[:40]}", "is not supported; send role and content alone")
        if ROLES[role] == "system" and index:
            raise BadField(f"{place}.role", "a system message must be the first one, and there can be one")
        messages.append({"role": ROLES[role], "content": content_of(message.get("content"), f"{place}.content")})
    if messages[-1]["role"] != "user":
        raise BadField("messages", "the last message must be the user's: an answer cannot be continued")
    return tuple(messages)


def content_of(value: Any, place: str) -> str:
    """Return the text of a message: a string, or parts of type text.

    Raises:
        BadField: It holds something else.
    """
    if isinstance(value, list) and value:
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise BadField(place, f"has a part of type {str(kind)[:40]!r}; only text is supported")
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadField(place, "a text is needed")
    return value
