"""What a row of data means: four records, checked; JSON in (faults with file and line), JSONL out (atomic).

    Demonstration {prompt, completion}
    Ranking {id, prompt, responses, ranks, labeler?, margin?, finished?}
    Document {text}                         Prompt {prompt}

`prompt` is a string or a list of {role, content} that ends with the user's message. Only a response of a
ranking may be blank, for a policy can answer nothing at all and be ranked last for it. A blank document,
prompt, message or completion is an error: a fault of some export, which would teach the model to say nothing.
"""

import difflib
import hashlib
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from json.decoder import WHITESPACE
from pathlib import Path

ROLES = ("system", "user", "assistant")
OPTIONAL = ("labeler", "margin", "finished")  # fields of a ranking that are left out where they say nothing
METADATA = ("meta", "metadata", "id", "source", "url", "timestamp")  # may stand in every row; not read
UTF8_BOM = b"\xef\xbb\xbf"
SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair: no UTF-8 file and no tokenizer can hold it


# ── the records ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Demonstration:
    prompt: str | tuple[dict, ...]
    completion: str


@dataclass(frozen=True)
class Ranking:
    """K ≥ 2 responses of one prompt; ranks: 1 = best, equal = tie, None = not judged.

    margin: how sure the labeler is of this ranking, as the least score difference of its pairs (Llama 2, eq. 2).
    finished: False for a response that was cut off, as a sample is at the length limit: nobody is taught that
    it ends there. None: all ended by themselves.
    """

    id: str
    prompt: str | tuple[dict, ...]
    responses: tuple[str, ...]
    ranks: tuple[int | None, ...]
    labeler: str | None = None
    margin: float | None = None
    finished: tuple[bool, ...] | None = None

    @property
    def answers(self) -> tuple[tuple[str, bool], ...]:
        """The text of each response and whether it is finished: what tells two responses apart."""
        return tuple(zip(self.responses, self.finished or (True,) * len(self.responses), strict=True))


@dataclass(frozen=True)
class Document:
    text: str


@dataclass(frozen=True)
class Prompt:
    prompt: str | tuple[dict, ...]


Record = Demonstration | Ranking | Document | Prompt


def as_messages(prompt: str | Iterable[dict]) -> list[dict]:
    """The prompt as a list of {role, content}; a string is one user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]


def prompt_key(prompt: str | Iterable[dict]) -> str:
    """Equal for the same roles and words, whatever the white space and the Unicode form of the letters."""
    turns = [(m["role"], unicodedata.normalize("NFC", m["content"])) for m in as_messages(prompt)]
    return json.dumps([[role, " ".join(content.split())] for role, content in turns], ensure_ascii=False)


def judged_pairs(ranking: Ranking) -> Iterator[tuple[int, int, str]]:
    """All C(K,2) pairs as (i, j, verdict): "usable" (i is better), "tie", "unjudged", "identical".

    A text that is finished and the same text cut off are two responses.
    """
    answers = ranking.answers
    for i, j in combinations(range(len(ranking.responses)), 2):
        first, second = ranking.ranks[i], ranking.ranks[j]
        if first is None or second is None:
            yield i, j, "unjudged"
        elif answers[i] == answers[j]:
            yield i, j, "identical"
        elif first == second:
            yield i, j, "tie"
        else:
            yield (i, j, "usable") if first < second else (j, i, "usable")


# ── row → record, or ValueError("what is wrong; what would be right") ───────────────────────────────────────


def demonstration_from(row: dict) -> Demonstration:
    return Demonstration(prompt_in(row), text_in(row, "completion"))


def document_from(row: dict) -> Document:
    return Document(text_in(row, "text"))


def prompt_from(row: dict) -> Prompt:
    return Prompt(prompt_in(row))


def ranking_from(row: dict) -> Ranking:
    """A row without an id gets one from its content."""
    prompt, responses, ranks = prompt_in(row), list_in(row, "responses"), list_in(row, "ranks")
    if len(responses) < 2:
        raise ValueError(f"a ranking needs at least 2 responses, not {len(responses)}; add one, or delete it")
    for n, response in enumerate(responses, 1):
        if not isinstance(response, str):
            raise ValueError(f"response {n} is {named(response)}; a string would be right")
    if len(ranks) != len(responses):
        raise ValueError(f"{len(responses)} responses, {len(ranks)} ranks; a rank for each would be right")
    for n, rank in enumerate(ranks, 1):
        if rank is not None and (type(rank) is not int or rank < 1):
            raise ValueError(f"rank {n} is {named(rank)}; 1 (best), 2, … or null (not judged) would be right")
    identifier, labeler = row.get("id"), row.get("labeler")
    if (identifier is not None and type(identifier) not in (str, int)) or identifier == "":
        raise ValueError(f"'id' is {named(identifier)}; a string, or no id, would be right")
    if not isinstance(labeler, str | None):
        raise ValueError(f"'labeler' is {named(labeler)}; a string, or no labeler, would be right")
    extra = {"margin": margin_in(row), "finished": finished_in(row, len(responses))}
    ranking = Ranking(str(identifier), prompt, tuple(responses), tuple(ranks), labeler, **extra)
    return ranking if identifier is not None else replace(ranking, id=content_id(ranking))


def margin_in(row: dict) -> float | None:
    margin = row.get("margin")
    if margin is not None and (type(margin) not in (int, float) or not 0 <= margin < math.inf):
        raise ValueError(f"'margin' is {named(margin)}; a number from 0 on, or no margin, would be right")
    return None if margin is None else float(margin)


def finished_in(row: dict, count: int) -> tuple[bool, ...] | None:
    """Return which of a ranking's `count` responses ended by themselves; None where the row does not say."""
    finished, right = row.get("finished"), "true (it ended by itself) or false (it was cut off) for each response"
    if finished is None:
        return None
    if not isinstance(finished, list):
        raise ValueError(f"'finished' is {named(finished)}; a list with {right} would be right")
    if len(finished) != count:
        raise ValueError(f"{count} responses, {len(finished)} in 'finished'; {right} would be right")
    for n, value in enumerate(finished, 1):
        if not isinstance(value, bool):
            raise ValueError(f"entry {n} of 'finished' is {named(value)}; {right} would be right")
    return tuple(finished)


def content_id(ranking: Ranking) -> str:
    """16 hex digits of the sha256 of everything but the id."""
    content = [as_messages(ranking.prompt), ranking.responses, ranking.ranks, ranking.labeler]
    content += [] if ranking.margin is None else [ranking.margin]
    content += [] if all(ranking.finished or ()) else [ranking.finished]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def prompt_in(row: dict) -> str | tuple[dict, ...]:
    if not isinstance(row.get("prompt"), list):
        return text_in(row, "prompt", "a text or a list of {role, content}")
    messages = [message(m, n) for n, m in enumerate(row["prompt"], 1)]
    if not messages or messages[-1]["role"] != "user":
        found = f"ends with the {messages[-1]['role']}'s message" if messages else "has no messages"
        raise ValueError(f"the prompt {found}; one that ends with the user's would be right")
    if any(m["role"] == "system" for m in messages[1:]):
        raise ValueError("a system message stands after the first message; only the first may be one")
    return tuple(messages)


def message(value: object, number: int, blank: bool = False) -> dict:
    """The checked message {role, content}; its other keys are not read."""
    if not isinstance(value, dict):
        raise ValueError(f"message {number} is {named(value)}; {{role, content}} would be right")
    if value.get("role") not in ROLES:
        found = named(value["role"]) if "role" in value else "missing"
        raise ValueError(f"the role of message {number} is {found}; system, user or assistant would be right")
    content = value.get("content")
    if not isinstance(content, str) or not (blank or content.strip()):
        raise ValueError(f"the content of message {number} is {named(content)}; a text would be right")
    return {"role": value["role"], "content": content}


def text_in(row: dict, key: str, right: str = "a text") -> str:
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise ValueError(f"'{key}' is {named(row[key]) if key in row else 'missing'}; {right} would be right")
    return row[key]


def list_in(row: dict, key: str) -> list:
    if not isinstance(row.get(key), list):
        found = named(row[key]) if key in row else "missing"
        raise ValueError(f"'{key}' is {found}; a list with an entry for each response would be right")
    return row[key]


def refuse_unknown(row: dict, known: Iterable[str]) -> None:
    """For our own records, where a misspelt `labeler` would else be lost without a word."""
    for key in row:
        if key not in known and key not in METADATA:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else "remove it or put it under 'meta' (not read)"
            raise ValueError(f"unknown key '{key}'; {hint}")


def named(value: object) -> str:
    """A JSON value, in the words of an error message."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...") if value.strip() else "blank"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value, default=str)


# ── JSON in: strict, every fault with its place ─────────────────────────────────────────────────────────────


@dataclass
class Reading:
    """What reading a file met besides its rows. hashes: whether `sha256` is to be told once the reading has ended, of
    all bytes that it saw and those behind them."""

    errors: list[str] = field(default_factory=list)
    blanks: int = 0
    hashes: bool = False
    sha256: str | None = None


class HashedFile(io.RawIOBase):
    """A file that is hashed while it is read, from its first byte to its last: what was read is what was hashed."""

    def __init__(self, path: str | Path):
        self._file, self._digest = open(path, "rb", buffering=0), hashlib.sha256()  # noqa: SIM115 (close below)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        return count

    def digest_of_all(self) -> str:
        """The sha256 of the whole file: reads what is left."""
        rest = bytearray(2**20)
        while self.readinto(rest):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


def read_rows(path: str | Path, reading: Reading) -> Iterator[tuple[str, object]]:
    """Yield (where, value) row by row: "FILE:LINE", in an array "FILE:LINE: index I" (from 0).

    A file that begins with "[" is one JSON array, any other is JSONL. Blank lines are skipped and counted, a
    byte order mark is skipped. `reading.errors` gets a line for each other fault: a missing, empty or cut-off
    file, text that is not UTF-8, NUL, a key that stands twice in an object, NaN, half a surrogate pair.
    """
    try:
        raw = HashedFile(path)
    except OSError as fault:
        reading.errors.append(f"{path}: cannot be read: {fault.strerror}; the path of a file would be right")
        return
    handle = io.BufferedReader(raw, 2**16)
    try:
        yield from _rows_of(path, handle, reading)
    finally:  # also where the reader wanted no more rows
        if reading.hashes:
            reading.sha256 = raw.digest_of_all()
        handle.close()


def _rows_of(path: str | Path, handle: io.BufferedReader, reading: Reading) -> Iterator[tuple[str, object]]:
    head = handle.peek(4096)[:4096]
    text = head.removeprefix(UTF8_BOM)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        reading.errors.append(f"{path}:1: UTF-16 from byte offset 0 on; save the file as UTF-8")
    elif b"\0" in head[:2]:
        what = f"NUL bytes from byte offset {head.index(0)} on (damaged, or UTF-16)"
        reading.errors.append(f"{path}:1: {what}; save the file again as UTF-8")
    elif head.startswith(b"\x1f\x8b"):
        reading.errors.append(f"{path}: compressed (gzip); unpack it first")
    else:
        offset = len(handle.read(len(head) - len(text)))
        yield from (array_rows if text.lstrip().startswith(b"[") else line_rows)(path, handle, offset, reading)


def line_rows(path, handle, offset: int, reading: Reading) -> Iterator[tuple[str, object]]:
    decode, number = strict_decoder(), 0
    for number, raw in enumerate(handle, 1):
        start, offset = offset, offset + len(raw)
        if not raw.strip():
            reading.blanks += 1
            continue
        try:
            text = utf8(raw, start).rstrip()
            value, end, fault = decode(text, WHITESPACE.match(text).end())
            if end < len(text):
                fault = f"invalid JSON: more text after column {end}; one JSON object a line would be right"
        except (ValueError, RecursionError) as error:
            fault = explained(error)
            if raw.startswith(b"{") and not raw.endswith((b"\n", b"}")):
                fault = f"the last line is cut off ({fault.partition(';')[0]}); write the file again"
        if fault:
            reading.errors.append(f"{path}:{number}: {fault}")
        else:
            yield f"{path}:{number}", value
    if number == reading.blanks:
        what = "only blank lines" if number else "the file is empty"
        reading.errors.append(f"{path}: {what}; one JSON object a line, or one JSON array, would be right")


def array_rows(path, handle, offset: int, reading: Reading) -> Iterator[tuple[str, object]]:
    decode, lines, line, place = strict_decoder(), [], 1, ""
    try:
        for raw in handle:
            line = len(lines) + 1
            lines.append(utf8(raw, offset))
            offset += len(raw)
        text = "".join(lines).rstrip()
        line, seen, index, sign = 1, 0, -1, ","
        here = WHITESPACE.match(text, text.index("[") + 1).end()
        if text[here:] == "]":
            raise ValueError("the array is empty; at least one row would be right")
        while sign == ",":
            line, seen, index = line + text.count("\n", seen, here), here, index + 1
            place = f": index {index}"
            value, end, fault = decode(text, here)
            if fault:
                reading.errors.append(f"{path}:{line}{place}: {fault}")
            else:
                yield f"{path}:{line}{place}", value
            end = WHITESPACE.match(text, end).end()
            sign, here = text[end : end + 1], WHITESPACE.match(text, end + 1).end()
        line += text.count("\n", seen, end)
        if sign != "]":
            found = f"{sign!r} after the row" if sign else "the file is cut off after this row"
            raise ValueError(f"invalid JSON: {found}; ',' or ']' would be right")
        if here < len(text):
            raise ValueError("text after the array; one array, or one JSON object a line, would be right")
    except (ValueError, RecursionError) as error:
        fault, invalid = explained(error), isinstance(error, json.JSONDecodeError)
        if invalid and (error.pos >= len(text) or "Unterminated" in error.msg):
            fault = f"the file is cut off ({fault.partition(';')[0]}); write it again"
        reading.errors.append(f"{path}:{error.lineno if invalid else line}{place}: {fault}")


def strict_decoder() -> Callable[[str, int], tuple[object, int, str | None]]:
    """A function (text, start) → (value, end, fault), fault being what JSON forbids and Python lets pass."""
    faults = []

    def unique(members):
        keys = [key for key, _ in members]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            faults.append(f"the key {twice!r} stands twice in one object; keep one of them")
        return dict(members)

    def finite(number):
        if not math.isfinite(float(number)):
            faults.append(f"{number} is not a JSON number; a finite number or null would be right")
        return float(number)

    decoder = json.JSONDecoder(object_pairs_hook=unique, parse_float=finite, parse_constant=finite)

    def decode(text, start):
        faults.clear()
        value, end = decoder.raw_decode(text, start)
        if "\\ud" in text[start:end].lower() and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            faults.append("an escape \\ud800 to \\udfff stands without its other half; remove it")
        return value, end, faults[0] if faults else None

    return decode


def utf8(raw: bytes, start: int) -> str:
    """Bytes at offset `start` of their file, as text; ValueError names the offset of the first bad byte."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as fault:
        bad = f"byte 0x{raw[fault.start]:02x} at byte offset {start + fault.start}"
        raise ValueError(f"not UTF-8: {bad}; save the file as UTF-8") from None
    if "\0" in text:
        bad = f"a NUL byte at byte offset {start + raw.index(0)} (damaged, or UTF-16)"
        raise ValueError(f"{bad}; save the file again as UTF-8")
    return text


def explained(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "invalid JSON: nested too deeply; a flat object would be right"
    if isinstance(error, json.JSONDecodeError):
        what = error.msg.removesuffix(" at")
        return f"invalid JSON: {what} at column {error.colno}; one JSON object a row would be right"
    return str(error)


# ── JSONL out ───────────────────────────────────────────────────────────────────────────────────────────────


def to_json(record: Record) -> dict:
    """The JSON object that reads back as an equal record."""
    row = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(record).items()}
    return {key: value for key, value in row.items() if key not in OPTIONAL or value is not None}


def write_jsonl(path: str | Path, records: Iterable[Record | dict]) -> None:
    """One object a line, UTF-8; the file appears whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as handle:
            for record in records:
                row = record if isinstance(record, dict) else to_json(record)
                handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)
