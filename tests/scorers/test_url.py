"""Test the scorer `url:` against servers that answer, are slow, wrong, full of NaN, or gone."""

import json
import threading
import time
from datetime import date

import pytest
import torch

from data.encode import encode_prompt, encode_response
from pipeline.errors import UserError
from stages.scorers.scorer import ScorerDropped, ScoreRequest, ScorerLost, ScorerSpec
from stages.scorers.scorers import make_scorer
from stages.scorers.url_protocols import PROTOCOLS
from stages.settings.scorers.scorer import scorer_problems
from stages.settings.scorers.url import UrlScorer
from tests.builders import tiny_tokenizer
from tests.scorers.http_server import Given, free_port, serving

ROWS = [
    {"prompt": "what color is the fox ?", "answer": "red"},
    {"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}], "answer": 1},
    {"prompt": "what ?", "answer": None, "label": "sky"},
]
RESPONSES = ["red .", "the fox is red", "the sky"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def request_of_three(tokenizer):
    return request_for(tokenizer, ROWS, RESPONSES)


def request_for(tokenizer, rows, responses, **more):
    """Return a request for responses, all but the second of them finished."""
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    ids = [encode_response(tokenizer, text, finished=i != 1) for i, text in enumerate(responses)]
    return ScoreRequest(prompts, ids, tokenizer, data_rows=rows, **more)


def scorer_of(url, records=None, **settings):
    settings = {"retries": 0, "timeout": 5.0} | settings
    return make_scorer(
        ScorerSpec(None, 0, None, 8, settings=UrlScorer(url=url, **settings), name="far", records=records)
    )


def lengths(body, _):
    """Score by the letters of a response, with a part."""
    scores = [float(len(text)) for text in body["responses"]]
    return {"scores": scores, "parts": {"half": [x / 2 for x in scores]}}


def test_each_response_is_sent_with_its_prompt_and_row(request_of_three):
    with serving(lengths) as served:
        scores = scorer_of(served.url).score(request_of_three)
    assert scores.total.tolist() == [len(text) for text in RESPONSES] and scores.total.dtype == torch.float32
    assert scores.parts["half"].tolist() == [len(text) / 2 for text in RESPONSES]
    [body] = served.requests
    for one, prompt, response in zip(
        body.pop("ids"), request_of_three.prompts, request_of_three.responses, strict=True
    ):
        assert (one["prompt"], one["response"]) == (prompt, response) and len(one["tokenizer"]) == 64
    assert body == {
        "prompts": [[{"role": "user", "content": ROWS[0]["prompt"]}], ROWS[1]["prompt"]]
        + [[{"role": "user", "content": "what ?"}]],
        "responses": RESPONSES,
        "finished": [True, False, True],
        "rows": [{"answer": "red"}, {"answer": 1}, {"answer": None, "label": "sky"}],
    }


def test_scores_come_back_in_order_whatever_the_batches(tokenizer):
    responses = [("the " * (1 + i % 7)).strip() for i in range(20)]
    request = request_for(tokenizer, [ROWS[0]] * 20, responses)
    slow_first = lambda body, n: Given(lengths(body, n), seconds=0.2 if n == 0 else 0)  # noqa: E731
    with serving(slow_first) as served:
        scores = scorer_of(served.url, batch_size=3, concurrency=2).score(request)
    assert scores.total.tolist() == [len(text) for text in responses]
    assert max(len(body["responses"]) for body in served.requests) == 3 and served.most_at_once <= 2
    # equal responses to a prompt are asked once; the second one was cut off, and differs
    assert sum(len(body["responses"]) for body in served.requests) == 8


# -- other protocols -------------------------------------------------------------------------------


def test_openrlhf_gets_texts_and_labels(request_of_three, tokenizer):
    logs = {"rewards": [[1.0], [2.0], [3.5]], "scores": [0, 0, 1], "extra_logs": {"dummy": [4, 5, 6]}}
    with serving(lambda *_: logs) as served:
        scores = scorer_of(served.url, protocol="openrlhf").score(request_of_three)
    assert scores.total.tolist() == [1.0, 2.0, 3.5] and scores.parts["dummy"].tolist() == [4, 5, 6]
    [body] = served.requests
    assert body["labels"] == [None, None, "sky"]
    for query, prompt, text, row in zip(body["query"], body["prompts"], RESPONSES, ROWS, strict=True):
        assert query.startswith(prompt) and text in query[len(prompt) :]
        assert (row["prompt"] if isinstance(row["prompt"], str) else "be kind") in prompt
    assert body["query"][0].endswith(tokenizer.eos_token) and not body["query"][1].endswith(tokenizer.eos_token)


def test_the_key_of_the_label_is_a_setting(request_of_three):
    with serving(lambda body, _: {"score": len(str(body["label"])), "extra": 3, "why": "text"}) as served:
        scores = scorer_of(served.url, protocol="slime", label_key="answer").score(request_of_three)
    assert scores.total.tolist() == [3.0, 1.0, 4.0] and scores.parts["extra"].tolist() == [3, 3, 3]
    sent = sorted(served.requests, key=lambda body: RESPONSES.index(body["response"]))
    assert sent == [
        {"prompt": row["prompt"], "response": text, "label": row["answer"]}
        for row, text in zip(ROWS, RESPONSES, strict=True)
    ]
    with pytest.raises(UserError, match="the row of prompt 'what color is the fox \\?' has no gold"):
        scorer_of(served.url, protocol="slime", label_key="gold").score(request_of_three)


def test_vllm_gets_conversations_one_at_a_time(request_of_three):
    def classify(body, _):
        logit = float(len(body["messages"][-1]["content"]))
        return {"data": [{"index": 0, "label": "LABEL_0", "probs": [logit], "num_classes": 1}], "usage": {}}

    with serving(classify) as served:
        scores = scorer_of(served.url, protocol="vllm", served_model="rm").score(request_of_three)
    assert scores.total.tolist() == [len(text) for text in RESPONSES]
    assert len(served.requests) == 3
    body = next(body for body in served.requests if len(body["messages"]) == 3)
    assert body["messages"] == [*ROWS[1]["prompt"], {"role": "assistant", "content": RESPONSES[1]}]
    assert body["use_activation"] is False and body["model"] == "rm"


# -- wrong answers ---------------------------------------------------------------------------------

WRONG = [
    ({"scores": [1.0, 2.0]}, "scores has 2 entries for 3 responses"),
    ({"scores": [1.0, float("nan"), 2.0]}, "for prompt 'hi': scores[1] is nan"),
    ({"scores": [1.0, 2.0, float("-inf")]}, "for prompt 'what ?': scores[2] is -inf"),
    ({"scores": [1.0, 2.0, 1e39]}, "scores[2] is 1e+39; it should be a finite number"),
    ({"scores": [1.0, 2.0, 10**400]}, "scores[2] is 1000000"),
    ({"scores": [None, 2.0, 3.0]}, "for prompt 'what color is the fox ?': scores[0] is None"),
    ({"scores": ["1.0", 2.0, 3.0]}, "scores[0] is '1.0'"),
    ({"scores": [True, 2.0, 3.0]}, "scores[0] is True"),
    ({"scores": 1.0}, "scores is 1.0; it should be a list of 3 numbers"),
    ({"rewards": [1.0, 2.0, 3.0]}, "has no scores"),
    ([1.0, 2.0, 3.0], "it should be an object with scores"),
    (None, "it should be an object with scores"),
    ({"scores": [1.0, 2.0, 3.0], "parts": {"a": [1.0]}}, "parts.a has 1 entries for 3 responses"),
    ({"scores": [1.0, 2.0, 3.0], "parts": {"a\n": [1.0] * 3}}, "a part is called"),
    ({"scores": [1.0, 2.0, 3.0], "parts": [1]}, "parts is [1]"),
    (Given(b"<html>502</html>"), "does not answer JSON: <html>502</html>"),
    (Given({}, 302, {"Location": "/login"}), "redirects to '/login'"),
]


@pytest.mark.parametrize("given, words", WRONG)
def test_a_wrong_answer_is_never_used(given, words, request_of_three, tmp_path):
    """The line names the prompt and the reason; nothing is recorded."""
    with serving(lambda *_: given) as served, pytest.raises(ScorerLost) as lost:
        scorer_of(served.url, records=tmp_path, retries=3).score(request_of_three)
    assert words in str(lost.value) and str(lost.value).startswith(f"far: {served.url} ")
    assert "run again to resume" in str(lost.value) and "\n" not in str(lost.value)
    assert len(served.requests) == 1 and not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    "protocol, value, words",
    [
        ("openrlhf", {"rewards": [1.0]}, "rewards has 1 entries for 3 responses"),
        ("openrlhf", {"rewards": [1.0] * 3, "extra_logs": {"a": 1.0}}, "extra_logs.a is 1.0"),
        ("slime", "1.0", "the answer is '1.0'"),
        ("slime", {"points": 3}, "has neither score nor reward"),
        ("vllm", {"data": []}, "data is []"),
        ("vllm", {"data": [{"probs": [0.1, 0.9]}]}, "the model should have one class"),
        ("vllm", {"data": [{"probs": [None]}]}, "probs is None"),
    ],
)
def test_each_protocol_refuses_what_is_not_its_own(protocol, value, words, request_of_three):
    with serving(lambda *_: value) as served, pytest.raises(ScorerLost) as lost:
        scorer_of(served.url, protocol=protocol).score(request_of_three)
    assert words in str(lost.value)


def test_every_protocol_of_the_settings_is_spoken():
    assert set(PROTOCOLS) == set(UrlScorer.model_fields["protocol"].annotation.__args__)


@pytest.mark.parametrize("value", [date(2026, 1, 1), float("nan"), b"raw"])
def test_a_row_that_json_cannot_hold_is_the_users_mistake(value, tokenizer):
    request = request_for(tokenizer, [ROWS[0] | {"extra": value}], ["red"])
    with pytest.raises(UserError, match="the row of prompt 'what color is the fox \\?' cannot be sent as JSON"):
        scorer_of("http://127.0.0.1:9/").score(request)


# -- a server that goes away -----------------------------------------------------------------------


def test_a_slow_server_is_lost_in_bounded_time(request_of_three):
    with serving(lambda *_: Given({}, seconds=4)) as served, pytest.raises(ScorerLost, match=r"within 0\.3 seconds"):
        scorer_of(served.url, timeout=0.3).score(request_of_three)


def test_a_server_that_comes_back_in_time_is_not_lost(request_of_three):
    port = free_port()
    holder = []

    def later():
        time.sleep(0.4)
        server = serving(lengths, port)
        holder.append(server)
        server.__enter__()

    threading.Thread(target=later).start()
    scores = scorer_of(f"http://127.0.0.1:{port}/score", retries=3).score(request_of_three)
    holder[0].__exit__(None, None, None)
    assert scores.total.tolist() == [len(text) for text in RESPONSES]


def test_a_dropped_server_is_asked_once_an_update_until_it_answers(request_of_three):
    with serving(lambda _, n: Given({}, 503) if n < 2 else lengths(_, n)) as served:
        scorer = scorer_of(served.url, on_failure="drop", retries=0)
        for _ in range(2):
            with pytest.raises(ScorerDropped, match=r"far: .* answers HTTP 503"):
                scorer.score(request_of_three)
        assert scorer.score(request_of_three).total.tolist() == [len(text) for text in RESPONSES]
    assert len(served.requests) == 3


def test_once_it_is_lost_it_gets_no_further_attempts(request_of_three):
    with serving(lambda *_: Given({}, 503)) as served:
        scorer = scorer_of(served.url, on_failure="drop", retries=1)
        for _ in range(3):
            with pytest.raises(ScorerDropped):
                scorer.score(request_of_three)
    assert len(served.requests) == 2 + 1 + 1


def test_what_poll_raises_ends_the_wait(tokenizer):
    class Signal(Exception):
        pass

    began = time.monotonic()

    def poll():
        if time.monotonic() - began > 0.2:
            raise Signal

    request = request_for(tokenizer, ROWS, RESPONSES, poll=poll)
    with serving(lambda *_: Given({}, seconds=120)) as served, pytest.raises(Signal):
        scorer_of(served.url, timeout=120.0).score(request)
    assert time.monotonic() - began < 30


# -- records and keys ------------------------------------------------------------------------------


def test_recorded_scores_are_not_asked_again(request_of_three, tokenizer, tmp_path):
    """A later start gets them, though the server answers other numbers now; others are asked."""
    with serving(lengths) as served:
        first = scorer_of(served.url, records=tmp_path)
        before = first.score(request_of_three)
        first.close()
        served.requests.clear()
        again = scorer_of(served.url, records=tmp_path)
        after = again.score(request_of_three)
        assert served.requests == []
        more = again.score(request_for(tokenizer, [*ROWS, ROWS[0]], [*RESPONSES, "new"]))
        assert [body["responses"] for body in served.requests] == [["new"]]
        other_row = request_for(tokenizer, [ROWS[0] | {"answer": "blue"}], RESPONSES[:1])
        again.score(other_row)
        assert len(served.requests) == 2
    assert torch.equal(before.total, after.total) and torch.equal(before.parts["half"], after.parts["half"])
    assert torch.equal(more.total[:3], before.total) and more.total[3] == 3.0


def test_another_server_and_protocol_are_asked_anew(request_of_three, tmp_path):
    with serving(lengths) as one, serving(lambda *_: {"scores": [7.0] * 3, "rewards": [8.0] * 3}) as other:
        scorer_of(one.url, records=tmp_path).score(request_of_three)
        assert scorer_of(other.url, records=tmp_path).score(request_of_three).total.tolist() == [7.0] * 3
        openrlhf = scorer_of(other.url, records=tmp_path, protocol="openrlhf")
        assert openrlhf.score(request_of_three).total.tolist() == [8.0] * 3


def test_nothing_is_recorded_where_that_is_asked(request_of_three, tmp_path):
    with serving(lengths) as served:
        scorer = scorer_of(served.url, records=tmp_path, record=False)
        scorer.score(request_of_three)
        scorer.score(request_of_three)
    assert len(served.requests) == 2 and not list(tmp_path.iterdir())


def test_answers_of_a_batch_are_recorded_before_a_later_one_fails(tokenizer, tmp_path):
    request = request_for(tokenizer, ROWS, RESPONSES)
    answer = lambda body, n: lengths(body, n) if n < 2 else Given({}, 500)  # noqa: E731
    with serving(answer) as served, pytest.raises(ScorerLost):
        scorer_of(served.url, records=tmp_path, batch_size=1, concurrency=1).score(request)
    rows = [json.loads(line) for line in (tmp_path / "far" / "0of1.jsonl").read_text().splitlines()]
    assert [row["answer"]["score"] for row in rows] == [float(len(text)) for text in RESPONSES[:2]]


def test_the_key_is_sent_and_is_nowhere_else(request_of_three, tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "sk-secret")
    with serving(lengths) as served:
        scorer_of(served.url, records=tmp_path, key_env="REWARD_KEY").score(request_of_three)
    assert served.headers[0]["Authorization"] == "Bearer sk-secret"
    assert all(b"sk-secret" not in path.read_bytes() for path in tmp_path.rglob("*.jsonl"))
    for refusal in (Given({"error": "sk-secret is wrong"}, 403), Given({"error": "sk-secret is wrong"}, 200)):
        with serving(lambda *_, given=refusal: given) as served, pytest.raises(ScorerLost) as lost:
            scorer_of(served.url, key_env="REWARD_KEY").score(request_of_three)
        assert "[key] is wrong" in str(lost.value)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, words",
    [
        ("http://user:pw@host/score", "contains credentials"),
        ("http://user@host/score", "contains credentials"),
        ("http://host/score?api_key=hush", "contains api_key="),
        ("ftp://host/score", "is not an address of http or https"),
        ("host:8000/score", "is not an address of http or https"),
        ("http:///score", "names no host"),
        ("http://host:0/score", "names no port"),
        ("http://host:99999/score", "is not an address"),
        ("http://host/a b", "contains blanks"),
        ("http://host/score#x", "has a fragment"),
    ],
)
def test_a_wrong_address_is_a_line(url, words):
    [line] = UrlScorer(url=url).problems("ppo.rewards[0]")
    assert line.startswith("ppo.rewards[0].url: ") and words in line and ";" in line
    assert "pw" not in line and "hush" not in line


@pytest.mark.parametrize("url", ["http://127.0.0.1:80/x", "https://h.example/a?v=1", "http://[::1]:8000/score"])
def test_a_right_address_is_none(url):
    assert UrlScorer(url=url).problems("k") == []


def test_settings_without_effect_are_lines():
    [line] = UrlScorer(url="http://h/", served_model="x").problems("k")
    assert line.startswith("k.served_model: has no effect with protocol rlhf")
    [line] = UrlScorer(url="http://h/", label_key="x", protocol="vllm").problems("k")
    assert line.startswith("k.label_key: has no effect with protocol vllm")


def test_the_only_scorer_cannot_be_dropped():
    one = UrlScorer(url="http://h/", on_failure="drop")
    [line] = scorer_problems("ppo.rewards", [one])
    assert line.startswith("ppo.rewards: every scorer has on_failure: drop")
    assert scorer_problems("ppo.rewards", [one, UrlScorer(url="http://i/", name="other")]) == []


def test_a_missing_key_is_a_line_before_anything_runs(monkeypatch):
    monkeypatch.delenv("REWARD_KEY", raising=False)
    settings = UrlScorer(url="http://h/", key_env="REWARD_KEY")
    [line] = settings.missing("ppo.rewards[0]")
    assert line.startswith("ppo.rewards[0].key_env: the environment has no variable REWARD_KEY")
    monkeypatch.setenv("REWARD_KEY", "x")
    assert settings.missing("ppo.rewards[0]") == []
