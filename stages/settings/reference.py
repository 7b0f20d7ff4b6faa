"""Write the reference of all settings: `python -m stages.settings.reference`."""

from pathlib import Path

from pipeline.config.help import SettingRow, describe
from pipeline.config.sections import COMMON
from stages.settings.experiment import PEOPLE, STAGES, TESTS, Experiment
from stages.settings.scorers.rule import RULES
from stages.settings.scorers.scorer import KINDS

FILE = Path(__file__).resolve().parents[2] / "configs" / "SETTINGS.md"
HEADER = """\
# Settings

Every setting of a config, with its type, default and unit. This file is generated from the declarations in
`pipeline/config/sections.py` and `stages/settings/`: change those, then run `python -m stages.settings.reference`.

The command line takes the same names on top of the file: `rlhf run ppo -c my.yaml ppo.kl_coef=0.1`.
"""
SCORERS = """\
A scorer gives responses their scores. `ppo.rewards` is a list of them; each has exactly one of the keys below, which
says what scores, and further settings of that kind.
"""
TABLE = ["| setting | type | default | unit | meaning |", "| --- | --- | --- | --- | --- |"]


def reference() -> str:
    """Return the text: the top level, the common sections, the stages, then those of PEOPLE."""
    top = [row for row in describe(Experiment, "") if "." not in row.key]
    parts = [HEADER, section("Top level", "", top)]
    for name, settings in COMMON.items():
        parts.append(section(f"`{name}`", first_line(settings.__doc__), describe(settings, name)))
    for name, stage in (STAGES | TESTS).items():
        if not stage.section:  # otherwise its settings are those of another section
            parts.append(section(f"`{name}`", stage.summary, describe(stage.settings, name)))
    for name, settings in PEOPLE.items():
        parts.append(section(f"`{name}`", first_line(settings.__doc__), describe(settings, name)))
    parts.append(f"## Scorers\n\n{SCORERS}")
    for kind, scorer in KINDS.items():
        if kind != "rule":
            parts.append(section(f"`{kind}:`", first_line(scorer.__doc__), describe(scorer, ""), level=3))
    for name, rule in RULES.items():
        parts.append(section(f"`rule: {name}`", first_line(rule.__doc__), describe(rule, ""), level=3))
    return "\n".join(parts)


def section(title: str, summary: str, rows: list[SettingRow], level: int = 2) -> str:
    """Return a section of the file.

    Args:
        title: Its heading.
        summary: A sentence under the heading; "" for none.
        rows: The settings.
        level: Level of the heading.
    """
    lines = [f"{'#' * level} {title}", ""]
    if summary:
        lines += [summary, ""]
    lines += TABLE
    for row in rows:
        cells = (f"`{row.key}`", row.type, f"`{row.default}`", row.unit, row.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def first_line(docstring: str | None) -> str:
    """Return the first line of a docstring."""
    return (docstring or "").strip().split("\n")[0]


def main() -> None:
    """Write the file."""
    FILE.write_text(reference(), encoding="utf-8")
    print(f"written: {FILE}")


if __name__ == "__main__":
    main()
