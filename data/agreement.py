"""Do rows, prompt and response tokenized apart, begin what the chat template writes of the whole conversation?

Where they do not, training is on a text that the template never writes: a generation prompt may open a thought, or lack
a newline; a template may drop thoughts, or trim answers.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from data.encode import encode_conversations, encode_response
from data.records import as_messages
from data.template_text import literal, own_variables, with_variables

MOST = 1000  # rows of a file that are looked at
TRIED = 4  # variables of a template that are tried for a remedy
AROUND = 24  # characters that are shown before and behind the place
THOUGHT = re.compile(  # <think>, </think>, <seed:think>, <|thinking|>, [THINK]
    r"(?:<\|?|\[|\u25c1)(/?)(?:\w+:)?(?:think|thinking|thoughts?|reason|reasoning)(?:\|?>|\]|\u25b7)", re.IGNORECASE
)
USER = {"role": "user", "content": "What is red?"}
FIRST = [USER]
LATER = [USER, {"role": "assistant", "content": "A fox."}, USER]
THOUGHTFUL = [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nA fox."}, USER]
PROBES = (  # what a conversation has, its messages before the answer, the answer
    ("one turn", FIRST, "A fox."),
    ("several turns", LATER, "A fox."),
    ("a thought in an earlier answer", THOUGHTFUL, "A fox."),
    ("a thought in the answer", FIRST, "<think>\nHm.\n</think>\n\nA fox."),
    ("blanks around the answer", FIRST, " A fox. \n"),
)


@dataclass(frozen=True)
class Difference:
    """A place where a row differs from what the chat template writes.

    row, template: both texts around that place. opens: the tag of a thought that the generation prompt opens and the
    answer does not close, or None.
    """

    row: str
    template: str
    opens: str | None = None

    def line(self) -> str:
        """Return both texts, in words that continue a sentence about a row."""
        if self.row == self.template:
            return f"the same text {self.row!r} is other tokens there"
        return f"the row has {self.row!r}, the template {self.template!r}"


def differences(tokenizer, rows: Sequence[tuple]) -> Iterator[Difference | TemplateError | None]:
    """Yield how each row differs from its conversation as the chat template writes it; None where its ids begin the
    template's; the template's refusal where it refuses the conversation.

    Args:
        tokenizer: The tokenizer with its chat template.
        rows: (prompt, answer) or (prompt, answer, whether it is finished); prompts as of `encode_prompt`.
    """
    rows = [(as_messages(prompt), answer, *finished) for prompt, answer, *finished in rows]
    whole = [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer, *_ in rows]
    asked = encode_conversations(tokenizer, [prompt for prompt, *_ in rows], add_generation_prompt=True)
    written = encode_conversations(tokenizer, whole, add_generation_prompt=False)
    for (_, answer, *finished), prompt, template in zip(rows, asked, written, strict=True):
        if isinstance(prompt, TemplateError) or isinstance(template, TemplateError):
            yield prompt if isinstance(prompt, TemplateError) else template
            continue
        row = prompt + encode_response(tokenizer, answer, *finished)
        if template[: len(row)] == row:
            yield None
        else:
            opens = _opened(tokenizer.decode(prompt)) and _opened(tokenizer.decode(row))
            yield _difference(tokenizer, row, template, opens)


def _difference(tokenizer, row: list[int], template: list[int], opens: str | None) -> Difference:
    texts = [tokenizer.decode(ids) for ids in (row, template)]
    if texts[1].startswith(texts[0]):  # cut into other tokens
        pairs = enumerate(zip(row, [*template, None], strict=False))
        same = next((i for i, (one, other) in pairs if one != other), len(template))
        at = len(tokenizer.decode(row[:same]))
    else:
        at = next((i for i, (one, other) in enumerate(zip(*texts, strict=False)) if one != other), min(map(len, texts)))
    shown = [_around(text, at) for text in texts]
    if texts[1].startswith(texts[0]):
        shown[1] = shown[0]
    return Difference(*shown, opens)


def _around(text: str, at: int) -> str:
    before, behind = text[max(0, at - AROUND) : at], text[at : at + AROUND]
    return "\u2026" * (at > AROUND) + before + behind + "\u2026" * (at + AROUND < len(text))


def _opened(text: str) -> str | None:
    """Return the tag of a thought that the text opens last and does not close."""
    tags = list(THOUGHT.finditer(text))
    return tags[-1][0] if tags and not tags[-1][1] else None


@dataclass(frozen=True)
class Agreement:
    """The result of `compare`. rows: how many were compared, of `of` in all; differ: (name, Difference) of each that
    differs."""

    rows: int
    of: int
    differ: list[tuple[str, Difference]]

    def text(self, what: str) -> str:
        """Say how many rows differ, and how the first one does. what: what the rows are, in the plural."""
        looked = f"{self.rows:,}" if self.rows == self.of else f"the first {self.rows:,}"
        if not self.differ:
            return f"{looked} {what}, all as it writes them"
        counted = f"{len(self.differ):,} of {looked} {what} are not what the chat template writes"
        name, first = self.differ[0]
        text = f"{counted}; the first, {name}: {first.line()}"
        opened = [difference.opens for _, difference in self.differ if difference.opens]
        if opened:
            which = "all of them" if len(opened) == len(self.differ) else f"{len(opened):,} of them"
            text += f"; in {which} the generation prompt opens {opened[0]}, which the answer does not close: it is "
            text += "taught as a thought"
        return text


def compare(tokenizer, rows: Sequence[tuple], names: Sequence[str]) -> Agreement:
    """Return how the first MOST rows agree with what the chat template writes.

    Args:
        tokenizer: The tokenizer with its chat template.
        rows: As of `differences`.
        names: The place of each.
    """
    looked = rows[:MOST]
    found = zip(names, differences(tokenizer, looked), strict=False)
    return Agreement(len(looked), len(rows), [(name, d) for name, d in found if isinstance(d, Difference)])


def probe(tokenizer) -> dict[str, Difference]:
    """Return where rows leave what the chat template writes, by what is in a conversation (see PROBES). Conversations
    that it refuses (some take one turn alone) are left out."""
    found = differences(tokenizer, [(prompt, answer) for _, prompt, answer in PROBES])
    named = zip((name for name, *_ in PROBES), found, strict=True)
    return {name: difference for name, difference in named if isinstance(difference, Difference)}


def remedy(tokenizer, already: Sequence[str] = ()) -> str:
    """Return what can be done about differences: a variable of the chat template that mends them, if one does.

    Args:
        tokenizer: The tokenizer with its chat template.
        already: Variables of it that are set.
    """
    other = "give a template that fits the rows as model.chat_template: FILE"
    template = tokenizer.chat_template
    if not isinstance(template, str):  # several, or code of the tokenizer's own
        return other
    names = [name for name in own_variables(template) if name not in already]
    names = sorted(names, key=lambda name: "think" not in name and "reason" not in name)[:TRIED]
    try:
        for name, value in ((name, value) for name in names for value in (False, True)):
            tokenizer.chat_template = with_variables(template, {name: value})
            if not {"one turn", "several turns"} & probe(tokenizer).keys():
                return f"set model.chat_template_kwargs: {{{name}: {literal(value)}}}, which mends that, or {other}"
    except TemplateError:  # it takes too long
        pass
    finally:
        tokenizer.chat_template = template
    return other
