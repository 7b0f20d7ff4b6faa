"""Test what `rlhf data` says of rows in wordings: counts, leaks, near copies and refusals."""

import io

import pytest

from data.check.inspect_file import check
from data.check.report import Limits, OtherData
from data.tools import preview
from data.tools.inputs import Opened
from data.tools.marked import Printer
from pipeline import cli
from tests.data.tasks.test_wordings import ROW, rows_of, source_of

TWO = """\
- {name: one, prompt: "Read and tell whether it follows: {premise} {hypothesis}", response: "{label}"}
- {name: two, prompt: "{hypothesis} Is that right, given that {premise}", response: "{label}"}
"""


def facts(report):
    """Return the report's facts as one text."""
    return "\n".join(report.lines())


def test_a_row_in_another_wording_is_a_leak(tmp_path):
    train = source_of(tmp_path, rows_of(20), TWO, name="train.jsonl", wording_choice="each", shots=2)
    more = {"shots": 1, "shots_from": train.path, "wording_choice": "each"}
    asked = source_of(tmp_path, [*rows_of(2), ROW | {"premise": "A hen sat on the old wall."}], TWO, **more)
    report = check(asked, "evaluation_prompts", Limits(), [OtherData("demonstrations", train)])
    leaks = [line for line in report.errors if "a leak" in line]
    assert len(leaks) == 4 and all("rows.jsonl:1:" in line or "rows.jsonl:2:" in line for line in leaks)
    assert "4 of 6 prompts" in facts(report)


def test_near_copies_are_of_what_rows_say(tmp_path):
    """What is compared is the row: a wording and the rows that are shown count for nothing."""
    told = "the quick brown fox jumps over the lazy dog while nobody in the whole village looks"
    near = f"{told} up"
    rows = [{"premise": told, "hypothesis": "h", "label": "x"}]
    train = source_of(tmp_path, rows, TWO, name="train.jsonl")
    other = {"premise": "Hens lay eggs.", "hypothesis": "Eggs are blue.", "label": "x"}
    asked = source_of(tmp_path, [{"premise": near, "hypothesis": "h", "label": "x"}, other], TWO)
    report = check(asked, "evaluation_prompts", Limits(), [OtherData("demonstrations", train)])
    assert "1 of 2 prompts are near copies" in facts(report) and not report.errors


def test_wordings_are_counted_and_the_kind_is_known(tmp_path):
    report = check(source_of(tmp_path, rows_of(6), TWO, name="task.jsonl", wording_choice="each"))
    assert report.kind == "demonstrations" and not report.errors
    assert "one: 6 rows" in facts(report) and "two: 6 rows" in facts(report)
    assert check(source_of(tmp_path, rows_of(2), '- {prompt: "{premise}"}', name="task.jsonl")).kind == "prompts"


def test_the_preview_names_wording_and_answer(tmp_path):
    out = io.StringIO()
    source = source_of(tmp_path, rows_of(1), TWO.splitlines()[0])
    preview.show(Opened(source, "demonstrations"), Limits(), preview.Choice(), Printer(out))
    assert "rows.jsonl:1 · demonstration, wording one, answer 0" in out.getvalue()


def test_the_command_line_takes_wordings(tmp_path, capsys):
    source = source_of(tmp_path, rows_of(40), TWO, name="task.jsonl")
    words = [f"wordings={source.wordings}", "wording_choice=each", "--shots", "2"]
    assert cli.main(["data", "check", source.path, *words]) == 0
    assert "one: 40 rows" in capsys.readouterr().out
    source_of(tmp_path, [*rows_of(1), {"premise": "p"}], TWO, name="task.jsonl")
    assert cli.main(["data", "check", source.path, *words[:1]]) == 2
    assert "task.jsonl:2: the key 'hypothesis' is missing" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["input", "protected"])
def test_prepare_refuses_wordings(tmp_path, capsys, given):
    source = source_of(tmp_path, rows_of(4), TWO, name="task.jsonl")
    config = tmp_path / "c.yaml"
    config.write_text(f"name: x\ndata: {{evaluation_prompts: {{path: {source.path}, wordings: {source.wordings}}}}}\n")
    (tmp_path / "log.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    words = [source.path, f"wordings={source.wordings}", "--kind", "demonstrations"]
    if given == "protected":
        words = [str(tmp_path / "log.jsonl"), "-c", str(config)]
    assert cli.main(["data", "prepare", *words, "-o", str(tmp_path / "out"), "--pii", "off"]) == 2
    assert "wordings would be split" in capsys.readouterr().err
