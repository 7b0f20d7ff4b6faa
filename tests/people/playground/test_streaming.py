"""Check that pieces of text are never taken back, whatever tokens split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.people.playground.streaming import TextStream, cut_at_stop


def stream(raw: bytes, stops=()):
    """Push a text byte by byte; return the stream and its pieces."""
    found = TextStream(lambda ids: bytes(ids).decode("utf-8", "replace"), stops)
    pieces = []
    for byte in raw:
        pieces.append(found.push(byte))
        if found.stopped:
            break
    return found, pieces


@given(st.text(max_size=30))
def test_pieces_join_to_the_whole_text(text):
    found, pieces = stream(text.encode())
    pieces.append(found.finish(text.strip()))
    assert "".join(pieces) == text.strip()


@given(st.text("ab\n ", max_size=30), st.lists(st.text("ab\n ", min_size=1, max_size=3), max_size=3))
def test_nothing_of_a_stop_text_is_shown(text, stops):
    found, pieces = stream(text.encode(), stops)
    cut = cut_at_stop(text, stops)
    whole = (text if cut is None else cut).strip()
    assert found.stopped == (cut is not None)
    assert "".join([*pieces, found.finish(whole)]) == whole


def test_half_a_character_waits_for_its_other_half():
    _, pieces = stream("狐!".encode())
    assert pieces == ["", "", "狐", "!"]


@pytest.mark.parametrize(("text", "stops", "cut"), [("a b", ["b"], "a "), ("abc", ["c", "b"], "a"), ("a", ["b"], None)])
def test_cut(text, stops, cut):
    assert cut_at_stop(text, stops) == cut
