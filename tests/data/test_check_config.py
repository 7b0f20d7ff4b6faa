"""Check all data of a config at once: a report for each kind, and every error."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from data.check import command as checks
from data.check.config import Input, packaged_gguf
from data.source import Source
from pipeline import cli, data_commands
from pipeline.data_progress import reading_line
from pipeline.errors import UserError
from tests.data.test_check import experiment


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def part(path, **fields):
    return SimpleNamespace(**({"path": path, "skip": 0, "limit": None} | fields))


@pytest.fixture
def config(tmp_path):
    """Return a config with 200 prompts in one file, of which the first 150 train.

    The others are evaluated; demonstrations are in another file; the world has not run.
    """
    prompts = write(tmp_path / "all.jsonl", *({"prompt": f"question {i:03d} of all {i * i} {i}"} for i in range(200)))
    answers = [{"prompt": f"ask {i} for {i * 7}", "completion": "a b"} for i in range(9)]
    config = experiment(
        prompts=part(prompts, limit=150),
        evaluation_prompts=part(prompts, skip=150),
        demonstrations=write(tmp_path / "answers.jsonl", *answers),
    )
    config.evaluate = SimpleNamespace(max_length=30, response_length=10, on_too_long="error")
    return config


def check_all(config, tmp_path):
    console = Console(file=io.StringIO(), width=40)
    code = checks.run_all(config, console, artifacts=tmp_path / "artifacts")
    _, *parts = console.file.getvalue().split("\n-- data.")
    *kinds, (last, end) = [part.split("\n", 1) for part in parts]
    end, _, verdict = end.rpartition("\n\n")
    return code, dict([*kinds, (last, end)]), verdict.strip()


def test_every_kind_that_is_named_has_a_report(config, tmp_path, capsys):
    code, reports, verdict = check_all(config, tmp_path)
    assert (code, verdict) == (0, "4 kinds of data, no errors") and capsys.readouterr().err == ""
    assert set(reports) == {"documents", "demonstrations", "prompts", "evaluation_prompts"}  # rankings is null
    assert "the stage world, which has not run yet" in reports["documents"]
    assert "records 1 to 150" in reports["prompts"] and "records 151 to 200" in reports["evaluation_prompts"]
    assert "kind                    evaluation_prompts\n" in reports["evaluation_prompts"]
    assert "taken" not in reports["demonstrations"]


def test_two_parts_of_one_file_do_not_leak_into_each_other(config, tmp_path, capsys):
    """Check that overlapping parts do, also where only one file is checked."""
    config.data.evaluation_prompts.skip = 148
    code, reports, verdict = check_all(config, tmp_path)
    assert code == 2 and verdict == "4 kinds of data, errors: prompts 2, evaluation_prompts 2"
    assert "also in evaluation_prompts  2 of 150 prompts" in reports["prompts"]
    assert capsys.readouterr().err.count("a leak") == 4
    config.data.evaluation_prompts.skip = 150
    console = Console(file=io.StringIO())
    given = [Input(Source(config.data.prompts.path))]
    assert checks.run(given, None, config, console, artifacts=tmp_path / "artifacts") == 0
    assert "also in evaluation_prompts  0 of 150 prompts" in console.file.getvalue()


def test_errors_in_any_file_are_shown_with_their_location(config, tmp_path, capsys):
    config.data.rankings = write(tmp_path / "bad.jsonl", {"prompt": "x", "chosen": 3, "rejected": "b"})
    config.data.evaluation_prompts.skip = 400
    config.rm = SimpleNamespace(max_length=30, on_too_long="drop")
    code, _, verdict = check_all(config, tmp_path)
    err = capsys.readouterr().err
    assert code == 2 and verdict == "5 kinds of data, errors: rankings 1, evaluation_prompts 1"
    assert "bad.jsonl:1: " in err and "has 200 records, and skip leaves out the first 400; lower skip" in err


def test_the_worlds_files_and_the_hubs_are_read_too(config, tmp_path, monkeypatch, capsys):
    write(tmp_path / "artifacts" / "tiny" / "world" / "documents.jsonl", {"text": "a b c"})
    config.data.demonstrations = part("org/name", limit=3, split="train", subset="small", revision=None)
    asked = []

    def rows(hub, *which):
        asked.append((hub, *which[:4]))
        yield from ((f"{hub}: index {i}", {"prompt": f"p{i}", "completion": "c"}) for i in range(9))

    monkeypatch.setattr("data.row_reader.hub_rows", rows)
    code, reports, _ = check_all(config, tmp_path)
    assert code == 0 and "records 1 to 3" in reports["demonstrations"] and "org/name" in reports["demonstrations"]
    assert asked == [("org/name", "train", "small", None, 3)]
    assert "document length  3 to 3 words" in reports["documents"]


def test_a_hub_id_without_a_limit_is_looked_at_by_its_first_rows(config, tmp_path, monkeypatch, capsys):
    """Check that a string's method `split` is not taken for the split."""
    config.data.demonstrations = "org/name"
    asked = []

    def rows(hub, *which):
        asked.append((hub, *which[:4]))
        yield from ((f"{hub}: index {i}", {"prompt": f"p{i}", "completion": "c"}) for i in range(1000))

    monkeypatch.setattr("data.row_reader.hub_rows", rows)
    code, reports, _ = check_all(config, tmp_path)
    assert (code, asked) == (0, [("org/name", "train", None, None, 200)])
    assert "rows                        the first 200\n" in reports["demonstrations"]
    assert "at most 200 rows of a data set were read" in reports["demonstrations"]
    assert "errors                      none" in reports["demonstrations"]


def test_a_folder_is_not_taken_for_the_worlds_file(config, tmp_path, capsys):
    config.data.demonstrations = str(tmp_path)
    code, reports, verdict = check_all(config, tmp_path)
    assert code == 2 and verdict.startswith("4 kinds of data, errors: demonstrations ")
    assert "world" in reports["documents"] and f"{tmp_path}/all.jsonl:1: " in capsys.readouterr().err
    assert "world" not in reports["demonstrations"]


def test_a_config_without_data_is_refused(config, tmp_path):
    for kind in vars(config.data):
        setattr(config.data, kind, None)
    with pytest.raises(UserError, match="no file and no Hub id is set"):
        check_all(config, tmp_path)


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(data_commands, "load_if_given", lambda arguments: arguments.overrides or None)
    monkeypatch.setattr(data_commands, "lengths_over_context", lambda *_: ["sft.max_length: over"])
    monkeypatch.setattr(checks, "run_all", lambda *args, **options: seen.append((*args, options)) or 2)
    assert cli.main(["data", "check", "-c", "a.yaml", "seed=1", "--artifacts", "out"]) == 2
    (config, options), watch = seen[0], seen[0][1].pop("watch")
    assert config == ["seed=1"] and options == {"artifacts": "out", "errors": ["sft.max_length: over"]}
    assert watch is reading_line and len(seen) == 1
    assert cli.main(["data", "check"]) == 2 and "give a FILE, or -c CONFIG" in capsys.readouterr().err
    assert cli.main(["data", "check", "-c", "a.yaml", "seed=1", "--kind", "prompts"]) == 2
    assert "--kind needs a FILE" in capsys.readouterr().err
    write(tmp_path / "a=b.jsonl", {"text": "a"})
    monkeypatch.setattr(checks, "run", lambda inputs, *_, **__: seen.append(inputs) or 0)
    assert cli.main(["data", "check", "a=b.jsonl"]) == 0 and seen[-1] == [Input(Source(Path("a=b.jsonl")))]


def test_the_model_of_a_package_has_a_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "llm_little").mkdir()
    (tmp_path / "llm_little" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packaged_gguf("package:llm-little") is None
    (tmp_path / "llm_little" / "q8.gguf").write_text("")
    assert packaged_gguf("package:llm-little") == tmp_path / "llm_little" / "q8.gguf"
    assert packaged_gguf("package:no-such-one") is None and packaged_gguf("org/name") is None
