"""Test near copies against every pair counted by hand, and on what people would call one."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.near_copies import CopyFilter, bands, near_copies, nearest_copies

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)
word = st.sampled_from("abcdefg")
texts = st.lists(st.lists(word, min_size=1, max_size=9).map(" ".join), max_size=8)


def jaccard(one: str, other: str) -> float:
    """Return the Jaccard index by its definition, of lower-case words without punctuation.

    Shingles are as long as the shorter text allows.
    """
    one, other = one.split(), other.split()
    least = min(len(one), len(other))
    n = 1 if least <= 4 else 2 if least == 5 else 3
    sets = [{" ".join(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@SETTINGS
@given(texts, texts, st.sampled_from([0.5, 0.75, 0.8, 1.0]))
def test_near_copies_reach_the_threshold_and_the_nearest_is_found(mine, theirs, threshold):
    for text, found in zip(mine, nearest_copies(mine, theirs, threshold), strict=True):
        index = [jaccard(text, other) for other in theirs]
        if found is None:
            assert max(index, default=0.0) < threshold
        else:
            assert index[found] == max(index) >= threshold and index.index(max(index)) == found


@SETTINGS
@given(texts, texts, st.sampled_from([0.5, 0.75, 0.8, 1.0]))
def test_a_filtered_stream_has_the_same_near_copies(mine, theirs, threshold):
    passed = list(CopyFilter.of(mine, threshold).passing(iter(theirs * 2)))
    assert near_copies(mine, passed, threshold) == near_copies(mine, theirs, threshold)
    assert all(any(set(text.split()) & set(own.split()) for own in mine) for text in passed)


def test_hardly_any_text_passes_that_is_no_copy():
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(50)]
    mine, theirs = ([" ".join(rng.choices(vocabulary, k=rng.randrange(6, 60))) for _ in range(300)] for _ in range(2))
    assert list(CopyFilter.of(mine).passing([*theirs, *mine])) == mine


def mended(rng, words: list[str], vocabulary: list[str]) -> str:
    """Return the words with a few of them replaced, left out or added."""
    words = list(words)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(words))
        words[at : at + rng.randrange(2)] = rng.choices(vocabulary, k=rng.randrange(1, 3))
    return " ".join(words)


def test_hardly_any_pair_above_the_threshold_is_missed_and_none_below_is_found():
    """Check that it makes no difference which side is longer."""
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(50)]
    originals = [rng.choices(vocabulary, k=rng.randrange(3, 60)) for _ in range(100)]
    theirs = [" ".join(words) for words in originals]
    mine = [mended(rng, rng.choice(originals), vocabulary) for _ in range(300)]
    nearest = [max(jaccard(text, other) for other in theirs) for text in mine]
    assert sum(0.85 <= x < 1 for x in nearest) > 30 and sum(0.6 < x < 0.8 for x in nearest) > 30
    for found in (near_copies(mine, theirs), near_copies(mine, theirs * 3)):
        assert all(x >= 0.8 for x, taken in zip(nearest, found, strict=True) if taken)
        assert all(taken for x, taken in zip(nearest, found, strict=True) if x >= 0.85)
        assert sum(found) >= 0.99 * sum(x >= 0.8 for x in nearest)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.8, 0.9, 0.99, 1.0])
def test_the_index_misses_a_pair_at_the_threshold_less_than_once_in_a_thousand(threshold):
    """Check the bands: MinHashes agree in each number with the probability of the Jaccard index.

    A pair is a candidate if all numbers of one band agree.
    """
    count, rows = bands(threshold)
    assert count * rows <= 128 and (1 - threshold**rows) ** count <= 1e-3


QUESTION = "What color is the fox?"


@pytest.mark.parametrize(
    "text, copy",
    [
        ("what COLOR is the fox", True),
        ("hello . what color is the fox ?", True),
        ("What color is the fox?\n\nThanks!", True),
        ("What color is the dog?", False),
        ("What color is the fox, and what does it eat in winter?", False),
        ("Is the fox color what the?", False),  # the same words in another order
        ("", False),
        ("?!", False),
    ],
)
def test_near_copies_of_a_short_question(text, copy):
    assert near_copies([text], [QUESTION]) == near_copies([QUESTION], [text]) == [copy]


@pytest.mark.parametrize(
    "one, other, copy",
    [
        ("Name four fruits.", "name  four\nfruits", True),
        ("man bites dog today", "hi , man bites dog today", True),
        ("fruit", "Fruit!", True),
        ("fruit", "animal", False),
        ("fruit", "fruit juice", False),
        ("caf\u00e9 STRASSE", "cafe\u0301 stra\u00dfe", True),
        ("don't stop me now please", "don\u2019t stop me now please", True),
        ("?!", "?!", True),  # all that there is
        ("?!", "...", False),
        ("ha ha ha ha ha ha ha ha", "ha ha", True),  # nothing but one word
        ("请告诉我今天北京的天气怎么样。", "你好!请告诉我今天北京的天气怎么样?", True),
        ("请告诉我今天北京的天气怎么样。", "请告诉我明天上海的股票怎么样。", False),
        ("tell me a story about a fox and a hen at sea", "tell me a story about a cow and a pig in town", False),
    ],
)
def test_case_and_punctuation_do_not_count(one, other, copy):
    assert near_copies([one], [other]) == near_copies([other], [one]) == [copy]


def test_only_the_users_turns_of_a_conversation_count():
    talk = [
        {"role": "system", "content": "You know animals and their colors well ."},
        {"role": "user", "content": "What color is the fox?"},
        {"role": "assistant", "content": "It is red, as everybody knows who ever met one."},
        {"role": "user", "content": "And what does it eat?"},
    ]
    assert near_copies([talk, talk[:2]], ["what color is the fox and what does it eat"]) == [True, False]
    assert near_copies(["What color is the fox? And what does it eat?"], [tuple(talk)]) == [True]


def test_the_first_of_equals_is_named_and_empty_texts_have_no_copy():
    assert nearest_copies(["a b", "c", "a B"], ["d", "A b", "a b!"]) == [1, None, 1]
    assert near_copies([], ["a"]) == near_copies([], []) == [] and near_copies(["a", "b"], []) == [False, False]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match="use a number above 0 and at most 1"):
        near_copies(["a"], ["a"], threshold)
