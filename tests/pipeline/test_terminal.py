"""Test questions to a person at the terminal."""

import os
import pty
import sys
import threading
from types import SimpleNamespace

import pytest

from pipeline import terminal
from pipeline.errors import Interrupted
from pipeline.stage import StopFlag


@pytest.mark.parametrize("typed, answer", [("y", True), ("yes", True), ("", False), ("n", False), ("no way", False)])
def test_a_person_at_a_terminal_is_asked(monkeypatch, capsys, typed, answer):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True, write=sys.stdout.write, flush=lambda: None))
    leader, follower = pty.openpty()
    with os.fdopen(follower) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        os.write(leader, f"{typed}\n".encode())
        assert terminal.ask("Replace them?", StopFlag()) is answer
    os.close(leader)
    assert "Replace them? [y/N] " in capsys.readouterr().out


def test_a_signal_ends_the_question_and_without_a_terminal_there_is_none(monkeypatch):
    assert terminal.ask("Replace them?", StopFlag()) is False
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True, write=lambda _: None, flush=lambda: None))
    leader, follower = pty.openpty()
    stop = StopFlag()
    with os.fdopen(follower) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        threading.Timer(0.1, lambda: setattr(stop, "requested", True)).start()
        with pytest.raises(Interrupted):
            terminal.ask("Replace them?", stop)
    os.close(leader)
