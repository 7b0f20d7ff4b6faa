"""Remember where each of many keys came first, in about a hundred bytes a key."""

from dataclasses import dataclass, field

NUMBER_BITS = 40
"""Bits for the number at the end of a location."""


@dataclass
class Seen:
    """Map keys to the location of their first row, without keeping the keys themselves.

    Keys are told apart by 64-bit hashes: among a million keys, two of them are taken for the same
    one with a probability of 3 in 10⁸.
    """

    _places: dict[int, int] = field(default_factory=dict)
    """Hash of a key → its location: the index of the text, and the number after it."""
    _texts: dict[str, int] = field(default_factory=dict)
    """What locations have before their number, such as "FILE:" → its index."""

    def __contains__(self, key: str) -> bool:
        """Return whether a key was added."""
        return hash(key) in self._places

    def __getitem__(self, key: str) -> str:
        """Return the location that a key was added with."""
        index, number = divmod(self._places[hash(key)], 1 << NUMBER_BITS)
        text = next(text for text, i in self._texts.items() if i == index)
        return f"{text}{number - 1}" if number else text

    def add(self, key: str, location: str) -> None:
        """Add a key, or give it another location.

        Args:
            key: The key.
            location: Where its row is, such as "FILE:LINE" or "FILE: index I".
        """
        text = location.rstrip("0123456789")
        digits = location[len(text) :]
        if not digits or digits != str(int(digits)) or len(digits) > 11:  # nothing that can be written again
            text, digits = location, ""
        index = self._texts.setdefault(text, len(self._texts))
        self._places[hash(key)] = (index << NUMBER_BITS) + (int(digits) + 1 if digits else 0)
