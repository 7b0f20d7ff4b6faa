"""Test the HTTP client against a server that is slow, wrong, gone, and too talkative."""

import time

import pytest

from pipeline.errors import UserError
from stages.scorers import http
from stages.scorers.http import RequestFailed, key_headers, post_json
from stages.scorers.threads import in_threads
from tests.scorers.http_server import Given, free_port, serving

KEY = "sk-very-secret"


class Pauses(list):
    """Stand in for the event that ends pauses: they are noted, and take no time."""

    def wait(self, seconds):
        self.append(seconds)
        return False


def test_json_goes_there_and_back():
    with serving(lambda body, _: {"twice": 2 * body["x"]}) as served:
        assert post_json(served.url, {"x": 3}, timeout=60) == {"twice": 6}
    assert served.headers[0]["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "given, words",
    [
        (Given(b"<html>busy</html>"), "does not answer JSON: <html>busy</html>"),
        (Given(b""), "does not answer JSON: nothing"),
        (Given({}, status=204), "answers HTTP 204, not 200"),
        (Given({"error": "no such model"}, status=404), "answers HTTP 404: no such model"),
        (Given({"error": {"message": "too long"}}, status=400), "answers HTTP 400: too long"),
        (Given({"detail": [{"loc": "input"}]}, status=422), 'answers HTTP 422: [{"loc": "input"}]'),
        (Given({}, status=302, headers={"Location": "http://u:p@elsewhere/x?y=1"}), "redirects to 'elsewhere/x'"),
        (Given(b"1" * 2000), "answers more than 1,000 bytes"),
    ],
)
def test_a_wrong_answer_is_refused_at_once(given, words):
    with serving(lambda *_: given) as served, pytest.raises(RequestFailed) as failed:
        post_json(served.url, {}, timeout=60, retries=3, most_bytes=1000)
    assert words in str(failed.value) and len(served.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_an_overloaded_server_is_asked_again(status):
    pauses = Pauses()
    with serving(lambda _, number: Given({}, status=status) if number < 2 else 7) as served:
        assert post_json(served.url, {}, timeout=60, retries=3, stop=pauses) == 7
    assert len(served.requests) == 3 and pauses == [1.0, 2.0]


def test_the_server_says_how_long_to_wait_but_not_for_ever():
    pauses = Pauses()
    asked = ["5", "3600", "next Tuesday"]
    with serving(lambda _, i: Given({}, 429, {"Retry-After": asked[i]}) if i < 3 else 7) as served:
        assert post_json(served.url, {}, timeout=60, retries=3, stop=pauses) == 7
    assert pauses == [5.0, http.LONGEST_PAUSE, 4.0]


def test_attempts_are_counted_and_end():
    pauses = Pauses()
    url = f"http://127.0.0.1:{free_port()}/score"
    with pytest.raises(RequestFailed, match=r"cannot be reached: .*refused.* \(3 attempts\)"):
        post_json(url, {}, timeout=60, retries=2, stop=pauses)
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize("given", [Given({"a": 1}, seconds=60), Given({"a": "b" * 300}, drip=0.2)])
def test_time_is_bounded_for_an_answer_as_a_whole(given):
    """Also where a byte comes often enough for no single wait to be long."""
    began = time.monotonic()
    with serving(lambda *_: given) as served, pytest.raises(RequestFailed, match=r"within 0\.5 seconds"):
        post_json(served.url, {}, timeout=0.5)
    assert time.monotonic() - began < 30


def test_an_answer_that_breaks_off_is_asked_again():
    with serving(lambda _, number: Given(b'{"a"', claims=100) if not number else 7) as served:
        assert post_json(served.url, {}, timeout=60, retries=1, stop=Pauses()) == 7


@pytest.mark.parametrize("status", [200, 401])
@pytest.mark.parametrize("before", [0, http.SHOWN - 5], ids=["whole", "half of it in the error line"])
def test_a_key_that_an_answer_repeats_is_not_shown(status, before):
    given = Given(b"." * before + KEY.encode(), status)
    with serving(lambda *_: given) as served, pytest.raises(RequestFailed) as failed:
        post_json(served.url, {}, timeout=60, headers={"Authorization": f"Bearer {KEY}"})
    assert "[key" in str(failed.value) and "sk-" not in str(failed.value)


def test_a_key_comes_from_the_environment_and_is_never_shown(monkeypatch):
    monkeypatch.setenv("REWARD_KEY", f"{KEY}\n")
    headers = key_headers("REWARD_KEY")
    answer = Given({"error": f"wrong key {KEY}"}, 401)
    with serving(lambda *_: answer) as served, pytest.raises(RequestFailed) as failed:
        post_json(served.url, {}, timeout=60, headers=headers)
    assert served.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert str(failed.value) == "answers HTTP 401: wrong key [key]"
    monkeypatch.setenv("REWARD_KEY", f"{KEY} and more")
    with pytest.raises(UserError, match="contains blanks") as refused:
        key_headers("REWARD_KEY")
    assert KEY not in str(refused.value)
    monkeypatch.delenv("REWARD_KEY")
    with pytest.raises(UserError, match="has no variable REWARD_KEY"):
        key_headers("REWARD_KEY")
    assert key_headers(None) == {}


def test_proxies_are_not_for_this_machine(monkeypatch):
    with serving(lambda *_: "direct") as served, serving(lambda *_: "by proxy") as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/score"))
        monkeypatch.delenv("no_proxy", raising=False)
        assert post_json(served.url, {}, timeout=60) == "direct"
        assert post_json("http://reward.invalid/score", {}, timeout=60) == "by proxy"


def test_a_signal_ends_the_wait():
    """What poll raises comes out at once, though a request hangs; no further one begins."""

    class Signal(Exception):
        pass

    began = time.monotonic()

    def poll():
        if time.monotonic() - began > 0.3:
            raise Signal

    with serving(lambda *_: Given(1, seconds=60)) as served, pytest.raises(Signal):
        for _ in in_threads(range(9), lambda i, stop: post_json(served.url, i, timeout=60, stop=stop), 2, poll):
            pass
    assert time.monotonic() - began < 30 and len(served.requests) == 2


def test_at_most_so_many_requests_at_a_time():
    with serving(lambda body, _: Given(body + 1, seconds=0.2)) as served:
        done = dict(
            in_threads(range(8), lambda i, stop: post_json(served.url, i, timeout=60, stop=stop), 3, lambda: None)
        )
    assert done == {i: i + 1 for i in range(8)} and served.most_at_once == 3


def test_the_first_failure_ends_all():
    def work(i, stop):
        if i == 1:
            raise RequestFailed("bad")
        stop.wait(0.5)
        return i

    with pytest.raises(RequestFailed, match="bad"):
        list(in_threads(range(100), work, 2, lambda: None))
