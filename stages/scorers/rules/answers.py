"""Compare a response with the right answer: exactly, as a letter, or as mathematics."""

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

BOXED = "\\boxed{"
SECONDS = 5
"""The longest that math-verify may take over one text, where the main thread asks it."""


def normalised(text: str, ignore_case: bool, ignore_punctuation: bool) -> str:
    """Return a text in the form in which it is compared.

    Args:
        text: The text.
        ignore_case: Whether to write it in small letters.
        ignore_punctuation: Whether to take punctuation out, and all white space but one blank.
    """
    text = unicodedata.normalize("NFC", text).strip()
    if ignore_case:
        text = text.casefold()
    if ignore_punctuation:
        marks = {ord(mark): " " for mark in string.punctuation + "“”‘’…。，、！？；："}
        text = " ".join(text.translate(marks).split())
    return text


def is_exact(
    text: str, answers: Sequence[str], where: str, *, ignore_case: bool = False, ignore_punctuation: bool = False
) -> bool:
    """Return whether a response gives one of the answers.

    Args:
        text: The response.
        answers: The right answers.
        where: "whole", "start", "end" or "anywhere": where an answer has to stand.
        ignore_case: Whether capital and small letters are the same.
        ignore_punctuation: Whether punctuation is ignored.
    """
    given = normalised(text, ignore_case, ignore_punctuation)
    for answer in answers:
        right = normalised(answer, ignore_case, ignore_punctuation)
        found = {
            "whole": given == right,
            "start": given.startswith(right),
            "end": given.endswith(right),
            "anywhere": right in given,
        }
        if right and found[where]:
            return True
    return False


def chosen_letter(text: str, letters: str) -> str | None:
    """Return the letter that a response chooses; None if it chooses none.

    Args:
        text: The response.
        letters: The letters that there are, as "ABCD".
    """
    letter = f"([{letters}])"
    boxed = re.findall(r"\\boxed\{\s*(?:\\text\{)?\(?" + letter + r"\)?\s*\}", text)
    if boxed:
        return str(boxed[-1])
    named = rf"(?i:answer|choice|option)(?:\s+(?i:is))?[\s:*]*\(?{letter}(?!\w)"
    found = [(match.end(), match.group(1)) for match in re.finditer(rf"\({letter}\)", text)]
    found += [(match.end(), match.group(1)) for match in re.finditer(named, text)]
    if found:
        return max(found)[1]
    first = re.match(rf"[\s*\"']*{letter}(?:[.):,*\"']|\s*$)", text)
    return first.group(1) if first else None


def final_answer(text: str) -> str | None:
    """Return what a solution marks as its result: after "####", or in the last \\boxed{…}.

    Args:
        text: The solution.

    Returns:
        The result, or None if none is marked.
    """
    if "####" in text:
        lines = text.rpartition("####")[2].strip().splitlines()
        return lines[0].strip() if lines else None
    start = text.rfind(BOXED)
    if start < 0:
        return None
    inner, depth = text[start + len(BOXED) :], 1
    for i, character in enumerate(inner):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inner[:i].strip()
    return None


def is_equal(text: str, answers: Sequence[str]) -> bool:
    """Return whether the result of a response equals one of the answers as mathematics.

    An answer that math-verify cannot read is compared as text with the result that is marked.

    Args:
        text: The response.
        answers: The right answers, or whole solutions.
    """
    from math_verify import verify

    marked = final_answer(text)
    given = parsed(text if marked is None else marked, is_marked=marked is not None)
    for answer in answers:
        right = final_answer(answer) or answer
        gold = parsed(right, is_marked=True)
        if gold:
            if given and verify(gold, given, timeout_seconds=limit()):
                return True
        elif normalised(marked if marked is not None else text, True, True) == normalised(right, True, True):
            return True
    return False


def parsed(text: str, is_marked: bool) -> list[Any]:
    """Return what math-verify reads in a text; empty if it is nothing.

    Args:
        text: The text.
        is_marked: Whether all of it is the result; otherwise the last one is looked for.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    found = list(parse(text, extraction_config=configs, parsing_timeout=limit()))
    if is_marked and "$" not in text and BOXED not in text:  # all of it may be LaTeX
        found += parse(f"{BOXED}{text}}}", extraction_config=configs, parsing_timeout=limit())
    return found


def limit() -> int | None:
    """Return the seconds that math-verify may take; None where it cannot set its alarm."""
    import threading

    return SECONDS if threading.current_thread() is threading.main_thread() else None
