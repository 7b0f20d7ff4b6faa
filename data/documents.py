"""Join documents end to end and cut them into rows of equal length, as in pretraining."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from data.records import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def wrap_documents(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Document], *, length: int) -> list[list[int]]:
    """Join documents end to end and cut them into rows.

    Args:
        tokenizer: Encodes the texts; special tokens that occur in them stay plain text.
        rows: The documents; each begins with `document_start` and ends with `document_end`.
        length: The number of token ids in a row.

    Returns:
        Rows of `length` ids; a shorter remainder is left out.
    """
    texts = [document.text for document in rows]
    if not texts:
        return []
    stream: list[int] = []
    start, end = document_start(tokenizer), document_end(tokenizer)
    for ids in tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
        stream.extend([*start, *ids, end])
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
