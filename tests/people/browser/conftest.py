"""Give tests a real browser and a real server in a process of its own.

Without Playwright or Chromium the tests are skipped, and say so. RLHF_CHROMIUM names another one.
"""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.people.browser.server import LEAD_TOKEN, TOKEN

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
ROOT = Path(__file__).parents[3]
QUESTIONS = [
    (f"What is {n} + {n}?", [f"It is {2 * n}.", f"{n} and {n} make {2 * n}.", f"It is {2 * n + 1}.", "No idea."])
    for n in range(1, 9)
]


@pytest.fixture(scope="session")
def chromium():
    """A browser that all tests share; each opens windows of its own."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed (pip install -e .[dev])"
    )
    found = os.environ.get("RLHF_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium (apt-get install chromium), or set RLHF_CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


class Server:
    """A ranking page in a process of its own."""

    def __init__(self, folder, options):
        self.folder, self.options, self.process = folder, options, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    @property
    def address(self):
        """Return what a person opens."""
        return f"http://127.0.0.1:{self.port}/?token={TOKEN}"

    @property
    def lead_address(self):
        """Return what the lead opens."""
        return f"http://127.0.0.1:{self.port}/lead?token={LEAD_TOKEN}"

    def start(self):
        """Start the process, and wait until it answers."""
        command = [sys.executable, str(Path(__file__).with_name("server.py")), str(self.folder), str(self.port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        (self.folder / "options.json").write_text(json.dumps(self.options), encoding="utf-8")
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        end = monotonic() + 180
        while monotonic() < end and self.process.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/health", timeout=60)
                return
            sleep(0.05)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self):
        """Kill the process at once, as a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def rows(self, query, *values):
        """Return rows of the database as dictionaries."""
        connection = sqlite3.connect(self.folder / "people" / "people.sqlite")
        connection.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in connection.execute(query, values)]
        finally:
            connection.close()

    def verdicts(self):
        """Return all verdicts: tiers and those set aside as the answers' texts."""
        texts = {row["id"]: row["text"] for row in self.rows("SELECT id, text FROM answers")}
        verdicts = self.rows("SELECT * FROM verdicts ORDER BY id")
        for verdict in verdicts:
            verdict["tiers"] = [sorted(texts[i] for i in tier) for tier in json.loads(verdict["tiers"])]
            verdict["set_aside"] = sorted(texts[i] for i in json.loads(verdict["set_aside"]))
            verdict["likert"] = {texts[int(i)]: said for i, said in json.loads(verdict["likert"]).items()}
        return verdicts


@pytest.fixture
def serve(tmp_path):
    """Return what starts a server; the options are those of server.py."""
    started = []

    def start(tasks=QUESTIONS, **options):
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Server(folder, {"tasks": tasks, **options}))
        return started[-1]

    yield start
    for server in started:
        server.process.terminate()
        server.process.wait()


@pytest.fixture
def visit(chromium):
    """Return what opens a server's address in a window of its own; errors of scripts fail tests."""
    contexts, errors = [], []

    def open_window(server, address=None, **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        window = context.new_page()
        window.set_default_timeout(60_000)
        window.on("pageerror", lambda error: errors.append(str(error)))
        window.on("dialog", lambda dialog: dialog.accept())
        window.goto(address or server.address)
        return window

    yield open_window
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture
def join(visit):
    """Return what opens a window and joins: name, guidelines, and the first task is shown."""

    def enter(server, name="Ada", **options):
        window = visit(server, **options)
        window.get_by_label("Your name").fill(name)
        window.get_by_role("button", name="Begin").click()
        window.get_by_role("button", name="Start ranking").click()
        window.locator(".card, .panel").filter(has_not_text="Please read").first.wait_for()
        return window

    return enter


def card(window, text):
    """Return the card of an answer by its text."""
    return window.get_by_role("article").filter(has=window.locator(".text").get_by_text(text, exact=True))


def place(window, text, number):
    """Give an answer a place by its number, as a mouse or finger does."""
    card(window, text).locator(".place").nth(number - 1).click()


def is_saved(window):
    """Wait until the page says that everything is saved."""
    window.locator("#saved.saved").get_by_text("Saved", exact=True).wait_for()


def question(window):
    """Return the text of the question that is shown."""
    return window.locator(".conversation .text").last.inner_text()


def submit(window):
    """Send the ranking, and wait for what comes next."""
    before = question(window)
    window.get_by_role("button", name="Submit ranking").click()
    window.wait_for_function(
        "before => document.querySelector('.conversation .text')?.innerText !== before", arg=before
    )
