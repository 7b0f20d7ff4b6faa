"""Test which source each ranking of a mixture names, and that ids of different files stay apart."""

import json

import pytest

from data import sources
from data.records import write_jsonl
from data.source import Loaded, Source


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path)


def ranking(prompt, **fields):
    return {"id": "1", "prompt": prompt, "responses": ["a", "b"], "ranks": [1, 2], **fields}


def test_rankings_of_a_mixture_name_their_source_without_folders(tmp_path):
    """A row's own word for its source is kept."""
    mixture = Source(parts=(written(tmp_path / "people.jsonl", ranking("p"), ranking("q", id="2", source="round 2")),
                            written(tmp_path / "models.jsonl", ranking("r", id="3"))))  # fmt: skip
    rows = sources.load("rankings", mixture)
    assert [row for _, row in sources.stream("rankings", mixture, Loaded())] == rows
    assert [row.source for row in rows] == ["people.jsonl", "round 2", "models.jsonl"]
    [single, _] = sources.load("rankings", mixture.parts[0])
    assert single.source is None, "one source needs no name"


def test_equal_ids_of_two_files_are_told_apart(tmp_path):
    """The written mixture reads back, as the stage rm does."""
    parts = [written(tmp_path / f"{name}.jsonl", ranking(name)) for name in ("a", "b")]
    rows = sources.load("rankings", Source(parts=(*parts, parts[1])))
    assert [row.id for row in rows] == ["1", "1-2", "1-3"]
    write_jsonl(tmp_path / "whole.jsonl", rows)
    assert sources.load("rankings", Source(tmp_path / "whole.jsonl")) == rows


@pytest.mark.parametrize(
    ("source", "label"),
    [
        (Source("/a/b/rows.jsonl.gz"), "rows.jsonl.gz"),
        (Source(hub="org/set"), "org/set"),
        (Source(hub="org/set", data_dir="harmless-base"), "org/set/harmless-base"),
    ],
)
def test_the_name_of_a_source(source, label):
    assert source.label == label


def test_a_prompt_that_two_sources_share_is_taken_once(tmp_path):
    parts = (
        written(tmp_path / "a.jsonl", {"prompt": "x"}, {"prompt": "y"}),
        written(tmp_path / "b.jsonl", {"prompt": "y"}, {"prompt": "z"}),
    )
    loaded, streamed = sources.read("prompts", Source(parts=parts)), Loaded()
    assert [record.prompt for record in loaded.records] == ["x", "y", "z"] and loaded.duplicates == 1
    assert [record for _, record in sources.stream("prompts", Source(parts=parts), streamed)] == loaded.records
    assert streamed.duplicates == 1
