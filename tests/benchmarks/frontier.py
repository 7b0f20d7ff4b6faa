"""Compare reward against KL for PPO, DPO and best of n.

    python tests/benchmarks/frontier.py [-c configs/tiny.yaml] [--seeds 3 4 5] [--kl-coefs 0.02 0.1]

PPO runs over two decades of kl_coef, DPO over beta, and best of n on one set of SFT samples. First
the chain of each seed is brought up to date (NAME-seed3 and so on, those of demo_seeds; ppo and
dpo). Then each other setting is trained and sampled in its own experiment in
artifacts/NAME-seed3.frontier/, which shares the finished stages of the chain. `--seeds` without a
number takes the config's own experiment and seed. Run it again to resume after an interruption, or
to redraw existing results.

Whether gold falls while the score rises is judged by paired differences between the config's own
setting, which was chosen on seeds 0 to 2, and the setting furthest from SFT. (The highest point of
the same data would be too high by chance.) The differences are over seeds if there are several
(Student's t), otherwise over the tasks of the one seed's evaluation prompts. Writes a table,
artifacts/NAME.frontier/index.html, and a JSON line for each point and seed in
results/frontier.jsonl. Takes a quarter of an hour a seed for configs/tiny.yaml on two cores, ten
minutes if the chain exists.
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from sweeps.estimates import SAME, difference, unit_of
from sweeps.page import NAMES, curves, page, plots_of, short, table
from sweeps.points import Point, Variant, best_of_points, policy_point, provenance, samples_of, save_rows, variants_of
from sweeps.runner import (
    ExperimentRunner,
    adaptive_kl_errors,
    make_parser,
    parse_arguments,
    relative,
    run_command,
    sampling_overrides,
)
from sweeps.text import with_interval

from pipeline.errors import UserError
from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore
from pipeline.tracking import format_duration
from stages.page.numbers import fixed

HERE = Path(__file__).resolve().parent

SEEDS = (3, 4, 5)
"""Settings were chosen on seeds 0 to 2, so these are others."""
KL_COEFS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BETAS = (0.1, 0.2, 0.5, 1.0)
KEYS = {"ppo": "kl_coef", "dpo": "beta"}
"""Stage → the setting that is varied."""


def parse(argv: list[str]) -> Namespace:
    """Parse and check the command line."""
    parser = make_parser("frontier.py", __doc__, HERE / "results")
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=SEEDS, help="seeds to run; without a number: the config's own"
    )
    parser.add_argument(
        "--kl-coefs",
        nargs="+",
        type=float,
        default=KL_COEFS,
        metavar="X",
        help="kl_coef of PPO; the config's own is always included",
    )
    parser.add_argument(
        "--betas",
        nargs="*",
        type=float,
        default=BETAS,
        metavar="X",
        help="beta of DPO; the config's own is always included",
    )
    parser.add_argument(
        "--best-of", type=int, default=64, metavar="N", help="SFT samples of each prompt: n = 1, 2, 4 … N"
    )
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="PPO and DPO samples of each prompt")
    args = parse_arguments(parser, argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    if args.best_of < 1:  # other values are checked with the config
        raise UserError(f"command line: --best-of is {args.best_of}; use 1 or more")
    return args


def run(argv: list[str], stop: StopFlag) -> None:
    """Train and sample every setting on every seed; write the page, the table and the lines."""
    args, began = parse(argv), time.monotonic()
    runner = ExperimentRunner(args.config, args.overrides, stop)
    first, planned, outcomes = measure(args, runner, began)
    file = args.results / "frontier.jsonl"
    rows = [line(first.name, args, point, manifest) for point, manifest in outcomes]
    save_rows(file, rows, row_key)
    variants = variants_of([point for point, _ in outcomes])
    own = {"ppo": first.ppo.kl_coef, "dpo": first.dpo.beta, "best_of_n": first.evaluate.best_of}
    sentences: list[str] = []
    for method, curve in curves(variants).items():
        sentences += verdict(curve, own[method])
    title = f"{first.name}: reward against KL"
    seeds = " ".join(str(chain.seed) for chain, _ in planned)
    meta = f"{args.config}, seeds {seeds}, {rows[0]['prompts']} prompts each, {max(row['date'] for row in rows)}"
    html = page(title, meta, sentences, plots_of(variants), [table(variants)])
    html_file = Path(args.artifacts) / f"{first.name}.frontier" / "index.html"
    html_file.parent.mkdir(parents=True, exist_ok=True)
    html_file.write_text(html, encoding="utf-8")
    runner.print_table(f"{title}, seeds {seeds}", *table(variants))
    for text in sentences:
        runner.print_line(text)
    runner.print_line(f"\nlines: {relative(file)}")
    runner.print_line(f"picture: {html_file} ({format_duration(time.monotonic() - began)})")


def measure(args: Namespace, runner: ExperimentRunner, began: float) -> tuple[Any, list, list[tuple[Point, dict]]]:
    """Train and sample every setting on every seed.

    Args:
        args: The command line.
        runner: Runs the experiments of this config.
        began: When the program started, by time.monotonic.

    Returns:
        The config's own experiment; (chain, variations) of each seed, as of `plan`; and each point
        with its manifest, as of `sweep`.

    Raises:
        UserError: The settings do not allow the comparison.
    """
    first = runner.main_experiment()
    if errors := adaptive_kl_errors(first):
        raise UserError(errors)
    chain_overrides = [[f"name={first.name}-seed{seed}", f"seed={seed}"] for seed in args.seeds] or [[]]
    # Validate every setting before anything runs.
    planned = [plan(runner, first, args, overrides) for overrides in chain_overrides]
    outcomes: list[tuple[Point, dict]] = []
    for chain, variations in planned:
        outcomes += sweep(runner, chain, variations, args, began)
    return first, planned, outcomes


def plan(
    runner: ExperimentRunner, first: Any, args: Namespace, chain_overrides: list[str]
) -> tuple[Any, list[tuple[str, dict, Any]]]:
    """Validate a seed's chain and every variation of it.

    Args:
        runner: Runs the experiments of this config.
        first: The config's own experiment.
        args: The command line.
        chain_overrides: Overrides that make the chain of this seed.

    Returns:
        The chain, and (method, setting, experiment) of each variation; best of n first, its setting
        {}.
    """
    seed_overrides = [override for override in chain_overrides if override.startswith("seed=")]
    settings = [("dpo", beta) for beta in with_own(args.betas, first.dpo.beta)]
    settings += [("ppo", coef) for coef in with_own(args.kl_coefs, first.ppo.kl_coef)]
    best_of_n = runner.load(*seed_overrides, "name=best_of_n", *sampling_overrides(first, "sft", args.best_of))
    variations = [("best_of_n", {}, best_of_n)]
    for stage, value in settings:
        varied = runner.load(*seed_overrides, *variant(stage, value), *sampling_overrides(first, stage, args.samples))
        variations.append((stage, {KEYS[stage]: value}, varied))
    return runner.load(*chain_overrides), variations


def sweep(
    runner: ExperimentRunner, chain: Any, variations: list[tuple[str, dict, Any]], args: Namespace, began: float
) -> list[tuple[Point, dict]]:
    """Train and sample every variation of a seed.

    Args:
        runner: Runs the experiments of this config.
        chain: The chain of this seed.
        variations: (method, setting, experiment) of each variation.
        args: The command line.
        began: When the program started, by time.monotonic.

    Returns:
        Each point, with the manifest of the stage that made its policy (best of n: its samples).
    """
    main = ArtifactStore(args.artifacts, chain.name)
    folder = Path(args.artifacts) / f"{chain.name}.frontier"
    runner.print_line(f"\nfrontier, seed {chain.seed}: the chain first, then {len(variations)} variations in {folder}")
    runner.update(chain, main, "ppo", "dpo")
    outcomes: list[tuple[Point, dict]] = []
    for at, (method, setting, variation) in enumerate(variations, start=1):
        store = ArtifactStore(folder, variation.name)
        so_far = format_duration(time.monotonic() - began)
        if method == "best_of_n":
            description = f"best of 1 to {args.best_of}"
        else:
            description = f"{method}.{KEYS[method]} {setting[KEYS[method]]:g}"
        runner.print_line(f"\nfrontier, seed {chain.seed}, {at}/{len(variations)}: {description} ({so_far} so far)")
        runner.update_variant(variation, store, "samples", main)
        if method == "best_of_n":
            ns = [2**i for i in range(int(math.log2(args.best_of)) + 1)]
            points = best_of_points(samples_of(store), ns, chain.seed)
            outcomes += [(point, store.manifest("samples")) for point in points]
        else:
            outcomes.append((policy_point(samples_of(store), method, setting, chain.seed), store.manifest(method)))
    return outcomes


def line(experiment: str, args: Namespace, point: Point, manifest: dict) -> dict:
    """Return the JSON object of a point.

    Args:
        experiment: Name of the config's own experiment.
        args: The command line.
        point: The point.
        manifest: Manifest of the stage that made its policy.

    Returns:
        The object.
    """
    return {
        "bench": "frontier",
        "experiment": experiment,
        "seed": point.seed,
        **point.figures(),
        "samples_per_prompt": args.best_of if point.method == "best_of_n" else args.samples,
        "overrides": args.overrides,
        **provenance(manifest),
    }


def row_key(row: dict) -> tuple:
    """Return what identifies a line."""
    return row["experiment"], row["seed"], row["method"], *row["setting"].values()


def with_own(values: Sequence[float], own: float) -> list[float]:
    """Return the values to sweep with the config's own, each once, the tightest leash first."""
    return sorted({*values, own}, reverse=True)


def variant(stage: str, value: float) -> list[str]:
    """Return the overrides of an experiment that differs from the main one in one setting."""
    key, text = KEYS[stage], f"{value!r}".replace("+", "")
    return [f"name={key}-{text}", f"{stage}.{key}={text}"]


def verdict(curve: Sequence[Variant], own: float) -> list[str]:
    """Return sentences on where a method's gold is highest, and on what further optimization does.

    Args:
        curve: The method's variants, from the nearest to SFT to the furthest.
        own: The config's own setting. For best of n the largest n up to it is taken.

    Returns:
        One or two sentences; none without gold.
    """
    if curve[0].series("gold") is None:
        return []
    name, last = NAMES[curve[0].method][0], curve[-1]
    start = [v for v in curve if v.value == own or (v.method == "best_of_n" and v.value < own)][-1]
    peak = max(curve, key=lambda v: v.estimate("gold")["value"])
    unit = unit_of(last.series("gold"))
    highest = f"Mean gold of {name} is highest at {short(peak)}: {with_interval(peak.estimate('gold'))} over {unit}."
    if start is last:
        return [
            f"{highest} The config's own setting, {short(last)}, is the furthest from SFT here, so no fall can be seen."
        ]
    gold = difference(last.series("gold"), start.series("gold"))
    score = difference(last.series("score"), start.series("score"))
    nats = f"{fixed(start.mean('kl'), 1)} to {fixed(last.mean('kl'), 1)} nats"
    return [
        f"{highest} From the config's own {short(start)} to {short(last)} ({nats}) gold changes by "
        f"{with_interval(gold)} and the score by {with_interval(score, 2)}, paired: {interpretation(gold, score)}."
    ]


def interpretation(gold: dict, score: dict) -> str:
    """Return what the changes in gold and score between two settings say, in words.

    Args:
        gold: Difference in gold, further from SFT less nearer.
        score: The same of the score.

    Returns:
        A clause.
    """
    (gold_low, gold_high), (score_low, score_high) = gold["ci95"], score["ci95"]
    rises, falls = score_low > 0, score_high < 0
    if gold_low >= -SAME and gold_high <= SAME:
        text = f"gold is flat (within ±{SAME})"
        if rises:
            return f"{text} while the score rises"
        return f"{text} while the score falls" if falls else text
    if gold_high < 0:
        if rises:
            return "over-optimisation, the score rises and gold falls"
        if falls:
            return "both fall, so this is not over-optimisation: the policy is also worse by its own reward"
        return "gold falls; whether the score rises or falls cannot be told"
    return "whether gold falls cannot be told"


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
