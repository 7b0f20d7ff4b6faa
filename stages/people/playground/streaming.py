"""Turn sampled tokens into pieces of text that never have to be taken back."""

from collections.abc import Callable, Sequence

HALF_CHARACTER = "�"
"""What a tokenizer writes for the bytes of an unfinished character."""


class TextStream:
    """Hold the text of an answer while it grows."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str]) -> None:
        """Build an empty answer.

        Args:
            decode: Turns the answer's token ids into text, without special tokens.
            stops: Texts that end the answer.
        """
        self.decode, self.stops = decode, [stop for stop in stops if stop]
        self.ids: list[int] = []
        self.sent = ""
        """What was given out."""
        self.stopped = False
        """Whether a stop text has come."""

    def push(self, token: int) -> str:
        """Add a token and return the further text that is certain, often "".

        White space at the ends, half a character, and what may become a stop text are held back.
        """
        self.ids.append(token)
        text = self.decode(self.ids)
        cut = cut_at_stop(text, self.stops)
        if cut is not None:
            self.stopped = True
            return self.give(cut.strip())
        certain = text.rstrip(HALF_CHARACTER)
        # before white space goes, since a stop text may begin with it
        certain = certain[: len(certain) - held_back(certain, self.stops)]
        return self.give(certain.strip())

    def finish(self, text: str) -> str:
        """Return what is left of the whole text."""
        return self.give(text)

    def give(self, text: str) -> str:
        """Return what a text has beyond what was given out.

        A few tokenizers change earlier text when a token comes; then nothing is given out until
        the text agrees again.
        """
        if not text.startswith(self.sent):
            return ""
        piece, self.sent = text[len(self.sent) :], text
        return piece


def cut_at_stop(text: str, stops: Sequence[str]) -> str | None:
    """Return the text before the first stop text in it; None if there is none."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop text."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop), len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
