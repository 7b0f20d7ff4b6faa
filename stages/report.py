"""report: what the stages wrote → one HTML page that opens without a network, and the table that ends a run.

The page's text is made of the measured numbers alone; the same artifacts give the same bytes. What was not measured is
left out: an experiment of SFT and DPO alone has a page too. One file a subject: what was run (`report_experiment.py`),
tables (`report_table.py`), plots (`report_plots.py`, drawn by `report_svg.py`), whether the score can be trusted
(`report_trust.py`), samples (`report_samples.py`), sentences (`report_words.py`, `report_glossary.py`), and the table
in the terminal (`page/terminal.py`). The page itself is `page/report.html.j2`, its looks `page/style.j2`.
"""

import json
from pathlib import Path

from pipeline.stage import StageRun
from stages.page import experiment as experiment_of
from stages.page import plots, samples, trust
from stages.page import table as tables
from stages.page.glossary import glossary
from stages.page.plots import Journal
from stages.page.words import NAMES, complete, fixed, judge_of, moment, notes, summary, tiles
from stages.settings.experiment import Experiment
from stages.settings.report import ReportSettings

JOURNALS = ("metrics", "evaluations", "samples")


def run(ctx: StageRun[ReportSettings, Experiment]) -> dict:
    """→ index.html."""
    folder, manifests = ctx.inputs["evaluate"], ctx.manifests
    results = complete(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    responses, greedy = (read_rows(folder / f"{name}.jsonl") for name in ("responses", "greedy"))
    journals = {
        stage: Journal(*(read_rows(inner / f"{kind}.jsonl") for kind in JOURNALS))
        for stage, inner in ctx.inputs.items()
    }
    best_of, found = ctx.experiment.evaluate.best_of, results["policies"]
    names = NAMES | {"best_of_n": f"best of {best_of}"}
    rm = manifests.get("rm", {}).get("metrics", {})
    sections = {
        "gains": plots.win_rates(results, names)
        + plots.gold_parts(results, names)
        + plots.frontier(results, journals.get("ppo"), best_of, names),
        "gold": trust.gold_figures(responses, list(found), names),
        "length": trust.length_figures(responses, list(found), names),
        "calibration": trust.calibration(rm),
        "learning": plots.learning(journals, results["reward_model"]),
        "ppo": plots.ppo(journals["ppo"]) if "ppo" in journals else [],
    }
    systems = samples.Systems()
    groups = samples.side_by_side(responses, greedy, results, names, ctx.config.prompts, systems)
    looks = samples.looks(journals["ppo"], ctx.config.ppo_looks, systems) if "ppo" in journals else []
    page = template().render(
        name=ctx.experiment.name,
        seed=ctx.seed,
        results=results,
        names=names,
        judge=judge_of(results),
        sections=sections,
        finished=moment(manifests["evaluate"]["finished_at"]),
        facts=experiment_of.facts(manifests),
        data=experiment_of.data_table(manifests, results),
        settings=experiment_of.settings_table(manifests, experiment_of.defaults_of(type(ctx.experiment))),
        summary=summary(results, names),
        notes=notes(results),
        tiles=tiles(results, names),
        results_tables=tables.results_tables(results, names),
        gold_tables=trust.gold_table(responses, results, names),
        trust_says=trust.sentences(results, names),
        trust_tables=trust.tables(results, names),
        accuracy_tables=tables.accuracy_tables(rm),
        groups=groups,
        looks=looks,
        systems=systems,
        lineage=experiment_of.lineage_table(manifests),
        drawing=experiment_of.drawing(manifests),
        glossary=glossary(things_on_the_page(results, manifests)),
    )
    (ctx.publish / "index.html").write_text(page, encoding="utf-8")
    return {"policies": len(found), "plots": sum(map(len, sections.values()))}


def things_on_the_page(results: dict, manifests: dict[str, dict]) -> set[str]:
    """Return what the page tells of, as `glossary` asks for it."""
    shown, checks = results["policies"], [found for found in results["overoptimisation"].values() if found]
    seen = {
        "gold": results["judge"] == "gold",
        "rm": "rm" in manifests or results["reward_model"]["accuracy"] is not None,
        "held_out": any(found["held_out"] for found in checks),
        "win_rate": any(p["win_rate_vs_sft"] for p in shown.values()),
        "perplexity": any(p["pretrain_perplexity"] is not None for p in shown.values()),
        "over": bool(checks) or results["judge"] == "gold",
        "adapter": any(experiment_of.section(m, "model").get("peft") for m in manifests.values()),
    }
    return set(shown) | {thing for thing, is_there in seen.items() if is_there}


def read_rows(path: Path) -> list[dict]:
    """Rows of a journal; [] where the stage wrote none."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def template():
    """The page, with everything that is put into it escaped: samples are untrusted text."""
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
