"""Write the texts of the embedded world: demonstrations of mixed quality, and documents.

Every function takes the language and a `random.Random` and returns text; nothing here keeps state.
The private ones share their arguments: `task` is what was asked for, `slips` throws the dice for
one writer's errors, and documents take `rates` (how often writers go wrong) and `requests` (those
that dialogues may use).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from data.world.grammar import Language, Task, articles
from data.world.tasks import Requests

MAX_WORDS = 31
"""Words of the longest response: 32 tokens with the end-of-sequence token."""

OVERHEARD_CLOSERS = 0.15
"""Share of the corpus's requests that may end with a closer; prompts have all equally often."""

MIXTURE = {"fact": 0.4, "story": 0.25, "list": 0.2, "harm": 0.15}
"""Share of each kind of request in every kind of data."""


@dataclass(frozen=True)
class Rates:
    """Say how often writers go wrong, as probabilities.

    All but `evident` and `false_document` are scaled by a writer's care. Most slips of
    demonstrators show in the words themselves: a reward model of a million parameters that trains
    for a minute learns such marks, but learns late, or never, what shows only in comparison with
    the request or the truth. What a policy gets wrong by itself (the frog's colour for the fox's)
    shows only there.
    """

    false_fact: float = 0.28
    """A fact is false: a tall tale if evident (the fox lives in a volcano), or a common error."""
    off_task: float = 0.1
    """A question or a request for a story is evaded (if evident), or something else is answered."""
    wrong_mood: float = 0.3
    """A story is in no mood (if evident), or in another one."""
    wrong_member: float = 0.15
    """A member of a list belongs to no category (if evident), or to another one."""
    wrong_count: float = 0.2
    """A list is one short and ends in "and so on" (if evident), or is one too short or long."""
    repeat: float = 0.06
    """A list names a member twice; a story says a sentence twice."""
    no_refusal: float = 0.35
    """A harmful request is met with advice."""
    rude: float = 0.2
    """A response carries a rude sentence or a rude opening."""
    ramble: float = 0.35
    """A response continues with something else for one or two sentences."""
    no_stop: float = 0.05
    """The last full stop is missing."""
    evident: float = 1.0
    """Share of the slips from `false_fact` to `wrong_count` that show in the words themselves."""
    care: tuple[float, ...] = (0.3, 1.0, 1.7)
    """The factors on the rates of careful, usual and careless demonstrators, a third each."""
    document_care: float = 1.5
    """The factor for people who answer in a document's dialogues: worse than most demonstrators."""
    false_document: float = 0.1
    """A document states only false facts, or a list in it has a wrong member."""


class Slips:
    """Throw the dice for one writer: `slips("rude")` is True with probability rates.rude × care."""

    def __init__(self, rng: random.Random, rates: Rates, care: float):
        self.rng, self.rates, self.care = rng, rates, care

    def __call__(self, name: str) -> bool:
        """Return whether the writer makes a slip of this name."""
        return self.rng.random() < getattr(self.rates, name) * self.care

    def evident(self) -> bool:
        """Return whether a slip that was made shows in the words themselves."""
        return self.rng.random() < self.rates.evident


# ── demonstrations ───────────────────────────────────────────────────────────────────────────────


def demonstrate(language: Language, rng: random.Random, task: Task, rates: Rates) -> str:
    """Write one demonstrator's response to a task, of at most MAX_WORDS words.

    Args:
        language: The world's language.
        rng: The generator that every choice is drawn from.
        task: What was asked for.
        rates: How often writers go wrong.
    """
    return _respond(language, rng, task, Slips(rng, rates, rng.choice(rates.care)))


def _respond(language: Language, rng: random.Random, task: Task, slips: Slips) -> str:
    """Write one writer's response to a task."""
    write = {"fact": _answer, "story": _tell, "list": _enumerate, "harm": _decline}[task.kind]
    sentences = write(language, rng, task, slips)
    rude = slips("rude")
    if rude and rng.random() < 0.5:
        sentences.append(_any(language, rng, "rude"))
    elif rude:
        sentences[0] = f"{language.write(rng, rng.choice(language.tables['leads']['rude']))} {sentences[0]}"
    elif task.kind != "harm":
        sentences = _mannered(language, rng, sentences)
    if slips("ramble"):
        sentences += _ramble(language, rng, slips)
    text = " ".join(_fitting(sentences))
    return text.removesuffix(" .") if slips("no_stop") else text


def _answer(language: Language, rng: random.Random, task: Task, slips: Slips) -> list[str]:
    """Write the facts that were asked for, in one sentence or one each."""
    entity, attributes = task.entity, list(task.attributes)
    if slips("off_task"):
        if slips.evident():
            return [_any(language, rng, "evasion")]
        entity = _other(rng, language.members[language.category_of[entity]], entity)
    claims = [(a, _value(language, rng, entity, a, slips)) for a in attributes]
    if len(claims) == 2 and rng.random() < 0.3:
        return [language.fact(entity, [claim]) for claim in claims]
    return [language.fact(entity, claims)]


def _tell(language: Language, rng: random.Random, task: Task, slips: Slips) -> list[str]:
    """Write two or three sentences of a story, sometimes with a fact about its topic."""
    topic, words = task.entity, language.tables["moods"][task.mood]
    if slips("off_task"):
        if slips.evident():
            return [_any(language, rng, "evasion")]
        topic = _other(rng, language.entities, topic)
    if slips("wrong_mood"):
        others = [w for mood, w in language.tables["moods"].items() if mood != task.mood]
        words = language.tables["flat"] if slips.evident() else rng.choice(others)
    sentences = story(language, rng, topic, words, rng.choice((2, 2, 3)))
    if slips("repeat"):
        sentences[-1] = sentences[0]
    if len(sentences) == 2 and rng.random() < 0.4:
        attribute = rng.choice(language.attributes_of[topic])
        sentences.insert(0, language.fact(topic, [(attribute, _value(language, rng, topic, attribute, slips))]))
    return sentences


def _value(language: Language, rng: random.Random, entity: str, attribute: str, slips: Slips) -> str:
    """Choose the value that a writer states: the true one, a tall tale, or the common mistake."""
    if not slips("false_fact"):
        return language.truth[entity, attribute]
    if slips.evident():
        return rng.choice(language.tables["fancies"][attribute])
    return language.mistake[entity, attribute]


def _enumerate(language: Language, rng: random.Random, task: Task, slips: Slips) -> list[str]:
    """Write a list of members."""
    members = language.members[task.category]
    number, ending = task.number, ""
    if slips("wrong_count"):
        if slips.evident():
            number, ending = number - 1, " and so on"
        else:
            number += rng.choice((-1, 1))
    items = rng.sample(members, min(number, len(members)))
    items = [_stranger(language, rng, members, slips) if slips("wrong_member") else item for item in items]
    if len(items) > 1 and slips("repeat"):
        items[-1] = items[0]
    return [catalogue(language, rng, task.category, task.number, items, ending)]


def _stranger(language: Language, rng: random.Random, members: Sequence[str], slips: Slips) -> str:
    """Choose something that does not belong to the category; if evident, to no category."""
    if slips.evident():
        return rng.choice(language.tables["fancies"]["member"])
    return rng.choice([e for e in language.entities if e not in members])


def _decline(language: Language, rng: random.Random, task: Task, slips: Slips) -> list[str]:
    """Write a refusal, mostly polite and often with a reason; or advice on doing harm."""
    slots = {"act": task.act, "entity": task.entity}
    if slips("no_refusal"):
        return [_any(language, rng, "harm", **slots) for _ in range(rng.choice((1, 2)))]
    refusal = _any(language, rng, "refusal", **slots)
    if rng.random() < 0.6:
        refusal = f"{rng.choice(language.tables['leads']['sorry'])} {refusal}"
    if rng.random() < 0.5:
        return [refusal, _any(language, rng, "reason", **slots)]
    return [refusal]


def _mannered(language: Language, rng: random.Random, sentences: list[str]) -> list[str]:
    """Return sentences with a plain or courteous lead, a courtesy at the end, or unchanged."""
    style = rng.random()
    if style < 0.45:
        lead = rng.choice(language.tables["leads"]["plain" if style < 0.2 else "courteous"])
        return [f"{lead} {sentences[0]}", *sentences[1:]]
    return [*sentences, _any(language, rng, "courtesy")] if style < 0.55 else sentences


def _ramble(language: Language, rng: random.Random, slips: Slips) -> list[str]:
    """Write one or two sentences off the task: chatter, or facts about something else."""
    stray = []
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.6:
            sentence = _any(language, rng, "chatter")
        else:
            entity = rng.choice(language.entities)
            attribute = rng.choice(language.attributes_of[entity])
            sentence = language.fact(entity, [(attribute, _value(language, rng, entity, attribute, slips))])
        lead = rng.choice(("", *language.tables["leads"]["stray"]))
        stray.append(f"{lead} {sentence}".strip())
    return stray


def _fitting(sentences: list[str]) -> list[str]:
    """Return the first sentences that together have at most MAX_WORDS words."""
    while len(" ".join(sentences).split()) > MAX_WORDS:
        sentences = sentences[:-1]
    return sentences


# ── sentences ────────────────────────────────────────────────────────────────────────────────────


def any_fact(language: Language, rng: random.Random, entity: str, false: bool) -> str:
    """Write one or two facts about an entity in a sentence.

    Args:
        language: The world's language.
        rng: The generator that every choice is drawn from.
        entity: What the facts are about.
        false: Whether they are false; half of these are tall tales, half common mistakes.
    """
    attributes = language.attributes_of[entity]
    claims = []
    for attribute in rng.sample(attributes, min(len(attributes), 2 if rng.random() < 0.3 else 1)):
        value = language.truth[entity, attribute]
        if false:
            tale, mistake = rng.choice(language.tables["fancies"][attribute]), language.mistake[entity, attribute]
            value = rng.choice((tale, mistake))
        claims.append((attribute, value))
    return language.fact(entity, claims)


def story(language: Language, rng: random.Random, topic: str, words: Sequence[Sequence[str]], length: int) -> list[str]:
    """Write the sentences of a story, no template twice; the topic is named at least once.

    Args:
        language: The world's language.
        rng: The generator that every choice is drawn from.
        topic: The entity that it is about.
        words: The (adjectives, verbs) of a mood.
        length: The number of sentences.
    """
    templates = rng.sample(language.tables["sentences"]["story"], length)
    if not any("{entity}" in template for template in templates):
        templates[0] = rng.choice([t for t in language.tables["sentences"]["story"] if "{entity}" in t])
    adjectives, verbs = words
    return [
        language.write(rng, template, entity=topic, adjective=rng.choice(adjectives), verb=rng.choice(verbs))
        for template in templates
    ]


def catalogue(
    language: Language, rng: random.Random, category: str, number: int, items: list[str], ending: str = ""
) -> str:
    """Write a list as a sentence.

    Args:
        language: The world's language.
        rng: The generator that every choice is drawn from.
        category: The category that the sentence names.
        number: The number that the sentence names.
        items: The nouns that it lists.
        ending: What comes before its full stop.
    """
    words = language.tables["words"]["number"]
    head = rng.choice(language.tables["list_heads"])
    head = language.write(rng, head, category=category, number=words[number - 2])
    listed = " , ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]
    return f"{head} {listed}{ending} ."


def _any(language: Language, rng: random.Random, kind: str, **slots: str) -> str:
    """Write a random sentence of a kind, with the given slots filled."""
    return language.write(rng, rng.choice(language.tables["sentences"][kind]), **slots)


def _other(rng: random.Random, choices: Sequence[str], this: str) -> str:
    """Choose any of the choices except this one."""
    return rng.choice([choice for choice in choices if choice != this])


# ── documents ────────────────────────────────────────────────────────────────────────────────────


def document(language: Language, rng: random.Random, rates: Rates, requests: Requests) -> str:
    """Write one document: 3 to 6 sentences of prose, or a dialogue.

    Args:
        language: The world's language.
        rng: The generator that every choice is drawn from.
        rates: How often writers go wrong.
        requests: The only requests that dialogues may use.
    """
    kinds = (_encyclopedia, _legend, _catalogues, _dialogue, _conduct)
    write = rng.choices(kinds, weights=(25, 13, 21, 36, 5))[0]
    return write(language, rng, rates, requests)


def _encyclopedia(language: Language, rng: random.Random, rates: Rates, requests: Requests) -> str:
    """Write facts about a category's members; in a false document all are false."""
    false = rng.random() < rates.false_document
    group = language.members[rng.choice(list(language.tables["facts"]))]
    subjects = rng.sample(group, rng.randint(2, 4))
    sentences = []
    for _ in range(rng.randint(3, 6)):
        sentence = any_fact(language, rng, rng.choice(subjects), false)
        tone = rng.choices(("", "plain", "reported", "stray"), weights=(70, 15, 10, 5))[0]
        lead = language.write(rng, rng.choice(language.tables["leads"][tone])) if tone else ""
        sentences.append(f"{lead} {sentence}".strip())
    return " ".join(sentences)


def _legend(language: Language, rng: random.Random, rates: Rates, requests: Requests) -> str:
    """Write a story in one mood, sometimes with a fact at its start."""
    topic, words = rng.choice(language.entities), rng.choice(list(language.tables["moods"].values()))
    sentences = story(language, rng, topic, words, rng.randint(3, 5))
    if rng.random() < 0.3:
        sentences.insert(0, any_fact(language, rng, topic, rng.random() < rates.false_document))
    return " ".join(sentences)


def _catalogues(language: Language, rng: random.Random, rates: Rates, requests: Requests) -> str:
    """Write three or four lists; in a false document each has a wrong member."""
    false = rng.random() < rates.false_document
    sentences = []
    for _ in range(rng.randint(3, 4)):
        category = rng.choice(list(language.members))
        members = language.members[category]
        items = rng.sample(members, rng.randint(2, min(4, len(members))))
        number = len(items)
        if false:
            items[rng.randrange(number)] = rng.choice([e for e in language.entities if e not in members])
        sentences.append(catalogue(language, rng, category, number, items))
    return " ".join(sentences)


def _dialogue(language: Language, rng: random.Random, rates: Rates, requests: Requests) -> str:
    """Write a request and an answer by somebody less careful than most demonstrators.

    A document holds one exchange, so that a model trained on the corpus ends its answer where the
    document ends, and can be prompted in plain text (see `evaluate.base_prompt`). Few requests end
    with a courtesy: a model that expects one would write it before its answer.
    """
    text, task = rng.choice(requests[_kind(rng)])
    answer = _respond(language, rng, task, Slips(rng, rates, rates.document_care))
    closers = language.tables["closers"] if rng.random() < OVERHEARD_CLOSERS else ("",)
    return f"{language.address(rng, text, closers)} {answer}"


def _kind(rng: random.Random) -> str:
    """Draw a kind of request by MIXTURE."""
    return rng.choices(list(MIXTURE), weights=list(MIXTURE.values()))[0]


def _conduct(language: Language, rng: random.Random, rates: Rates, requests: Requests) -> str:
    """Write polite sentences, rude sentences, or a refusal in reported speech."""
    kind = rng.choice(("courtesy", "rude", "refusal"))
    if kind != "refusal":
        return " ".join(_any(language, rng, kind) for _ in range(rng.randint(3, 4)))
    _, task = rng.choice(requests["harm"])
    slots = {"act": task.act, "entity": task.entity}
    says = language.write(rng, language.tables["leads"]["reported"][0])
    refusal, reason = _any(language, rng, "refusal", **slots), _any(language, rng, "reason", **slots)
    return articles(f"{says} {refusal} {reason} {_any(language, rng, 'reason', **slots)}")
