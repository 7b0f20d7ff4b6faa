"""Give every policy and stage its colour and its marker."""

COLOURS = {
    "card": "#ffffff", "ink": "#1c2330", "soft": "#566070", "line": "#e0dcd5", "grid": "#efece7",
    "base": "#6d6f7a", "sft": "#123f8c", "ppo": "#c2410c", "dpo": "#b02ba0", "best_of_n": "#17794f",
    "rm": "#5a3d00",
    "run1": "#1f5ac4", "run2": "#c2500a", "run3": "#0f7a5a", "run4": "#9a2f8f",
    "run5": "#7a5d00", "run6": "#b3261e", "run7": "#4a5568", "run8": "#0b7285",
}  # fmt: skip
"""Tone → its colour on white, in PNG files and in the page's light scheme (style.j2).

`run1` and so on are experiments on the page that compares several (compare_style.j2)."""
RUNS = 8
"""How many experiments have a colour of their own; further ones repeat them."""
ALIASES = {"world": "base", "rankings": "base", "evaluate": "soft"}
"""Stages without a colour of their own → the tone that they borrow."""
SHAPES = {
    "base": "s",
    "sft": "o",
    "ppo": "^",
    "dpo": "D",
    "best_of_n": "P",
    "rm": "v",
    "run1": "o",
    "run2": "^",
    "run3": "s",
    "run4": "D",
    "run5": "v",
    "run6": "P",
    "run7": "o",
    "run8": "s",
}
"""Tone → matplotlib's marker, so that policies can be told apart without their colours."""
MARKER_SCALES = {"s": 0.9, "D": 0.8, "^": 1.1, "v": 1.1, "P": 1.1}
"""Marker → the factor by which it is drawn larger or smaller, so that all look alike in size."""


def colour(tone: str) -> str:
    """Return the colour of a tone on white."""
    return COLOURS[ALIASES.get(tone, tone)]
