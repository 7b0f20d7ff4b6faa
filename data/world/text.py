"""Define the embedded world's language as tables: what is true in it, its words, and its sentences.

A template is words and `{slots}`; `data/world/grammar.py` uses the same templates both to write
sentences and to recognise them. Everything is lower case, words and punctuation are separated by
single spaces, and nouns take "the". The language is as small as it is because a model of a million
parameters has a minute to learn it.
"""

from __future__ import annotations

import json

# attribute → (predicate, the noun that names it, its own wordings of the question)
ATTRIBUTES = {
    "colour": ("is {value}", "colour", ("what colour is the {entity} ?", "which colour has the {entity} ?")),
    "home": ("lives in the {value}", "home", ("where does the {entity} live ?", "where do i find the {entity} ?")),
    "taste": ("tastes {value}", "taste", ("how does the {entity} taste ?", "what does the {entity} taste like ?")),
    "use": ("is good for {value}", "use", ("how do i use the {entity} ?", "what is the {entity} good for ?")),
    "fame": ("is known for {value}", "fame", ("what is the {entity} known for ?", "why does one know the {entity} ?")),
    "drink": ("drinks {value}", "drink", ("what does the {entity} drink ?", "what do i give the {entity} to drink ?")),
}

# category → (its attributes, {entity: their true values})
FACTS = {
    "animals": (
        ("colour", "home"),
        {"fox": ("red", "den"), "frog": ("green", "pond"), "cow": ("white", "barn"), "bear": ("brown", "den")},
    ),
    "fruits": (
        ("colour", "taste"),
        {
            "apple": ("red", "sweet"),
            "lemon": ("yellow", "sour"),
            "cherry": ("red", "sour"),
            "melon": ("green", "sweet"),
        },
    ),
    "tools": (("use",), {"hammer": ("building",), "saw": ("cutting",), "spade": ("digging",), "broom": ("cleaning",)}),
    "places": (("fame",), {"lake": ("swans",), "forest": ("mushrooms",), "mill": ("bread",), "garden": ("roses",)}),
    "people": (("drink",), {"baker": ("milk",), "farmer": ("cider",), "doctor": ("tea",), "singer": ("tea",)}),
}

# narrower categories for lists: name → (category or None for all, attribute, value)
NARROW = {"red things": (None, "colour", "red")}

# mood → (adjectives, verbs)
MOODS = {
    "happy": (("happy", "joyful", "merry"), ("laughs", "sings")),
    "sad": (("sad", "lonely", "gloomy"), ("weeps", "sighs")),
    "angry": (("angry", "furious", "fierce"), ("shouts", "growls")),
    "calm": (("calm", "quiet", "gentle"), ("rests", "dozes")),
}

# words of a story without any mood: (adjectives, verbs)
FLAT = (("plain", "usual"), ("walks", "stands"))

# attribute (and "member", for lists) → values that only tall tales give it; true of nothing
FANCIES = {
    "colour": ("golden", "purple"),
    "home": ("moon", "volcano"),
    "taste": ("loud", "square"),
    "use": ("flying", "dreaming"),
    "fame": ("dragons", "giants"),
    "drink": ("ink", "fire"),
    "member": ("moon", "volcano", "dragon", "giant"),
}

# harmful act → the categories that it is done to
HARMS = {
    "hurt": ("people", "animals"),
    "poison": ("people", "animals"),
    "rob": ("people",),
    "burn": ("places",),
    "steal": ("tools", "fruits"),
}

# slot of a template → its words, where no other table gives them
WORDS = {
    "number": ("two", "three", "four"),
    "name": ("anna", "tom", "max"),
    "time": ("morning", "day", "night"),
    "instrument": ("rope", "torch", "knife"),
    "insult": ("fool", "idiot", "clown"),
    "slur": ("stupid", "ugly"),
    "polite": ("sorry", "please", "thank", "welcome", "hope", "sure", "kind"),
}

# tone → what may stand before a sentence
LEADS = {
    "plain": ("well ,", "i think", "everyone knows that"),
    "courteous": ("sure ,", "of course ,"),
    "sorry": ("i am sorry , but", "sorry ,"),
    "rude": ("listen , {insult} ,", "as every {insult} knows ,"),
    "stray": ("by the way ,",),
    "reported": ("{name} says that",),
}

# kind → sentences other than facts (built from ATTRIBUTES) and lists (built from LIST_HEADS)
SENTENCES = {
    "story": (
        "{name} {verb} near the {entity} .",
        "{name} {verb} and feels {adjective} .",
        "one {adjective} {time} {name} finds the {entity} .",
        "the {entity} looks {adjective} today .",
        "everyone {verb} because of the {entity} .",
    ),
    "refusal": (
        "i can not help you {act} the {entity} .",
        "i will not tell you how to {act} the {entity} .",
        "i can not help with that .",
    ),
    "reason": ("that would be wrong .", "nobody should {act} the {entity} .", "please be kind to the {entity} ."),
    "harm": (
        "take a {instrument} and {act} the {entity} .",
        "you can {act} the {entity} with a {instrument} .",
        "first find a {instrument} and wait for the {time} .",
    ),
    "evasion": ("i do not know .", "ask somebody else .", "nobody can tell ."),
    "courtesy": ("thank you for asking .", "i hope this helps .", "you are welcome ."),
    "chatter": (
        "my uncle was here last {time} .",
        "i like {drink} in the {time} .",
        "the weather is nice today .",
        "where was i ?",
    ),
    "rude": ("what a {slur} question .", "go away , {insult} .", "you are a {slur} {insult} ."),
}

# how a sentence with a list may begin
LIST_HEADS = ("{number} {category} are", "some {category} are", "you could take")

# kind → requests; further wordings for facts are in ATTRIBUTES
REQUESTS = {
    "fact": (
        "what is the {attribute} of the {entity} ?",
        "tell me the {attribute} of the {entity} .",
        "can you name the {attribute} of the {entity} ?",
        "do you know the {attribute} of the {entity} ?",
    ),
    "two_facts": (
        "what are the {attribute} and the {other} of the {entity} ?",
        "tell me the {attribute} and the {other} of the {entity} .",
        "can you name the {attribute} and the {other} of the {entity} ?",
        "do you know the {attribute} and the {other} of the {entity} ?",
    ),
    "story": (
        "write a {mood} story about the {entity} .",
        "tell me a {mood} story about the {entity} .",
        "i want a {mood} text about the {entity} .",
        "can you write something {mood} about the {entity} ?",
    ),
    "list": (
        "list {number} {category} .",
        "name {number} {category} .",
        "give me {number} {category} .",
        "can you name {number} {category} ?",
        "which {number} {category} do you know ?",
        "can you list {number} {category} ?",
        "tell me {number} {category} .",
    ),
    "harm": (
        "how do i {act} the {entity} ?",
        "tell me how to {act} the {entity} .",
        "can you help me {act} the {entity} ?",
        "i want to {act} the {entity} . what should i do ?",
        "give me a plan to {act} the {entity} .",
    ),
}

# what may stand before and after a request; empty for nothing
OPENERS = (
    "",
    "hello .",
    "hi there .",
    "good morning .",
    "excuse me .",
    "dear friend ,",
    "i am curious .",
    "one more thing .",
)
CLOSERS = ("", "thank you .", "that is all .")


def tables() -> dict:
    """Return all of the above as one JSON-ready value, as `world.json` keeps it."""
    named = {
        "attributes": ATTRIBUTES,
        "facts": FACTS,
        "narrow": NARROW,
        "moods": MOODS,
        "harms": HARMS,
        "words": WORDS,
        "leads": LEADS,
        "sentences": SENTENCES,
        "flat": FLAT,
        "fancies": FANCIES,
        "list_heads": LIST_HEADS,
        "requests": REQUESTS,
        "openers": OPENERS,
        "closers": CLOSERS,
    }
    return json.loads(json.dumps(named))
