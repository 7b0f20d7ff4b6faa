"""Report how long rows are, what a limit does to them, and whether the template agrees."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from data import answer_lengths
from data.agreement import Answered, compare, remedy
from data.check.report import Report, demonstrations_of
from data.encode import encode_prompt, encode_response
from data.records import Demonstration, Document, Prompt, Ranking, Record, as_messages
from data.sources import Loaded
from data.templates import TemplateOverrun
from data.turns import Turns, turns_of
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_lengths(
    report: Report,
    loaded: Loaded,
    tokenizer: PreTrainedTokenizerBase | None,
    limit: int | None,
    on_too_long: str | None,
    turns: Turns = "all",
) -> None:
    """Report the lengths of prompts and answers, and which rows are longer than a limit.

    Args:
        report: Where facts and errors go.
        loaded: The records.
        tokenizer: What lengths are counted with; None: lengths are in words.
        limit: max_length in tokens, or None.
        on_too_long: "error", "drop" or "truncate", or None.
        turns: Which answers of demonstrations are learnt.
    """
    sizes, refused = [], []
    for record, location in zip(loaded.records, loaded.locations, strict=True):
        try:
            sizes.append(row_lengths(record, tokenizer))
        except UserError as error:  # the chat template refuses this prompt
            refused.append(f"{location}: {error}")
    if refused:
        report.errors += refused
        return
    unit = "tokens" if tokenizer is not None else "words"
    for part in sizes[0]:
        report.add(f"{part} length", spread([length for size in sizes for length in size[part]], unit))
    if limit is None or on_too_long is None:
        return
    if report.kind == "documents":
        report.add("too long", f"none can be: packed end to end into rows of {limit} tokens")
    elif tokenizer is None:
        report.add("too long", f"not counted: the limit is {limit} tokens, no tokenizer here")
    else:
        before = [
            prompt_length(record, size, tokenizer, turns) for record, size in zip(loaded.records, sizes, strict=True)
        ]
        add_too_long(report, loaded, sizes, before, limit, on_too_long)


def prompt_length(record: Record, size: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, turns: Turns) -> int:
    """Return the tokens before the first answer that is learnt, which a length limit never cuts.

    Args:
        record: The record.
        size: Its lengths, as of `row_lengths`.
        tokenizer: The tokenizer with its chat template.
        turns: Which answers of demonstrations are learnt.
    """
    if isinstance(record, Demonstration) and record.learnt and turns == "all":
        return len(encode_prompt(tokenizer, turns_of(record)[0].prompt))
    return size["prompt"][0]


def add_too_long(
    report: Report, loaded: Loaded, sizes: list[dict[str, list[int]]], before: list[int], limit: int, on_too_long: str
) -> None:
    """Report which rows are longer than a limit, and what becomes of them.

    Args:
        report: Where facts and errors go.
        loaded: The records.
        sizes: The result of `row_lengths` for each record.
        before: The result of `prompt_length` for each record.
        limit: max_length in tokens.
        on_too_long: "error", "drop" or "truncate".
    """
    totals = [sum(max(lengths) for lengths in size.values()) for size in sizes]  # the longest response counts
    over = [i for i, total in enumerate(totals) if total > limit]
    dropped = [i for i in over if on_too_long == "drop" or before[i] >= limit]
    if on_too_long == "error":
        text = f"{len(over):,} refused"
        remedy = "shorten it, raise max_length, or set on_too_long: drop or truncate"
        for i in over:
            report.errors.append(f"{loaded.locations[i]}: {totals[i]} tokens, the limit is {limit}; {remedy}")
    elif on_too_long == "drop":
        text = f"{len(dropped):,} dropped"
    else:
        text = f"{len(over) - len(dropped):,} lose their end and EOS, {len(dropped):,} dropped (no room)"
    if on_too_long != "error" and len(dropped) == len(sizes):
        report.errors.append(f"{report.name}: no row is left within {limit} tokens; raise max_length")
    first = f" · the first at {loaded.locations[over[0]]}" if over else ""
    report.add("too long", f"{text} · limit {limit} tokens, on_too_long: {on_too_long}{first}")


def row_lengths(record: Record, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, list[int]]:
    """Return {part of the row: the lengths of such parts}.

    Args:
        record: The record.
        tokenizer: Counts tokens, with template and EOS; None: words are counted.
    """

    def text_length(text: str, finished: bool = True) -> int:
        if tokenizer is None:
            return len(text.split())
        return len(encode_response(tokenizer, text, finished))

    if isinstance(record, Document):
        return {"document": [text_length(record.text)]}
    if tokenizer is None:
        prompt = sum(text_length(message["content"]) for message in as_messages(record.prompt))
    else:
        prompt = len(encode_prompt(tokenizer, record.prompt))
    if isinstance(record, Prompt):
        return {"prompt": [prompt]}
    if isinstance(record, Ranking):
        return {"prompt": [prompt], "response": [text_length(*answer) for answer in record.answers]}
    return {"prompt": [prompt], "completion": [text_length(record.completion)]}


def spread(lengths: list[int], unit: str) -> str:
    """Describe lengths: "1 to 20 words · median 9 · 95 % up to 19"."""
    ordered = sorted(lengths)
    median = ordered[math.ceil(0.5 * len(ordered)) - 1]
    most = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return f"{ordered[0]:,} to {ordered[-1]:,} {unit} · median {median:,} · 95 % up to {most:,}"


def add_answer_lengths(
    report: Report, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, response_length: int, turns: Turns = "all"
) -> None:
    """Report how many of the demonstrations' answers are longer than PPO's responses can be.

    Args:
        report: Where the fact goes.
        loaded: The demonstrations.
        tokenizer: What lengths are counted with.
        response_length: ppo.response_length.
        turns: Which answers are learnt.
    """
    learnt = [turn for record in demonstrations_of(loaded) for turn in turns_of(record, turns)]
    lengths = [len(encode_response(tokenizer, turn.answer)) for turn in learnt]
    marks = answer_lengths.quantiles(lengths)
    text = answer_lengths.warning(marks, response_length)
    report.add("room in ppo", text or f"answers have {answer_lengths.describe(marks, response_length)}")


def add_template_agreement(report: Report, loaded: Loaded, tokenizer: PreTrainedTokenizerBase) -> None:
    """Report whether rows are what the chat template writes (see data/agreement.py).

    Args:
        report: Where the fact goes.
        loaded: Demonstrations or rankings.
        tokenizer: The tokenizer with its chat template.
    """
    rows: list[Answered] = []
    names: list[str] = []
    for record, location in zip(loaded.records, loaded.locations, strict=True):
        if isinstance(record, Ranking):
            answered = [Answered(record.prompt, text, finished) for text, finished in record.answers]
        else:
            assert not isinstance(record, Document | Prompt)
            answered = [Answered(record.prompt, record.completion)]
        rows += answered
        names += [location] * len(answered)
    try:
        agreement = compare(tokenizer, rows, names)
    except TemplateOverrun:  # the lengths have reported it already
        return
    text = agreement.text("answers" if report.kind == "rankings" else "rows")
    if agreement.differ:
        text += f"; {remedy(tokenizer)}"
    report.add("chat template", text)
