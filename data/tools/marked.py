"""Hold text whose parts are marked: special tokens, what is learnt, what is cut.

On a terminal the marks are colours; without colours, and where output is piped, they are brackets.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mark = Literal["plain", "special", "learnt", "cut", "heading"]
STYLES = {"plain": "", "special": "cyan", "learnt": "green underline", "cut": "bright_black strike", "heading": "bold"}
"""Mark → style of rich."""
BRACKETS = {"learnt": ("\u27e6", "\u27e7"), "cut": ("\u27e8cut: ", "\u27e9")}
"""Mark → what stands around the text where there are no colours."""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that would move the cursor, change colours or turn the direction of writing."""


class Piece(NamedTuple):
    """Hold a piece of text with its mark."""

    text: str
    """The text."""
    mark: Mark = "plain"
    """How it is shown."""
    special: bool = False
    """Whether it is a special token."""


class Printer:
    """Print pieces to the terminal, or as plain text where that is not one."""

    def __init__(self, out: Any = None) -> None:
        """Build the printer.

        Args:
            out: The file to print to; None: standard output.
        """
        self.out = sys.stdout if out is None else out
        self.console: Any = None
        if self.out.isatty():
            from rich.console import Console

            console = Console(file=self.out, highlight=False, soft_wrap=True)
            self.console = None if console.no_color else console

    def print(self, *pieces: Piece) -> None:
        """Print pieces and a line break."""
        if self.console is None:
            print(plain(pieces), file=self.out)
            return
        from rich.text import Text

        text = Text()
        for piece in pieces:
            style = STYLES[piece.mark]
            if piece.special and piece.mark != "cut":
                style = f"{style} {STYLES['special']}".replace("green ", "")
            text.append(visible(piece.text), style)
        self.console.print(text)

    def legend(self) -> None:
        """Print what the marks mean."""
        self.print(Piece("what is learnt", "learnt"), Piece(" · "), Piece("what max_length cuts", "cut"))


def plain(pieces: Sequence[Piece]) -> str:
    """Return pieces as plain text, with brackets around what is learnt and what is cut."""
    text, current = "", "plain"
    for piece in pieces:
        mark = piece.mark if piece.mark in BRACKETS else "plain"
        if mark != current:
            text += BRACKETS[current][1] if current in BRACKETS else ""
            text += BRACKETS[mark][0] if mark in BRACKETS else ""
            current = mark
        text += visible(piece.text)
    return text + (BRACKETS[current][1] if current in BRACKETS else "")


def visible(text: str) -> str:
    """Return a text with control characters spelt out, so that data cannot act on the terminal."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def pieces_of(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    limit: int | None = None,
    first: int = 0,
) -> list[Piece]:
    """Return token ids as pieces of text.

    Args:
        tokenizer: The tokenizer.
        ids: The ids of a row.
        spans: (begin, end) of what is learnt.
        limit: The number of ids that are kept; None: all.
        first: The position from which pieces are returned; what comes before only joins the text.
    """
    special = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = len(ids) if limit is None else min(limit, len(ids))
    edges = {0, first, kept, len(ids)}
    for begin, end in spans:
        edges |= {begin, end}
    for position, token in enumerate(ids):
        if token in special:
            edges |= {position, position + 1}
    pieces: list[Piece] = []
    before = ""
    for begin, end in pairwise(sorted(edges)):
        # The text up to here is decoded from the start: blanks at the seams belong to what follows.
        text = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False))
        own = text[len(before) :] if text.startswith(before) else str(tokenizer.decode(list(ids[begin:end])))
        before = text
        if begin < first:
            continue
        mark: Mark = "plain"
        if begin >= kept:
            mark = "cut"
        elif any(start <= begin < stop for start, stop in spans):
            mark = "learnt"
        pieces.append(Piece(own, mark, end - begin == 1 and ids[begin] in special))
    return pieces
