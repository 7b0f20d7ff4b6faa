"""Count what data hold, and draw histograms: `rlhf data stats`.

Records are read once and not kept. Lengths are in tokens with the tokenizer of a config, otherwise
in words, or in characters where a script writes no blanks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data.check.command import Context, print_errors
from data.check.config import Input
from data.check.inspect_file import AT_ONCE
from data.progress import Watch, unwatched
from data.tools.charts import Chart, Counts, text_lines
from data.tools.inputs import Opened, open_inputs
from data.tools.marked import visible
from data.tools.stats_page import page

MOST_COLUMNS = 110
"""Columns of the terminal that are used at most."""


def run(
    inputs: Sequence[Input],
    kind: str | None,
    experiment: Any,
    html: Path | None,
    artifacts: str = "artifacts",
    watch: Watch = unwatched,
) -> int:
    """Print charts of each input, and write them as a page if that is wanted.

    Args:
        inputs: The files and data sets; none for all data of the config.
        kind: The kind of data; None: what the config or the rows say.
        experiment: The validated config, or None.
        html: The page to write, or None.
        artifacts: The folder of all experiments.
        watch: Shows how far reading is.

    Returns:
        The exit code: 2 if there are errors in the data, otherwise 0.
    """
    context = Context.of(experiment, artifacts, watch=watch)
    if context.note:
        print(f"tokenizer: {context.note}\n")
    sections: list[tuple[str, str, Sequence[Chart]]] = []
    errors: list[str] = []
    width = min(shutil.get_terminal_size((80, 24)).columns, MOST_COLUMNS)
    for opened in open_inputs(inputs, kind, context):
        counts = Counts(opened.kind, context.limits(opened.kind))
        found = opened.records()
        while batch := list(islice(found, AT_ONCE)):
            counts.add(batch)
        charts = counts.charts() if counts.rows else []
        sentence = summary(opened, counts)
        print(f"{opened.source.name}\n{sentence}")
        for chart in charts:
            print("")
            for line in text_lines(chart, width):
                print(visible(line))
        print("")
        sections.append((opened.source.name, sentence, charts))
        errors += opened.loaded.errors + counts.lengths.errors
    if html is not None:
        temporary = html.with_name(f".tmp-{os.getpid()}-{html.name}")
        temporary.write_text(page(sections), encoding="utf-8")
        temporary.replace(html)
        print(f"{html}: the same as a page")
    print_errors(errors)
    return 2 if errors else 0


def summary(opened: Opened, counts: Counts) -> str:
    """Return how many records there are, and how many rows are not among them."""
    loaded = opened.loaded
    parts = [f"{counts.rows:,} {opened.kind.replace('_', ' ')} of {loaded.rows:,} rows"]
    others = {
        "repeated": loaded.duplicates,
        "left out": loaded.left_out.total(),
        "filtered": loaded.filtered,
        "dropped": len(loaded.dropped),
        "errors": len(loaded.errors),
    }
    parts += [f"{number:,} {name}" for name, number in others.items() if number]
    return " \u00b7 ".join(parts)
