"""What whole rankings are worth: reward models from K = 9 against one pair a prompt, and DPO from orders against pairs.

    python tests/benchmarks/rankings.py [-c configs/tiny.yaml] [--seeds 3 4 5 6 7] [--pairs 2880] [key=value …]

Reward models, one labeler a prompt, all with the same learning rate and about as many steps a pass:
  one pair a prompt      `--pairs` prompts with one judged pair each, 36 a step
  K = 9, equal labels    a 36th of the prompts, so as many judged pairs; one prompt a step, so 36 pairs a step, too
  K = 9, equal compute   so many prompts that a pass and a step compute as many tokens as for one pair a prompt; its
                         judged pairs are many more (the table says how many)
How many passes suit each is tried on a seed that is not reported (`--tune-seed`, `--passes`); so the number of steps
differs. A reward model is judged by how often its score orders two SFT samples of an evaluation prompt as gold does,
and by the gold of the best of 16 that it picks.
Policies: DPO on all pairs of a ranking, DPO by Plackett–Luce on its whole order, and PPO-ptx, all from the chain of
demo_seeds (NAME-seed3 …), by how often a sample's gold beats that of an SFT sample of the same prompt.

Seeds are the unit: intervals are Student's t over seeds (with one seed: over the tasks of its evaluation prompts), and
differences are paired. Settings of the chains were chosen on seeds 0 to 2. Leaves tables, a page
(artifacts/NAME.rankings/index.html) and a JSON line a variant and seed in results/rankings.jsonl; experiments are in
artifacts/NAME-seed3.rankings/ …. On configs/tiny.yaml and two cores: about twenty minutes for the passes, five minutes
a seed, and more for each seed whose chain is not there yet. Run it again to go on where it was stopped.
"""

import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the code beside this file, wherever another copy is installed

from sweeps.beside import Workshop, command, options, parsed, relative, sampling  # noqa: E402
from sweeps.estimates import Series, best_of, difference, estimate, gold_order, unit_of  # noqa: E402
from sweeps.page import page  # noqa: E402
from sweeps.points import keep, provenance, samples_of, series_of  # noqa: E402
from sweeps.words import span, with_interval  # noqa: E402

from data.encode import encode_prompt, encode_response  # noqa: E402
from data.records import judged_pairs  # noqa: E402
from data.sources import load  # noqa: E402
from pipeline.errors import UserError  # noqa: E402
from pipeline.stage import StopFlag  # noqa: E402
from pipeline.store.artifacts import ArtifactStore  # noqa: E402
from pipeline.tracking import format_duration  # noqa: E402
from stages.evaluation.statistics import wins  # noqa: E402
from stages.models.loading import load_tokenizer  # noqa: E402
from stages.page.numbers import fixed  # noqa: E402
from stages.page.plot import Plot, RowMark, Rows  # noqa: E402

SEEDS = (3, 4, 5, 6, 7)
"""Settings were chosen on seeds 0 to 2."""
K = 9
PAIRS_OF_K = K * (K - 1) // 2
SAMPLES = 16
ORDERED, BEST, WINS = "ordered as gold", f"gold of best of {SAMPLES}", "gold wins against SFT"
ONE_PAIR, EQUAL_LABELS, EQUAL_COMPUTE = MODELS = ("one pair a prompt", "K = 9, equal labels", "K = 9, equal compute")
POLICIES = {  # name: (stage, settings)
    "DPO, pairs": ("dpo", ["dpo.loss_type=sigmoid", "dpo.loss_weights=null"]),
    "DPO, Plackett–Luce": ("dpo", ["dpo.loss_type=plackett_luce", "dpo.loss_weights=null"]),
    "PPO-ptx": ("ppo", []),
}


@dataclass(frozen=True)
class Found:
    """What one variant came to on one seed."""

    name: str
    seed: int
    figures: dict[str, Series]
    """A number for each evaluation prompt, by figure."""
    manifest: dict
    """Of the stage that trained it."""
    trained_on: dict[str, float]
    """Prompts, labelled pairs, pairs a step, passes and steps of a reward model; {} for a policy."""


def run(argv: list[str], stop: StopFlag) -> None:
    asked = parse(argv)
    shop = Workshop(asked.config, asked.overrides, stop)
    bench = Bench(shop, asked, shop.open(), time.monotonic())
    refuse(asked, bench.first)
    tried: list[Found] = []
    passes = dict.fromkeys(MODELS, asked.passes[0])
    if asked.passes[1:]:
        tried = bench.try_passes()
        passes = best_passes(tried)
        shop.say(f"\nrankings: passes that order best as gold does on seed {asked.tune_seed}: {passes}")
    found = [one for seed in asked.seeds for one in bench.measure(seed, passes)]
    rows = [
        line(bench.first.name, asked, one, tuning) for some, tuning in ((tried, True), (found, False)) for one in some
    ]
    keep(asked.results / "rankings.jsonl", rows, key_of)

    variants = {name: [one for one in found if one.name == name] for name in (*MODELS, *POLICIES)}
    seeds = " ".join(map(str, asked.seeds))
    tables = [model_table(variants), policy_table(variants)]
    for what, one in zip(("reward models", "policies"), tables, strict=True):
        shop.show(f"{bench.first.name}, seeds {seeds}: {what}", *one)
    sentences = [*conditions(variants, asked), *verdicts(variants)]
    for text in sentences:
        shop.say(text)
    file = Path(asked.artifacts) / f"{bench.first.name}.rankings" / "index.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    title = f"{bench.first.name}: what whole rankings are worth"
    meta = f"{asked.config}, seeds {seeds}, {max(row['date'] for row in rows)}"
    file.write_text(page(title, meta, sentences, plots_of(variants), tables), encoding="utf-8")
    shop.say(f"\nlines: {relative(asked.results / 'rankings.jsonl')}")
    shop.say(f"picture: {file} ({bench.so_far()})")


def parse(argv: list[str]) -> Namespace:
    parser = options("rankings.py", __doc__, HERE / "results")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="a chain each")
    parser.add_argument("--pairs", type=int, default=80 * PAIRS_OF_K, metavar="N", help=f"a multiple of {PAIRS_OF_K}")
    parser.add_argument(
        "--passes", nargs="+", type=float, default=[1, 2, 4, 8], metavar="X",
        help="passes over its data that are tried for each reward model; with a single number nothing is tried",
    )  # fmt: skip
    parser.add_argument("--tune-seed", type=int, default=2, metavar="N", help="the seed that passes are tried on")
    asked = parsed(parser, argv)
    asked.seeds, asked.passes = list(dict.fromkeys(asked.seeds)), sorted(set(asked.passes))
    return asked


def refuse(asked: Namespace, experiment: Any) -> None:
    """Raise a UserError where the comparison cannot be made."""
    wrong = []
    if asked.pairs % PAIRS_OF_K or asked.pairs < 2 * PAIRS_OF_K:
        should = f"should be a multiple of {PAIRS_OF_K}, at least {2 * PAIRS_OF_K}"
        wrong.append(f"command line: --pairs {asked.pairs}; {should}")
    if experiment.data.rankings is not None or experiment.data.evaluation_prompts != "world":
        wrong.append("data: the comparison needs the embedded world's labelers and gold; set data.rankings=null")
    if asked.pairs > experiment.world.prompts:
        wrong.append(f"command line: --pairs {asked.pairs}; the world has {experiment.world.prompts} prompts")
    if asked.passes[1:] and asked.tune_seed in asked.seeds:
        wrong.append(f"command line: --tune-seed {asked.tune_seed} is reported, too; take it out of --seeds")
    if wrong:
        raise UserError(wrong)


@dataclass(frozen=True)
class Bench:
    """The experiments of all seeds and variants."""

    shop: Workshop
    asked: Namespace
    first: Any
    """The config's own experiment."""
    began: float

    def so_far(self) -> str:
        return format_duration(time.monotonic() - self.began)

    def try_passes(self) -> list[Found]:
        """Train each reward model with every number of passes, on the seed that is not reported."""
        seed = self.asked.tune_seed
        self.bring_chain(seed, "sft")
        sizes = self.sizes_of(seed, self.asked.passes[0])
        return [self.model(seed, name, sizes[name], passes) for name in MODELS for passes in self.asked.passes]

    def measure(self, seed: int, passes: dict[str, float]) -> list[Found]:
        """Train and sample every variant on a seed that is reported."""
        self.bring_chain(seed, "ppo", "dpo")
        sizes = self.sizes_of(seed, passes[ONE_PAIR])
        found = [self.model(seed, name, sizes[name], passes[name]) for name in MODELS]
        _, sft = self.bring(seed, "SFT", "sft", [])
        for name, (policy, settings) in POLICIES.items():
            store, samples = self.bring(seed, name, policy, settings)
            found.append(Found(name, seed, policy_figures(samples, sft), store.manifest(policy), {}))
        return found

    def chain(self, seed: int) -> tuple[list[str], ArtifactStore]:
        """Return the overrides that make the chain of a seed, and its artifacts."""
        names = [f"seed={seed}", f"name={self.first.name}-seed{seed}"]
        return names, ArtifactStore(self.asked.artifacts, f"{self.first.name}-seed{seed}")

    def bring_chain(self, seed: int, *targets: str) -> None:
        """Bring the chain of a seed up to date."""
        names, main = self.chain(seed)
        self.shop.say(f"\nrankings, seed {seed}: the chain ({self.so_far()} so far)")
        self.shop.bring(self.shop.load(*names), main, *targets)

    def bring(self, seed: int, name: str, policy: str, settings: list[str]) -> tuple[ArtifactStore, dict]:
        """Bring the experiment of a variant up to date; return its artifacts and the samples in it."""
        names, main = self.chain(seed)
        self.shop.say(f"\nrankings, seed {seed}: {name} ({self.so_far()} so far)")
        short = re.sub("[^a-z0-9]+", "-", name.lower())
        beside = self.shop.load(*names, f"name={short}", *settings, *sampling(self.first, policy, SAMPLES))
        store = ArtifactStore(Path(self.asked.artifacts) / f"{self.first.name}-seed{seed}.rankings", short)
        self.shop.bring_beside(beside, store, "samples", main, *self.siblings(store))
        return store, samples_of(store)

    def siblings(self, store: ArtifactStore) -> list[ArtifactStore]:
        """Return the experiments beside this one: those with other passes have the same rankings."""
        folder = Path(store.base).parent
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return [ArtifactStore(folder, name) for name in names if name != Path(store.base).name]

    def sizes_of(self, seed: int, passes: float) -> dict[str, tuple[int, int]]:
        """Return the prompts of each reward model, and the prompts of a step.

        How many tokens a pair takes is read from the rankings of `ONE_PAIR`, which are made for it.
        """
        pairs = self.asked.pairs
        sizes = {ONE_PAIR: (pairs, PAIRS_OF_K), EQUAL_LABELS: (pairs // PAIRS_OF_K, 1)}
        store, _ = self.bring(seed, f"{ONE_PAIR}, {passes:g} passes", "sft", judged(ONE_PAIR, sizes[ONE_PAIR], passes))
        share = tokens_share(store, self.chain(seed)[1].folder("sft") / "model")
        return sizes | {EQUAL_COMPUTE: (max(2, round(pairs * share)), max(1, round(PAIRS_OF_K * share)))}

    def model(self, seed: int, name: str, size: tuple[int, int], passes: float) -> Found:
        """Train a reward model and score samples of SFT with it."""
        store, samples = self.bring(seed, f"{name}, {passes:g} passes", "sft", judged(name, size, passes))
        rows = load("rankings", path=store.folder("rankings") / "train.jsonl")
        pairs = sum(verdict == "usable" for row in rows for _, _, verdict in judged_pairs(row))
        steps = max(1, round(passes * len(rows) / size[1]))
        trained = {
            "prompts": len(rows),
            "pairs": pairs,
            "pairs_a_step": pairs * passes / steps,
            "passes": passes,
            "steps": steps,
        }
        return Found(name, seed, model_figures(samples), store.manifest("rm"), trained)


def judged(name: str, size: tuple[int, int], passes: float) -> list[str]:
    """Return the settings of a reward model: so many prompts, so many of them a step, one labeler each."""
    prompts, of_a_step = size
    return [
        f"rankings.num_prompts={prompts}",
        f"rankings.samples_per_prompt={2 if name == ONE_PAIR else K}",
        "rankings.labelers_per_prompt=1",
        f"rm.per_device_train_batch_size={of_a_step}",
        "rm.gradient_accumulation_steps=1",
        "rm.max_steps=null",
        f"rm.num_train_epochs={passes!r}",
    ]


def tokens_share(store: ArtifactStore, tokenizer_folder: Path) -> float:
    """Compute (P + 2R) / (P + 9R) by the mean lengths of the pairs' own prompts and responses."""
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = load("rankings", path=store.folder("rankings") / "train.jsonl", limit=500)
    prompt = np.mean([len(encode_prompt(tokenizer, row.prompt)) for row in rows])
    response = np.mean([len(encode_response(tokenizer, text)) for row in rows for text in row.responses])
    return float((prompt + 2 * response) / (prompt + K * response))


def best_passes(tried: list[Found]) -> dict[str, float]:
    """Return for each reward model the number of passes after which it orders samples best as gold does."""
    best: dict[str, Found] = {}
    for one in tried:
        if one.name not in best or one.figures[ORDERED].mean() > best[one.name].figures[ORDERED].mean():
            best[one.name] = one
    return {name: one.trained_on["passes"] for name, one in best.items()}


def model_figures(samples: dict) -> dict[str, Series]:
    """Return a number a prompt: how often two SFT samples are ordered as by gold (NaN where gold orders none), and the
    gold of the best of 16."""
    scores, gold = np.array(samples["scores"]), np.array(samples["gold"])
    figures = {ORDERED: gold_order(scores, gold), BEST: best_of(scores, gold, SAMPLES)}
    return {key: series_of(samples, values) for key, values in figures.items()}


def policy_figures(samples: dict, sft: dict) -> dict[str, Series]:
    """Return a number a prompt: how often gold beats SFT's, gold, gold less SFT's, and KL to SFT in nats a response."""
    gold, theirs = np.array(samples["gold"]), np.array(sft["gold"])
    figures = {
        WINS: wins(gold, theirs),
        "gold": gold.mean(1),
        "gold less SFT's": gold.mean(1) - theirs.mean(1),
        "KL to SFT": np.array(samples["kl"]).mean(1),
    }
    return {key: series_of(samples, values) for key, values in figures.items()}


def line(experiment: str, asked: Namespace, found: Found, tuning: bool) -> dict:
    """Return the JSON object of a variant and seed; intervals are over tasks."""
    return {
        "bench": "rankings",
        "experiment": experiment,
        "variant": found.name,
        "seed": found.seed,
        "tuning": tuning,
        **{key: estimate([one], share=key in (ORDERED, BEST, WINS, "gold")) for key, one in found.figures.items()},
        "accuracy_on_labels": found.manifest["metrics"].get("accuracy"),
        "trained_on": found.trained_on,
        "overrides": asked.overrides,
        **provenance(found.manifest),
    }


def key_of(row: dict) -> tuple:
    passes = row["trained_on"].get("passes", 0) if row["tuning"] else 0
    return row["experiment"], row["tuning"], row["variant"], row["seed"], passes


# ── all seeds together ───────────────────────────────────────────────────────────────────────────────────────


def series(variants: dict[str, list[Found]], name: str, key: str) -> list[Series]:
    """Return a figure of a variant, a series a seed."""
    return [one.figures[key] for one in variants[name]]


def model_table(variants: dict[str, list[Found]]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: what each reward model was trained on, and its figures with 95 % intervals."""
    rows = []
    for name in MODELS:
        trained = trained_on(variants, name)
        counts = [f"{trained[key]:,.0f}" for key in ("prompts", "pairs", "pairs_a_step")]
        passes = f"{trained['passes']:g} ({trained['steps']:,.0f})"
        figures = [with_interval(estimate(series(variants, name, key), share=True)) for key in (ORDERED, BEST)]
        rows.append([name, *counts, passes, *figures])
    return ["reward model", "prompts", "labels (pairs)", "pairs a step", "passes (steps)", ORDERED, BEST], rows


def trained_on(variants: dict[str, list[Found]], name: str) -> dict[str, float]:
    """Return what a reward model was trained on, means over seeds."""
    each = [one.trained_on for one in variants[name]]
    return {key: float(np.mean([one[key] for one in each])) for key in each[0]}


def policy_table(variants: dict[str, list[Found]]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: the policies' figures with 95 % intervals."""
    rows = []
    for name in POLICIES:
        keys = list(variants[name][0].figures)
        figures = [with_interval(estimate(series(variants, name, key), share=key in (WINS, "gold"))) for key in keys]
        rows.append([name, *figures])
    return ["policy", *keys], rows


def conditions(variants: dict[str, list[Found]], asked: Namespace) -> list[str]:
    """Say what is equal among the reward models and what is not, and what intervals are over."""
    one, labels, compute = (trained_on(variants, name) for name in MODELS)
    chosen = f"the number of passes was chosen for each on seed {asked.tune_seed}, which is not reported"
    if not asked.passes[1:]:
        chosen = f"each took {asked.passes[0]:g} passes"
    edge = [n for n in MODELS if asked.passes[1:] and trained_on(variants, n)["passes"] == asked.passes[-1]]
    return [
        f"Intervals are 95 %, over {unit_of(series(variants, ONE_PAIR, BEST))}; differences are paired.",
        f"{EQUAL_LABELS} has as many labelled pairs in all ({labels['pairs']:,.0f}, and {one['pairs']:,.0f} with one "
        f"pair a prompt) and in a step, and the same learning rate; {chosen}, so steps ({labels['steps']:,.0f} and "
        f"{one['steps']:,.0f}) and computed tokens differ.",
        f"{EQUAL_COMPUTE} computes as many tokens in a pass and in a step as one pair a prompt, with "
        f"{compute['pairs'] / one['pairs']:.1f} times the labels ({compute['pairs']:,.0f}).",
        *[f"For {' and '.join(edge)} the most passes that were tried were best; more might be better."] * bool(edge),
    ]


def verdicts(variants: dict[str, list[Found]]) -> list[str]:
    """Return a sentence a comparison: the paired difference with its interval."""
    pairs, whole, ppo = POLICIES
    says = [
        compared(variants, name, ONE_PAIR, ORDERED, "orders {} often as gold does than one pair a prompt".format)
        for name in (EQUAL_LABELS, EQUAL_COMPUTE)
    ]
    for ours, theirs in ((whole, pairs), (ppo, pairs), (ppo, whole)):
        says.append(compared(variants, ours, theirs, WINS, f"wins {{}} often against SFT than {theirs}".format))
    return says


def compared(variants: dict[str, list[Found]], ours: str, theirs: str, key: str, says: Callable[[str], str]) -> str:
    """Say how a figure of one variant differs from that of another on the same prompts and seeds."""
    gap = difference(series(variants, ours, key), series(variants, theirs, key))
    low, high = gap["ci95"]
    verdict = "" if low > 0 or high < 0 else ": no clear difference"
    more = f"{fixed(abs(gap['value']), 3)} {'less' if gap['value'] < 0 else 'more'}"
    return f"{ours} {says(more)} (95 % interval of the difference {span(gap['ci95'])}){verdict}."


def plots_of(variants: dict[str, list[Found]]) -> list[Plot]:
    """Draw a dot with its interval a variant: reward models by their order, policies by their win rate."""
    plots = []
    for names, key, title, tones, caption in (
        (
            MODELS,
            ORDERED,
            "Reward models",
            ("rm",) * len(MODELS),
            "How often the score orders two SFT samples of an evaluation prompt as gold does.",
        ),
        (
            tuple(POLICIES),
            WINS,
            "Policies",
            [stage for stage, _ in POLICIES.values()],
            "How often gold prefers a sample to one of SFT's for the same evaluation prompt, ties half.",
        ),
    ):
        rows = []
        for name, tone in zip(names, tones, strict=True):
            found = estimate(series(variants, name, key), share=True)
            rows.append((name, [RowMark(found["value"], tone, f"{found['value']:.3f}", found["ci95"])]))
        note = f" Bars: 95 % intervals over {unit_of(series(variants, names[0], key))}."
        name = title.lower().replace(" ", "-")
        plots.append(Plot(name, title, caption + note, Rows(rows, key, reference=0.5), size="full"))
    return plots


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
