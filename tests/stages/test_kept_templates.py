"""Test that text with a chat template, kept on purpose, is read again from a stage's own files."""

import pytest

from data import sources
from data.records import Ranking, write_jsonl
from data.source import Source
from pipeline.errors import UserError
from stages.shared.inputs import published


def test_a_stages_own_file_is_not_asked_about_templates(tmp_path):
    row = Ranking("1", "p", ("an answer</s>", "another"), (1, 2))
    write_jsonl(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match="templated"):
        sources.load("rankings", Source(tmp_path / "train.jsonl"))
    assert sources.load("rankings", published(tmp_path / "train.jsonl")) == [row]
