"""`rlhf init`: a short config that works, and a line for each reason why it would not."""

import json
from pathlib import Path

import pytest

from pipeline.api import load_experiment
from pipeline.cli import main

ROWS = {
    "demonstrations": {"prompt": "Name a color.", "completion": "Red."},
    "rankings": {"prompt": "Name a color.", "responses": ["Red.", "Why?"], "ranks": [1, 2]},
    "prompts": {"prompt": "Name a color."},
    "documents": {"text": "The fox is red."},
}


@pytest.fixture
def init(tmp_path, monkeypatch, capsys):
    """`init("-o", "my.yaml", …)` → (exit code, stdout, stderr), beside a file of each kind."""
    monkeypatch.chdir(tmp_path)
    for kind, row in ROWS.items():
        Path(f"{kind} of mine.jsonl").write_text(json.dumps(row) + "\n")

    def run(*words):
        code = main(["init", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_without_anything_it_is_the_embedded_world(init):
    code, out, err = init("-o", "small.yaml", "--device", "cpu")
    assert (code, err) == (0, "") and out.endswith("next: rlhf run report -c small.yaml\n")
    experiment = load_experiment("small.yaml")
    assert experiment.name == "small" and experiment.launch.device == "cpu" and experiment.data.prompts == "world"


def test_kinds_are_guessed_and_the_config_is_complete(init):
    files = [f"{kind} of mine.jsonl" for kind in ("demonstrations", "rankings", "prompts")]
    code, out, err = init("-o", "runs.v2.yaml", "--model", "org/model", "--data", *files)
    assert (code, err) == (0, "") and out.startswith(Path("runs.v2.yaml").read_text())
    experiment = load_experiment("runs.v2.yaml")
    assert experiment.name == "runs.v2" and experiment.model.name_or_path == "org/model"
    assert [getattr(experiment.data, kind) for kind in ("demonstrations", "rankings", "prompts")] == files
    assert experiment.data.documents is None and experiment.ppo.ptx_coef == 0
    for stage in ("sft", "rm", "ppo", "dpo", "evaluate"):
        assert getattr(experiment, stage).on_too_long == "drop"


def test_a_chain_of_only_sft(init):
    assert init("--model", "org/model", "--data", "demonstrations of mine.jsonl")[0] == 0
    text = Path("my.yaml").read_text()
    assert "ppo" not in text and "rm:" not in text and len(text.splitlines()) < 16


def test_it_overwrites_nothing(init):
    Path("my.yaml").write_text("precious")
    code, out, err = init()
    assert (code, out) == (
        2,
        "",
    ) and err == "error: my.yaml: exists and is not overwritten; choose another file with -o\n"
    assert Path("my.yaml").read_text() == "precious"


@pytest.mark.parametrize(
    "words, line",
    [
        (["--data", "gone.jsonl"], "gone.jsonl: no such file; give a data file"),
        (["--data", "odd.jsonl"], "odd.jsonl: its rows are of no known kind; `rlhf data check odd.jsonl` shows why"),
        (
            ["--data", "prompts of mine.jsonl", "prompts.jsonl"],
            "prompts.jsonl: contains prompts, as prompts of mine.jsonl",
        ),
        (["--model", "no/such/folder"], "my.yaml:5: model.name_or_path: no such folder: no/such/folder; should be"),
        (
            ["--model", "org/model", "--data", "rankings of mine.jsonl"],
            "data.demonstrations: none is given, and sft reads",
        ),
        (
            ["--data", "demonstrations of mine.jsonl"],
            "data.documents: none is given, and base reads it; give a file or a",
        ),
        (
            ["-o", "no/folder/my.yaml"],
            "no/folder/my.yaml: cannot be written (No such file or directory); choose another",
        ),
        (["--modle", "x"], "command line: '--modle' is neither a flag of `rlhf init` nor key=value"),
    ],
)
def test_what_would_not_work_is_a_line_and_no_file(init, words, line):
    Path("odd.jsonl").write_text('{"a": 1}\n')
    Path("prompts.jsonl").write_text('{"prompt": "Name a color."}\n')
    code, out, err = init(*words)
    assert code == 2 and out == "" and err.startswith(f"error: {line}") and err.count("\n") == 1
    assert not Path("my.yaml").exists()
