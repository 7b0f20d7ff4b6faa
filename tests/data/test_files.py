"""Test files: every format, packed in every way, in folders and globs; and each refusal."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.files import paths, scanner
from data.files.reading import Reading
from data.files.rows import file_rows
from data.files.strict_json import strict_decoder
from pipeline.errors import UserError
from pipeline.store.digests import Digests

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, database=None)
ROWS = [{"prompt": "a é", "chosen": "b,\nc"}, {"prompt": 'say "d"', "chosen": "e"}, {"prompt": "f", "chosen": "g"}]


def zstd_of(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd_of}


def delimited(rows, delimiter):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows, **options):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def arrow(rows, new=pyarrow.ipc.new_file):
    sink, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


WRITE = {
    "rows.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "wrapped.json": lambda rows: json.dumps({"version": "1", "data": rows}, indent=1).encode(),
    "line.json": lambda rows: json.dumps({"version": "1", "data": rows}).encode(),
    "columns.json": lambda rows: json.dumps({key: [row[key] for row in rows] for key in rows[0]}).encode(),
    "printed.json": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    "rows.csv": lambda rows: delimited(rows, ","),
    "rows.tsv": lambda rows: delimited(rows, "\t"),
    "rows.parquet": parquet,
    "rows.arrow": arrow,
    "stream.arrow": lambda rows: arrow(rows, pyarrow.ipc.new_stream),
}


def read(path, **options):
    """Return the locations without the path, and the values; UserError with every error line."""
    reading = Reading(**options)
    found = list(file_rows(path, reading))
    if reading.errors:
        raise UserError(reading.errors)
    return [location.removeprefix(str(path)) for location, _ in found], [value for _, value in found]


def line_of(path, **options):
    """Return the only error line of a path, without the path."""
    with pytest.raises(UserError) as caught:
        read(path, **options)
    [line] = caught.value.lines
    assert line.startswith(str(path)) and "; " in line and "\n" not in line
    return line.removeprefix(str(path))


def written(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ── every format, packed in every way ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", WRITE)
def test_every_format_is_read_however_it_is_packed(tmp_path, name, suffix):
    path = written(tmp_path, name + suffix, PACK[suffix](WRITE[name](ROWS)))
    reading = Reading(hashes=True)
    assert [value for _, value in file_rows(path, reading)] == ROWS and not reading.errors
    assert reading.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == Digests().facts(path).sha256


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", WRITE)
def test_the_digest_is_that_of_the_whole_file_where_reading_stops_early(tmp_path, name, suffix):
    path = written(tmp_path, name + suffix, PACK[suffix](WRITE[name](ROWS * 700)))
    reading = Reading(hashes=True)
    rows = file_rows(path, reading)
    assert next(rows)[1] == ROWS[0]
    rows.close()
    assert reading.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and not reading.errors


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["book.txt", "book.md"])
def test_a_text_file_is_one_document(tmp_path, name, suffix):
    text = "# Title\n\n[1] One.\n\n{two}\n"
    path = written(tmp_path, name + suffix, PACK[suffix](b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()))
    assert read(path) == ([":1"], [{"text": text}])


@pytest.mark.parametrize("suffix", list(PACK)[1:])
def test_the_first_bytes_tell_how_a_file_is_packed_whatever_its_name(tmp_path, suffix):
    packed = PACK[suffix](WRITE["rows.jsonl"](ROWS))
    assert read(written(tmp_path, "rows.jsonl", packed))[1] == ROWS
    assert read(written(tmp_path, "rows.jsonl.gz", packed))[1] == ROWS
    assert read(written(tmp_path, "plain.jsonl" + suffix, WRITE["rows.jsonl"](ROWS)))[1] == ROWS
    assert read(written(tmp_path, "rows.json", parquet(ROWS)))[1] == ROWS


@pytest.mark.parametrize("suffix", list(PACK)[1:])
def test_a_packed_file_that_is_cut_off_or_damaged_is_one_line(tmp_path, suffix):
    rows = [{"text": hashlib.sha256(bytes([i, j])).hexdigest()} for i in range(20) for j in range(100)]
    text = "".join(row["text"] + "\n" for row in rows).encode()
    for name in ("rows.jsonl", "rows.json", "wrapped.json", "rows.csv", "rows.txt", "rows.parquet"):
        packed = PACK[suffix](WRITE[name](rows) if name in WRITE else text)
        half, damaged = packed[: len(packed) // 2], packed[:2000] + bytes(2000) + packed[4000:]
        # A frame of zstd without a checksum may give other bytes in place of the damaged ones.
        for content in (half, damaged) if suffix != ".zst" else (half,):
            path = written(tmp_path, name + suffix, content)
            reading = Reading(hashes=True)
            list(file_rows(path, reading))
            assert reading.errors[-1].startswith(f"{path}: cannot be unpacked (")
            assert reading.sha256 == hashlib.sha256(content).hexdigest()


def test_several_members_in_a_row_are_read(tmp_path):
    for pack in (gzip.compress, bz2.compress, lzma.compress, zstd_of):
        halves = pack(b'{"a": 1}\n') + pack(b'{"a": 2}\n')
        assert read(written(tmp_path, "rows.jsonl", halves))[1] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("rows.jsonl.gz", gzip.compress(gzip.compress(b'{"a": 1}', mtime=0), mtime=0), "compressed twice"),
        ("rows.zip", b"PK\x03\x04" + bytes(30), "zip"),
        ("rows.jsonl", b"PK\x03\x04" + bytes(30), "zip"),
        ("rows.tar.gz", gzip.compress(b"a" + bytes(256) + b"ustar\0", mtime=0), "tar archive"),
        ("rows.jsonl", b"\x80\x04\x95", "pickle"),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        ("rows.jsonl", b"\n<!DOCTYPE html><html></html>", "web page"),
        ("rows.csv", b"<html>,a\n", "web page"),
        ("rows.db", b"SQLite format 3\0", "SQLite"),
        ("rows.parquet", b"PARE" + bytes(30), "encrypted"),
        ("rows.parquet", b'{"a": 1}\n', "not readable as parquet"),
        ("rows.parquet", parquet(ROWS)[:-20], "not readable as parquet"),
        ("rows.arrow", arrow(ROWS)[:-40], "not readable as arrow"),
        ("rows.arrow", arrow(ROWS, pyarrow.ipc.new_stream)[:-60], "not readable as arrow"),
        ("rows.arrow", b"oops", "not readable as arrow"),
        ("rows.txt", b"", "the file is empty"),
        ("rows.txt", b" \n\n", "only blank lines"),
        ("rows.txt", b'{"text": "a"}\n{"text": "b"}\n', "holds JSON"),
        ("rows.md", b'[\n{"text": "a"}]\n', "holds JSON"),
        ("rows.txt", b"a\n\xff\n", "2: not UTF-8: byte 0xff at byte offset 2"),
        ("rows.txt", "a".encode("utf-16"), "1: UTF-16"),
        ("rows.md", b"a\nb\0\n", "2: a NUL byte at byte offset 3"),
    ],
)
def test_files_that_cannot_be_read_say_what_they_are(tmp_path, name, content, words):
    assert words in line_of(written(tmp_path, name, content))


def test_a_web_page_as_a_document_is_a_text(tmp_path):
    assert read(written(tmp_path, "page.txt", "<html>x</html>"))[1] == [{"text": "<html>x</html>"}]


# ── CSV and TSV ──────────────────────────────────────────────────────────────────────────────────


def test_cells_are_strings_and_an_empty_one_is_a_missing_key(tmp_path):
    text = '\ufeffprompt,score,parts\r\n"a\r\nb",1.50,"[""x"", 1]"\r\n\r\nc,,\r\n d ,NaN,null\r\n'
    reading = Reading()
    path = written(tmp_path, "rows.csv", text)
    assert list(file_rows(path, reading)) == [
        (f"{path}:2", {"prompt": "a\r\nb", "score": "1.50", "parts": '["x", 1]'}),
        (f"{path}:5", {"prompt": "c"}),
        (f"{path}:6", {"prompt": " d ", "score": "NaN", "parts": "null"}),
    ]
    assert (reading.errors, reading.blanks, reading.format) == ([], 1, "csv")


def test_a_long_cell_is_read(tmp_path):
    long = "a" * 300_000
    assert read(written(tmp_path, "rows.csv", f"text\n{long}\n"))[1] == [{"text": long}]


def test_the_index_that_pandas_writes_is_left_out(tmp_path):
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "rows.csv"
    pandas.DataFrame(ROWS).to_csv(path)
    assert read(path)[1] == ROWS
    assert "2: column 1 has no name" in line_of(written(tmp_path, "rows.csv", ",a\nx,b\n"))


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("rows.csv", "", ": the file is empty"),
        ("rows.csv", "a,b\n1,2\n1,2,3\n", ":3: 3 cells, and the first line names 2 columns"),
        ("rows.csv", 'a,b\n"1\n1",2\n1\n', ":4: 1 cells"),
        ("rows.csv", "a,b,a\n1,2,3\n", ":1: two columns are named 'a'"),
        ("rows.csv", "a,,c\n1,2,3\n", ":1: column 2 has no name"),
        ("rows.csv", 'a,b\n1,"x"y\n', ":2: not valid CSV"),
        ("rows.csv", 'a,b\n1,2\n"x,y\n', ":3: not valid CSV: unexpected end of data"),
        ("rows.tsv", 'a\tb\n1\t"x"y\n', ":2: not valid TSV"),
        ("rows.csv", "a;b\n1;2\n", ":1: the columns are separated by a semicolon"),
        ("rows.csv", "a\tb\n1\t2\n", ":1: the columns are separated by a tab; name the file .tsv"),
        ("rows.tsv", "a,b\n1,2\n", ":1: the columns are separated by a comma"),
        ("rows.csv", '{"a": 1}\n', ":1: holds JSON"),
        ("rows.csv", "a,b\n1,\0\n", ":2: a NUL byte at byte offset 6"),
        ("rows.csv", b"a,b\n1,2\ncaf\xe9,2\n", ":3: not UTF-8: byte 0xe9 at byte offset 11"),
        ("rows.csv", "a,b\n1,2\n".encode("utf-16"), ":1: UTF-16"),
    ],
)
def test_damaged_tables_of_text_name_the_line(tmp_path, name, text, words):
    assert words in f":{line_of(written(tmp_path, name, text)).lstrip(':')}"


# ── parquet and Arrow ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name, write", [("rows.parquet", parquet), ("rows.arrow", arrow)])
def test_values_become_those_of_json(tmp_path, name, write):
    row = {
        "day": date(2024, 2, 3), "price": Decimal("1.50"), "rank": Decimal(2), "text": b"caf\xc3\xa9", "image": b"\xff",
        "messages": [{"role": "user", "content": "a", "tool_calls": None}], "ranks": [1, None], "none": None,
    }  # fmt: skip
    full = {**row, "none": "x", "messages": [{"role": "user", "content": "a", "tool_calls": "t"}]}
    path = written(tmp_path, name, write([row, full]))
    assert read(path)[1][0] == {
        "day": "2024-02-03", "price": 1.5, "rank": 2, "text": "café", "image": b"\xff",
        "messages": [{"role": "user", "content": "a"}], "ranks": [1, None],
    }  # fmt: skip


def test_what_pandas_adds_to_parquet_is_left_out(tmp_path):
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "rows.parquet"
    pandas.DataFrame({"text": ["a", None], "n": [1.0, 2.0]}, index=["x", "y"]).to_parquet(path)
    assert read(path) == ([": index 0", ": index 1"], [{"text": "a", "n": 1.0}, {"n": 2.0}])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_json_forbids_are_errors_in_parquet_too(tmp_path, bad):
    path = written(tmp_path, "rows.parquet", parquet([{"n": 1.0}, {"n": bad}]))
    assert line_of(path).startswith(f": index 1: {bad} is not a JSON number; use")


def test_parquet_is_read_by_batches(tmp_path, monkeypatch):
    path = written(tmp_path, "rows.parquet", parquet([{"n": i} for i in range(5000)], row_group_size=1000))
    locations, values = read(path)
    assert values == [{"n": i} for i in range(5000)] and locations[4999] == ": index 4999"


def test_a_table_that_is_edited_while_it_is_read_is_refused(tmp_path):
    path = written(tmp_path, "rows.parquet", parquet([{"n": i} for i in range(3000)], row_group_size=1000))
    reading = Reading()
    rows = file_rows(path, reading)
    next(rows)
    with open(path, "ab") as file:
        file.write(b"x")
    list(rows)
    assert reading.errors == [f"{path}: was edited while it was read; run again"]


# ── JSON documents ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "value",
    [
        {"data": ROWS},
        {"description": "d", "examples": ROWS, "num_rows": 3},
        {"train": ROWS},
        {"prompt": [row["prompt"] for row in ROWS], "chosen": [row["chosen"] for row in ROWS]},
        {key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ("prompt", "chosen")},
        {str(i): row for i, row in enumerate(ROWS)},
        {"columns": ["prompt", "chosen"], "index": [0, 1, 2], "data": [list(row.values()) for row in ROWS]},
        {"schema": {"fields": []}, "data": ROWS},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_in_an_object_and_columns_are_read(tmp_path, value, indent):
    assert read(written(tmp_path, "rows.json", json.dumps(value, indent=indent)))[1] == ROWS


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
        {"prompt": [{"role": "user", "content": "a"}], "responses": ["a", "b"], "ranks": [1, 2]},
        {"prompt": "a", "responses": ["a", "b"], "ranks": [1, 2]},
        {"instruction": "a", "instances": [{"input": "", "output": "b"}]},
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_a_row_with_lists_stays_a_row(tmp_path, row, times):
    assert read(written(tmp_path, "rows.jsonl", (json.dumps(row) + "\n") * times))[1] == [row] * times


def test_rows_in_an_object_have_line_and_index(tmp_path):
    text = '{\n "version": 2,\n "data": [\n  {"a": 1},\n  {"a":\n 2}\n ],\n "license": null\n}\n'
    assert read(written(tmp_path, "rows.json", text)) == ([":4: index 0", ":5: index 1"], [{"a": 1}, {"a": 2}])
    line = json.dumps({"version": "1", "data": [{"text": "a" * 100}] * 3000})
    locations, values = read(written(tmp_path, "rows.json", line))
    assert locations[2999] == ":1: index 2999" and len(values) == 3000


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', ": one object with the keys 'train', 'test'"),
        ('{\n"data": [{"a": 1}], "other": 3}', ": one object with the keys 'data', 'other'"),
        ('{"a": [1, 2], "b": [1]}', ": columns of different lengths: 'a' has 2, 'b' has 1"),
        ('{"columns": ["a"], "data": [[1], [1, 2]]}', ": 'columns' names 1 columns"),
        ('{\n"data": [{"a": 1}]\n}\n{"a": 2}', ":4: text after the object"),
        ('{\n"data": [{"a": 1},\n{"a": 2}', ":3: index 1: invalid JSON: the file is cut off after this row"),
        ('{\n"data": [{"a": 1},\n{"a": 2', ":3: index 1: the file is cut off"),
        ('{\n"data": [{"a": 1}\n', ":2: index 0: invalid JSON: the file is cut off after this row"),
        ('{\n"data": []\n', ":2: invalid JSON: the file is cut off"),
        ('{\n"a": 1,\n"a": 2}', ":1: the key 'a' occurs twice"),
        ('{\n"a": 1,\nb: 2}', ":3: invalid JSON: Expecting value at column 1"),
        ('{\n"a": 1,\n2: 3}', ":3: invalid JSON: a key is not a string"),
        ('{\n"a" 1}', ":2: invalid JSON: '1' after the key 'a'"),
        ('{\n"a": NaN}', ":1: NaN is not a JSON number"),
    ],
)
def test_documents_that_are_not_understood_name_what_they_hold(tmp_path, text, words):
    assert line_of(written(tmp_path, "rows.json", text)).startswith(words)


def test_null_is_a_missing_key_at_any_depth_but_keeps_its_place_in_lists(tmp_path):
    row = {"a": None, "b": [None, {"c": None, "d": 1}], "e": {"f": None}, "g": "null"}
    for name in ("rows.jsonl", "rows.json", "printed.json"):
        path = written(tmp_path, name, WRITE[name]([row, row]))
        assert read(path)[1] == [{"b": [None, {"d": 1}], "e": {}, "g": "null"}] * 2
    assert "occurs twice" in line_of(written(tmp_path, "twice.jsonl", '{"a": null, "a": 1}\n'))


@pytest.mark.parametrize("chunk", [1, 7, 2**18])
def test_an_array_is_the_same_whatever_is_read_at_a_time(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(scanner, "CHUNK", chunk)
    values = ["a é😀", 12, -3.5e10, True, {"a": [1, {"b": "\n\\"}], "😀": None}, [], "x" * 500, 0]
    path = written(tmp_path, "rows.json", json.dumps(values, indent=1, ensure_ascii=False))
    locations, read_values = read(path)
    assert read_values == pruned(values) and locations[:5] == [f":{2 + i}: index {i}" for i in range(5)]
    assert "cut off" in line_of(written(tmp_path, "cut.json", path.read_bytes()[:-1]))
    path = written(tmp_path, "rows.json", b'[\n"\xc3\xa9",\n"a",\n"\xff"]')
    reading = Reading()
    list(file_rows(path, reading))
    assert reading.errors == [f"{path}:4: not UTF-8: byte 0xff at byte offset 14; save the file as UTF-8"]


def test_a_long_array_is_not_held_as_a_whole(tmp_path):
    import tracemalloc

    path = written(tmp_path, "rows.json", json.dumps([{"text": "a" * 1000}] * 20_000, indent=0))
    tracemalloc.start()
    assert sum(1 for _ in file_rows(path, Reading(hashes=True))) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 4


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


def pruned(value):
    if isinstance(value, dict):
        return {key: pruned(item) for key, item in value.items() if item is not None}
    return [pruned(item) for item in value] if isinstance(value, list) else value


@SETTINGS
@given(json_values, st.booleans())
def test_the_strict_decoder_agrees_with_json(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert strict_decoder()(text, 0) == (pruned(value), len(text), None)


@SETTINGS
@given(st.lists(json_values, min_size=1, max_size=5), st.integers(1, 40), st.sampled_from([None, 1]))
def test_the_scanner_agrees_with_json(values, chunk, indent):
    text = json.dumps(values, ensure_ascii=False, indent=indent).encode()
    before, scanner.CHUNK = scanner.CHUNK, chunk
    try:
        from data.files.json_document import array_rows

        reading = Reading()
        handle = io.BufferedReader(io.BytesIO(text))
        found = [value for _, value in array_rows("f", scanner.Scanner(handle, 0), reading)]
    finally:
        scanner.CHUNK = before
    assert (found, reading.errors) == (pruned(values), [])


# ── folders and globs ────────────────────────────────────────────────────────────────────────────


def test_the_files_of_a_folder_are_read_in_the_order_of_their_paths(tmp_path):
    written(tmp_path, "README.md", "# About")
    written(tmp_path, ".cache/x.jsonl", '{"n": 9}\n')
    for name, number in (("b.jsonl", 3), ("a/2.jsonl.gz", 2), ("a/1.json", 1)):
        row = json.dumps({"n": number}).encode() + b"\n"
        written(tmp_path, name, gzip.compress(row) if name.endswith("gz") else row)
    reading = Reading(hashes=True)
    found = list(file_rows(tmp_path, reading))
    names = ["a/1.json", "a/2.jsonl.gz", "b.jsonl"]
    assert found == [(f"{tmp_path / name}:1", {"n": n}) for n, name in enumerate(names, 1)] and not reading.errors
    assert reading.sha256 == Digests().facts(tmp_path).sha256


def test_a_folder_of_texts_is_many_documents(tmp_path):
    for name in ("b.txt", "a.md", "test.txt"):
        written(tmp_path, name, name)
    assert read(tmp_path)[1] == [{"text": "a.md"}, {"text": "b.txt"}, {"text": "test.txt"}]


def test_a_glob_reads_what_it_matches(tmp_path):
    for number in (2, 1, 3):
        written(tmp_path, f"deep/{number}.jsonl", json.dumps({"n": number}))
    written(tmp_path, "deep/notes.bin", b"\0")
    for pattern in ("deep/*.jsonl", "**/*.jsonl", "*/[12]*", "deep/?.jsonl"):
        path = tmp_path / pattern
        reading = Reading(hashes=True)
        numbers = [value["n"] for _, value in file_rows(path, reading)]
        assert numbers == ([1, 2] if "[" in pattern else [1, 2, 3]) and not reading.errors
        facts = Digests().facts(path)
        assert reading.sha256 == facts.sha256 and facts.rows == len(numbers)
    before = Digests().facts(tmp_path / "deep/*.jsonl").sha256
    written(tmp_path, "deep/4.jsonl", "{}")
    assert Digests().facts(tmp_path / "deep/*.jsonl").sha256 != before
    assert "matches no file" in line_of(tmp_path / "none" / "*.jsonl")
    with pytest.raises(UserError, match="no file matches"):
        Digests().facts(tmp_path / "none" / "*.jsonl")


def test_a_name_with_brackets_is_a_file_where_there_is_one(tmp_path):
    path = written(tmp_path, "rows[1].jsonl", '{"n": 1}')
    assert read(path)[1] == [{"n": 1}] and Digests().facts(path).rows == 1


def test_the_digest_of_a_folder_is_complete_where_reading_stops_early_or_fails(tmp_path):
    for number in range(3):
        written(tmp_path, f"{number}.jsonl", '{"n": 1}\n' * 5)
    for stop in (1, 7):
        reading = Reading(hashes=True)
        rows = file_rows(tmp_path, reading)
        for _ in range(stop):
            next(rows)
        rows.close()
        assert reading.sha256 == Digests().facts(tmp_path).sha256
    written(tmp_path, "x.csv", "a\n1\n")
    reading = Reading(hashes=True)
    assert not list(file_rows(tmp_path, reading)) and reading.errors
    assert reading.sha256 == Digests().facts(tmp_path).sha256


@pytest.mark.parametrize(
    "names, words",
    [
        (["a.jsonl", "b.csv"], "files of several formats: csv (b.csv), json (a.jsonl); give one as a glob"),
        (["a.jsonl", "b.jsonl.part"], "not known as data: b.jsonl.part; give a glob"),
        (["a.bin"], "not known as data: a.bin"),
        (["README"], "not known as data"),
        ([], "the folder holds no files"),
        (["train-0.jsonl", "test-0.jsonl"], "files of several splits: test (test-0.jsonl), train (train-0.jsonl)"),
        (["rows.jsonl", "validation.jsonl"], "files of several splits: no split (rows.jsonl), validation"),
        (["train/0.parquet", "test/0.parquet"], "files of several splits"),
    ],
)
def test_a_folder_that_is_not_one_data_set_names_what_it_holds(tmp_path, names, words):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in names:
        written(folder, name, "{}")
    assert words in line_of(folder)


def test_one_split_of_a_folder_can_be_named(tmp_path):
    for split, number in (("train", 1), ("dev", 2), ("test", 3)):
        written(tmp_path, f"data/{split}-00000-of-00001.jsonl", json.dumps({"n": number}))
    assert read(tmp_path, split="validation")[1] == [{"n": 2}]
    assert read(tmp_path / "data" / "tr*")[1] == [{"n": 1}]
    assert "several splits" in line_of(tmp_path, split="other")


def test_a_split_that_no_file_has_is_refused(tmp_path):
    row = json.dumps({"n": 1})
    file, text = written(tmp_path, "rows.jsonl", row), written(tmp_path, "notes/a.txt", "text")
    only = written(tmp_path, "only/dev.jsonl", row)
    assert line_of(file, split="test").endswith("its name does not say test; leave split out")
    assert "no name of its files has the split test" in line_of(text.parent, split="test")
    assert "no files of the split test, only of validation" in line_of(only.parent, split="test")
    assert "its name does not say test" in line_of(only, split="test")
    for path in (only, only.parent):
        assert read(path, split="validation")[1] == [{"n": 1}] == read(path)[1]


def test_an_error_in_a_folder_names_the_file(tmp_path):
    written(tmp_path, "a.jsonl", "{}\n")
    path = written(tmp_path, "b.jsonl", "{}\noops\n")
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert caught.value.lines[0].startswith(f"{path}:2: invalid JSON")


def test_names_in_both_rooms_agree():
    """Check that data and pipeline find the same files, which neither may ask the other for."""
    from pipeline.store import digests

    assert paths.is_glob("a/*.json") and digests.is_glob(Path("a/*.json")) and not paths.is_glob("a.json")


# ── folders that `save_to_disk` wrote ────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(folder / "one", num_shards=2)
    datasets.DatasetDict(train=data).save_to_disk(folder / "only")
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(folder / "both")
    return folder


def test_a_saved_data_set_is_read(saved):
    reading = Reading(hashes=True)
    assert [value for _, value in file_rows(saved / "one", reading)] == ROWS and not reading.errors
    assert reading.sha256 == Digests().facts(saved / "one").sha256 and reading.format == "arrow"
    assert read(saved / "only")[1] == ROWS and read(saved / "both" / "test")[1] == ROWS[:1]


def test_a_saved_data_set_of_several_splits_names_their_paths(saved):
    both = saved / "both"
    assert line_of(both).endswith(f"holds the splits train, test; give one as the path: {both}/train, {both}/test")
    assert read(both, split="test")[1] == ROWS[:1] and "holds the splits" in line_of(both, split="validation")


def test_a_split_that_a_saved_data_set_is_not_is_refused(saved):
    assert "holds the splits train;" in line_of(saved / "only", split="test")
    assert "is the split train, and not test" in line_of(saved / "only" / "train", split="test")
    assert "is no split, and not test" in line_of(saved / "one", split="test")
    assert read(saved / "both" / "test", split="test")[1] == ROWS[:1]


def test_a_damaged_saved_data_set_is_one_line(saved, tmp_path):
    def copy(name):
        return Path(shutil.copytree(saved / "one", tmp_path / name))

    folder = copy("a")
    next(folder.glob("*.arrow")).unlink()
    assert "is missing; save the data set again" in line_of(folder)
    folder = copy("b")
    (folder / "state.json").write_text("oops")
    assert "state.json is damaged" in line_of(folder)
    folder = copy("c")
    (folder / "state.json").write_text('{"_data_files": []}')
    assert "names no data files" in line_of(folder)
    folder = copy("d")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    assert "names no data files" in line_of(folder)


def test_a_file_that_may_not_be_read_is_one_line(tmp_path):
    path = written(tmp_path, "rows.jsonl", "{}")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "cannot be read: Permission denied" in line_of(path)


# ── the Hub ──────────────────────────────────────────────────────────────────────────────────────


def hub(monkeypatch, rows, splits=("train",)):
    """Stand in for `datasets`; return the calls of load_dataset."""
    from types import SimpleNamespace

    calls = []

    def load_dataset(*names, **options):
        calls.append((names, options))
        if options["split"] not in splits:
            raise ValueError(f'Unknown split "{options["split"]}". Should be one of [...].')
        return iter(rows)

    fake = SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=lambda *_, **__: list(splits))
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    return calls


def test_parts_of_a_data_set_on_the_hub(monkeypatch):
    from data.files.hub import hub_rows

    calls = hub(monkeypatch, [{"a": 1, "b": None, "m": [{"x": None}]}, {"a": float("nan")}, {"a": 2}])
    reading = Reading()
    rows = list(hub_rows("o/n", "train", None, None, 5, reading, "data", "x*.jsonl"))
    assert rows == [("o/n train: index 0", {"a": 1, "m": [{}]}), ("o/n train: index 2", {"a": 2})]
    assert calls == [
        (("o/n", None), {"split": "train", "streaming": True, "data_dir": "data", "data_files": "x*.jsonl"})
    ]
    assert reading.errors == ["o/n train: index 1: nan is not a JSON number; use a finite number or null"]


def test_a_split_that_the_hub_does_not_have_names_those_it_has(monkeypatch):
    from data.files.hub import hub_rows

    hub(monkeypatch, [], ("train_sft", "test_sft"))
    reading = Reading()
    assert not list(hub_rows("o/n", "train", None, None, None, reading))
    assert reading.errors == ["o/n train: has no split 'train'; give one of train_sft, test_sft"]
