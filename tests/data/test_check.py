"""Test `rlhf data check`: what it reports, and that training meets the same."""

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from jinja2 import TemplateError
from rich.console import Console

from data import sources
from data.check import command as checks
from data.check.clusters import Share
from data.check.config import Input, limits_of
from data.check.inspect_file import check as check_source
from data.check.inspect_file import guess_kind
from data.check.report import Limits, OtherData
from data.encode import encode_prompt, encode_response
from data.length_limit import fit_lengths
from data.source import Source
from pipeline.errors import UserError
from stages.evaluation.statistics import share_estimate

ROOT = Path(__file__).parents[2]


class Letters:
    """Tokenize into letters, with a template that adds 3 tokens to each message."""

    eos_token_id = 0
    chat_template = "{{ messages }}"
    added_tokens_decoder: ClassVar = {}

    def apply_chat_template(self, messages, **_):
        return [1] * sum(3 + len(m["content"]) for m in messages)

    def __call__(self, text, **_):
        if isinstance(text, list):
            return {"input_ids": [[1] * len(one) for one in text]}
        return {"input_ids": [1] * len(text)}

    def decode(self, ids):
        return "a" * len(ids)


def written(tmp_path, *rows, name="rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def check(path, kind=None, tokenizer=None, max_length=None, on_too_long="error", against=(), **limits):
    return check_source(Source(path), kind, Limits(tokenizer, max_length, on_too_long, **limits), against)


def facts(report) -> dict[str, str]:
    return dict(report.facts)


PAIR = {"prompt": "p", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    "row, name, kind",
    [
        ({"prompt": "p", "completion": "c"}, "rows.jsonl", "demonstrations"),
        ({"prompt": "p", "completion": "c"}, "my_prompts.jsonl", "prompts"),
        ({"instruction": "i", "input": "", "output": "o"}, "rows.jsonl", "demonstrations"),
        (PAIR, "rows.jsonl", "rankings"),
        ({"prompt": "p", "responses": ["x"], "ranks": [1]}, "rows.jsonl", "rankings"),
        ({"text": "t"}, "prompts.jsonl", "documents"),
        ("t", "rows.jsonl", "documents"),
        ("t", "prompts.jsonl", "prompts"),
        ({"prompt": "p"}, "rows.jsonl", "prompts"),
        ({"prompt": "p"}, "evaluation_prompts.jsonl", "evaluation_prompts"),
        ({"messages": [{"role": "user", "content": "p"}]}, "rows.jsonl", "prompts"),
        ({"question": "p"}, "rows.jsonl", None),
    ],
)
def test_the_kind_is_guessed_from_the_keys(tmp_path, row, name, kind):
    assert guess_kind(Source(written(tmp_path, row, name=name))) == kind


@pytest.mark.parametrize(
    "rows, kind",
    [
        ([{"prompt": "p", "completion": ""}] * 3, "demonstrations"),
        ([{"prompt": "p", "completion": ""}] * 3 + [{"prompt": "p"}], "demonstrations"),
        ([{"prompt": "p", "responses": ["a"], "ranks": [1]}], "rankings"),
        ([{"prompt": "p", "chosen": 1, "rejected": "b"}], "rankings"),
        ([{"messages": [{"role": "user", "content": "p"}]}], "prompts"),
    ],
)
def test_damaged_rows_still_have_their_kind(tmp_path, rows, kind):
    assert guess_kind(Source(written(tmp_path, *rows))) == kind


def test_demonstrations_in_words(tmp_path):
    rows = [{"prompt": "a b", "completion": " ".join("c" * n)} for n in range(1, 21)]
    talk = {"messages": [{"role": "user", "content": "z"}, {"role": "assistant", "content": "y"}], "k": 1}
    path = written(tmp_path, *rows, rows[0], talk)
    path.write_text(path.read_text() + "\n\n")
    report = check(path)
    assert report.errors == []
    assert facts(report) == {
        "rows": "22 · 2 blank lines skipped",
        "form": "{messages, system?}: 1 rows",  # the second of two lines with this label
        "keys not read": "k (1)",
        "prompt length": "1 to 2 words · median 2 · 95 % up to 2",
        "completion length": "1 to 20 words · median 9 · 95 % up to 19",
        "turns": "22 assistant turns, all learnt",
        "duplicates": "1 rows · 20 prompts that came before, kept",
    }
    assert ("form", "{prompt, completion, system?, learnt?}: 21 rows") in report.facts
    lines = report.lines()
    assert lines[1] == "kind               demonstrations" and lines[-1] == "errors             none"


def test_rankings(tmp_path):
    def ranked(*ranks, labeler, responses="xyz"):
        return {"prompt": "p", "responses": list(responses), "ranks": ranks, "labeler": labeler}

    report = check(
        written(
            tmp_path,
            ranked(1, 2, 3, labeler="ada"),
            ranked(2, 1, 3, labeler="ben"),  # against ada on (x, y)
            ranked(1, 1, None, labeler="ada"),
            ranked(1, 2, 3, 3, labeler="cleo", responses="aabc"),
            {**PAIR, "prompt": "q"},
            {**PAIR, "prompt": "q", "chosen": "y", "rejected": "z"},
            {**PAIR, "prompt": "q", "chosen": "z", "rejected": "x"},  # q: x before y before z before x
        )
    )
    assert report.kind == "rankings" and report.errors == []
    said = facts(report)
    assert said["K"] == "2: 3 rows · 3: 3 rows · 4: 1 rows"
    assert said["labelers"] == "3 · 3 rankings name none"
    assert said["pairs"] == "13 usable of 18 · 2 tie · 2 unjudged · 1 identical"
    assert said["contradictions"] == "1 of 3 pairs judged more than once · 1 prompts ranked in a circle by one labeler"
    assert said["duplicates"] == "0 rows · 5 prompts that came before, kept"


def test_labelers_and_biases(tmp_path):
    """Check agreement by pair of labelers, and that circles do not mix labelers."""

    def ranked(prompt, labeler, *ranks):
        return {"prompt": prompt, "responses": ["a", "bb", "ccc"], "ranks": ranks, "labeler": labeler}

    rows = [ranked(f"p{i}", name, 1, 2, 3) for i in range(8) for name in ("ada", "ben")]
    rows += [ranked(f"p{i}", "cleo", *((3, 2, 1) if i % 2 else (1, 2, 3))) for i in range(8)]
    report = check(written(tmp_path, *rows))
    said, by_two = facts(report), [text for label, text in report.facts if not label]
    # ada and ben agree on all 24 pairs, and each of them with cleo on 12
    assert said["labelers agree"].startswith("on 0.67 (95 % interval ")
    assert said["labelers agree"].endswith("; 72 pairs, 8 prompts); ties left out")
    assert [text.partition(" (")[0] for text in by_two] == [
        "ada and ben: 1.00",
        "ada and cleo: 0.50",
        "ben and cleo: 0.50",
    ]
    assert (
        said["contradictions"] == "12 of 24 pairs judged more than once · 0 prompts ranked in a circle by one labeler"
    )
    assert said["first listed"].startswith("is the better one in 0.83 (95 % interval ")
    assert said["longer response"].startswith("is the better one in 0.17 (95 % interval ")

    pairs = [{"prompt": "q", "chosen": c, "rejected": r, "labeler": name} for name, c, r in ("axy", "byz", "czx")]
    said = facts(check(written(tmp_path, *pairs)))
    assert said["contradictions"].endswith("0 prompts ranked in a circle by one labeler")  # each said one thing
    assert "labelers agree" not in said and said["labelers"] == "3" and "longer response" not in said
    assert said["first listed"].startswith("is always the better one: the file lists the best first")


def test_intervals_are_those_of_the_stages():
    """Check against numpy and scipy, with clusters of several sizes."""
    for seed in range(8):
        draw, share, values, clusters = random.Random(seed), Share(), [], []
        for cluster in range(draw.choice([3, 6, 20, 60])):
            chance = draw.random()
            values += [float(draw.random() < chance) for _ in range(draw.randint(1, 6))]
            clusters += [cluster] * (len(values) - len(clusters))
        for value, cluster in zip(values, clusters, strict=True):
            share.add(cluster, value)
        theirs = share_estimate(values, clusters)
        assert share.value == pytest.approx(theirs["value"])
        assert share.interval() == pytest.approx(theirs["ci95"], abs=0.02 if seed == 2 else 2e-3)


def test_lengths_are_counted_in_characters_where_words_cannot_be_told(tmp_path):
    rows = [
        {"prompt": "天空为什么是蓝色的？", "completion": "因为光的散射。"},
        {"prompt": "hello", "completion": "你好"},
    ]
    said = facts(check(written(tmp_path, *rows)))
    assert said["completion length"] == "2 to 7 characters · median 2 · 95 % up to 7"
    assert said["counted in"].startswith("characters")
    said = facts(check(written(tmp_path, {"prompt": "what is 你 ?", "completion": "it means you , as in hello"})))
    assert said["prompt length"].startswith("4 to 4 words") and "counted in" not in said


def test_turns_that_are_learnt_are_counted(tmp_path):
    talk = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    path = written(tmp_path, {"messages": talk})
    assert facts(check(path))["turns"] == "3 assistant turns, all learnt"
    assert facts(check(path, turns="last"))["turns"] == "3 assistant turns, 1 learnt"
    assert facts(check(path))["prompt length"].startswith("2 to 2 words")  # before the first answer


def test_what_is_left_out_is_said(tmp_path):
    rows = [{"prompt": f"p {n}", "completion": "c", "lang": "en" if n % 2 else "de"} for n in range(40)]
    path = written(tmp_path, *rows, {"prompt": "q", "completion": "", "lang": "en"})
    report = check_source(Source(path, where={"lang": "en"}, on_bad_row="drop", max_bad=0.5))
    said = facts(report)
    assert said["rows"] == "21" and said["filtered"] == "20 rows are not those of where" and not report.errors
    assert said["dropped"].startswith("1 rows with mistakes")
    assert ("", f"{path}:41: 'completion' is blank; expected a text") in report.facts


def test_where_that_lets_no_row_pass_is_named(tmp_path):
    path = written(tmp_path, *[{"prompt": f"p {n}", "completion": "c", "lang": "en"} for n in range(3)])
    for kind in (None, "demonstrations"):
        report = check_source(Source(path, where={"lang": "fr"}), kind)
        assert report.errors == [f"{path}: no row has what where asks for (lang: fr); correct where"]
    assert "keys not read" not in facts(check_source(Source(path, where={"lang": "en"}), "demonstrations"))


def test_a_table_without_rows_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "none.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert check_source(Source(path)).errors == [f"{path}: no rows; give at least one"]


def test_responses_that_were_cut_off_are_counted_and_have_no_eos(tmp_path):
    """Check that the same text, once finished and once cut, is a pair like any other."""
    row = {"prompt": "p", "responses": ["aaaa", "aaaa", "b"], "ranks": [1, 2, 3]}
    path = written(tmp_path, row | {"finished": [False, True, False]}, {**PAIR, "finished": [True, True]}, row)
    said = facts(check(path, tokenizer=Letters()))
    assert said["unfinished"] == "2 of 5 responses were cut off: taught without EOS"
    assert said["response length"].startswith("1 to 5 tokens") and said["pairs"].endswith("1 identical")
    assert "unfinished" not in facts(check(written(tmp_path, row)))


ROWS = [{"prompt": "p", "completion": "c" * n} for n in (3, 4, 5, 40)]
ROWS += [{"prompt": "p" * 30, "completion": "c"}]


@pytest.mark.parametrize(
    "on_too_long, text",
    [("drop", "3 dropped"), ("truncate", "2 lose their end and EOS, 1 dropped (no room)"), ("error", "3 refused")],
)
def test_what_is_too_long_is_what_training_would_find(tmp_path, on_too_long, text):
    path = written(tmp_path, *ROWS)
    report = check(path, tokenizer=Letters(), max_length=9, on_too_long=on_too_long)
    said = facts(report)
    assert said["prompt length"].startswith("4 to 33 tokens")
    assert said["completion length"].startswith("2 to 41 tokens")
    assert said["too long"].startswith(f"{text} · limit 9 tokens, on_too_long: {on_too_long}")
    assert f"the first at {path}:3" in said["too long"]

    records = sources.load("demonstrations", Source(path))
    prompts = [encode_prompt(Letters(), r.prompt) for r in records]
    responses = [[encode_response(Letters(), r.completion)] for r in records]
    options = {"max_length": 9, "on_too_long": on_too_long, "what": "demonstration", "section": "sft"}
    options["names"] = [f"{path}:{n}" for n in range(1, len(records) + 1)]
    if on_too_long == "error":
        assert [line.partition(": ")[0] for line in report.errors] == [f"{path}:{n}" for n in (3, 4, 5)]
        with pytest.raises(UserError) as caught:
            fit_lengths(prompts, responses, **options)
        assert len(caught.value.lines) == 3
    else:
        found = fit_lengths(prompts, responses, **options)[-1]
        assert (found.truncated, found.dropped) == {"drop": (0, 3), "truncate": (2, 1)}[on_too_long]
        assert report.errors == []


def test_a_prompt_that_the_template_refuses_is_named_by_its_place(tmp_path, monkeypatch):
    def refuse(self, messages, **_):
        raise TemplateError("no system")

    monkeypatch.setattr(Letters, "apply_chat_template", refuse)
    path = written(tmp_path, *ROWS[:2])
    [line] = check(path, tokenizer=Letters()).errors
    assert line.startswith(f"{path}:1: ") and "no system" in line and "the last at line 2" in line


def test_a_limit_that_leaves_nothing_is_an_error(tmp_path):
    report = check(written(tmp_path, *ROWS), tokenizer=Letters(), max_length=3, on_too_long="drop")
    assert "no row is left within 3 tokens" in report.errors[-1]


def test_a_ranking_is_as_long_as_its_longest_response(tmp_path):
    path = written(tmp_path, {**PAIR, "rejected": "y" * 20}, PAIR)
    report = check(path, tokenizer=Letters(), max_length=10, on_too_long="drop")
    assert facts(report)["too long"].startswith("1 dropped")
    assert facts(report)["response length"].startswith("2 to 21 tokens")


def test_documents_are_packed_and_never_too_long(tmp_path):
    report = check(written(tmp_path, {"text": "a" * 99}), tokenizer=Letters(), max_length=10)
    assert report.errors == [] and "packed end to end into rows of 10" in facts(report)["too long"]


def test_without_a_tokenizer_a_limit_is_not_counted(tmp_path):
    report = check(written(tmp_path, *ROWS), max_length=3)
    assert facts(report)["too long"].startswith("not counted") and report.errors == []


def test_leaks(tmp_path):
    as_messages = {"messages": [{"role": "user", "content": "c  c"}]}
    mine = written(tmp_path, "a", "b", as_messages, name="prompts.jsonl")
    held_out = written(tmp_path, {"prompt": "c c"}, {"prompt": "d"}, name="held.jsonl")
    training = written(tmp_path, *({"prompt": p, "completion": "x"} for p in "ab"), name="training.jsonl")
    corpus = written(tmp_path, {"text": "a"}, name="corpus.jsonl")
    files = (("evaluation_prompts", held_out), ("demonstrations", training), ("documents", corpus))
    against = [OtherData(name, Source(file)) for name, file in files]
    report = check(mine, against=against)
    assert facts(report)["also in evaluation_prompts"] == "1 of 3 prompts"
    assert facts(report)["also in demonstrations"] == "2 of 3 prompts"  # training data may share prompts
    assert "also in documents" not in facts(report)
    [line] = report.errors
    assert line.startswith(f"{mine}:3: this prompt is at {held_out}:1 (evaluation_prompts) too: a leak; ")
    assert len(check(mine, "evaluation_prompts", against=[OtherData("demonstrations", Source(training))]).errors) == 2
    assert len(check(training, against=[OtherData("validation", Source(training))]).errors) == 2


def test_near_copies_of_evaluation_prompts_are_counted(tmp_path):
    """Check a greeting and another case, which measure memory too; training data may share them."""
    mine = ["what color is the fox ?", "tell a joke", "Hello. What color is the fox?"]
    mine = written(tmp_path, *mine, name="prompts.jsonl")
    held_out = written(tmp_path, *({"prompt": p} for p in ("a riddle", "what color is the fox ?")), name="held.jsonl")
    for names, looked in ((["evaluation_prompts", "validation"], 2), (["prompts"], 0)):
        report = check(mine, against=[OtherData(name, Source(held_out)) for name in names])
        said = [text for label, text in report.facts if label == "near copies"]
        first = f"the first at {mine}:3, of {held_out}:2"
        assert said == [f"1 of 3 prompts are near copies of prompts in {name} · {first}" for name in names[:looked]]
        assert len(report.errors) == looked and all(line.startswith(f"{mine}:1: ") for line in report.errors)
        assert facts(report)[f"also in {names[0]}"] == "1 of 3 prompts"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "the file is empty"),
        (b'{"text": "a"}\n{"text": "b', ":2: the last line is cut off"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', ":2: not UTF-8"),
        (b'{"text": "a"}\n{"text": NaN}\n', ":2: NaN is not"),
        (b'{"text": "a"}\n{"text": 7}\n', ":2: 'text' is 7"),
        (b'{"question": "a"}\n', ":1: the keys question are no known kind of row; known are rankings {"),
        (b"[5]", ":1: index 0: 5 are no known kind of row"),
        (b'{"prompt": "p", "responses": ["x", "y"], "ranks": [1, 1]}', "not one usable pair (1 tie)"),
    ],
)
def test_damaged_files(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    report = check(path)
    assert len(report.errors) == 1 and words in report.errors[0] and report.errors[0].startswith(f"{path}:")
    assert report.lines()[-1].split() == ["errors", "1"]


# ── the command ──────────────────────────────────────────────────────────────────────────────────


def experiment(**data):
    kinds = dict.fromkeys(["documents", "demonstrations", "prompts", "evaluation_prompts"], "world")
    return SimpleNamespace(
        name="tiny",
        model=SimpleNamespace(name_or_path=None),
        data=SimpleNamespace(**(kinds | {"rankings": None} | data)),
        base=SimpleNamespace(max_length=8),
        sft=SimpleNamespace(max_length=20, on_too_long="drop"),
        ppo=SimpleNamespace(max_length=30, response_length=10, on_too_long="error"),
    )


def run(path, config, **options) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=40)
    return checks.run([Input(Source(path))], None, config, console, **options), console.file.getvalue()


def test_run_without_a_config(tmp_path, capsys):
    code, text = run(written(tmp_path, {"prompt": "[bold]p", "completion": "c"}), None)
    assert code == 0 and "kind               demonstrations\n" in text and capsys.readouterr().err == ""
    assert checks.run([Input(Source(tmp_path / "rows.jsonl"))], "prompts", None) == 0
    assert "kind           prompts\n" in capsys.readouterr().out
    code, text = run(tmp_path / "none.jsonl", None)
    errors = capsys.readouterr().err.splitlines()
    assert code == 2 and len(errors) == 1
    assert errors[0].startswith(f"error: {tmp_path}/none.jsonl: cannot be read")


def test_run_with_a_config(tmp_path, capsys):
    prompts = written(tmp_path, {"prompt": "a"}, {"prompt": "b"}, name="mine.jsonl")
    (tmp_path / "artifacts/tiny/world").mkdir(parents=True)
    held_out = written(tmp_path / "artifacts/tiny/world", {"prompt": "b"}, name="evaluation_prompts.jsonl")
    config = experiment(prompts=SimpleNamespace(path=str(prompts), limit=None), demonstrations=str(prompts))
    code, text = run(prompts, config, artifacts=tmp_path / "artifacts")
    assert code == 2 and "kind       demonstrations\n" in text  # which the config names before prompts
    config = experiment(prompts=SimpleNamespace(path=str(prompts), limit=None), demonstrations="org/name")
    code, text = run(prompts, config, artifacts=tmp_path / "artifacts")
    assert code == 2 and "lengths are in words" in text
    assert "also in evaluation_prompts  1 of 2 prompts" in text
    assert f"{prompts}:2: this prompt is at {held_out}:1" in capsys.readouterr().err


def test_run_counts_in_the_tokens_of_the_base_model(tmp_path, capsys):
    from data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a quick test of a short text"], 300)
    tokenizer.save_pretrained(tmp_path / "artifacts/tiny/base/model")
    path = written(tmp_path, {"prompt": "a test"}, {"prompt": "z" * 50})
    code, text = run(path, experiment(prompts=str(path)), artifacts=tmp_path / "artifacts")
    assert code == 2
    short = len(encode_prompt(tokenizer, "a test"))
    assert f"{short} to {len(encode_prompt(tokenizer, 'z' * 50))} tokens" in text
    assert f"{path}:2: " in capsys.readouterr().err and "limit 20 tokens" in text
    (tmp_path / "artifacts/tiny/base/model/tokenizer.json").write_text("{")
    code, text = run(path, experiment(prompts=str(path)), artifacts=tmp_path / "artifacts")
    assert code == 0 and "cannot be loaded" in text and "words" in text


def test_demonstrations_are_compared_with_ppos_response_length(tmp_path):
    """Check lengths with EOS, and that only a config with prompts for PPO reports them."""
    rows = [{"prompt": f"ask {i}", "completion": "x" * (10 + i)} for i in range(20)]
    path = written(tmp_path, *rows)

    def room(length):
        return facts(check(path, "demonstrations", Letters(), response_length=length)).get("room in ppo")

    assert room(30) == "answers have 20 tokens in the median, 95 % up to 29; none is over 30"
    assert room(29).endswith("5% are over 29")
    assert "60% are over 18, ppo.response_length: such answers are cut" in room(18) and "raise it to 29" in room(18)
    assert room(None) is None
    assert "room in ppo" not in facts(check(path, "demonstrations", None, response_length=4))  # words are no tokens
    config = SimpleNamespace(data=SimpleNamespace(prompts="mine"), ppo=SimpleNamespace(response_length=18))
    assert limits_of(config, "demonstrations").response_length == 18
    assert limits_of(config, "rankings").response_length is None
    config.data.prompts = None
    assert limits_of(config, "demonstrations").response_length is None


def test_pairs_that_truncation_makes_equal_are_named(tmp_path):
    """Check that the count is what training leaves out; rows that still differ count."""
    from data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a quick test of a short text"], 300)
    same, word = "a test " * 20, "a short text"
    rows = [PAIR | {"chosen": same + "of", "rejected": same + "text"}, PAIR, PAIR | {"chosen": same, "rejected": word}]
    rows += [{"prompt": "p", "responses": [same + "1", same + "2", same + "3", word], "ranks": [1, 2, 3, 4]}]
    path = written(tmp_path, *rows)
    report = check(path, "rankings", tokenizer, max_length=20, on_too_long="truncate")
    said = facts(report)
    assert said["pairs"] == "5 usable of 9 · 0 tie · 0 unjudged · 0 identical · 4 equal within 20 tokens"
    assert said["equal within"] == f"20 tokens, and so left out: at {path}:1, {path}:4 (3)" and not report.errors
    for on_too_long, limit in (("drop", 20), ("truncate", 200)):
        said = facts(check(path, "rankings", tokenizer, max_length=limit, on_too_long=on_too_long))
        assert "equal within" not in said and said["pairs"].startswith("9 usable of 9 ")


def test_rows_that_differ_from_the_template_are_counted(tmp_path):
    """Check demonstrations and every response of a ranking."""
    from chat_tokenizers import make

    tokenizer = make("qwen3.5")
    path = written(tmp_path, {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "Hm.\n</think>\n\nc"})
    text = facts(check(path, tokenizer=tokenizer))["chat template"]
    assert text.startswith(f"1 of 2 rows are not what the chat template writes; the first, {path}:1: ")
    assert "set model.chat_template_kwargs: {enable_thinking: false}, which fixes that" in text
    path = written(tmp_path, PAIR, PAIR, name="ranked.jsonl")
    assert facts(check(path, tokenizer=tokenizer))["chat template"].startswith("4 of 4 answers are not what the ")
    assert facts(check(path, tokenizer=make("chatml")))["chat template"] == "4 answers, all as it writes them"
    assert "chat template" not in facts(check(path)) and "chat template" not in facts(
        check(written(tmp_path, {"prompt": "p"}, name="prompts.jsonl"), tokenizer=tokenizer)
    )


def test_run_uses_the_template_that_base_will_publish(tmp_path, capsys):
    """Check that EOS ends a turn and that the config's settings count before base has run."""
    from chat_tokenizers import make

    for kind in ("gemma", "qwen3.5"):
        make(kind).save_pretrained(tmp_path / kind)
    path = written(tmp_path, {"prompt": "p", "completion": "c"})
    config = experiment(demonstrations=str(path))
    config.sft.max_length = 99
    config.model.name_or_path = str(tmp_path / "gemma")
    assert "1 rows, all as it writes them" in run(path, config, artifacts=tmp_path)[1]
    config.model.name_or_path = str(tmp_path / "qwen3.5")
    assert "1 of 1 rows are not what the chat template writes" in run(path, config, artifacts=tmp_path)[1]
    make("qwen3.5").save_pretrained(tmp_path / "tiny/base/model")  # of before the settings
    config.model.chat_template_kwargs = {"enable_thinking": False}
    assert "1 rows, all as it writes them" in run(path, config, artifacts=tmp_path)[1]
    config.model.chat_template, config.model.chat_template_kwargs = str(tmp_path / "mine.jinja"), None
    (tmp_path / "mine.jinja").write_text(make("zephyr").chat_template)
    assert "<|assistant|>\\nc" in run(path, config, artifacts=tmp_path)[1]
    (tmp_path / "mine.jinja").write_text("{% if %}")
    assert "lengths are in words" in run(path, config, artifacts=tmp_path)[1]


def test_a_file_is_checked_without_a_heavy_import(tmp_path):
    """Check that without a tokenizer the command imports no large library."""
    path = written(tmp_path, PAIR)
    code = f"""\
import sys
from data.check.command import run
from data.check.clusters import Share
from data.check.config import Input
from data.source import Source
code = run([Input(Source({str(path)!r}))], None, None)
heavy = {{"torch", "transformers", "datasets", "numpy", "scipy", "pyarrow", "pydantic"}} & set(sys.modules)
sys.exit(f"{{sorted(heavy)}} imported" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
