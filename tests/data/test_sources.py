"""Test sources: each form, the errors of malformed rows, each file format, real files."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from data import sources
from data.forms import FORMS
from data.records import Demonstration, Document, Prompt, Ranking
from data.source import Source
from data.sources import read
from pipeline.errors import UserError

REAL = Path(__file__).parents[3] / "shared" / "data"  # data sets that lie beside the repository


DEMO, RANK = "demonstrations", "rankings"


def load(kind, path=None, **fields):
    return sources.load(kind, Source(path, **fields))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def written(tmp_path, *rows, name="rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(tmp_path, kind, row):
    [record] = load(kind, written(tmp_path, row))
    return record


def error_of(tmp_path, kind, *rows) -> str:
    """Return the one error line of these rows, without the file."""
    path = written(tmp_path, *rows)
    with pytest.raises(UserError) as caught:
        load(kind, path)
    [line] = caught.value.lines
    assert line.startswith(str(path)) and "; " in line
    return line.removeprefix(f"{path}:")


# ── forms ────────────────────────────────────────────────────────────────────────────────────────

DIALOGUE = (user("a"), assistant("b"), user("c"))
SHARED = list(DIALOGUE)
ASKED = [human("a"), gpt("b"), human("c")]
BRIEFED = (system("s"), user("a"))


@pytest.mark.parametrize(
    "row, prompt, completion",
    [
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"prompt": "p", "completion": "c", "id": 4, "meta": {}}, "p", "c"),
        ({"prompt": SHARED, "completion": "d"}, DIALOGUE, "d"),
        ({"prompt": SHARED, "completion": [assistant("d")]}, DIALOGUE, "d"),
        ({"prompt": "p", "completion": "c", "system": "s"}, (system("s"), user("p")), "c"),
        ({"messages": [user("a"), assistant("b")]}, (user("a"),), "b"),
        ({"messages": [system("s"), *SHARED, assistant("d")]}, (system("s"), *DIALOGUE), "d"),
        ({"messages": [system(""), *SHARED, assistant("d"), user("thanks")]}, DIALOGUE, "d"),
        ({"messages": [user("a"), assistant("b")], "prompt": "a", "prompt_id": "7"}, (user("a"),), "b"),
        ({"messages": [{**user("a"), "name": None}, assistant("b")]}, (user("a"),), "b"),
        ({"instruction": "i", "input": "", "output": "o"}, "i", "o"),
        ({"instruction": "i", "output": "o"}, "i", "o"),
        ({"instruction": "i", "input": "n", "output": "o"}, "i\nn", "o"),
        ({"instruction": "i", "input": None, "output": "o", "system": "", "history": []}, "i", "o"),
        ({"instruction": "i", "output": "o", "system": "s"}, (system("s"), user("i")), "o"),
        ({"instruction": "c", "output": "o", "history": [["a", "b"]]}, DIALOGUE, "o"),
        (
            {"instruction": "c", "input": "n", "output": "o", "history": [["a", "b"]], "system": "s"},
            (system("s"), user("a"), assistant("b"), user("c\nn")),
            "o",
        ),
        ({"conversations": [*ASKED, gpt("d")]}, DIALOGUE, "d"),
        ({"conversations": [human("a"), gpt("b")], "system": "s", "tools": ""}, BRIEFED, "b"),
        ({"conversations": [{"from": "system", "value": "s"}, human("a"), gpt("b")]}, BRIEFED, "b"),
        ({"conversations": [user("a"), assistant("b")]}, (user("a"),), "b"),
    ],
)
def test_demonstrations(tmp_path, row, prompt, completion):
    answers = tuple(i for i, message in enumerate(prompt) if message in (assistant("b"), gpt("b")))
    learnt = () if "completion" in row else answers
    assert one(tmp_path, "demonstrations", row) == Demonstration(prompt, completion, learnt)


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": "p", "responses": ["x", "y"], "ranks": [1, 2]}, "p"),
        ({"prompt": SHARED, "responses": ["x", "y"], "ranks": [1, 2]}, DIALOGUE),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "score_chosen": 8.5}, "p"),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "system": "s"}, (system("s"), user("p"))),
        ({"prompt": SHARED, "chosen": [assistant("x")], "rejected": [assistant("y")]}, DIALOGUE),
        ({"prompt": "p", "chosen": [user("p"), assistant("x")], "rejected": [assistant("y")]}, "p"),
        ({"chosen": [*SHARED, assistant("x")], "rejected": [*SHARED, assistant("y")]}, DIALOGUE),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: x",
             "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: y"},
            DIALOGUE,
        ),
        ({"conversations": ASKED, "chosen": gpt("x"), "rejected": gpt("y")}, DIALOGUE),
        ({"conversations": [human("a")], "system": "s", "chosen": gpt("x"), "rejected": gpt("y")}, BRIEFED),
        ({"instruction": "i", "input": "n", "chosen": "x", "rejected": "y"}, "i\nn"),
    ],
)  # fmt: skip
def test_rankings(tmp_path, row, prompt):
    record = one(tmp_path, "rankings", row)
    assert (record.prompt, record.responses, record.ranks) == (prompt, ("x", "y"), (1, 2))
    assert len(record.id) == 16 and record.labeler is None


def test_rankings_keep_id_and_labeler_and_may_hold_a_blank_answer(tmp_path):
    row = {"id": "r1", "prompt": "p", "responses": ["x", "", "z"], "ranks": [1, None, 1], "labeler": "ada"}
    pair = {"id": 7, "prompt": "p", "chosen": "x", "rejected": [assistant("")], "labeler": "ben"}
    assert load("rankings", written(tmp_path, row, pair)) == [
        Ranking("r1", "p", ("x", "", "z"), (1, None, 1), "ada"),
        Ranking("7", "p", ("x", ""), (1, 2), "ben"),
    ]


def test_rankings_of_any_form_say_which_responses_were_cut_off(tmp_path):
    talk = [[user("p"), assistant(text)] for text in "xy"]
    forms = (
        {"prompt": "p", "responses": ["x", "y"], "ranks": [1, 2]},
        {"prompt": "p", "chosen": "x", "rejected": "y"},
        {"conversations": [human("p")], "chosen": gpt("x"), "rejected": gpt("y")},
        {"instruction": "p", "chosen": "x", "rejected": "y"},
        {"chosen": talk[0], "rejected": talk[1]},
    )
    for form in forms:
        assert one(tmp_path, RANK, form | {"finished": [True, False]}).answers == (("x", True), ("y", False))
        assert one(tmp_path, RANK, form | {"finished": None}).finished is None
        assert error_of(tmp_path, RANK, form, form | {"finished": [True]}).startswith(
            "2: 2 responses, 1 in 'finished'; "
        )


@pytest.mark.parametrize(
    "row, prompt",
    [
        ("p", "p"),
        ({"prompt": "p"}, "p"),
        ({"prompt": SHARED, "topic": "any column"}, DIALOGUE),
        ({"prompt": "p", "completion": None}, "p"),
        ({"prompt": "p", "responses": ["x"], "ranks": []}, "p"),
        ({"prompt": "p", "chosen": "x", "rejected": "y"}, "p"),
        ({"messages": SHARED}, DIALOGUE),
        ({"messages": [*SHARED, assistant("d")]}, DIALOGUE),
        ({"conversations": [*ASKED, gpt("d")]}, DIALOGUE),
        ({"conversations": [human("a")], "chosen": gpt("x"), "rejected": gpt("y")}, (user("a"),)),
        ({"chosen": [*SHARED, assistant("x")], "rejected": [*SHARED, assistant("y")]}, DIALOGUE),
        ({"instruction": "i", "input": "n", "output": ""}, "i\nn"),
    ],
)
@pytest.mark.parametrize("kind", ["prompts", "evaluation_prompts"])
def test_prompts_are_taken_from_any_row(tmp_path, kind, row, prompt):
    assert one(tmp_path, kind, row) == Prompt(prompt)


def test_repeated_prompts_are_left_out_and_counted(tmp_path):
    path = written(tmp_path, "a", "b", {"prompt": " a\n"}, {"messages": [user("a")]}, "c")
    loaded = read("prompts", Source(path))
    assert [p.prompt for p in loaded.records] == ["a", "b", "c"] and loaded.duplicates == 2
    assert loaded.locations == [f"{path}:1", f"{path}:2", f"{path}:5"]
    assert [p.prompt for p in load("prompts", path, limit=3)] == ["a", "b", "c"]


def test_repeated_prompts_with_another_answer_are_counted_apart(tmp_path):
    """A scorer would judge by the first answer alone."""
    row = {"prompt": "a", "answer": "1", "id": 1}
    path = written(tmp_path, row, row | {"id": 2}, row | {"answer": "2"}, "a", {"prompt": "b", "answer": "2"})
    loaded = read("prompts", Source(path))
    assert (len(loaded.records), loaded.duplicates, loaded.differing) == (2, 3, 1)
    assert [p.row()["answer"] for p in loaded.records] == ["1", "2"]


def test_documents(tmp_path):
    path = written(tmp_path, {"text": "a", "url": "u", "timestamp": 1, "meta": {"k": [1]}}, "b")
    assert load("documents", path) == [Document("a", meta={"k": [1]}), Document("b")]


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind, row, words",
    [
        (DEMO, {"prompt": "p"}, "'completion' is missing"),
        (DEMO, {"prompt": "p", "completoin": "c"}, "'completion' is missing (is it 'completoin'?)"),
        (DEMO, {"prompt": "p", "completion": "c", "sytem": "s"}, "'sytem'; did you mean 'system'?"),
        (DEMO, {"prompt": "p", "completion": "c", "sytem": "x"}, "unknown key 'sytem'; did you mean 'system'?"),
        (DEMO, {"prompt": "p", "completion": "c", "tools": [1]}, "the key 'tools' changes what"),
        (DEMO, {"prompt": "p", "completion": None}, "'completion' is missing"),
        (DEMO, {"prompt": "p", "completion": [user("x")]}, "'completion' adds user to the prompt"),
        (DEMO, {"instruction": "i", "output": ""}, "'output' is blank"),
        (DEMO, {"instruction": "i", "output": "o", "input": 5}, "'input' is 5"),
        (DEMO, {"instruction": "i", "output": "o", "history": [["a"]]}, "a turn of 'history'"),
        (DEMO, {"instruction": "i", "output": "o", "system": 5}, "'system' is 5"),
        (DEMO, {"messages": [user("a")]}, "no message of the assistant"),
        (DEMO, {"messages": [assistant("a")]}, "no message of the assistant answers"),
        (DEMO, {"messages": [user("a"), assistant("b"), assistant("c")]}, "both the assistant's"),
        (DEMO, {"messages": {}}, "the messages are an object"),
        (DEMO, {"messages": [user("a"), {"role": "tool", "content": "x"}]}, "of the role 'tool'"),
        (DEMO, {"messages": [user("a"), assistant(" ")]}, "content of message 2 is blank"),
        (DEMO, {"conversations": [human("a"), {"from": "function_call", "value": "x"}]}, "'function_call'"),
        (DEMO, {"conversations": [human("a"), {"from": "gpt"}]}, "content of message 2 is null"),
        (DEMO, "text", "the row is 'text'"),
        (DEMO, [user("a")], "the row is a list"),
        ("documents", {"texts": "a"}, "'text' is missing (is it 'texts'?)"),
        ("documents", 5, "the row is 5"),
        ("prompts", {"text": "a"}, "the row is one of documents"),
        ("prompts", {"messages": [assistant("a")]}, "no message of the user"),
        (RANK, {"prompt": "p", "responses": ["x"], "ranks": [1]}, "at least 2 responses, not 1"),
        (RANK, {"prompt": "p", "responses": ["x", "y"]}, "'ranks' is missing"),
        (RANK, {"prompt": "p", "responses": ["x", "y"], "ranks": [1, 2], "labeller": "a"}, "mean 'labeler'"),
        (RANK, {"prompt": "p", "chosen": "x"}, "'rejected' is missing"),
        (RANK, {"prompt": "p", "chosen": "x", "rejected": 5}, "'rejected' is 5"),
        (RANK, {"prompt": "5", "chosen": [user("6"), assistant("x")], "rejected": "y"}, "adds user, assis"),
        (RANK, {"chosen": "x", "rejected": "y"}, "strings without a prompt"),
        (RANK, {"conversations": [*ASKED, gpt("d")], "chosen": gpt("x"), "rejected": gpt("y")}, "ends with"),
        (RANK, {"conversations": [human("a")], "chosen": human("x"), "rejected": gpt("y")}, "adds user"),
    ],
)
def test_a_malformed_row_gets_an_error_that_says_what_to_do(tmp_path, kind, row, words):
    good = {"documents": "a", "prompts": "a", "demonstrations": {"prompt": "p", "completion": "c"},
            "rankings": {"prompt": "p", "chosen": "x", "rejected": "y"}}[kind]  # fmt: skip
    line = error_of(tmp_path, kind, good, row)
    assert line.startswith("2: ") and words in line


def test_all_malformed_rows_are_reported_at_once(tmp_path):
    path = written(tmp_path, {"text": 1}, {"text": "a"}, {"txet": "b"})
    path.write_text(path.read_text() + '{"text": "cut of')
    with pytest.raises(UserError) as caught:
        load("documents", path)
    assert [line.removeprefix(f"{path}:")[:2] for line in caught.value.lines] == ["1:", "3:", "4:"]


def test_a_file_without_a_usable_pair_is_an_error(tmp_path):
    ties = {"prompt": "p", "responses": ["x", "y", "y"], "ranks": [1, 1, 2]}
    unjudged = {"prompt": "p", "responses": ["x", "y"], "ranks": [1, None]}
    same = {"prompt": "p", "chosen": "x", "rejected": "x"}
    line = error_of(tmp_path, "rankings", {**ties, "ranks": [1, 1, 1]}, unjudged, same)
    assert "not one usable pair (2 identical, 2 tie, 1 unjudged)" in line
    assert len(load("rankings", written(tmp_path, unjudged, same, ties))) == 3


def test_ids_are_unique_and_equal_rows_without_one_get_numbers(tmp_path):
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    line = error_of(tmp_path, "rankings", {**row, "id": "r"}, row, {**row, "id": "r"})
    assert line.startswith("3: the id 'r' is also used at") and "rows.jsonl:1;" in line
    first, second, third = load("rankings", written(tmp_path, row, row, row))
    assert [second.id, third.id] == [f"{first.id}-2", f"{first.id}-3"]


# ── files and the Hub ────────────────────────────────────────────────────────────────────────────

ROWS = [
    {"prompt": None, "messages": [user("a"), assistant("b")], "score": 0.5},
    {"prompt": "p", "messages": None, "score": None},
]


def test_an_array_and_lines_give_the_same(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}, {"messages": [user("a"), assistant("b")]}]
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows, indent=2))
    assert load("demonstrations", array) == load("demonstrations", written(tmp_path, *rows))
    array.write_text(json.dumps([rows[0], {"prompt": "p"}], indent=2))
    with pytest.raises(UserError, match=r"rows\.json:6: index 1: the key 'completion' is missing"):
        load("demonstrations", array)


def test_the_same_mistake_in_several_files_is_one_line(tmp_path):
    (tmp_path / "many").mkdir()
    for name in "abc":
        (tmp_path / "many" / f"{name}.jsonl").write_text('{"prompt": "p", "chosen": "c"}\n' * 2)
    with pytest.raises(UserError) as caught:
        load("rankings", tmp_path / "many")
    assert len(caught.value.lines) == 1
    line = caught.value.lines[0]
    assert line.startswith(f"{tmp_path}/many/a.jsonl:1: the key 'rejected' is missing")
    assert line.endswith(f"(the same in 5 more rows, the last at line 2 of {tmp_path}/many/c.jsonl)")
    assert "responses" not in line, "only the form that the rows were meant to be of is named"


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    rows = [{"prompt": "p", "completion": "c", "score": 1.0}, {"prompt": "q", "completion": "d"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert load("demonstrations", path) == [Demonstration("p", "c"), Demonstration("q", "d")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert load("prompts", path, limit=1) == [Prompt((user("a"),))]
    with pytest.raises(UserError, match="index 1: the key 'completion' is missing"):
        load("demonstrations", path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not readable as parquet"):
        load("prompts", path)
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(UserError, match="no rows"):
        load("documents", path)


def test_the_hub(monkeypatch):
    calls = []

    def load_dataset(*names, **options):
        calls.append((*names, options))
        if "nobody" in names[0]:
            raise RuntimeError("Dataset 'nobody/none' doesn't exist on the Hub.\nmore")
        return iter([{**row, "extra": 1} for row in ({"prompt": "a", "completion": "b"}, {"prompt": "c"})])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load("demonstrations", hub="org/name", limit=1) == [Demonstration("a", "b")]
    assert calls == [("org/name", None, {"split": "train", "streaming": True})]
    with pytest.raises(UserError, match=r"org/name test: index 1: the key 'completion' is missing"):
        load("demonstrations", hub="org/name", split="test", subset="small")
    assert calls[1] == ("org/name", "small", {"split": "test", "streaming": False})
    with pytest.raises(UserError) as caught:
        load("prompts", hub="nobody/none")
    assert "doesn't exist on the Hub; check name" in caught.value.lines[0] and len(caught.value.lines) == 1


def test_limit_takes_the_first(tmp_path):
    path = written(tmp_path, "a", "b", "c", {"text": 5})
    assert load("documents", path, limit=2) == [Document("a"), Document("b")]


def test_load_first_reads_and_judges_only_the_first_rows(tmp_path):
    """Check that first rows of only ties or repeated prompts are no error if more follow."""
    tie = {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}
    path = written(tmp_path, tie, tie, tie | {"ranks": [1, 2]}, {"prompt": "a"})
    assert len(sources.load_first("rankings", Source(path), 2)) == 2
    assert len(sources.load_first("rankings", Source(path, skip=1), 2)) == 2
    for skip, most in ((0, 5), (1, 3)):
        with pytest.raises(UserError, match="4: the key 'responses' is missing"):
            sources.load_first("rankings", Source(path, skip=skip), most)
    with pytest.raises(UserError, match="not one usable pair"):
        sources.load_first("rankings", Source(path, limit=2), 5)
    assert sources.load_first("prompts", Source(written(tmp_path, *["a"] * 5), skip=1), 2) == []


def test_keys_that_are_not_read_are_counted(tmp_path):
    row = {"messages": [user("a"), assistant("b")], "score": 1, "id": 5}
    loaded = read("demonstrations", Source(written(tmp_path, row, row, {"prompt": "p", "completion": "c"})))
    assert loaded.unread == {"score": 2} and sorted(loaded.forms.values()) == [1, 2]


@pytest.mark.parametrize(
    "kind, name, rows",
    [
        ("demonstrations", "sft_alpaca_en.json", 999),
        ("rankings", "preferences_en.json", 300),
        ("documents", "documents_c4_en.jsonl", 300),
        ("prompts", "sft_alpaca_en.json", 985),
        ("evaluation_prompts", "preferences_en.json", 295),
    ],
)
def test_the_real_files_load(kind, name, rows):
    if not (REAL / name).exists():
        pytest.skip(f"no {name} beside the repository")
    loaded = read(kind, Source(REAL / name))
    assert not loaded.errors and len(loaded.records) == rows and loaded.blanks == 0
    assert len(loaded.forms) == 1


def test_every_kind_has_its_forms():
    assert set(FORMS) == {"documents", "demonstrations", "rankings", "prompts", "evaluation_prompts"}


def test_load_placed_gives_the_location_of_each_record(tmp_path):
    path = written(tmp_path, *[{"prompt": text} for text in "aabc"])
    records, places = sources.load_placed("prompts", Source(path, skip=1))
    assert [p.prompt for p in records] == ["b", "c"] and places == [f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_a_file_that_was_edited_since_planning_is_refused(tmp_path, name):
    """Check this also where only the first rows are wanted, whatever the file holds now."""
    path = tmp_path / name
    rows = [{"text": text} for text in "abc"]
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith("json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load("documents", path, sha256=digest) == [Document(text) for text in "abc"]
    assert load("documents", path, limit=1, skip=1, sha256=digest) == [Document("b")]
    path.write_bytes(path.read_bytes() + b"\n")
    for limit in (None, 1):
        with pytest.raises(UserError) as caught:
            load("documents", path, limit=limit, sha256=digest)
        assert caught.value.lines == [f"{path}: was edited since this command inspected it; run again"]


def prepared(cache, name, commit, texts):
    """Prepare what `datasets` leaves in its cache after it has loaded a commit."""
    import datasets

    folder = cache / name.replace("/", "___") / "default" / "0.0.0" / commit
    source = cache / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    builder = datasets.load_dataset_builder("json", data_files=str(source), cache_dir=str(cache / "made"))
    builder.dataset_name = name.split("/")[1]
    builder.download_and_prepare(output_dir=str(folder))
    return folder


def test_the_named_commit_is_read(tmp_path, monkeypatch):
    """Check that offline the named commit is read from the cache, never a newer one."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    old, new, other = "a" * 40, "b" * 40, "c" * 40
    prepared(tmp_path, "org/set", old, ["old"])
    prepared(tmp_path, "org/set", new, ["new", "er"])
    assert load("documents", hub="org/set", revision=old) == [Document("old")]
    assert load("documents", hub="org/set", revision=new, limit=1) == [Document("new")]
    with pytest.raises(UserError, match=r"commit ccccccc is not on this machine .commits aaaaaaa, bbbbbbb are"):
        load("documents", hub="org/set", revision=other)
    with pytest.raises(UserError, match="org/none train: cannot be loaded: "):
        load("documents", hub="org/none", revision=other)


def test_the_commit_is_requested_from_the_hub(monkeypatch, tmp_path):
    import datasets

    calls = []
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    fake = lambda *args, **options: calls.append((args, options)) or [{"text": "a"}]  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load("documents", hub="org/set", revision="a" * 40) == [Document("a")]
    assert calls == [(("org/set", None), {"split": "train", "streaming": False, "revision": "a" * 40})]


@pytest.mark.parametrize("setting", [{"subset": "en"}, {"data_dir": "x"}, {"data_files": "*.json"}])
def test_a_setting_of_the_hub_is_refused_for_a_file(tmp_path, setting):
    path = written(tmp_path, {"prompt": "a"})
    [name] = setting
    [line] = read("prompts", Source(path, **setting)).errors
    assert f"{name} does nothing" in line


def test_a_split_that_a_folder_does_not_have_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    assert len(read("prompts", Source(tmp_path)).records) == 1
    [line] = read("prompts", Source(tmp_path, split="test")).errors
    assert "no files of the split test, only of train" in line


def test_rows_that_where_leaves_out_are_counted_where_none_is_left(tmp_path):
    path = written(tmp_path, {"prompt": "a", "lang": "en"})
    [line] = read("prompts", Source(path, where={"lang": "fr"})).errors
    assert line == f"{path}: no row has what where asks for (lang: fr); correct where"
