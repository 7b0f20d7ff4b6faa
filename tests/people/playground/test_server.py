"""Check a real server: streams over the network, clients that leave, signals, two at once."""

import json
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.people.playground.running import ROOT, Server


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.stop(signal.SIGKILL)


def person(server):
    client = httpx.Client(base_url=server.origin, headers={"X-RLHF": "1"}, timeout=120)
    assert client.get("/", params={"token": server.token}).status_code == 200
    client.get("/api/setup")
    return client


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def events(response):
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def programs(server):
    return httpx.Client(
        base_url=f"{server.origin}/v1", headers={"Authorization": f"Bearer {server.token}"}, timeout=120
    )


def asked(text, **more):
    return {"model": "sft", "messages": [{"role": "user", "content": text}], **more}


def test_pieces_come_one_by_one_and_a_client_that_leaves_stops_the_answer(server):
    ada = person(server)
    body = {"text": "slow 200", "policies": ["sft", "ppo"]}
    with ada.stream("POST", "/api/ask", json=body) as response:
        found = []
        for event in events(response):
            found.append((time.monotonic(), event))
            if sum(event["type"] == "piece" for _, event in found) == 5:
                break
    pieces = [moment for moment, event in found if event["type"] == "piece"]
    assert pieces[-1] - pieces[0] > 0.1  # they were not gathered on the way
    wait_for(server.stopped)
    assert len(server.stopped()) == 1 and int(server.stopped()[0].split()[1]) < 60  # the second was never begun
    assert [e["type"] for e in events(ada.post("/api/ask", json={"text": "x", "policies": ["ppo"]}))][-1] == "end"


@pytest.mark.parametrize("stream", [True, False])
def test_a_program_that_leaves_stops_the_answer(server, stream):
    client = programs(server)
    with pytest.raises(httpx.TimeoutException):
        if stream:
            with client.stream("POST", "/chat/completions", json=asked("slow 200", stream=True)) as response:
                for _ in events(response):
                    raise httpx.ReadTimeout("enough")
        client.post("/chat/completions", json=asked("slow 200"), timeout=0.5)
    wait_for(server.stopped)
    assert client.post("/chat/completions", json=asked("hello")).json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_answers_and_the_server(server, number):
    ada, found = person(server), []

    def read():
        with ada.stream("POST", "/api/ask", json={"text": "slow 400", "policies": ["sft"]}) as response:
            found.extend(events(response))

    thread = threading.Thread(target=read)
    thread.start()
    wait_for(lambda: len(found) > 3)
    assert server.stop(number) == 0
    thread.join(timeout=60)
    assert not thread.is_alive() and int(server.stopped()[0].split()[1]) < 399
    assert found[-2]["sentence"] == "the server is stopping" and found[-1]["type"] == "end"
    assert "Traceback" not in server.log.read_text()


def test_a_second_server_is_refused_and_a_killed_one_starts_again_at_the_same_address(server, tmp_path):
    command = [sys.executable, str(ROOT / "tests/people/playground/server.py"), str(tmp_path), '{"new_tokens": true}']
    before = (tokens := next(tmp_path.rglob("playground-tokens.json"))).read_bytes()
    second = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert second.returncode != 0 and f"process {server.process.pid}" in second.stderr and "in use" not in second.stderr
    assert tokens.read_bytes() == before  # what is refused changes nothing
    ada, page = person(server), server.address
    ada.post("/api/ask", json={"text": "hello", "policies": ["sft"], "consent": True})
    server.stop(signal.SIGKILL)
    server.start()
    assert server.address == page
    body = {"text": "more", "policies": ["sft"], "consent": True, "conversation": 1, "after": 2}
    response = ada.post("/api/ask", json=body)
    assert [event["id"] for event in events(response) if event["type"] == "answer"] == [4]
