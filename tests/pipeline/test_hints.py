"""What a line advises can be copied: program, config, artifacts and settings are the user's own."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from pipeline import hints
from pipeline.hints import Caller, filled
from tests.pipeline.test_cli import rlhf  # noqa: F401 (a fixture)

LINE = "a/b: is missing; `rlhf run sft -c CONFIG --force` rebuilds it"


def test_a_command_gets_place_and_settings():
    caller = Caller(".venv/bin/rlhf", "-c my.yaml --artifacts out", "sft.max_steps=3")
    made = "`.venv/bin/rlhf run sft -c my.yaml --artifacts out --force sft.max_steps=3`"
    assert filled(LINE, caller) == f"a/b: is missing; {made} rebuilds it"
    assert (
        filled("`rlhf data check a.jsonl` or `make rm`", caller) == "`.venv/bin/rlhf data check a.jsonl` or `make rm`"
    )
    assert filled(LINE, Caller()) == LINE


def test_what_a_shell_would_split_is_quoted():
    caller = hints.caller_of("my dir/a.yaml", "s3://b/p", ["data.prompts={path: x y}"], ["--trust-remote-code"])
    words = shlex.split(filled("`rlhf run sft -c CONFIG`", caller).strip("`"))
    assert words[1:] == ["run", "sft", "-c", "my dir/a.yaml", "--artifacts", "s3://b/p", "data.prompts={path: x y}",
                         "--trust-remote-code"]  # fmt: skip


@pytest.mark.parametrize("place", ["path", "here", "elsewhere", "module"])
def test_the_program_is_called_as_a_shell_finds_it(tmp_path, monkeypatch, place):
    folder = tmp_path / ("else where" if place == "elsewhere" else "bin")
    folder.mkdir()
    program = folder / "rlhf"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(folder.parent if place == "here" else "/usr")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}" if place == "path" else "/usr/bin:/bin")
    monkeypatch.setattr(sys, "argv", ["/x/pipeline/cli.py" if place == "module" else str(program)])
    python = f"{sys.executable} -m pipeline.cli"
    right = {"path": "rlhf", "here": "bin/rlhf", "elsewhere": f"'{program}'", "module": python}
    assert hints.program() == right[place]


def test_errors_and_status_name_the_users_own_command(rlhf):  # noqa: F811
    place = ("--artifacts", "out dir")
    assert rlhf("run", "text", *place, "text.words=4")[0] == 0
    Path("out dir/small/text/words/all.json").write_text("[]")
    code, _, err = rlhf("run", "page", *place, "text.words=4")
    advised = "`rlhf run text -c small.yaml --artifacts 'out dir' --force text.words=4`"
    assert code == 2 and f"; {advised} rebuilds it" in err
    code, out, _ = rlhf("status", *place, "text.words=4")
    assert code == 0 and advised.replace(" ", "") in "".join(
        line.split("│")[2].strip().replace(" ", "") for line in out.splitlines() if line.startswith("│")
    )
    assert rlhf(*shlex.split(advised.strip("`"))[1:], config=None)[0] == 0
    assert rlhf("run", "page", *place, "text.words=4")[0] == 0


def test_no_line_advises_a_config_that_nobody_fills_in():
    """`filled` only finds commands that are in backticks and begin with rlhf."""
    root = Path(__file__).resolve().parents[2]
    files = [path for room in ("data", "pipeline", "stages") for path in (root / room).rglob("*.py")]
    of_the_command_line = ("hints.py", "commands.py", "data_commands.py", "data_arguments.py")
    lines = []
    for path in files:
        if path.name not in of_the_command_line:
            lines += path.read_text().splitlines()
    lines = [line for line in lines if "-c CONFIG" in line and '"""' not in line]
    assert len(lines) > 5 and [line for line in lines if "`rlhf " not in line] == []
