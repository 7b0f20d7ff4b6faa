"""Test documents that are joined and cut into rows, against rows made one document at a time."""

import numpy as np
import pytest

from data import documents as module
from data.documents import PackedRows, document_end, joined, pack_documents, portions, wrap_documents
from data.encode import encode_response
from data.records import Document
from data.text_rows import DocumentRows, dataset_of, lengths_of
from data.tokenizer import train_tokenizer

TEXTS = [f"the fox {i} is red" + " and kind" * (i % 5) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


def by_hand(tokenizer, texts, length):
    stream = [i for text in texts for i in [*encode_response(tokenizer, text, False), document_end(tokenizer)]]
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


@pytest.mark.parametrize("at_once, characters", [(1, 10**6), (7, 10**6), (512, 30), (512, 10**6)])
def test_rows_do_not_depend_on_how_many_are_tokenized_together(tokenizer, monkeypatch, at_once, characters):
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    monkeypatch.setattr(module, "MOST_CHARACTERS", characters)
    rows = pack_documents(tokenizer, iter(TEXTS), length=16)
    assert list(rows) == by_hand(tokenizer, TEXTS, 16) == wrap_documents(tokenizer, map(Document, TEXTS), length=16)
    assert rows[-1] == list(rows)[-1] and rows[1:3] == list(rows)[1:3]
    with pytest.raises(IndexError):
        rows[len(rows)]
    lengths = [count for _, its in joined(tokenizer, TEXTS) for count in its]
    assert lengths == [len(encode_response(tokenizer, text)) for text in TEXTS]


def test_portions_end_at_the_most_characters(monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 3)
    monkeypatch.setattr(module, "MOST_CHARACTERS", 5)
    assert list(portions(["a", "b", "c", "d", "123456", "e", "12345"])) == [
        ["a", "b", "c"], ["d", "123456"], ["e", "12345"]
    ]  # fmt: skip


def test_a_token_takes_four_bytes_and_a_data_set_shares_them(tokenizer):
    packed = pack_documents(tokenizer, TEXTS, length=16)
    assert packed.ids.dtype == np.int32 and packed.ids.nbytes == 4 * sum(
        len(encode_response(tokenizer, text)) for text in TEXTS
    )
    rows = DocumentRows(packed)
    order = [3, 0, 3, len(rows) - 1]
    data = dataset_of(rows, order)
    assert [data[i] for i in range(4)] == [rows[i] for i in order]
    assert lengths_of(rows) == [16] * len(rows) and data.column_names == ["input_ids", "labels"]
    columns = [data.data.column(name).chunk(0).values.buffers()[1].address for name in data.column_names]
    assert columns == [packed.ids.ctypes.data] * 2


def test_a_data_set_of_several_chunks_has_the_same_rows(tokenizer, monkeypatch):
    monkeypatch.setattr("data.text_rows.MOST_VALUES", 40)
    rows = DocumentRows(pack_documents(tokenizer, TEXTS, length=16))
    data = dataset_of(rows, range(len(rows)))
    assert data.data.column("input_ids").num_chunks > 3 and list(data) == list(rows)


def test_no_documents_are_no_rows(tokenizer):
    assert len(pack_documents(tokenizer, [], length=4)) == 0 and not PackedRows(np.empty(0, np.int32), 4)
