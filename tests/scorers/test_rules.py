"""Test the rules: each against answers written out by hand or found along another route."""

import json
import random
import re
from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from data.encode import encode_prompt, encode_response
from pipeline.errors import UserError
from stages.scorers.rules import answers, formats, words
from stages.scorers.scorer import ScoreRequest, ScorerSpec
from stages.scorers.scorers import make_scorer
from stages.settings.scorers.rule import RULES
from tests.builders import tiny_tokenizer


class Spelled:
    """Stand in for a tokenizer whose ids are code points, so that any text can be a response."""

    eos_token_id = 0

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i) for i in ids if i)


def score(texts, rows=None, **settings):
    """Return the scores and parts of responses under a rule, which must have no problems."""
    made = RULES[settings["rule"]](**settings)
    assert made.problems("ppo.rewards[0]") == []
    responses = [[*map(ord, text), 0] for text in texts]
    request = ScoreRequest([[1]] * len(texts), responses, Spelled(), data_rows=rows)
    scorer = make_scorer(ScorerSpec(None, 0, None, 1, settings=made, name="mine"))
    scores = scorer.score(request)
    scorer.close()
    return scores.total.tolist(), {name: x.tolist() for name, x in scores.parts.items()}


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text, answer, settings, right",
    [
        ("Paris", "Paris", {}, 1),
        (" Paris\n", "Paris", {}, 1),
        ("paris", "Paris", {}, 0),
        ("paris", "Paris", {"ignore_case": True}, 1),
        ("It is Paris.", "Paris", {"where": "end"}, 0),
        ("It is  paris.", "is Paris", {"where": "end", "ignore_case": True, "ignore_punctuation": True}, 1),
        ("Paris, I think", "Paris", {"where": "start"}, 1),
        ("I think Paris it is", "Paris", {"where": "anywhere"}, 1),
        ("I think Rome", ["Paris", "Rome"], {"where": "anywhere"}, 1),
        ("cafe\u0301", "caf\u00e9", {}, 1),
        ("42", 42, {}, 1),
        ("", "Paris", {"where": "anywhere"}, 0),
    ],
)
def test_exact(text, answer, settings, right):
    assert score([text], [{"gold": answer}], rule="exact", answer="gold", **settings)[0] == [right]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("(c)", None),
        ("A fox is red.", None),
        ("A. A fox", "A"),
        ("**D**", "D"),
        ("The answer is (B).", "B"),
        ("Answer: C", "C"),
        ("First I thought (A), but the answer is D", "D"),
        ("(A) and (B) are wrong; option C", "C"),
        ("Answer: Because", None),
        ("so \\boxed{B}, not (C)", "B"),
        ("\\boxed{\\text{(A)}}", "A"),
        ("E", None),
        ("", None),
    ],
)
def test_choice(text, letter):
    for right in "ABCD":
        total, parts = score([text], [{"answer": f"({right.lower()})"}], rule="choice", letters="ABCD")
        assert total == [float(letter == right)] and parts == {"chosen": [float(letter is not None)]}


@pytest.mark.parametrize(
    "text, marked",
    [
        ("3 * 24 = 72\n#### 72\n", "72"),
        ("\\boxed{\\frac{1}{2}} then \\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("72", None),
        ("\\boxed{72", None),
        ("####", None),
    ],
)
def test_the_marked_result(text, marked):
    assert answers.final_answer(text) == marked


MATHS = [
    ("so it is\n#### 72", "48 / 2 = <<48/2=24>>24\n#### 72", True),
    ("It is 72.", "72", True),
    ("It is 71.", "72", False),
    ("#### 1,234", "1234", True),
    ("#### $18", "18", True),
    ("#### 18 dollars", "18", True),
    ("$\\frac{1}{2}$", "0.5", True),
    ("\\boxed{\\{1,2\\}}", "\\{2, 1\\}", True),
    ("\\boxed{x^2+2x+1}", "(x+1)^2", True),
    ("\\boxed{x^2+2x+2}", "(x+1)^2", False),
    ("I think 5, no: \\boxed{6}", "5", False),
    ("\\boxed{3\\frac{1}{2}}", "3.5", True),
    ("\\boxed{\\text{Monday}}", "Monday", True),
    ("\\boxed{\\text{Monday}}", "Tuesday", False),
    ("", "3", False),
]


@pytest.mark.parametrize("text, answer, right", MATHS)
def test_maths(text, answer, right):
    pytest.importorskip("math_verify")
    total, parts = score([text], [{"answer": answer}], rule="maths")
    assert total == [float(right)] and parts == {"marked": [float("####" in text or "boxed" in text)]}


def test_sentiment_is_half_of_vaders_compound_score_and_a_half():
    vader = pytest.importorskip("vaderSentiment.vaderSentiment")
    texts = ["A wonderful, moving film!", "A dull and awful bore.", "The film lasts two hours.", ""]
    found, _ = score(texts, [{}] * 4, rule="sentiment")
    alone = [vader.SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in texts]
    assert found == pytest.approx([(1 + one) / 2 for one in alone], abs=1e-6)
    assert found[0] > 0.8 > 0.5 == found[2] == found[3] > 0.2 > found[1]


def test_maths_with_several_right_answers():
    pytest.importorskip("math_verify")
    assert score(["\\boxed{-2}", "\\boxed{3}"], [{"answer": [2, -2]}] * 2, rule="maths")[0] == [1, 0]


# ── form ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "settings, found",
    [
        ({"pattern": "fox"}, [1, 0, 0]),
        ({"pattern": "fox", "ignore_case": True}, [1, 1, 0]),
        ({"pattern": "fox", "absent": True}, [0, 1, 1]),
        ({"pattern": "the.fox", "whole": True}, [1, 0, 0]),
        ({"pattern": "^$"}, [0, 0, 1]),
    ],
)
def test_regex(settings, found):
    assert score(["the\nfox", "A FOX", ""], rule="regex", **settings)[0] == found


JSON = ['{"a": 1}', " [1, 2]\n", '```json\n{"a": "b"}\n```', "3", "{'a': 1}", 'It is {"a": 1}', "NaN", "", "[" * 9999]


def test_json(tmp_path):
    assert score(JSON, rule="json")[0] == [1, 1, 1, 1, 0, 0, 0, 0, 0]


def test_json_with_a_schema(tmp_path):
    pytest.importorskip("jsonschema")
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}))
    total, parts = score(JSON, rule="json", schema_file=str(file))
    assert total == [1, 0, 0, 0, 0, 0, 0, 0, 0] and parts["parses"] == [1, 1, 1, 1, 0, 0, 0, 0, 0]
    file.write_text('{"type": "no such type"}')
    [line] = RULES["json"](rule="json", schema_file=str(file)).problems("ppo.rewards[0]")
    assert line.startswith(f"ppo.rewards[0].schema_file: {file}: ")


@pytest.mark.parametrize(
    "text, any_, python, only",
    [
        ("Here:\n```python\nprint(1)\n```\nDone", 1, 1, 0),
        ("```\nprint(1)\n```\n", 1, 0, 1),
        ("```Python\nprint(1)\n```", 1, 1, 1),
        ("```python\nprint(1)\n", 0, 0, 0),
        ("```python\n\n```", 0, 0, 0),
        ("```a\n1\n```\n```b\n2\n```", 1, 0, 0),
        ("`print(1)`", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_code_block(text, any_, python, only):
    assert score([text], rule="code_block")[0] == [any_]
    assert score([text], rule="code_block", language="python")[0] == [python]
    assert score([text], rule="code_block", only=True)[0] == [only]


@pytest.mark.parametrize(
    "text, right, with_text_outside, think, answer",
    [
        ("<think>a\nb</think>\n<answer>c</answer>", 1, 1, 1, 1),
        ("So <think>a</think> thus <answer>c</answer>.", 0, 1, 1, 1),
        ("<answer>c</answer><think>a</think>", 0, 0, 1, 1),
        ("<think>a</think>", 0, 0, 1, 0),
        ("<think>a<answer>c</answer></think>", 0, 0, 1, 1),
        ("<think>a</think><think>b</think><answer>c</answer>", 0, 0, 0, 1),
        ("", 0, 0, 0, 0),
    ],
)
def test_tags(text, right, with_text_outside, think, answer):
    total, parts = score([text], rule="tags")
    assert total == [right] and parts == {"think": [think], "answer": [answer]}
    assert score([text], rule="tags", outside=True)[0] == [with_text_outside]


# ── length ───────────────────────────────────────────────────────────────────────────────────────


def test_lengths_in_words_characters_and_tokens():
    tokenizer = tiny_tokenizer()
    texts = ["the fox is red .", "red", ""]
    responses = [encode_response(tokenizer, text, finished=True) for text in texts]
    request = ScoreRequest([encode_prompt(tokenizer, "hi")] * 3, responses, tokenizer)
    counts = {
        "words": [len(re.sub(r"[^\w ]", " ", text).split()) for text in request.response_texts()],
        "characters": [len(text) for text in request.response_texts()],
        "tokens": [len(ids) for ids in responses],
    }
    for rule, count in counts.items():
        made = RULES[rule](rule=rule, at_least=2, at_most=4)
        scores = make_scorer(ScorerSpec(None, 0, None, 1, settings=made)).score(request)
        assert scores.parts["count"].tolist() == count
        assert scores.total.tolist() == [float(2 <= n <= 4) for n in count]


@pytest.mark.parametrize(
    "settings, right",
    [
        ({"at_most": 3}, [1, 1, 1, 1, 0, 0]),
        ({"at_least": 3}, [0, 0, 0, 1, 1, 1]),
        ({"target": 3}, [0, 0, 0, 1, 0, 0]),
        ({"target": 3, "tolerance": 2}, [0, 0, 0.5, 1, 0.5, 0]),
        ({"at_least": 1, "at_most": 2, "tolerance": 4}, [0.75, 1, 1, 0.75, 0.5, 0.25]),
    ],
)
def test_ranges_of_lengths(settings, right):
    assert score([" ".join("a" * n) for n in range(6)], rule="words", **settings)[0] == right


# ── words ────────────────────────────────────────────────────────────────────────────────────────


def test_repetition_is_the_share_of_repeated_ngrams():
    """Counted along another route: n-grams minus different ones, over n-grams."""
    rng = random.Random(0)
    for n in (1, 2, 3):
        for _ in range(50):
            items = [rng.choice("abc") for _ in range(rng.randint(0, 12))]
            counts = Counter("".join(items)[i : i + n] for i in range(max(0, len(items) - n + 1)))
            repeated = sum(count - 1 for count in counts.values())
            share = repeated / counts.total() if counts else 0.0
            assert words.repeated_share(items, n) == pytest.approx(share)
    assert score(["a b A b"], rule="repetition", ngram=2)[0] == pytest.approx([-1 / 3])


def test_repetition_of_tokens_is_that_of_trl():
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
    for ids in ([1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 1, 2, 9], [1], []):
        assert -words.repeated_share(ids, 2) == pytest.approx(theirs([ids])[0])


@pytest.mark.parametrize(
    "how, right", [("absent", [0, 1, 0, 0]), ("any", [1, 0, 1, 1]), ("share", [2 / 3, 0, 1 / 3, 1 / 3])]
)
def test_word_list(tmp_path, how, right):
    """Whole words and phrases in any case; in scripts without spaces, inside others too."""
    texts = ["I'm Sorry, as an AI model I can't", "a sorrytale of aims", "SORRY sorry", "她非常抱歉"]
    listed = ["sorry", "as an AI", "抱歉"]
    assert score(texts, rule="word_list", words=listed, score=how)[0] == pytest.approx(right)
    file = tmp_path / "words.txt"
    file.write_text("\n".join(["sorry", "", " as an AI ", "抱歉", "sorry"]), encoding="utf-8")
    assert score(texts, rule="word_list", file=str(file), score=how)[0] == pytest.approx(right)
    assert score(texts, rule="word_list", words=listed, score="penalty")[0] == [-2, 0, -2, -1]


# ── rows and settings ────────────────────────────────────────────────────────────────────────────


def test_a_row_without_an_answer_is_a_line_with_its_place():
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "gold": "d"}, {"prompt": "e", "answer": {"is": 1}}]
    places = [f"prompts.jsonl:{i}" for i in (1, 2, 3)]
    lines = RULES["exact"](rule="exact").row_problems(rows, places)
    assert [line.split(": ")[0] for line in lines] == ["prompts.jsonl:2", "prompts.jsonl:3"]
    assert "finds no 'answer'" in lines[0] and "this row has gold" in lines[0]
    [line] = RULES["choice"](rule="choice", letters="ABCD").row_problems([{"answer": "E"}], ["prompts.jsonl:9"])
    assert line.startswith("prompts.jsonl:9: answer is 'E'")
    scorer = make_scorer(ScorerSpec(None, 0, None, 1, settings=RULES["exact"](rule="exact")))
    request = ScoreRequest([[1]], [[98, 0]], Spelled(), data_rows=[rows[1]], places=["prompts.jsonl:2"])
    with pytest.raises(UserError, match=r"prompts.jsonl:2: the rule exact finds no 'answer'"):
        scorer.score(request)


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"rule": "words"}, "has no limit"),
        ({"rule": "words", "target": 3, "at_most": 4}, "stands beside at_least or at_most"),
        ({"rule": "tokens", "at_least": 5, "at_most": 4}, "is over at_most 4"),
        ({"rule": "regex", "pattern": "("}, "is no regular expression"),
        ({"rule": "tags", "tags": ["<think>"]}, "is no tag"),
        ({"rule": "tags", "tags": ["a", "a"]}, "named twice"),
        ({"rule": "word_list"}, "give words or file"),
        ({"rule": "word_list", "words": ["a"], "file": "b"}, "give words or file"),
        ({"rule": "word_list", "file": "nowhere.txt"}, "no such file"),
        ({"rule": "word_list", "words": [" "]}, "holds no word"),
        ({"rule": "json", "schema_file": "nowhere.json"}, "no such file"),
    ],
)
def test_settings_that_cannot_work_are_lines(settings, line):
    [problem] = RULES[settings["rule"]](**settings).problems("ppo.rewards[0]")
    assert problem.startswith("ppo.rewards[0].") and line in problem


@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_has_a_runtime_and_refuses_other_settings(rule):
    needed = {
        "regex": {"pattern": "a"},
        "words": {"at_most": 3},
        "characters": {"at_most": 3},
        "tokens": {"at_most": 3},
    }
    more = needed.get(rule, {"words": ["a"]} if rule == "word_list" else {})
    settings = RULES[rule](rule=rule, **more)
    assert settings.default_name() == rule
    if rule == "instructions":
        settings = RULES[rule](rule=rule, lower_case=True)
    if rule not in ("maths", "sentiment"):  # these need a package that is an extra
        row = {"answer": "A"}
        request = ScoreRequest([[1]], [[ord("A"), 0]], Spelled(), data_rows=[row])
        scores = make_scorer(ScorerSpec(None, 0, None, 1, settings=settings)).score(request)
        assert scores.total.shape == (1,) and torch.isfinite(scores.total).all()
    with pytest.raises(ValidationError):
        RULES[rule](rule=rule, **more, no_such_setting=1)


@pytest.mark.parametrize(
    "settings, package",
    [
        ({"rule": "maths"}, "math_verify"),
        ({"rule": "sentiment"}, "vaderSentiment"),
        ({"rule": "json", "schema_file": "schema.json"}, "jsonschema"),
    ],
)
def test_a_package_that_is_missing_is_a_line(monkeypatch, settings, package):
    made = RULES[settings["rule"]](**settings)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    [line] = made.missing("ppo.rewards[0]")
    assert line.startswith("ppo.rewards[0].") and "pip install -e '.[" in line
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert made.missing("ppo.rewards[0]") == []


def test_constants_that_are_not_json_are_refused():
    for text in ("NaN", "[Infinity]", '{"a": -Infinity}'):
        assert not formats.is_json(text)
