"""A server that is killed at any instant loses nothing that a page was told is saved."""

import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from tests.people.server import ROOT, Browser, Gone, Server, wait_until


def write_answers(folder, count=400):
    rows = [{"prompt": f"prompt {i}", "responses": [f"answer {i} {k}" for k in range(4)]} for i in range(count)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Worker(threading.Thread):
    """A labeler who ranks until the server is gone, and keeps what the server confirmed."""

    def __init__(self, browser, seed):
        super().__init__()
        self.browser, self.draw = browser, random.Random(seed)
        self.moves, self.verdicts, self.problem = [], [], None

    def run(self):
        try:
            while True:
                self.rank()
        except Gone:
            pass
        except Exception as error:
            self.problem = error

    def rank(self):
        assignment = self.browser.next()
        path, seq = f"/api/assignments/{assignment['id']}", assignment["seq"]
        for answer in assignment["answers"]:
            body = {"answer": answer["id"], "tier": self.draw.randrange(4)}
            status, after = self.browser.ask("POST", f"{path}/moves", {"seq": seq, "kind": "place", "body": body})
            assert status == 200, after
            seq = after["seq"]
            self.moves.append((assignment["id"], seq, body))
        status, after = self.browser.ask("POST", f"{path}/submit", {"seq": seq})
        assert status == 200, after
        self.verdicts.append((assignment["id"], after))


def confirmations(workers):
    """Return how much the server has confirmed to workers."""
    return sum(len(worker.moves) + len(worker.verdicts) for worker in workers)


def wait_for_confirmations(workers, count):
    """Wait until the server has confirmed so much."""
    wait_until(lambda: confirmations(workers) >= count or any(worker.problem for worker in workers))


def lost(database, workers):
    """Return what was confirmed and is not in the file."""
    connection = sqlite3.connect(database)
    missing = []
    for worker in workers:
        for assignment, seq, body in worker.moves:
            query = "SELECT body FROM moves WHERE assignment_id = ? AND seq = ?"
            row = connection.execute(query, (assignment, seq)).fetchone()
            if row is None or {key: json.loads(row[0])[key] for key in body} != body:
                missing.append((assignment, seq, body))
        for assignment, _ in worker.verdicts:
            query = (
                "SELECT 1 FROM verdicts JOIN assignments a ON a.id = assignment_id WHERE a.id = ? AND state = 'done'"
            )
            if connection.execute(query, (assignment,)).fetchone() is None:
                missing.append((assignment, "submit"))
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    connection.close()
    return missing


def kill_often(folder, kills, seed):
    """Kill a server at random instants while two people rank; return how much was confirmed."""
    write_answers(folder)
    server, draw, confirmed, browsers = Server(folder, "rank.answers=answers.jsonl"), random.Random(seed), 0, []
    address = None
    for number in range(kills):
        with server:
            address = address or server.url
            assert server.url == address, "links stay good"
            if not browsers:
                browsers = [Browser(server) for _ in range(2)]
                for browser, name in zip(browsers, ("Ada", "Ben"), strict=True):
                    browser.join(name)
            workers = [Worker(browser, f"{seed} {number} {i}") for i, browser in enumerate(browsers)]
            for worker in workers:
                worker.start()
            # After some confirmations, at a random instant of the work on the next one.
            wait_for_confirmations(workers, draw.randint(1, 12))
            time.sleep(draw.uniform(0.0, 0.05))
            server.kill()
            for worker in workers:
                worker.join(60)
        assert not [worker.problem for worker in workers if worker.problem]
        assert not lost(server.database, workers)
        confirmed += confirmations(workers)
    with server:
        assert server.stop() == 0
    return confirmed


def test_nothing_that_was_confirmed_is_lost(tmp_path):
    assert kill_often(tmp_path, kills=2, seed=0) >= 2


@pytest.mark.slow
def test_nothing_that_was_confirmed_is_lost_at_twenty_instants(tmp_path):
    assert kill_often(tmp_path, kills=20, seed=1) >= 60


def test_a_second_server_names_the_first(tmp_path):
    write_answers(tmp_path, 3)
    with Server(tmp_path, "rank.answers=answers.jsonl") as server:
        second = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "rank", "-c", "people.yaml", "rank.answers=answers.jsonl"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert second.returncode == 2 and second.stderr.count("\n") == 1
        assert f"process {server.process.pid} on" in second.stderr and f":{server.port}" in second.stderr
        assert server.token not in second.stderr
        assert server.stop() == 0
