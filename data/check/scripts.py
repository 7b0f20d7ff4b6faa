"""Count the words and characters of texts, and name the scripts they are written in."""

import re
from collections import Counter

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana, Chinese
    "\U00020000-\U0003ffff]"
)
"""A character of a script that writes no blanks between words."""
MANY = 0.2
"""Share of such characters from which lengths are counted in characters."""
SCRIPTS = {
    "Latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Cyrillic": "\u0400-\u052f",
    "Armenian": "\u0530-\u058f",
    "Hebrew": "\u0590-\u05ff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufeff",
    "Devanagari": "\u0900-\u097f",
    "Bengali": "\u0980-\u09ff",
    "Gurmukhi": "\u0a00-\u0a7f",
    "Gujarati": "\u0a80-\u0aff",
    "Tamil": "\u0b80-\u0bff",
    "Telugu": "\u0c00-\u0c7f",
    "Kannada": "\u0c80-\u0cff",
    "Malayalam": "\u0d00-\u0d7f",
    "Sinhala": "\u0d80-\u0dff",
    "Thai": "\u0e00-\u0e7f",
    "Lao": "\u0e80-\u0eff",
    "Tibetan": "\u0f00-\u0fff",
    "Burmese": "\u1000-\u109f",
    "Georgian": "\u10a0-\u10ff\u1c90-\u1cbf",
    "Ethiopic": "\u1200-\u139f",
    "Khmer": "\u1780-\u17ff",
    "Mongolian": "\u1800-\u18af",
    "Japanese (kana)": "\u3040-\u30ff\u31f0-\u31ff",
    "Korean (hangul)": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "Chinese (han)": "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "Emoji": "\u2600-\u27bf\U0001f300-\U0001faff",
}
"""Script → its characters, as in a regular expression."""
PATTERNS = {name: re.compile(f"[{ranges}]+") for name, ranges in SCRIPTS.items()}
ASCII_LETTERS = re.compile("[A-Za-z]+")


def unspaced_characters(text: str) -> int:
    """Return the number of characters of scripts that write no blanks between words."""
    return 0 if text.isascii() else sum(1 for _ in UNSPACED.finditer(text))


def counts_characters(unspaced: int, characters: int) -> bool:
    """Return whether lengths are to be counted in characters, as words cannot be told.

    Args:
        unspaced: Characters of scripts without blanks between words.
        characters: All characters.
    """
    return unspaced > MANY * characters


def scripts_of(text: str) -> Counter[str]:
    """Return {script: the number of its characters in a text}."""
    if text.isascii():
        letters = sum(len(run) for run in ASCII_LETTERS.findall(text))
        return Counter({"Latin": letters} if letters else {})
    counts = {name: sum(len(run) for run in pattern.findall(text)) for name, pattern in PATTERNS.items()}
    return Counter({name: count for name, count in counts.items() if count})
