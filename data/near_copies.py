"""Near copies: prompts that are all but the same as others.

Two texts are near copies if the Jaccard index of their shingles (runs of words) reaches a
threshold. Candidates come from MinHash and locality-sensitive hashing (Broder 1997; Indyk and
Motwani 1998), by the package datasketch. Each candidate is then judged by the exact index: nothing
below the threshold is ever reported, and a pair just at it is missed less than once in a thousand
times. A short question behind a greeting of several words is below the threshold: what is found is
copied, and what is not found may still be asked in other words.
"""

import sys
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence

from data.records import as_messages

LONGEST = 3  # words of a shingle
FEWEST = 4  # shingles of a text that has as many words: shorter texts get shorter shingles
PERMUTATIONS = 128  # numbers in a MinHash
MISSED = 1e-3  # share of pairs just at the threshold that need not become candidates

Words = tuple[str, ...]
Shingles = frozenset[Words]


def near_copies(
    texts: Sequence[str | Iterable[dict]], against: Sequence[str | Iterable[dict]], threshold: float = 0.8
) -> list[bool]:
    """Return, for each of `texts`, whether it is a near copy of any text of `against`.

    Args:
        texts: strings, or prompts as lists of {role, content}, of which the user's turns count.
        against: the same.
        threshold: least Jaccard index of two near copies, above 0 and at most 1.
    """
    return [found is not None for found in nearest_copies(texts, against, threshold)]


def nearest_copies(
    texts: Sequence[str | Iterable[dict]], against: Sequence[str | Iterable[dict]], threshold: float = 0.8
) -> list[int | None]:
    """Return, for each of `texts`, the index of the text of `against` that it is the nearest copy of.

    None where there is none; the first where several are equally near. Arguments as of `near_copies`.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; use a number above 0 and at most 1")
    ours, theirs = first_places(texts), first_places(against)
    best: dict[Words, tuple[float, int]] = {}  # words of ours → (index of Jaccard, − place of theirs)
    for length in range(1, LONGEST + 1):
        if len(ours) <= len(theirs):  # the fewer ones are indexed
            pairs = similar_pairs(ours, theirs, length, threshold)
        else:
            pairs = ((own, other, index) for other, own, index in similar_pairs(theirs, ours, length, threshold))
        for own, other, index in pairs:
            best[own] = max(best.get(own, (0.0, 0)), (index, -theirs[other]))
    found = (best.get(normal_words(text)) for text in texts)
    return [None if nearest is None else -nearest[1] for nearest in found]


def first_places(texts: Iterable[str | Iterable[dict]]) -> dict[Words, int]:
    """Return the words of each text → the first place of such a text; without those that have no word."""
    places: dict[Words, int] = {}
    for place, text in enumerate(texts):
        if words := normal_words(text):
            places.setdefault(words, place)
    return places


# ── words and shingles ──────────────────────────────────────────────────────────────────────────────────────


class Separators(dict):
    """A table for str.translate, filled as it is asked: code point → what stands for it.

    Punctuation, white space and control characters part words. Letters of scripts that are written
    without spaces between words are a word each.
    """

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        category = unicodedata.category(letter)
        if category[0] in "PZC":
            self[code] = " "
        else:
            self[code] = f" {letter} " if category == "Lo" and unspaced(letter) else letter
        return self[code]


def unspaced(letter: str) -> bool:
    """Return whether a letter is Chinese, Japanese, Thai, Lao, Khmer or Burmese."""
    scripts = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
    return unicodedata.name(letter, "").startswith(scripts)


SEPARATORS = Separators()


def normal_words(text: str | Iterable[dict]) -> Words:
    """Return the words of a text, or of the user's turns of a prompt: in one case and one Unicode form.

    Without punctuation, unless there is nothing else.
    """
    if not isinstance(text, str):
        text = "\n".join(message["content"] for message in as_messages(text) if message["role"] == "user")
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    words = text.translate(SEPARATORS).split() or text.split()
    return tuple(map(sys.intern, words))  # the same few words stand in many texts


def shingle_length(words: Words) -> int:
    """Return the words of a shingle, where `words` is the shorter of two texts.

    Three, so that the order of words counts. Two or one for texts of fewer than six words, so that
    those of four have four shingles yet: one more word before or behind such a text leaves four
    shingles of five in common, 0.8.
    """
    return max(1, min(LONGEST, len(words) - FEWEST + 1))


def shingles(words: Words, length: int) -> Shingles:
    """Return the runs of `length` words; of fewer words than that, all of them as one."""
    return frozenset(zip(*(words[i:] for i in range(length)), strict=False)) or frozenset([words])


# ── pairs ───────────────────────────────────────────────────────────────────────────────────────────────────


def similar_pairs(
    indexed: Iterable[Words], asked: Iterable[Words], length: int, threshold: float
) -> Iterator[tuple[Words, Words, float]]:
    """Yield (one of `indexed`, one of `asked`, their Jaccard index) for all near copies of which the
    shorter text has shingles of `length` words.

    `indexed` are held in memory with their shingles; `asked` pass by one at a time.
    """
    from datasketch import MinHash, MinHashLSH  # brings scipy, which takes a second

    options = {"num_perm": PERMUTATIONS, "hashfunc": zlib.crc32, "scheme": "affine32"}
    held = list(of_length(indexed, length, threshold))
    if not held:
        return
    index = MinHashLSH(num_perm=PERMUTATIONS, params=bands(threshold))
    for key, sketch in enumerate(MinHash.generator((as_bytes(own) for _, own in held), **options)):
        index.insert(key, sketch)
    empty = MinHash(**options)
    for words, theirs in of_length(asked, length, threshold):
        sketch = empty.copy()
        sketch.update_batch(as_bytes(theirs))
        for key in index.query(sketch):
            other, own = held[key]
            if min(shingle_length(words), shingle_length(other)) == length:
                shared = len(own & theirs)
                jaccard = shared / (len(own) + len(theirs) - shared)
                if jaccard >= threshold:
                    yield other, words, jaccard


def of_length(texts: Iterable[Words], length: int, threshold: float) -> Iterator[tuple[Words, Shingles]]:
    """Yield the texts, with their shingles of `length` words, that can be in a pair of which the
    shorter text has such.

    A longer text can only if it has hardly more shingles: the index of two sets is at most the
    ratio of their sizes.
    """
    most = FEWEST / threshold  # a text whose own shingles are shorter than LONGEST has at most FEWEST
    for words in texts:
        own = shingle_length(words)
        if own == length:
            yield words, shingles(words, length)
        elif own > length and len(set(words)) - length < most:  # others have more for certain
            found = shingles(words, length)
            if len(found) <= most:
                yield words, found


def as_bytes(found: Shingles) -> list[bytes]:
    return ["\0".join(shingle).encode("utf-8", "surrogatepass") for shingle in found]


def bands(threshold: float) -> tuple[int, int]:
    """Return (bands, rows) of the index.

    The most rows with which a pair at the threshold is missed with a probability of at most MISSED,
    (1 − thresholdʳᵒʷˢ)ᵇᵃⁿᵈˢ: more rows are fewer candidates that are judged in vain.
    """
    for rows in range(PERMUTATIONS // 2, 1, -1):  # datasketch wants two bands
        if (1 - threshold**rows) ** (PERMUTATIONS // rows) <= MISSED:
            return PERMUTATIONS // rows, rows
    return PERMUTATIONS, 1
