"""`rlhf init`: a short config that works, and a line for each reason why it would not."""

import json
from pathlib import Path

import pytest

from pipeline.api import load_experiment, stages
from pipeline.chain import wanted_stages
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


def test_several_files_of_a_kind_are_a_list_and_folders_and_globs_are_taken(init):
    Path("many").mkdir()
    Path("many/a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    words = ["demonstrations of mine.jsonl", "rank*.jsonl", "more.jsonl", "many"]
    Path("more.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    code, out, err = init("--model", "org/model", "--data", *words)
    assert (code, err) == (0, "") and "next: rlhf data check -c my.yaml, then rlhf run report" in out
    data = load_experiment("my.yaml").data
    assert data.demonstrations == ["demonstrations of mine.jsonl", "more.jsonl"]
    assert data.rankings == "rank*.jsonl" and data.prompts == "many"


def test_a_chain_of_only_sft(init):
    assert init("--model", "org/model", "--data", "demonstrations of mine.jsonl")[0] == 0
    text = Path("my.yaml").read_text()
    assert "ppo" not in text and "rm:" not in text and len(text.splitlines()) < 16


@pytest.mark.parametrize("context", [64, 128, 256])
@pytest.mark.parametrize(
    "data", [[], ["demonstrations", "rankings", "prompts", "documents"], ["demonstrations", "rankings", "prompts"]]
)
def test_the_lengths_fit_a_short_context(init, context, data):
    """Nothing of the written config exceeds the context, and a prompt fits before each response."""
    Path("short").mkdir()
    Path("short/config.json").write_text(json.dumps({"n_positions": context}))
    words = ["--data", *(f"{kind} of mine.jsonl" for kind in data)] if data else []
    code, _, err = init("--model", "./short", *words)
    assert (code, err) == (0, "")
    experiment, declarations = load_experiment("my.yaml"), stages()
    wanted = wanted_stages(experiment, declarations)
    assert {"sft", "rm", "ppo", "dpo", "evaluate"} <= wanted
    for name in wanted:
        assert [line for line in declarations[name].missing_requirements(experiment) if "context" in line] == []
    for stage in ("ppo", "evaluate") if data else ("rankings", "ppo", "evaluate"):
        section = getattr(experiment, stage)
        assert section.max_length == context and section.response_length == min(128, context // 2)


def test_a_long_or_unknown_context_leaves_the_defaults(init):
    Path("long").mkdir()
    for content in ('{"max_position_embeddings": 512}', "{}", "not JSON"):
        Path("long/config.json").write_text(content)
        assert init("--model", "./long")[0] == 0
        assert "length" not in Path("my.yaml").read_text()
        Path("my.yaml").unlink()


def test_the_next_command_names_the_program_as_it_was_called(init, monkeypatch):
    monkeypatch.setattr("pipeline.hints.program", lambda: ".venv/bin/rlhf")
    assert init()[1].endswith("next: .venv/bin/rlhf run report -c my.yaml\n")


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
        (["--data", "gone.jsonl"], "gone.jsonl: no such file; give a file, a folder or a glob of data"),
        (["--data", "odd.jsonl"], "odd.jsonl: its rows are of no known kind; `rlhf data check odd.jsonl` shows why"),
        (["--model", "no/such/folder"], "--model: no such folder: no/such/folder; should be"),
        (
            ["--model", "org/model", "--data", "rankings of mine.jsonl"],
            "--data: demonstrations: none is given, and sft reads",
        ),
        (
            ["--data", "demonstrations of mine.jsonl"],
            "--data: documents: none is given, and base reads it; give a file or a",
        ),
        (
            ["-o", "no/folder/my.yaml"],
            "no/folder/my.yaml: cannot be written (No such file or directory); choose another",
        ),
        (["--modle", "x"], "command line: '--modle' is not a flag of `rlhf init`; see `rlhf init --help`"),
        (
            ["foo=1"],
            "command line: 'foo=1' is a setting, and `rlhf init` takes none; add it to the file that it writes",
        ),
    ],
)
def test_what_would_not_work_is_a_line_and_no_file(init, words, line):
    Path("odd.jsonl").write_text('{"a": 1}\n')
    code, out, err = init(*words)
    assert code == 2 and out == "" and err.startswith(f"error: {line}") and err.count("\n") == 1
    assert not Path("my.yaml").exists()
