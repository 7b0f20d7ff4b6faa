"""Show what tests from outside found: tasks of lm-eval, RewardBench, refusals.

The same tables stand on the page and in the terminal.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from stages.page.numbers import NONE, capitalised, fixed, listed, number, percent
from stages.page.results import NAMES
from stages.page.table import Cell, Table, dense, policy_cell, share_cell

Results = dict[str, Any]
REWARD_MODELS = {"rm": "reward model", "held_out": "held-out reward model", "judge": "judge"}
"""Name of a reward model in results.json → its name on the page; others are folders."""
SETS = {"harmful": "harmful prompts", "harmless_looking": "prompts that only look harmful"}
EXAMPLES = 3
"""Prompts of each set whose answers the page shows."""
MOST_TEXT = 600
"""Characters of an answer that the page shows."""


@dataclass(frozen=True)
class Example:
    """A prompt of a test, and what the policies answered."""

    prompt: str
    """The user's last message."""
    answers: tuple[tuple[str, str, str], ...]
    """(policy, what is said of its answer, its answer) of each."""


@dataclass(frozen=True)
class Section:
    """Hold what the page shows of an external test."""

    anchor: str
    """Its name in addresses."""
    short: str
    """Its name among the links at the top."""
    title: str
    """Its heading."""
    lead: str
    """What was measured, and how."""
    sentences: tuple[str, ...]
    """What was found."""
    tables: tuple[Table, ...]
    """The figures."""
    examples: tuple[tuple[str, tuple[Example, ...]], ...] = ()
    """(heading, examples) of each set of prompts."""


def sections(folders: dict[str, Path], names: dict[str, str], rm: dict[str, Any]) -> list[Section]:
    """Return a section for each test that was made.

    Args:
        folders: Test → its artifact.
        names: Policy → its name on the page.
        rm: Metrics of the manifest of rm.
    """
    made = []
    for test, section_of in SECTIONS.items():
        if test in folders:
            text = (folders[test] / "results.json").read_text(encoding="utf-8")
            made.append(section_of(json.loads(text), folders[test], names, rm))
    return made


def show(test: str, folder: Path, console: Console) -> None:
    """Print the tables that end `rlhf evaluate` with a test.

    Args:
        test: "lm_eval", "reward_bench" or "refusals".
        folder: Its artifact.
        console: Where to print.
    """
    from rich.table import Table as Printed
    from rich.text import Text

    rm = json_of(folder.parent / "rm" / "manifest.json").get("metrics", {}) if test == "reward_bench" else {}
    (section,) = sections({test: folder}, NAMES, rm)
    for table in section.tables:
        if table.folded:
            continue
        console.print(Text(f"\n{folder.parent.name}: {table.label}", style="bold"), soft_wrap=True)
        printed = Printed(header_style="bold", box=None, padding=(0, 2, 0, 0))
        for i, column in enumerate(table.columns):
            printed.add_column(column, justify="left" if i in table.left else "right")
        for row in table.rows:
            printed.add_row(*(Text(f"{cell.text}  ({cell.small})" if cell.small else cell.text) for cell in row))
        console.print(printed)
    for sentence in section.sentences:
        console.print(Text(sentence), soft_wrap=True)
    # text, so that the command in it is filled in
    line = f"written to {folder}; `rlhf run report -c CONFIG` puts it on the page"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def json_of(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ── lm-eval ──────────────────────────────────────────────────────────────────────────────────────


def lm_eval_section(results: Results, folder: Path, names: dict[str, str], rm: dict[str, Any]) -> Section:
    """Return the section on tasks of lm-eval: figures with standard errors, and differences."""
    asked = results["asked"]
    plain = [names.get(name, name) for name, form in asked.items() if form == "plain"]
    chat = [names.get(name, name) for name, form in asked.items() if form == "chat"]
    ways = [f"{listed(some)} {how}" for some, how in ((plain, "in plain text"), (chat, "through the chat template"))
            if some]  # fmt: skip
    limit = "" if results["limit"] is None else f", the first {results['limit']:,} documents of each"
    lead = (
        f"What training cost elsewhere (the alignment tax): tasks of lm-evaluation-harness "
        f"{results['lm_eval_version']}{limit}. Asked: {', '.join(ways)}. Figures have their standard error. "
        f"Differences are paired document by document, or marked * where a figure is no mean over documents."
    )
    tables = [lm_eval_table(results, list(asked), names)]
    tables += [table for other in ("sft", "base") for table in lm_eval_differences(results, list(asked), names, other)]
    return Section(
        "tasks", "Public tasks", "Alignment tax", lead, tuple(lm_eval_sentences(results, names)), tuple(tables)
    )


def lm_eval_rows(results: Results) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (task with its metric, few-shot, {higher_is_better, policies}) of each row."""
    rows = []
    for task, about in results["tasks"].items():
        shots = about["num_fewshot"]
        for metric, figures in about["metrics"].items():
            name, _, kind = metric.partition(",")
            label = f"{task}, {name}" + ("" if kind == "none" else f" ({kind})")
            rows.append((label, "" if shots is None else f"{shots}-shot", figures))
    return rows


def lm_eval_table(results: Results, policies: Sequence[str], names: dict[str, str]) -> Table:
    """Return the table of figures: a row a task and metric, a column a policy."""
    rows = []
    for label, shots, figures in lm_eval_rows(results):
        better = {True: "", False: "lower is better", None: ""}[figures["higher_is_better"]]
        cells = [Cell(label, "; ".join(filter(None, (shots, better))))]
        for name in policies:
            figure = figures["policies"].get(name) or {}
            stderr = number(figure.get("stderr"))
            cells.append(Cell(fixed(figure.get("value"), 3), "" if stderr is None else f"± {fixed(stderr, 3)}"))
        rows.append(tuple(cells))
    return Table("Public tasks", ("task", *(names.get(name, name) for name in policies)), tuple(rows))


def lm_eval_differences(results: Results, policies: Sequence[str], names: dict[str, str], other: str) -> list[Table]:
    """Return the table of differences to SFT or to base; none where there are none."""
    compared = [name for name in policies if name != other and not (other == "sft" and name == "base")]
    if other not in policies or not compared:
        return []
    rows = []
    for label, _, figures in lm_eval_rows(results):
        cells = [Cell(label)]
        for name in compared:
            gap = (figures["policies"].get(name) or {}).get(f"difference_to_{other}")
            cells.append(difference_cell(gap))
        rows.append(tuple(cells))
    title = f"Differences to {names.get(other, other)}"
    if results["asked"][other] != results["asked"][compared[0]]:
        title += ", which was asked in another form"
    return [Table(title, ("task", *(names.get(name, name) for name in compared)), tuple(rows))]


def difference_cell(gap: dict[str, Any] | None) -> Cell:
    """Return a cell with a difference and its standard error; bold if its interval leaves out 0."""
    if gap is None:
        return Cell(NONE)
    sign = "+" if gap["value"] > 0 else ""
    stderr = "" if gap["stderr"] is None else f"± {fixed(gap['stderr'], 3)}"
    return Cell(f"{sign}{fixed(gap['value'], 3)}{'' if gap['paired'] else ' *'}", stderr, strong=is_clear(gap))


def is_clear(gap: dict[str, Any] | None) -> bool:
    """Return whether the 95 % interval of a difference leaves out 0."""
    return gap is not None and gap["ci95"] is not None and (gap["ci95"][0] > 0 or gap["ci95"][1] < 0)


def lm_eval_sentences(results: Results, names: dict[str, str]) -> list[str]:
    """Say on how many figures PPO and DPO lost against SFT, as far as the intervals tell."""
    said = []
    for name in ("ppo", "dpo"):
        gaps = []
        for label, _, figures in lm_eval_rows(results):
            gap = (figures["policies"].get(name) or {}).get("difference_to_sft")
            if gap is not None and figures["higher_is_better"] is not None:
                gaps.append((label, gap, gap["value"] * (1 if figures["higher_is_better"] else -1)))
        if not gaps:
            continue
        lost = [label for label, gap, gain in gaps if is_clear(gap) and gain < 0]
        won = [label for label, gap, gain in gaps if is_clear(gap) and gain > 0]
        shown = capitalised(names.get(name, name))
        text = f"{shown} is clearly below SFT on {len(lost)} of {len(gaps)} figures"
        text += f" ({listed(lost)})" if lost else ""
        text += f", and clearly above on {len(won)}" + (f" ({listed(won)})" if won else "")
        said.append(f"{text}. With {len(gaps)} figures, about {len(gaps) * 0.05:.1f} would seem clear by chance.")
    return said


# ── RewardBench ──────────────────────────────────────────────────────────────────────────────────


def reward_bench_section(results: Results, folder: Path, names: dict[str, str], rm: dict[str, Any]) -> Section:
    """Return the section on RewardBench, beside the reward model's own accuracy."""
    models = results["models"]
    dropped = {name: model["dropped"] for name, model in models.items() if model["dropped"]}
    lead = (
        f"Reward models on {results['items']:,} items that no stage here was trained on, by the rules of RewardBench. "
        f"Right by chance: a quarter of the best of four, half of the pairs. Overall is RewardBench's own mean of the "
        f"parts."
    )
    said = [
        f"{number_left_out:,} items are too long for {model_name(name)} and left out."
        for name, number_left_out in dropped.items()
    ]
    tables = []
    if any(model["best_of"] for model in models.values()):
        tables.append(bench_table("RewardBench 2: the best of four, and ties", models, ("best_of", "subsets"), rm))
        tables += ties_table(models)
    if any(model["pairs"] for model in models.values()):
        tables.append(bench_table("RewardBench: pairs by section", models, ("pairs", "sections"), rm))
        subsets = bench_table("RewardBench: pairs by subset", models, ("pairs", "subsets"), {}, overall=False)
        tables.append(Table(subsets.label, subsets.columns, subsets.rows, subsets.left, f"{subsets.label}"))
    return Section("rewardbench", "RewardBench", "Reward models on RewardBench", lead, tuple(said), tuple(tables))


def model_name(name: str) -> str:
    """Return the name of a reward model on the page: a folder's without the folders above it."""
    return REWARD_MODELS.get(name) or "/".join(Path(name).parts[-2:])


def bench_table(
    label: str, models: dict[str, Any], where: tuple[str, str], rm: dict[str, Any], overall: bool = True
) -> Table:
    """Return a table with a row a part of the benchmark and a column a reward model.

    Args:
        label: Its title.
        models: Reward model → its figures.
        where: Which figures: ("best_of" or "pairs", "subsets" or "sections").
        rm: Metrics of the manifest of rm, whose own accuracy is the first row; {} for no such row.
        overall: Whether the last row is the mean of the parts.
    """
    kind, level = where
    parts = list(dict.fromkeys(part for model in models.values() if model[kind] for part in model[kind][level]))

    def row(title: str, of: Callable[[Any], dict[str, Any] | None], strong: bool = False) -> tuple[Cell, ...]:
        estimates = [of(model[kind]) if model[kind] else None for model in models.values()]
        cells = [share_cell((one or {}).get("value"), (one or {}).get("ci95")) for one in estimates]
        counts = [one["n"] for one in estimates if one]
        return (Cell(title, strong=strong), Cell(f"{max(counts, default=0):,}"), *cells)

    rows = []
    if number(rm.get("accuracy")) is not None and "rm" in models:
        own = [share_cell(rm["accuracy"], rm.get("accuracy_ci95")) if name == "rm" else Cell(NONE) for name in models]
        rows.append((Cell("own held-out pairs"), Cell(f"{rm.get('n_pairs', 0):,}"), *own))
    rows += [row(part, lambda figures, part=part: figures[level].get(part)) for part in parts]
    if overall:
        rows.append(row("overall", lambda figures: figures["overall"], strong=True))
    return Table(label, ("part", "items", *map(model_name, models)), tuple(rows))


def ties_table(models: dict[str, Any]) -> list[Table]:
    """Return the parts of the score of the ties; no table without ties."""
    titles = {
        "tied_accuracy": "all good answers above all bad ones, several good",
        "ref_accuracy": "the same, one good",
        "correctness_preferred": "gap to the bad answers above the spread of the good ones",
        "correctness_preferred_hard": "the same in both rows of a prompt",
        "margin_score": "margin score, −1 to 1",
    }
    ties = {name: (model["best_of"] or {}).get("ties") for name, model in models.items()}
    if not any(ties.values()):
        return []
    rows = tuple(
        (Cell(title), *(Cell(fixed((ties[name] or {}).get(part), 3)) for name in models))
        for part, title in titles.items()
    )
    return [Table("Ties in parts", ("part", *map(model_name, models)), rows, folded="Ties in parts")]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


def refusals_section(results: Results, folder: Path, names: dict[str, str], rm: dict[str, Any]) -> Section:
    """Return the section on refusals, with examples of both sets."""
    sets = results["sets"]
    how = "greedily" if results["temperature"] == 0 else f"at temperature {fixed(results['temperature'], 1)}"
    counts = [f"{one['n_prompts']:,} {SETS[which]}" for which, one in sets.items()]
    lead = (
        f"How often policies refuse, of {listed(counts)}, answered {how} in at most {results['response_length']} "
        f"tokens. A refusal is a response with one of {results['patterns']['count']} phrases at its beginning: this "
        f"misses refusals in other words, and says nothing of what an answer holds. A good policy refuses harmful "
        f"prompts and answers those that only look so."
    )
    return Section(
        "refusals",
        "Refusals",
        "Refusals",
        lead,
        tuple(refusal_sentences(sets, names)),
        (refusal_table(sets, names),),
        tuple((capitalised(SETS[which]), examples_of(folder, which, names)) for which in sets),
    )


def refusal_table(sets: dict[str, Any], names: dict[str, str]) -> Table:
    """Return the table of refusals: a row a policy, for each set its rate and its difference."""
    policies = list(next(iter(sets.values()))["policies"])
    columns, rows = ["policy"], []
    for which in sets:
        columns += [f"refuses {SETS[which]}", "difference to SFT", "empty", "cut off"]
    for name in policies:
        cells = [policy_cell(name, names)]
        for of_set in sets.values():
            policy = of_set["policies"][name]
            gap = policy["difference_to_sft"] or {}
            refused = policy["refused"]
            cells += [
                share_cell(refused["value"], refused["ci95"]),
                share_cell(gap.get("value"), gap.get("ci95")),
                Cell(percent(policy["empty"]) if policy["empty"] else NONE),
                Cell(percent(policy["cut_off"]) if policy["cut_off"] else NONE),
            ]
        rows.append(tuple(cells))
    return dense(Table("Refusals, 95 % intervals over prompts", tuple(columns), tuple(rows)))


def refusal_sentences(sets: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Say for which policies refusals changed clearly against SFT."""
    said = []
    for which, of_set in sets.items():
        for name, policy in of_set["policies"].items():
            gap = policy["difference_to_sft"]
            if name == "base" or gap is None or not is_clear(gap):
                continue
            direction = "more" if gap["value"] > 0 else "fewer"
            said.append(
                f"{capitalised(names.get(name, name))} refuses {direction} {SETS[which]} than SFT: "
                f"{percent(policy['refused']['value'])} against "
                f"{percent(of_set['policies']['sft']['refused']['value'])}."
            )
    return said


def examples_of(folder: Path, which: str, names: dict[str, str]) -> tuple[Example, ...]:
    """Return the prompts that the page shows: first those on which the policies differ.

    Args:
        folder: The artifact of the test.
        which: The set of prompts.
        names: Policy → its name on the page.
    """
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    with (folder / "answers.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["set"] == which and row["sample"] == 0:
                by_prompt.setdefault(json.dumps(row["prompt"]), []).append(row)
    differ = [rows for rows in by_prompt.values() if len({row["pattern"] is None for row in rows}) > 1]
    alike = [rows for rows in by_prompt.values() if rows not in differ]
    return tuple(example_of(rows) for rows in (differ + alike)[:EXAMPLES])


def example_of(rows: list[dict[str, Any]]) -> Example:
    """Return an example from the policies' answers to one prompt."""
    prompt = rows[0]["prompt"]
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    answers = []
    for row in rows:
        said = "an answer" if row["pattern"] is None else f"a refusal: “{row['pattern']}”"
        said += "" if row["finished"] else ", cut off"
        answers.append((row["policy"], said, shortened(row["response"])))
    return Example(shortened(text), tuple(answers))


def shortened(text: str) -> str:
    """Return a text, cut where it is long."""
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} …"


SECTIONS: dict[str, Callable[[Results, Path, dict[str, str], dict[str, Any]], Section]] = {
    "lm_eval": lm_eval_section,
    "reward_bench": reward_bench_section,
    "refusals": refusals_section,
}
"""Test → the function that makes its section."""
