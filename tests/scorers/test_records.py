"""Test the records of answers: they are found again, also after a crash in the middle of a line."""

import os

from pipeline.launch import parallel
from stages.scorers.records import Records, key_of


def test_answers_are_found_again(tmp_path):
    records = Records(tmp_path / "url")
    assert not (tmp_path / "url").exists()  # nothing is written before there is an answer
    records.add({key_of([1]): {"score": 0.1}, key_of([2]): {"score": "ä"}})
    records.add({key_of([3]): None})
    records.add({})
    records.close()
    again = Records(tmp_path / "url")
    assert again[key_of([1])] == {"score": 0.1} and again[key_of([2])] == {"score": "ä"}
    assert key_of([3]) in again and key_of([4]) not in again
    assert len((tmp_path / "url" / "0of1.jsonl").read_text().splitlines()) == 3


def test_a_torn_line_is_left_out_and_later_ones_are_whole(tmp_path):
    records = Records(tmp_path)
    records.add({"a": 1, "b": 2})
    records.close()
    file = tmp_path / "0of1.jsonl"
    os.truncate(file, file.stat().st_size - 5)
    again = Records(tmp_path)
    assert "a" in again and "b" not in again
    again.add({"b": 3})
    again.close()
    last = Records(tmp_path)
    assert last["a"] == 1 and last["b"] == 3


def test_an_answer_is_on_disk_before_it_is_used(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    records = Records(tmp_path)
    records.add({"a": 1})
    assert records.file.fileno() in synced
    assert (tmp_path / "0of1.jsonl").read_text().endswith("\n")


def test_each_process_has_its_own_answers_first(tmp_path, monkeypatch):
    """Two processes may have asked the same; with another number of processes all answers count."""
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank_and_world_size", lambda at=rank: (at, 2))
        records = Records(tmp_path)
        records.add({"both": rank, f"of {rank}": 0})
        records.close()
    again = Records(tmp_path)
    assert again["both"] == 1 and "of 1" in again and "of 0" not in again
    monkeypatch.setattr(parallel, "rank_and_world_size", lambda: (0, 1))
    alone = Records(tmp_path)
    assert "of 0" in alone and "of 1" in alone


def test_the_first_answer_to_a_question_counts(tmp_path):
    (tmp_path / "0of1.jsonl").write_text('{"key": "a", "answer": 1}\n{"key": "a", "answer": 2}\nnonsense\n[1]\n')
    assert Records(tmp_path).answers == {"a": 1}
