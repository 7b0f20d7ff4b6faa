"""Convert rows of our own forms.

They are {text}, {prompt}, {prompt, completion} and {prompt, responses, ranks}; scores or labels may
stand in place of ranks.
"""

from data.forms.form import Form, Options
from data.forms.messages import LIST_OF_MESSAGES, SYSTEM_KEYS, Messages, from_text, read_messages, read_prompt
from data.forms.scores import ranks_of_scores
from data.parsing import check_labels, check_scores, describe, parse_list
from data.records import as_messages, ranks_of_labels

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
    value = row[key]
    if isinstance(value, str):
        if not LIST_OF_MESSAGES.match(value):
            return value
        value = from_text(value)
    if not isinstance(value, dict | list):
        raise ValueError(f"'{key}' is {describe(value)}; expected a text or the assistant's message")
    value = [value] if isinstance(value, dict) else value
    messages = read_messages(value, blank_end=True)
    before = as_messages(prompt) if isinstance(prompt, str | list) else []
    if messages[: len(before)] == before:
        messages = messages[len(before) :]
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages) or "nothing"
        raise ValueError(f"'{key}' adds {roles} to the prompt; expected one assistant message")
    return messages[0]["content"]


def completion_of(row: dict, options: Options) -> dict:
    """Read a prompt and its completion."""
    prompt = read_prompt(row)
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise ValueError(
            "the prompt ends with the assistant's message (a prefill), which the chat template would end there; "
            "put its text in front of the completion's"
        )
    return {"prompt": prompt, "completion": read_reply(row, "completion", prompt), "learnt": row.get("learnt")}


def ranking_of(row: dict, options: Options) -> dict:
    """Keep the row, with the system message as a part of the prompt."""
    return {**row, "prompt": read_prompt(row)}


def prompt_of(row: dict, options: Options) -> dict:
    """Read only the prompt."""
    return {"prompt": read_prompt(row)}


def text_of(row: dict, options: Options) -> dict:
    """Keep the row."""
    return row


def scored_ranking_of(row: dict, options: Options) -> dict:
    """Make ranks of scores: higher is better, and close scores are a tie."""
    scores = check_scores(parse_list(row, "scores"), len(parse_list(row, "responses")))
    return {**ranking_of(row, options), "ranks": ranks_of_scores(scores, options.tie_within)}


def labelled_responses_of(row: dict, options: Options) -> dict:
    """Make ranks of labels: good responses are ranked first, bad ones behind them."""
    labels = check_labels(parse_list(row, "labels"), len(parse_list(row, "responses")))
    return {**ranking_of(row, options), "ranks": ranks_of_labels(labels)}


TEXT = Form(("text",), (), text_of)
PROMPT_COMPLETION = Form(("prompt", "completion"), (*SYSTEM_KEYS, "learnt"), completion_of)
RANKED_RESPONSES = Form(
    ("prompt", "responses", "ranks"), (*RANKING_KEYS, "scores", "labels", *SYSTEM_KEYS), ranking_of, strict=True
)
SCORED_RESPONSES = Form(
    ("prompt", "responses", "scores"), (*RANKING_KEYS, "labels", *SYSTEM_KEYS), scored_ranking_of, strict=True
)
LABELLED_RESPONSES = Form(
    ("prompt", "responses", "labels"), (*RANKING_KEYS, *SYSTEM_KEYS), labelled_responses_of, strict=True
)
PROMPT_ONLY = Form(("prompt",), SYSTEM_KEYS, prompt_of)
RULED_PROMPT = Form(("data_source", "prompt", "reward_model"), SYSTEM_KEYS, prompt_of, name="verl")
"""A prompt whose answers a rule scores; the rule is not read."""
