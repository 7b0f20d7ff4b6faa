"""Test that sources read row by row give what they give as a whole, in bounded memory."""

import json
import random
from dataclasses import replace

import pytest

from data import sources
from data.records import prompt_key
from data.seen import Seen
from data.sources import Loaded, Source, read, scan, stream
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
    scan("prompts", Source(many), note=noted.append)
    assert noted == [1000, 2000]


def test_reading_stops_after_many_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_ERRORS", 3)
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
