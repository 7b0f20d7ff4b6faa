"""Find prompts that share a long common prefix with one before (InstructGPT, §3.2 and A.1).

A prefix is long if it has at least `shortest` characters, and of a longer prompt the first
`shortest` × 2, 4, 8, …, whichever of these is the largest that is not above half of the prompt. So
an instruction of two lines before two different articles is no long prefix, and a template that is
filled in with another word is one.
"""

import hashlib
import unicodedata
from collections.abc import Iterable

from data.records import as_messages


class Prefixes:
    """Hold the prefixes of the prompts that were kept, as digests."""

    def __init__(self, shortest: int):
        """Start without prompts.

        Args:
            shortest: Characters of a long prefix at least.
        """
        self.shortest = shortest
        # (length, its digest) → the prompt. A prompt whose own required length is L can be matched
        # with prompts that require L or 2L; all others differ too much in length.
        self._required: dict[bytes, int] = {}
        self._doubled: dict[bytes, int] = {}

    def find(self, text: str) -> int | None:
        """Return the number of a kept prompt that shares a long prefix with a text; or None."""
        if len(text) < self.shortest:
            return None
        length = required_length(len(text), self.shortest)
        own, longer = prefix_key(text, length), prefix_key(text, 2 * length)
        found = [self._required.get(own), self._doubled.get(own)]
        if len(text) >= 2 * length:
            found.append(self._required.get(longer))
        return min((number for number in found if number is not None), default=None)

    def add(self, text: str, number: int) -> None:
        """Keep a prompt's prefixes under its number."""
        if len(text) < self.shortest:
            return
        length = required_length(len(text), self.shortest)
        self._required.setdefault(prefix_key(text, length), number)
        if len(text) >= 2 * length:
            self._doubled.setdefault(prefix_key(text, 2 * length), number)


def required_length(length: int, shortest: int) -> int:
    """Return how long a prefix must be to be long for a text: shortest, or twice it, four times, …

    Args:
        length: The characters of the text.
        shortest: Characters of a long prefix at least.
    """
    required = shortest
    while 4 * required <= length:
        required *= 2
    return required


def prefix_key(text: str, length: int) -> bytes:
    """Return a digest of the first characters of a text and their number."""
    return hashlib.sha256(f"{length} {text[:length]}".encode("utf-8", "surrogatepass")).digest()[:16]


def comparable_text(prompt: str | Iterable[dict]) -> str:
    """Return what prefixes are compared in: the user's turns in one case, with single spaces.

    System messages do not count: often one stands before all prompts.
    """
    turns = [message["content"] for message in as_messages(prompt) if message["role"] == "user"]
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", " ".join(turns)).casefold()).split())
