"""Test `rlhf data preview`: it shows what training sees."""

import json
import re
from types import SimpleNamespace

import pytest
from chat_tokenizers import make

from data.check.config import Input
from data.check.report import Limits
from data.encode import teach
from data.records import Demonstration
from data.source import Source
from data.tools import preview
from data.tools.inputs import Opened, sample
from data.tools.marked import Piece, Printer, pieces_of, plain
from data.tools.preview import Choice
from pipeline import cli
from pipeline.errors import UserError
from tests.encoded import encode_demonstrations

LEARNT, CUT = re.compile("\u27e6(.*?)\u27e7", re.DOTALL), re.compile("\u27e8cut: (.*?)\u27e9", re.DOTALL)


def written(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def shown(path, kind, choice=None, **limits):
    """Return what is printed of a file."""
    import io

    out = io.StringIO()
    preview.show(Opened(Source(path), kind), Limits(**limits), choice or Choice(), Printer(out))
    return out.getvalue()


TALK = [
    {"role": "user", "content": "what color is the fox ?"},
    {"role": "assistant", "content": "the fox is red ."},
    {"role": "user", "content": "say hello twice ."},
    {"role": "assistant", "content": "hello hello ."},
]


def test_every_learnt_answer_is_marked_with_its_end(tmp_path):
    path = written(tmp_path, {"messages": TALK})
    text = shown(path, "demonstrations", tokenizer=make("chatml"))
    assert LEARNT.findall(text) == ["the fox is red .<|im_end|>", "hello hello .<|im_end|>"]
    assert "<|im_start|>user\nwhat color is the fox ?<|im_end|>\n<|im_start|>assistant\n\u27e6the" in text
    assert "rows.jsonl:1 \u00b7 demonstration" in text
    text = shown(path, "demonstrations", tokenizer=make("chatml"), turns="last")
    assert LEARNT.findall(text) == ["hello hello .<|im_end|>"]


@pytest.mark.parametrize("kind", ["chatml", "llama3", "gemma", "zephyr", "mistral"])
@pytest.mark.parametrize("cut", ["nothing", "the end", "all but a token"])
def test_what_is_marked_is_what_training_teaches(kind, cut):
    """Compare the marks with the labels of rows, cut ends included."""
    tokenizer = make(kind)
    row = Demonstration((TALK[0], TALK[1], TALK[2]), TALK[3]["content"], (1,))
    ((whole, *_),) = teach(tokenizer, [row], ["a"], "all")
    limit = {"nothing": 999, "the end": len(whole.ids) - 2, "all but a token": whole.spans[0][0] + 1}[cut]
    options = {"max_length": limit, "on_too_long": "truncate", "section": "sft"}
    encoded = encode_demonstrations(tokenizer, [row], names=["a"], **options).rows[0]
    pieces = pieces_of(tokenizer, whole.ids, whole.spans, limit)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(whole.ids)
    taught = [i for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != -100]
    marked = "".join(piece.text for piece in pieces if piece.mark == "learnt")
    assert marked.replace(" ", "") == tokenizer.decode(taught).replace(" ", "")


def test_what_is_cut_or_refused_is_said(tmp_path):
    path = written(tmp_path, {"prompt": "what color is the fox ?", "completion": "the fox is red . " * 9})
    text = shown(path, "demonstrations", tokenizer=make("chatml"), max_length=30, on_too_long="truncate")
    assert " \u00b7 cut to 30" in text and CUT.findall(text)[0].endswith("<|im_end|>")
    assert "<|im_end|>" not in LEARNT.findall(text)[0]
    text = shown(path, "demonstrations", tokenizer=make("chatml"), max_length=30, on_too_long="drop")
    assert "over max_length 30: dropped" in text and not LEARNT.findall(text)
    text = shown(path, "demonstrations", tokenizer=make("chatml"), max_length=30, on_too_long="error")
    assert "refused" in text


def test_a_ranking_shows_its_prompt_once_and_the_best_response_first(tmp_path):
    row = {"prompt": "say hello", "responses": ["a fox", "", "hello"], "ranks": [2, None, 1], "labeler": "ada"}
    row |= {"finished": [False, True, True], "margin": 0.5}
    path = written(tmp_path, row, {"prompt": "p", "responses": ["x", "y"], "scores": [1, 4.5]})
    text = shown(path, "rankings", tokenizer=make("chatml"))
    first, second = text.split("\u2500\u2500 ")[1:]
    assert first.count("say hello") == 1 and "ranking of 3 by ada, margin 0.5" in first
    assert LEARNT.findall(first) == ["hello<|im_end|>", "a fox", "<|im_end|>"]
    assert "rank 2 (response 1, was cut off: no EOS)" in first and "not judged (response 2)" in first
    assert "pairs of responses: 3 > 1 \u00b7 2 unjudged" in first
    assert "rank 1, score 4.5 (response 2)" in second and LEARNT.findall(second)[0] == "y<|im_end|>"
    plainly = shown(path, "rankings")
    assert LEARNT.findall(plainly)[:2] == ["hello", "a fox"] and "user: say hello" in plainly


def test_documents_are_packed(tmp_path):
    path = written(tmp_path, *({"text": f"the fox is red . {n}"} for n in range(20)))
    tokenizer = make("chatml")
    text = shown(path, "documents", Choice(number=2), tokenizer=tokenizer, max_length=40)
    rows = LEARNT.findall(text)
    assert len(rows) == 2 and "packed row 2" in text and text.count("the fox is red") >= 2
    text = shown(written(tmp_path, {"text": "a fox"}), "documents", tokenizer=tokenizer, max_length=4000)
    assert "the document make no whole row of 4000 tokens" in text


def test_rows_are_chosen_by_line_index_and_seed(tmp_path):
    rows = [{"prompt": f"prompt {n}", "completion": "c"} for n in range(30)]
    path = written(tmp_path, *rows, {"prompt": "bad", "completion": 3})
    assert "prompt 6\n" in shown(path, "demonstrations", Choice(row=7))
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows))
    assert "prompt 7\n" in shown(array, "demonstrations", Choice(row=7))
    once, again = (shown(path, "demonstrations", Choice(number=4, seed=5)) for _ in range(2))
    assert once == again and once.count("\u2500\u2500") == 4 and once != shown(path, "demonstrations", Choice(number=4))
    with pytest.raises(UserError, match="no demonstration comes from line or index 99"):
        shown(path, "demonstrations", Choice(row=99))
    items = [(str(n), None) for n in range(1000)]
    assert len({item for seed in range(40) for item, _ in sample(iter(items), 5, seed)}) > 150


def test_data_cannot_act_on_the_terminal():
    assert plain([Piece("a\x1b[31m\u202e\tb\n", "learnt")]) == "\u27e6a\\x1b[31m\\x202e\tb\n\u27e7"


def test_the_command(tmp_path, capsys, monkeypatch):
    path = written(tmp_path, {"prompt": "what is red ?", "completion": "a fox"}, {"prompt": "p", "completion": ""})
    assert cli.main(["data", "preview", str(path), "-n", "1"]) == 0
    assert (
        capsys.readouterr().out
        == f"\u2500\u2500 {path}:1 \u00b7 demonstration\nuser: what is red ?\nassistant: \u27e6a fox\u27e7\n\n"
    )
    assert cli.main(["data", "preview", str(path), "--row", "2"]) == 2
    assert capsys.readouterr().err == f"error: {path}:2: 'completion' is blank; expected a text\n"
    assert cli.main(["data", "preview", str(path), "-n", "0"]) == 2 and "-n 0" in capsys.readouterr().err
    assert cli.main(["data", "preview"]) == 2 and "give a FILE" in capsys.readouterr().err
    assert cli.main(["data", "preview", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err


def test_a_config_gives_tokenizer_limits_and_files(tmp_path, capsys):
    make("chatml").save_pretrained(tmp_path / "tiny/base/model")
    path = written(tmp_path, {"prompt": "what color is the fox ?", "completion": "the fox is red . " * 9})
    data = SimpleNamespace(
        demonstrations=str(path), **dict.fromkeys(["documents", "prompts", "evaluation_prompts", "rankings"])
    )
    config = SimpleNamespace(
        name="tiny",
        model=SimpleNamespace(name_or_path=None),
        data=data,
        sft=SimpleNamespace(max_length=30, on_too_long="truncate", turns="all"),
    )
    for inputs in ([], [Input(Source(path))]):
        assert preview.run(inputs, None, config, Choice(), str(tmp_path)) == 0
        out = capsys.readouterr().out
        assert "cut to 30" in out and out.startswith(
            f"tokenizer: {tmp_path}/tiny/base/model\n\u27e6what is learnt\u27e7"
        )
