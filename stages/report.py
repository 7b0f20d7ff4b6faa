"""Make the report: one HTML page that opens without a network, and its plots as PNG files.

The page is made of the measured numbers only, and the same artifacts give the same bytes. What was
not measured is left out, so an experiment of SFT and DPO without PPO has a page too.

The room `page/` has one file for each subject. `experiment.py`, `data_table.py`,
`settings_table.py` and `lineage.py` say what was run. `results_tables.py` and `trust.py` give the
results as tables, `sentences.py` in words, `curves.py`, `gains.py` and `trust_plots.py` as plots;
`rounds.py` shows all rounds, `samples.py` chooses samples, and `external.py` shows tests from
outside. `drawing.py` draws the plots, `inline.py` fits them to the page, `report.html.j2` and
`style.j2` are the page, and `terminal.py` prints the table that ends a run.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.stage import StageRun
from pipeline.taking import taken_from
from stages.page import curves, external, gains, lineage, panel, results_tables, rounds, samples, trust, trust_plots
from stages.page.curves import Journal
from stages.page.data_table import data_table
from stages.page.drawing import Picture, picture
from stages.page.experiment import facts
from stages.page.glossary import glossary
from stages.page.manifests import section
from stages.page.numbers import fixed, moment
from stages.page.plot import Plot
from stages.page.results import NAMES, complete
from stages.page.sentences import judge_of, notes, summary, tiles
from stages.page.settings_table import settings_table
from stages.settings.changed import defaults_of
from stages.settings.experiment import Experiment
from stages.settings.report import TESTS, ReportSettings

if TYPE_CHECKING:
    import jinja2


def run(ctx: StageRun[ReportSettings, Experiment]) -> dict[str, Any]:
    """Write index.html and plots/*.png.

    Returns:
        The number of policies and of plots on the page.
    """
    manifests, folder = ctx.manifests, ctx.inputs["evaluate"]
    results = complete(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    responses, greedy = read_rows(folder / "responses.jsonl"), read_rows(folder / "greedy.jsonl")
    journals = {stage: read_journal(inputs) for stage, inputs in ctx.inputs.items()}
    best_of = ctx.experiment.evaluate.best_of
    names = NAMES | {"best_of_n": f"best of {best_of}"}
    rm = manifests.get("rm", {}).get("metrics", {})
    of_rounds = rounds.read(folder)
    plots = {
        "rounds": rounds.plots(of_rounds),
        "gains": gains.win_rates(results, names)
        + gains.gold_parts(results, names)
        + gains.frontier(results, journals.get("ppo"), best_of, names),
        "gold": trust_plots.gold_plots(responses, list(results["policies"]), names),
        "length": trust_plots.length_plots(responses, list(results["policies"]), names),
        "calibration": trust_plots.calibration(rm),
        "learning": curves.learning(journals, results["reward_model"]),
        "ppo": curves.ppo(journals["ppo"]) if "ppo" in journals else [],
    }
    systems = samples.SystemPrompts()
    groups = samples.side_by_side(responses, greedy, results, names, ctx.config.prompts, systems)
    moments = samples.moments(journals["ppo"], ctx.config.ppo_looks, systems) if "ppo" in journals else []
    page = template().render(
        name=ctx.experiment.name,
        seed=ctx.seed,
        results=results,
        names=names,
        judge=judge_of(results),
        finished=moment(manifests["evaluate"]["finished_at"]),
        sections=draw_all(plots, ctx.publish / "plots"),
        facts=facts(manifests),
        data=data_table(manifests, results),
        settings=settings_table(manifests, defaults_of(type(ctx.experiment))),
        summary=summary(results, names),
        notes=notes(results),
        tiles=tiles(results, names),
        results_tables=results_tables.policy_tables(results, names),
        rounds_tables=rounds.tables(of_rounds),
        rounds_sentences=rounds.sentences(of_rounds),
        panel_tables=panel.tables(results, names),
        panel_sentences=panel.sentences(results),
        gold_tables=trust.gold_table(responses, results, names),
        trust_sentences=trust.sentences(results, names),
        trust_tables=trust.tables(results, names),
        accuracy_tables=results_tables.accuracy_tables(rm),
        tests=external.sections({test: ctx.inputs[test] for test in TESTS if test in ctx.inputs}, names, rm),
        groups=groups,
        moments=moments,
        systems=systems,
        lineage=lineage.lineage_table(manifests, taken_from(ctx.experiment)),
        lineage_picture=picture(lineage.lineage_plot(manifests), ctx.publish / "plots"),
        glossary=glossary(topics_of(results, manifests)),
    )
    (ctx.publish / "index.html").write_text(page, encoding="utf-8")
    return {"policies": len(results["policies"]), "plots": sum(len(some) for some in plots.values())}


def draw_all(plots: dict[str, list[Plot]], folder: Path) -> dict[str, list[Picture]]:
    """Draw every plot for the page and as a PNG file.

    Args:
        plots: Section of the page → its plots.
        folder: Where the PNG files are written.
    """
    return {section: [picture(plot, folder) for plot in some] for section, some in plots.items()}


def topics_of(results: dict[str, Any], manifests: dict[str, dict[str, Any]]) -> set[str]:
    """Return the topics that the page covers, for its glossary.

    Args:
        results: results.json, completed.
        manifests: Stage → its manifest.
    """
    policies = results["policies"]
    checks = [check for check in results["overoptimisation"].values() if check]
    is_covered = {
        "gold": results["judge"] == "gold",
        "rm": "rm" in manifests or results["reward_model"]["accuracy"] is not None,
        "held_out": any(check["held_out"] for check in checks),
        "kept": "kept" in results["judges"],
        "judges": any(judge["climbed"] for judge in results["judges"].values()),
        "win_rate": any(policy["win_rate_vs_sft"] for policy in policies.values()),
        "perplexity": any(policy["pretrain_perplexity"] is not None for policy in policies.values()),
        "over": bool(checks) or results["judge"] == "gold",
        "rounds": any(section(manifest, "round") for manifest in manifests.values()),
        "adapter": any(
            section(manifest, name).get("peft") for stage, manifest in manifests.items() for name in ("model", stage)
        ),
    }
    return set(policies) | {topic for topic, covered in is_covered.items() if covered}


def read_journal(folder: Path) -> Journal:
    """Read what a stage logged."""
    return Journal(*(read_rows(folder / f"{kind}.jsonl") for kind in ("metrics", "evaluations", "samples")))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON Lines file; none where the stage wrote no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def template() -> "jinja2.Template":
    """Return the page's template, which escapes all text: samples are untrusted."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("page")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": fixed}
    return environment.get_template("report.html.j2")
