"""Test how wordings make prompts and responses of the rows of a task, row by row."""

import json
from collections import Counter

import pytest

from data.records import prompt_key
from data.row_reader import records
from data.source import Loaded, Source
from data.sources import load, read
from data.tasks.fields import parse_template, written
from data.tasks.wordings import read_wordings
from pipeline.errors import UserError

NLI = """\
- name: plain
  prompt: "{premise} Does it follow that {hypothesis}?"
  response: "{label}"
  labels: {0: no, 1: yes, -1: null}
- name: thoughts
  system: "Think first."
  prompt: "Is it so? {premise} {hypothesis}"
  response: "{rationale} So: {label}."
  answer: "{label}"
  labels: {0: false, 1: true, -1: null}
  weight: 3
"""
ROW = {"premise": "The fox is red.", "hypothesis": "The fox is {green}", "label": 0, "rationale": "It says red."}


def rows_of(count, **more):
    """Return rows that differ in their premise."""
    return [ROW | {"premise": f"Fox {i} is red.", "label": i % 2} | more for i in range(count)]


def source_of(tmp_path, rows, wordings=NLI, name="rows.jsonl", **settings):
    """Write rows and wordings, and return the source."""
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "wordings.yaml").write_text(wordings)
    return Source(path=str(tmp_path / name), wordings=str(tmp_path / "wordings.yaml"), **settings)


def texts(record):
    """Return the messages of a prompt as (role, content)."""
    prompt = [{"role": "user", "content": record.prompt}] if isinstance(record.prompt, str) else record.prompt
    return [(message["role"], message["content"]) for message in prompt]


# ── templates ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a} and {{a}}", "{b} and {a}"),  # braces in a value stay text
        ("{deep.text}", "inner"),
        ("{many[1]}", "two"),
        ("{many[at]}", "two"),
        ("{many:letters}", "A. one\nB. two"),
        ("{many:dashes}", "- one\n- two"),
        ("{at:letter}", "B"),
        ("{with.dot}", "dotted"),
        ("{whole} {yes}", "3 true"),
    ],
)
def test_fields(text, expected):
    row = {"a": "{b}", "deep": {"text": "inner"}, "many": ["one", "two"], "at": 1, "with.dot": "dotted"}
    assert written(parse_template(text), row | {"whole": 3.0, "yes": True}, {}) == expected


@pytest.mark.parametrize("text", ["{}", "{0}", "{a!r}", "{a:>10}", "{a", "a}", "{a:{b}}", "{a..b}", "{a[}"])
def test_fields_that_are_more_than_a_name_are_refused(text):
    with pytest.raises(ValueError, match=r"write|known are"):
        parse_template(text)


@pytest.mark.parametrize(
    "text", ["{a.__class__}", "{a.upper}", "{a[0]}", "{deep.__len__}", "{many.append}", "{many[9]}"]
)
def test_no_attribute_is_read(text):
    row = {"a": "text", "deep": {"text": "inner"}, "many": ["one"]}
    with pytest.raises(ValueError):
        written(parse_template(text), row, {})


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


def test_each_wording_writes_the_row(tmp_path):
    plain, thoughts = load("demonstrations", source_of(tmp_path, [ROW], wording_choice="each"))
    assert plain.prompt == "The fox is red. Does it follow that The fox is {green}?"
    assert (plain.completion, plain.meta) == ("no", {"wording": "plain", "answer": "no"})
    assert texts(thoughts)[0] == ("system", "Think first.")
    assert thoughts.completion == "It says red. So: false."
    assert (thoughts.meta["answer"], thoughts.extra["answer"]) == ("false", "false")
    assert plain.row_text == thoughts.row_text == "The fox is {green}\nThe fox is red."


def test_one_wording_a_row_by_weight_and_stable(tmp_path):
    first = load("demonstrations", source_of(tmp_path, rows_of(400)))
    counts = Counter(record.meta["wording"] for record in first)
    assert 260 < counts["thoughts"] < 340  # 3 of 4, within five standard deviations
    more = [ROW | {"premise": "A new row."}, *rows_of(400, id="x")]
    again = load("demonstrations", source_of(tmp_path, more))
    assert [(r.prompt, r.completion) for r in again[1:]] == [(r.prompt, r.completion) for r in first]
    other = load("demonstrations", source_of(tmp_path, rows_of(400), "seed: 1\nwordings:\n" + indented(NLI)))
    assert [r.meta["wording"] for r in other] != [r.meta["wording"] for r in first]


def indented(text):
    """Return text as the value of a key."""
    return "".join(f"  {line}\n" for line in text.splitlines())


def test_a_further_wording_moves_rows_only_to_itself(tmp_path):
    before = [r.meta["wording"] for r in load("demonstrations", source_of(tmp_path, rows_of(200)))]
    more = NLI + '- {name: third, prompt: "{premise} / {hypothesis}", response: "{label}", labels: {0: a, 1: b}}\n'
    after = [r.meta["wording"] for r in load("demonstrations", source_of(tmp_path, rows_of(200), more))]
    moved = {new for old, new in zip(before, after, strict=True) if old != new}
    assert moved == {"third"}


def test_labels_match_texts_numbers_and_floats_and_null_leaves_out(tmp_path):
    values = [0, "1", 1.0, -1]
    rows = [ROW | {"premise": f"{i}", "label": value} for i, value in enumerate(values)]
    only = NLI.split("- name: thoughts")[0]
    loaded = read("demonstrations", source_of(tmp_path, rows, only))
    assert [record.completion for record in loaded.records] == ["no", "yes", "yes"]
    assert loaded.left_out == {"labels has null for its value": 1} and loaded.wordings == {"plain": 4}


def test_labels_of_another_key(tmp_path):
    text = '- {prompt: "{q}", response: "{verdict}", labels: {verdict: {true: right, false: wrong}}}'
    rows = [{"q": "1 + 1 = 2?", "verdict": True}, {"q": "1 + 1 = 3?", "verdict": False}]
    assert [r.completion for r in load("demonstrations", source_of(tmp_path, rows, text))] == ["right", "wrong"]


@pytest.mark.parametrize("kind", ["demonstrations", "prompts"])
@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"hypothesis": "h", "label": 0, "rationale": "r"}, "'premise' is missing or null"),
        ({"premise": None, "hypothesis": "h", "label": 0, "rationale": "r"}, "'premise' is missing or null"),
        ({"premise": ["p"], "hypothesis": "h", "label": 0, "rationale": "r"}, "'premise' is a list"),
        ({"premise": "p", "hypothesis": "h", "label": 7, "rationale": "r"}, "'label' is 7"),
        ("text", "wordings need an object"),
    ],
)
def test_a_bad_row_is_an_error_with_its_line(tmp_path, kind, row, says):
    loaded = read(kind, source_of(tmp_path, [ROW, row]))
    (line,) = loaded.errors
    assert line.startswith(f"{tmp_path}/rows.jsonl:2: ") and says in line


def test_a_missing_key_is_found_whichever_wording_is_chosen(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "rationale"} for row in rows_of(5)]
    loaded = read("demonstrations", source_of(tmp_path, rows))
    assert len(loaded.errors) == 5 and all("'rationale' is missing" in line for line in loaded.errors)


def test_prompts_keep_the_row_and_the_answer_for_scorers(tmp_path):
    (prompt,) = load("prompts", source_of(tmp_path, [ROW]))
    assert prompt.row()["answer"] in ("no", "false") and prompt.row()["premise"] == ROW["premise"]
    unlabelled = {"premise": "p", "hypothesis": "h"}
    (prompt,) = load("evaluation_prompts", source_of(tmp_path, [unlabelled]))
    assert "answer" not in prompt.row()


def test_demonstrations_need_a_response(tmp_path):
    loaded = read("demonstrations", source_of(tmp_path, [ROW], '- {prompt: "{premise}"}'))
    assert "no response to teach" in loaded.errors[0]
    assert load("prompts", source_of(tmp_path, [ROW], '- {prompt: "{premise}"}'))[0].prompt == ROW["premise"]


def test_other_kinds_and_shots_without_wordings_are_refused(tmp_path):
    assert "no rankings" in read("rankings", source_of(tmp_path, [ROW])).errors[0]
    source = source_of(tmp_path, [{"prompt": "p", "completion": "c"}])
    bare = Source(path=source.path, shots=2)
    assert "shots needs wordings" in read("demonstrations", bare).errors[0]


def test_what_is_converted_reads_back_with_its_group(tmp_path):
    from data.records import write_jsonl

    found = load("demonstrations", source_of(tmp_path, rows_of(3), wording_choice="each"))
    write_jsonl(tmp_path / "out.jsonl", found)
    again = load("demonstrations", Source(path=str(tmp_path / "out.jsonl")))
    assert again == found and [r.row_text for r in again] == [r.row_text for r in found]


# ── the file of wordings ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("", "", "no list of wordings"),
        ("wordings: []", ":1", "no list of wordings"),
        ("- prompt: '{a}'\n  respones: '{b}'", ":2", "unknown key 'respones'"),
        ("- prompt: '{a}'\n  prompt: '{b}'", ":2", "written twice"),
        ("- response: '{b}'", ":1", "no prompt"),
        ("- prompt: 'same for all'", ":1", "no {field}"),
        ("- prompt: {a}", ":1", "in quotes"),
        ("- prompt: '{a}'\n  response: '{b} {c}'", ":1", "several fields"),
        ("- prompt: '{a}'\n  answer: '{b}'", ":1", "without a response"),
        ("- prompt: '{a.}'", ":1", "names no key"),
        ("- prompt: '{a}'\n  weight: 0", ":1", "weight is '0'"),
        ("- prompt: '{a}'\n  labels: [no, yes]", ":1", "labels is no mapping"),
        ("- {name: x, prompt: '{a}'}\n- {name: x, prompt: '{b}'}", ":1", "2 wordings are called 'x'"),
        ("- prompt: '{a}", ":1", "cannot be parsed"),
    ],
)
def test_mistakes_in_the_file_name_their_line(tmp_path, text, place, says):
    file = tmp_path / "wordings.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_wordings(file)
    assert error.value.lines[0].startswith(f"{file}{place}: ") and says in error.value.lines[0]


def test_a_file_that_was_edited_in_between_is_refused(tmp_path):
    source = source_of(tmp_path, [ROW], wordings_sha256="0" * 64)
    loaded = Loaded()
    assert not list(records("demonstrations", source, loaded)) and "was edited" in loaded.errors[0]


# ── rows that are shown before a prompt ──────────────────────────────────────────────────────────


def test_shots_are_other_rows_in_the_same_wording(tmp_path):
    shown = load("demonstrations", source_of(tmp_path, rows_of(60), shots=3))
    plain = {r.row_text: r for r in load("demonstrations", source_of(tmp_path, rows_of(60), wording_choice="each"))}
    for record in shown:
        roles = [role for role, _ in texts(record) if role != "system"]
        assert roles == ["user", "assistant"] * 3 + ["user"] and record.learnt == ()
        questions = [content for role, content in texts(record) if role == "user"]
        assert len(set(questions)) == 4
        wording = record.meta["wording"]
        assert all(question.startswith("Is it so?") == (wording == "thoughts") for question in questions)
        assert record.row_text in plain


def test_shots_stay_when_rows_are_added_or_reordered(tmp_path):
    first = {r.row_text: r.prompt for r in load("demonstrations", source_of(tmp_path, rows_of(100), shots=2))}
    more = [ROW | {"premise": "One more."}, *reversed(rows_of(100))]
    again = {r.row_text: r.prompt for r in load("demonstrations", source_of(tmp_path, more, shots=2))}
    assert sum(again[text] != prompt for text, prompt in first.items()) <= 10


@pytest.mark.parametrize("count", [8, 60])
@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_no_held_out_row_is_shown(tmp_path, count, fraction):
    from data.streams import held_out
    from data.turns import split_key

    shown = load("demonstrations", source_of(tmp_path, rows_of(count), shots=1, wording_choice="each"))
    _, held = held_out([split_key(record) for record in shown], fraction)
    premises = {shown[i].extra["premise"] for i in held}
    assert len(held) >= 2 and len(held) % 2 == 0  # both wordings of a row are on one side
    for record in shown:
        before = " ".join(content for role, content in texts(record)[:-1] if role == "user")
        assert not any(f"{premise} " in before for premise in premises)


def test_shots_as_text_of_another_file(tmp_path):
    source_of(tmp_path, rows_of(30), name="train.jsonl")
    pool = str(tmp_path / "train.jsonl")
    asked = [ROW | {"premise": "Owl 1 is red."}, {"premise": "Owl 2 is red.", "hypothesis": "h"}]
    settings = {"shots": 2, "shots_from": pool, "shots_as": "text"}
    prompts = load("evaluation_prompts", source_of(tmp_path, asked, **settings))
    for prompt in prompts:
        *shown, last = texts(prompt)[-1][1].split("\n\n")
        assert len(shown) == 2 and all("Fox" in block and "\n" in block for block in shown) and "Owl" in last
    assert "shots_from" in read("prompts", source_of(tmp_path, asked, shots=2)).errors[0]


def test_too_few_rows_to_show(tmp_path):
    loaded = read("demonstrations", source_of(tmp_path, rows_of(3), shots=3))
    assert loaded.errors and "shots: 3 are asked for" in loaded.errors[0]


def test_limit_takes_shots_from_its_own_records(tmp_path):
    rows = [*rows_of(30), *(ROW | {"premise": f"Owl {i} is red."} for i in range(30))]
    shown = load("demonstrations", source_of(tmp_path, rows, shots=2, limit=30))
    assert len(shown) == 30 and not any("Owl" in content for record in shown for _, content in texts(record))
    assert len({prompt_key(record.prompt) for record in shown}) == 30
