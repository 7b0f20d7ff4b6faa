"""Test how `rlhf data` shows that it reads, and what Ctrl-C leaves."""

import gzip
import io
import json

import pytest
from rich.console import Console

from pipeline import cli, data_progress
from pipeline.data_progress import reading_line


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by a list whose only item is the time."""
    now = [0.0]
    monkeypatch.setattr(data_progress.time, "monotonic", lambda: now[0])
    return now


def shown(clock, seconds, is_terminal, knows_share=True):
    """Return what is shown of 1,000 rows, of which each takes so many seconds."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=100, color_system=None)
    with reading_line("a.jsonl: reading", console) as note:
        for rows in range(1, 1001):
            clock[0] += seconds
            note(rows, rows / 1000 if knows_share else None)
    return out.getvalue()


def test_a_short_pass_shows_nothing(clock):
    assert shown(clock, 0.0019, True) == shown(clock, 0.0049, False) == ""


def test_without_a_terminal_there_are_a_few_lines(clock):
    assert shown(clock, 0.125, False).splitlines() == [
        "a.jsonl: reading: 40 rows · 4% · 5 s · about 2 min 0 s left",
        "a.jsonl: reading: 280 rows · 28% · 35 s · about 1 min 30 s left",
        "a.jsonl: reading: 520 rows · 52% · 65 s · about 60 s left",
        "a.jsonl: reading: 760 rows · 76% · 1 min 35 s · about 30 s left",
        "a.jsonl: reading: 1,000 rows · 100% · 2 min 5 s",
    ]
    first = shown(clock, 0.125, False, knows_share=False).splitlines()[0]
    assert first == "a.jsonl: reading: 40 rows · 5 s"


def test_a_terminal_shows_a_bar_and_takes_it_away(clock):
    text = shown(clock, 0.125, True)
    assert "a.jsonl: reading ━" in text and "1,000 rows · 100% · 2 min 5 s" in text
    assert text.endswith("\x1b[2K") and "\x1b[?25h" in text  # the line is cleared, the cursor is back


@pytest.fixture
def impatient(monkeypatch):
    """Show progress of every hundred rows, on standard error that is no terminal."""
    for name in ("PATIENCE", "FIRST_LINE", "BETWEEN_LINES"):
        monkeypatch.setattr(data_progress, name, 0.0)


def write_rows(path, count=250):
    content = "".join(json.dumps({"prompt": f"question {i}", "completion": f"c{i}"}) + "\n" for i in range(count))
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return str(path)


@pytest.mark.parametrize(
    "words",
    [
        ["check", "FILE"],
        ["stats", "FILE"],
        ["preview", "FILE", "--seed", "3"],
        ["convert", "FILE", "--to", "prompts", "-o", "out.jsonl"],
        ["prepare", "FILE", "-o", "out", "--pii", "off"],
    ],
)
def test_every_command_that_reads_whole_files_shows_it(tmp_path, monkeypatch, capsys, impatient, words):
    monkeypatch.chdir(tmp_path)
    file = write_rows(tmp_path / "rows.jsonl.gz")
    assert cli.main(["data", *(file if word == "FILE" else word for word in words)]) == 0
    out, err = capsys.readouterr()
    assert f"{file}: reading: 100 rows · 100% · " in err and "reading: 100 rows" not in out
    if words[0] == "prepare":
        assert "prepare: sketching rows, to find near copies: 200 rows · 80% · " in err
        assert "prepare: sifting: 200 rows · 80% · " in err


@pytest.mark.parametrize(
    ("words", "broken"),
    [
        (["check"], "data.check.inspect_file.stream"),
        (["convert", "--to", "prompts", "-o", "out.jsonl"], "data.records.os.fsync"),
        (["prepare", "-o", "out", "--pii", "off"], "data.prepare.command.print_outcome"),
        (["prepare", "-o", "out", "--pii", "off"], "data.prepare.command.manifest_of"),
    ],
)
def test_an_interrupt_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch, capsys, words, broken):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    file = write_rows(tmp_path / "rows.jsonl")
    monkeypatch.setattr(broken, interrupt)
    assert cli.main(["data", words[0], file, *words[1:]]) == 130
    assert capsys.readouterr().err == "stopped; nothing is left half-written\n"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == (["out", "rows.jsonl"] if "print_outcome" in broken else ["rows.jsonl"])
