"""Join documents end to end and cut them into rows of equal length, as in pretraining."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, overload

import numpy as np

from data.records import Document
from data.token_ids import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 512
"""Documents that are tokenized together at most."""
MOST_CHARACTERS = 2**22
"""Characters after which no further document is added to these."""
DOCUMENT_END = "document_end"
"""A key of tokenizer_config.json: the token that ended a document in pretraining."""
DOCUMENT_ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<EOS_TOKEN>", "<eos>", "[EOS]",
    "<|eos|>", "</s>",
)  # fmt: skip
"""Names of that token in models that end turns with another one."""


def document_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ended a document in pretraining, which need not be what ends a turn.

    The first of these that the vocabulary has: the token that `base` has recorded in the tokenizer
    under DOCUMENT_END, EOS if it is one of DOCUMENT_ENDS, DOCUMENT_ENDS in their order, EOS.
    """
    vocabulary, eos = tokenizer.get_vocab(), tokenizer.eos_token
    names = [tokenizer.init_kwargs.get(DOCUMENT_END)]
    if eos in DOCUMENT_ENDS:
        names.append(eos)
    names += DOCUMENT_ENDS
    return next((vocabulary[name] for name in names if name in vocabulary), tokenizer.eos_token_id)


def document_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that begin a document: BOS if the tokenizer adds it (Gemma, Llama)."""
    first = list(tokenizer("a")["input_ids"][:1])
    return first if first == [tokenizer.bos_token_id] else []


def joined(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Tokenize documents, some at a time, and join them end to end.

    Args:
        tokenizer: Encodes the texts; special tokens that occur in them stay plain text.
        texts: The documents; each begins with `document_start` and ends with `document_end`.

    Yields:
        The int32 ids of the next documents, joined, and the number of ids of each.
    """
    start, end = document_start(tokenizer), document_end(tokenizer)
    for some in portions(texts):
        encoded = token_ids(tokenizer, some, is_plain=True)
        lengths = [len(start) + len(ids) + 1 for ids in encoded]
        flat = chain.from_iterable(chain(start, ids, (end,)) for ids in encoded)
        yield np.fromiter(flat, dtype=np.int32, count=sum(lengths)), lengths


def portions(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in lists of at most AT_ONCE, which end once they have MOST_CHARACTERS."""
    some: list[str] = []
    characters = 0
    for text in texts:
        some.append(text)
        characters += len(text)
        if len(some) == AT_ONCE or characters >= MOST_CHARACTERS:
            yield some
            some, characters = [], 0
    if some:
        yield some


@dataclass(frozen=True, eq=False)
class PackedRows(Sequence[list[int]]):
    """Cut documents that are joined end to end into rows; a shorter remainder is left out."""

    ids: np.ndarray
    """(T,): int32 ids of the documents, in memory or in a file that is mapped into it."""
    length: int
    """The number of ids in a row."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids) // self.length

    @overload
    def __getitem__(self, at: int) -> list[int]: ...

    @overload
    def __getitem__(self, at: slice) -> list[list[int]]: ...

    def __getitem__(self, at: int | slice) -> list[int] | list[list[int]]:
        """Return the ids of a row, or of several."""
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        first = at % len(self) * self.length
        return self.ids[first : first + self.length].tolist()


def pack_documents(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, length: int) -> PackedRows:
    """Join documents end to end and cut them into rows, in memory: four bytes a token.

    Args:
        tokenizer: As of `joined`.
        texts: As of `joined`.
        length: The number of token ids in a row.
    """
    parts = [ids for ids, _ in joined(tokenizer, texts)]
    return PackedRows(np.concatenate(parts) if parts else np.empty(0, np.int32), length)


def wrap_documents(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Document], *, length: int) -> list[list[int]]:
    """Return the rows of `pack_documents` as lists, for a few documents.

    Args:
        tokenizer: As of `joined`.
        rows: The documents.
        length: The number of token ids in a row.

    Returns:
        Rows of `length` ids; a shorter remainder is left out.
    """
    return list(pack_documents(tokenizer, (document.text for document in rows), length=length))
