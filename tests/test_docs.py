"""Check the prose: links lead somewhere, the README is short, and what the pages show runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = {".venv", ".vllm", ".versions", "artifacts", "node_modules", ".pytest_cache"}
PAGES = sorted(path for path in ROOT.rglob("*.md") if not NOT_OURS & set(path.relative_to(ROOT).parts))
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"^(?:\.venv/bin/)?rlhf (\w+)", re.MULTILINE)
TARGET = re.compile(r"^make ([a-z-]+)", re.MULTILINE)


def name_of(path: Path) -> str:
    """Return a page's path from the root, for the ids of tests."""
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file(page):
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if "://" not in link and not (page.parent / link).exists()]
    assert not missing, f"{name_of(page)} links to {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_shown_command_exists(page):
    """Each `make TARGET` in a block is a target of the Makefile, each `rlhf COMMAND` a command."""
    from pipeline import commands

    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert not [name for name in TARGET.findall(blocks) if not re.search(rf"^{name}:", makefile, re.MULTILINE)]
    assert not [name for name in COMMAND.findall(blocks) if name not in commands.COMMANDS]


def test_the_readme_has_at_most_1500_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


def shown_code(page: Path) -> dict[str, str]:
    """Return {heading: code} of a page, with the Python blocks of each section joined."""
    sections = re.split(r"^### ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    blocks = {
        text.splitlines()[0]: re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for text in sections
    }
    return {heading: "\n".join(parts) for heading, parts in blocks.items() if parts}


SHOWN = shown_code(ROOT / "CONTRIBUTING.md")


@pytest.mark.parametrize("heading", SHOWN)
def test_what_contributing_shows_runs(heading, tmp_path):
    """Each section runs in a new process and an empty folder, as for a reader who pastes it."""
    done = subprocess.run(
        [sys.executable, "-c", SHOWN[heading]],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


DECLARATION = '''
from pathlib import Path

from pipeline.config.section import Section, setting
from pipeline.stage import Stage


class CountSettings(Section):
    """Choose which words are counted."""

    words: str = setting("a b c", "words, with spaces between them")


def run(ctx):
    """Run the stage."""
    from stages.count import run as run_stage

    return run_stage(ctx)


STAGE = Stage(name="count", summary="Count words.", settings=CountSettings, run=run, needs=lambda experiment: [])
'''


def edit(path: Path, *changes: tuple[str, str]) -> None:
    """Replace each text, which the file must have, by another."""
    text = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, f"{path}: {old}"
        text = text.replace(old, new, 1)
    path.write_text(text, encoding="utf-8")


def test_the_steps_for_a_stage_make_its_command_run(tmp_path):
    """A copy of the project in which the steps in "A stage" are done runs `rlhf run count`."""
    steps = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("so that `rlhf run count`")[2]
    for place in ("settings/count.py", "settings/experiment.py", "pipeline/api.py", "Makefile", "settings.reference"):
        assert place in steps
    for folder in ("data", "pipeline", "stages", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "stages/settings/count.py").write_text(DECLARATION, encoding="utf-8")
    story = "def run(ctx):\n    return {'number': len(ctx.config.words.split())}\n"
    (tmp_path / "stages/count.py").write_text(story, encoding="utf-8")
    edit(
        tmp_path / "stages/settings/experiment.py",
        ("    base,\n", "    base,\n    count,\n"),
        ("evaluate, report)", "evaluate, count, report)"),
        ("    report: ", "    count: CountSettings = Field(default_factory=CountSettings)\n    report: "),
        ("from stages.settings.dpo", "from stages.settings.count import CountSettings\nfrom stages.settings.dpo"),
    )
    edit(tmp_path / "pipeline/api.py", ('"evaluate", "report")', '"evaluate", "count", "report")'))
    commands = (
        ["-m", "pipeline.cli", "run", "count", "-c", "configs/tiny.yaml", "count.words=a b"],
        ["-m", "stages.settings.reference"],
    )
    for words in commands:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "artifacts/tiny/count/manifest.json").is_file()
    assert "| `count.words` |" in (tmp_path / "configs/SETTINGS.md").read_text(encoding="utf-8")


def test_contributing_shows_each_extension_point():
    for kind in ("pair loss", "reward", "rollout engine", "data form", "stage"):
        assert any(kind in heading for heading in SHOWN), kind
