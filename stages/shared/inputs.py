"""Load the records of a stage and encode them within its length limits."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data import sources
from data.groups import PromptGroup
from data.length_limit import LengthReport
from data.records import prompt_key
from data.streams import held_out
from pipeline.errors import UserError
from pipeline.stage import Source
from stages.settings.checks import reader_source


@dataclasses.dataclass(frozen=True)
class LengthLimit:
    """How long a row may be, and what happens to a longer one."""

    max_length: int
    """The most tokens of a row."""
    on_too_long: str
    """"error", "drop" or "truncate"."""
    section: str
    """The stage whose settings these are, for error lines."""


def load_records(kind: str, source: Source) -> list:
    """Load the records of a kind (documents, demonstrations, …).

    Args:
        kind: The kind of record.
        source: Where they are, as `StageRun.source` gives it.
    """
    return sources.load(kind, reader_source(source))


def load_placed_records(kind: str, source: Source, say: Callable[[str], None] | None = None) -> tuple[list, list[str]]:
    """Load records as `load_records` does, with the location (file and line) of each.

    Args:
        kind: The kind of record.
        source: Where they are.
        say: Prints a line for each reason why rows, or parts of rows, were left out.
    """
    loaded = sources.load_whole(kind, reader_source(source))
    if say is not None:
        for line in loaded.left_out_lines():
            say(f"{kind}: left out, {line}")
    return loaded.records, loaded.locations


def split_documents(source: Source, fraction: float) -> tuple[list, list]:
    """Load the documents and split them, in the same way for every stage of an experiment.

    Args:
        source: Where the documents are.
        fraction: The fraction to hold out (data.validation_fraction).

    Returns:
        The documents to train on and the held-out ones.
    """
    documents = load_records("documents", source)
    train, held = held_out([d.text for d in documents], fraction)
    return [documents[i] for i in train], [documents[i] for i in held]


def fit_prompts(
    tokenizer: Any, prompts: Iterable, places: list[str], limit: LengthLimit, response_length: int
) -> tuple[list[int], list[list[int]], LengthReport]:
    """Encode prompts that leave room for a response.

    Args:
        tokenizer: The tokenizer with its chat template.
        prompts: Prompts, each a string or a list of messages.
        places: The location of each, for error lines.
        limit: The limit of prompt and response together.
        response_length: Tokens that a response may take.

    Returns:
        Indices of the prompts that fit, their token ids, and a report on those that do not.
    """
    from data.encode import encode_prompts
    from data.length_limit import fit_lengths

    ids = encode_prompts(tokenizer, prompts, places)
    kept, ids, _, report = fit_lengths(
        ids,
        [[] for _ in ids],
        max_length=limit.max_length - response_length,
        # a prompt that is cut would be another prompt
        on_too_long="drop" if limit.on_too_long == "truncate" else limit.on_too_long,
        what="prompt",
        names=places,
        section=limit.section,
    )
    return kept, ids, report


def load_groups(file: Path, tokenizer: Any, limit: LengthLimit) -> tuple[list[PromptGroup], LengthReport]:
    """Load rankings and encode each prompt with all its responses.

    A response that was cut off has no EOS: its score is read at its last token, as PPO and evaluate
    do with a sample that reached the length limit. Its log-probability is that of its own tokens.

    Args:
        file: Rankings as JSONL.
        tokenizer: The tokenizer with its chat template.
        limit: The limit of prompt and response together.

    Returns:
        The groups with at least one usable pair, and a report on rows that were cut or dropped.

    Raises:
        UserError: No usable pair is left.
    """
    from data.encode import encode_prompts, encode_response
    from data.length_limit import equal_pairs, fit_lengths

    rows, places = sources.load_placed("rankings", sources.Source(path=file))
    names = [f"{place} ({r.id})" for place, r in zip(places, rows, strict=True)]
    kept, prompts, responses, report = fit_lengths(
        encode_prompts(tokenizer, (r.prompt for r in rows), names),
        [[encode_response(tokenizer, *answer) for answer in r.answers] for r in rows],
        max_length=limit.max_length,
        on_too_long=limit.on_too_long,
        what="ranking",
        names=names,
        section=limit.section,
    )
    # the same responses may have been ranked by several labelers: they are one group, computed once
    by_answers: dict[tuple, list] = {}
    for i, prompt_ids, response_ids in zip(kept, prompts, responses, strict=True):
        report.equal += [names[i]] * equal_pairs(rows[i], response_ids)
        key = (prompt_key(rows[i].prompt), rows[i].answers)
        by_answers.setdefault(key, []).append((prompt_ids, response_ids, rows[i]))
    groups = []
    for members in by_answers.values():
        prompt_ids, response_ids, first = members[0]
        rankings = [row for _, _, row in members]
        group = PromptGroup(
            prompt_ids,
            response_ids,
            first.ranks,
            first.id,
            tuple(r.ranks for r in rankings[1:]),
            tuple(r.labeler for r in rankings),
            tuple(r.margin or 0.0 for r in rankings),
        )
        if group.pairs():
            groups.append(group)
    if not groups:
        problem = "no usable pair (all ties, unjudged, dropped or equal within max_length)"
        raise UserError([f"{file}: {problem}; `rlhf data check {file} -c CONFIG` says more"])
    return groups, report


def read_world(inputs: dict[str, Path]) -> dict | None:
    """Return world.json of the embedded world; None where the experiment does not use it.

    Args:
        inputs: The artifact folders that the stage reads, by stage.
    """
    if "world" not in inputs:
        return None
    return json.loads((inputs["world"] / "world.json").read_text(encoding="utf-8"))
