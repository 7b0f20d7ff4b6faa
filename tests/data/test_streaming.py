"""Test that sources read row by row give what they give as a whole, in bounded memory."""

import json
import random
from dataclasses import replace

import pytest

from data import row_reader
from data.records import prompt_key
from data.seen import Seen
from data.source import Loaded, Source
from data.sources import read, scan, stream
from data.streams import held_out, held_out_limit, position_of


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ranking(prompt, **more):
    return {"prompt": prompt, "responses": ["a fox", "a hen"], "ranks": [1, 2]} | more


def streamed(kind, source):
    loaded = Loaded()
    return [*stream(kind, source, loaded)], loaded


def counts(loaded):
    """Return everything but records and locations."""
    return {key: value for key, value in vars(loaded).items() if key not in ("records", "locations")}


@pytest.mark.parametrize("weights", [(None, None), (1, 1), (3, 1), (1, 5)])
def test_a_stream_gives_what_reading_gives(tmp_path, weights):
    one = written(tmp_path / "a.jsonl", *(ranking(f"a{i}") for i in range(9)), {"prompt": "bad"})
    two = written(tmp_path / "b.jsonl", *(ranking(f"b{i}", lang="en" if i % 3 else "de") for i in range(14)))
    parts = (
        Source(one, on_bad_row="drop", max_bad=0.2, weight=weights[0]),
        Source(two, skip=1, where={"lang": "en"}, weight=weights[1]),
    )
    for source in (*(replace(part, weight=None) for part in parts), Source(parts=parts)):
        whole = read("rankings", source)
        rows, loaded = streamed("rankings", source)
        assert [record for _, record in rows] == whole.records and rows
        assert [location for location, _ in rows] == whole.locations
        assert counts(loaded) == counts(whole) == counts(scan("rankings", source))
    assert loaded.filtered == 5 and len(loaded.dropped) == 1


def test_parts_of_a_mixture_may_use_the_same_ids(tmp_path):
    files = [written(tmp_path / f"{name}.jsonl", ranking(name, id="1"), ranking(name, id="2")) for name in "abc"]
    rows, loaded = streamed("rankings", Source(parts=tuple(map(Source, files))))
    ids = [record.id for _, record in rows]
    assert ids == ["1", "2", "1-2", "2-2", "1-3", "2-3"] and loaded.errors == []


def test_errors_of_a_part_are_those_of_the_stream(tmp_path):
    good, bad = written(tmp_path / "a.jsonl", ranking("a")), written(tmp_path / "b.jsonl", ranking("b"), {"prompt": ""})
    for weight in (None, 2.0):
        source = Source(parts=(Source(good), Source(bad, weight=weight)))
        _, loaded = streamed("rankings", source)
        assert {line.split(": ")[0] for line in loaded.errors} == {f"{bad}:2"}


def test_a_scan_finds_the_errors_of_the_whole_file(tmp_path):
    ties = written(tmp_path / "ties.jsonl", ranking("a", ranks=[1, 1]))
    assert scan("rankings", Source(ties)).errors == read("rankings", Source(ties)).errors != []
    twice = written(tmp_path / "twice.jsonl", *(ranking(f"{i}", id=f"{i % 300}") for i in range(301)))
    (line,) = scan("rankings", Source(twice)).errors
    assert line.startswith(f"{twice}:301: the id '0' is also used at {twice}:1;")
    noted = []
    many = written(tmp_path / "many.jsonl", *({"prompt": f"{i}"} for i in range(2100)))
    scan("prompts", Source(many), note=lambda *far: noted.append(far))
    assert noted == [(rows, 1.0) for rows in range(100, 2101, 100)]  # the file is read in one piece


def test_reading_stops_after_many_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(row_reader, "MOST_ERRORS", 3)
    file = written(tmp_path / "bad.jsonl", *(ranking("a") if i % 2 else {"prompt": ""} for i in range(20)))
    *errors, last = scan("rankings", Source(file)).errors
    assert [line.split(": ")[0] for line in errors] == [f"{file}:{i}" for i in (1, 3, 5)]
    assert last == f"{file}: not read after {file}:6: 3 errors are enough"


def test_seen_gives_locations_back():
    seen = Seen()
    places = ["a.jsonl:1", "a.jsonl:12", "b.jsonl:12", "b.parquet: index 0", "c.json:3: index 1", "d07", "e", "o/x: 10"]
    for place in places:
        assert place not in seen
        seen.add(f"key of {place}", place)
    assert [seen[f"key of {place}"] for place in places] == places
    assert "another key" not in seen


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("size", [1, 2, 300])
def test_rows_are_split_as_held_out_splits_them(fraction, size):
    rng = random.Random(size)
    keys = [prompt_key(f"prompt {rng.randint(0, size)}") for _ in range(size)]
    positions = [position_of(key) for key in keys]
    limit = held_out_limit(positions, fraction)
    assert [i for i, position in enumerate(positions) if position <= limit] == held_out(keys, fraction)[1]


def told(kind, source):
    """Return the (rows, share) that reading a source tells."""
    far = []
    assert list(stream(kind, source, Loaded(note=lambda *item: far.append(item))))
    return far


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "arrow", "jsonl.gz"])
def test_reading_tells_how_far_it_is_in_every_format(tmp_path, suffix):
    import datasets

    numbers = random.Random(0)
    texts = [" ".join(str(numbers.random()) for _ in range(15)) for _ in range(6000)]
    rows = datasets.Dataset.from_dict({"text": texts})
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        rows.to_parquet(file)
    elif suffix == "arrow":
        rows.save_to_disk(tmp_path / "saved")
        file = tmp_path / "saved"
    elif suffix == "csv":
        rows.to_csv(file)
    else:
        rows.to_json(file, compression="infer")
    far = told("documents", Source(file))
    assert [number for number, _ in far] == list(range(100, 6001, 100))
    shares = [share for _, share in far]
    assert shares == sorted(shares) and shares[0] < 0.3 and shares[-1] > 0.8
    assert len(set(shares)) > 4


def test_the_share_is_that_of_all_files_rows_and_parts(tmp_path):
    (tmp_path / "d").mkdir()
    one, two = (
        written(tmp_path / "d" / name, *({"prompt": f"{name} {i:03d}"} for i in range(300)))
        for name in ("a.jsonl", "b.jsonl")
    )
    assert told("prompts", Source(tmp_path / "d")) == [(i * 100, 0.5 if i <= 3 else 1.0) for i in range(1, 7)]
    assert told("prompts", Source(one, limit=400))[0] == (100, 1.0)  # the file is read in one piece
    mixed = told("prompts", Source(parts=(Source(one), Source(two))))
    assert mixed[-1] == (600, 1.0) and [share for _, share in mixed] == sorted(share for _, share in mixed)
    assert mixed[0] == (50, 0.25)  # half of the first of two passes


def test_a_part_that_could_not_be_counted_is_an_error(tmp_path, monkeypatch):
    """A data set on the Hub may fail while it is counted, and be there when it is read."""
    good, calls = written(tmp_path / "a.jsonl", ranking("a")), []

    def rows(hub, split, subset, revision, limit, reading, *_):
        calls.append(hub)
        if len(calls) == 1:
            reading.errors.append("org/name: the network; try again")
            return
        yield "org/name: index 0", ranking("b")

    monkeypatch.setattr("data.row_reader.hub_rows", rows)
    items, loaded = streamed("rankings", Source(parts=(Source(good), Source(hub="org/name"))))
    assert items == [] and any("the network" in line for line in loaded.errors)
