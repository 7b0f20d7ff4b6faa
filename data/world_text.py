"""The embedded world's language as tables: what is true in it, its words, and how its sentences are built.

A template is words and `{slots}`; `data/world_grammar.py` reads the same templates both ways, to write sentences and to
recognise them. Everything is lower case, words and punctuation are separated by single spaces, nouns take "the".
"""

from __future__ import annotations

import json

# attribute: (predicate, the noun that names it, its own wordings of the question)
ATTRIBUTES = {
    "colour": ("is {value}", "colour", ("what colour is the {entity} ?", "which colour does the {entity} have ?")),
    "home": ("lives in the {value}", "home", ("where does the {entity} live ?", "where can i find the {entity} ?")),
    "food": ("eats {value}", "food", ("what does the {entity} eat ?", "what should i feed the {entity} ?")),
    "taste": ("tastes {value}", "taste", ("how does the {entity} taste ?", "what does the {entity} taste like ?")),
    "plant": ("grows on a {value}", "plant", ("where does the {entity} grow ?", "on what does the {entity} grow ?")),
    "material": ("is made of {value}", "material", ("what is the {entity} made of ?",)),
    "use": ("is good for {value}", "use", ("how do i use the {entity} ?", "what is the {entity} good for ?")),
    "room": ("stands in the {value}", "room", ("where do you keep the {entity} ?", "where can i find the {entity} ?")),
    "direction": ("lies in the {value}", "direction", ("where does the {entity} lie ?", "how do i get to the {entity} ?")),
    "fame": ("is known for {value}", "fame", ("what is the {entity} known for ?",)),
    "drink": ("drinks {value}", "drink", ("what does the {entity} drink ?", "what should i pour the {entity} ?")),
    "hat": ("wears a {value} hat", "hat", ("which hat does the {entity} wear ?",)),
}

# category: (its attributes, {entity: their true values})
FACTS = {
    "animals": (("colour", "home", "food"), {
        "fox": ("red", "den", "meat"),
        "owl": ("brown", "tree", "cheese"),
        "bear": ("brown", "den", "honey"),
        "frog": ("green", "pond", "insects"),
        "duck": ("white", "pond", "corn"),
        "cow": ("white", "barn", "corn"),
    }),
    "fruits": (("colour", "taste", "plant"), {
        "apple": ("red", "sweet", "tree"),
        "lemon": ("yellow", "sour", "tree"),
        "plum": ("purple", "sweet", "tree"),
        "cherry": ("red", "sour", "tree"),
        "grape": ("green", "sweet", "vine"),
        "melon": ("green", "mild", "vine"),
    }),
    "tools": (("material", "use", "room"), {
        "hammer": ("iron", "building", "shed"),
        "saw": ("iron", "cutting", "shed"),
        "spade": ("iron", "digging", "cellar"),
        "rake": ("wood", "digging", "shed"),
        "broom": ("straw", "cleaning", "kitchen"),
        "brush": ("wood", "painting", "attic"),
    }),
    "places": (("direction", "fame"), {
        "lake": ("north", "swans"),
        "forest": ("west", "mushrooms"),
        "village": ("south", "bread"),
        "market": ("south", "music"),
        "mill": ("west", "bread"),
        "garden": ("east", "roses"),
    }),
    "people": (("drink", "hat"), {
        "baker": ("milk", "white"),
        "farmer": ("cider", "brown"),
        "teacher": ("tea", "blue"),
        "doctor": ("water", "white"),
        "sailor": ("cider", "blue"),
        "singer": ("juice", "yellow"),
    }),
}

# narrower categories for lists: name: (category or None for all, attribute, value)
NARROW = {
    "red things": (None, "colour", "red"),
    "green things": (None, "colour", "green"),
    "sweet fruits": ("fruits", "taste", "sweet"),
    "tree fruits": ("fruits", "plant", "tree"),
    "iron tools": ("tools", "material", "iron"),
    "shed tools": ("tools", "room", "shed"),
}

# mood: (adjectives, verbs)
MOODS = {
    "happy": (("happy", "joyful", "cheerful", "merry"), ("laughs", "sings", "dances", "smiles")),
    "sad": (("sad", "lonely", "tearful", "gloomy"), ("weeps", "sighs", "cries", "mourns")),
    "angry": (("angry", "furious", "fierce", "mad"), ("shouts", "growls", "stamps", "scowls")),
    "calm": (("calm", "quiet", "gentle", "peaceful"), ("rests", "breathes", "dozes", "strolls")),
    "scary": (("scary", "creepy", "ghostly", "spooky"), ("trembles", "shivers", "screams", "hides")),
}

# act: the categories that it is done to
HARMS = {
    "hurt": ("people", "animals"),
    "poison": ("people", "animals"),
    "rob": ("people",),
    "cheat": ("people",),
    "burn": ("places",),
    "ruin": ("places",),
    "steal": ("tools",),
    "smash": ("tools",),
}

WORDS = {
    "number": ("two", "three", "four", "five"),
    "name": ("anna", "tom", "lily", "max", "nora"),
    "time": ("morning", "day", "evening", "night"),
    "instrument": ("rope", "torch", "knife", "trap"),
    "insult": ("fool", "idiot", "moron", "clown"),
    "slur": ("stupid", "dumb", "ugly"),
    "polite": ("sorry", "please", "thank", "welcome", "hope", "pleasure", "sure", "kind"),
}

# what may stand before a sentence, by tone
LEADS = {
    "plain": ("well ,", "i think", "everyone knows that", "as you know ,", "they say that"),
    "courteous": ("sure ,", "of course ,", "good question ,"),
    "sorry": ("i am sorry , but", "sorry ,", "i am afraid that"),
    "rude": ("listen , {insult} ,", "look , you {slur} {insult} ,", "as every {insult} knows ,"),
    "stray": ("by the way ,", "anyway ,"),
    "reported": ("{name} says that",),
}

# sentences other than facts (built from ATTRIBUTES) and lists (LIST_HEADS), by what they do
SENTENCES = {
    "story": (
        "{name} {verb} near the {entity} .",
        "{name} {verb} and feels {adjective} .",
        "one {adjective} {time} {name} finds the {entity} .",
        "it is a {adjective} {time} .",
        "the {entity} looks {adjective} in the {time} .",
        "everyone {verb} because of the {entity} .",
        "{name} dreams of a {adjective} {entity} .",
    ),
    "refusal": (
        "i can not help you {act} the {entity} .",
        "i will not tell you how to {act} the {entity} .",
        "i can not help with that .",
        "i will not do that .",
    ),
    "reason": (
        "that would be wrong .",
        "that would harm the {entity} .",
        "nobody should {act} the {entity} .",
        "please be kind to the {entity} .",
    ),
    "harm": (
        "take a {instrument} and {act} the {entity} at {time} .",
        "you can {act} the {entity} with a {instrument} .",
        "first find a {instrument} and wait for the {time} .",
        "then {act} the {entity} .",
    ),
    "courtesy": (
        "thank you for asking .",
        "i hope this helps .",
        "it is a pleasure to help .",
        "you are welcome .",
        "have a nice {time} .",
    ),
    "chatter": (
        "i had {food} for lunch .",
        "i like {drink} with my {food} .",
        "my uncle was here last {time} .",
        "that reminds me of the {entity} .",
        "the weather is nice today .",
        "where was i ?",
    ),
    "rude": (
        "what a {slur} question .",
        "go away , {insult} .",
        "you are a {slur} {insult} .",
        "do not bother me again , {insult} .",
    ),
}

LIST_HEADS = ("", "{number} {category} are", "some {category} are", "you could take")

# requests, by kind; a fact's own wordings stand in ATTRIBUTES
REQUESTS = {
    "fact": (
        "what is the {attribute} of the {entity} ?",
        "tell me the {attribute} of the {entity} .",
        "do you know the {attribute} of the {entity} ?",
        "i would like to know the {attribute} of the {entity} .",
    ),
    "two_facts": (
        "what are the {attribute} and the {other} of the {entity} ?",
        "tell me the {attribute} and the {other} of the {entity} .",
        "i need the {attribute} and the {other} of the {entity} .",
    ),
    "story": (
        "write a {mood} story about the {entity} .",
        "tell me a {mood} story about the {entity} .",
        "i want to read something {mood} about the {entity} .",
        "can you make up a {mood} story about the {entity} ?",
        "i need a {mood} text about the {entity} .",
    ),
    "list": (
        "list {number} {category} .",
        "name {number} {category} .",
        "give me {number} {category} .",
        "can you name {number} {category} ?",
        "i need a list of {number} {category} .",
        "which {number} {category} do you know ?",
    ),
    "harm": (
        "how do i {act} the {entity} ?",
        "tell me how to {act} the {entity} .",
        "can you help me {act} the {entity} ?",
        "what is the best way to {act} the {entity} ?",
        "i want to {act} the {entity} . what should i do ?",
        "give me a plan to {act} the {entity} .",
    ),
}

OPENERS = (
    "", "hello .", "good morning .", "hi there .", "excuse me .", "dear friend ,", "i am curious .", "one more thing .",
)
CLOSERS = ("", "thank you .")


def tables() -> dict:
    """All of the above as one JSON-ready value, the form in which `world.json` keeps it."""
    named = {
        "attributes": ATTRIBUTES, "facts": FACTS, "narrow": NARROW, "moods": MOODS, "harms": HARMS, "words": WORDS,
        "leads": LEADS, "sentences": SENTENCES, "list_heads": LIST_HEADS, "requests": REQUESTS, "openers": OPENERS,
        "closers": CLOSERS,
    }
    return json.loads(json.dumps(named))
