"""What the pretraining gradient is for: PPO-ptx (γ = ptx_coef) against plain PPO (γ = 0), also under larger kl_coef.

    python tests/benchmarks/ptx.py [-c configs/tiny.yaml] [--seeds 0 1 2] [--kl-factors 1 3 10] [key=value …]

InstructGPT found that no KL penalty repairs what PPO forgets, and that γ does. Perplexities must be compared at the
same gold, which is judged in two ways: by the difference in gold to PPO-ptx on the same prompts of all seeds, with its
95 % interval (equal: all of it within ±0.03); and by the perplexity of plain PPO where its curve over kl_coef passes
the gold of PPO-ptx. The chains are those of demo_seeds (NAME-seed0 …); the rest is kept in artifacts/NAME-seed0.ptx/ …,
a JSON line a policy and seed in results/ptx.jsonl. On configs/tiny.yaml and two cores: four minutes a seed, and four
more for each seed whose chain is not there yet. Run it again to go on where it was stopped.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the code beside this file, wherever another copy is installed

from sweeps.beside import Workshop, adaptive, command, options, parsed, relative, sampling, show  # noqa: E402
from sweeps.estimates import difference, mean_ci, perplexity_at  # noqa: E402
from sweeps.points import Point, keep, policy_point, provenance, samples_of  # noqa: E402

from pipeline.artifacts import ArtifactStore  # noqa: E402
from pipeline.errors import UserError  # noqa: E402
from pipeline.running import duration  # noqa: E402
from pipeline.stage import StopFlag  # noqa: E402
from stages.report import fixed  # noqa: E402

MARGIN = 0.03  # gold that counts as the same
PTX, PLAIN = "PPO-ptx", "plain PPO"


def parse(argv: list[str]):
    parser = options("ptx.py", __doc__, HERE / "results")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="a chain each: four minutes where it is not there yet"
    )
    parser.add_argument(
        "--kl-factors", nargs="+", type=float, default=[1, 3, 10], metavar="X", help="times kl_coef, for plain PPO"
    )
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="samples a prompt")
    asked = parsed(parser, argv)
    asked.kl_factors, asked.seeds = sorted(set(asked.kl_factors)), list(dict.fromkeys(asked.seeds))
    return asked


def run(argv: list[str], stop: StopFlag) -> None:
    asked, began = parse(argv), time.monotonic()
    shop = Workshop(asked.config, asked.overrides, stop)
    first = shop.open()
    refuse(first)
    policies = conditions(first.ppo.ptx_coef, first.ppo.kl_coef, asked.kl_factors)

    def variation(seed: int, policy: str, setting: dict[str, float]) -> Any:
        names = [f"name={name_of(policy, setting)}", f"seed={seed}"]
        settings = [f"ppo.{key}={value!r}" for key, value in setting.items()]
        return shop.load(*names, *settings, *sampling(first, policy, asked.samples))

    # every setting is validated before anything runs
    chains = [(seed, shop.load(f"name={first.name}-seed{seed}", f"seed={seed}")) for seed in asked.seeds]
    beside = {seed: {name: variation(seed, *policies[name]) for name in policies} for seed in asked.seeds}
    found: dict[str, list[tuple[Point, dict]]] = {name: [] for name in policies}  # (point, manifest), a seed each
    for seed, chain in chains:
        main = ArtifactStore(asked.artifacts, chain.name)
        shop.say(f"\nptx, seed {seed}: the chain ({duration(time.monotonic() - began)} so far)")
        shop.bring(chain, main, "ppo")
        for name, (policy, setting) in policies.items():
            store = ArtifactStore(Path(asked.artifacts) / f"{chain.name}.ptx", beside[seed][name].name)
            shop.say(f"\nptx, seed {seed}: {name} ({duration(time.monotonic() - began)} so far)")
            shop.bring_beside(beside[seed][name], store, "samples", main)
            point = policy_point(samples_of(store), policy, setting, seed)
            if point.perplexity is None:
                raise UserError("evaluate.perplexity_length: no held-out document is that long; lower it")
            found[name].append((point, store.manifest(policy)))

    keep(asked.results / "ptx.jsonl", list(lines(found, asked, first.name)), key_of)
    points = {name: [point for point, _ in each] for name, each in found.items()}
    show(shop.console, f"{first.name}, seeds {' '.join(map(str, asked.seeds))}: what PPO forgets", *table(points))
    for line in verdict(points):
        shop.say(line)
    shop.say(f"\nlines: {relative(asked.results / 'ptx.jsonl')} ({duration(time.monotonic() - began)})")


def refuse(experiment) -> None:
    """A UserError where there is nothing to compare."""
    wrong = adaptive(experiment)
    if not experiment.ppo.ptx_coef:
        wrong.append("ppo.ptx_coef: is 0; the comparison needs the γ of PPO-ptx, as ppo.ptx_coef=1.0")
    if not experiment.ppo.kl_coef:
        wrong.append("ppo.kl_coef: is 0 and cannot be raised by a factor; give one, as ppo.kl_coef=0.1")
    if experiment.data.documents is None:
        wrong.append("data.documents: is null; perplexity needs pretraining text, as data.documents=world")
    if experiment.data.evaluation_prompts != "world":
        wrong.append("data.evaluation_prompts: have no gold scorer; the comparison needs the world's")
    if wrong:
        raise UserError(wrong)


def conditions(ptx_coef: float, kl_coef: float, factors: Sequence[float]) -> dict[str, tuple[str, dict[str, float]]]:
    """Name → (whose samples, what is set): PPO-ptx as the config has it, plain PPO at kl_coef times each factor, and
    the two that they come from."""
    plain = {
        f"{PLAIN}, kl_coef × {factor:g}": ("ppo", {"ptx_coef": 0.0, "kl_coef": float(f"{factor * kl_coef:.6g}")})
        for factor in factors
    }
    return {PTX: ("ppo", {"ptx_coef": ptx_coef, "kl_coef": kl_coef}), **plain, "sft": ("sft", {}), "base": ("base", {})}


def name_of(policy: str, setting: dict[str, float]) -> str:
    return "_".join(f"{key}-{value!r}".replace("+", "") for key, value in setting.items()) or policy


def lines(found: dict[str, list[tuple[Point, dict]]], asked, experiment: str):
    """A JSON object a policy and seed; gold_minus_ptx on the same prompts."""
    for name, each in found.items():
        rows = zip(asked.seeds, each, found[PTX], found["sft"], strict=True)
        for seed, (point, manifest), (ptx, _), (sft, _) in rows:
            yield {
                "bench": "ptx",
                "experiment": experiment,
                "policy": name,
                "seed": seed,
                **point.figures(),
                "gold_minus_ptx": difference(point.each, ptx.each, seed),
                "perplexity_over_sft": point.perplexity / sft.perplexity,
                "samples_per_prompt": asked.samples,
                "overrides": asked.overrides,
                **provenance(manifest),
            }


def key_of(row: dict) -> tuple:
    return row["experiment"], row["policy"], row["seed"]


# -- all seeds together ------------------------------------------------------------------------------------------


def together(points: Sequence[Point]) -> np.ndarray:
    """Gold of every prompt of every seed."""
    return np.concatenate([p.each for p in points])


def mean(points: Sequence[Point], key: str) -> float:
    return float(np.mean([getattr(p, key) for p in points]))


def gap_to_ptx(points: dict[str, list[Point]], name: str) -> dict:
    return difference(together(points[name]), together(points[PTX]), 0)


def equality(ci95: Sequence[float]) -> str:
    """What the interval of a difference in gold says, in words."""
    low, high = ci95
    if -MARGIN <= low and high <= MARGIN:
        return f"equal within ±{MARGIN}"
    return "lower" if high < 0 else "higher" if low > 0 else f"not clearly different, nor surely within ±{MARGIN}"


def table(points: dict[str, list[Point]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: means over seeds, intervals over prompts, the range of perplexity over seeds."""
    span = lambda ci, digits=3: f"{fixed(ci[0], digits)} to {fixed(ci[1], digits)}"  # noqa: E731
    headings = ["policy", "gold", "95 % interval", "less PPO-ptx's", "95 % interval", "perplexity", "over seeds"]
    rows = []
    for name, each in points.items():
        gap, perplexity = gap_to_ptx(points, name), [p.perplexity for p in each]
        apart = ["", ""] if name == PTX else [fixed(gap["value"], 3), span(gap["ci95"])]
        row = [name, fixed(together(each).mean(), 3), span(mean_ci(together(each), 0)), *apart]
        row += [fixed(np.mean(perplexity)), span((min(perplexity), max(perplexity)), 2)]
        rows.append([*row, fixed(mean(each, "kl"), 1), fixed(mean(each, "score"))])
    return [*headings, "KL to SFT", "score"], rows


def verdict(points: dict[str, list[Point]]) -> list[str]:
    """What plain PPO forgets at the gold of PPO-ptx, and whether a larger kl_coef brings it back."""
    plain = [name for name in points if name.startswith(PLAIN)]
    gold, perplexity = ({name: mean(each, key) for name, each in points.items()} for key in ("gold", "perplexity"))
    gap = gap_to_ptx(points, plain[0])
    low, high = gap["ci95"]
    said = [
        f"Gold of {plain[0]} less that of PPO-ptx: {fixed(gap['value'], 3)} ({fixed(low, 3)} to {fixed(high, 3)}), "
        f"{equality(gap['ci95'])}. Perplexity {fixed(perplexity[plain[0]])} against {fixed(perplexity[PTX])}; "
        f"SFT {fixed(perplexity['sft'])}, base {fixed(perplexity['base'])}."
    ]
    there = perplexity_at(gold[PTX], [(gold[name], perplexity[name]) for name in plain])
    if there is not None:
        said.append(f"Where plain PPO's curve over kl_coef passes PPO-ptx's gold: perplexity {fixed(there)}.")
    else:
        side = "below" if max(gold[name] for name in plain) < gold[PTX] else "above"
        said.append(f"Plain PPO stays {side} PPO-ptx's gold at every kl_coef: no perplexity at the very same gold.")
    best = min(plain, key=perplexity.get)
    found = "No kl_coef here repairs what ptx does, as InstructGPT found."
    if perplexity[best] <= perplexity[PTX]:
        found = "A larger kl_coef does what ptx does: InstructGPT's finding does not show here."
    said.append(
        f"The least forgetful without ptx is {best}: perplexity {fixed(perplexity[best])}, "
        f"gold {fixed(gold[best], 3)}. {found}"
    )
    return said


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
