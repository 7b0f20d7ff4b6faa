"""Start and stop a playground in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

ROOT = Path(__file__).parents[3]


class Server:
    """A playground in a process of its own."""

    def __init__(self, folder, **options):
        self.folder, self.options = folder, options
        self.start()

    def start(self):
        """Start the process, and wait until it prints its address."""
        command = [sys.executable, str(Path(__file__).with_name("server.py")), str(self.folder)]
        self.log = self.folder / "server.log"
        self.log.write_text("")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, json.dumps(self.options)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )
        end = monotonic() + 60
        while "Ctrl-C" not in self.log.read_text() and self.process.poll() is None and monotonic() < end:
            sleep(0.05)
        found = re.search(r"(http://[^/]+)/\?token=(\S+)", self.log.read_text())
        assert found, self.log.read_text()
        self.origin, self.token = found.groups()

    @property
    def address(self):
        """Return what a person opens."""
        return f"{self.origin}/?token={self.token}"

    def stop(self, number=signal.SIGTERM):
        """Send a signal, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def stopped(self):
        """Return what was stopped before its end."""
        path = self.folder / "stopped"
        return path.read_text().split("\n")[:-1] if path.exists() else []
