"""The page's pure functions, in the browser: differences of words, moves, invisible characters."""

import difflib
import random

import pytest

from stages.people.rank.drafts import Move, fold

RUN = """async ([file, name, ...values]) => (await import(`/static/${file}`))[name](...values)"""


@pytest.fixture
def call(serve, visit):
    """Return what calls a function of a script of the page."""
    window = visit(serve([]))
    window.get_by_label("Your name").wait_for()
    return lambda file, name, *values: window.evaluate(RUN, [file, name, *values])


def test_words_are_the_whole_text(call):
    for text in ("", "a", " a  b\n", "It's 3.5 %, isn't it? naïve-ish 你好 👩‍👧", "--\t--"):
        assert "".join(call("diff.js", "words", text)) == text


def test_what_differs_is_what_a_second_route_finds(call):
    """The words without marks are a longest common subsequence, on both sides the same."""
    drawn = random.Random(3)
    for _ in range(40):
        left = [drawn.choice("abcde") for _ in range(drawn.randrange(12))]
        right = [drawn.choice("abcde") for _ in range(drawn.randrange(12))]
        only = call("diff.js", "differing", left, right)
        kept_left = [word for word, is_only in zip(left, only["left"], strict=True) if not is_only]
        kept_right = [word for word, is_only in zip(right, only["right"], strict=True) if not is_only]
        assert kept_left == kept_right and len(kept_left) == longest_common(left, right)


def longest_common(left, right):
    """Return the length of a longest common subsequence, by the table of all prefixes."""
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_a_changed_phrase_in_a_long_text_is_one_mark(call):
    text = " ".join(f"word{n}" for n in range(3_000))
    left, right = (call("diff.js", "words", one) for one in (text, text.replace("word7 word8", "quite new")))
    only = call("diff.js", "differing", left, right)
    assert "".join(w for w, o in zip(left, only["left"], strict=True) if o) == "word7 word8"
    assert "".join(w for w, o in zip(right, only["right"], strict=True) if o) == "quite new"


def test_texts_without_anything_in_common_are_marked_whole_and_soon(call):
    left, right = [f"a{n}" for n in range(5_000)], [f"b{n}" for n in range(5_000)]
    only = call("diff.js", "differing", left, right)
    assert all(only["left"]) and all(only["right"])
    assert difflib.SequenceMatcher(a=left, b=right).ratio() == 0


def test_moves_do_on_the_page_what_they_do_on_the_server(call):
    """Random moves give one draft in JavaScript and in Python."""
    drawn = random.Random(5)
    for answers in ([11, 12], [1, 2, 3, 4], list(range(1, 10))):
        for _ in range(6):
            draft = call("draft.js", "padded", {}, len(answers))
            made = []
            for _ in range(25):
                move = random_move(drawn, answers, draft)
                made.append(move)
                draft = call("draft.js", "applyMove", draft, move.kind, move.body)
                assert len(draft["tiers"]) == len(answers)
            assert draft == fold(made, answers).as_json()


def random_move(drawn, answers, draft):
    """Return a move that a person could make now."""
    answer, other = drawn.sample(answers, 2)
    has_place = any(other in tier for tier in draft["tiers"])
    kinds = ["place", "place", "insert", "insert", "out", "aside", "unaside", "likert", "flag", "confidence", "note"]
    kind = drawn.choice([*kinds, "same", "same"] if has_place else kinds)
    if kind == "insert":
        tier = drawn.randrange(len(answers))
        return Move("place", {"answer": answer, "tier": tier, "new": True})
    bodies = {
        "place": {"answer": answer, "tier": drawn.randrange(len(answers))},
        "out": {"answer": answer, "tier": None},
        "same": {"answer": answer, "as": other},
        "aside": {"answer": answer},
        "unaside": {"answer": answer},
        "likert": {"answer": answer, "overall": drawn.randrange(1, 8)},
        "flag": {"answer": answer, "flag": "rude", "value": drawn.random() < 0.5},
        "confidence": {"value": drawn.randrange(1, 6)},
        "note": {"text": drawn.choice(["", "a note"])},
    }
    return Move("place" if kind == "out" else kind, bodies[kind])


def test_a_short_label_shows_the_first_words(call):
    assert call("text.js", "snippet", "one\n two\u200b\u202e three", 60) == "one two three"
    assert call("text.js", "snippet", "👩" * 50, 10) == "👩" * 10 + "…"
