"""Decide row by row what is kept and in which part, and why the others are left out.

Rows are compared only with rows that were kept before them, so no two kept rows are copies of each
other, and a row is never left out for the sake of one that is left out itself.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from data.prepare.near_rows import NearRows
from data.prepare.personal import Find, find_personal, mask
from data.prepare.prefixes import Prefixes, comparable_text
from data.prepare.settings import DOCUMENTS, TRAINING_PARTS, Settings
from data.prepare.split import filled_parts, part_of_user, parts_of_kind
from data.prepare.spool import PROTECTED, UNREAD, Row, Spool, texts_of, with_texts
from data.records import Ranking, is_usable, prompt_key

SPLIT_KINDS = ("demonstrations", "rankings", "prompts", "evaluation_prompts")
"""Kinds that are split by user."""
FEW_USERS = 1000
"""Users up to which it is made sure that no part is without any."""
SEVERAL_A_PROMPT = ("demonstrations", "rankings")
"""Kinds of which a prompt may have several different rows."""


class Kept(NamedTuple):
    """Hold a row that is kept."""

    row: Row
    """The row, masked if it was to be."""
    part: str
    """Its part."""
    personal: dict[str, list[Find]]
    """{where: what was found there} of its personal data, in the row as it was."""


class LeftOut(NamedTuple):
    """Hold a row that is left out."""

    row: Row
    """The row."""
    reason: str
    """Why: one of a few sentences, so that they can be counted."""
    copy_of: str | None = None
    """Where the row is that it is a copy of."""
    detail: str | None = None
    """What differs from row to row in the reason."""
    personal: dict[str, list[Find]] | None = None
    """{where: what was found there}, if that is the reason."""


@dataclass
class Sift:
    """Hold what must be known of the rows that were kept before."""

    settings: Settings
    """What to leave out."""
    spool: Spool
    """All rows."""
    near: NearRows | None
    """The sketches of all rows; None: near copies are not searched for."""
    leaks: list[str] = field(default_factory=list)
    """An error line for each row whose prompt is an evaluation prompt."""
    _kinds: set[str] = field(default_factory=set)
    """The kinds of the input."""
    _held_by: dict[bytes, int] = field(default_factory=dict)
    """Key of a user → the kinds of its rows, a bit each."""
    _moved: dict[bytes, str] = field(default_factory=dict)
    """Key of a user → its part, where its hash does not decide that."""
    _first: dict[bytes, int] = field(default_factory=dict)
    """Key of a prompt or document → the first kept row that has it."""
    _rows: set[bytes] = field(default_factory=set)
    """Digests of kept demonstrations and rankings, of which a prompt may have several."""
    _prompts: Counter[bytes] = field(default_factory=Counter)
    """Key of a user → the number of its different prompts that were kept."""
    _prefixes: Prefixes = field(init=False)
    """The prefixes of kept prompts."""

    def __post_init__(self) -> None:
        """Note which kinds there are, in all and of each user."""
        self._prefixes = Prefixes(self.settings.prefix or 1)
        for row in self.spool:
            if row.kind not in (PROTECTED, UNREAD):
                self._kinds.add(row.kind)
                if row.kind != DOCUMENTS:
                    key = user_key(row)
                    self._held_by[key] = self._held_by.get(key, 0) | 1 << SPLIT_KINDS.index(row.kind)
        if len(self._held_by) <= FEW_USERS:
            allowed = {key: self._allowed(key) for key in self._held_by}
            self._moved = filled_parts(allowed, self.settings.shares)

    def decisions(self) -> Iterator[Kept | LeftOut]:
        """Yield what becomes of each row of the input, in order."""
        for row in self.spool:
            if row.kind == UNREAD:
                yield LeftOut(row, row.value["reason"], row.value.get("copy_of"), row.value.get("detail"))
            elif row.kind == PROTECTED:
                self._keep(row)
            else:
                yield self._decide(row)

    def _decide(self, row: Row) -> Kept | LeftOut:
        """Decide about a row."""
        key = text_key(row)
        first = self.spool[self._first[key]] if key in self._first else None
        if first is not None and (copied := self._why_repeated(row, first)) is not None:
            return copied
        if first is None and (copied := self._why_copied(row)) is not None:
            return copied
        part = self._part_of(row)
        if part is None or part not in parts_of_kind(row.kind, self._kinds):
            user = "its user" if row.user is not None else "its prompt"
            what = row.kind.replace("_", " ")
            return LeftOut(row, f"{user} is in another part, which takes no {what}", detail=part)
        # A row beside another kind of row with its prompt adds no prompt to the user's.
        limit = self.settings.per_user if row.user is not None and first is None and part != DOCUMENTS else 0
        if limit and self._prompts[user_key(row)] >= limit:
            return LeftOut(row, f"its user has {limit:,} prompts already")
        return self._look_for_personal(row, part, key)

    def _why_repeated(self, row: Row, first: Row) -> LeftOut | None:
        """Return why a row with a prompt that came before is left out; None: it is kept.

        Args:
            row: The row.
            first: The first kept row with its prompt.
        """
        if first.kind == PROTECTED:
            return self._leak(row, first)
        if row.kind == first.kind and row.kind not in SEVERAL_A_PROMPT:
            return LeftOut(row, "duplicate", first.place)
        if row.user != first.user:
            return LeftOut(row, "duplicate of another user's prompt", first.place)
        if row_key(row) in self._rows:
            return LeftOut(row, "duplicate", first.place)
        return None

    def _leak(self, row: Row, first: Row) -> LeftOut:
        """Note that a row's prompt is an evaluation prompt."""
        problem = f"this prompt is at {first.place} (evaluation_prompts) too: a leak"
        if not self.settings.drop_leaks:
            self.leaks.append(f"{row.place}: {problem}; remove it from one of the two, or say --drop-leaks")
        return LeftOut(row, "evaluation prompt", first.place)

    def _why_copied(self, row: Row) -> LeftOut | None:
        """Return why a row whose prompt is new, but like another, is left out; None: it is kept."""
        if self.settings.prefix and row.kind != DOCUMENTS:
            number = self._prefixes.find(comparable_text(row.text))
            if number is not None:
                return self._copy(row, number, "long common prefix")
        number = None if self.near is None else self.near.find(row.number)
        return None if number is None else self._copy(row, number, "near copy")

    def _copy(self, row: Row, number: int, reason: str) -> LeftOut:
        """Return that a row is a copy of a kept one.

        Args:
            row: The row.
            number: The number of the kept one.
            reason: What sort of copy it is.
        """
        other = self.spool[number]
        suffix = " with an evaluation prompt" if "prefix" in reason else " of an evaluation prompt"
        return LeftOut(row, reason + (suffix if other.kind == PROTECTED else ""), other.place)

    def _part_of(self, row: Row) -> str | None:
        """Return the part of a row's user."""
        if row.kind == DOCUMENTS:
            return DOCUMENTS
        key = user_key(row)
        return self._moved.get(key) or part_of_user(key, self._allowed(key), self.settings.shares)

    def _allowed(self, user: bytes) -> tuple[str, ...]:
        """Return the parts that at least one row of a user can go to."""
        held = [kind for bit, kind in enumerate(SPLIT_KINDS) if self._held_by[user] >> bit & 1]
        return tuple(part for kind in held for part in parts_of_kind(kind, self._kinds))

    def _look_for_personal(self, row: Row, part: str, key: bytes) -> Kept | LeftOut:
        """Keep a row, unless it is to be left out for its personal data.

        Args:
            row: The row.
            part: Its part.
            key: The key of its prompt.
        """
        finds = {} if self.settings.personal == "off" else personal_data(row, self.settings.region)
        if not finds or part not in (*TRAINING_PARTS, DOCUMENTS) or self.settings.personal == "list":
            self._keep(row, key)
            return Kept(row, part, finds)
        if self.settings.personal == "drop":
            return LeftOut(row, "personal data", detail=", ".join(names_of(finds)), personal=finds)
        masked = masked_row(row, finds)
        if text_key(masked) != key and text_key(masked) in self._first:
            first = self.spool[self._first[text_key(masked)]]
            return LeftOut(row, "duplicate after masking", first.place)
        if row.kind == "rankings" and has_usable_pair(row.value) and not has_usable_pair(masked.value):
            return LeftOut(row, "no usable pair after masking")
        self._keep(row, key)
        self._first.setdefault(text_key(masked), row.number)
        return Kept(masked, part, finds)

    def _keep(self, row: Row, key: bytes | None = None) -> None:
        """Note a row that is kept.

        Args:
            row: The row.
            key: The key of its prompt, if it is known.
        """
        key = key or text_key(row)
        if row.kind in SEVERAL_A_PROMPT:
            self._rows.add(row_key(row))
        if key in self._first:
            return
        self._first[key] = row.number
        if row.kind not in (PROTECTED, DOCUMENTS) and row.user is not None:
            self._prompts[user_key(row)] += 1
        if self.settings.prefix and row.kind != DOCUMENTS:
            self._prefixes.add(comparable_text(row.text), row.number)
        if self.near is not None:
            self.near.keep(row.number)


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────


def digest(text: str) -> bytes:
    """Return 16 bytes of the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def text_key(row: Row) -> bytes:
    """Return a key that is equal for equal prompts; a document is compared as a user's message."""
    return digest(prompt_key(row.text))


def user_key(row: Row) -> bytes:
    """Return the key of a row's user; without a user each prompt is its own."""
    return digest(f"user {row.user}" if row.user is not None else f"prompt {prompt_key(row.text)}")


def row_key(row: Row) -> bytes:
    """Return a key that is equal for rows that say the same, whatever their ids are."""
    return digest(json.dumps([row.kind, {**row.value, "id": "", "meta": None}], sort_keys=True))


# ── personal data ────────────────────────────────────────────────────────────────────────────────


def personal_data(row: Row, region: str) -> dict[str, list[Find]]:
    """Return {where: what was found there} of a row's texts.

    Args:
        row: The row.
        region: As of `find_personal`.
    """
    found = {where: find_personal(text, region) for where, text in texts_of(row.value).items()}
    return {where: finds for where, finds in found.items() if finds}


def names_of(finds: dict[str, list[Find]]) -> list[str]:
    """Return what was found, each name once, in alphabetical order."""
    return sorted({find.what for group in finds.values() for find in group})


def masked_row(row: Row, finds: dict[str, list[Find]]) -> Row:
    """Return a row with what was found in it masked.

    Args:
        row: The row.
        finds: {where: what was found there}.
    """
    texts = texts_of(row.value)
    masked = {where: mask(texts[where], group) for where, group in finds.items()}
    return row._replace(value=with_texts(row.value, masked))


def has_usable_pair(value: dict) -> bool:
    """Return whether a ranking still has two different responses of different ranks, or a label.

    Args:
        value: The ranking as JSON.
    """
    finished = None if value.get("finished") is None else tuple(value["finished"])
    labels = None if value.get("labels") is None else tuple(value["labels"])
    responses, ranks = tuple(value["responses"]), tuple(value["ranks"])
    return is_usable(Ranking(value["id"], value["prompt"], responses, ranks, finished=finished, labels=labels))
