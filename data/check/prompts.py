"""Report prompts that occur twice, in one file or in two."""

import json

from data.check.report import Report, prompt_locations, prompt_value
from data.forms import PROMPT_KINDS
from data.near_copies import nearest_copies
from data.records import Demonstration, Record, prompt_key, to_json
from data.sources import Loaded
from data.turns import turns_of


def add_duplicates(report: Report, loaded: Loaded) -> None:
    """Report equal rows, and rows with a prompt that came before."""
    if report.kind in PROMPT_KINDS:
        report.add("duplicates", f"{loaded.duplicates:,} prompts, left out")
        return
    different = {json.dumps(to_json(record) | {"id": ""}, sort_keys=True) for record in loaded.records}
    text = f"{len(loaded.records) - len(different):,} rows"
    if report.kind != "documents":
        text += f" · {len(loaded.records) - len(prompt_locations(loaded)):,} prompts that came before"
    report.add("duplicates", text + ", kept")


def learnt_keys(record: Record) -> list[str]:
    """Return the keys of a record's prompt, and of those that earlier learnt answers have."""
    if isinstance(record, Demonstration):
        return [prompt_key(turn.prompt) for turn in reversed(turns_of(record))]
    return [prompt_key(prompt_value(record))]


def add_shared_prompts(report: Report, loaded: Loaded, theirs: Loaded, name: str, *, may_share: bool) -> None:
    """Report the prompts of this file that also occur in another one.

    Args:
        report: Where facts and errors go.
        loaded: The records of this file.
        theirs: The records of the other one.
        name: The kind or name of the other one.
        may_share: Whether both are training data, which may share prompts. Otherwise a shared
            prompt is an error, and near copies are counted too, for a person to judge.
    """
    seen: dict[str, str] = {}  # key of a prompt → its last location
    for record, location in zip(theirs.records, theirs.locations, strict=True):
        seen.update(dict.fromkeys(learnt_keys(record), location))
    keys = [learnt_keys(record) for record in loaded.records]
    places = [next((seen[key] for key in own if key in seen), None) for own in keys]
    shared = [i for i, place in enumerate(places) if place is not None]
    unread = f" ({len(theirs.errors):,} errors in it: check it too)" if theirs.errors else ""
    report.add(f"also in {name}", f"{len(shared):,} of {len(loaded.records):,} prompts{unread}")
    if may_share:
        return
    for i in shared:
        problem = f"this prompt is at {places[i]} ({name}) too: a leak"
        report.errors.append(f"{loaded.locations[i]}: {problem}; remove it from one of the two")
    others = [i for i, place in enumerate(places) if place is None]
    nearest = nearest_copies(
        [prompt_value(loaded.records[i]) for i in others], [prompt_value(record) for record in theirs.records]
    )
    near = [(i, copy) for i, copy in zip(others, nearest, strict=True) if copy is not None]
    text = f"{len(near):,} of {len(loaded.records):,} prompts are near copies of prompts in {name}"
    if near:
        i, copy = near[0]
        text += f" · the first at {loaded.locations[i]}, of {theirs.locations[copy]}"
    report.add("near copies", text)
