"""A file or a Hub data set → checked records of one kind; the table FORMS says which rows are understood.

Files are JSONL, a JSON array or parquet; anything else is a data set on the Hub, through `datasets`. In JSON,
rows of our own records (`strict` in FORMS) may not have unknown keys, which there are misspellings; other
people's forms, parquet and the Hub may have more columns, which are not read; `rlhf data check` lists them.
Read as prompts, a row of any other kind gives its prompt.
"""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

from data import records
from data.error_lines import shorten
from data.records import Ranking, Reading, Record, message, named
from pipeline.errors import UserError

Turns = list[dict]  # messages that are not checked as a prompt yet
SPEAKERS = {"human": "user", "gpt": "assistant"}

# ── converters: a row of some form → a row of our own form, or ValueError ───────────────────────────────────


def turns(value: object, system: object = None, blank_end: bool = False) -> Turns:
    """The system message, then messages {role, content} or {from, value}; empty system ones are left out."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"the messages are {named(value)}; a list of {{role, content}} would be right")
    messages = []
    if system not in (None, ""):
        messages.append({"role": "system", "content": records.text_in({"system": system}, "system")})
    for number, turn in enumerate(value, 1):
        if isinstance(turn, dict):
            role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
            if role == "system" and content in (None, ""):
                continue
            turn = {"role": SPEAKERS.get(role, role) if isinstance(role, str) else role, "content": content}
        messages.append(message(turn, number, blank=blank_end and number == len(value)))
    return messages


def prompt_of(row: dict) -> str | Turns:
    """`prompt`, a string or messages, with the system message that may stand beside it."""
    if isinstance(row["prompt"], list):
        return turns(row["prompt"], row.get("system"))
    if row.get("system") in (None, ""):
        return row["prompt"]
    return turns([{"role": "user", "content": row["prompt"]}], row["system"])


def alpaca_prompt(row: dict) -> str | Turns:
    """The instruction, with the input on the next line, after the turns of `history`: [[asked, answered]]."""
    request = records.text_in(row, "instruction")
    if row.get("input") not in (None, ""):
        request += "\n" + records.text_in(row, "input")
    past = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"a turn of 'history' is {named(pair)}; [asked, answered] would be right")
        past += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    if past:
        return turns([*past, {"role": "user", "content": request}], row.get("system"))
    return prompt_of({"prompt": request, "system": row.get("system")})


def conversation(row: dict) -> Turns:
    return turns(row["messages"] if "messages" in row else row["conversations"], row.get("system"))


def up_to_last(role: str, messages: Turns) -> Turns:
    ends = [n for n, m in enumerate(messages, 1) if m["role"] == role]
    if not ends:
        raise ValueError(f"no message of the {role}; a conversation with at least one would be right")
    return messages[: ends[-1]]


def last_answer(row: dict) -> dict:
    """The last assistant turn is the completion, all before it the prompt; what follows it is left out."""
    *prompt, answer = up_to_last("assistant", conversation(row))
    return {"prompt": prompt, "completion": answer["content"]}


def reply(row: dict, key: str, prompt: str | Turns) -> str:
    """An answer: a string, one message, a list with one message, or such a list with the prompt before it."""
    if isinstance(row[key], str):
        return row[key]
    if not isinstance(row[key], dict | list):
        raise ValueError(f"'{key}' is {named(row[key])}; a text or the assistant's message would be right")
    messages = turns([row[key]] if isinstance(row[key], dict) else row[key], blank_end=True)
    before = records.as_messages(prompt) if isinstance(prompt, str | list) else []
    if messages[: len(before)] == before:
        messages = messages[len(before) :]
    if [m["role"] for m in messages] != ["assistant"]:
        found = ", ".join(m["role"] for m in messages) or "nothing"
        raise ValueError(f"'{key}' adds {found} to the prompt; one assistant message would be right")
    return messages[0]["content"]


def transcript(value: object) -> Turns:
    r"""Messages, or a string in the form of Anthropic's hh-rlhf: "\n\nHuman: …\n\nAssistant: …"."""
    if not isinstance(value, str):
        return turns(value, blank_end=True)
    start, *said = re.split(r"\n\n(Human|Assistant):", value)
    if start.strip() or not said:
        raise ValueError("'chosen' and 'rejected' are strings without a prompt; a key 'prompt' is needed")
    names = {"Human": "user", "Assistant": "assistant"}
    spoken = zip(said[::2], said[1::2], strict=True)
    return turns([{"role": names[who], "content": what.strip()} for who, what in spoken], blank_end=True)


def shared_prompt(row: dict) -> Turns:
    """The prompt of two whole conversations: all but the last message, the same in both."""
    chosen, rejected = transcript(row["chosen"])[:-1], transcript(row["rejected"])[:-1]
    if chosen != rejected:
        raise ValueError("'chosen' and 'rejected' differ before the last message; one prompt would be right")
    return chosen


def instructed(row: dict) -> dict:
    return {"prompt": alpaca_prompt(row), "completion": records.text_in(row, "output")}


def completed(row: dict) -> dict:
    prompt = prompt_of(row)
    return {"prompt": prompt, "completion": reply(row, "completion", prompt)}


def ranked(row: dict) -> dict:
    return {**row, "prompt": prompt_of(row)}


def preferred(prompt: str | Turns, row: dict) -> dict:
    """A preference is a ranking of K = 2, the chosen response first."""
    responses = [reply(row, "chosen", prompt), reply(row, "rejected", prompt)]
    given = {key: row.get(key) for key in BESIDE}
    return {"prompt": prompt, "responses": responses, "ranks": [1, 2], **given}


def preferred_conversation(row: dict) -> dict:
    whole = {key: transcript(row[key]) for key in ("chosen", "rejected")}
    return preferred(shared_prompt(whole), {**row, **whole})


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────


class Form(NamedTuple):
    """Rows that have the keys `needs`, and perhaps those of `also`; the first form that fits is taken."""

    needs: tuple[str, ...]
    also: tuple[str, ...]
    convert: Callable[[dict], dict]
    strict: bool = False

    def __str__(self) -> str:
        return "{" + ", ".join([*self.needs, *(f"{key}?" for key in self.also)]) + "}"


PAIR, ALPACA = ("chosen", "rejected"), ("input", "system", "history")
BESIDE = ("id", "labeler", "margin", "finished")  # what a ranking of any form may have
FORMS = {
    "documents": (Form(("text",), (), dict, strict=True),),
    "demonstrations": (
        Form(("messages",), ("system",), last_answer),
        Form(("conversations",), ("system",), last_answer),  # ShareGPT
        Form(("instruction", "output"), ALPACA, instructed),
        Form(("prompt", "completion"), ("system",), completed, strict=True),
    ),
    "rankings": (
        Form(("prompt", "responses", "ranks"), (*BESIDE, "system"), ranked, strict=True),
        Form(("prompt", *PAIR), (*BESIDE, "system"), lambda r: preferred(prompt_of(r), r)),
        Form(("conversations", *PAIR), (*BESIDE, "system"), lambda r: preferred(conversation(r), r)),
        Form(("instruction", *PAIR), (*BESIDE, *ALPACA), lambda r: preferred(alpaca_prompt(r), r)),
        Form(PAIR, BESIDE, preferred_conversation),
    ),
    "prompts": (
        Form(("prompt",), ("system",), lambda r: {"prompt": prompt_of(r)}),
        Form(("messages",), ("system",), lambda r: {"prompt": up_to_last("user", conversation(r))}),
        Form(("conversations",), ("system",), lambda r: {"prompt": up_to_last("user", conversation(r))}),
        Form(("instruction",), ALPACA, lambda r: {"prompt": alpaca_prompt(r)}),
        Form(PAIR, (), lambda r: {"prompt": shared_prompt(r)}),
    ),
}
FORMS["evaluation_prompts"] = FORMS["prompts"]

RECORD = {
    "documents": records.document_from,
    "demonstrations": records.demonstration_from,
    "rankings": records.ranking_from,
    "prompts": records.prompt_from,
    "evaluation_prompts": records.prompt_from,
}
BARE = {"documents": "text", "prompts": "prompt", "evaluation_prompts": "prompt"}  # key of a plain string


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Loaded:
    """What `read` found. wheres[i]: the place of records[i]; forms, unread: rows that had a form, a key."""

    records: list[Record] = field(default_factory=list)
    wheres: list[str] = field(default_factory=list)
    forms: Counter = field(default_factory=Counter)
    unread: Counter = field(default_factory=Counter)
    duplicates: int = 0  # prompts left out because they had come before
    blanks: int = 0
    cut: bool = False  # there may be more rows than were to be looked at
    errors: list[str] = field(default_factory=list)


def load(
    kind: str,
    path: str | Path | None = None,
    hub: str | None = None,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    skip: int = 0,
    revision: str | None = None,
    sha256: str | None = None,
) -> list[Record]:
    """The records of `kind` in the file `path` or the Hub data set `hub`, or `limit` of them after the first `skip`.

    A prompt that stands there twice is given once. UserError names every malformed row up to there. revision: the
    commit of the data set that is read. sha256: what the file must hold; UserError if it is another one by now.
    """
    return load_placed(kind, path, hub, split, subset, limit, skip, revision, sha256)[0]


def load_placed(
    kind, path=None, hub=None, split="train", subset=None, limit=None, skip=0, revision=None, sha256=None
) -> tuple[list[Record], list[str]]:
    """As `load`, and the place of each record (FILE:LINE, or an index), for what is found wrong with it later."""
    most = None if limit is None else skip + limit
    return without_first(read(kind, path, hub, split, subset, most, None, revision, sha256), skip, path or hub)


def load_first(kind: str, path: str | Path, limit: int | None, skip: int, most: int) -> list[Record]:
    """As `load`, of the `most` rows of a file after `skip`: a first look."""
    loaded = read(kind, path, limit=None if limit is None else skip + limit, most=skip + most)
    return without_first(loaded, skip, path)[0]


def without_first(loaded: "Loaded", skip: int, name: object) -> tuple[list[Record], list[str]]:
    """The records after the first `skip`, and their places. UserError for what was wrong, or where none are left."""
    if loaded.errors:
        raise UserError(shorten(loaded.errors))
    if skip >= len(loaded.records) and not loaded.cut:
        raise UserError([f"{name}: holds {len(loaded.records)} records and skip passes over {skip}; lower skip"])
    return loaded.records[skip:], loaded.wheres[skip:]


def read(
    kind, path=None, hub=None, split="train", subset=None, limit=None, most=None, revision=None, sha256=None
) -> Loaded:
    """As `load`, with all that was met on the way, and with the errors as lines. most: rows that are looked at."""
    assert kind in FORMS and (path is None) != (hub is None), (kind, path, hub)
    loaded, reading, seen = Loaded(), Reading(hashes=sha256 is not None), {}
    loaded.errors = reading.errors
    rows = hub_rows(hub, split, subset, revision, limit, reading) if hub else file_rows(path, reading)
    for number, (where, value) in enumerate(islice(rows, most), 1):
        loaded.cut = number == most
        try:
            form, row = recognise(kind, value)
            if form.strict and not hub and not is_parquet(path):
                records.refuse_unknown(row, (*form.needs, *form.also))
            record = RECORD[kind](form.convert(row))
            if kind == "rankings":
                record = with_own_id(record, where, seen)
        except ValueError as fault:
            loaded.errors.append(f"{where}: {fault}")
            continue
        loaded.forms["a plain string" if isinstance(value, str) else str(form)] += 1
        loaded.unread.update(set(row) - {*form.needs, *form.also, *records.METADATA})
        if RECORD[kind] is records.prompt_from:
            first = seen.setdefault(records.prompt_key(record.prompt), where)
            if first != where:
                loaded.duplicates += 1
                continue
        loaded.records.append(record)
        loaded.wheres.append(where)
        if len(loaded.records) == limit:
            break
    rows.close()  # what it read is known now
    loaded.blanks = reading.blanks
    if sha256 is not None and reading.sha256 != sha256:  # whatever else is wrong with it
        loaded.errors[:] = [f"{path}: was edited since this command looked at it; run again"]
    if not loaded.errors and not loaded.cut:
        loaded.errors += nothing_to_learn(kind, hub or path, loaded.records)
    return loaded


def recognise(kind: str, value: object) -> tuple[Form, dict]:
    """The form of a row, and the row as an object."""
    forms = FORMS[kind]
    known = " or ".join(map(str, forms))
    if isinstance(value, str) and kind in BARE:
        value = {BARE[kind]: value}
    if not isinstance(value, dict):
        raise ValueError(f"the row is {named(value)}; {known} would be right")
    for form in forms:
        if all(key in value for key in form.needs):
            return form, value
    nearest = max(forms, key=lambda form: sum(key in value for key in form.needs) / len(form.needs))
    missing = next(key for key in nearest.needs if key not in value)
    alike = difflib.get_close_matches(missing, value, 1)
    hint = f" (is it '{alike[0]}'?)" if alike else ""
    raise ValueError(f"the key '{missing}' is missing{hint}; {known} would be right")


def with_own_id(ranking: Ranking, where: str, seen: dict[str, str]) -> Ranking:
    """An id stands once. Rows without an id that are all the same are told apart by -2, -3, …"""
    if ranking.id in seen:
        if ranking.id != records.content_id(ranking):
            raise ValueError(f"the id '{ranking.id}' also stands at {seen[ranking.id]}; give each its own")
        ranking = replace(ranking, id=next(i for n in count(2) if (i := f"{ranking.id}-{n}") not in seen))
    seen[ranking.id] = where
    return ranking


def nothing_to_learn(kind: str, name: object, rows: list[Record]) -> list[str]:
    """A line if there is no row, or there are rankings and none prefers one text to another."""
    if not rows:
        return [f"{name}: no rows; at least one would be right"]
    if kind != "rankings":
        return []
    verdicts = Counter(verdict for ranking in rows for *_, verdict in records.judged_pairs(ranking))
    found = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items()))
    right = "different responses with different ranks would be right"
    return [] if verdicts["usable"] else [f"{name}: not one usable pair ({found}); {right}"]


# ── files and tables; in a table a null is no such key ──────────────────────────────────────────────────────


def file_rows(path: str | Path, reading: Reading) -> Iterator[tuple[str, object]]:
    """Yield (where, value) for each row of a file of any format."""
    return (parquet_rows if is_parquet(path) else records.read_rows)(path, reading)


def is_parquet(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".parquet"


def parquet_rows(path: str | Path, reading: Reading) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    index = 0
    try:
        content = Path(path).read_bytes()  # at once: what is hashed is what is read
        reading.sha256 = hashlib.sha256(content).hexdigest() if reading.hashes else None
        with ParquetFile(pyarrow.BufferReader(content)) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    yield f"{path}: index {index}", without_nulls(row)
                    index += 1
    except (OSError, ValueError, pyarrow.ArrowException) as fault:
        reading.errors.append(f"{path}: not readable as parquet: {first_line(fault)}; write it again")


def hub_rows(hub, split, subset, revision, limit, reading: Reading) -> Iterator[tuple[str, dict]]:
    """With a limit the rows are streamed, so that no more is fetched than is read. revision: a commit, read from this
    machine's cache if it is there; None: whatever the Hub has, or the newest in the cache."""
    import datasets

    try:
        rows = cached_rows(hub, split, subset, revision) if revision else None
        if rows is None:
            pinned = {"revision": revision} if revision else {}
            rows = datasets.load_dataset(hub, subset, split=split, streaming=limit is not None, **pinned)
        for index, row in enumerate(rows):
            yield f"{hub} {split}: index {index}", without_nulls(row)
    except Exception as fault:  # name, subset, split, network: every library below has its own exceptions
        remedy = "check name, split, subset and network, or give a local file"
        reading.errors.append(f"{hub} {split}: cannot be loaded: {first_line(fault)}; {remedy}")


def cached_rows(hub: str, split: str, subset: str | None, commit: str):
    """The rows of a commit that `datasets` has prepared on this machine; None where it has not. It would itself take
    the newest commit that it has prepared where the Hub cannot be reached: then ConnectionError."""
    import datasets
    from huggingface_hub import HfApi

    try:
        from datasets.naming import camelcase_to_snakecase
        from datasets.packaged_modules.cache.cache import Cache
    except ImportError:  # its own affairs: another version may do otherwise, and takes the commit from the Hub
        return None
    *owner, name = hub.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(name)])
    prepared = [path for path in folder.glob("*/*/*") if path.is_dir() and subset in (None, path.parts[-3])]
    places = {path.parts[-3]: path for path in prepared if path.name == commit}
    place = places.get("default") if len(places) > 1 else next(iter(places.values()), None)
    if place is not None:
        config, version, _ = place.parts[-3:]
        builder = Cache(dataset_name=name, repo_id=hub, config_name=config, version=version, hash=commit)
        return builder.as_dataset(split=split)
    if prepared and not places:
        try:
            HfApi().dataset_info(hub, revision=commit, timeout=10.0)
        except Exception as fault:
            known = ", ".join(sorted({path.name[:7] for path in prepared}))
            raise ConnectionError(
                f"commit {commit[:7]} is not on this machine (commits {known} are), and the Hub does not give it: "
                f"{first_line(fault)}"
            ) from fault
    return None


def without_nulls(row: dict) -> dict:
    return {key: value for key, value in row.items() if value is not None}


def first_line(fault: Exception) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0].rstrip(".")
