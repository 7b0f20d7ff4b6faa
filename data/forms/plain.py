"""Convert rows of our own forms.

They are {text}, {prompt}, {prompt, completion} and {prompt, responses, ranks}.
"""

from data.forms.form import Form
from data.forms.messages import Messages, read_messages, read_prompt
from data.parsing import describe
from data.records import as_messages

RANKING_KEYS = ("id", "labeler", "margin", "finished")
"""Keys that a ranking of any form may have."""


def read_reply(row: dict, key: str, prompt: str | Messages) -> str:
    """Read an answer.

    Args:
        row: The row.
        key: The key of the answer: a string, one message, a list with one message, or such a list
            with the prompt before it.
        prompt: The prompt that is answered.
    """
    if isinstance(row[key], str):
        return row[key]
    if not isinstance(row[key], dict | list):
        raise ValueError(f"'{key}' is {describe(row[key])}; expected a text or the assistant's message")
    value = [row[key]] if isinstance(row[key], dict) else row[key]
    messages = read_messages(value, blank_end=True)
    before = as_messages(prompt) if isinstance(prompt, str | list) else []
    if messages[: len(before)] == before:
        messages = messages[len(before) :]
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages) or "nothing"
        raise ValueError(f"'{key}' adds {roles} to the prompt; expected one assistant message")
    return messages[0]["content"]


def completion_of(row: dict) -> dict:
    """Read a prompt and its completion."""
    prompt = read_prompt(row)
    return {"prompt": prompt, "completion": read_reply(row, "completion", prompt)}


def ranking_of(row: dict) -> dict:
    """Keep the row, with the system message as a part of the prompt."""
    return {**row, "prompt": read_prompt(row)}


def prompt_of(row: dict) -> dict:
    """Read only the prompt."""
    return {"prompt": read_prompt(row)}


TEXT = Form(("text",), (), dict, strict=True)
PROMPT_COMPLETION = Form(("prompt", "completion"), ("system",), completion_of, strict=True)
RANKED_RESPONSES = Form(("prompt", "responses", "ranks"), (*RANKING_KEYS, "system"), ranking_of, strict=True)
PROMPT_ONLY = Form(("prompt",), ("system",), prompt_of)
