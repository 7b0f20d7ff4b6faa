r"""Convert preference pairs: `chosen` and `rejected` with or without a prompt.

A pair is a ranking of K = 2, the chosen response first. Pairs without a prompt are two whole
conversations, as messages or in the form of Anthropic's hh-rlhf: "\n\nHuman: …\n\nAssistant: …".
"""

import re

from data.forms.form import Form, Options
from data.forms.instructions import INSTRUCTION_KEYS, read_instruction
from data.forms.messages import Messages, read_conversation, read_messages, read_prompt
from data.forms.plain import RANKING_KEYS, read_reply
from data.parsing import check_scores

PAIR = ("chosen", "rejected")
PAIR_KEYS = (*RANKING_KEYS, "score_chosen", "score_rejected")
"""Keys that a pair may have."""
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
"""Roles as hh-rlhf writes them."""


def ranking_from_pair(prompt: str | Messages, row: dict) -> dict:
    """Return a row of our ranking form, the chosen response ranked 1.

    Args:
        prompt: The prompt of both responses.
        row: The row with `chosen`, `rejected`, and perhaps the keys of RANKING_KEYS.
    """
    responses = [read_reply(row, "chosen", prompt), read_reply(row, "rejected", prompt)]
    optional = {key: row.get(key) for key in RANKING_KEYS}
    scores = [row.get("score_chosen"), row.get("score_rejected")]
    if None not in scores:
        optional["scores"] = list(check_scores(scores, 2))
    is_tie = None not in scores and scores[0] == scores[1]
    return {"prompt": prompt, "responses": responses, "ranks": [1, 1] if is_tie else [1, 2], **optional}


def read_transcript(value: object) -> Messages:
    """Read a whole conversation: messages, or a string as in hh-rlhf."""
    if not isinstance(value, str):
        return read_messages(value, blank_end=True)
    start, *parts = re.split(r"\n\n(Human|Assistant):", value)
    if start.strip() or not parts:
        raise ValueError("'chosen' and 'rejected' are strings without a prompt; add a key 'prompt'")
    messages = []
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        messages.append({"role": HH_ROLES[name], "content": content.strip()})
    return read_messages(messages, blank_end=True)


def shared_prompt(row: dict) -> Messages:
    """Return the prompt of two whole conversations: all but the last message, equal in both."""
    chosen, rejected = read_transcript(row["chosen"])[:-1], read_transcript(row["rejected"])[:-1]
    if chosen != rejected:
        raise ValueError("'chosen' and 'rejected' differ before the last message; both need the same prompt")
    return chosen


def prompt_pair(row: dict, options: Options) -> dict:
    """Convert {prompt, chosen, rejected}."""
    return ranking_from_pair(read_prompt(row), row)


def conversation_pair(row: dict, options: Options) -> dict:
    """Convert {conversations, chosen, rejected}."""
    return ranking_from_pair(read_conversation(row), row)


def instruction_pair(row: dict, options: Options) -> dict:
    """Convert {instruction, chosen, rejected}."""
    return ranking_from_pair(read_instruction(row), row)


def bare_pair(row: dict, options: Options) -> dict:
    """Convert {chosen, rejected}, two whole conversations."""
    whole = {key: read_transcript(row[key]) for key in PAIR}
    return ranking_from_pair(shared_prompt(whole), {**row, **whole})


def prompt_of_bare_pair(row: dict, options: Options) -> dict:
    """Take only the prompt of two whole conversations."""
    return {"prompt": shared_prompt(row)}


PROMPT_PAIR = Form(("prompt", *PAIR), (*PAIR_KEYS, "system"), prompt_pair)
CONVERSATION_PAIR = Form(("conversations", *PAIR), (*PAIR_KEYS, "system"), conversation_pair)
INSTRUCTION_PAIR = Form(("instruction", *PAIR), (*PAIR_KEYS, *INSTRUCTION_KEYS), instruction_pair)
BARE_PAIR = Form(PAIR, PAIR_KEYS, bare_pair)
BARE_PAIR_PROMPT = Form(PAIR, (), prompt_of_bare_pair)
