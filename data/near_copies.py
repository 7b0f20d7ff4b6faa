"""Find near copies: prompts that are the same as others except for a few words.

Two texts are near copies if the Jaccard index of their shingles (runs of words) reaches a
threshold. Candidates come from MinHash and locality-sensitive hashing (Broder 1997; Indyk and
Motwani 1998), by the package datasketch. Each candidate is then judged by the exact index: nothing
below the threshold is ever reported, and a pair just at it is missed less than once in a thousand
times. A short question after a greeting of several words is below the threshold: a pair that is
found is a copy, and one that is not found may still ask the same in other words.
"""

import sys
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from data.records import as_messages

LONGEST = 3
"""Words of a shingle at most."""
FEWEST = 4
"""Shingles of a text with at least as many words: shorter texts get shorter shingles."""
PERMUTATIONS = 128
"""Numbers in a MinHash."""
MISSED = 1e-3
"""The share of pairs just at the threshold that may fail to become candidates."""

Words = tuple[str, ...]
Shingles = frozenset[Words]


def near_copies(
    texts: Sequence[str | Iterable[dict]], against: Sequence[str | Iterable[dict]], threshold: float = 0.8
) -> list[bool]:
    """Return for each text whether it is a near copy of any other.

    Args:
        texts: Strings, or prompts as lists of {role, content}, of which the user's turns count.
        against: The texts to compare with.
        threshold: The smallest Jaccard index of two near copies, above 0 and at most 1.
    """
    return [copy is not None for copy in nearest_copies(texts, against, threshold)]


def nearest_copies(
    texts: Sequence[str | Iterable[dict]], against: Sequence[str | Iterable[dict]], threshold: float = 0.8
) -> list[int | None]:
    """Return for each text the index of the one in `against` that it is the nearest copy of.

    Args:
        texts: As of `near_copies`.
        against: As of `near_copies`.
        threshold: As of `near_copies`.

    Returns:
        For each text an index, the first one if several are equally near; None if there is none.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; use a number above 0 and at most 1")
    ours, theirs = first_indices(texts), first_indices(against)
    best: dict[Words, tuple[float, int]] = {}  # words of ours → (Jaccard index, − index in theirs)
    for length in range(1, LONGEST + 1):
        swap = len(ours) > len(theirs)  # the smaller side is indexed
        indexed, queries = (theirs, ours) if swap else (ours, theirs)
        for pair in similar_pairs(indexed, queries, length, threshold):
            own, other = (pair.query, pair.indexed) if swap else (pair.indexed, pair.query)
            best[own] = max(best.get(own, (0.0, 0)), (pair.jaccard, -theirs[other]))
    nearest: list[int | None] = []
    for text in texts:
        copy = best.get(normal_words(text))
        nearest.append(None if copy is None else -copy[1])
    return nearest


def first_indices(texts: Iterable[str | Iterable[dict]]) -> dict[Words, int]:
    """Return {words: the first index of a text with these words}; texts need at least one word."""
    indices: dict[Words, int] = {}
    for index, text in enumerate(texts):
        words = normal_words(text)
        if words:
            indices.setdefault(words, index)
    return indices


@dataclass(frozen=True)
class CopyFilter:
    """Let through the few texts of a stream that can be near copies of some given ones.

    So a stream need not be kept: what does not pass is no near copy, and what passes is compared by
    `near_copies`.
    """

    known: tuple[frozenset[Words], ...]
    """All shingles of the given texts, of each length from 1 to LONGEST words."""
    threshold: float
    """The smallest Jaccard index of two near copies."""

    @staticmethod
    def of(texts: Iterable[str | Iterable[dict]], threshold: float = 0.8) -> "CopyFilter":
        """Return the filter for copies of these texts; the arguments are those of `near_copies`."""
        ours = list(first_indices(texts))
        lengths = range(1, LONGEST + 1)
        runs = [[own for _, own in of_length(ours, length, threshold)] for length in lengths]
        return CopyFilter(tuple(frozenset[Words]().union(*some) for some in runs), threshold)

    def passing(self, stream: Iterable[str | Iterable[dict]]) -> Iterator[str | Iterable[dict]]:
        """Yield the texts of a stream that can be near copies, each only once."""
        seen: set[Words] = set()
        for text in stream:
            words = normal_words(text)
            if words and words not in seen and self._can_be_copy(words):
                seen.add(words)
                yield text

    def _can_be_copy(self, words: Words) -> bool:
        """Return whether enough shingles of a text are known.

        The Jaccard index of two sets is at most the share of the one that the other has.
        """
        return any(
            len(own & known) / len(own) >= self.threshold
            for length, known in enumerate(self.known, 1)
            for _, own in of_length((words,), length, self.threshold)
        )


# ── words and shingles ───────────────────────────────────────────────────────────────────────────


class Separators(dict[int, str]):
    """Map code points for str.translate, filled on demand.

    Punctuation, white space and control characters become spaces. Letters of scripts that are
    written without spaces between words become a word each.
    """

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        category = unicodedata.category(letter)
        if category[0] in "PZC":
            self[code] = " "
        elif category == "Lo" and is_unspaced(letter):
            self[code] = f" {letter} "
        else:
            self[code] = letter
        return self[code]


def is_unspaced(letter: str) -> bool:
    """Return whether a letter is Chinese, Japanese, Thai, Lao, Khmer or Burmese."""
    scripts = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
    return unicodedata.name(letter, "").startswith(scripts)


SEPARATORS = Separators()


def normal_words(text: str | Iterable[dict]) -> Words:
    """Return the words of a text, or of a prompt's user turns, in one case and one Unicode form.

    Punctuation is left out, unless there is nothing else.
    """
    if not isinstance(text, str):
        text = "\n".join(message["content"] for message in as_messages(text) if message["role"] == "user")
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    words = text.translate(SEPARATORS).split() or text.split()
    return tuple(map(sys.intern, words))  # the same few words occur in many texts


def shingle_length(words: Words) -> int:
    """Return the length of shingles, in words, for a pair of texts whose shorter one is `words`.

    Three, so that the order of words counts. Two or one for texts of fewer than six words, so that
    those of four words still have four shingles: one more word before or after such a text leaves
    four shingles of five in common, 0.8.
    """
    return max(1, min(LONGEST, len(words) - FEWEST + 1))


def shingles(words: Words, length: int) -> Shingles:
    """Return the runs of `length` words; of fewer words than that, all of them as one run."""
    return frozenset(zip(*(words[i:] for i in range(length)), strict=False)) or frozenset([words])


# ── pairs ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SimilarPair:
    """Hold two texts that are near copies."""

    indexed: Words
    """The one that was indexed."""
    query: Words
    """The one that was looked up."""
    jaccard: float
    """The Jaccard index of their shingles."""


def similar_pairs(
    indexed: Iterable[Words], queries: Iterable[Words], length: int, threshold: float
) -> Iterator[SimilarPair]:
    """Yield all near copies whose shorter text has shingles of `length` words.

    Args:
        indexed: Texts that are kept in memory with their shingles.
        queries: Texts that are looked up one at a time.
        length: The words of a shingle.
        threshold: The smallest Jaccard index.
    """
    from datasketch import MinHash, MinHashLSH  # imports scipy, which takes a second

    options = {"num_perm": PERMUTATIONS, "hashfunc": zlib.crc32, "scheme": "affine32"}
    candidates = list(of_length(indexed, length, threshold))
    if not candidates:
        return
    index = MinHashLSH(num_perm=PERMUTATIONS, params=bands(threshold))
    for key, sketch in enumerate(MinHash.generator((as_bytes(own) for _, own in candidates), **options)):
        index.insert(key, sketch)
    empty = MinHash(**options)
    known = frozenset[Words]().union(*(own for _, own in candidates))
    for words, theirs in of_length(queries, length, threshold):
        if len(theirs & known) / len(theirs) < threshold:
            continue  # whatever it is compared with, they share less; a sketch takes far longer
        sketch = empty.copy()
        sketch.update_batch(as_bytes(theirs))
        for key in index.query(sketch):
            other, own = candidates[key]
            if min(shingle_length(words), shingle_length(other)) != length:
                continue
            shared = len(own & theirs)
            jaccard = shared / (len(own) + len(theirs) - shared)
            if jaccard >= threshold:
                yield SimilarPair(other, words, jaccard)


def of_length(texts: Iterable[Words], length: int, threshold: float) -> Iterator[tuple[Words, Shingles]]:
    """Yield (text, its shingles) for the texts that can be in a pair of this shingle length.

    A text with longer shingles of its own can only if it has hardly more shingles than the shorter
    text: the Jaccard index of two sets is at most the ratio of their sizes.

    Args:
        texts: The texts.
        length: The words of a shingle.
        threshold: The smallest Jaccard index.
    """
    limit = FEWEST / threshold  # a text whose own shingles are shorter than LONGEST has at most FEWEST
    for words in texts:
        usual_length = shingle_length(words)
        if usual_length == length:
            yield words, shingles(words, length)
        elif usual_length > length and len(set(words)) - length < limit:  # others certainly have more
            runs = shingles(words, length)
            if len(runs) <= limit:
                yield words, runs


def as_bytes(runs: Shingles) -> list[bytes]:
    """Return shingles as the bytes that are hashed."""
    return ["\0".join(shingle).encode("utf-8", "surrogatepass") for shingle in runs]


def bands(threshold: float) -> tuple[int, int]:
    """Return (bands, rows) of the index for a threshold.

    The most rows with which a pair at the threshold is missed with a probability of at most MISSED,
    (1 − threshold^rows)^bands: the more rows, the fewer candidates are judged in vain.
    """
    for rows in range(PERMUTATIONS // 2, 1, -1):  # datasketch needs at least two bands
        if (1 - threshold**rows) ** (PERMUTATIONS // rows) <= MISSED:
            return PERMUTATIONS // rows, rows
    return PERMUTATIONS, 1
