"""Reward against KL: PPO over two decades of kl_coef, DPO over beta, and best of n from one set of SFT samples.

    python tests/benchmarks/frontier.py [-c configs/tiny.yaml] [--seeds 3 4 5] [--kl-coefs 0.02 0.1] [--betas 0.5]

Brings the chain of each seed up to date (NAME-seed3 …, those of demo_seeds; ppo and dpo), then trains and samples each
other setting in an experiment of its own, in artifacts/NAME-seed3.frontier/ …, that shares the chain's finished stages.
`--seeds` without a number takes the config's own experiment and seed. Run it again to go on where it was stopped, or to
draw again what is there. Whether gold falls while the score rises is told from paired differences between the config's
own setting, which was chosen on seeds 0 to 2, and the one furthest from SFT (a peak looked up in the same numbers would
be too high by chance): over seeds where there are several (Student's t), otherwise over the tasks of the one seed's
evaluation prompts. Leaves a table, artifacts/NAME.frontier/index.html, and a JSON line a point and seed in
results/frontier.jsonl. On configs/tiny.yaml and two cores: a quarter of an hour a seed, ten minutes where the chain is
there.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the code beside this file, wherever another copy is installed

from sweeps.beside import Workshop, adaptive, command, options, parsed, relative, sampling  # noqa: E402
from sweeps.estimates import SAME, difference, unit_of  # noqa: E402
from sweeps.page import NAMES, curves, page, plots_of, short, table  # noqa: E402
from sweeps.points import (  # noqa: E402
    Point,
    Variant,
    best_of_points,
    keep,
    policy_point,
    provenance,
    samples_of,
    variants_of,
)
from sweeps.words import with_interval  # noqa: E402

from pipeline.errors import UserError  # noqa: E402
from pipeline.stage import StopFlag  # noqa: E402
from pipeline.store.artifacts import ArtifactStore  # noqa: E402
from pipeline.tracking import format_duration  # noqa: E402
from stages.page.numbers import fixed  # noqa: E402

SEEDS = (3, 4, 5)
"""Settings were chosen on seeds 0 to 2."""
KL_COEFS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BETAS = (0.1, 0.2, 0.5, 1.0)
KEYS = {"ppo": "kl_coef", "dpo": "beta"}  # stage: what is swept


def parse(argv: list[str]):
    parser = options("frontier.py", __doc__, HERE / "results")
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=SEEDS, help="a chain each; without a number: the config's own"
    )
    parser.add_argument(
        "--kl-coefs", nargs="+", type=float, default=KL_COEFS, metavar="X", help="of PPO; the config's is always in"
    )
    parser.add_argument(
        "--betas", nargs="*", type=float, default=BETAS, metavar="X", help="of DPO; the config's is always in"
    )
    parser.add_argument("--best-of", type=int, default=64, metavar="N", help="samples a prompt of SFT: n = 1, 2, 4 … N")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="samples a prompt of PPO and DPO")
    asked = parsed(parser, argv)
    asked.seeds = list(dict.fromkeys(asked.seeds))
    if asked.best_of < 1:  # the rest is the config's to check
        raise UserError(f"command line: --best-of {asked.best_of}; should be 1 or more")
    return asked


def run(argv: list[str], stop: StopFlag) -> None:
    asked, began = parse(argv), time.monotonic()
    shop = Workshop(asked.config, asked.overrides, stop)
    first = shop.open()
    if lines := adaptive(first):
        raise UserError(lines)
    names = [[f"name={first.name}-seed{seed}", f"seed={seed}"] for seed in asked.seeds] or [[]]
    # every setting is validated before anything runs
    planned = [plan(shop, first, asked, own) for own in names]
    found = [one for chain, variations in planned for one in sweep(shop, chain, variations, asked, began)]

    file, rows = asked.results / "frontier.jsonl", [line(first.name, asked, *one) for one in found]
    keep(file, rows, key_of)
    variants = variants_of([point for point, _ in found])
    own = {"ppo": first.ppo.kl_coef, "dpo": first.dpo.beta, "best_of_n": first.evaluate.best_of}
    sentences = [text for method, curve in curves(variants).items() for text in verdict(curve, own[method])]
    title = f"{first.name}: reward against KL"
    seeds = " ".join(str(chain.seed) for chain, _ in planned)
    meta = f"{asked.config}, seeds {seeds}, {rows[0]['prompts']} prompts each, {max(row['date'] for row in rows)}"
    html = page(title, meta, sentences, plots_of(variants), [table(variants)])
    place = Path(asked.artifacts) / f"{first.name}.frontier" / "index.html"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(html, encoding="utf-8")
    shop.show(f"{title}, seeds {seeds}", *table(variants))
    for text in sentences:
        shop.say(text)
    shop.say(f"\nlines: {relative(file)}")
    shop.say(f"picture: {place} ({format_duration(time.monotonic() - began)})")


def plan(shop: Workshop, first: Any, asked, names: list[str]) -> tuple[Any, list[tuple[str, dict, Any]]]:
    """Validate a seed's chain and every experiment beside it.

    Args:
        shop: The experiments of this config.
        first: The config's own experiment.
        asked: The command line.
        names: Overrides that make the chain of this seed.

    Returns:
        The chain, and (method, setting, experiment) of each that is sampled; best of n first, its setting {}.
    """
    own = [name for name in names if name.startswith("seed=")]
    settings = [("dpo", beta) for beta in with_own(asked.betas, first.dpo.beta)]
    settings += [("ppo", coef) for coef in with_own(asked.kl_coefs, first.ppo.kl_coef)]
    drawn = shop.load(*own, "name=best_of_n", *sampling(first, "sft", asked.best_of))
    variations = [("best_of_n", {}, drawn)]
    for stage, value in settings:
        varied = shop.load(*own, *variant(stage, value), *sampling(first, stage, asked.samples))
        variations.append((stage, {KEYS[stage]: value}, varied))
    return shop.load(*names), variations


def sweep(
    shop: Workshop, chain: Any, variations: list[tuple[str, dict, Any]], asked, began: float
) -> list[tuple[Point, dict]]:
    """Return every point of a seed, with the manifest of the stage that made its policy (best of n: its samples)."""
    main = ArtifactStore(asked.artifacts, chain.name)
    beside = Path(asked.artifacts) / f"{chain.name}.frontier"
    shop.say(
        f"\nfrontier, seed {chain.seed}: the chain first, then {len(variations)} experiments beside it in {beside}"
    )
    shop.bring(chain, main, "ppo", "dpo")
    found: list[tuple[Point, dict]] = []
    for at, (method, setting, variation) in enumerate(variations, start=1):
        store = ArtifactStore(beside, variation.name)
        so_far = format_duration(time.monotonic() - began)
        what = (
            " ".join(f"{method}.{key} {value:g}" for key, value in setting.items()) or f"best of 1 to {asked.best_of}"
        )
        shop.say(f"\nfrontier, seed {chain.seed}, {at}/{len(variations)}: {what} ({so_far} so far)")
        shop.bring_beside(variation, store, "samples", main)
        if method == "best_of_n":
            numbers = [2**i for i in range(int(math.log2(asked.best_of)) + 1)]
            points = best_of_points(samples_of(store), numbers, chain.seed)
            found += [(point, store.manifest("samples")) for point in points]
        else:
            found.append((policy_point(samples_of(store), method, setting, chain.seed), store.manifest(method)))
    return found


def line(experiment: str, asked, point: Point, manifest: dict) -> dict:
    """Return the JSON object of a point."""
    return {
        "bench": "frontier",
        "experiment": experiment,
        "seed": point.seed,
        **point.figures(),
        "samples_per_prompt": asked.best_of if point.method == "best_of_n" else asked.samples,
        "overrides": asked.overrides,
        **provenance(manifest),
    }


def key_of(row: dict) -> tuple:
    return row["experiment"], row["seed"], row["method"], *row["setting"].values()


def with_own(values: Sequence[float], own: float) -> list[float]:
    """The values of a sweep and the config's own, each once, the tightest leash first."""
    return sorted({*values, own}, reverse=True)


def variant(stage: str, value: float) -> list[str]:
    """Overrides of an experiment that differs from the main one in one setting."""
    key, text = KEYS[stage], f"{value!r}".replace("+", "")
    return [f"name={key}-{text}", f"{stage}.{key}={text}"]


def verdict(curve: Sequence[Variant], own: float) -> list[str]:
    """Say where a method's gold is highest, and what gold and score do from the config's own setting outwards.

    Args:
        curve: The method's variants, from the nearest to SFT to the furthest.
        own: The config's own setting. Of best of n the largest n up to it is taken.

    Returns:
        One sentence or two; none where there is no gold.
    """
    if curve[0].series("gold") is None:
        return []
    name, last = NAMES[curve[0].method][0], curve[-1]
    start = [v for v in curve if v.value == own or (v.method == "best_of_n" and v.value < own)][-1]
    peak = max(curve, key=lambda v: v.estimate("gold")["value"])
    unit = unit_of(last.series("gold"))
    says = f"Mean gold of {name} is highest at {short(peak)}: {with_interval(peak.estimate('gold'))} over {unit}."
    if start is last:
        return [f"{says} The config's own setting, {short(last)}, is the furthest from SFT here: no fall can be seen."]
    gold = difference(last.series("gold"), start.series("gold"))
    score = difference(last.series("score"), start.series("score"))
    nats = f"{fixed(start.mean('kl'), 1)} to {fixed(last.mean('kl'), 1)} nats"
    return [
        f"{says} From the config's own {short(start)} to {short(last)} ({nats}) gold changes by {with_interval(gold)} "
        f"and the score by {with_interval(score, 2)}, paired: {reading(gold, score)}."
    ]


def reading(gold: dict, score: dict) -> str:
    """Say in words what the differences in gold and in score, further from SFT less nearer, tell."""
    (gold_low, gold_high), (score_low, score_high) = gold["ci95"], score["ci95"]
    rises, falls = score_low > 0, score_high < 0
    if gold_low >= -SAME and gold_high <= SAME:
        return f"gold is flat (within ±{SAME})" + " while the score rises" * rises + " while the score falls" * falls
    if gold_high < 0:
        if rises:
            return "over-optimisation, the score rises and gold falls"
        if falls:
            return "both fall, so that is no over-optimisation: the policy is worse by its own reward too"
        return "gold falls; whether the score rises or falls cannot be told"
    return "whether gold falls cannot be told"


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
