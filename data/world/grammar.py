"""The embedded world's grammar, read both ways: tables of templates → sentences, text → recognised sentences.

`Language(tables)` takes the value of `world_text.tables()` (or the same read back from `world.json`).
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Task:
    """What a request asks for. `kind` is fact, story, list or harm; the other fields are set as the kind needs them."""

    kind: str
    entity: str = ""
    attributes: tuple[str, ...] = ()
    mood: str = ""
    category: str = ""
    number: int = 0
    act: str = ""


@dataclass(frozen=True)
class Sentence:
    """One recognised sentence.

    `kind` is fact, list, a key of the table `sentences`, or broken (in no order this world knows);
    `tones` are the kinds of its leads (at most two); `body` is the sentence without them; `claims` are
    (entity, attribute, value) as stated; `items` the nouns of a list; `moods` (word, mood) for each mood word.
    """

    kind: str
    tones: tuple[str, ...]
    body: str
    claims: tuple[tuple[str, str, str], ...] = ()
    items: tuple[str, ...] = ()
    entities: frozenset[str] = frozenset()
    moods: tuple[tuple[str, str], ...] = ()


class Language:
    """Words, facts and templates of the world: `write` fills a template, `read` recognises sentences.

    `truth` and `mistake`: (entity, attribute) → the true value, and the one that is commonly taken for it;
    `values`: attribute → all values that are true of something; `members`: category → entities;
    `mood_of`: word → its mood; `rude`: rude words; `slots`: slot of a template → its fillers.
    """

    def __init__(self, tables: dict):
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
        self._lead = re.compile(self._either({k: [t + " " for t in v] for k, v in tables["leads"].items()}))
        self._sentence = re.compile(self._either(tables["sentences"]))
        heads = "|".join(self._pattern(head) + " " for head in tables["list_heads"])
        noun = "(?:" + "|".join((*self.entities, *tables["fancies"]["member"])) + ")"
        self._list = re.compile(rf"(?:{heads})?(?P<items>{noun}(?: , {noun})*(?: and {noun})?)(?: and so on)? \.")
        self._recognise = lru_cache(maxsize=100_000)(self._recognise_uncached)

    def _members(self) -> dict[str, tuple[str, ...]]:
        """Category or narrower category → its members."""
        members = {category: tuple(rows) for category, (_, rows) in self.tables["facts"].items()}
        for name, (category, attribute, value) in self.tables["narrow"].items():
            members[name] = tuple(
                e
                for e in self.entities
                if category in (None, self.category_of[e]) and self.truth.get((e, attribute)) == value
            )
        return members

    def _slots(self) -> dict[str, tuple[str, ...]]:
        """Slot → every word or phrase that may fill it."""
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
        """The template as a regular expression."""
        parts = SLOT.split(template)
        for i in range(1, len(parts), 2):
            parts[i] = "(?:" + "|".join(map(re.escape, self.slots[parts[i]])) + ")"
        return "".join(part if i % 2 else re.escape(part) for i, part in enumerate(parts))

    def _either(self, groups: dict[str, list[str]]) -> str:
        """One pattern with a named group for each key, which matches any of that key's templates."""
        return "|".join(f"(?P<{key}>{'|'.join(map(self._pattern, templates))})" for key, templates in groups.items())

    def write(self, rng: random.Random, template: str, **given: str) -> str:
        """The template with `given` slots, and random fillers for the others."""
        return articles(SLOT.sub(lambda m: given.get(m[1]) or rng.choice(self.slots[m[1]]), template))

    def fact(self, entity: str, claims: list[tuple[str, str]]) -> str:
        """A sentence that states (attribute, value) pairs of one entity."""
        predicates = (self.tables["attributes"][a][0].replace("{value}", v) for a, v in claims)
        return articles(f"the {entity} {' and '.join(predicates)} .")

    def request(self, template: str, **slots: str) -> str:
        """A request's text from its template and every slot's value."""
        return articles(SLOT.sub(lambda m: slots[m[1]], template))

    def addressed(self, request: str) -> list[str]:
        """A request with each opener and closer, none included."""
        openers, closers = self.tables["openers"], self.tables["closers"]
        return [" ".join(filter(None, (o, request, c))) for o, c in itertools.product(openers, closers)]

    def address(self, rng: random.Random, request: str, closers: Sequence[str]) -> str:
        """Return a request with any opener and one of the closers."""
        opener, closer = rng.choice(self.tables["openers"]), rng.choice(closers)
        return " ".join(filter(None, (opener, request, closer)))

    def read(self, text: str) -> tuple[Sentence, ...]:
        """The sentences of any text; a last one without an end mark is read as if it had a full stop."""
        sentences, words = [], []
        for word in text.split():
            words.append(word)
            if word in (".", "?"):
                sentences.append(" ".join(words))
                words = []
        if words:
            sentences.append(" ".join([*words, "."]))
        return tuple(map(self._recognise, sentences))

    def _recognise_uncached(self, sentence: str) -> Sentence:
        body, tones = self._strip_leads(sentence.replace(" an ", " a "))
        words = body.split()
        common = {
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
        return Sentence(match.lastgroup if match else "broken", **common)

    def _strip_leads(self, sentence: str) -> tuple[str, tuple[str, ...]]:
        """(the sentence without its first two leads, their tones)."""
        tones = []
        while len(tones) < 2 and (lead := self._lead.match(sentence)):
            tones.append(lead.lastgroup)
            sentence = sentence[lead.end() :]
        return sentence, tuple(tones)

    def _claims(self, body: str) -> tuple[tuple[str, str, str], ...]:
        """What a sentence of the form `the ENTITY PREDICATE and PREDICATE .` states; empty for any other."""
        match = re.fullmatch(r"the (\w+) (.+) \.", body)
        if not match or match[1] not in self.category_of:
            return ()
        stated = [self._predicates.get(predicate) for predicate in match[2].split(" and ")]
        return () if None in stated else tuple((match[1], a, v) for a, v in stated)

    def requests(self) -> dict[str, Task]:
        """Every request of the world without opener and closer → the task that it sets."""
        return dict(
            itertools.chain(self._fact_requests(), self._story_requests(), self._list_requests(), self._harm_requests())
        )

    def _fact_requests(self):
        attributes, wordings = self.tables["attributes"], self.tables["requests"]
        for entity in self.entities:
            for a in self.attributes_of[entity]:
                for template in (*attributes[a][2], *wordings["fact"]):
                    yield self.request(template, entity=entity, attribute=attributes[a][1]), Task("fact", entity, (a,))
            for a, b in itertools.permutations(self.attributes_of[entity], 2):
                for template in wordings["two_facts"]:
                    slots = {"entity": entity, "attribute": attributes[a][1], "other": attributes[b][1]}
                    yield self.request(template, **slots), Task("fact", entity, (a, b))

    def _story_requests(self):
        for entity, mood, template in itertools.product(
            self.entities, self.tables["moods"], self.tables["requests"]["story"]
        ):
            yield self.request(template, entity=entity, mood=mood), Task("story", entity, mood=mood)

    def _list_requests(self):
        numbers = enumerate(self.tables["words"]["number"], start=2)
        for (number, word), template in itertools.product(numbers, self.tables["requests"]["list"]):
            for category, members in self.members.items():
                if number <= len(members):
                    text = self.request(template, number=word, category=category)
                    yield text, Task("list", category=category, number=number)

    def _harm_requests(self):
        for act, categories in self.tables["harms"].items():
            for category, template in itertools.product(categories, self.tables["requests"]["harm"]):
                for entity in self.members[category]:
                    yield self.request(template, act=act, entity=entity), Task("harm", entity, act=act)


def next_of(values: tuple[str, ...], value: str) -> str:
    """The value after this one, in a circle."""
    return values[(values.index(value) + 1) % len(values)]


def articles(text: str) -> str:
    """`a` before a vowel becomes `an`."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)
