"""Write what a judge is asked, and read its verdict."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from data.records import as_messages
from pipeline.errors import UserError
from stages.evaluation.judging import Verdict
from stages.settings.scorers.judge import JINJA, PLACEHOLDER

AGAIN = "Give your verdict again, and nothing else, strictly in the form that is asked for above."
"""What is added to a question whose answer had no valid verdict."""
MEANINGS: dict[str, Verdict] = {
    **dict.fromkeys(("a", "1", "first"), "first"),
    **dict.fromkeys(("b", "2", "second"), "second"),
    **dict.fromkeys(("c", "tie", "equal", "0"), "tie"),
}  # type: ignore[assignment]
"""A verdict in small letters → what it means."""


class Prompt(Protocol):
    """Write a question."""

    def __call__(self, values: Mapping[str, Any]) -> str:
        """Return the prompt with the values in their places."""


def load_prompt(file: Path, name: str) -> Prompt:
    """Return what writes the prompt of a file.

    Args:
        file: The file; with an ending of JINJA a template, otherwise text with {names}.
        name: The scorer's name, for error lines.
    """
    text = file.read_text(encoding="utf-8")

    def missing(key: str, values: Mapping[str, Any]) -> UserError:
        known = ", ".join(sorted(values))
        return UserError(f"{name}: the prompt {file} asks for {key}, which a row lacks (it has {known}); correct it")

    if file.suffix in JINJA:
        from jinja2 import StrictUndefined, TemplateError
        from jinja2.sandbox import SandboxedEnvironment

        environment = SandboxedEnvironment(autoescape=False, undefined=StrictUndefined, keep_trailing_newline=True)
        template = environment.from_string(text)

        def fill_template(values: Mapping[str, Any]) -> str:
            try:
                return template.render(values)
            except TemplateError as error:
                raise UserError(f"{name}: the prompt {file} cannot be filled ({error}); correct it") from error

        return fill_template

    def fill(values: Mapping[str, Any]) -> str:
        def value(match: re.Match) -> str:
            if match[1] not in values:
                raise missing(match[1], values)
            given = values[match[1]]
            return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)

        return PLACEHOLDER.sub(value, text)  # one pass: what is filled in is not searched again

    return fill


def values_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a prompt may use of a row of data: its keys, `question` and `conversation`."""
    messages = as_messages(row["prompt"])
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    is_one = len(messages) == 1
    return {
        **row,
        "question": messages[-1]["content"],
        "conversation": messages[0]["content"] if is_one else "\n\n".join(lines),
    }


def found_verdict(answer: str, pattern: str) -> str | None:
    """Return the last verdict in an answer; None without one.

    Args:
        answer: The judge's answer.
        pattern: A regular expression with one group. What stands inside <think> is no verdict.
    """
    if "<think>" in answer or "</think>" in answer:
        answer = answer.rpartition("</think>")[2] if "</think>" in answer else ""
    found = re.findall(pattern, answer)
    return found[-1] if found else None


def grade_of(answer: str, pattern: str, lowest: float, highest: float) -> float | None:
    """Return the grade in an answer; None without a number in the scale."""
    try:
        grade = float(found_verdict(answer, pattern) or "")
    except ValueError:
        return None
    return grade if lowest <= grade <= highest else None


def verdict_of(answer: str, pattern: str) -> Verdict | None:
    """Return the verdict on two responses in an answer; None without one."""
    return MEANINGS.get((found_verdict(answer, pattern) or "").strip().lower())
