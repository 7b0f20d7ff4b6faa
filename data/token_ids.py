"""Tokenize many texts at once: each different text once, in one call of the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, is_plain: bool) -> list[list[int]]:
    """Return the token ids of texts, without the special tokens that a tokenizer adds by itself.

    One call for many texts takes a third of the time of a call for each.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        is_plain: Whether special tokens that occur in a text stay plain text.

    Returns:
        A list of its own for each text.
    """
    different = list(dict.fromkeys(texts))
    if not different:
        return []
    options: dict[str, Any] = {"split_special_tokens": True} if is_plain else {}
    # masks and types of tokens are lists as long as the ids, and nothing reads them
    encoded = tokenizer(
        different, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, **options
    )["input_ids"]
    if len(different) == len(texts):  # the usual case needs no copies
        return list(encoded)
    known = dict(zip(different, encoded, strict=True))
    return [list(known[text]) for text in texts]
