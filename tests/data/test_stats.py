"""Test `rlhf data stats`: counts are right, bars add up, and the page stands alone."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from chat_tokenizers import make
from hypothesis import given
from hypothesis import strategies as st

from data.check.lengths import quantile
from data.check.report import Limits
from data.check.scripts import scripts_of, unspaced_characters
from data.encode import encode_prompt, encode_response
from data.source import Source
from data.tools.charts import Chart, Counts, float_histogram, histogram, named, text_lines
from data.tools.inputs import Opened
from data.tools.stats_page import page
from pipeline import cli


def written(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def charts(path, kind, **limits):
    counts = Counts(kind, Limits(**limits))
    counts.add(list(Opened(Source(path), kind).records()))
    return {chart.title: dict(chart.bars) for chart in counts.charts()}


def test_rankings(tmp_path):
    path = written(
        tmp_path,
        {"prompt": "a b", "responses": ["x", "y z", "w"], "scores": [1, 3, 3], "labeler": "ada", "user_id": "u1"},
        {"prompt": "c", "responses": ["x", "y"], "ranks": [1, 2], "labeler": "ada", "kind": "plain"},
        {"prompt": "d", "responses": ["x", "y"], "ranks": [1, None], "labeler": "ben", "user_id": "u1"},
    )
    found = charts(path, "rankings")
    assert found["prompt length in words"] == {"1": 2, "2": 1}
    assert found["response length in words"] == {"1": 6, "2": 1}
    assert found["responses of a ranking, K"] == {"2": 2, "3": 1}
    assert found["different ranks of a ranking"] == {"1": 1, "2": 2}
    assert found["pairs"] == {"usable": 3, "tie": 1, "unjudged": 1}
    assert found["score gap of a pair"] == {"0": 1, "2": 2}
    assert found["rankings by labeler"] == {"ada": 2, "ben": 1}
    assert found["records by kind"] == {"plain": 1} and found["records of a user"] == {"2": 1}


def test_conversations(tmp_path):
    talk = [{"role": "system", "content": "s"}]
    talk += [{"role": role, "content": f"{role} says {n}"} for n in range(3) for role in ("user", "assistant")]
    path = written(tmp_path, {"messages": talk}, {"prompt": "p", "completion": "c"})
    found = charts(path, "demonstrations")
    assert found["messages by role"] == {"user": 4, "assistant": 4, "system": 1}
    assert found["assistant turns of a conversation"] == {"1": 1, "2": 0, "3": 1}
    tokenizer = make("chatml")
    found = charts(
        written(tmp_path, {"prompt": "say hello", "completion": "a fox"}), "demonstrations", tokenizer=tokenizer
    )
    assert found["prompt length in tokens"] == {str(len(encode_prompt(tokenizer, "say hello"))): 1}
    assert found["completion length in tokens"] == {str(len(encode_response(tokenizer, "a fox"))): 1}


def test_scripts(tmp_path):
    found = charts(written(tmp_path, {"text": "hello"}, {"text": "Привет you"}, {"text": "天空は青い"}), "documents")
    assert found["records by the script they have most of"] == {"Latin": 1, "Cyrillic": 1, "Chinese (han)": 1}
    assert found["characters by script"] == {"Latin": 8, "Cyrillic": 6, "Chinese (han)": 3, "Japanese (kana)": 2}
    assert scripts_of("12 + 3 = ?") == {} and unspaced_characters("ไทย and 日本") == 5


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=200))
def test_bins_hold_every_value_once(values):
    counts = Counter(values)
    chart = histogram("", counts)
    assert sum(count for _, count in chart.bars) == len(values) and len(chart.bars) <= 12
    for label, count in chart.bars:
        edges = [int(edge.replace(",", "")) for edge in label.split(" to ")]
        assert count == sum(edges[0] <= value <= edges[-1] for value in values)
    ordered = sorted(values)
    assert quantile(counts, 0.5) == ordered[(len(values) + 1) // 2 - 1] and quantile(counts, 1.0) == ordered[-1]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=100))
def test_score_gaps_are_all_counted(values):
    chart = float_histogram("", Counter(float(f"{value:.3g}") for value in values))
    assert sum(count for _, count in chart.bars) == len(values)
    assert dict(chart.bars).get("0", 0) == sum(float(f"{value:.3g}") == 0 for value in values)


def test_many_names_are_summed():
    chart = named("", Counter({f"name {n}": 30 - n for n in range(20)}))
    assert len(chart.bars) == 13 and chart.bars[-1] == ("8 others", sum(30 - n for n in range(12, 20)))


@pytest.mark.parametrize("width", [20, 60, 110])
def test_lines_fit_the_terminal(width):
    lines = list(text_lines(Chart("t", [("a", 1), ("bbb", 1000), ("c", 0)], "note"), width))
    assert lines[0] == "t  (note)" and all(len(line) <= max(width, 36) for line in lines)
    bars = [line.count("\u2588") for line in lines[1:]]
    assert bars[1] > bars[0] >= 0 and bars[2] == 0 and "\u258f" in lines[1]


class Links(HTMLParser):
    """Collect what a page loads from elsewhere, and its texts."""

    def __init__(self):
        super().__init__()
        self.loaded, self.texts, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_stands_alone():
    parser = Links()
    text = page([("<script>alert(1)</script>", "a & b", [Chart("t <x>", [('"label"', 3), ("none", 0)], "n")])])
    parser.feed(text)
    assert parser.loaded == [] and "script" not in parser.tags and "<script>alert(1)</script>" in parser.texts
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text and 'name="viewport"' in text
    assert re.findall(r'style="width:([\d.]+)%"', text) == ["100.0"]


def test_the_command(tmp_path, capsys):
    one = written(tmp_path, {"prompt": "p", "completion": "c"})
    other = written(tmp_path, "t", {"text": 3}, name="texts.jsonl")
    out = tmp_path / "out.html"
    assert cli.main(["data", "stats", str(one), "--html", str(out)]) == 0
    assert "1 demonstrations of 1 rows" in capsys.readouterr().out and "completion length in words" in out.read_text()
    assert cli.main(["data", "stats", str(one), "--html", str(out)]) == 2 and "exists" in capsys.readouterr().err
    assert cli.main(["data", "stats", str(one), str(other), "--html", str(out), "--force"]) == 2
    printed = capsys.readouterr()
    assert "1 documents of 2 rows \u00b7 1 errors" in printed.out and "texts.jsonl:2: 'text' is 3" in printed.err
    assert str(other) in out.read_text()
