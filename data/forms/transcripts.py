r"""Split transcripts, whole conversations in one text, into messages.

Anthropic's hh-rlhf writes "\n\nHuman: …\n\nAssistant: …", and NVIDIA's NeMo
"<extra_id_0>System\n…<extra_id_1>User\n…\n<extra_id_1>Assistant\n…".
"""

import re

from data.forms.messages import Messages, read_messages
from data.templated import is_transcript

HH_ROLES = {"Human": "user", "Assistant": "assistant"}
"""Roles as hh-rlhf writes them."""
HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
"""The beginning of a turn in hh-rlhf."""
HH_LINE = re.compile(r"(?:\A|\n)[ \t]*(Human|Assistant):")
"""The beginning of a turn where no blank lines stand between the turns."""
NEMO_TURN = re.compile(r"\n?<extra_id_[01]>(System|User|Assistant)\n")
"""The beginning of a turn in NeMo's chat template."""
NEMO_END = re.compile(r"\n?<extra_id_1>\s*\Z")
"""The end of an answer in NeMo's chat template."""


def is_hh(value: object) -> bool:
    """Return whether a value is a transcript in the form of hh-rlhf, which begins with a person."""
    return isinstance(value, str) and is_transcript(value)


def split_hh(text: str) -> Messages:
    """Split a transcript in the form of hh-rlhf.

    Args:
        text: The transcript; it may end with "Assistant:", which is the last message then.

    Returns:
        Messages {role, content}, stripped of white space; a content may be blank.
    """
    turn = HH_TURN if "\n\nAssistant:" in text or text.startswith("\n\nHuman:") else HH_LINE
    start, *parts = turn.split(text.lstrip() if is_hh(text) else text)
    if start.strip() or not parts:
        raise ValueError("'chosen' and 'rejected' are strings without a prompt; add a key 'prompt'")
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": HH_ROLES[name], "content": content.strip()} for name, content in pairs]


def hh_prompt(text: str) -> Messages:
    """Split a prompt that is a transcript; the "Assistant:" at its end asks for the answer."""
    messages = split_hh(text)
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()
    return read_messages(messages)


def is_nemo(value: object) -> bool:
    """Return whether a value is a transcript in NeMo's chat template."""
    return isinstance(value, str) and NEMO_TURN.match(value) is not None


def split_nemo(text: str) -> Messages:
    """Split a transcript in NeMo's chat template.

    Args:
        text: The transcript. A text before the first marker is the user's first message, as
            HelpSteer's prompts have it.

    Returns:
        Messages {role, content}, without an empty system message; the last may be blank.
    """
    start, *parts = NEMO_TURN.split(text)
    messages = [{"role": "user", "content": start}] if start.strip() else []
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        messages.append({"role": name.lower(), "content": content})
    return read_messages(messages, blank_end=True)


def helpsteer_prompt(text: object) -> object:
    """Split a prompt of HelpSteer, which holds several turns where it has NeMo's markers."""
    if not isinstance(text, str) or NEMO_TURN.search(text) is None:
        return text
    messages = split_nemo(text)
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        messages.pop()
    return messages
