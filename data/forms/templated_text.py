"""Convert conversations in one text: {text} in a chat template, as of Guanaco, and Baize."""

import re

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.learnt import taught
from data.forms.messages import up_to_last
from data.parsing import parse_text
from data.templated import BAIZE as BAIZE_TEMPLATE
from data.templated import is_transcript, template_of, turns_in, turns_of_template

BAIZE_MARKER = "[|Human|]"
BAIZE_END = re.compile(r"\s*\[\|Human\|\]\s*$")
"""Baize ends each conversation with a turn of the human that is empty."""


def is_conversation(row: Row) -> bool:
    """Return whether the text is a conversation in a template, not a document."""
    text = row["text"]
    return isinstance(text, str) and (is_transcript(text) or template_of(text) is not None)


def is_baize(row: Row) -> bool:
    """Return whether the text has the markers of Baize."""
    return isinstance(row["input"], str) and BAIZE_MARKER in row["input"]


def messages_of(row: Row, options: Options) -> list[Row]:
    """Return the messages of the conversation."""
    if options.templated == "keep":
        raise ValueError("a text whose template is kept has no prompt; say templated: strip, or read it as documents")
    if "text" in row:
        messages = turns_in(row["text"], "text", options.templated)
    else:  # Baize has this one template, so that nobody need say what to do with it
        messages = turns_of_template(BAIZE_END.sub("", parse_text(row, "input")), "input", BAIZE_TEMPLATE)
    if messages is None:
        raise ValueError("the text is no conversation in a chat template; name the file as data.documents")
    return messages


def demonstration_of(row: Row, options: Options) -> list[Row | LeftOut]:
    """Read the conversation; all its answers are taught."""
    return taught(messages_of(row, options), ())


def prompt_of(row: Row, options: Options) -> Row:
    """Read the conversation up to the last turn of the user."""
    return {"prompt": up_to_last("user", messages_of(row, options))}


TRANSCRIPT = Form(
    ("text",), (), demonstration_of, name="Guanaco or transcripts", fits=is_conversation, prompt=prompt_of
)
BAIZE = Form(("topic", "input"), (), demonstration_of, name="Baize", fits=is_baize, prompt=prompt_of)
