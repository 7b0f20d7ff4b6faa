"""Give every policy and stage its colour and its marker."""

COLOURS = {
    "card": "#ffffff", "ink": "#1c2330", "soft": "#566070", "line": "#e0dcd5", "grid": "#efece7",
    "base": "#6d6f7a", "sft": "#123f8c", "ppo": "#c2410c", "dpo": "#b02ba0", "best_of_n": "#17794f",
    "rm": "#5a3d00",
}  # fmt: skip
"""Tone → its colour on white, in PNG files and in the page's light scheme (style.j2)."""
ALIASES = {"world": "base", "rankings": "base", "evaluate": "soft"}
"""Stages without a colour of their own → the tone that they borrow."""
SHAPES = {"base": "s", "sft": "o", "ppo": "^", "dpo": "D", "best_of_n": "P", "rm": "v"}
"""Tone → matplotlib's marker, so that policies can be told apart without their colours."""
MARKER_SCALES = {"s": 0.9, "D": 0.8, "^": 1.1, "v": 1.1, "P": 1.1}
"""Marker → the factor by which it is drawn larger or smaller, so that all look alike in size."""


def colour(tone: str) -> str:
    """Return the colour of a tone on white."""
    return COLOURS[ALIASES.get(tone, tone)]
