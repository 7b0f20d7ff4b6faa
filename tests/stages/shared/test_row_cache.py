"""Test that encoded rankings are kept, used again, and made again when anything has changed."""

import json
from types import SimpleNamespace

import pytest

from data.tokenizer import train_tokenizer
from pipeline.store.cache import Cache
from stages.shared import inputs
from stages.shared.inputs import LengthLimit, load_groups
from stages.shared.row_cache import RowCache

ROWS = [{"prompt": f"red {i}", "responses": ["a fox", "a hen", f"fox {i}"], "ranks": [1, 2, 2]} for i in range(5)]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Return what loads the rankings, and the number of times that they were encoded."""
    file, model, calls = tmp_path / "train.jsonl", tmp_path / "model", []
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = train_tokenizer(["red a fox hen"] * 9, 300)
    tokenizer.save_pretrained(model)
    encode = inputs.encode_responses
    monkeypatch.setattr(inputs, "encode_responses", lambda *given: calls.append(1) or encode(*given))
    cache = RowCache(Cache(tmp_path / ".cache"), model, SimpleNamespace(stage="rm"))

    def load(max_length=64):
        fresh = RowCache(cache.cache, cache.tokenizer, cache.tracker)
        return load_groups(file, tokenizer, LengthLimit(max_length, "truncate", "rm"), fresh)

    return SimpleNamespace(load=load, calls=calls, file=file, model=model, folder=tmp_path / ".cache")


def test_a_second_start_encodes_nothing(kept):
    groups, report = kept.load()
    again, report_again = kept.load()
    assert list(again) == list(groups) and report_again == report and len(kept.calls) == 1
    kinds = ("arrow", "index", "json")
    assert sorted(path.name for path in kept.folder.iterdir()) == [f"groups-train.{kind}" for kind in kinds]


def test_what_was_made_of_anything_else_is_made_again(kept):
    first = list(kept.load()[0])
    short, report = kept.load(max_length=8)
    assert report.truncated > 0 and list(short) != first and len(kept.calls) == 2
    kept.file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    assert list(kept.load()[0]) == first[1:] and len(kept.calls) == 3
    (kept.model / "chat_template.jinja").write_text("{{ messages }}")
    kept.load()
    assert len(kept.calls) == 4
    (kept.model / "model.safetensors").write_text("weights say nothing about the tokenizer")
    kept.load()
    assert len(kept.calls) == 4


@pytest.mark.parametrize("kind", ["arrow", "index", "json"])
def test_a_damaged_entry_is_made_again(kept, kind):
    first = list(kept.load()[0])
    path = kept.folder / f"groups-train.{kind}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert list(kept.load()[0]) == first and len(kept.calls) == 2
    path.unlink()
    assert list(kept.load()[0]) == first and len(kept.calls) == 3
