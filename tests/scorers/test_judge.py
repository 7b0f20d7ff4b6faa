"""Ask judges: stand-ins at a server of this process, and a tiny model that runs here."""

import json
import re

import pytest
import torch

from pipeline.errors import UserError
from stages.scorers.judge import JudgeScorer, PairRequest
from stages.scorers.judge_prompts import AGAIN, found_verdict, grade_of, load_prompt, values_of, verdict_of
from stages.scorers.scorer import ScorerDropped, ScoreRequest, ScorerLost, ScorerSpec
from stages.settings.scorers import judge as settings_of
from stages.settings.scorers.scorer import scorer_problems
from tests.scorers.http_server import Given, serving

ROWS = [{"prompt": f"question {i}", "answer": f"answer {i}"} for i in range(4)]
KEY = "sk-very-secret-1234"


class Letters:
    """Stands in for a tokenizer: a token is a letter."""

    eos_token_id = 0

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i) for i in ids if i)


def saying(text):
    """Return an answer of /chat/completions."""
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def make(url, folder=None, **settings):
    own = settings_of.JudgeScorer(**{"judge": "stand-in", "base_url": url, "retries": 0} | settings)
    return JudgeScorer(ScorerSpec(None, 0, None, 8, settings=own, name="stand-in", records=folder))


def request(texts, rows=ROWS, **more):
    responses = [[*map(ord, text), 0] for text in texts]
    return ScoreRequest([[1]] * len(texts), responses, Letters(), data_rows=rows[: len(texts)], **more)


# -- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It is fine. [[7]]", 7.0),
        ("[[3]] no: [[ 8.5 ]]", 8.5),
        ("[[11]]", None),
        ("seven", None),
        ("<think>[[2]]</think> so [[9]]", 9.0),
        ("<think>perhaps [[2]]", None),
        ("", None),
    ],
)
def test_the_last_grade_in_the_scale_counts(answer, expected):
    assert grade_of(answer, settings_of.VERDICTS["grade"], 1, 10) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("[[A]]", "first"), ("A is bad. [[b]]", "second"), ("[[C]]", "tie"), ("[[tie]]", "tie"), ("[[D]]", None)],
)
def test_verdicts_on_pairs(answer, expected):
    assert verdict_of(answer, settings_of.VERDICTS["pairwise"]) == expected


def test_a_verdict_by_an_own_expression():
    assert verdict_of("Winner: 2", r"Winner: (\d)") == "second"
    assert found_verdict('{"score": 4}', r'"score":\s*(\d+)') == "4"


# -- prompts -------------------------------------------------------------------------------------


def test_placeholders_are_filled_once(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text('{question} / {response} / {answer} / {"json": 1}')
    fill = load_prompt(file, "j")
    values = values_of({"prompt": "why {answer}?", "answer": ["x"]}) | {"response": "{question}"}
    assert fill(values) == 'why {answer}? / {question} / ["x"] / {"json": 1}'


def test_a_key_that_a_row_lacks_is_refused(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("{reference} {response}")
    with pytest.raises(UserError, match="asks for reference, which a row lacks"):
        load_prompt(file, "j")(values_of({"prompt": "why?"}) | {"response": "x"})


def test_jinja_and_several_turns(tmp_path):
    file = tmp_path / "own.j2"
    file.write_text("{% if answer %}Right: {{ answer }}.{% endif %} {{ conversation }} | {{ response }}")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    values = values_of({"prompt": turns, "answer": "z"}) | {"response": "{{ answer }}"}
    assert load_prompt(file, "j")(values) == "Right: z. User: a\n\nAssistant: b\n\nUser: c | {{ answer }}"


# -- a server ------------------------------------------------------------------------------------


def test_grades_of_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def answer(body, number):
        text = re.search(r"response\]\n(.*)\n", body["messages"][0]["content"])[1]
        return saying(f"[[{len(text)}]]")

    with serving(answer) as served:
        judge = make(served.url, tmp_path, key_env="JUDGE_KEY", seed=3)
        scores = judge.score(request(["abc", "abcdefg", "abc"]))
    assert scores.total.tolist() == [3, 7, 3] and scores.parts["invalid"].tolist() == [0, 0, 0]
    assert len(served.requests) == 3, "the prompts differ, so all are asked"
    sent = served.requests[0]
    assert sent["model"] == "stand-in" and sent["temperature"] == 0 and sent["seed"] == 3
    assert served.headers[0]["Authorization"] == f"Bearer {KEY}"
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert kept and KEY not in kept


def test_a_resumed_run_gets_the_same_grades_without_asking(tmp_path):
    with serving(lambda body, number: saying(f"[[{1 + number}]]")) as served:
        first = make(served.url, tmp_path, concurrency=1).score(request(["a", "b"])).total
        url = served.url
    judge = make(url, tmp_path)  # nobody answers now
    assert judge.score(request(["a", "b"])).total.equal(first)
    with pytest.raises(ScorerLost):
        judge.score(request(["a", "b", "c"]))


def test_an_invalid_verdict_is_asked_again_and_then_counted(tmp_path):
    def answer(body, number):
        text = body["messages"][0]["content"]
        return saying("[[4]]" if AGAIN in text and "question 1" in text else "I cannot say")

    with serving(answer) as served:
        scores = make(served.url, tmp_path, invalid_score=2.5).score(request(["a", "b"]))
    assert scores.total.tolist() == [2.5, 4.0] and scores.parts["invalid"].tolist() == [1, 0]
    assert len(served.requests) == 4


def test_a_null_in_body_leaves_a_field_out():
    with serving(lambda body, number: saying("[[5]]")) as served:
        fields = {"max_tokens": None, "max_completion_tokens": 9, "temperature": None}
        make(served.url, body=fields).score(request(["a"]))
    assert "max_tokens" not in served.requests[0] and "temperature" not in served.requests[0]
    assert served.requests[0]["max_completion_tokens"] == 9


def test_pairs_are_compared_in_the_order_given():
    def answer(body, number):
        found = re.search(r"Response A\]\n(.*)\n.*\n\n\[Response B\]\n(.*)\n", body["messages"][0]["content"])
        return saying("[[A]]" if len(found[1]) > len(found[2]) else "[[B]]")

    with serving(answer) as served:
        judge = make(served.url, mode="pairwise")
        assert judge.compare(PairRequest(ROWS[:2], ["long", "x"], ["no", "yes"])) == ["first", "second"]


@pytest.mark.parametrize(
    ("given", "error", "line"),
    [
        (Given({"error": {"message": f"bad key {KEY}"}}, status=401), UserError, r"HTTP 401: bad key \[key\]"),
        (Given({"error": "busy"}, status=503), ScorerLost, "HTTP 503: busy"),
        (Given({"something": 1}), ScorerLost, "OpenAI-compatible"),
        (Given(b"<html>", headers={"Content-Type": "text/html"}), ScorerLost, "does not answer JSON"),
    ],
)
def test_a_server_that_fails(monkeypatch, given, error, line):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(lambda body, number: given) as served, pytest.raises(error, match=line) as caught:
        make(served.url, key_env="JUDGE_KEY").score(request(["a"]))
    assert KEY not in str(caught.value) and "stand-in: http://" in str(caught.value)


def test_a_server_that_fails_may_be_dropped():
    with serving(lambda body, number: Given({}, status=500)) as served, pytest.raises(ScorerDropped):
        make(served.url, on_failure="drop").score(request(["a"]))


def test_retry_after_is_honoured():
    def answer(body, number):
        return Given({}, status=429, headers={"Retry-After": "0"}) if number == 0 else saying("[[6]]")

    with serving(answer) as served:
        assert make(served.url, retries=1).score(request(["a"])).total.tolist() == [6]


def test_a_signal_ends_the_waiting():
    def poll():
        raise KeyboardInterrupt

    with serving(lambda body, number: Given(saying("[[5]]"), seconds=1)) as served, pytest.raises(KeyboardInterrupt):
        make(served.url).score(request(["a"], poll=poll))


# -- settings ------------------------------------------------------------------------------------


def lines(as_judges=True, **settings):
    given = {"judge": "m", "base_url": "http://127.0.0.1:1/v1"} | settings
    return scorer_problems("evaluate.judges", [settings_of.JudgeScorer(**given)], as_judges=as_judges)


def test_settings_that_work():
    assert lines() == [] and lines(mode="pairwise") == []


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"base_url": None}, "judge: 'm' is no folder and no Hub id"),
        ({"base_url": None, "judge": "org/name"}, "revision: should be the commit of org/name"),
        ({"base_url": "http://key@host/v1"}, "base_url: the address contains credentials"),
        ({"verdict": "[0-9]+"}, "has 0 groups; should have one"),
        ({"verdict": "("}, "is no regular expression"),
        ({"prompt": "/no/such.txt"}, "prompt: no such file"),
        ({"mode": "pairwise", "scale": [0, 1]}, "scale: has no effect with mode: pairwise"),
        ({"scale": [3, 3]}, "scale: .* is empty"),
        ({"body": {"n": 2}}, "body: n is set here already"),
        ({"body": {"Api_Key": "sk-1"}}, "body: contains Api_Key, which would reach artifacts"),
        ({"body": {"top_p": float("nan")}}, "body: cannot be sent as JSON"),
        ({"base_url": None, "judge": "package:x", "temperature": 0.5}, "temperature: has no effect for a local model"),
        ({"on_failure": "drop"}, "on_failure: drop has no effect on a judge"),
    ],
)
def test_settings_that_are_refused(settings, line):
    found = lines(**settings)
    assert len(found) == 1 and re.search(line, found[0]), found
    assert found[0].startswith("evaluate.judges[0].") and ";" in found[0]


def test_a_prompt_without_its_placeholder_is_refused(tmp_path):
    for name, text in (("a.txt", "{response_a}"), ("a.j2", "{{ response_a }}")):
        (tmp_path / name).write_text(text)
        (line,) = lines(mode="pairwise", prompt=str(tmp_path / name))
        assert "has no {response_b}" in line
    (tmp_path / "b.j2").write_text("{% if %}")
    assert "line 1" in lines(prompt=str(tmp_path / "b.j2"))[0]


def test_a_judge_of_pairs_is_no_reward():
    (line,) = lines(as_judges=False, mode="pairwise")
    assert line.startswith("evaluate.judges[0].mode: pairwise gives no scores")


@pytest.mark.parametrize(
    ("judge", "name"),
    [
        ("gpt-5-mini", "gpt-5-mini"),
        ("org/Name-8B", "Name-8B"),
        ("a/sft/model", "sft"),
        ("package:x", "x"),
        ("m:8b", "m-8b"),
    ],
)
def test_names(judge, name):
    assert settings_of.JudgeScorer(judge=judge).default_name() == name


# -- a local model -------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path):
    """Return the folder of a random model that can chat."""
    from tests.stages.micro_chain import make_tokenizer, random_policy

    tokenizer = make_tokenizer()
    random_policy(tokenizer, 0).save_pretrained(tmp_path / "local")
    tokenizer.save_pretrained(tmp_path / "local")
    return tmp_path / "local"


def test_a_local_model_is_asked_greedily_and_recorded(local, tmp_path):
    from accelerate import Accelerator

    from data.encode import encode_prompt
    from stages.models.loading import load_pretrained

    file = tmp_path / "short.txt"
    file.write_text("{response}")
    own = {"judge": str(local), "prompt": str(file), "max_tokens": 6, "verdict": "(fox|red|old|kind|blue|yes|no)"}
    settings = settings_of.JudgeScorer(**own)
    assert settings.problems("j") == [] and set(settings.files("j")) == {"j.prompt", "j.judge"}
    spec = ScorerSpec(None, 0, Accelerator(cpu=True), 8, settings=settings, name="local", records=tmp_path / "kept")
    judge = JudgeScorer(spec)
    judge.score(request(["the fox", "is red"]))

    model, tokenizer = load_pretrained(str(local), attn_implementation="sdpa", trust_remote_code=False)
    ids = torch.tensor([encode_prompt(tokenizer, "the fox")])
    expected = model.generate(ids, do_sample=False, max_new_tokens=6, use_cache=True)[0, ids.shape[1] :]
    recorded = [json.loads(line)["answer"] for line in next((tmp_path / "kept").rglob("*.jsonl")).open()]
    assert tokenizer.decode(expected, skip_special_tokens=True).strip() in [text.strip() for text in recorded]

    judge.close()
    again = JudgeScorer(spec)
    again.asker.model.load = lambda: pytest.fail("recorded answers need no model")
    again.score(request(["the fox", "is red"]))


def test_a_question_over_the_context_is_refused(local, tmp_path):
    from accelerate import Accelerator

    settings = settings_of.JudgeScorer(judge=str(local), max_tokens=500)
    judge = JudgeScorer(ScorerSpec(None, 0, Accelerator(cpu=True), 8, settings=settings, name="local"))
    with pytest.raises(UserError, match="context"):
        judge.score(request(["the fox"]))


def test_the_part_invalid_is_a_number():
    with serving(lambda body, number: saying("?")) as served:
        scores = make(served.url, attempts=1).score(request(["a"]))
    assert scores.total.tolist() == [5.5] and scores.parts["invalid"].tolist() == [1]
