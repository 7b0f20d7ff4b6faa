"""Check the page's requests: streams, what is kept and what is not, whose it is, and the rows."""

import json
import sqlite3
import threading
import time

import pytest
from rich.console import Console
from starlette.testclient import TestClient

from data.source import Source
from data.sources import scan
from pipeline.errors import UserError
from stages.people.playground import collect, command
from stages.people.playground.app import FILES
from stages.people.playground.engine import Engine, Piece, Reply, Unanswerable
from stages.people.store.database import open_database
from tests.people.playground.experiments import experiment_of

TOKEN = "token-of-this-test"
WRITES = {"X-RLHF": "1", "Content-Type": "application/json"}


class Names:
    """Answer with the policy's name and the number of messages that it read."""

    def __init__(self):
        self.questions, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, question, emit, poll):
        self.questions.append(question)
        while not self.gate.wait(0.005):
            poll()
        if question.messages[-1]["content"] == "too long":
            raise Unanswerable("the question has 99 tokens, and the context only 9")
        text = "" if question.messages[-1]["content"] == "nothing" else f"{question.policy} {len(question.messages)}"
        emit(Piece(text))
        return Reply(text, True, 2, 5, 1.5 if question.scored else None, 0)


class Store:
    """Stand in for the experiment's artifacts."""

    def __init__(self, base):
        self.base = base

    def manifest(self, name):
        return {"digest": "0123456789abcdef"}


class Playground:
    """A playground and the people in it."""

    def __init__(self, folder, **settings):
        self.answerer, self.store = Names(), Store(folder)
        self.experiment = experiment_of(**settings)
        devices = {"sft": "cpu", "ppo": "cpu", "dpo": "cpu"}
        self.engine = Engine(dict.fromkeys(devices, self.answerer), devices, 2)
        self.database = open_database(folder, "fake")
        self.app = command.make_app(self.experiment, self.store, self.engine, self.database, TOKEN, is_scored=True)

    def person(self):
        client = TestClient(self.app, base_url="http://127.0.0.1:8000", headers=WRITES)
        assert client.get("/", params={"token": TOKEN}).status_code == 200
        assert client.get("/api/setup").status_code == 200
        return client

    def count(self, table):
        with self.database.read() as connection:
            return connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]

    def rows(self, name):
        with self.database.read() as connection:
            return collect.EXPORTS[name](collect.trees(connection))


@pytest.fixture
def playground(tmp_path):
    playground = Playground(tmp_path)
    yield playground
    playground.engine.close()
    playground.database.close()


@pytest.fixture
def ada(playground):
    return playground.person()


def ask(client, text="hello", policies=("sft",), **more):
    """Ask, and return the events by type."""
    response = client.post("/api/ask", json={"text": text, "policies": list(policies), "scored": True, **more})
    assert response.status_code == 200, response.text
    events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert events[0]["type"] == "start" and events[-1]["type"] == "end"
    found = {"start": events[0], "end": events[-1]}
    found["answers"] = sorted((e for e in events if e["type"] == "answer"), key=lambda event: event["side"])
    found["failed"] = [e for e in events if e["type"] == "failed"]
    return found


def test_a_question_is_answered_side_by_side_and_nothing_is_kept(playground, ada):
    found = ask(ada, policies=["sft", "ppo"], seed=7, temperature=0.5, top_k=3, max_tokens=9, system="be kind")
    assert found["start"] == {"type": "start", "names": ["sft", "ppo"], "sides": 2, "seed": 7}
    assert [(a["text"], a["score"], a["id"]) for a in found["answers"]] == [("sft 2", 1.5, None), ("ppo 2", 1.5, None)]
    options = playground.answerer.questions[0].options
    assert (options.seed, options.temperature, options.top_k, options.max_tokens) == (7, 0.5, 3, 9)
    history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "sft 2"}]
    assert ask(ada, "and now ?", history=history)["answers"][0]["text"] == "sft 3"
    for table in ("conversations", "turns"):
        assert playground.count(table) == 0


def test_a_kept_conversation_becomes_rows_of_data(playground, ada, tmp_path):
    first = ask(ada, "what is red ?", ["sft", "ppo"], consent=True, kind="open_qa", system="be kind", seed=4)
    conversation, seq = first["start"]["conversation"], first["start"]["seq"]
    ids = [answer["id"] for answer in first["answers"]]
    place = {"conversation": conversation, "seq": seq}
    assert (
        ada.post("/api/choices", json={**place, "tiers": [[ids[1]], [ids[0]]]}).json()["answers"][1]["model"] == "ppo"
    )
    assert ada.post(f"/api/answers/{ids[1]}/correction", json={"text": " a frog "}).status_code == 200
    assert ada.post(f"/api/answers/{ids[0]}/thumb", json={"up": False}).json() == {"up": False}
    ask(ada, "sure ?", consent=True, conversation=conversation, after=ids[1], corrected=True)
    read = playground.answerer.questions[-1].messages
    assert [message["content"] for message in read] == ["be kind", "what is red ?", "a frog", "sure ?"]

    (prompt,) = playground.rows("prompts")
    assert prompt["prompt"] == list(read) and prompt["kind"] == "open_qa" and prompt["source"] == "playground"
    (ranking,) = playground.rows("rankings")
    assert ranking["responses"] == ["sft 2", "ppo 2"] and ranking["ranks"] == [2, 1]
    assert ranking["prompt"] == list(read[:2]) and ranking["labeler"] == ranking["user_id"] == prompt["user_id"]
    assert ranking["meta"]["models"] == ["sft", "ppo"] and ranking["meta"]["seeds"] == [4, 4]
    assert ranking["meta"]["reward_model_scores"] == [1.5, 1.5] and ranking["meta"]["sampling"][0]["top_p"] == 1.0
    (demonstration,) = playground.rows("demonstrations")
    assert demonstration["completion"] == "a frog" and demonstration["meta"]["answer"] == "ppo 2"
    assert [row["label"] for row in playground.rows("thumbs")] == [False]

    out = tmp_path / "out"
    assert command.export(playground.experiment, playground.store, out, Console(quiet=True)) == 0
    for kind in ("prompts", "rankings", "demonstrations"):
        found = scan(kind, Source(out / f"{kind}.jsonl"))
        assert not found.errors and found.rows == 1


def test_an_export_replaces_exports_and_no_other_file(playground, ada, tmp_path):
    ask(ada, consent=True)
    for _ in range(2):
        assert command.export(playground.experiment, playground.store, tmp_path, Console(quiet=True)) == 0
    own = tmp_path / "demonstrations.jsonl"
    own.write_text('{"prompt": "a", "completion": "b"}\n')
    before = (tmp_path / "prompts.jsonl").read_bytes()
    ask(ada, consent=True)
    with pytest.raises(UserError, match=r"demonstrations\.jsonl: exists, and no playground has written it"):
        command.export(playground.experiment, playground.store, tmp_path, Console(quiet=True))
    assert own.read_text().startswith('{"prompt": "a"') and (tmp_path / "prompts.jsonl").read_bytes() == before


def test_what_a_person_takes_back_is_gone(playground, ada, tmp_path):
    found = ask(ada, policies=["sft", "ppo"], consent=True)
    answer, conversation = found["answers"][0]["id"], found["start"]["conversation"]
    for up in (True, False, None):
        ada.post(f"/api/answers/{answer}/thumb", json={"up": up})
    assert playground.count("thumbs") == 0
    ada.post(f"/api/answers/{answer}/correction", json={"text": "x"})
    ada.post(f"/api/answers/{answer}/correction", json={"text": " "})
    assert playground.count("corrections") == 0
    tiers = [[a["id"] for a in found["answers"]]]
    ada.post("/api/choices", json={"conversation": conversation, "seq": found["start"]["seq"], "tiers": tiers})
    assert playground.rows("rankings")[0]["ranks"] == [1, 1]
    ada.post(f"/api/answers/{answer}/thumb", json={"up": True})
    assert ada.post(f"/api/conversations/{conversation}/delete", json={}).json() == {"ok": True}
    for table in ("conversations", "turns", "choices", "thumbs", "corrections"):
        assert playground.count(table) == 0
    with pytest.raises(UserError, match="nobody has shared"):
        command.export(playground.experiment, playground.store, tmp_path / "out", Console(quiet=True))


def test_a_person_can_take_back_everything_later(playground, ada):
    for _ in range(2):
        answers = ask(ada, policies=["sft", "ppo"], consent=True)["answers"]
        ada.post(f"/api/answers/{answers[0]['id']}/thumb", json={"up": True})
    bob = playground.person()
    ask(bob, consent=True)
    assert ada.get("/api/setup").json()["kept"] == 2 and bob.get("/api/setup").json()["kept"] == 1
    assert ada.post("/api/conversations/delete", json={}).json() == {"deleted": 2}
    assert playground.count("conversations") == 1 and playground.count("thumbs") == 0
    assert ada.get("/api/setup").json()["kept"] == 0


def test_nobody_reaches_what_is_somebody_elses(playground, ada):
    found = ask(ada, policies=["sft", "ppo"], consent=True)
    answer, conversation, seq = found["answers"][0]["id"], found["start"]["conversation"], found["start"]["seq"]
    bob = playground.person()
    tiers = [[a["id"] for a in found["answers"]]]
    for path, body in (
        (f"/api/answers/{answer}/thumb", {"up": True}),
        (f"/api/answers/{answer}/correction", {"text": "x"}),
        (f"/api/conversations/{conversation}/delete", {}),
        ("/api/choices", {"conversation": conversation, "seq": seq, "tiers": tiers}),
        (
            "/api/ask",
            {"text": "x", "policies": ["sft"], "consent": True, "conversation": conversation, "after": answer},
        ),
    ):
        assert bob.post(path, json=body).status_code == 404, path
    ask(bob, consent=True)
    assert len({row["user_id"] for row in playground.rows("prompts")}) == 2
    assert not any("key" in json.dumps(row) for row in playground.rows("prompts"))


def test_blind_answers_hide_names_and_scores_until_one_has_chosen(playground, ada):
    orders = set()
    for _ in range(20):
        found = ask(ada, policies=["sft", "ppo"], blind=True, consent=True)
        orders.add(tuple(answer["text"][:3] for answer in found["answers"]))
        assert found["start"]["names"] is None and [a["score"] for a in found["answers"]] == [None, None]
        assert found["end"]["key"] is None
    assert orders == {("sft", "ppo"), ("ppo", "sft")}
    tiers = [[found["answers"][0]["id"]], [found["answers"][1]["id"]]]
    place = {"conversation": found["start"]["conversation"], "seq": found["start"]["seq"]}
    named = ada.post("/api/choices", json={**place, "tiers": tiers}).json()["answers"]
    assert [a["model"] for a in named] == [a["text"][:3] for a in found["answers"]] and named[0]["score"] == 1.5
    assert playground.rows("rankings")[0]["meta"]["blind"] is True
    found = ask(ada, policies=["sft", "ppo"], blind=True)
    named = ada.post("/api/reveal", json={"key": found["end"]["key"]}).json()["answers"]
    assert [a["model"] for a in named] == [a["text"][:3] for a in found["answers"]]
    assert ada.post("/api/reveal", json={"key": "other"}).status_code == 404


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ({"text": " "}, "text"),
        ({"text": "x" * 50_001}, "50,000"),
        ({"policies": []}, "policies"),
        ({"policies": ["gpt"]}, "policies"),
        ({"policies": ["sft", "sft"]}, "policies"),
        ({"policies": "sft"}, "policies"),
        ({"temperature": 11}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"seed": "x"}, "seed"),
        ({"kind": "other kind"}, "kind"),
        ({"consent": 1}, "consent"),
        ({"history": [{"role": "assistant", "content": 3}]}, "messages"),
        ({"history": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}, "empty"),
        ({"conversation": "x", "consent": True}, "conversation"),
    ],
)
def test_questions_that_are_wrong(playground, ada, body, what):
    response = ada.post("/api/ask", json={"text": "hello", "policies": ["sft"], **body})
    assert response.status_code in (400, 413) and what in response.json()["error"]
    assert ask(ada)["answers"]  # the person's next question is not counted against the wrong one


def test_an_answer_that_fails_is_said_and_only_the_question_is_kept(playground, ada):
    found = ask(ada, "too long", consent=True)
    assert "context only 9" in found["failed"][0]["sentence"] and playground.count("turns") == 1
    again = ask(ada, "shorter", consent=True, conversation=found["start"]["conversation"])
    assert again["start"]["seq"] == 3 and again["answers"][0]["text"] == "sft 1"
    empty = ask(ada, "nothing", consent=True)["answers"][0]
    assert empty["text"] == ""


def test_one_person_cannot_take_the_whole_queue(playground, ada):
    playground.answerer.gate.clear()
    threads = [threading.Thread(target=ask, args=(ada,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    while playground.engine.state()["cpu"] != {"running": 1, "waiting": 1}:
        time.sleep(0.005)
    body = {"text": "x", "policies": ["sft"]}
    refused = ada.post("/api/ask", json=body)
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    bob = playground.person()
    full = bob.post("/api/ask", json={**body, "policies": ["sft", "ppo"], "consent": True})
    assert full.status_code == 503 and int(full.headers["retry-after"]) > 0 and "wait already" in full.json()["error"]
    assert playground.count("conversations") == 0  # nothing is kept of what was never answered
    playground.answerer.gate.set()
    for thread in threads:
        thread.join()


def test_who_may_not_come_in(playground):
    stranger = TestClient(playground.app, base_url="http://127.0.0.1:8000")
    for path in ("/", "/api/setup", "/static/playground.js"):
        assert stranger.get(path).status_code == 401
    ada = playground.person()
    body = json.dumps({"text": "x", "policies": ["sft"]})
    for headers in ({"X-RLHF": "0"}, {"Origin": "http://evil.example"}, {"Content-Type": "text/plain"}):
        assert ada.post("/api/ask", content=body, headers={**WRITES, **headers}).status_code == 403
    assert ada.post("/v1/chat/completions", content=body).status_code == 401  # a cookie is not enough
    assert ada.post("/api/ask", content=b" " * 600_000).status_code == 413
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/index.html"):
        assert ada.get(path).status_code == 404


def test_every_file_of_the_page_is_there_and_none_has_code_inside(playground, ada):
    page = ada.get("/")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "<script>" not in page.text and "style=" not in page.text and "onclick" not in page.text
    for name, (path, kind) in FILES.items():
        found = ada.get(f"/static/{name}")
        assert found.status_code == 200 and found.headers["content-type"].startswith(kind) and path.is_file()
        assert not any(word in found.text for word in ("innerHTML", "eval(", "://"))


def test_the_interface_for_programs_is_beside_the_page(playground):
    client = TestClient(playground.app, headers={"Authorization": f"Bearer {TOKEN}"})
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["sft", "ppo", "dpo"]
    asked = {"model": "ppo", "messages": [{"role": "user", "content": "hello"}]}
    found = client.post("/v1/chat/completions", json=asked).json()
    assert found["choices"][0]["message"]["content"] == "ppo 1" and found["system_fingerprint"] == "fp_0123456789ab"


def test_a_disk_that_is_full_is_said(playground, ada, monkeypatch):
    def fail(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(collect, "add_answer", fail)
    found = ask(ada, consent=True)
    assert "could not be kept" in found["failed"][0]["sentence"] and not found["answers"]
    monkeypatch.setattr(collect, "add_question", fail)
    refused = ada.post("/api/ask", json={"text": "x", "policies": ["sft"], "consent": True})
    assert refused.status_code == 503 and "not saved" in refused.json()["error"]
    assert ask(ada)["answers"]
