"""Compare experiments: one page and a table in the terminal, the command `rlhf compare`.

The page holds what differs in the settings, the results side by side with paired differences, the
curves over each other, and the same prompts' answers beside each other. It needs no network, and
the same artifacts give the same bytes. `compare_read.py` reads them, `compare_settings.py` finds
what differs, `compare_pairs.py` and `compare_results.py` compare, `compare_plots.py` and
`compare_samples.py` choose what is shown.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store import files
from stages.page import compare_plots, compare_results, compare_samples, compare_settings
from stages.page.compare_read import Side, read_sides
from stages.page.compare_results import Contrast
from stages.page.drawing import Picture, picture
from stages.page.numbers import capitalised, fixed
from stages.page.results import NAMES
from stages.page.table import Table
from stages.settings.changed import defaults_of
from stages.settings.experiment import Experiment

PROMPTS = 12
"""Prompts whose answers are shown, at most."""
SAME = ("gold", "score", "kl_to_sft", "length", "eos_rate", "pretrain_perplexity")
"""Figures of a policy that are equal if one and the same model answered the same prompts."""
LONGEST = 120
"""Characters of the folder's name that come from the experiments' names."""


@dataclass(frozen=True)
class PolicyPart:
    """Hold what the page says of one policy."""

    policy: str
    """The policy."""
    name: str
    """Its name on the page."""
    figures: Table
    """Its figures, a row for each experiment."""
    paired: Table | None
    """Differences paired by prompt."""
    seeds: Table | None
    """Means over seeds."""
    remarks: list[tuple[str, str]]
    """What a reader must know of the differences, as `compare_results.sentences` takes it."""
    pictures: list[Picture]
    """Its plots."""


def run(names: Sequence[str], root: Path, output: str | None, console: Any) -> int:
    """Write the page, and print the tables.

    Args:
        names: Names of experiments below the folder of artifacts, or folders.
        root: The folder of artifacts.
        output: An HTML file or a folder; None: a folder `compare-…` beside the experiments.
        console: Where to print: a rich Console.

    Returns:
        The exit code.

    Raises:
        UserError: If an experiment cannot be read, or the page not be written.
    """
    if len(names) < 2:
        raise UserError("compare: needs two experiments or more; name them, as in `rlhf compare tiny other`")
    sides = read_sides(names, root)
    settings = [compare_settings.settings_of(side, defaults_of(Experiment)) for side in sides]
    groups = compare_settings.groups_of(settings)
    tones = compare_plots.tones_of(groups)
    contrasts = compare_results.contrasts_of(sides, groups)
    parts = [part_of(sides, policy, groups, contrasts, tones) for policy in shown_policies(sides)]
    changed = compare_settings.settings_table(sides, settings)
    remarks = [remark for part in parts for remark in part.remarks]
    sentences = compare_results.without_seeds(sides, groups) + compare_results.sentences(remarks)
    path = page_path(output, root, sides)
    page = page_of(sides, groups, contrasts, tones, parts, changed, sentences)
    with files.name_in_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    print_tables(console, sides, parts, changed, sentences)
    console.print(f"page: {path}", style="bold", markup=False, highlight=False, soft_wrap=True)
    return 0


def page_path(output: str | None, root: Path, sides: Sequence[Side]) -> Path:
    """Return the file to write."""
    if output is not None:
        path = Path(output).expanduser()
        return path if path.suffix in (".html", ".htm") else path / "index.html"
    joined = "-".join(side.name.replace("/", "_") for side in sides)
    if len(joined) > LONGEST:
        joined = f"{joined[:LONGEST]}-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"
    return root / f"compare-{joined}" / "index.html"


def shown_policies(sides: Sequence[Side]) -> list[str]:
    """Return the policies that differ between experiments, or that one of them measured alone."""
    return [name for name in compare_results.policies_of(sides) if not is_one_artifact(sides, name)]


def is_one_artifact(sides: Sequence[Side], policy: str) -> bool:
    """Return whether all experiments have the same figures of a policy."""
    entries = [side.policies.get(policy) for side in sides]
    first = entries[0]
    if first is None:
        return False
    return all(entry is not None and all(entry[key] == first[key] for key in SAME) for entry in entries)


def part_of(
    sides: Sequence[Side],
    policy: str,
    groups: Sequence[Sequence[int]],
    contrasts: Sequence[Contrast],
    tones: Sequence[str],
) -> PolicyPart:
    """Return what the page says of one policy."""
    paired, remarks = compare_results.paired_table(sides, contrasts, policy, tones)
    return PolicyPart(
        policy,
        NAMES.get(policy, policy),
        compare_results.figures_table(sides, policy, tones),
        paired,
        compare_results.seeds_table(sides, groups, policy, tones),
        remarks,
        [picture(plot) for plot in compare_plots.result_plots(sides, policy, tones)],
    )


def page_of(
    sides: Sequence[Side],
    groups: Sequence[Sequence[int]],
    contrasts: Sequence[Contrast],
    tones: Sequence[str],
    parts: Sequence[PolicyPart],
    changed: Table | None,
    sentences: Sequence[str],
) -> str:
    """Return the page; its arguments are those of `run`."""
    ends = (contrasts[0].ours, contrasts[0].theirs) if contrasts else (1, 0)
    answered = [part.policy for part in parts if all(part.policy in sides[end].policies for end in ends)]
    asked = compare_samples.side_by_side(sides, answered[0], tones, ends, PROMPTS) if answered else []
    same = compare_plots.same_artifacts(sides)
    alike = [NAMES.get(name, name) for name in compare_results.policies_of(sides) if is_one_artifact(sides, name)]
    return template().render(
        sides=list(zip(sides, tones, strict=True)),
        changed=changed,
        same=capitalised(same),
        alike=alike,
        surroundings=compare_settings.surroundings_table(sides),
        stages=compare_settings.stages_table(sides),
        parts=parts,
        sentences=sentences,
        unmeasured=[side.label for side in sides if side.results is None],
        climbed=[capitalised(line) for line in compare_results.climbed_note(sides)],
        curves=[picture(plot) for plot in compare_plots.overlays(sides, groups, tones)],
        answered=NAMES.get(answered[0], answered[0]) if answered else "",
        groups=asked,
    )


def template() -> Any:
    """Return the page's template, which escapes all text: samples are untrusted."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": fixed}
    return environment.get_template("compare.html.j2")


# -- the terminal --------------------------------------------------------------------------------


def print_tables(
    console: Any, sides: Sequence[Side], parts: Sequence[PolicyPart], changed: Table | None, sentences: Sequence[str]
) -> None:
    """Print what differs and the results.

    Args:
        console: A rich Console.
        sides: The experiments.
        parts: What the page says of each policy.
        changed: The settings that differ; None if none does.
        sentences: What a reader must know of the differences.
    """
    from rich.text import Text

    if changed is None:
        console.print(Text("no setting differs"))
    else:
        print_table(console, changed)
    for part in parts:
        if len(part.figures.rows) < 2:
            continue  # only one experiment has this policy: the page shows it
        print_table(console, part.figures, intervals=False)
        for table in (part.paired, part.seeds):
            if table is not None:
                print_table(console, table)
    for line in sentences:
        console.print(Text(f"{line}.", style="yellow"), soft_wrap=True)
    for side in sides:
        for line in side.notes:
            console.print(Text(f"{side.label}: {line}", style="yellow"), soft_wrap=True)


def print_table(console: Any, table: Table, intervals: bool = True) -> None:
    """Print a table of the page.

    Args:
        console: A rich Console.
        table: The table.
        intervals: Whether what the page writes below a figure is printed, in the same cell.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    printed = RichTable(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for index, head in enumerate(table.columns):
        head = head if intervals else head.removesuffix(", 95 % interval")
        if index == 0:
            printed.add_column(head, no_wrap=True)
            continue
        printed.add_column(head, justify="left" if index in table.left else "right", overflow="fold")
    for row in table.rows:
        texts = [f"{cell.text}\n{cell.small}" if intervals and cell.small else cell.text for cell in row]
        printed.add_row(texts[0].replace(" − ", "\n− "), *map(Text, texts[1:]))
    console.print(Text(f"\n{table.label}", style="bold"), soft_wrap=True)
    console.print(printed)
