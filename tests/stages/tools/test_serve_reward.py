"""Test `rlhf serve-reward`: its answers, its refusals, and its scores against those in process."""

import http.client
import json
import socket
import threading
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import torch

from data.encode import encode_prompt, encode_response
from pipeline.errors import UserError
from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore
from stages.models.ensemble import load_reward_model
from stages.models.publish import save_model
from stages.models.same_tokenizer import tokenizer_fingerprint
from stages.scorers.http import RequestFailed, post_json
from stages.scorers.reward_model import RewardModelScorer
from stages.scorers.scorer import ScoreRequest, ScorerSpec
from stages.scorers.scorers import make_scorer
from stages.settings.scorers.url import UrlScorer
from stages.shared.runtime import make_accelerator
from stages.tools import serve_reward, serve_reward_http
from stages.tools.serve_reward_http import MOST_BYTES, RewardServer, WrongRequest, parse
from tests.builders import tiny_scalar, tiny_tokenizer

EXPERIMENT = SimpleNamespace(
    launch=SimpleNamespace(device="cpu"),
    ppo=SimpleNamespace(rewards=None, reward_ensemble="min", per_device_train_batch_size=2),
    model=SimpleNamespace(attn_implementation="sdpa", dtype="float32"),
)
ROWS = [
    {"prompt": "what color is the fox ?"},
    {"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]},
    {"prompt": "what ?"},
    {"prompt": "hi"},
]
IDS = {"tokenizer": "x", "prompt": [1], "response": [2]}
RESPONSES = ["red .", "the fox is red and the sky is blue", "", "the sky"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    """Return artifacts with a published rm: an ensemble of two, and a judge."""
    store = ArtifactStore(tmp_path_factory.mktemp("artifacts"), "fake")
    with store.lock("rm"):
        content = store.folder("rm") / ".tmp-publish"
        for seed, folder in enumerate(("model", "ensemble/1", "judge/model")):
            save_model(tiny_scalar("llama", seed, tokenizer, bias=0.5 * seed), tokenizer, content / folder, card="")
        fields = ("fingerprint", "config", "inputs", "metrics", "finished_at", "run_id")
        store.publish("rm", content, {"stage": "rm"} | dict.fromkeys(fields, ""))
    return store


@pytest.fixture
def server(store):
    """Return a function that starts to serve, and gives (address, the flag that stops it)."""
    stops, threads = [], []

    def start(**options):
        said, stop = [], StopFlag()
        run = lambda: serve_reward.run(EXPERIMENT, store, serve_reward.Options(**options), stop, say=said.append)  # noqa: E731
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while not said or " scores at " not in said[-1]:
            assert thread.is_alive()
            time.sleep(0.01)
        stops.append(stop)
        threads.append(thread)
        return said[-1].split(" scores at ")[1], stop, thread

    yield start
    for stop in stops:
        stop.requested = True
    for thread in threads:
        thread.join(10)


def requested(tokenizer, rows=ROWS, texts=RESPONSES):
    """Return a request for responses, the second and the third of them cut off."""
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    ids = [encode_response(tokenizer, text, finished=i not in (1, 2)) for i, text in enumerate(texts)]
    return ScoreRequest(prompts, ids, tokenizer, data_rows=rows)


@pytest.mark.parametrize("model, batch_size, how", [("rm", None, None), ("judge", 1, None), ("rm", 64, "mean")])
def test_served_scores_are_those_of_the_scorer_in_process(model, batch_size, how, server, store, tokenizer):
    """To the bit: system turns, cut off and empty responses and the ensemble included."""
    url, *_ = server(model=model, batch_size=batch_size, how=how)
    asked = make_scorer(ScorerSpec(None, 0, None, 8, settings=UrlScorer(url=url, retries=0), name="far"))
    served = asked.score(requested(tokenizer)).total
    folder = store.folder("rm") / serve_reward.OWN[model]
    accelerator = make_accelerator("cpu", "float32")
    spec = ScorerSpec(load_reward_model(folder, how or "min"), tokenizer.pad_token_id, accelerator, batch_size or 2)
    in_process = RewardModelScorer(spec).score(requested(tokenizer)).total
    assert torch.equal(served, in_process) and len(set(served.tolist())) == 4


def test_ids_of_the_same_tokenizer_are_read_as_they_were_sampled(server, store, tokenizer):
    """What was sampled need not be what its text is encoded as. Other ids are not read."""
    url, *_ = server()
    prompt, word = encode_prompt(tokenizer, "hi"), encode_response(tokenizer, "fox", finished=False)
    spelled = [i for letter in "fox" for i in encode_response(tokenizer, letter, finished=False)]
    assert spelled != word

    def score(name, response):
        ids = [{"tokenizer": name, "prompt": prompt, "response": response}]
        body = {"prompts": ["hi"], "responses": ["fox"], "finished": [False], "ids": ids}
        return post_json(url, body, timeout=60)["scores"][0]

    ours = tokenizer_fingerprint(tokenizer)
    accelerator = make_accelerator("cpu", "float32")
    model = load_reward_model(store.folder("rm") / "model", "min")
    scorer = RewardModelScorer(ScorerSpec(model, tokenizer.pad_token_id, accelerator, 2))
    expected = scorer.score(ScoreRequest([prompt] * 2, [word, spelled], tokenizer)).total.tolist()
    assert [score(ours, word), score(ours, spelled)] == pytest.approx(expected, abs=1e-6)
    assert score("other", spelled) == score(ours, word) != score(ours, spelled)
    with pytest.raises(RequestFailed, match=r"HTTP 400: ids\[0\] has an id that the tokenizer does not have"):
        score(ours, [len(tokenizer)])


def test_a_folder_is_served_too(server, store):
    url, *_ = server(model=str(store.folder("rm") / "ensemble" / "1"))
    assert len(post_json(url, {"prompts": ["hi"], "responses": ["red"]}, timeout=60)["scores"]) == 1
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    assert answer.status == 200 and json.loads(answer.read())["status"] == "ok"


@pytest.mark.parametrize(
    "given, words",
    [
        ("nonsense", "the body is not an object"),
        ({}, "prompts is missing or not a list"),
        ({"prompts": ["hi"]}, "responses is missing or not a list"),
        ({"prompts": ["hi"], "responses": "red"}, "responses is missing or not a list"),
        ({"prompts": [], "responses": []}, "responses is an empty list"),
        ({"prompts": ["hi"], "responses": ["a", "b"]}, "1 prompts, 2 responses and 2 entries of finished"),
        ({"prompts": ["hi"], "responses": [3]}, "responses[0] is not a text"),
        ({"prompts": ["hi"], "responses": ["a"], "finished": [1]}, "finished[0] is neither true nor false"),
        ({"prompts": ["hi"], "responses": ["a"], "finished": None}, "finished is missing or not a list"),
        ({"prompts": ["hi"], "responses": ["\ud83d"]}, "responses[0] is not a text"),
        ({"prompts": ["\ud83d"], "responses": ["a"]}, "prompts[0] is neither a text nor a list of messages"),
        ({"prompts": [3], "responses": ["a"]}, "prompts[0] is neither a text nor a list of messages"),
        ({"prompts": [[]], "responses": ["a"]}, "prompts[0] is neither a text nor a list of messages"),
        ({"prompts": [[{"role": "user"}]], "responses": ["a"]}, "prompts[0][0] is no message"),
        ({"prompts": ["hi"], "responses": ["a"], "ids": []}, "0 entries of ids for 1 responses"),
        ({"prompts": ["hi"], "responses": ["a"], "ids": [{"prompt": [1], "response": [2]}]}, "ids[0] is wrong"),
        ({"prompts": ["hi"], "responses": ["a"], "ids": [{**IDS, "prompt": []}]}, "ids[0] is wrong"),
        ({"prompts": ["hi"], "responses": ["a"], "ids": [{**IDS, "response": [True]}]}, "ids[0] is wrong"),
    ],
)
def test_a_wrong_request_is_refused_with_a_reason(given, words):
    with pytest.raises(WrongRequest) as wrong:
        parse(json.dumps(given).encode())
    assert words in str(wrong.value) and wrong.value.status == 400


def test_limits_of_a_request(server):
    url, *_ = server()
    for body, words in [
        ({"prompts": ["hi"], "responses": ["the " * 500]}, r"HTTP 400: responses\[0\] has \d+ tokens with its prompt"),
        ({"prompts": ["hi"] * 5000, "responses": ["a"] * 5000}, "HTTP 413: 5000 responses; send at most 4096"),
        ("x" * (MOST_BYTES + 1), "HTTP 413: the body has"),
    ]:
        with pytest.raises(RequestFailed, match=words):
            post_json(url, body, timeout=20)
    with pytest.raises(RequestFailed, match=r"HTTP 404: there is nothing at this address; POST to /score"):
        post_json(url.replace("/score", "/reward"), {}, timeout=60)
    assert raw(url, b"POST /score HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.0 411 ")
    assert raw(url, b"DELETE /score HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.0 501 ")
    assert raw(url, b"\x16\x03\x01\r\n\r\n").split(b"\r\n\r\n")[-1].startswith(b'{"error": ')
    assert len(post_json(url, {"prompts": ["hi"], "responses": ["red"]}, timeout=60)["scores"]) == 1


def raw(url, request):
    """Return the bytes that the server answers to some bytes."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    return answer


def test_a_key_is_asked_for(server, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "sk-secret")
    url, *_ = server(key_env="REWARD_KEY")
    body = {"prompts": ["hi"], "responses": ["red"]}
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "sk-secret"}):
        with pytest.raises(RequestFailed, match="HTTP 401: the key is missing or wrong"):
            post_json(url, body, timeout=60, headers=headers)
    assert post_json(url, body, timeout=60, headers={"Authorization": "Bearer sk-secret"})["scores"]


def test_a_request_that_has_come_is_answered_before_the_end():
    """And then nobody listens any more."""
    inside = threading.Event()

    def score(batch):
        inside.set()
        time.sleep(0.5)
        return [1.0] * len(batch.responses)

    server = RewardServer("127.0.0.1", 0, score, {}, None)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    answers = []
    body = {"prompts": ["hi"], "responses": ["red"]}
    asking = threading.Thread(target=lambda: answers.append(post_json(server.url, body, timeout=60)))
    asking.start()
    assert inside.wait(60)
    server.finish()
    asking.join(60)
    assert answers == [{"scores": [1.0]}]
    with pytest.raises(RequestFailed, match="cannot be reached"):
        post_json(server.url, body, timeout=60)


def test_a_signal_ends_it(server):
    _, stop, thread = server()
    stop.requested = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("scores", [[float("nan")], RuntimeError("device lost")])
def test_a_model_that_fails_is_an_error_of_the_server(scores):
    def score(batch):
        if isinstance(scores, Exception):
            raise scores
        return serve_reward.score_batch(batch, model, tiny_tokenizer(), None)

    model = SimpleNamespace(score=lambda request: SimpleNamespace(total=torch.tensor(scores)))
    server = RewardServer("127.0.0.1", 0, score, {}, None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(RequestFailed, match="HTTP 500: scoring failed"):
        post_json(server.url, {"prompts": ["hi"], "responses": ["red"]}, timeout=60)
    server.finish()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model": "nowhere"}, "--model: nowhere has no config.json"),
        ({"host": "203.0.113.7"}, "--host, --port: cannot listen on 203.0.113.7:0"),
        ({"port": 99999}, "--port: 99999 is no port"),
        ({"key_env": "NO_SUCH_KEY"}, "--key-env: the environment has no variable NO_SUCH_KEY"),
        ({"batch_size": 0}, "--batch-size: 0 is not positive"),
    ],
)
def test_mistakes_of_the_command_are_lines(options, words, store):
    with pytest.raises(UserError) as error:
        serve_reward.run(EXPERIMENT, store, serve_reward.Options(**options), StopFlag())
    assert words in str(error.value)


def test_a_missing_model_is_a_line(tmp_path):
    empty = ArtifactStore(tmp_path, "fake")
    with pytest.raises(UserError, match="rm"):
        serve_reward.run(EXPERIMENT, empty, serve_reward.Options(), StopFlag())


def test_other_machines_without_a_key_are_worth_a_line(store):
    said, stop = [], StopFlag(requested=True)
    serve_reward.run(EXPERIMENT, store, serve_reward.Options(host="0.0.0.0"), stop, say=said.append)
    assert said[0].startswith("whoever reaches 0.0.0.0 can ask for scores: --key-env NAME")
    assert not serve_reward.is_loopback("10.0.0.1") and serve_reward.is_loopback("::1")


def test_time_and_bytes_are_bounded():
    assert serve_reward_http.RewardHandler.timeout <= 60 and MOST_BYTES <= 2**26
