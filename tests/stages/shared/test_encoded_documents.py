"""Test that ids of documents are kept, split as everywhere, and used again."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import wrap_documents
from data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from pipeline.stage import Source
from pipeline.store import integrity
from pipeline.store.cache import Cache
from stages.shared import encoded_documents
from stages.shared.encoded_documents import IDS, load_held_out_text, load_training_text, take_out
from stages.shared.inputs import GivenText, split_documents
from stages.shared.row_cache import RowCache

TEXTS = [f"the fox {i} is red" + " and kind" * (i % 7) for i in range(60)]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Return a file of documents, a tokenizer, what loads, and how often texts were tokenized."""
    file, model, calls = tmp_path / "documents.jsonl", tmp_path / "model", []
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.save_pretrained(model)
    joined = encoded_documents.joined
    monkeypatch.setattr(encoded_documents, "joined", lambda *given: calls.append(1) or joined(*given))

    def source():
        return Source(path=file, sha256=integrity.sha256_file(file))

    def load(fraction=0.2, length=16):
        cache = RowCache(Cache(tmp_path / ".cache"), model, SimpleNamespace(stage="ppo"))
        return load_training_text(GivenText(source(), None), fraction, tokenizer, cache, length)

    return SimpleNamespace(load=load, source=source, file=file, tokenizer=tokenizer, calls=calls)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.2, 0.999])
def test_the_training_part_is_that_of_every_stage(kept, fraction):
    train, held_out = split_documents(kept.source(), fraction)
    assert list(kept.load(fraction)) == wrap_documents(kept.tokenizer, train, length=16)
    rows = wrap_documents(kept.tokenizer, held_out, length=16)
    for most in (1, 3, 10**6):
        assert load_held_out_text(kept.source(), fraction, kept.tokenizer, 16, most) == rows[:most]


def test_a_second_start_tokenizes_nothing_whatever_the_length_of_a_row(kept):
    first, again, other = kept.load(), kept.load(), kept.load(length=5)
    assert len(kept.calls) == 1 and list(again) == list(first) and len(other) == len(first.ids) // 5
    assert isinstance(again.ids, np.memmap) and again.ids.dtype == np.int32  # the processes share its memory
    kept.load(fraction=0.5)
    kept.file.write_text(json.dumps({"text": "another one"}) + "\n")
    assert not kept.load(length=500) and len(kept.calls) == 3


def test_errors_of_the_data_are_all_named(kept):
    kept.file.write_text('{"text": "a fox"}\n{"text": ""}\n{"text": 7}\n')
    for load in (kept.load, lambda: load_held_out_text(kept.source(), 0.2, kept.tokenizer, 16, 9)):
        with pytest.raises(UserError) as caught:
            load()
        assert [line.partition(": ")[0] for line in caught.value.lines] == [f"{kept.file}:2", f"{kept.file}:3"]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12), st.integers(1, 20))
def test_taking_out_leaves_the_others_in_order(tmp_path_factory, documents, most):
    path = tmp_path_factory.mktemp("ids") / "ids"
    lengths = np.array([length for length, _ in documents], dtype=np.int64)
    stays = np.array([stay for _, stay in documents], dtype=bool)
    ids = np.arange(lengths.sum(), dtype=IDS)
    path.write_bytes(ids.tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded_documents, "MOST_MOVED", most)
        assert take_out(path, lengths, stays) == lengths[stays].sum()
    assert np.fromfile(path, IDS).tolist() == ids[np.repeat(stays, lengths)].tolist()
