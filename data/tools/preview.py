"""Show rows as the model sees them: `rlhf data preview`.

With a tokenizer (of a config), the chat template is rendered, special tokens are seen, and what is
learnt and what `max_length` cuts are marked. Without one, turns, responses and ranks are shown.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.check.command import Context, print_errors
from data.check.config import Input
from data.check.report import Limits
from data.encode import encode_prompt, encode_response, teach
from data.progress import Watch, unwatched
from data.records import Demonstration, Document, Prompt, Ranking, Record, as_messages, judged_pairs
from data.tools.inputs import Opened, open_inputs, sample
from data.tools.marked import Piece, Printer, pieces_of
from data.turns import turns_of
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = re.compile(r"(:(?P<line>\d+))?(: index (?P<index>\d+))?$")
"""The end of a location: FILE:LINE, FILE: index I, or FILE:LINE: index I."""
SINGULAR = {
    "demonstrations": "demonstration",
    "rankings": "ranking",
    "prompts": "prompt",
    "evaluation_prompts": "evaluation prompt",
    "documents": "document",
}


@dataclass(frozen=True)
class Choice:
    """Say which rows are shown."""

    number: int = 3
    """How many."""
    seed: int | None = None
    """What gives a random choice; None: the first ones."""
    row: int | None = None
    """The line, or the index, of the one row that is shown; None: several are."""


def run(
    inputs: Sequence[Input],
    kind: str | None,
    experiment: Any,
    choice: Choice,
    artifacts: str = "artifacts",
    watch: Watch = unwatched,
) -> int:
    """Print rows of each input.

    Args:
        inputs: The files and data sets; none for all data of the config.
        kind: The kind of data; None: what the config or the rows say.
        experiment: The validated config, or None.
        choice: Which rows are shown.
        artifacts: The folder of all experiments.
        watch: Shows how far reading is.

    Returns:
        The exit code: 2 if there are errors in what was read, otherwise 0.
    """
    context, printer = Context.of(experiment, artifacts, watch=watch), Printer()
    if context.note:
        printer.print(Piece(f"tokenizer: {context.note}"))
    if context.tokenizer is not None:
        printer.legend()
    errors: list[str] = []
    for opened in open_inputs(inputs, kind, context):
        try:
            show(opened, context.limits(opened.kind), choice, printer)
        except UserError as error:  # the chat template refuses a prompt
            errors += error.lines
        errors += opened.loaded.errors
    print_errors(errors)
    return 2 if errors else 0


def show(opened: Opened, limits: Limits, choice: Choice, printer: Printer) -> None:
    """Print the chosen rows of one source.

    Args:
        opened: The source.
        limits: The tokenizer and the limits.
        choice: Which rows are shown.
        printer: Where they are printed.

    Raises:
        UserError: There is no such row, or the chat template refuses a prompt.
    """
    found = opened.records()
    if choice.row is not None:
        chosen = [item for item in found if is_at(item[0], choice.row)]
        opened.loaded.errors = [line for line in opened.loaded.errors if is_error_at(line, choice.row)]
        if not chosen and not opened.loaded.errors:
            problem = f"no {SINGULAR[opened.kind]} comes from line or index {choice.row}"
            raise UserError(f"{opened.source.name}: {problem}; `rlhf data check` says what is left out")
    elif opened.kind == "documents" and limits.tokenizer is not None and limits.max_length and choice.seed is None:
        chosen = first_documents(found, limits.tokenizer, choice.number * limits.max_length)
    else:
        chosen = sample(found, choice.number, choice.seed)
    documents = [record for _, record in chosen if isinstance(record, Document)]
    if documents and limits.tokenizer is not None and limits.max_length:
        show_packed(documents, chosen[0][0], limits, choice.number, printer)
        return
    for location, record in chosen:
        if limits.tokenizer is None:
            show_plain(record, location, opened.kind, limits, printer)
        else:
            show_tokens(record, location, opened.kind, limits, printer)


def is_at(location: str, number: int) -> bool:
    """Return whether a location has this index, or, if it has none, this line."""
    match = PLACE.search(location)
    place = match and (match["index"] or match["line"])
    return place is not None and int(place) == number


def is_error_at(line: str, number: int) -> bool:
    """Return whether an error line is about this line or index."""
    return re.search(rf"(:{number}|: index {number}): ", line) is not None


def first_documents(
    found: Generator[tuple[str, Record]], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> list[tuple[str, Record]]:
    """Return the first documents that have so many tokens together."""
    chosen: list[tuple[str, Record]] = []
    for location, record in found:
        assert isinstance(record, Document)
        chosen.append((location, record))
        tokens -= len(encode_response(tokenizer, record.text))
        if tokens <= 0:
            break
    found.close()
    return chosen


# ── as the model sees them ───────────────────────────────────────────────────────────────────────


def show_tokens(record: Record, location: str, kind: str, limits: Limits, printer: Printer) -> None:
    """Print a row as token ids make it.

    Args:
        record: The record.
        location: Where it is.
        kind: The kind of data.
        limits: The tokenizer and the limits.
        printer: Where it is printed.
    """
    tokenizer = limits.tokenizer
    assert tokenizer is not None
    place = f"\u2500\u2500 {location} \u00b7 {SINGULAR[kind]}{wording_of(record)}"
    if isinstance(record, Demonstration):
        (rows,) = teach(tokenizer, [record], [location], limits.turns)
        for number, row in enumerate(rows, 1):
            learnt = sum(end - begin for begin, end in row.spans)
            part = f", row {number} of {len(rows)}: earlier answers are sampled otherwise than they are written later"
            fate, kept = fate_of(row.spans[0][0], len(row.ids), limits)
            heading = f"{place}{part if len(rows) > 1 else ''} \u00b7 {len(row.ids)} tokens, {learnt} learnt{fate}"
            printer.print(Piece(heading, "heading"))
            printer.print(*pieces_of(tokenizer, row.ids, row.spans, kept))
    elif isinstance(record, Ranking):
        show_ranking(record, place, limits, printer)
    elif isinstance(record, Prompt):
        ids = encode_prompt(tokenizer, record.prompt)
        fate = fate_of(len(ids), len(ids), limits)[0]
        printer.print(Piece(f"{place} \u00b7 {len(ids)} tokens{fate}", "heading"))
        printer.print(*pieces_of(tokenizer, ids, []))
    else:
        ids = encode_response(tokenizer, record.text)
        printer.print(Piece(f"{place} \u00b7 {len(ids)} tokens", "heading"))
        printer.print(*pieces_of(tokenizer, ids, [(0, len(ids))]))
    printer.print()


def wording_of(record: Record) -> str:
    """Return the wording and the final answer of a worded row, for its heading; "" for others."""
    if getattr(record, "row_text", None) is None or not record.meta:  # type: ignore[union-attr]
        return ""
    meta = record.meta  # type: ignore[union-attr]
    answer = f", answer {meta['answer']}" if "answer" in meta else ""
    return f", wording {meta.get('wording')}{answer}"


def fate_of(prompt: int, total: int, limits: Limits) -> tuple[str, int | None]:
    """Return what the length limit does to a row, and how many ids are kept (None: all).

    Args:
        prompt: Tokens of the prompt.
        total: Tokens of the row.
        limits: The limits.
    """
    limit = limits.max_length
    if limit is None or limits.on_too_long is None or total <= limit:
        return "", None
    if limits.on_too_long == "error":
        return f" \u00b7 over max_length {limit}: refused (on_too_long: error)", limit
    if limits.on_too_long == "drop" or prompt >= limit:
        return f" \u00b7 over max_length {limit}: dropped", 0
    return f" \u00b7 cut to {limit}", limit


def show_ranking(ranking: Ranking, place: str, limits: Limits, printer: Printer) -> None:
    """Print a ranking: the prompt once, and the responses from best to worst.

    Args:
        ranking: The ranking.
        place: How its heading begins.
        limits: The tokenizer and the limits.
        printer: Where it is printed.
    """
    tokenizer = limits.tokenizer
    assert tokenizer is not None
    prompt = encode_prompt(tokenizer, ranking.prompt)
    encoded = [encode_response(tokenizer, *answer) for answer in ranking.answers]
    longest = len(prompt) + max(map(len, encoded))
    fate, kept = fate_of(len(prompt), longest, limits)
    heading = (
        f"{place}{about(ranking)} \u00b7 {len(prompt)} tokens of prompt, {longest} with the longest response{fate}"
    )
    printer.print(Piece(heading, "heading"))
    printer.print(*pieces_of(tokenizer, prompt, [], kept))
    for i in best_first(ranking):
        printer.print(Piece(f"{response_heading(ranking, i)} \u00b7 {len(encoded[i])} tokens", "heading"))
        ids = [*prompt, *encoded[i]]  # decoded together: the seam may hide a blank
        printer.print(*pieces_of(tokenizer, ids, [(len(prompt), len(ids))], kept, first=len(prompt)))
    printer.print(Piece(pairs_text(ranking)))


def show_packed(documents: Sequence[Document], location: str, limits: Limits, number: int, printer: Printer) -> None:
    """Print documents as pretraining packs them: end to end, in rows of max_length tokens.

    Args:
        documents: The documents.
        location: Where the first one is.
        limits: The tokenizer and the limits.
        number: The number of rows to print.
        printer: Where they are printed.
    """
    from data.documents import wrap_documents

    tokenizer, length = limits.tokenizer, limits.max_length
    assert tokenizer is not None and length is not None
    rows = wrap_documents(tokenizer, documents, length=length)[:number]
    for position, ids in enumerate(rows, 1):
        heading = f"\u2500\u2500 packed row {position}, from {location} on \u00b7 {length} tokens, all learnt"
        printer.print(Piece(heading, "heading"))
        printer.print(*pieces_of(tokenizer, ids, [(0, len(ids))]))
        printer.print()
    if not rows:
        many = "the document" if len(documents) == 1 else f"{len(documents)} documents"
        printer.print(Piece(f"\u2500\u2500 {location} \u00b7 {many} make no whole row of {length} tokens", "heading"))


# ── as they are read ─────────────────────────────────────────────────────────────────────────────


def show_plain(record: Record, location: str, kind: str, limits: Limits, printer: Printer) -> None:
    """Print a record as it is read: turns, responses and ranks.

    Args:
        record: The record.
        location: Where it is.
        kind: The kind of data.
        limits: Which turns are learnt.
        printer: Where it is printed.
    """
    place = f"\u2500\u2500 {location} \u00b7 {SINGULAR[kind]}{wording_of(record)}"
    printer.print(Piece(place + (about(record) if isinstance(record, Ranking) else ""), "heading"))
    if isinstance(record, Document):
        printer.print(Piece(record.text, "learnt"))
        printer.print()
        return
    learnt = set()
    if isinstance(record, Demonstration):
        learnt = {turn.number for turn in turns_of(record, limits.turns)}
    number = 0
    for message in as_messages(record.prompt):
        number += message["role"] == "assistant"
        taught = message["role"] == "assistant" and number in learnt
        printer.print(Piece(f"{message['role']}: "), Piece(message["content"], "learnt" if taught else "plain"))
    if isinstance(record, Demonstration):
        printer.print(Piece("assistant: "), Piece(record.completion, "learnt"))
    elif isinstance(record, Ranking):
        for i in best_first(record):
            printer.print(Piece(response_heading(record, i), "heading"))
            printer.print(Piece(record.responses[i], "learnt"))
        printer.print(Piece(pairs_text(record)))
    printer.print()


def about(ranking: Ranking) -> str:
    """Return what a ranking says beside its responses, for its heading."""
    labeler = f" by {ranking.labeler}" if ranking.labeler is not None else ""
    margin = f", margin {ranking.margin:g}" if ranking.margin is not None else ""
    return f" of {len(ranking.responses)}{labeler}{margin}"


def best_first(ranking: Ranking) -> list[int]:
    """Return the indices of the responses from best to worst, those not judged at the end."""
    ranks = ranking.ranks

    def place(i: int) -> tuple[bool, int, int]:
        return ranks[i] is None, ranks[i] or 0, i

    return sorted(range(len(ranks)), key=place)


def response_heading(ranking: Ranking, i: int) -> str:
    """Return rank, score and position of a response."""
    rank = "not judged" if ranking.ranks[i] is None else f"rank {ranking.ranks[i]}"
    score = "" if ranking.scores is None or ranking.scores[i] is None else f", score {ranking.scores[i]:g}"
    cut_off = "" if ranking.finished is None or ranking.finished[i] else ", was cut off: no EOS"
    return f"{rank}{score} (response {i + 1}{cut_off})"


def pairs_text(ranking: Ranking) -> str:
    """Return the pairs of a ranking that are learnt, and how many others there are."""
    usable = [f"{i + 1} > {j + 1}" for i, j, verdict in judged_pairs(ranking) if verdict == "usable"]
    others = [verdict for *_, verdict in judged_pairs(ranking) if verdict != "usable"]
    counted = "".join(f" \u00b7 {others.count(verdict)} {verdict}" for verdict in dict.fromkeys(others))
    return f"pairs of responses: {', '.join(usable) or 'none'}{counted}"
