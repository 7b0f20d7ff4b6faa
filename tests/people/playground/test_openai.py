"""Check OpenAI's interface: answers, streams, errors in its form, queue and limits."""

import json
import threading
import time

import pytest
from starlette.testclient import TestClient

from stages.people.playground.engine import Engine, Piece, Reply, Unanswerable
from stages.people.playground.openai import LARGEST_BODY, Api, routes
from stages.people.playground.requests import Defaults
from stages.people.playground.waiting import Limits

HEADERS = {"Authorization": "Bearer secret-token"}
ASKED = {"model": "sft", "messages": [{"role": "user", "content": "hello"}]}


class Echo:
    """Answer with the last message, and remember the questions."""

    def __init__(self):
        self.questions, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, question, emit, poll):
        self.questions.append(question)
        text = question.messages[-1]["content"]
        if text == "long":
            raise Unanswerable("the conversation has more tokens than the context", "context_length_exceeded")
        for letter in text:
            emit(Piece(letter))
        while not self.gate.wait(0.005):
            poll()
        if text == "broken":
            raise ZeroDivisionError
        return Reply(text, text != "cut", len(text), 5, None, 0)


@pytest.fixture
def echo():
    return Echo()


@pytest.fixture
def engine(echo):
    engine = Engine({"sft": echo, "ppo": echo}, {"sft": "cpu", "ppo": "cpu"}, max_queue=1)
    yield engine
    engine.close()


@pytest.fixture
def client(engine):
    defaults = Defaults(0.7, 0.9, 5, 100, 200)
    api = Api(engine, "secret-token", defaults, {"sft": "fp_1"}, Limits(1), 123)
    with TestClient(routes(api), headers=HEADERS) as client:
        yield client


def ask(client, **more):
    return client.post("/chat/completions", json=ASKED | more)


def events_of(response):
    """Return the events of a stream; the last line must say that it is done."""
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_whole_answer(client):
    found = ask(client).json()
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert (choice["finish_reason"], found["object"], found["model"]) == ("stop", "chat.completion", "sft")
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    assert found["system_fingerprint"] == "fp_1" and found["id"].startswith("chatcmpl-")
    cut = ask(client, messages=[{"role": "user", "content": "cut"}]).json()
    assert cut["choices"][0]["finish_reason"] == "length"


def test_a_stream(client):
    response = ask(client, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    assert len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "hello"
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 6 + ["stop"]
    assert "usage" not in events[-1]
    events = events_of(ask(client, stream=True, stream_options={"include_usage": True}))
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == 10 and events[0]["usage"] is None


def test_what_is_asked_reaches_the_policy(client, echo):
    ask(client)
    assert (echo.questions[-1].options.temperature, echo.questions[-1].options.top_k) == (0.7, 5)
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "d"},
    ]
    settings = dict(temperature=0, top_p=0.5, top_k=3, max_completion_tokens=7, seed=-4, stop="x", user="ada", n=1)
    ask(client, model="ppo", messages=messages, presence_penalty=0, response_format={"type": "text"}, **settings)
    question = echo.questions[-1]
    assert question.messages[0] == {"role": "system", "content": "be kind"} and question.messages[1]["content"] == "ab"
    options = question.options
    assert (options.temperature, options.top_p, options.top_k, options.max_tokens) == (0.0, 0.5, 3, 7)
    assert (options.seed, options.stop, question.policy) == (-4, ("x",), "ppo")
    assert not question.forgets and not question.scored


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"min_p": 0.1}, "min_p"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 201}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"other": 1}}, "stream_options"),
        ({"user": 5}, "user"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "ada"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": "long"}]}, "messages"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openais_form(client, more, param):
    response = ask(client, **more)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error" and error["param"] == param
    assert set(error) == {"message", "type", "param", "code"} and error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_a_policy_are_a_status_even_where_a_stream_was_asked(client, stream):
    response = ask(client, stream=stream, messages=[{"role": "user", "content": "long"}])
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_an_error_in_the_middle_of_a_stream_is_an_event(client):
    text = ask(client, stream=True, messages=[{"role": "user", "content": "broken"}]).text
    assert '"error"' in text.split("\n\n")[-2] and "[DONE]" not in text


def test_tokens_models_and_unknown_places(client):
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": "secret-token"}, {"Authorization": ""}):
        for response in (client.get("/models", headers=headers), client.post("/chat/completions", headers=headers)):
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    listed = client.get("/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["sft", "ppo"]
    assert client.get("/models/ppo").json() == {"id": "ppo", "object": "model", "created": 123, "owned_by": "rlhf"}
    for response in (client.get("/models/gpt"), ask(client, model="gpt"), ask(client, model=7)):
        assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    response = ask(client, model=None)
    assert response.status_code == 400 and response.json()["error"]["message"] == "model: is missing; use sft, ppo"
    assert client.get("/chat/completions").status_code == 405
    assert client.post("/completions", json={}).json()["error"]["code"] == "unknown_url"


def test_bodies_that_are_none(client):
    for raw in (b"", b"[]", b"{", b"\xff", b'"\\ud800"', b"[" * 100_000):
        response = client.post("/chat/completions", content=raw)
        assert response.status_code == 400 and "error" in response.json()
    large = client.post("/chat/completions", content=b" " * (LARGEST_BODY + 1))
    assert large.status_code == 413


def test_a_full_queue_and_a_person_with_too_many_requests(client, engine, echo):
    echo.gate.clear()
    found = []
    threads = []
    for more, state in ({"user": "ada"}, {"running": 1, "waiting": 0}), ({}, {"running": 1, "waiting": 1}):
        threads.append(threading.Thread(target=lambda more=more: found.append(ask(client, **more).status_code)))
        threads[-1].start()
        while engine.state()["cpu"] != state:
            time.sleep(0.005)
    second = ask(client, user="ada")
    assert second.status_code == 429 and second.json()["error"]["code"] == "rate_limit_exceeded"
    full = ask(client, stream=True)
    assert full.status_code == 503 and full.json()["error"]["code"] == "overloaded"
    assert int(full.headers["retry-after"]) >= 1 and int(second.headers["retry-after"]) >= 1
    echo.gate.set()
    for thread in threads:
        thread.join()
    assert found == [200, 200]
    assert ask(client, user="ada").status_code == 200  # counted down again
