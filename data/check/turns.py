"""Report how many assistant turns demonstrations have, and how many of them are learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.check.report import Report, demonstrations_of
from data.encode import teach
from data.sources import Loaded
from data.turns import Turns, count_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_ROWS = 1000
"""Demonstrations that are encoded at most, to see which answers need rows of their own."""


def add_turns(report: Report, loaded: Loaded, tokenizer: PreTrainedTokenizerBase | None, turns: Turns) -> None:
    """Report the assistant turns, and the earlier answers that need a row of their own.

    Args:
        report: Where the fact goes.
        loaded: The demonstrations.
        tokenizer: The tokenizer with its chat template, which takes all the prompts; None: whether
            answers need rows of their own is not said.
        turns: Which answers are learnt.
    """
    demonstrations = demonstrations_of(loaded)
    count = count_turns(demonstrations, turns)
    text = count.text()
    if tokenizer is not None and count.learnt > len(demonstrations):
        some = demonstrations[:MOST_ROWS]
        apart = sum(len(rows) - 1 for rows in teach(tokenizer, some, loaded.locations, turns))
        if apart:
            of_those = f" of the first {MOST_ROWS:,} rows" if len(some) < len(demonstrations) else ""
            text += f"; {apart:,} earlier ones{of_those} in rows of their own: the chat template of "
            text += f"{tokenizer.name_or_path} writes them otherwise than they are sampled"
    report.add("turns", text)
