"""Reward against KL: PPO over two decades of kl_coef, DPO over beta, and best of n from one set of SFT samples.

    python tests/benchmarks/frontier.py -c configs/tiny.yaml [--kl-coefs 0.02 0.1] [--betas 0.5] [key=value …]

Brings the main experiment's chain up to date (ppo and dpo), then trains and samples each other setting in an
experiment of its own, in artifacts/NAME.frontier/, that shares the main one's finished stages. Run it again to go on
where it was stopped, or to draw again what is there. Leaves a table, artifacts/NAME.frontier/index.html, and a JSON
line a point in results/frontier.jsonl. On configs/tiny.yaml and two cores: a quarter of an hour from nothing, ten
minutes after `make demo`.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the code beside this file, wherever another copy is installed

from sweeps.beside import Workshop, adaptive, command, options, parsed, relative, sampling, show  # noqa: E402
from sweeps.estimates import overoptimisation  # noqa: E402
from sweeps.page import NAMES, curves, page, pictures, short, table, value_of  # noqa: E402
from sweeps.points import Point, best_of_points, keep, policy_point, provenance, samples_of  # noqa: E402

from pipeline.artifacts import ArtifactStore  # noqa: E402
from pipeline.errors import UserError  # noqa: E402
from pipeline.running import duration  # noqa: E402
from pipeline.stage import StopFlag  # noqa: E402
from stages.report import fixed  # noqa: E402

KL_COEFS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BETAS = (0.1, 0.2, 0.5, 1.0)
KEYS = {"ppo": "kl_coef", "dpo": "beta"}  # stage: what is swept


def parse(argv: list[str]):
    parser = options("frontier.py", __doc__, HERE / "results")
    parser.add_argument(
        "--kl-coefs", nargs="+", type=float, default=KL_COEFS, metavar="X", help="of PPO; the config's is always in"
    )
    parser.add_argument(
        "--betas", nargs="*", type=float, default=BETAS, metavar="X", help="of DPO; the config's is always in"
    )
    parser.add_argument("--best-of", type=int, default=64, metavar="N", help="samples a prompt of SFT: n = 1, 2, 4 … N")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="samples a prompt of PPO and DPO")
    asked = parsed(parser, argv)
    if asked.best_of < 1:  # the rest is the config's to check
        raise UserError(f"command line: --best-of {asked.best_of}; should be 1 or more")
    return asked


def run(argv: list[str], stop: StopFlag) -> None:
    asked, began = parse(argv), time.monotonic()
    shop = Workshop(asked.config, asked.overrides, stop)
    experiment = shop.open()
    if lines := adaptive(experiment):
        raise UserError(lines)
    beside = Path(asked.artifacts) / f"{experiment.name}.frontier"
    found = sweep(shop, experiment, asked, beside, began)

    points = [point for point, _ in found]
    file, rows = asked.results / "frontier.jsonl", [line(experiment, asked, *one) for one in found]
    keep(file, rows, key_of)
    sentences = [text for method, curve in curves(points).items() for text in verdict(curve, method, experiment.seed)]
    title = f"{experiment.name}: reward against KL"
    meta = f"{asked.config}, seed {experiment.seed}, {points[0].prompts} prompts, {max(row['date'] for row in rows)}"
    html = page(title, meta, sentences, pictures(points), [table(points)])
    (beside / "index.html").write_text(html, encoding="utf-8")
    show(shop.console, title, *table(points))
    for text in sentences:
        shop.say(text)
    shop.say(f"\nlines: {relative(file)}")
    shop.say(f"picture: {beside / 'index.html'} ({duration(time.monotonic() - began)})")


def sweep(shop: Workshop, experiment: Any, asked, beside: Path, began: float) -> list[tuple[Point, dict]]:
    """Every point, with the manifest of the stage that made its policy (best of n: its samples)."""
    settings = [("dpo", beta) for beta in with_own(asked.betas, experiment.dpo.beta)]
    settings += [("ppo", coef) for coef in with_own(asked.kl_coefs, experiment.ppo.kl_coef)]
    load = lambda names, policy, count: shop.load(*names, *sampling(experiment, policy, count))  # noqa: E731
    # every setting is validated before anything runs
    drawn = load(["name=best_of_n"], "sft", asked.best_of)
    variations = [load(variant(*setting), setting[0], asked.samples) for setting in settings]
    total, main = 1 + len(settings), ArtifactStore(asked.artifacts, experiment.name)

    def announce(at: int, what: str) -> None:
        shop.say(f"\nfrontier {at}/{total}: {what} ({duration(time.monotonic() - began)} so far)")

    shop.say(f"frontier: the main experiment first, then {total} beside it in {beside}")
    shop.bring(experiment, main, "ppo", "dpo")
    announce(1, f"best of 1 to {asked.best_of}")
    store = ArtifactStore(beside, drawn.name)
    shop.bring_beside(drawn, store, "samples", main)
    numbers = [2**i for i in range(int(math.log2(asked.best_of)) + 1)]
    points = best_of_points(samples_of(store), numbers, experiment.seed)
    found = [(point, store.manifest("samples")) for point in points]
    for at, ((stage, value), variation) in enumerate(zip(settings, variations, strict=True), start=2):
        announce(at, f"{stage}.{KEYS[stage]} {value:g}")
        store = ArtifactStore(beside, variation.name)
        shop.bring_beside(variation, store, "samples", main)
        point = policy_point(samples_of(store), stage, {KEYS[stage]: value}, experiment.seed)
        found.append((point, store.manifest(stage)))
    return found


def line(experiment: Any, asked, point: Point, manifest: dict) -> dict:
    """The JSON object of a point."""
    return {
        "bench": "frontier",
        "experiment": experiment.name,
        "seed": experiment.seed,
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


def verdict(points: Sequence[Point], method: str, seed: int) -> list[str]:
    """Where a method's gold peaks, and whether the score rises beyond it while gold falls."""
    if points[0].gold is None:
        return []  # the prompts are not the world's
    peak, level, over = overoptimisation(points, seed)
    where = f"{fixed(peak.gold, 3)} at {fixed(peak.kl, 1)} nats and score {fixed(peak.score)}"
    alike = f" (not clearly below it: {', '.join(f'{value_of(p):g}' for p in level)})" if level else ""
    says = f"Gold of {NAMES[method][0]} peaks at {short(peak)}: {where}{alike}."
    if not over:
        return [f"{says} No over-optimisation: nothing further from SFT has a higher score and clearly lower gold."]
    (first, _), (last, gap) = over[0], over[-1]
    low, high = gap["ci95"]
    return [
        f"{says} Over-optimisation from {short(first)} ({fixed(first.kl, 1)} nats) on: the score rises and gold falls. "
        f"At {short(last)} ({fixed(last.kl, 1)} nats) the score is {fixed(last.score)} and gold {fixed(last.gold, 3)}, "
        f"{fixed(-gap['value'], 3)} below the peak (95 % interval {fixed(-high, 3)} to {fixed(-low, 3)}, same prompts)."
    ]


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
