"""report: what the stages wrote → one HTML page that opens without a network, and the table that ends a run.

The page's text is made of the measured numbers alone; the same artifacts give the same bytes.
"""

import json
from datetime import datetime
from pathlib import Path

from pipeline.errors import UserError
from pipeline.stage import StageRun
from stages import report_plots as plots
from stages.report_plots import NAMES, Journal, number
from stages.report_svg import graph
from stages.report_words import ASKED, fixed, interval, moment, percent, quality, summary, tiles
from stages.settings import Section, setting
from stages.wanted import judges, policies

NAME = "report"
METRICS: dict[str, str] = {}
HEADLINE = ("policies", "plots")
STAGES = ("world", "base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate")
JOURNALS = ("metrics", "evaluations", "samples")


class Config(Section):
    """What the page shows of the samples."""

    prompts: int = setting(12, "prompts whose responses are shown side by side", "prompts", ge=1)
    ppo_looks: int = setting(6, "moments of PPO whose samples are shown", ge=1)


def needs(experiment) -> list[str]:
    made = {"world"} if "world" in experiment.data.model_dump().values() else set()
    made |= {"base", "sft", "evaluate"} | {"ppo", "dpo"} & set(policies(experiment))
    made |= {"rankings", "rm"} if judges(experiment) else {"rankings"} if "dpo" in made else set()
    return [stage for stage in STAGES if stage in made]


def reads(experiment) -> list[str]:
    return []


def run(ctx: StageRun) -> dict:
    """→ index.html."""
    results = json.loads((ctx.inputs["evaluate"] / "results.json").read_text(encoding="utf-8"))
    responses = read_rows(ctx.inputs["evaluate"] / "responses.jsonl")
    journals = {
        stage: Journal(*(read_rows(folder / f"{kind}.jsonl") for kind in JOURNALS))
        for stage, folder in ctx.inputs.items()
    }
    rm = ctx.manifests["rm"]["metrics"] if "rm" in ctx.manifests else {}
    best_of = ctx.experiment.evaluate.best_of
    names = NAMES | {"best_of_n": f"best of {best_of}"}
    sections = {
        "gains": plots.win_rates(results, names)
        + plots.gold_parts(results, names)
        + plots.frontier(results, journals.get("ppo"), best_of, names),
        "trust": plots.trust(responses, list(results["policies"]), names),
        "calibration": plots.calibration(rm),
        "learning": plots.learning(journals, results["reward_model"]),
        "ppo": plots.ppo(journals["ppo"]) if "ppo" in journals else [],
    }
    page = template().render(
        name=ctx.experiment.name,
        seed=ctx.seed,
        results=results,
        names=names,
        sections=sections,
        finished=moment(ctx.manifests["evaluate"]["finished_at"]),
        summary=summary(results, names),
        notes=notes(results)[1:],
        tiles=tiles(results, names),
        correlations=correlations(responses, results),
        rm_parts=rm_parts(rm),
        side_by_side=side_by_side(responses, results, ctx.config.prompts),
        looks=ppo_looks(journals["ppo"], ctx.config.ppo_looks) if "ppo" in journals else [],
        lineage=lineage(ctx.manifests),
        versions=common_versions(ctx.manifests),
        drawing=drawing(ctx.manifests),
    )
    (ctx.publish / "index.html").write_text(page, encoding="utf-8")
    return {"policies": len(results["policies"]), "plots": sum(map(len, sections.values()))}


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
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"fixed": fixed, "percent": percent, "turns": turns, "marks": marks}
    return environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))


# -- samples and prompts ----------------------------------------------------------------------------------


def turns(prompt) -> list[dict]:
    """A prompt as messages; a plain string is one of the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def correlations(responses: list[dict], results: dict) -> list[tuple[str, float | None, float | None]]:
    """Compare score and gold over each policy's samples.

    Returns:
        (policy, Spearman's ρ of score and gold, share of the comparisons with SFT's responses to the same prompts on
        which both prefer the same side).
    """
    if results["judge"] != "gold":
        return []
    rows = {name: by_prompt(responses, name) for name in results["policies"]}
    out = []
    for name, mine in rows.items():
        pairs = [(r["score"], r["gold"]["overall"]) for own in mine for r in own]
        agree = [
            (a["score"] - b["score"]) * (a["gold"]["overall"] - b["gold"]["overall"])
            for own, theirs in zip(mine, rows["sft"], strict=True)
            for a in own
            for b in theirs
        ]
        decided = [product > 0 for product in agree if product != 0]
        same = sum(decided) / len(decided) if decided else None
        out.append((name, plots.rank_correlation(pairs), same))
    return out


def by_prompt(responses: list[dict], policy: str) -> list[list[dict]]:
    """Return a policy's rows of responses.jsonl, grouped by prompt: a new prompt begins at sample 0."""
    groups: list[list[dict]] = []
    for row in responses:
        if row["policy"] == policy:
            if row["sample"] == 0:
                groups.append([])
            groups[-1].append(row)
    return groups


def rm_parts(rm: dict) -> list[tuple[str, str, str, str, int]]:
    """List the reward model's accuracy in parts, and how often labelers agree.

    Returns:
        (of what, which, share, its 95 % interval, pairs) of each part.
    """
    out = []
    for key, what in (("accuracy_by_k", "right at K ="), ("accuracy_by_labeler", "right with")):
        for name, part in (rm.get(key) or {}).items():
            span = part.get("accuracy_ci95")
            shown = interval(*span, 1) if span else "–"
            out.append((what, name, percent(part["accuracy"], 1), shown, part["n_pairs"]))
    for pair, part in (rm.get("agreement_by_labelers") or {}).items():
        out.append(("labelers agree:", pair, percent(part["agreement"], 1), "–", part["n_pairs"]))
    return out


# -- samples ---------------------------------------------------------------------------------------------


def side_by_side(responses: list[dict], results: dict, count: int) -> list[tuple[str, list[dict]]]:
    """Groups (title, prompts with every policy's answer): largest gains and losses, some in between, and
    where the reward model flatters most. Chosen by rule, so that nobody picks the nice ones."""
    names = list(results["policies"])
    main = next((n for n in ("ppo", "dpo") if n in names), names[-1])
    answers = {n: [rows[0] for rows in by_prompt(responses, n)] for n in names}
    gold = results["judge"] == "gold"
    judged = {n: [r["gold"]["overall"] if gold else r["score"] or 0.0 for r in answers[n]] for n in (main, "sft")}
    total = len(answers["sft"])
    order = sorted(range(total), key=lambda i: (judged["sft"][i] - judged[main][i], i))
    part = max(1, min(count, total) // (4 if gold else 3))
    groups = [
        (f"{NAMES[main]} gains most over SFT", order[:part]),
        (f"{NAMES[main]} loses most against SFT", order[::-1][:part]),
    ] * (results["judge"] is not None)
    taken = {i for _, chosen in groups for i in chosen}
    if gold:
        by_score = places([r["score"] for r in answers[main]])
        by_gold = places(judged[main])
        doubtful = sorted(range(total), key=lambda i: by_gold[i] - by_score[i])
        flattered = [i for i in doubtful if i not in taken][:part]
        groups.append((f"the reward model overrates {NAMES[main]} most", flattered))
        taken |= set(flattered)
    rest = [i for i in order if i not in taken]
    some = [rest[(2 * k + 1) * len(rest) // (2 * part)] for k in range(part)] if rest else []
    groups.insert(1, ("in between, at even distances", some))
    prompts = [
        {"prompt": answers["sft"][i]["prompt"], "answers": [(n, answers[n][i]) for n in names]} for i in range(total)
    ]
    return [(title, [prompts[i] for i in chosen]) for title, chosen in groups if chosen]


def places(values: list[float]) -> dict[int, int]:
    """Index → its place when the values are sorted."""
    return {i: place for place, i in enumerate(sorted(range(len(values)), key=lambda i: (values[i], i)))}


def ppo_looks(journal: Journal, count: int) -> list[tuple[int, list[dict]]]:
    """(episode, samples) at `count` moments of training, the first and the last among them."""
    steps = sorted({row["step"] for row in journal.samples} & plots.episodes_by_step(journal).keys())
    if not steps or not journal.metrics:
        return []
    count = min(count, len(steps))
    chosen = sorted({steps[round(k * (len(steps) - 1) / max(1, count - 1))] for k in range(count)})
    episodes = plots.episodes_by_step(journal)
    return [(episodes[step], [r for r in journal.samples if r["step"] == step]) for step in chosen]


# -- lineage ---------------------------------------------------------------------------------------------


def lineage(manifests: dict[str, dict]) -> list[dict]:
    """A row a stage: what it was made of, when, in how long, by which code."""
    common, rows = common_versions(manifests), []
    for stage in (s for s in STAGES if s in manifests):
        m = manifests[stage]
        start, end = (datetime.fromisoformat(m[k]) for k in ("started_at", "finished_at"))
        git = m.get("git")
        rows.append(
            {
                "stage": stage,
                "digest": m["digest"][:12],
                "seed": m["seed"],
                "finished": moment(m["finished_at"]),
                "seconds": (end - start).total_seconds(),
                "inputs": [(name, digest[:12]) for name, digest in sorted(m["inputs"].items())],
                "resumes": m["resumes"],
                "bytes": sum(f["bytes"] for f in m["outputs"].values()),
                "code": git["commit"][:7] + (" + changes" if git["dirty"] else "") if git else "–",
                "differs": [f"{k} {v}" for k, v in m["versions"].items() if common.get(k) != v]
                + [f"{key} overridden" for key in sorted(m["config"].get("overridden", {}))],
            }
        )
    return rows


def common_versions(manifests: dict[str, dict]) -> dict[str, str]:
    """Versions that all stages ran on."""
    first, *others = [m["versions"] for m in manifests.values()]
    return {k: v for k, v in first.items() if all(o.get(k) == v for o in others)}


def drawing(manifests: dict[str, dict]) -> str:
    """The lineage as a picture; an input that another input already stands on is left to the table."""
    stages = [s for s in STAGES if s in manifests]
    direct = {s: {i for i in manifests[s]["inputs"] if i in stages} for s in stages}
    above: dict[str, set[str]] = {}
    for s in stages:
        above[s] = direct[s].union(*(above[i] for i in direct[s]))
    edges = {s: {i for i in direct[s] if not any(i in above[j] for j in direct[s])} for s in stages}
    last = {s for s in stages if not any(s in e for e in edges.values())}
    nodes = {s: (manifests[s]["digest"][:12], s) for s in stages} | {"report": ("this page", "soft")}
    return graph(nodes, edges | {"report": last})


# -- the table that ends a run ---------------------------------------------------------------------------


def show(folder: Path, console) -> None:
    """Print what results.json says, and where the page is. `folder`: the report's artifact."""
    from rich.table import Table
    from rich.text import Text

    file = folder.parent / "evaluate" / "results.json"
    if not file.is_file():
        raise UserError(f"{file}: is missing; `rlhf run evaluate -c CONFIG` makes it")
    results = json.loads(file.read_text(encoding="utf-8"))
    policies, gold = results["policies"], results["judge"] == "gold"
    table = Table(
        title=f"{folder.parent.name}: policies on evaluation prompts",
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("policy", no_wrap=True)
    split = any(p["gold_held_out_tasks"] for p in policies.values())
    figures = ["score", "win rate against SFT", "KL to SFT", "perplexity", "length"]
    for column in ["gold", *["new tasks"] * split, *figures] if gold else figures:
        table.add_column(column, justify="right", no_wrap=True)
    fair = [n for n, p in policies.items() if not p["judge_climbed"]]
    # what climbed its judge is no winner by it
    best = None if results["judge"] is None else max(fair, key=lambda n: quality(policies[n]))
    for name, p in policies.items():
        rate = p["win_rate_vs_sft"]
        won = "–" if name == "sft" or rate is None else f"{percent(rate['value'])}  ({interval(*rate['ci95'])})"
        cells = [
            NAMES[name] + marks(p),
            *([fixed(p["gold"]["overall"], 3)] if gold else []),
            *([fixed(p["gold_held_out_tasks"]["overall"], 3)] if gold and split else []),
            fixed(p["score"]),
            won,
            fixed(p["kl_to_sft"], 1),
            fixed(p["pretrain_perplexity"]),
            fixed(p["length"], 1),
        ]
        table.add_row(*cells, style="green" if name == best else "")
    console.print()
    console.print(table)
    rm = results["reward_model"]
    if number(rm["accuracy"]) is not None:
        beside = [
            f"{text} {fixed(100 * rm[key], 1)}"
            for key, text in (("accuracy_ceiling", "best reachable"), ("labeler_agreement", "labelers"))
            if number(rm[key]) is not None
        ]
        more = f"; {', '.join(beside)}" if beside else ""
        console.print(
            Text(
                f"\nreward model: right on {percent(rm['accuracy'], 1)} of held-out pairs "
                f"({interval(*rm['accuracy_ci95'], 1)}){more}"
            )
        )
    for line in notes(results):
        console.print(Text(line, style="dim"), soft_wrap=True)
    console.print(Text(f"report: {folder / 'index.html'}", style="bold"), soft_wrap=True)


def marks(policy: dict) -> str:
    """Return the marks behind a policy's name in the table; `notes` says what they mean."""
    return " *" * (policy["asked"] != "chat") + " †" * policy["judge_climbed"]


def notes(results: dict) -> list[str]:
    """Say below the table what its columns and marks mean."""
    policies, gold = results["policies"], results["judge"] == "gold"
    lines = ["win rates with 95 % intervals, ties half; KL in nats and length in tokens a response"]
    if gold:
        lines.append("gold is the world's own scorer, 0 to 1; new tasks: over prompts whose task no training data set")
    elif results["judge"] is not None:
        lines.append("judged by the reward model")
    else:
        lines.append("no reward model judged")
    asked = {p["asked"] for p in policies.values()} - {"chat"}
    lines += [f"* {ASKED[form]}, not through the chat template" for form in sorted(asked)]
    if any(p["judge_climbed"] for p in policies.values()):
        lines.append("† trained to please the judge, or selected by it: what the judge says of it is too good")
    return lines
