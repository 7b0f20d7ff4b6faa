"""Measure what whole rankings are worth, for reward models and for DPO.

    python tests/benchmarks/rankings.py [-c configs/tiny.yaml] [--seeds 3 4 5 6 7] [--pairs 2880]

Reward models, with one labeler for each prompt, the same learning rate and about as many steps a
pass:
  one pair a prompt      `--pairs` prompts with one judged pair each, 36 a step
  K = 9, equal labels    a 36th of the prompts, so equally many judged pairs; one prompt a step, so
                         also 36 pairs a step
  K = 9, equal compute   as many prompts as make a pass and a step compute as many tokens as with
                         one pair a prompt; this has many more judged pairs (see the table)
The best number of passes for each is found on a seed that is not reported (`--tune-seed`,
`--passes`), so the number of steps differs. A reward model is judged by how often its score orders
two SFT samples of an evaluation prompt as gold does, and by the gold of the best of 16 that it
picks.

Policies: DPO on all pairs of a ranking, DPO with Plackett–Luce on its whole order, and PPO-ptx, all
from the chain of demo_seeds (NAME-seed3 and so on). They are judged by how often a sample's gold
beats that of an SFT sample of the same prompt.

Seeds are the unit: intervals are Student's t over seeds (with one seed: over the tasks of its
evaluation prompts), and differences are paired. Settings of the chains were chosen on seeds 0 to 2.
Writes tables, a page (artifacts/NAME.rankings/index.html) and a JSON line for each variant and seed
in results/rankings.jsonl; experiments are in artifacts/NAME-seed3.rankings/. For configs/tiny.yaml
on two cores, finding the passes takes about twenty minutes, each seed five, and more for each seed
whose chain does not exist yet. Run it again to resume after an interruption. `key=value` changes
settings.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from sweeps.estimates import Series, best_of, difference, estimate, gold_order, unit_of
from sweeps.page import page
from sweeps.points import provenance, samples_of, save_rows, series_of
from sweeps.runner import ExperimentRunner, make_parser, parse_arguments, relative, run_command, sampling_overrides
from sweeps.text import span, with_interval

from data.encode import encode_prompt, encode_response
from data.records import judged_pairs
from data.source import Source
from data.sources import load
from pipeline.errors import UserError
from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore
from pipeline.tracking import format_duration
from stages.evaluation.statistics import wins
from stages.models.loading import load_tokenizer
from stages.page.numbers import fixed
from stages.page.plot import Plot, RowMark, Rows

HERE = Path(__file__).resolve().parent

SEEDS = (3, 4, 5, 6, 7)
"""Settings were chosen on seeds 0 to 2, so these are others."""
K = 9
"""Responses of a whole ranking."""
PAIRS_OF_K = K * (K - 1) // 2
SAMPLES = 16
"""Samples of each evaluation prompt."""
ORDERED, BEST, WINS = "ordered as gold", f"gold of best of {SAMPLES}", "gold wins against SFT"
ONE_PAIR, EQUAL_LABELS, EQUAL_COMPUTE = MODELS = ("one pair a prompt", "K = 9, equal labels", "K = 9, equal compute")
POLICIES = {
    "DPO, pairs": ("dpo", ["dpo.loss_type=sigmoid", "dpo.loss_weights=null"]),
    "DPO, Plackett–Luce": ("dpo", ["dpo.loss_type=plackett_luce", "dpo.loss_weights=null"]),
    "PPO-ptx": ("ppo", []),
}
"""Name → (stage, settings)."""


@dataclass(frozen=True)
class Outcome:
    """Hold the results of one variant on one seed."""

    name: str
    """Name of the variant."""
    seed: int
    """The seed."""
    figures: dict[str, Series]
    """Figure → its value for each evaluation prompt."""
    manifest: dict
    """Manifest of the stage that trained it."""
    trained_on: dict[str, float]
    """Prompts, labelled pairs, pairs a step, passes and steps; {} for a policy."""


def run(argv: list[str], stop: StopFlag) -> None:
    """Train and sample every variant on every seed; write the page, the tables and the lines."""
    args = parse(argv)
    runner = ExperimentRunner(args.config, args.overrides, stop)
    bench = Benchmark(runner, args, runner.main_experiment(), time.monotonic())
    check_comparable(args, bench.first)
    tried, passes = bench.choose_passes()
    outcomes: list[Outcome] = []
    for seed in args.seeds:
        outcomes += bench.measure(seed, passes)
    rows = [line(bench.first.name, args, outcome, tuning=True) for outcome in tried]
    rows += [line(bench.first.name, args, outcome, tuning=False) for outcome in outcomes]
    save_rows(args.results / "rankings.jsonl", rows, row_key)

    variants = {name: [one for one in outcomes if one.name == name] for name in (*MODELS, *POLICIES)}
    seeds = " ".join(map(str, args.seeds))
    tables = [model_table(variants), policy_table(variants)]
    for heading, columns_and_rows in zip(("reward models", "policies"), tables, strict=True):
        runner.print_table(f"{bench.first.name}, seeds {seeds}: {heading}", *columns_and_rows)
    sentences = [*conditions(variants, args), *verdicts(variants)]
    for text in sentences:
        runner.print_line(text)
    file = Path(args.artifacts) / f"{bench.first.name}.rankings" / "index.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    title = f"{bench.first.name}: what whole rankings are worth"
    meta = f"{args.config}, seeds {seeds}, {max(row['date'] for row in rows)}"
    file.write_text(page(title, meta, sentences, plots_of(variants), tables), encoding="utf-8")
    runner.print_line(f"\nlines: {relative(args.results / 'rankings.jsonl')}")
    runner.print_line(f"picture: {file} ({bench.so_far()})")


def parse(argv: list[str]) -> Namespace:
    """Parse the command line."""
    parser = make_parser("rankings.py", __doc__, HERE / "results")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="seeds to run")
    parser.add_argument(
        "--pairs", type=int, default=80 * PAIRS_OF_K, metavar="N", help=f"judged pairs; a multiple of {PAIRS_OF_K}"
    )
    parser.add_argument(
        "--passes", nargs="+", type=float, default=[1, 2, 4, 8], metavar="X",
        help="numbers of passes to try for each reward model; a single number is used without a trial",
    )  # fmt: skip
    parser.add_argument("--tune-seed", type=int, default=2, metavar="N", help="seed for trying the passes")
    args = parse_arguments(parser, argv)
    args.seeds, args.passes = list(dict.fromkeys(args.seeds)), sorted(set(args.passes))
    return args


def check_comparable(args: Namespace, experiment: Any) -> None:
    """Raise a UserError if the settings do not allow the comparison."""
    errors = []
    if args.pairs % PAIRS_OF_K or args.pairs < 2 * PAIRS_OF_K:
        hint = f"use a multiple of {PAIRS_OF_K}, at least {2 * PAIRS_OF_K}"
        errors.append(f"command line: --pairs is {args.pairs}; {hint}")
    if experiment.data.rankings is not None or experiment.data.evaluation_prompts != "world":
        errors.append("data: the comparison needs the embedded world's labelers and gold; use data.rankings=null")
    if args.pairs > experiment.world.prompts:
        errors.append(
            f"command line: --pairs is {args.pairs}, but the world has {experiment.world.prompts} prompts; use fewer"
        )
    if args.passes[1:] and args.tune_seed in args.seeds:
        errors.append(f"command line: --tune-seed {args.tune_seed} is also reported; remove it from --seeds")
    if errors:
        raise UserError(errors)


@dataclass(frozen=True)
class Benchmark:
    """Hold the experiments of all seeds and variants."""

    runner: ExperimentRunner
    """Runs the experiments."""
    args: Namespace
    """The command line."""
    first: Any
    """The config's own experiment."""
    began: float
    """When the program started, by time.monotonic."""

    def so_far(self) -> str:
        """Return the time since the start, as text."""
        return format_duration(time.monotonic() - self.began)

    def choose_passes(self) -> tuple[list[Outcome], dict[str, float]]:
        """Return the trials (none of a single number), and the passes of each reward model."""
        if not self.args.passes[1:]:
            return [], dict.fromkeys(MODELS, self.args.passes[0])
        tried = self.try_passes()
        passes = best_passes(tried)
        self.runner.print_line(f"\nrankings: best numbers of passes by order on seed {self.args.tune_seed}: {passes}")
        return tried, passes

    def try_passes(self) -> list[Outcome]:
        """Train each reward model with every number of passes, on the seed that is not reported."""
        seed = self.args.tune_seed
        self.update_chain(seed, "sft")
        sizes = self.sizes_of(seed, self.args.passes[0])
        outcomes = []
        for name in MODELS:
            outcomes += [self.model(seed, name, sizes[name], passes) for passes in self.args.passes]
        return outcomes

    def measure(self, seed: int, passes: dict[str, float]) -> list[Outcome]:
        """Train and sample every variant on a seed; `passes` gives those of each reward model."""
        self.update_chain(seed, "ppo", "dpo")
        sizes = self.sizes_of(seed, passes[ONE_PAIR])
        outcomes = [self.model(seed, name, sizes[name], passes[name]) for name in MODELS]
        _, sft = self.update(seed, "SFT", "sft", [])
        for name, (policy, settings) in POLICIES.items():
            store, samples = self.update(seed, name, policy, settings)
            outcomes.append(Outcome(name, seed, policy_figures(samples, sft), store.manifest(policy), {}))
        return outcomes

    def chain(self, seed: int) -> tuple[list[str], ArtifactStore]:
        """Return the overrides that make the chain of a seed, and its artifacts."""
        overrides = [f"seed={seed}", f"name={self.first.name}-seed{seed}"]
        return overrides, ArtifactStore(self.args.artifacts, f"{self.first.name}-seed{seed}")

    def update_chain(self, seed: int, *targets: str) -> None:
        """Bring the chain of a seed up to date, as far as the target stages."""
        overrides, main = self.chain(seed)
        self.runner.print_line(f"\nrankings, seed {seed}: the chain ({self.so_far()} so far)")
        self.runner.update(self.runner.load(*overrides), main, *targets)

    def update(self, seed: int, name: str, policy: str, settings: list[str]) -> tuple[ArtifactStore, dict]:
        """Bring the experiment of a variant up to date.

        Args:
            seed: The seed.
            name: Name of the variant.
            policy: Policy that is sampled.
            settings: Overrides on top of the chain's.

        Returns:
            Its artifacts and the samples in them.
        """
        overrides, main = self.chain(seed)
        self.runner.print_line(f"\nrankings, seed {seed}: {name} ({self.so_far()} so far)")
        short = re.sub("[^a-z0-9]+", "-", name.lower())
        variant = self.runner.load(
            *overrides, f"name={short}", *settings, *sampling_overrides(self.first, policy, SAMPLES)
        )
        store = ArtifactStore(Path(self.args.artifacts) / f"{self.first.name}-seed{seed}.rankings", short)
        self.runner.update_variant(variant, store, "samples", main, *self.siblings(store))
        return store, samples_of(store)

    def siblings(self, store: ArtifactStore) -> list[ArtifactStore]:
        """Return the other variants of the same seed.

        Reward models with another number of passes have the same rankings, which can be shared.
        """
        folder = Path(store.base).parent
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return [ArtifactStore(folder, name) for name in names if name != Path(store.base).name]

    def sizes_of(self, seed: int, passes: float) -> dict[str, tuple[int, int]]:
        """Return the prompts of each reward model, and the prompts of a step.

        The number of tokens of a pair is read from the rankings of `ONE_PAIR`, which are made for
        it.

        Args:
            seed: The seed.
            passes: Passes of `ONE_PAIR`.

        Returns:
            Reward model → (prompts, prompts of a step).
        """
        pairs = self.args.pairs
        sizes = {ONE_PAIR: (pairs, PAIRS_OF_K), EQUAL_LABELS: (pairs // PAIRS_OF_K, 1)}
        store, _ = self.update(
            seed, f"{ONE_PAIR}, {passes:g} passes", "sft", reward_model_overrides(ONE_PAIR, sizes[ONE_PAIR], passes)
        )
        share = tokens_share(store, self.chain(seed)[1].folder("sft") / "model")
        return sizes | {EQUAL_COMPUTE: (max(2, round(pairs * share)), max(1, round(PAIRS_OF_K * share)))}

    def model(self, seed: int, name: str, size: tuple[int, int], passes: float) -> Outcome:
        """Train a reward model and score samples of SFT with it.

        Args:
            seed: The seed.
            name: Name of the reward model.
            size: Prompts, and prompts of a step.
            passes: Passes over its data.

        Returns:
            The outcome.
        """
        store, samples = self.update(
            seed, f"{name}, {passes:g} passes", "sft", reward_model_overrides(name, size, passes)
        )
        rows = load("rankings", Source(path=store.folder("rankings") / "train.jsonl"))
        pairs = sum(verdict == "usable" for row in rows for _, _, verdict in judged_pairs(row))
        steps = max(1, round(passes * len(rows) / size[1]))
        trained = {
            "prompts": len(rows),
            "pairs": pairs,
            "pairs_a_step": pairs * passes / steps,
            "passes": passes,
            "steps": steps,
        }
        return Outcome(name, seed, model_figures(samples), store.manifest("rm"), trained)


def reward_model_overrides(name: str, size: tuple[int, int], passes: float) -> list[str]:
    """Return the settings of a reward model, with one labeler for each prompt.

    Args:
        name: Name of the reward model.
        size: Prompts, and prompts of a step.
        passes: Passes over its data.

    Returns:
        The settings as overrides.
    """
    prompts, prompts_per_step = size
    return [
        f"rankings.num_prompts={prompts}",
        f"rankings.samples_per_prompt={2 if name == ONE_PAIR else K}",
        "rankings.labelers_per_prompt=1",
        f"rm.per_device_train_batch_size={prompts_per_step}",
        "rm.gradient_accumulation_steps=1",
        "rm.max_steps=null",
        f"rm.num_train_epochs={passes!r}",
    ]


def tokens_share(store: ArtifactStore, tokenizer_folder: Path) -> float:
    """Compute (P + 2R) / (P + 9R) from the mean lengths of the pairs' prompts and responses."""
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = load("rankings", Source(path=store.folder("rankings") / "train.jsonl", limit=500))
    prompt = np.mean([len(encode_prompt(tokenizer, row.prompt)) for row in rows])
    response = np.mean([len(encode_response(tokenizer, text)) for row in rows for text in row.responses])
    return float((prompt + 2 * response) / (prompt + K * response))


def best_passes(tried: list[Outcome]) -> dict[str, float]:
    """Return for each reward model the passes after which it orders samples best."""
    best: dict[str, Outcome] = {}
    for one in tried:
        if one.name not in best or one.figures[ORDERED].mean() > best[one.name].figures[ORDERED].mean():
            best[one.name] = one
    return {name: one.trained_on["passes"] for name, one in best.items()}


def model_figures(samples: dict) -> dict[str, Series]:
    """Return the figures of a reward model for each prompt.

    Args:
        samples: Samples of SFT with score and gold.

    Returns:
        How often two samples are ordered as by gold (NaN if gold is equal in all), and the gold of
        the best of 16.
    """
    scores, gold = np.array(samples["scores"]), np.array(samples["gold"])
    figures = {ORDERED: gold_order(scores, gold), BEST: best_of(scores, gold, SAMPLES)}
    return {key: series_of(samples, values) for key, values in figures.items()}


def policy_figures(samples: dict, sft: dict) -> dict[str, Series]:
    """Return the figures of a policy for each prompt.

    Args:
        samples: Samples of the policy.
        sft: Samples of SFT on the same prompts.

    Returns:
        How often gold beats SFT's, gold, gold less SFT's, and KL to SFT in nats a response.
    """
    gold, theirs = np.array(samples["gold"]), np.array(sft["gold"])
    figures = {
        WINS: wins(gold, theirs),
        "gold": gold.mean(1),
        "gold less SFT's": gold.mean(1) - theirs.mean(1),
        "KL to SFT": np.array(samples["kl"]).mean(1),
    }
    return {key: series_of(samples, values) for key, values in figures.items()}


def line(experiment: str, args: Namespace, outcome: Outcome, tuning: bool) -> dict:
    """Return the JSON object of a variant and seed.

    Args:
        experiment: Name of the config's own experiment.
        args: The command line.
        outcome: The outcome; its intervals are over tasks.
        tuning: Whether it was a trial of the number of passes.

    Returns:
        The object.
    """
    return {
        "bench": "rankings",
        "experiment": experiment,
        "variant": outcome.name,
        "seed": outcome.seed,
        "tuning": tuning,
        **{key: estimate([one], share=key in (ORDERED, BEST, WINS, "gold")) for key, one in outcome.figures.items()},
        "accuracy_on_labels": outcome.manifest["metrics"].get("accuracy"),
        "trained_on": outcome.trained_on,
        "overrides": args.overrides,
        **provenance(outcome.manifest),
    }


def row_key(row: dict) -> tuple:
    """Return what identifies a line."""
    passes = row["trained_on"].get("passes", 0) if row["tuning"] else 0
    return row["experiment"], row["tuning"], row["variant"], row["seed"], passes


# ── all seeds together ────────────────────────────────────────────────────────────────────────────


def series(variants: dict[str, list[Outcome]], name: str, key: str) -> list[Series]:
    """Return a figure of a variant for each seed."""
    return [one.figures[key] for one in variants[name]]


def model_table(variants: dict[str, list[Outcome]]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: the training data and figures of the reward models."""
    rows = []
    for name in MODELS:
        trained = trained_on(variants, name)
        counts = [f"{trained[key]:,.0f}" for key in ("prompts", "pairs", "pairs_a_step")]
        passes = f"{trained['passes']:g} ({trained['steps']:,.0f})"
        figures = [with_interval(estimate(series(variants, name, key), share=True)) for key in (ORDERED, BEST)]
        rows.append([name, *counts, passes, *figures])
    return ["reward model", "prompts", "labels (pairs)", "pairs a step", "passes (steps)", ORDERED, BEST], rows


def trained_on(variants: dict[str, list[Outcome]], name: str) -> dict[str, float]:
    """Return what a reward model was trained on, averaged over seeds."""
    each = [one.trained_on for one in variants[name]]
    return {key: float(np.mean([one[key] for one in each])) for key in each[0]}


def policy_table(variants: dict[str, list[Outcome]]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: the figures of the policies."""
    rows = []
    for name in POLICIES:
        keys = list(variants[name][0].figures)
        figures = [with_interval(estimate(series(variants, name, key), share=key in (WINS, "gold"))) for key in keys]
        rows.append([name, *figures])
    return ["policy", *keys], rows


def conditions(variants: dict[str, list[Outcome]], args: Namespace) -> list[str]:
    """Return sentences on what is equal among the reward models and what is not."""
    one, labels, compute = (trained_on(variants, name) for name in MODELS)
    chosen = f"the number of passes was chosen for each on seed {args.tune_seed}, which is not reported"
    if not args.passes[1:]:
        chosen = f"each took {args.passes[0]:g} passes"
    edge = []
    if args.passes[1:]:
        edge = [name for name in MODELS if trained_on(variants, name)["passes"] == args.passes[-1]]
    sentences = [
        f"Intervals are 95 %, over {unit_of(series(variants, ONE_PAIR, BEST))}; differences are paired.",
        f"{EQUAL_LABELS} has as many labelled pairs in total ({labels['pairs']:,.0f}, against "
        f"{one['pairs']:,.0f} with one pair a prompt) and in a step, and the same learning rate; {chosen}, so steps "
        f"({labels['steps']:,.0f} and {one['steps']:,.0f}) and computed tokens differ.",
        f"{EQUAL_COMPUTE} computes as many tokens in a pass and in a step as one pair a prompt, with "
        f"{compute['pairs'] / one['pairs']:.1f} times the labels ({compute['pairs']:,.0f}).",
    ]
    if edge:
        sentences.append(f"For {' and '.join(edge)} the most passes tried were best; more might be better.")
    return sentences


def verdicts(variants: dict[str, list[Outcome]]) -> list[str]:
    """Return a sentence for each comparison: the paired difference with its interval."""
    pairs, whole, ppo = POLICIES
    sentences = [
        compared(variants, name, ONE_PAIR, ORDERED, "orders {} often as gold does than one pair a prompt".format)
        for name in (EQUAL_LABELS, EQUAL_COMPUTE)
    ]
    for ours, theirs in ((whole, pairs), (ppo, pairs), (ppo, whole)):
        sentences.append(compared(variants, ours, theirs, WINS, f"wins {{}} often against SFT than {theirs}".format))
    return sentences


def compared(
    variants: dict[str, list[Outcome]], ours: str, theirs: str, key: str, predicate: Callable[[str], str]
) -> str:
    """Return a sentence on how a figure of two variants differs, paired by prompt and seed.

    Args:
        variants: Variant → its outcomes.
        ours: One variant.
        theirs: The other one.
        key: The figure.
        predicate: "0.123 more" or "0.123 less" → the predicate of the sentence.

    Returns:
        The sentence.
    """
    gap = difference(series(variants, ours, key), series(variants, theirs, key))
    low, high = gap["ci95"]
    verdict = "" if low > 0 or high < 0 else ": no clear difference"
    more = f"{fixed(abs(gap['value']), 3)} {'less' if gap['value'] < 0 else 'more'}"
    return f"{ours} {predicate(more)} (95 % interval of the difference {span(gap['ci95'])}){verdict}."


def plots_of(variants: dict[str, list[Outcome]]) -> list[Plot]:
    """Return the plots: reward models by their order, policies by their win rate."""
    model_rows = [(name, [row_mark(variants, name, ORDERED, "rm")]) for name in MODELS]
    policy_rows = [(name, [row_mark(variants, name, WINS, stage)]) for name, (stage, _) in POLICIES.items()]
    note = f"Bars: 95 % intervals over {unit_of(series(variants, ONE_PAIR, ORDERED))}."
    order = "How often the score orders two SFT samples of an evaluation prompt as gold does."
    wins_text = "How often gold prefers a sample to one of SFT's for the same evaluation prompt, ties half."
    return [
        Plot(
            "reward-models", "Reward models", f"{order} {note}", Rows(model_rows, ORDERED, reference=0.5), size="full"
        ),
        Plot("policies", "Policies", f"{wins_text} {note}", Rows(policy_rows, WINS, reference=0.5), size="full"),
    ]


def row_mark(variants: dict[str, list[Outcome]], name: str, key: str, tone: str) -> RowMark:
    """Return the dot of a variant with its interval.

    Args:
        variants: Variant → its outcomes.
        name: The variant.
        key: The figure.
        tone: Its colour.

    Returns:
        The mark.
    """
    figure = estimate(series(variants, name, key), share=True)
    return RowMark(figure["value"], tone, f"{figure['value']:.3f}", figure["ci95"])


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
