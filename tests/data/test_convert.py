"""Test `rlhf data convert`: what it writes reads back as equal records."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.check.config import Input
from data.records import Demonstration, Document, Prompt, Ranking, as_messages, prompt_key, to_json, write_jsonl
from data.source import Source
from data.sources import load
from data.tools import convert
from pipeline import cli
from pipeline.errors import UserError

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(str.strip)
ABOUT = {
    "user_id": st.none() | st.sampled_from(["u1", "u2"]),
    "kind": st.none() | st.sampled_from(["plain", "few-shot"]),
    "meta": st.none() | st.dictionaries(TEXT, st.integers() | TEXT, min_size=1, max_size=2),
}


@st.composite
def prompts(draw):
    if draw(st.booleans()):
        return draw(TEXT)
    turns = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(TEXT)}]
    return (*turns, {"role": "user", "content": draw(TEXT)})


@st.composite
def demonstrations(draw):
    prompt = draw(prompts())
    answers = [i for i, message in enumerate(as_messages(prompt)) if message["role"] == "assistant"]
    learnt = tuple(i for i in answers if draw(st.booleans()))
    return Demonstration(prompt, draw(TEXT), learnt, **{key: draw(value) for key, value in ABOUT.items()})


@st.composite
def rankings(draw):
    count = draw(st.integers(2, 5))
    about = {key: draw(value) for key, value in ABOUT.items()}
    scores = tuple(draw(st.lists(st.integers(0, 3).map(float), min_size=count, max_size=count)))
    given_scores = draw(st.booleans())
    ranks = tuple(1 + sum(other > score for other in scores) for score in scores)
    if not given_scores and draw(st.booleans()):
        ranks = (1, *(None for _ in ranks[1:]))
    return Ranking(
        id=draw(st.uuids().map(str)),
        prompt=draw(prompts()),
        responses=tuple(draw(st.lists(st.just("") | TEXT, min_size=count, max_size=count, unique=True))),
        ranks=ranks,
        labeler=draw(st.none() | st.sampled_from(["ada", "ben"])),
        margin=draw(st.none() | st.just(0.5)),
        finished=draw(st.none() | st.tuples(*[st.booleans()] * count)),
        scores=scores if given_scores else None,
        **about,
    )


USABLE = Ranking("usable", "p", ("a", "b"), (1, 2))
KINDS = {
    "demonstrations": demonstrations(),
    "rankings": rankings(),
    "documents": st.builds(Document, TEXT, **ABOUT),
    "prompts": st.builds(Prompt, prompts(), **ABOUT),
}


def run(paths, to, output, kind=None, **reading):
    inputs = [Input(Source(path, **reading), tuple(reading)) for path in paths]
    return convert.run(inputs, kind, to, output, None)


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_our_records_read_back_as_they_were(tmp_path, kind, data):
    """Write, convert and read records of every kind with all their fields."""
    records = data.draw(st.lists(KINDS[kind], min_size=1, max_size=4))
    if kind == "rankings":
        records = [USABLE, *{record.id: record for record in records}.values()]
    if kind == "prompts":
        records = list({prompt_key(record.prompt): record for record in records}.values())
    path, output = tmp_path / f"{kind}.jsonl", tmp_path / "out.jsonl"
    write_jsonl(path, records)
    assert run([path], kind, output) == 0
    assert [json.loads(line) for line in output.open(encoding="utf-8")] == [
        json.loads(json.dumps(to_json(record))) for record in records
    ]
    assert load(kind, Source(output)) == load(kind, Source(path)) == records


def test_the_best_responses_become_demonstrations(tmp_path, capsys):
    def ranked(prompt, responses, ranks, **more):
        return {"prompt": prompt, "responses": responses, "ranks": ranks, "user_id": "u", "kind": "plain", **more}

    path = written(
        tmp_path / "rows.jsonl",
        ranked("a", ["x", "y", "z"], [1, 1, 3], labeler="ada"),
        ranked("a", ["x", "y", "z"], [1, 2, 3], labeler="ben"),
        ranked("b", ["x", "y"], [2, 2]) | {"ranks": [1, 1]},
        ranked("c", ["", "y"], [1, 2]),
        ranked("d", ["x", "y"], [1, 2], finished=[False, True]),
        ranked("e", ["x", "y", "z"], [None, 1, 2]),
    )
    assert run([path], "demonstrations", tmp_path / "out.jsonl") == 0
    found = load("demonstrations", Source(tmp_path / "out.jsonl"))
    assert [(one.prompt, one.completion) for one in found] == [("a", "x"), ("a", "y"), ("e", "y")]
    assert {(one.user_id, one.kind) for one in found} == {("u", "plain")}
    out = capsys.readouterr().out
    for line in (
        "left out  7: responses that are not the best ones",
        "left out  1: best responses that came before, after the same prompt",
        "left out  1: no response of the ranking is better than another",
        "left out  1: best responses that are blank",
        "left out  1: best responses that were cut off",
        "out.jsonl: 3 demonstrations",
    ):
        assert line in out, line


def test_prompts_of_several_files_are_written_once(tmp_path, capsys):
    one = written(tmp_path / "one.jsonl", {"prompt": "a", "completion": "x"}, {"prompt": "b", "completion": "x"})
    other = written(
        tmp_path / "other.jsonl",
        {"prompt": "b", "chosen": "x", "rejected": "y"},
        {"prompt": "c", "chosen": "x", "rejected": "y"},
    )
    assert run([one, other], "prompts", tmp_path / "out.jsonl") == 0
    assert [prompt.prompt for prompt in load("prompts", Source(tmp_path / "out.jsonl"))] == ["a", "b", "c"]
    assert "left out  1: the prompt came before" in capsys.readouterr().out


def test_ids_of_several_files_stay_apart(tmp_path):
    row = {"id": "7", "prompt": "a", "chosen": "x", "rejected": "y"}
    paths = [written(tmp_path / f"{n}.jsonl", row) for n in range(3)]
    assert run(paths, "rankings", tmp_path / "out.jsonl") == 0
    assert [one.id for one in load("rankings", Source(tmp_path / "out.jsonl"))] == ["7", "7-2", "7-3"]


def test_how_rows_are_read_is_said_on_the_command_line(tmp_path, capsys):
    rows = [{"question": f"q {n}", "answer": "a", "lang": "en" if n % 2 else "de"} for n in range(6)]
    path, out = str(written(tmp_path / "rows.jsonl", *rows)), tmp_path / "out.jsonl"
    command = ["data", "convert", path, "--to", "demonstrations", "-o", str(out)]
    ways = (
        ["columns.prompt=question", "columns.completion=answer", "where.lang=en", "limit=2"],
        ["--columns", "prompt=question,completion=answer", "--where=lang=en", "--limit", "2", "--force"],
    )
    for words in ways:
        assert cli.main(command + words) == 0, capsys.readouterr().err
        assert [one.prompt for one in load("demonstrations", Source(out))] == ["q 1", "q 3"]
    scored = written(tmp_path / "scored.jsonl", {"prompt": "p", "responses": ["x", "y", "z"], "scores": [1, 1.2, 3]})
    command = ["data", "convert", str(scored), "--to", "rankings", "-o", str(out), "--force"]
    assert cli.main([*command, "--tie-within", "0.25"]) == 0
    assert load("rankings", Source(out))[0].ranks == (2, 2, 1)
    assert cli.main([*command, "tie_within=much"]) == 2
    assert "tie_within" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "rows, to, problem",
    [
        ([{"prompt": "p", "completion": ""}], "demonstrations", "rows.jsonl:1: 'completion' is blank"),
        (
            [{"prompt": "p", "completion": "c"}],
            "rankings",
            "demonstrations hold no rankings; these are made of rankings",
        ),
        ([{"text": "t"}], "prompts", "documents hold no prompts"),
        ([{"prompt": "p", "chosen": "x", "rejected": "x"}], "rankings", "no usable pair"),
        (
            [{"prompt": "p", "responses": ["x", "y"], "ranks": [1, 1]}],
            "demonstrations",
            "no demonstrations (1 left out: ",
        ),
        ([{"nothing": 1}], "prompts", "no known kind of row"),
    ],
)
def test_nothing_is_written_where_something_is_wrong(tmp_path, rows, to, problem):
    path = written(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(UserError) as caught:
        run([path], to, tmp_path / "out.jsonl")
    assert problem in "\n".join(caught.value.lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_file_is_replaced_only_with_force(tmp_path, capsys):
    path = written(tmp_path / "rows.jsonl", {"prompt": "p", "completion": "c"})
    command = ["data", "convert", str(path), "--to", "prompts", "-o"]
    assert cli.main([*command, str(path)]) == 2 and "exists; give another name" in capsys.readouterr().err
    assert cli.main([*command, str(path), "--force"]) == 0 and load("prompts", Source(path)) == [Prompt("p")]
    assert (
        cli.main([*command, str(tmp_path / "no" / "out.jsonl")]) == 2
        and "there is no folder" in capsys.readouterr().err
    )
    assert cli.main([*command, str(tmp_path / "out.json")]) == 2 and "ends in .jsonl" in capsys.readouterr().err
    assert cli.main(["data", "convert", str(Path("none.jsonl")), "--to", "prompts", "-o", "x.jsonl"]) == 2
