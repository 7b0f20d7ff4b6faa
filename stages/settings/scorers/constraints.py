"""Read the instructions of a row in IFEval's form: ids and arguments → constraints.

A row has `instruction_id_list`, as ["length_constraints:number_words"], and `kwargs`, a mapping for
each, as [{"num_words": 50, "relation": "at least"}]; keys that are null are not meant.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OF_SETTINGS = (
    "lower_case",
    "upper_case",
    "no_commas",
    "title",
    "quotation",
    "json_only",
    "at_least_words",
    "at_most_words",
    "at_least_sentences",
    "at_most_sentences",
    "paragraphs",
    "bullets",
    "highlights",
    "placeholders",
    "contains",
    "forbids",
    "starts_with",
    "ends_with",
    "postscript",
)
"""The constraints that a config can set for all prompts; rows can have more."""

IDS, ARGUMENTS = "instruction_id_list", "kwargs"
LESS, AT_LEAST = "less than", "at least"


@dataclass(frozen=True)
class Constraint:
    """Something that a response must do."""

    name: str
    """Its name: a key of the table of checks (stages/scorers/rules/instructions.py)."""
    value: Any = True
    """What it is checked with: a number, a text, texts, or True where there is nothing to say."""


def has_constraints(row: Mapping[str, Any]) -> bool:
    """Return whether a row asks for anything in IFEval's form."""
    return bool(row.get(IDS))


def constraints_of_row(row: Mapping[str, Any]) -> list[Constraint]:
    """Return the constraints of a row; none if it has no `instruction_id_list`.

    Raises:
        ValueError: An id is not known, or an argument is missing or wrong.
    """
    ids, given = row.get(IDS), row.get(ARGUMENTS)
    if ids is None:
        return []
    if not isinstance(ids, list | tuple) or not all(isinstance(one, str) for one in ids):
        raise ValueError(f"{IDS} is {ids!r}; should be a list of texts")
    if given is None:
        given = [{}] * len(ids)
    if not isinstance(given, list | tuple) or len(given) != len(ids):
        raise ValueError(f"{ARGUMENTS} should be a list with a mapping for each of the {len(ids)} ids")
    return [constraint_of(one, arguments or {}) for one, arguments in zip(ids, given, strict=True)]


def constraint_of(identity: str, arguments: Mapping[str, Any]) -> Constraint:
    """Return the constraint of one id of IFEval.

    Raises:
        ValueError: The id is not known, or an argument is missing or wrong.
    """
    if identity not in READERS:
        raise ValueError(f"{identity!r} is no instruction that can be checked; known are {', '.join(sorted(READERS))}")
    try:
        return READERS[identity](arguments)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{identity}: {ARGUMENTS} has no {error}; add it") from error
    except ValueError as error:
        raise ValueError(f"{identity}: {error}") from error


# ── arguments ────────────────────────────────────────────────────────────────────────────────────


def number(arguments: Mapping[str, Any], key: str) -> int:
    """Return a whole number of at least 0, which data from tables may hold as 3.0.

    Raises:
        KeyError: There is none.
        ValueError: It is something else.
    """
    value = arguments.get(key)
    if value is None:
        raise KeyError(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
        raise ValueError(f"{key} is {value!r}; should be a whole number")
    return int(value)


def text(arguments: Mapping[str, Any], key: str) -> str:
    """Return a text that is not blank.

    Raises:
        KeyError: There is none.
        ValueError: It is something else.
    """
    value = arguments.get(key)
    if value is None:
        raise KeyError(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {value!r}; should be a text")
    return value.strip()


def texts(arguments: Mapping[str, Any], key: str) -> list[str]:
    """Return a list of texts.

    Raises:
        KeyError: There is none.
        ValueError: It is something else.
    """
    value = arguments.get(key)
    if value is None:
        raise KeyError(key)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{key} is {value!r}; should be a list of texts")
    return list(value)


def is_less(arguments: Mapping[str, Any], key: str = "relation") -> bool:
    """Return whether a relation is "less than"; otherwise it is "at least".

    Raises:
        KeyError: There is none.
        ValueError: It is something else.
    """
    value = arguments.get(key)
    if value is None:
        raise KeyError(key)
    if value not in (LESS, AT_LEAST):
        raise ValueError(f"{key} is {value!r}; should be {LESS!r} or {AT_LEAST!r}")
    return value == LESS


# ── one reader an id ─────────────────────────────────────────────────────────────────────────────


def plain(name: str) -> Callable[[Mapping[str, Any]], Constraint]:
    """Return the reader of an id without arguments."""
    return lambda arguments: Constraint(name)


def counted(name: str, key: str) -> Callable[[Mapping[str, Any]], Constraint]:
    """Return the reader of an id whose argument is a number."""
    return lambda arguments: Constraint(name, number(arguments, key))


def bounded(unit: str, key: str) -> Callable[[Mapping[str, Any]], Constraint]:
    """Return the reader of an id that bounds a number: fewer than n, or at least n."""

    def read(arguments: Mapping[str, Any]) -> Constraint:
        count = number(arguments, key)
        return Constraint(f"at_most_{unit}", count - 1) if is_less(arguments) else Constraint(f"at_least_{unit}", count)

    return read


def keyword_count(arguments: Mapping[str, Any]) -> Constraint:
    """Read how often a keyword has to occur."""
    limit = (text(arguments, "keyword"), is_less(arguments), number(arguments, "frequency"))
    return Constraint("keyword_frequency", limit)


def letter_count(arguments: Mapping[str, Any]) -> Constraint:
    """Read how often a letter has to occur."""
    letter = text(arguments, "letter")
    if len(letter) != 1:
        raise ValueError(f"letter is {letter!r}; should be one letter")
    return Constraint(
        "letter_frequency", (letter, is_less(arguments, "let_relation"), number(arguments, "let_frequency"))
    )


def capital_words(arguments: Mapping[str, Any]) -> Constraint:
    """Read how many words have to be in capitals."""
    return Constraint("capital_words", (is_less(arguments, "capital_relation"), number(arguments, "capital_frequency")))


def first_word(arguments: Mapping[str, Any]) -> Constraint:
    """Read how many paragraphs there have to be, and how one of them begins."""
    paragraphs, nth = number(arguments, "num_paragraphs"), number(arguments, "nth_paragraph")
    if not 1 <= nth <= paragraphs:
        raise ValueError(f"nth_paragraph is {nth}; should be from 1 to num_paragraphs, {paragraphs}")
    return Constraint("paragraph_first_word", (paragraphs, nth, text(arguments, "first_word")))


def sections(arguments: Mapping[str, Any]) -> Constraint:
    """Read how many sections there have to be, and how each begins."""
    return Constraint("sections", (text(arguments, "section_spliter"), number(arguments, "num_sections")))


READERS: dict[str, Callable[[Mapping[str, Any]], Constraint]] = {
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": plain("upper_case"),
    "change_case:english_lowercase": plain("lower_case"),
    "combination:repeat_prompt": lambda given: Constraint("repeat_prompt", text(given, "prompt_to_repeat")),
    "combination:two_responses": plain("two_responses"),
    "detectable_content:number_placeholders": counted("placeholders", "num_placeholders"),
    "detectable_content:postscript": lambda given: Constraint("postscript", text(given, "postscript_marker")),
    "detectable_format:constrained_response": plain("constrained_response"),
    "detectable_format:json_format": plain("json_only"),
    "detectable_format:multiple_sections": sections,
    "detectable_format:number_bullet_lists": counted("bullets", "num_bullets"),
    "detectable_format:number_highlighted_sections": counted("highlights", "num_highlights"),
    "detectable_format:title": plain("title"),
    "keywords:existence": lambda given: Constraint("contains", texts(given, "keywords")),
    "keywords:forbidden_words": lambda given: Constraint("forbids", texts(given, "forbidden_words")),
    "keywords:frequency": keyword_count,
    "keywords:letter_frequency": letter_count,
    "length_constraints:nth_paragraph_first_word": first_word,
    "length_constraints:number_paragraphs": counted("divided_paragraphs", "num_paragraphs"),
    "length_constraints:number_sentences": bounded("sentences", "num_sentences"),
    "length_constraints:number_words": bounded("words", "num_words"),
    "punctuation:no_comma": plain("no_commas"),
    "startend:end_checker": lambda given: Constraint("ends_with", text(given, "end_phrase")),
    "startend:quotation": plain("quotation"),
}
"""Id of IFEval → the constraint that its arguments mean. `language:response_language` is left out:
no language is detected here."""
