"""Encode conversations with the chat template; no message can smuggle in special tokens.

A special token that a message happens to contain must stay plain text: otherwise its author could
end a turn or speak for the assistant. While the template is rendered, each such token is replaced
by one private-use character, so that the template still sees the rest of the message. It is put
back as plain text where that character comes out. Other added tokens (such as <think> of most
models) are what the tokenizer makes of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from data import templates
from data.tokenizer import CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK_CODES = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
"""Code points of Unicode's private-use characters."""
SHORT_END = 64
"""Characters of an end of a beginning up to which its token ids are remembered."""


def render(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict]], **options: Any
) -> Iterator[list[int] | str | TemplateError]:
    """Render conversations as `templates.render` does, with our own tokenizer's template trusted.

    Args:
        tokenizer: The tokenizer with its chat template.
        conversations: Lists of {role, content}.
        options: Further options of `templates.render`, `tokenize` among them.
    """
    return templates.render(tokenizer, conversations, trusted=CHAT_TEMPLATE, **options)


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict]], *, add_generation_prompt: bool
) -> Iterator[list[int] | TemplateError]:
    """Encode each conversation as the chat template writes it.

    Args:
        tokenizer: The tokenizer with its chat template.
        conversations: Lists of {role, content}.
        add_generation_prompt: Whether the text ends with what opens the assistant's turn.

    Yields:
        The token ids of each conversation, or the TemplateError with which the template refuses it.
    """
    special = special_tokens(tokenizer)
    sent, hidden = [], []
    for messages in conversations:
        marked, tokens = _hide_special_tokens(messages, special)
        sent.append(marked)
        hidden.append(tokens)
    # Only a conversation with hidden tokens is needed as text; the usual one is tokenized at once.
    tokenize = [not tokens for tokens in hidden]
    rendered = render(tokenizer, sent, tokenize=tokenize, add_generation_prompt=add_generation_prompt)
    for result, tokens in zip(rendered, hidden, strict=True):
        if isinstance(result, TemplateError):
            yield result
        elif isinstance(result, str):
            yield _encode_with_hidden_tokens(tokenizer, result, tokens)
        else:
            yield list(result)


def encode_beginnings(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict]], ends: Sequence[Sequence[int]]
) -> Iterator[list[list[int] | TemplateError]]:
    """Encode several beginnings of each conversation, each ready for the assistant's turn.

    The results are those of `encode_conversations`, but text that beginnings share is tokenized
    once.

    Args:
        tokenizer: The tokenizer with its chat template.
        conversations: Lists of {role, content}.
        ends: For each conversation the numbers of messages of its beginnings, in ascending order.

    Yields:
        For each conversation the token ids of each beginning, or the TemplateError with which the
        template refuses it.
    """
    special = special_tokens(tokenizer)
    beginnings = [messages[:end] for messages, its in zip(conversations, ends, strict=True) for end in its]
    hidden = [_hide_special_tokens(messages, special) for messages in beginnings]
    # A tokenizer with a method of its own for conversations need not tokenize what it renders.
    is_usual = not templates.has_own_method(tokenizer)
    several = [len(its) > 1 and is_usual for its in ends for _ in its]
    tokenize = [not tokens and not shares for (_, tokens), shares in zip(hidden, several, strict=True)]
    sent = [marked for marked, _ in hidden]
    rendered = zip(render(tokenizer, sent, tokenize=tokenize, add_generation_prompt=True), hidden, strict=True)
    splitter = _Splitter(tokenizer, special)
    for number, its in enumerate(ends):
        whole: _Split | None = None
        encoded: list[list[int] | TemplateError] = []
        try:
            group = list(islice(rendered, len(its)))
        except templates.TemplateOverrun as error:
            error.index = number
            raise
        # The longest comes last, and the shorter ones are read off it.
        for result, (_, tokens) in reversed(group):
            if isinstance(result, TemplateError):
                encoded.append(result)
            elif not isinstance(result, str):
                encoded.append(list(result))
            elif tokens:
                encoded.append(_encode_with_hidden_tokens(tokenizer, result, tokens))
            elif whole is not None and whole.text.startswith(result):
                encoded.append(splitter.beginning(whole, result))
            else:
                whole = splitter.split(result)
                encoded.append(whole.ids)
        yield encoded[::-1]


@dataclass(frozen=True)
class _Split:
    """Hold a rendered text with its token ids, and the places of the template's special tokens."""

    text: str
    """The text."""
    ids: list[int]
    """Its token ids."""
    spans: list[tuple[int, int]]
    """(begin, end) of each special token in the text."""
    places: list[int]
    """The position of each special token in the ids; [] where they do not match the text's."""


class _Splitter:
    """Tokenize texts, and read the ids of their beginnings off theirs.

    Tokenizers split a text at its special tokens first, so what comes before one of them does not
    depend on what comes after it. Of a beginning of a text only the end, from its last special
    token on, has to be tokenized.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: Sequence[str]):
        self.tokenizer = tokenizer
        self.pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")  # longest first
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = {str(token): index for index, token in added if token.special}
        self.known = set(self.special_ids.values())
        self.ends: dict[str, list[int]] = {}
        """The token ids of each short end so far; nearly all conversations share one."""

    def split(self, text: str) -> _Split:
        """Tokenize a text in which every special token was written by the template."""
        ids = self.encode(text)
        matches = list(self.pattern.finditer(text))
        places = [place for place, index in enumerate(ids) if index in self.known]
        if [self.special_ids[match[0]] for match in matches] != [ids[place] for place in places]:
            places = []
        return _Split(text, ids, [match.span() for match in matches], places)

    def beginning(self, whole: _Split, text: str) -> list[int]:
        """Tokenize a text that is the beginning of another one."""
        count = sum(end <= len(text) for _, end in whole.spans)
        if not count or not whole.places:
            return self.encode(text)
        end = text[whole.spans[count - 1][0] :]
        ids = self.ends.get(end) or self.encode(end)
        if len(end) <= SHORT_END:
            self.ends[end] = ids
        return whole.ids[: whole.places[count - 1]] + ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Find the special token that the chat template writes after an assistant's turn.

    Args:
        tokenizer: The tokenizer with its chat template.

    Returns:
        The token; None if the template writes none.

    Raises:
        TemplateError: The template does not take one question and answer, or does not write them. A
            template may also raise anything else.
    """
    question, answer = "\ue001", "\ue000"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    (text,) = render(tokenizer, [turns], tokenize=[False])
    if isinstance(text, TemplateError):
        raise text
    assert isinstance(text, str)
    for name, sign in (("question", question), ("answer", answer)):
        if sign not in text:
            raise TemplateError(f"it leaves out the {name}, and may want messages in parts, as of text and images")
    after = text.partition(answer)[2].lstrip()
    return next((token for token in special_tokens(tokenizer) if after.startswith(token)), None)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens of the vocabulary, longest first.

    These are the ones that `split_special_tokens` splits. Not every added token is special.
    """
    added = tokenizer.added_tokens_decoder.values()
    return sorted((str(token) for token in added if token.special), key=len, reverse=True)


def _hide_special_tokens(messages: list[dict], special: Sequence[str]) -> tuple[list[dict], dict[str, str]]:
    """Replace every special token in the messages' contents by a private-use character.

    Args:
        messages: Lists of {role, content}.
        special: The special tokens, longest first.

    Returns:
        The messages, and {character: the token it stands for}; {} if no message has a special
        token.
    """
    present = [token for token in special if any(token in message["content"] for message in messages)]
    if not present:
        return messages, {}
    taken = {character for message in messages for character in message["content"]}
    free = (chr(code) for code in chain(*MARK_CODES) if chr(code) not in taken)
    marks = dict(zip(present, free, strict=False))
    pattern = re.compile("|".join(map(re.escape, present)))  # longest first, as one may contain another

    def hide(text: str) -> str:
        return pattern.sub(lambda match: marks[match[0]], text)

    marked = [{**message, "content": hide(message["content"])} for message in messages]
    return marked, {mark: token for token, mark in marks.items()}


def _encode_with_hidden_tokens(tokenizer: PreTrainedTokenizerBase, text: str, tokens: dict[str, str]) -> list[int]:
    """Encode a rendered text, with the hidden tokens put back as plain text.

    A whole segment between two of the template's special tokens is encoded at once, so that the
    pieces of a word and the blanks around a message come out as they would without the hidden
    tokens.

    Args:
        tokenizer: The tokenizer.
        text: A text in which every special token was written by the template.
        tokens: {character: the token it stands for}.
    """
    marked = re.compile(f"[{''.join(tokens)}]")
    ids: list[int] = []
    done = 0
    for begin, end in _segments(tokenizer, text):
        if marked.search(text, begin, end) is None:
            continue
        if begin > done:
            ids += tokenizer(text[done:begin], add_special_tokens=False)["input_ids"]
        plain = marked.sub(lambda match: tokens[match[0]], text[begin:end])
        ids += tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        done = end
    if done < len(text):
        ids += tokenizer(text[done:], add_special_tokens=False)["input_ids"]
    return ids


def _segments(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of each segment of a text between special tokens.

    Blanks that a token strips on its left or right (lstrip, rstrip) belong to the token.
    """
    by_name = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    patterns = []
    for name in special_tokens(tokenizer):
        token = by_name.get(name)
        left = r"\s*" if getattr(token, "lstrip", False) else ""
        right = r"\s*" if getattr(token, "rstrip", False) else ""
        patterns.append(f"{left}{re.escape(name)}{right}")
    begin = 0
    if patterns:
        for match in re.finditer("|".join(patterns), text):
            if match.start() > begin:
                yield begin, match.start()
            begin = match.end()
    if begin < len(text):
        yield begin, len(text)
