"""Compare rows, made of a prompt and a response, with what the chat template writes.

A row should be the beginning of the whole conversation as the template writes it. Where it is not,
a model is trained on a text that the template never writes: a generation prompt may open a thought,
or lack a newline; a template may drop thoughts, or trim answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError

from data.conversations import encode_conversations
from data.encode import encode_response
from data.records import as_messages
from data.template_text import literal, own_variables, with_variables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_ROWS = 1000
"""Rows of a file that are compared at most."""
MOST_VARIABLES = 4
"""Variables of a template that are tried as a remedy at most."""
CONTEXT = 24
"""Characters that are shown before and after the first difference."""
THOUGHT = re.compile(  # <think>, </think>, <seed:think>, <|thinking|>, [THINK]
    r"(?:<\|?|\[|\u25c1)(/?)(?:\w+:)?(?:think|thinking|thoughts?|reason|reasoning)(?:\|?>|\]|\u25b7)", re.IGNORECASE
)
"""The tag that opens or closes a thought; group 1 is "/" where it closes one."""


class Probe(NamedTuple):
    """Describe a conversation with which a template is tried."""

    name: str
    """What is special about it."""
    prompt: list[dict]
    """Its messages before the answer."""
    answer: str
    """The answer."""


_USER = {"role": "user", "content": "What is red?"}
_EARLIER = {"role": "assistant", "content": "A fox."}
_EARLIER_THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nA fox."}
PROBES = (
    Probe("one turn", [_USER], "A fox."),
    Probe("several turns", [_USER, _EARLIER, _USER], "A fox."),
    Probe("a thought in an earlier answer", [_USER, _EARLIER_THOUGHT, _USER], "A fox."),
    Probe("a thought in the answer", [_USER], "<think>\nHm.\n</think>\n\nA fox."),
    Probe("blanks around the answer", [_USER], " A fox. \n"),
)


class Answered(NamedTuple):
    """Hold a prompt and an answer to it: what a row is made of."""

    prompt: str | Iterable[dict]
    """A string or messages, as of `encode_prompt`."""
    answer: str
    """The text of the answer."""
    finished: bool = True
    """Whether the answer ended by itself."""


@dataclass(frozen=True)
class Difference:
    """Describe the first place where a row differs from what the chat template writes."""

    row: str
    """The row's text around that place."""
    template: str
    """The template's text around that place."""
    opens: str | None = None
    """The tag of a thought that the prompt opens and the answer does not close, or None."""

    def line(self) -> str:
        """Return both texts in words that continue a sentence about a row."""
        if self.row == self.template:
            return f"the template splits the same text {self.row!r} into other tokens"
        return f"the row has {self.row!r}, the template has {self.template!r}"


def differences(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Answered]
) -> Iterator[Difference | TemplateError | None]:
    """Compare each row with its conversation as the chat template writes it.

    Args:
        tokenizer: The tokenizer with its chat template.
        rows: Prompts and answers.

    Yields:
        How a row differs; None if its ids are the beginning of the template's; the TemplateError
        with
        which the template refuses the conversation.
    """
    prompts = [as_messages(row.prompt) for row in rows]
    conversations = [
        [*prompt, {"role": "assistant", "content": row.answer}] for prompt, row in zip(prompts, rows, strict=True)
    ]
    encoded_prompts = encode_conversations(tokenizer, prompts, add_generation_prompt=True)
    encoded_conversations = encode_conversations(tokenizer, conversations, add_generation_prompt=False)
    for row, prompt, written in zip(rows, encoded_prompts, encoded_conversations, strict=True):
        if isinstance(prompt, TemplateError):
            yield prompt
        elif isinstance(written, TemplateError):
            yield written
        else:
            ids = prompt + encode_response(tokenizer, row.answer, row.finished)
            if written[: len(ids)] == ids:
                yield None
            else:
                opens = _open_thought(_decode(tokenizer, prompt)) and _open_thought(_decode(tokenizer, ids))
                yield _first_difference(tokenizer, ids, written, opens)


def _first_difference(
    tokenizer: PreTrainedTokenizerBase, row: list[int], template: list[int], opens: str | None
) -> Difference:
    """Return the first difference between a row's ids and the template's.

    Args:
        tokenizer: The tokenizer.
        row: The ids of the row.
        template: The ids of the conversation, of which the row's are not the beginning.
        opens: As of `Difference`.
    """
    row_text, template_text = _decode(tokenizer, row), _decode(tokenizer, template)
    if template_text.startswith(row_text):  # the same text in other tokens
        pairs = enumerate(zip(row, [*template, None], strict=False))
        equal = next((i for i, (one, other) in pairs if one != other), len(template))
        excerpt = _excerpt(row_text, len(_decode(tokenizer, row[:equal])))
        return Difference(excerpt, excerpt, opens)
    characters = enumerate(zip(row_text, template_text, strict=False))
    shorter = min(len(row_text), len(template_text))
    position = next((i for i, (one, other) in characters if one != other), shorter)
    return Difference(_excerpt(row_text, position), _excerpt(template_text, position), opens)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of token ids."""
    return str(tokenizer.decode(ids))


def _excerpt(text: str, position: int) -> str:
    """Return the text around a position, with … where it continues."""
    excerpt = text[max(0, position - CONTEXT) : position + CONTEXT]
    if position > CONTEXT:
        excerpt = "\u2026" + excerpt
    if position + CONTEXT < len(text):
        excerpt += "\u2026"
    return excerpt


def _open_thought(text: str) -> str | None:
    """Return the tag of a thought that the text opens last and does not close, or None."""
    tags = list(THOUGHT.finditer(text))
    return tags[-1][0] if tags and not tags[-1][1] else None


@dataclass(frozen=True)
class Agreement:
    """Hold the result of `compare`."""

    compared: int
    """The number of rows that were compared."""
    total: int
    """The number of all rows."""
    differ: list[tuple[str, Difference]]
    """(name, difference) of each row that differs."""

    def text(self, what: str) -> str:
        """Say how many rows differ, and how the first does; `what` names the rows."""
        compared = f"{self.compared:,}" if self.compared == self.total else f"the first {self.compared:,}"
        if not self.differ:
            return f"{compared} {what}, all as it writes them"
        name, first = self.differ[0]
        text = f"{len(self.differ):,} of {compared} {what} are not what the chat template writes"
        text += f"; the first, {name}: {first.line()}"
        opened = [difference.opens for _, difference in self.differ if difference.opens]
        if opened:
            which = "all of them" if len(opened) == len(self.differ) else f"{len(opened):,} of them"
            text += f"; in {which} the generation prompt opens {opened[0]}, which the answer does not close: it is "
            text += "taught as a thought"
        return text


def compare(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Answered], names: Sequence[str]) -> Agreement:
    """Compare the first 1000 rows with what the chat template writes.

    Args:
        tokenizer: The tokenizer with its chat template.
        rows: Prompts and answers.
        names: The location of each row.
    """
    compared = rows[:MOST_ROWS]
    differ = []
    for name, difference in zip(names, differences(tokenizer, compared), strict=False):
        if isinstance(difference, Difference):
            differ.append((name, difference))
    return Agreement(len(compared), len(rows), differ)


def probe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Difference]:
    """Try a template with the conversations of PROBES.

    Returns:
        {what is special about a conversation: how rows of it differ}. Conversations that the
        template
        refuses (some take only one turn) are left out.
    """
    by_name = {}
    rows = [Answered(probed.prompt, probed.answer) for probed in PROBES]
    for probed, difference in zip(PROBES, differences(tokenizer, rows), strict=True):
        if isinstance(difference, Difference):
            by_name[probed.name] = difference
    return by_name


def remedy(tokenizer: PreTrainedTokenizerBase, already: Sequence[str] = ()) -> str:
    """Say what can be done about differences: set a variable of the template, or change it.

    Args:
        tokenizer: The tokenizer with its chat template.
        already: Variables of the template that are set.
    """
    other = "give a template that fits the rows as model.chat_template: FILE"
    template = tokenizer.chat_template
    if not isinstance(template, str):  # several templates, or code of the tokenizer's own
        return other
    names = [name for name in own_variables(template) if name not in already]
    names.sort(key=lambda name: "think" not in name and "reason" not in name)  # the likely ones first
    try:
        for name in names[:MOST_VARIABLES]:
            for value in (False, True):
                tokenizer.chat_template = with_variables(template, {name: value})
                if not {"one turn", "several turns"} & probe(tokenizer).keys():
                    return f"set model.chat_template_kwargs: {{{name}: {literal(value)}}}, which fixes that, or {other}"
    except TemplateError:  # it takes too long
        pass
    finally:
        tokenizer.chat_template = template
    return other
