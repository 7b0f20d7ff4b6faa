"""Run the examples of data/README.md: every row loads as its kind, and the Python block runs."""

import json
import re
from pathlib import Path

import pytest

from data.forms import FORMS, is_of
from data.source import Source
from data.sources import load

README = Path(__file__).parents[2] / "data" / "README.md"
BLOCKS = re.findall(r"^```(\S+) ?(\S*)\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
ROWS = [(kind, line) for language, kind, text in BLOCKS if language == "jsonl" for line in text.splitlines()]


@pytest.mark.parametrize("kind, line", ROWS)
def test_every_example_row_loads_as_its_kind(tmp_path, kind, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    assert len(load(kind, Source(path))) == 1


def test_every_form_of_our_own_has_an_example_row():
    for kind, forms in FORMS.items():
        if kind == "evaluation_prompts":
            continue
        rows = [json.loads(line) for name, line in ROWS if name == kind]
        taken = {next(form for form in forms if is_of(form, row)) for row in rows if isinstance(row, dict)}
        missing = [str(form) for form in forms if form not in taken and not form.name]
        assert missing in ([], ["{conversations, system?}"]), kind  # as prompts: like messages


def test_the_python_example_runs(capsys):
    [code] = [text for language, _, text in BLOCKS if language == "python"]
    exec(code, {})
    assert "'harmless'" in capsys.readouterr().out
