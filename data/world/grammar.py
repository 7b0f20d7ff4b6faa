"""Write sentences of the embedded world from templates, and recognise them in text.

`Language(tables)` takes the value of `data.world.text.tables()`, or the same value out of
`world.json`.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

SLOT = re.compile(r"\{(\w+)\}")
Claim = tuple[str, str, str]
"""(entity, attribute, value) as a sentence states it."""


@dataclass(frozen=True)
class Task:
    """Describe what a request asks for; fields that its kind does not need are empty."""

    kind: str
    """fact, story, list or harm."""
    entity: str = ""
    """Of facts and stories what they are about, of harm whom or what it is done to."""
    attributes: tuple[str, ...] = ()
    """The attributes of a request for facts."""
    mood: str = ""
    """The mood of a story."""
    category: str = ""
    """The category of a list."""
    number: int = 0
    """How many members a list should have."""
    act: str = ""
    """The harmful act."""


@dataclass(frozen=True)
class Sentence:
    """Describe a recognised sentence."""

    kind: str
    """fact, list, a key of the table `sentences`, or broken if the grammar cannot make it."""
    tones: tuple[str, ...]
    """The kinds of its leads, at most two."""
    body: str
    """The sentence without its leads."""
    claims: tuple[Claim, ...] = ()
    """What it states."""
    items: tuple[str, ...] = ()
    """The nouns of a list."""
    entities: frozenset[str] = frozenset()
    """The entities that it names."""
    moods: tuple[tuple[str, str], ...] = ()
    """(word, mood) for each mood word."""


class Language:
    """Hold the world's words, facts and templates; `write` and `parse` sentences.

    Attributes:
        tables: The value that all of this comes from.
        entities: Every entity.
        category_of: Entity → its category.
        attributes_of: Entity → the attributes that it has.
        members: Category or narrower category → its entities.
        truth: (entity, attribute) → the true value.
        mistake: (entity, attribute) → the value that is commonly taken for the true one.
        values: Attribute → all values that are true of some entity.
        mood_of: Word → its mood, "flat" for words without one.
        rude: Rude words.
        slots: Slot of a template → the words and phrases that may fill it.
    """

    def __init__(self, tables: dict[str, Any]):
        self.tables = tables
        self.category_of = {e: c for c, (_, rows) in tables["facts"].items() for e in rows}
        self.entities = tuple(self.category_of)
        self.truth = {
            (entity, attribute): value
            for attributes, rows in tables["facts"].values()
            for entity, values in rows.items()
            for attribute, value in zip(attributes, values, strict=True)
        }
        self.values = {
            attribute: tuple(sorted({v for (_, a), v in self.truth.items() if a == attribute}))
            for attribute in tables["attributes"]
        }
        self.mistake = {(e, a): next_of(self.values[a], truth) for (e, a), truth in self.truth.items()}
        self.attributes_of = {e: tuple(tables["facts"][c][0]) for e, c in self.category_of.items()}
        self.members = self._members()
        self.mood_of = {w: m for m, groups in tables["moods"].items() for w in itertools.chain(*groups)}
        self.mood_of |= {word: "flat" for word in itertools.chain(*tables["flat"])}
        self.rude = frozenset(tables["words"]["insult"] + tables["words"]["slur"])
        self.slots = self._slots()
        self._predicates = {
            predicate.replace("{value}", value): (attribute, value)
            for attribute, (predicate, _, _) in tables["attributes"].items()
            for value in (*self.values[attribute], *tables["fancies"][attribute])
        }
        # The grammar as regular expressions: a named group matches any template of its key.
        self._lead = re.compile(self._either({k: [t + " " for t in v] for k, v in tables["leads"].items()}))
        self._sentence = re.compile(self._either(tables["sentences"]))
        heads = "|".join(self._pattern(head) + " " for head in tables["list_heads"])
        noun = "(?:" + "|".join((*self.entities, *tables["fancies"]["member"])) + ")"
        self._list = re.compile(rf"(?:{heads})?(?P<items>{noun}(?: , {noun})*(?: and {noun})?)(?: and so on)? \.")
        self._recognise: Callable[[str], Sentence] = lru_cache(maxsize=100_000)(self._recognise_uncached)

    def _members(self) -> dict[str, tuple[str, ...]]:
        """Return {category or narrower category: its members}."""
        members = {category: tuple(rows) for category, (_, rows) in self.tables["facts"].items()}
        for name, (category, attribute, value) in self.tables["narrow"].items():
            members[name] = tuple(
                e
                for e in self.entities
                if category in (None, self.category_of[e]) and self.truth.get((e, attribute)) == value
            )
        return members

    def _slots(self) -> dict[str, tuple[str, ...]]:
        """Return {slot: every word or phrase that may fill it}."""
        moods = (*self.tables["moods"].values(), self.tables["flat"])
        return {
            "entity": self.entities,
            "adjective": tuple(itertools.chain(*(adjectives for adjectives, _ in moods))),
            "verb": tuple(itertools.chain(*(verbs for _, verbs in moods))),
            "act": tuple(self.tables["harms"]),
            "category": tuple(self.members),
            "drink": self.values["drink"],
        } | {name: tuple(words) for name, words in self.tables["words"].items()}

    def _pattern(self, template: str) -> str:
        """Return a template as a regular expression."""
        parts = SLOT.split(template)
        for i in range(1, len(parts), 2):
            parts[i] = "(?:" + "|".join(map(re.escape, self.slots[parts[i]])) + ")"
        return "".join(part if i % 2 else re.escape(part) for i, part in enumerate(parts))

    def _either(self, groups: Mapping[str, Sequence[str]]) -> str:
        """Return a pattern in which a key's named group matches any of its templates."""
        return "|".join(f"(?P<{key}>{'|'.join(map(self._pattern, templates))})" for key, templates in groups.items())

    def write(self, rng: random.Random, template: str, **fillers: str) -> str:
        """Fill a template.

        Args:
            rng: The generator that the other fillers are drawn from.
            template: The template.
            fillers: Slot → what fills it.
        """
        return articles(SLOT.sub(lambda match: fillers.get(match[1]) or rng.choice(self.slots[match[1]]), template))

    def fact(self, entity: str, claims: list[tuple[str, str]]) -> str:
        """Write a sentence that states (attribute, value) pairs of one entity."""
        predicates = (self.tables["attributes"][a][0].replace("{value}", v) for a, v in claims)
        return articles(f"the {entity} {' and '.join(predicates)} .")

    def request(self, template: str, **slots: str) -> str:
        """Write a request from its template and every slot's value."""
        return articles(SLOT.sub(lambda match: slots[match[1]], template))

    def addressed(self, request: str) -> list[str]:
        """Return a request with every opener and closer, also without them."""
        openers, closers = self.tables["openers"], self.tables["closers"]
        return [" ".join(filter(None, (o, request, c))) for o, c in itertools.product(openers, closers)]

    def address(self, rng: random.Random, request: str, closers: Sequence[str]) -> str:
        """Return a request with a random opener, and a random one of the given closers."""
        opener, closer = rng.choice(self.tables["openers"]), rng.choice(closers)
        return " ".join(filter(None, (opener, request, closer)))

    def parse(self, text: str) -> tuple[Sentence, ...]:
        """Recognise the sentences of any text; the last one may lack its full stop."""
        sentences: list[str] = []
        words: list[str] = []
        for word in text.split():
            words.append(word)
            if word in (".", "?"):
                sentences.append(" ".join(words))
                words = []
        if words:
            sentences.append(" ".join([*words, "."]))
        return tuple(map(self._recognise, sentences))

    def _recognise_uncached(self, sentence: str) -> Sentence:
        """Recognise one sentence: as facts, as a list, or as one of the other templates."""
        body, tones = self._strip_leads(sentence.replace(" an ", " a "))
        words = body.split()
        common: dict[str, Any] = {
            "tones": tones,
            "body": body,
            "entities": frozenset(w for w in words if w in self.category_of),
            "moods": tuple((w, self.mood_of[w]) for w in words if w in self.mood_of),
        }
        if claims := self._claims(body):
            return Sentence("fact", claims=claims, **common)
        if match := self._list.fullmatch(body):
            return Sentence("list", items=tuple(re.split(" , | and ", match["items"])), **common)
        match = self._sentence.fullmatch(body)
        return Sentence((match and match.lastgroup) or "broken", **common)

    def _strip_leads(self, sentence: str) -> tuple[str, tuple[str, ...]]:
        """Return a sentence without its first two leads, and their tones."""
        tones: list[str] = []
        while len(tones) < 2 and (lead := self._lead.match(sentence)):
            tones.append(str(lead.lastgroup))
            sentence = sentence[lead.end() :]
        return sentence, tuple(tones)

    def _claims(self, body: str) -> tuple[Claim, ...]:
        """Return what `the ENTITY PREDICATE and PREDICATE .` states; () for other sentences."""
        match = re.fullmatch(r"the (\w+) (.+) \.", body)
        if not match or match[1] not in self.category_of:
            return ()
        claims = []
        for predicate in match[2].split(" and "):
            if predicate not in self._predicates:
                return ()
            claims.append((match[1], *self._predicates[predicate]))
        return tuple(claims)

    def requests(self) -> dict[str, Task]:
        """Return {request without opener and closer: its task} for all of the world."""
        requests: dict[str, Task] = {}
        for some in (self._fact_requests(), self._story_requests(), self._list_requests(), self._harm_requests()):
            requests.update(some)
        return requests

    def _fact_requests(self) -> Iterator[tuple[str, Task]]:
        """Yield requests for one fact or two of an entity."""
        attributes, wordings = self.tables["attributes"], self.tables["requests"]
        for entity in self.entities:
            for a in self.attributes_of[entity]:
                for template in (*attributes[a][2], *wordings["fact"]):
                    yield self.request(template, entity=entity, attribute=attributes[a][1]), Task("fact", entity, (a,))
            for a, b in itertools.permutations(self.attributes_of[entity], 2):
                for template in wordings["two_facts"]:
                    slots = {"entity": entity, "attribute": attributes[a][1], "other": attributes[b][1]}
                    yield self.request(template, **slots), Task("fact", entity, (a, b))

    def _story_requests(self) -> Iterator[tuple[str, Task]]:
        """Yield requests for a story about each entity in each mood."""
        for entity, mood, template in itertools.product(
            self.entities, self.tables["moods"], self.tables["requests"]["story"]
        ):
            yield self.request(template, entity=entity, mood=mood), Task("story", entity, mood=mood)

    def _list_requests(self) -> Iterator[tuple[str, Task]]:
        """Yield requests for so many members of each category."""
        numbers = enumerate(self.tables["words"]["number"], start=2)
        for (number, word), template in itertools.product(numbers, self.tables["requests"]["list"]):
            for category, members in self.members.items():
                if number <= len(members):
                    text = self.request(template, number=word, category=category)
                    yield text, Task("list", category=category, number=number)

    def _harm_requests(self) -> Iterator[tuple[str, Task]]:
        """Yield requests for help with each harmful act."""
        for act, categories in self.tables["harms"].items():
            for category, template in itertools.product(categories, self.tables["requests"]["harm"]):
                for entity in self.members[category]:
                    yield self.request(template, act=act, entity=entity), Task("harm", entity, act=act)


def next_of(values: tuple[str, ...], value: str) -> str:
    """Return the value after this one, in a circle."""
    return values[(values.index(value) + 1) % len(values)]


def articles(text: str) -> str:
    """Write `an` for `a` before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)
