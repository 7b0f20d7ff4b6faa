"""Check whether a text follows an instruction, in IFEval's way: (text, constraint) → yes or no.

The ids and arguments of IFEval's data are read in stages/settings/scorers/constraints.py. Two
things are other than in Google's code: no language is detected, so "in English" is not checked; and
sentences and words in capitals are split without NLTK.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stages.scorers.rules.formats import is_json
from stages.scorers.rules.words import occurrences, sentence_count, words_of
from stages.settings.scorers.constraints import Constraint

CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""The answers of `detectable_format:constrained_response`, one of which has to occur."""
QUOTES = "\"'"


def is_followed(text: str, constraint: Constraint) -> bool:
    """Return whether a text does what a constraint says. An empty text follows none."""
    return bool(text.strip()) and CHECKS[constraint.name](text, constraint.value)


def share_followed(text: str, constraints: Sequence[Constraint]) -> tuple[float, dict[str, float]]:
    """Return the share of constraints that a text follows, and that of each name.

    Args:
        text: The text.
        constraints: At least one. Several with one name share a part.
    """
    followed: dict[str, list[bool]] = {}
    for constraint in constraints:
        followed.setdefault(constraint.name, []).append(is_followed(text, constraint))
    every = [one for of_name in followed.values() for one in of_name]
    return sum(every) / len(every), {name: sum(one) / len(one) for name, one in followed.items()}


# ── letters and words ────────────────────────────────────────────────────────────────────────────


def is_lower(text: str, _: Any) -> bool:
    """Return whether there are letters, and none is a capital."""
    return text.islower()


def is_upper(text: str, _: Any) -> bool:
    """Return whether there are letters, and all are capitals."""
    return text.isupper()


def has_no_comma(text: str, _: Any) -> bool:
    """Return whether there is no comma."""
    return "," not in text


def contains(text: str, terms: Sequence[str]) -> bool:
    """Return whether all terms occur, inside of words too, whatever their case."""
    return all(term.lower() in text.lower() for term in terms)


def forbids(text: str, terms: Sequence[str]) -> bool:
    """Return whether no term occurs as whole words."""
    return not any(occurrences(term, text) for term in terms)


def in_relation(count: int, is_less: bool, limit: int) -> bool:
    """Return whether a count is less than a limit, or at least it."""
    return count < limit if is_less else count >= limit


def keyword_frequency(text: str, value: tuple[str, bool, int]) -> bool:
    """Return whether a keyword occurs less often than, or at least, so many times."""
    keyword, is_less, limit = value
    return in_relation(text.lower().count(keyword.lower()), is_less, limit)


def letter_frequency(text: str, value: tuple[str, bool, int]) -> bool:
    """Return whether a letter occurs less often than, or at least, so many times."""
    letter, is_less, limit = value
    return in_relation(text.lower().count(letter.lower()), is_less, limit)


def capital_words(text: str, value: tuple[bool, int]) -> bool:
    """Return whether fewer than, or at least, so many words are in capitals."""
    is_less, limit = value
    return in_relation(sum(word.isupper() for word in re.findall(r"[\w'’.-]*\w", text)), is_less, limit)


# ── lengths ──────────────────────────────────────────────────────────────────────────────────────


def at_least_words(text: str, limit: int) -> bool:
    """Return whether there are so many words or more."""
    return len(words_of(text)) >= limit


def at_most_words(text: str, limit: int) -> bool:
    """Return whether there are so many words or fewer."""
    return len(words_of(text)) <= limit


def at_least_sentences(text: str, limit: int) -> bool:
    """Return whether there are so many sentences or more."""
    return sentence_count(text) >= limit


def at_most_sentences(text: str, limit: int) -> bool:
    """Return whether there are so many sentences or fewer."""
    return sentence_count(text) <= limit


def has_paragraphs(text: str, number: int) -> bool:
    """Return whether there are so many paragraphs, with blank lines between them."""
    return len([one for one in re.split(r"\n\s*\n", text) if one.strip()]) == number


def has_divided_paragraphs(text: str, number: int) -> bool:
    """Return whether there are so many paragraphs, with lines of three asterisks between them."""
    parts = [one.strip() for one in re.split(r"\s?\*\*\*\s?", text)]
    if any(not one for one in parts[1:-1]):
        return False
    return len([one for one in parts if one]) == number


def paragraph_first_word(text: str, value: tuple[int, int, str]) -> bool:
    """Return whether there are so many paragraphs, and the nth begins with a word."""
    number, nth, first = value
    paragraphs = text.split("\n\n")
    if len([one for one in paragraphs if one.strip()]) != number or not paragraphs[nth - 1].strip():
        return False
    word = paragraphs[nth - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first.lower()


# ── form ─────────────────────────────────────────────────────────────────────────────────────────


def is_all_json(text: str, _: Any) -> bool:
    """Return whether it is JSON and nothing else."""
    return is_json(text)


def has_title(text: str, _: Any) -> bool:
    """Return whether there is a title in <<double angular brackets>>."""
    return any(one.lstrip("<").rstrip(">").strip() for one in re.findall(r"<<[^\n]+>>", text))


def is_quoted(text: str, _: Any) -> bool:
    """Return whether all of it stands in double quotation marks."""
    inner = text.strip()
    return len(inner) > 1 and inner[0] == inner[-1] == '"'


def has_bullets(text: str, number: int) -> bool:
    """Return whether there are exactly so many bullet points."""
    stars = re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)
    return len(stars) + len(dashes) == number


def has_highlights(text: str, number: int) -> bool:
    """Return whether at least so many places are *highlighted*."""
    single = re.findall(r"\*[^\n\*]*\*", text)
    double = re.findall(r"\*\*[^\n\*]*\*\*", text)
    return sum(bool(one.strip("*").strip()) for one in single + double) >= number


def has_placeholders(text: str, number: int) -> bool:
    """Return whether there are at least so many [placeholders]."""
    return len(re.findall(r"\[.*?\]", text)) >= number


def has_sections(text: str, value: tuple[str, int]) -> bool:
    """Return whether there are at least so many sections, each with a word and a number."""
    splitter, number = value
    return len(re.findall(rf"\s?{re.escape(splitter)}\s?\d+\s?", text)) >= number


def starts_with(text: str, beginning: str) -> bool:
    """Return whether it begins with a phrase, whatever its case and a quotation mark before it."""
    return text.strip().lstrip(QUOTES).lower().startswith(beginning.strip().lower())


def ends_with(text: str, end: str) -> bool:
    """Return whether it ends with a phrase, whatever its case and a quotation mark after it."""
    return text.strip().strip('"').lower().endswith(end.strip().lower())


def has_postscript(text: str, marker: str) -> bool:
    """Return whether there is a postscript with a marker, as P.S."""
    patterns = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    return re.search(patterns.get(marker, re.escape(marker.lower())), text.lower()) is not None


def has_constrained_response(text: str, _: Any) -> bool:
    """Return whether one of IFEval's three answers occurs."""
    return any(answer in text for answer in CONSTRAINED)


def has_two_responses(text: str, _: Any) -> bool:
    """Return whether there are two different responses with six asterisks between them."""
    parts = [one.strip() for one in text.split("******")]
    filled = [one for one in parts if one]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def repeats_prompt(text: str, prompt: str) -> bool:
    """Return whether it begins with the prompt, word for word."""
    return text.strip().lower().startswith(prompt.strip().lower())


CHECKS: Mapping[str, Callable[[str, Any], bool]] = {
    "lower_case": is_lower,
    "upper_case": is_upper,
    "no_commas": has_no_comma,
    "title": has_title,
    "quotation": is_quoted,
    "json_only": is_all_json,
    "at_least_words": at_least_words,
    "at_most_words": at_most_words,
    "at_least_sentences": at_least_sentences,
    "at_most_sentences": at_most_sentences,
    "paragraphs": has_paragraphs,
    "divided_paragraphs": has_divided_paragraphs,
    "paragraph_first_word": paragraph_first_word,
    "bullets": has_bullets,
    "highlights": has_highlights,
    "placeholders": has_placeholders,
    "sections": has_sections,
    "contains": contains,
    "forbids": forbids,
    "keyword_frequency": keyword_frequency,
    "letter_frequency": letter_frequency,
    "capital_words": capital_words,
    "starts_with": starts_with,
    "ends_with": ends_with,
    "postscript": has_postscript,
    "constrained_response": has_constrained_response,
    "two_responses": has_two_responses,
    "repeat_prompt": repeats_prompt,
}
"""Name of a constraint → what checks it."""
