"""Test the words of `rlhf data` that say how files are read."""

import json
import os
from types import SimpleNamespace

import pytest

from pipeline import cli, data_commands
from pipeline.config.sections import DataSource
from pipeline.data_arguments import HOW_READ, READING, parse_reading, split_reading
from pipeline.errors import UserError
from stages.settings.context import lengths_over_context


def test_words_and_flags_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "by=me.jsonl").write_text("{}")
    words = [
        "data",
        "check",
        "a.jsonl",
        "by=x",
        "--tie-within",
        "0.5",
        "--where=lang=en,k=3",
        "-c",
        "c.yaml",
        "by=me.jsonl",
    ]
    rest, reading = split_reading(
        [*words, "sft.max_length=3", "--columns", "prompt=q,completion=a.b", "--kind", "prompts"]
    )
    assert rest == ["data", "check", "a.jsonl", "-c", "c.yaml", "by=me.jsonl", "sft.max_length=3", "--kind", "prompts"]
    assert parse_reading(reading) == {
        "by": "x",
        "tie_within": 0.5,
        "where": {"lang": "en", "k": 3},
        "columns": {"prompt": "q", "completion": "a.b"},
    }


def test_lists_and_names():
    assert parse_reading(["ignore=label, weight", "tiers=[a, b]", "by=3", "limit=7", "templated=strip"]) == {
        "ignore": ["label", "weight"],
        "tiers": ["a", "b"],
        "by": "3",
        "limit": 7,
        "templated": "strip",
    }
    assert set(READING) <= set(DataSource.model_fields) and parse_reading([]) == {}
    for name in ("by", "columns", "where", "ignore", "templated", "tie_within", "tiers", "on_bad_row", "skip", "limit"):
        assert name in READING and name in HOW_READ


@pytest.mark.parametrize(
    "word, problem",
    [
        ("limit=0", "limit: 0"),
        ("templated=maybe", "templated: "),
        ("on_bad_row=3", "on_bad_row: "),
        ("where=en", "where: "),
        ("max_bad=2", "max_bad: "),
        ("tiers=good,bad,good", "names 'good' twice"),
    ],
)
def test_a_mistake_is_named_with_its_key(word, problem):
    with pytest.raises(UserError, match="command line: ") as caught:
        parse_reading([word])
    assert problem in str(caught.value)


def test_words_reach_the_reader(tmp_path, capsys):
    rows = [{"question": f"q {n}", "answer": "a b", "lang": "en" if n % 2 else "de"} for n in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["columns.prompt=question", "columns.completion=answer", "--where", "lang=en", "skip=1"]
    assert cli.main(["data", "check", str(path), *words]) == 0
    out = capsys.readouterr().out
    assert "3 rows are not those of where" in out and "records 2 to 3" in out and "{prompt, completion" in out
    assert cli.main(["data", "check", "by=x"]) == 2 and "give a FILE" in capsys.readouterr().err
    assert cli.main(["data", "check", str(path), "bye=x"]) == 2
    assert "say how the file is read: split, subset" in capsys.readouterr().err
    for action in ("check", "preview", "stats", "convert", "export"):
        assert cli.main(["data", action, "--help"]) == 0
        help_text = capsys.readouterr().out
        assert "examples:\n  rlhf data " in help_text and "by=safer" in help_text


def test_a_data_set_on_the_hub_is_looked_at_by_its_first_rows(monkeypatch, capsys):
    asked = []

    def rows(hub, split, subset, revision, limit, *_):
        asked.append((hub, split, limit))
        for i in range(1000):
            yield f"{hub} {split}: index {i}", {"prompt": f"p {i}", "completion": "c"}

    monkeypatch.setattr("data.row_reader.hub_rows", rows)
    assert cli.main(["data", "check", "org/name", "split=test"]) == 0
    out = capsys.readouterr().out
    assert "the first 200" in out and "limit=N reads others" in out
    assert {where[:2] for where in asked} == {("org/name", "test")} and all(limit for *_, limit in asked)
    assert cli.main(["data", "check", "org/name", "limit=300"]) == 0
    assert "records 1 to 300" in capsys.readouterr().out


def test_lengths_over_the_models_context_are_errors(tmp_path):
    """Check what `rlhf run` would refuse, and that unneeded stages do not count."""
    from stages.settings.experiment import Experiment

    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    settings = {
        "name": "x",
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {"demonstrations": "a.jsonl", "rankings": "b.jsonl"},
        "sft": {"max_length": 65},
        "rm": {"max_length": 64},
    }
    experiment = Experiment.model_validate(settings)
    lines = lengths_over_context(experiment, tmp_path)
    assert any(line.startswith("sft.max_length: 65 tokens is more than the model's context of 64") for line in lines)
    assert not any(line.startswith(("rm.max_length", "rankings.")) for line in lines)
    other = experiment.model_copy(update={"model": SimpleNamespace(name_or_path="org/name", peft=None)})
    assert lengths_over_context(other, tmp_path) == []
    published = tmp_path / "x/base/model"
    published.mkdir(parents=True)
    (published / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    assert lengths_over_context(other, tmp_path) == lines


@pytest.mark.parametrize(("text", "said"), [("org/name", "0"), ("rows.jsonl", None)])
def test_an_input_on_the_hub_lets_the_libraries_reach_it(monkeypatch, text, said):
    """Commands without a config that names the Hub otherwise tell them to stay offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so that it is put back
    data_commands.allow_hub([text])
    assert os.environ["HF_HUB_OFFLINE"] == "1", "what the user says holds"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    data_commands.allow_hub([text])
    assert os.environ.get("HF_HUB_OFFLINE") == said
