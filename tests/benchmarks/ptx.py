"""What the pretraining gradient is for: PPO-ptx (γ = ptx_coef) against plain PPO (γ = 0), also under larger kl_coef.

    python tests/benchmarks/ptx.py [-c configs/tiny.yaml] [--seeds 3 4 5 6 7] [--kl-factors 1 3 10] [key=value …]

InstructGPT found that no KL penalty repairs what PPO forgets, and that γ does. Perplexities must be compared at the
same gold, so both differences to PPO-ptx are given for every kl_coef, paired by seed. Seeds are the unit: each interval
is Student's t over seeds (with one seed: over the tasks of its evaluation prompts, and none for perplexity). Settings
were chosen on seeds 0 to 2. The chains are those of demo_seeds (NAME-seed3 …); the rest is kept in
artifacts/NAME-seed3.ptx/ …, a JSON line a policy and seed in results/ptx.jsonl. On configs/tiny.yaml and two cores:
four minutes a seed, and more for each seed whose chain is not there yet. Run it again to go on where it was stopped.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the code beside this file, wherever another copy is installed

from sweeps.beside import Workshop, adaptive, command, options, parsed, relative, sampling  # noqa: E402
from sweeps.estimates import difference, differences_over_seeds, equality, over_seeds, perplexity_at, unit_of  # noqa: E402
from sweeps.points import Point, Variant, keep, policy_point, provenance, samples_of  # noqa: E402
from sweeps.words import with_interval  # noqa: E402

from pipeline.errors import UserError  # noqa: E402
from pipeline.stage import StopFlag  # noqa: E402
from pipeline.store.artifacts import ArtifactStore  # noqa: E402
from pipeline.tracking import format_duration  # noqa: E402
from stages.page.numbers import fixed  # noqa: E402

SEEDS = (3, 4, 5, 6, 7)
"""Settings were chosen on seeds 0 to 2."""
PTX, PLAIN = "PPO-ptx", "plain PPO"


def parse(argv: list[str]):
    parser = options("ptx.py", __doc__, HERE / "results")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=SEEDS, help="a chain each, made where it is not there yet"
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
        shop.say(f"\nptx, seed {seed}: the chain ({format_duration(time.monotonic() - began)} so far)")
        shop.bring(chain, main, "ppo")
        for name, (policy, setting) in policies.items():
            store = ArtifactStore(Path(asked.artifacts) / f"{chain.name}.ptx", beside[seed][name].name)
            shop.say(f"\nptx, seed {seed}: {name} ({format_duration(time.monotonic() - began)} so far)")
            shop.bring_beside(beside[seed][name], store, "samples", main)
            point = policy_point(samples_of(store), policy, setting, seed)
            if point.perplexity is None:
                raise UserError("evaluate.perplexity_length: no held-out document is that long; lower it")
            found[name].append((point, store.manifest(policy)))

    keep(asked.results / "ptx.jsonl", list(lines(found, asked, first.name)), key_of)
    variants = {name: Variant(tuple(point for point, _ in each)) for name, each in found.items()}
    seeds = " ".join(map(str, asked.seeds))
    shop.show(f"{first.name}, seeds {seeds}: what PPO forgets", *table(variants))
    for line in verdict(variants):
        shop.say(line)
    shop.say(f"\nlines: {relative(asked.results / 'ptx.jsonl')} ({format_duration(time.monotonic() - began)})")


def refuse(experiment) -> None:
    """Raise a UserError where there is nothing to compare."""
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
    """Return what is compared: PPO-ptx as the config has it, plain PPO at kl_coef times each factor, and the two that
    they come from.

    Returns:
        Name → (whose samples, what is set).
    """
    plain = {
        f"{PLAIN}, kl_coef × {factor:g}": ("ppo", {"ptx_coef": 0.0, "kl_coef": float(f"{factor * kl_coef:.6g}")})
        for factor in factors
    }
    return {PTX: ("ppo", {"ptx_coef": ptx_coef, "kl_coef": kl_coef}), **plain, "sft": ("sft", {}), "base": ("base", {})}


def name_of(policy: str, setting: dict[str, float]) -> str:
    return "_".join(f"{key}-{value!r}".replace("+", "") for key, value in setting.items()) or policy


def lines(found: dict[str, list[tuple[Point, dict]]], asked, experiment: str):
    """Yield a JSON object a policy and seed; gold_minus_ptx is on the same prompts, its interval over their tasks."""
    for name, each in found.items():
        rows = zip(each, found[PTX], found["sft"], strict=True)
        for (point, manifest), (ptx, _), (sft, _) in rows:
            yield {
                "bench": "ptx",
                "experiment": experiment,
                "policy": name,
                "seed": point.seed,
                **point.figures(),
                "gold_minus_ptx": difference([point.gold], [ptx.gold]),
                "perplexity_minus_ptx": point.perplexity - ptx.perplexity,
                "perplexity_over_sft": point.perplexity / sft.perplexity,
                "samples_per_prompt": asked.samples,
                "overrides": asked.overrides,
                **provenance(manifest),
            }


def key_of(row: dict) -> tuple:
    return row["experiment"], row["policy"], row["seed"]


# ── all seeds together ───────────────────────────────────────────────────────────────────────────────────────


def gold_gap(variants: dict[str, Variant], name: str, figure: str = "gold") -> dict | None:
    """Estimate gold (or `held_out`, gold on held-out tasks) less that of PPO-ptx on the same prompts and seeds."""
    ours, theirs = variants[name].series(figure), variants[PTX].series(figure)
    return None if ours is None else difference(ours, theirs)


def perplexity_gap(variants: dict[str, Variant], name: str) -> dict:
    """Estimate perplexity less that of PPO-ptx on the same seeds."""
    return differences_over_seeds(variants[name].numbers("perplexity"), variants[PTX].numbers("perplexity"))


def table(variants: dict[str, Variant]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: means, and paired differences to PPO-ptx, with 95 % intervals over seeds."""
    rows = []
    for name, variant in variants.items():
        own = name == PTX
        held_out = variant.series("held_out") and variant.estimate("held_out")
        cells = [name, with_interval(variant.estimate("gold")), with_interval(held_out)]
        cells.append("" if own else with_interval(gold_gap(variants, name)))
        cells.append(with_interval(over_seeds(variant.numbers("perplexity")), 2))
        cells.append("" if own else with_interval(perplexity_gap(variants, name), 2))
        rows.append([*cells, fixed(variant.mean("kl"), 1), fixed(variant.estimate("score")["value"])])
    headings = ["policy", "gold", "on held-out tasks", "gold less PPO-ptx's", "perplexity", "less PPO-ptx's"]
    return [*headings, "KL to SFT", "score"], rows


def verdict(variants: dict[str, Variant]) -> list[str]:
    """Say what plain PPO forgets at the gold of PPO-ptx, and whether a larger kl_coef brings it back."""
    plain = [name for name in variants if name.startswith(PLAIN)]
    gaps = {name: (gold_gap(variants, name), perplexity_gap(variants, name)) for name in plain}
    said = [f"Intervals are 95 %, over {unit_of(variants[PTX].series('gold'))}; differences are paired."]
    nearest = min(plain, key=lambda name: abs(gaps[name][0]["value"]))
    for name in dict.fromkeys([plain[0], nearest]):
        gold, perplexity = gaps[name]
        said.append(
            f"{name[0].upper()}{name[1:]} less PPO-ptx: gold {with_interval(gold)}, {equality(gold['ci95'])}; "
            f"perplexity {with_interval(perplexity, 2)}."
        )
    gold, perplexity = ({name: mean_of(variants[name], key) for name in variants} for key in ("gold", "perplexity"))
    there = perplexity_at(gold[PTX], [(gold[name], perplexity[name]) for name in plain])
    if there is not None:
        said.append(f"Where plain PPO's mean curve over kl_coef passes PPO-ptx's gold: perplexity {fixed(there)}.")
    else:
        side = "below" if max(gold[name] for name in plain) < gold[PTX] else "above"
        said.append(f"Plain PPO stays {side} PPO-ptx's gold at every kl_coef: no perplexity at the very same gold.")
    best = min(plain, key=perplexity.get)
    said.append(
        f"The least forgetful without ptx is {best}: perplexity {fixed(perplexity[best])} against "
        f"{fixed(perplexity[PTX])}, gold {fixed(gold[best], 3)} against {fixed(gold[PTX], 3)}. {finding(gaps[best][1])}"
    )
    return said


def mean_of(variant: Variant, key: str) -> float:
    """Return the mean of `gold` or `perplexity`."""
    return variant.mean(key) if key == "perplexity" else variant.estimate(key)["value"]


def finding(perplexity: dict) -> str:
    """Say what the least forgetful plain PPO's perplexity less PPO-ptx's tells of InstructGPT's finding."""
    ci95 = perplexity["ci95"]
    if ci95 is None or ci95[0] <= 0 <= ci95[1]:
        over = "one seed" if ci95 is None else "these seeds"
        return f"Whether a larger kl_coef repairs what ptx does cannot be told from {over}."
    if ci95[0] > 0:
        return "No kl_coef here repairs what ptx does, as InstructGPT found."
    return "A larger kl_coef does what ptx does: InstructGPT's finding does not show here."


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
