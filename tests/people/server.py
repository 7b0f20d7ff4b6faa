"""Start the real `rlhf rank` in a process, and talk to it as browsers do, with plain HTTP."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "name: people\nlaunch: {device: cpu, threads: 1}\n"


class Gone(Exception):
    """Say that the server did not answer."""


class Server:
    """`rlhf rank` of an experiment in a folder, with a file of answers."""

    def __init__(self, folder, *settings):
        self.folder, self.settings = Path(folder), settings
        if not (self.folder / "people.yaml").exists():
            (self.folder / "people.yaml").write_text(CONFIG)
        self.process = None

    @property
    def database(self):
        return self.folder / "artifacts/people/people/people.sqlite"

    def start(self):
        """Start it and wait for its address."""
        command = [sys.executable, "-m", "pipeline.cli", "rank", "-c", "people.yaml", *self.settings]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        log = (self.folder / "server.log").open("a")
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        log.close()
        said = ""
        for line in self.process.stdout:
            said += line
            if match := re.search(r"people rank at +(http://([\d.]+):(\d+)/\?token=(\S+))", line):
                self.url, self.host, self.port, self.token = match[1], match[2], int(match[3]), match[4]
            if match := re.search(r"the lead's page +(\S+)", line):
                self.lead_url = match[1]
            if line.startswith("Ctrl-C"):
                return self
        raise AssertionError(f"no address: {said} {(self.folder / 'server.log').read_text()}")

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.kill()

    def kill(self):
        """End it as a power cut would end it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def stop(self):
        """Ask it to end, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(90)
        self.process.stdout.close()
        return code


class Browser:
    """Send what a browser sends, over one connection."""

    def __init__(self, server):
        self.server, self.cookies, self.connection = server, {}, None
        self.ask("GET", f"/?token={server.token}")
        self.connection = None

    def ask(self, method, path, body=None):
        """Return (status, parsed JSON or text).

        Raises:
            Gone: No answer came.
        """
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items()), "X-RLHF": "1"}
        if body is not None:
            headers |= {"Content-Type": "application/json", "Origin": f"http://{self.server.host}:{self.server.port}"}
        try:
            if self.connection is None:
                self.connection = http.client.HTTPConnection(self.server.host, self.server.port, timeout=120)
            self.connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = self.connection.getresponse()
            raw = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.connection = None
            raise Gone from error
        for cookie in answer.headers.get_all("set-cookie") or []:
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value
        is_json = "json" in (answer.headers.get("content-type") or "")
        return answer.status, json.loads(raw) if is_json else raw.decode()

    def join(self, name):
        status, joined = self.ask("POST", "/api/labelers", {"name": name})
        assert status == 200, joined
        return joined

    def next(self):
        status, found = self.ask("GET", "/api/next")
        assert status == 200, found
        return found["assignment"]


def wait_until(condition, seconds=60):
    """Wait for a condition, and fail if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
