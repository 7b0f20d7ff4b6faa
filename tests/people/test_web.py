"""The gate of the servers: tokens, sites, sizes, headers, the lock and the tokens' file."""

import json
import os
import socket
import stat
import subprocess
import sys

import pytest
from starlette.testclient import TestClient

from pipeline.errors import UserError
from stages.people.web import serving
from stages.people.web.lock import hold
from stages.people.web.security import POLICY, Gate, Guard
from tests.people.conftest import LEAD_TOKEN, TOKEN, WRITES


def client_of(page):
    return TestClient(page.app, base_url="http://127.0.0.1:8000")


def test_without_the_token_there_is_nothing(page):
    client = client_of(page)
    assert client.get("/").status_code == 401 and client.get("/static/page.js").status_code == 401
    assert client.get("/api/next").json()["need"] == "token"
    assert client.get("/", params={"token": TOKEN[:-1]}).status_code == 401
    assert client.get("/", params={"token": ""}).status_code == 401
    assert client.post("/api/labelers", json={"name": "Ada"}, headers=WRITES).status_code == 401
    assert client.get("/api/health").json() == {"ok": True}


def test_the_address_begins_a_session_that_scripts_cannot_read(page):
    client = client_of(page)
    answer = client.get("/", params={"token": TOKEN})
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert TOKEN not in cookie, "the cookie does not hold the token itself"
    assert client.get("/static/page.js").status_code == 200 and client.get("/api/guidelines").status_code == 200


def test_the_leads_pages_need_the_leads_token(page):
    member = page.browser()
    assert member.get("/lead").status_code == 403
    assert member.get("/lead", params={"token": TOKEN}).status_code == 401
    assert member.post("/api/lead/verdicts/1", json={"decision": "accepted"}, headers=WRITES).status_code == 403
    lead = page.browser(LEAD_TOKEN, "/lead")
    assert lead.get("/lead").status_code == 200 and lead.get("/").status_code == 200
    assert lead.post("/api/lead/verdicts/1", json={"decision": "accepted"}, headers=WRITES).status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        {"X-RLHF": "2"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8001"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Content-Type": "text/plain"},
    ],
)
def test_requests_of_other_sites_are_refused(page, change):
    client = page.browser()
    assert client.post("/api/labelers", content=b'{"name": "a"}', headers={**WRITES, **change}).status_code == 403
    good = {**WRITES, "Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/labelers", content=b'{"name": "a"}', headers=good).status_code == 200


def test_every_answer_forbids_foreign_code(page):
    client = page.browser()
    answers = [client.get("/"), client.get("/static/page.js"), client.get("/api/next"), client.get("/nothing")]
    answers += [client_of(page).get("/"), client.post("/api/labelers", json={"name": "a"})]
    for answer in answers:
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
    assert "unsafe" not in POLICY and "default-src 'none'" in POLICY


def test_large_bodies_are_refused_announced_or_not(page):
    client = page.browser()
    large = json.dumps({"name": "a" * 70_000}).encode()
    assert client.post("/api/labelers", content=large, headers=WRITES).status_code == 413
    assert (
        client.post("/api/labelers", content=iter([large[:40_000], large[40_000:]]), headers=WRITES).status_code == 413
    )


@pytest.mark.parametrize(
    "raw", [b"{", b"[]", b'{"name": NaN}', b'{"name": "\\ud800"}', b'{"name": "\xff"}', b"[" * 30_000, b"1" * 5000]
)
def test_what_is_not_json_is_a_clear_refusal(page, raw):
    answer = page.browser().post("/api/labelers", content=raw, headers=WRITES)
    assert answer.status_code == 400 and answer.json()["error"]


def test_names_of_files_never_come_from_requests(page, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    client = page.browser()
    for path in (
        "/static/../secret.txt",
        "/static/%2e%2e/secret.txt",
        "/static//etc/passwd",
        "/static/..%2fsecret.txt",
    ):
        answer = client.get(path)
        assert answer.status_code in (404, 405) and "secret" not in answer.text


def test_programs_send_the_token_in_a_header():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    client = TestClient(Guard(app, Gate(TOKEN, bearer_paths=("/v1",))))
    assert client.post("/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}).text == "ok"
    for wrong in ("", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x"):
        assert client.post("/v1/models", headers={"Authorization": wrong}).status_code == 401


def test_tokens_stay_and_only_the_owner_reads_them(tmp_path):
    path = tmp_path / "people" / "tokens.json"
    first = serving.load_tokens(path)
    assert serving.load_tokens(path) == first and len({first.page, first.lead}) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert serving.load_tokens(path, renew=True).page != first.page
    path.write_text("{}")
    with pytest.raises(UserError, match="tokens"):
        serving.load_tokens(path)


def test_a_port_is_kept_while_it_is_free():
    with serving.bind("127.0.0.1", 0, "rank") as listener:
        port = listener.getsockname()[1]
        listener.listen()
        with serving.bind("127.0.0.1", 0, "rank", last=port) as other:
            assert other.getsockname()[1] != port
        with pytest.raises(UserError, match=r"rank\.port"):
            serving.bind("127.0.0.1", port, "rank")
    with serving.bind("127.0.0.1", 0, "rank", last=port) as again:
        assert again.getsockname()[1] == port
    with pytest.raises(UserError, match=r"rank\.host"):
        serving.bind("host.invalid", 0, "rank")
    with pytest.raises(UserError, match=r"rank\.port: 6000 is one that browsers refuse"):
        serving.bind("127.0.0.1", 6000, "rank")


def test_small_answers_are_sent_at_once():
    """Nagle's algorithm would hold a body back until the header is acknowledged."""
    from asyncio import base_events

    with serving.bind("127.0.0.1", 0, "rank") as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as taken:
            base_events._set_nodelay(taken)  # what asyncio does with each connection
            assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_server_that_others_reach_says_so():
    assert serving.exposed_line("127.0.0.1", "rank") is None and serving.exposed_line("localhost", "rank") is None
    assert "TLS" in serving.exposed_line("0.0.0.0", "rank")


HOLD = """
import sys, time
from pathlib import Path
from stages.people.web.lock import hold
with hold(Path(sys.argv[1]), "rlhf rank"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_servers_on_one_experiment_are_refused_by_host_and_process(tmp_path):
    path = tmp_path / "people" / "rank.lock"
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refused, hold(path, "rlhf rank"):
            pass
        assert str(child.pid) in str(refused.value) and os.uname().nodename in str(refused.value)
    finally:
        child.kill()
        child.wait()
    with hold(path, "rlhf rank"):  # the kernel freed it
        pass
    assert path.read_text() == ""


def test_a_server_that_ended_with_an_error_holds_nothing(tmp_path):
    path = tmp_path / "rank.lock"
    with pytest.raises(ValueError), hold(path, "rlhf rank"):
        raise ValueError
    assert path.read_text() == ""


def test_a_server_of_another_host_counts_as_running(tmp_path):
    path = tmp_path / "rank.lock"
    path.write_text(json.dumps({"pid": 7, "host": "elsewhere", "address": ""}))
    with pytest.raises(UserError, match=r"process 7 on elsewhere.*remove the file"), hold(path, "rlhf rank"):
        pass
    path.unlink()
    with hold(path, "rlhf rank"):
        pass
