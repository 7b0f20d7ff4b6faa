"""Count and find words: text → words, sentences, occurrences, repeated n-grams."""

import re
import unicodedata
from collections.abc import Hashable, Sequence

ABBREVIATIONS = frozenset(
    ["dr", "e.g", "etc", "i.e", "jr", "mr", "mrs", "ms", "no", "prof", "sr", "st", "vs", "a.m", "p.m", "ph.d", "u.s"]
)
"""Words, in small letters, whose full stop ends no sentence."""
ENDS = r"[.!?…]+[\"'”’)\]*]*(?=\s|$)|[。！？]+[”’」』]*"  # the last of Chinese and Japanese
"""What ends a sentence, with the quotation marks and brackets that close after it."""


def words_of(text: str) -> list[str]:
    """Return the words of a text: runs of letters, digits and underscores, as IFEval counts."""
    return re.findall(r"\w+", text)


def sentence_count(text: str) -> int:
    """Count the sentences of a text; what follows the last full stop is one too.

    A full stop after a usual abbreviation or an initial ends none.
    """
    count, start = 0, 0
    for end in re.finditer(ENDS, text):
        before = text[start : end.start()].split()
        last = before[-1].lstrip("\"'“‘(").lower() if before else ""
        is_short = last in ABBREVIATIONS or (len(last) == 1 and last.isalpha() and last != "i")
        if end.group() == "." and is_short and text[end.end() :].strip():
            continue  # "Dr. Ada", "J. Doe"
        count += bool(before)
        start = end.end()
    return count + bool(words_of(text[start:]))


def occurrences(term: str, text: str) -> int:
    """Count how often a word or phrase stands in a text as whole words, whatever its case.

    Where a script has no spaces between words (Chinese, Japanese), it is found inside others too.

    Args:
        term: The word or phrase.
        text: The text.
    """
    left = r"(?<!\w)" if has_word_edge(term[0]) else ""
    right = r"(?!\w)" if has_word_edge(term[-1]) else ""
    return len(re.findall(left + re.escape(term) + right, text, flags=re.IGNORECASE))


def has_word_edge(character: str) -> bool:
    """Return whether a character is of a word that spaces or punctuation part from the next."""
    is_wide = unicodedata.east_asian_width(character) in ("W", "F")
    return re.match(r"\w", character) is not None and not is_wide


def listed_score(terms: Sequence[str], text: str, score: str) -> float:
    """Return a score for which of some words and phrases occur in a text.

    Args:
        terms: The words and phrases.
        text: The text.
        score: "absent" (1 if none occurs), "any" (1 if one does), "share" (of them), "penalty"
            (minus the number of occurrences).
    """
    counts = [occurrences(term, text) for term in terms]
    found = sum(count > 0 for count in counts)
    scores = {
        "absent": float(found == 0),
        "any": float(found > 0),
        "share": found / len(terms),
        "penalty": -float(sum(counts)),
    }
    return scores[score]


def repeated_share(items: Sequence[Hashable], n: int) -> float:
    """Return the share of n-grams that repeat an earlier one, in [0, 1); 0 if there is none.

    Args:
        items: Words or token ids.
        n: The length of an n-gram.
    """
    grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def range_score(count: int, at_least: int | None, at_most: int | None, tolerance: int | None) -> float:
    """Return 1 for a count inside a range, and less outside.

    Args:
        count: The count.
        at_least: The lower end; None: there is none.
        at_most: The upper end; None: there is none.
        tolerance: How far outside the score has fallen to 0; None: it is 0 at once.
    """
    below = max(0, at_least - count) if at_least is not None else 0
    above = max(0, count - at_most) if at_most is not None else 0
    outside = below + above
    if tolerance is None:
        return float(outside == 0)
    return max(0.0, 1 - outside / tolerance)
