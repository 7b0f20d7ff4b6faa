"""Test records: what is accepted, the words for each error, and that writing reads back."""

import hashlib
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import records
from data.error_lines import shorten
from data.files.reading import Reading
from data.files.rows import file_rows
from data.parsing import parse_demonstration, parse_document, parse_prompt, parse_ranking
from data.records import Demonstration, Document, Prompt, Ranking, write_jsonl
from data.source import Source
from data.sources import load
from pipeline.errors import UserError

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True, database=None)

filled = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
turns = st.lists(st.tuples(filled, filled), max_size=2)


@st.composite
def prompts(draw):
    if draw(st.booleans()):
        return draw(filled)
    messages = [{"role": "system", "content": draw(filled)}] if draw(st.booleans()) else []
    for asked, answered in draw(turns):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return (*messages, {"role": "user", "content": draw(filled)})


@st.composite
def rankings(draw):
    responses = draw(st.lists(st.text(), min_size=2, max_size=9, unique=True))
    rank = st.none() | st.integers(1, len(responses))
    ranks = [1, 2] + [draw(rank) for _ in responses[2:]]
    ended = st.lists(st.booleans(), min_size=len(ranks), max_size=len(ranks)).map(tuple)
    extra = {"labeler": draw(st.none() | filled), "finished": draw(st.none() | ended)}
    return Ranking(draw(filled), draw(prompts()), tuple(responses), tuple(ranks), **extra)


ROWS = {
    "demonstrations": st.builds(Demonstration, prompts(), filled),
    "rankings": rankings(),
    "documents": st.builds(Document, filled),
    "prompts": st.builds(Prompt, prompts()),
}


@pytest.mark.parametrize("kind", ROWS)
def test_written_records_read_back_equal(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp(kind) / "rows.jsonl"

    @SETTINGS
    @given(ROWS[kind])
    def round_trip(record):
        write_jsonl(path, [record])
        assert load(kind, Source(path, templated="keep")) == [record]
        assert path.read_bytes().count(b"\n") == 1

    round_trip()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [Document("old")])

    def rows():
        yield Document("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, rows())
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    assert load("documents", Source(path)) == [Document("old")]


def test_prompts_are_the_same_by_roles_and_words():
    key = records.prompt_key
    assert key("a  b\n") == key("a b") == key([{"role": "user", "content": "a b"}])
    assert key("caf\u00e9") == key("cafe\u0301")
    assert key("a b") != key("ab") != key("Ab")
    assert key([{"role": "system", "content": "x"}, {"role": "user", "content": "a"}]) != key("a")
    assert records.as_messages("hi") == [{"role": "user", "content": "hi"}]


@SETTINGS
@given(rankings())
def test_k_choose_2_pairs_get_a_verdict(ranking):
    pairs = list(records.judged_pairs(ranking))
    k = len(ranking.responses)
    assert len({frozenset(p[:2]) for p in pairs}) == len(pairs) == k * (k - 1) // 2
    for i, j, verdict in pairs:
        if verdict == "usable":
            assert ranking.ranks[i] < ranking.ranks[j]


def test_verdicts():
    ranking = Ranking("x", "p", ("a", "b", "a", "c", "d"), (2, 1, 1, 1, None))
    assert sorted(records.judged_pairs(ranking)) == [
        (0, 2, "identical"), (0, 4, "unjudged"), (1, 0, "usable"), (1, 2, "tie"), (1, 3, "tie"),
        (1, 4, "unjudged"), (2, 3, "tie"), (2, 4, "unjudged"), (3, 0, "usable"), (3, 4, "unjudged"),
    ]  # fmt: skip


def test_a_text_that_is_finished_and_the_same_text_cut_off_are_two_responses():
    ranking = Ranking("x", "p", ("a", "a", "a"), (1, 2, 3), finished=(True, False, False))
    assert list(records.judged_pairs(ranking)) == [(0, 1, "usable"), (0, 2, "usable"), (1, 2, "identical")]
    assert Ranking("x", "p", ("a", "b"), (1, 2)).answers == (("a", True), ("b", True))


# ── files: every error with its location ─────────────────────────────────────────────────────────

GOOD = b'{"text": "fine"}\n'


def read_jsonl(path) -> list:
    """Return the values of all rows; UserError with every error."""
    reading = Reading()
    values = [value for _, value in file_rows(path, reading)]
    if reading.errors:
        raise UserError(shorten(reading.errors))
    return values


def errors_of(tmp_path, content: bytes) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    return [line.removeprefix(f"{path}:") for line in caught.value.lines]


@pytest.mark.parametrize(
    "content, place, words",
    [
        (GOOD + b'{"text": oops}\n' + GOOD, "2: ", "invalid JSON: Expecting value at column 10"),
        (GOOD + b"{'text': 1}\n", "2: ", "invalid JSON"),
        (GOOD + b'{"text": "a\tb"}\n', "2: ", "invalid JSON: Invalid control character at column 12; one"),
        (GOOD + GOOD.strip() + b" " + GOOD, "2: ", "more text after column 16"),
        (GOOD + b'{"text": "fi', "2: ", "the last line is cut off"),
        (GOOD + b'{"text": "caf\xc3', "2: ", "cut off (not UTF-8: byte 0xc3 at byte offset 30)"),
        (GOOD + b'{"text": "caf\xe9"}\n', "2: ", "not UTF-8: byte 0xe9 at byte offset 30"),
        (GOOD + b'{"text": "a\0b"}\n', "2: ", "a NUL byte at byte offset 28"),
        ('{"text": "a"}\n'.encode("utf-16"), "1: ", "UTF-16 from byte offset 0"),
        ('{"text": "a"}\n'.encode("utf-16-be"), "1: ", "NUL bytes from byte offset 0 on"),
        ('{"text": "a"}\n'.encode("utf-16-le"), "1: ", "NUL bytes from byte offset 1 on"),
        (b"\x1f\x8b\x08\x00", " ", "gzip"),
        (b"", " ", "the file is empty"),
        (b"\xef\xbb\xbf", " ", "the file is empty"),
        (b"\n \r\n\t\n", " ", "only blank lines"),
        (GOOD + b'{"text": "a", "text": "b"}\n', "2: ", "the key 'text' occurs twice"),
        (GOOD + b'{"text": "a", "meta": {"n": NaN}}\n', "2: ", "NaN is not a JSON number"),
        (GOOD + b'{"text": "a", "meta": -Infinity}\n', "2: ", "-Infinity is not a JSON number"),
        (GOOD + b'{"text": "a", "meta": 1e999}\n', "2: ", "1e999 is not a JSON number"),
        (GOOD + b'{"text": "\\ud83d"}\n', "2: ", "occurs without its other half"),
        (GOOD + b'{"text": ' + b"[" * 200_000 + b"\n", "2: ", "nested too deeply"),
        (b"[]", "1: ", "the array is empty"),
        (b'[\n{"text": "a"},\n{"text": }\n]', "3: index 1: ", "invalid JSON: Expecting value at column 10"),
        (b'[\n{"text": "a"},\n{"text": "b"\n', "3: index 1: ", "the file is cut off"),
        (b'[\n{"text": "a"},\n{"text": "b', "3: index 1: ", "the file is cut off"),
        (b'[\n{"text": "a"},\n{"text": "b"}\n', "3: index 1: ", "the file is cut off"),
        (b'[\n{"text": "a"},\n', "2: index 1: ", "the file is cut off"),
        (b'[\n{"text": "a"}\n{"text": "b"}]', "3: index 0: ", "'{' after the row"),
        (b'[{"text": "a"}]\n[]', "1: index 0: ", "text after the array"),
        (b'[\n{"text": "a"},\n{"a": 1, "a": 2}]', "3: index 1: ", "the key 'a' occurs twice"),
        (b'[\n{"text": "a"},\n{"a": "\xff"}]', "3: ", "not UTF-8: byte 0xff at byte offset 24"),
    ],
)
def test_errors_of_a_file_name_their_location(tmp_path, content, place, words):
    [line] = errors_of(tmp_path, content)
    assert line.startswith(place) and words in line


def test_a_file_may_have_a_byte_order_mark_blank_lines_and_escapes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\n  \n{"text": "\\ud83d\\ude00"}')
    assert read_jsonl(path) == [{"text": "a\u2028b"}, {"text": "😀"}]
    path.write_bytes(b'\xef\xbb\xbf\n [ {"text": "a"},\r\n\r\n"b"] \n')
    assert read_jsonl(path) == [{"text": "a"}, "b"]
    reading = Reading()
    locations = [location for location, _ in file_rows(path, reading)]
    assert locations == [f"{path}:2: index 0", f"{path}:4: index 1"]


def test_a_missing_file_and_an_empty_folder_are_one_line_each(tmp_path):
    for path, words in ((tmp_path / "none.jsonl", "cannot be read"), (tmp_path, "the folder holds no files")):
        with pytest.raises(UserError) as caught:
            read_jsonl(path)
        assert caught.value.lines[0].startswith(f"{path}: {words}")


def test_up_to_twenty_errors_are_shown_at_once(tmp_path):
    rows = b"".join(b'{"text": "a", "text": %d, "k%d": 1, "k%d": 2}\n' % (i, i, i) for i in range(53))
    lines = errors_of(tmp_path, rows.replace(b'"text": "a", ', b""))
    assert len(lines) == 21 and lines[19].startswith("20: ") and lines[20].startswith(" and 33 more errors; fix")


def test_the_same_error_in_many_rows_is_one_line(tmp_path):
    (line,) = errors_of(tmp_path, b"oops\n" * 53)
    assert line.startswith("1: invalid JSON") and line.endswith("(the same in 52 more rows, the last at line 53)")


@SETTINGS
@given(st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)))
def test_the_array_reader_agrees_with_json(values):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        path.write_text(json.dumps([*values, 1], indent=1), encoding="utf-8")
        assert read_jsonl(path) == [*values, 1]


# ── rows: every error with its remedy ────────────────────────────────────────────────────────────

DEMONSTRATION, DOCUMENT = parse_demonstration, parse_document
PROMPT, RANK = parse_prompt, parse_ranking
RANKING = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}


@pytest.mark.parametrize(
    "make, row, words",
    [
        (DEMONSTRATION, {"prompt": "p"}, "'completion' is missing"),
        (DEMONSTRATION, {"prompt": "p", "completion": None}, "'completion' is null"),
        (DEMONSTRATION, {"prompt": "p", "completion": 3}, "'completion' is 3"),
        (DEMONSTRATION, {"prompt": "p", "completion": " \n"}, "'completion' is blank"),
        (DEMONSTRATION, {"prompt": "", "completion": "c"}, "'prompt' is blank"),
        (DOCUMENT, {"text": ["a"]}, "'text' is a list"),
        (DOCUMENT, {"text": " "}, "'text' is blank"),
        (PROMPT, {"prompt": {}}, "'prompt' is an object"),
        (PROMPT, {"prompt": []}, "the prompt has no messages"),
        (PROMPT, {"prompt": ["hi"]}, "message 1 is 'hi'"),
        (PROMPT, {"prompt": [{"role": "bot", "content": "x"}]}, "the role of message 1 is 'bot'"),
        (PROMPT, {"prompt": [{"content": "x"}]}, "the role of message 1 is missing"),
        (PROMPT, {"prompt": [{"role": "user", "content": None}]}, "content of message 1 is null"),
        (PROMPT, {"prompt": [{"role": "user", "content": " "}]}, "content of message 1 is blank"),
        (
            PROMPT,
            {"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "the prompt ends with the assistant's message",
        ),
        (
            PROMPT,
            {"prompt": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"},
                        {"role": "user", "content": "z"}]},
            "a system message comes after the first message",
        ),
        (RANK, {**RANKING, "responses": ["a"], "ranks": [1]}, "needs at least 2 responses, not 1"),
        (RANK, {**RANKING, "responses": "ab"}, "'responses' is 'ab'"),
        (RANK, {**RANKING, "responses": ["a", None]}, "response 2 is null"),
        (RANK, {**RANKING, "ranks": [1]}, "2 responses, 1 ranks"),
        (RANK, {"prompt": "p", "responses": ["a", "b"]}, "'ranks' is missing"),
        (RANK, {**RANKING, "ranks": [0, 1]}, "the ranks go from 0 to 1"),
        (RANK, {**RANKING, "ranks": [1, 2.5]}, "rank 2 is 2.5"),
        (RANK, {**RANKING, "ranks": [1, True]}, "rank 2 is true"),
        (RANK, {**RANKING, "ranks": [1, "2"]}, "rank 2 is '2'"),
        (RANK, {**RANKING, "labeler": True}, "'labeler' is true"),
        (RANK, {**RANKING, "margin": -1}, "'margin' is -1"),
        (RANK, {**RANKING, "margin": "sure"}, "'margin' is 'sure'"),
        (RANK, {**RANKING, "finished": True}, "'finished' is true"),
        (RANK, {**RANKING, "finished": [True]}, "2 responses, 1 in 'finished'"),
        (RANK, {**RANKING, "finished": [True, None]}, "entry 2 of 'finished' is null"),
        (RANK, {**RANKING, "finished": [1, False]}, "entry 1 of 'finished' is 1"),
        (RANK, {**RANKING, "finished": ["false", False]}, "entry 1 of 'finished' is 'false'"),
        (RANK, {**RANKING, "id": ""}, "'id' is blank"),
        (RANK, {**RANKING, "id": True}, "'id' is true"),
    ],
)  # fmt: skip
def test_errors_of_a_row_say_what_to_do(make, row, words):
    with pytest.raises(ValueError) as caught:
        make(row)
    what, _, remedy = str(caught.value).partition("; ")
    assert words in what and remedy


def test_rankings_may_have_ties_blank_answers_and_k_of_9():
    row = {"prompt": "p", "responses": [*"abcdefgh", ""], "ranks": [1, 1, None, 2, 3, 4, 5, 6, 9], "id": 7}
    ranking = parse_ranking(row)
    assert ranking.id == "7" and len(ranking.responses) == 9 and ranking.ranks[2] is None


def test_a_missing_id_is_made_from_the_content():
    first, again = parse_ranking(RANKING), parse_ranking({**RANKING, "meta": 1})
    other = parse_ranking({**RANKING, "ranks": [2, 1]})
    as_messages = parse_ranking({**RANKING, "prompt": [{"role": "user", "content": "p"}]})
    assert first.id == again.id == as_messages.id != other.id
    content = b'[[{"content": "p", "role": "user"}], ["a", "b"], [1, 2], null]'
    assert first.id == hashlib.sha256(content).hexdigest()[:16]
    ended, cut = (parse_ranking({**RANKING, "finished": [True, last]}) for last in (True, False))
    assert (ended.id, cut.finished) == (first.id, (True, False)) and cut.id != first.id  # what goes without saying


@SETTINGS
@given(prompts())
def test_a_string_has_the_key_of_the_one_message_that_it_is(prompt):
    turns = [[message["role"], message["content"]] for message in records.as_messages(prompt)]
    plain = [[role, " ".join(unicodedata.normalize("NFC", content).split())] for role, content in turns]
    key = records.prompt_key(prompt)
    assert key == records.prompt_key(records.as_messages(prompt)) == json.dumps(plain, ensure_ascii=False)
