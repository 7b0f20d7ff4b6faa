"""Measure policies of one chain under several conditions, as points of reward against KL."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claims_rows.row import Place, Read
from pipeline.store.artifacts import ArtifactStore


@dataclass(frozen=True)
class Wanted:
    """Describe a policy that is trained and sampled."""

    method: str
    """What its point is called."""
    value: float
    """The setting that varies."""
    policy: str
    """Policy that is sampled: sft, ppo or dpo."""
    overrides: tuple[str, ...] = ()
    """Settings that differ from the chain's, as `key=value`."""
    best_of: tuple[int, ...] = ()
    """Values of n, each of which is a point in place of the policy's own."""


PREFERRED = Wanted("preferred", 1, "dpo", ("dpo.loss_type=[sft]", "dpo.loss_weights=null"))
"""SFT that is trained on the preferred answers alone."""


def over(
    method: str, policy: str, setting: str, values: Sequence[float], overrides: tuple[str, ...] = ()
) -> list[Wanted]:
    """Return policies that differ in one setting.

    Args:
        method: What their points are called.
        policy: Policy that is sampled: ppo or dpo.
        setting: The setting, as `ppo.kl_coef`.
        values: Its values.
        overrides: Settings that all of them have, as `key=value`.
    """
    return [Wanted(method, value, policy, (*overrides, f"{setting}={value!r}")) for value in values]


def best_of_n(doublings: int) -> Wanted:
    """Return best of 1 (which is SFT), 2, 4 and so on, doubled so many times."""
    ns = tuple(2**i for i in range(doublings + 1))
    return Wanted("best_of_n", 1, "sft", (f"samples.samples_per_prompt={ns[-1]}",), ns)


def name_of(one: Wanted) -> str:
    """Return the name of an experiment: ppo-gold-0.5"""
    return f"{one.method.replace('_', '-').replace(' ', '-')}-{one.value:g}"


def points_of(place: Place, seed: int, folder: str, wanted: Sequence[Wanted], samples: int, target: str) -> list[dict]:
    """Train and sample every policy of a seed.

    Args:
        place: Where the chain runs.
        seed: The seed.
        folder: Name of the folder of their artifacts, after that of the chain.
        wanted: The policies.
        samples: Samples of each prompt.
        target: Stage up to which the chain is brought up to date first.

    Returns:
        A point for each, as those of `overoptimisation.run`; best of n has {"n"} in addition.
    """
    from sweeps.conditions import Condition, on_seed, plan
    from sweeps.points import best_of_points, samples_of
    from sweeps.runner import ExperimentRunner

    runner, began = ExperimentRunner(place.config, [], place.stop), time.monotonic()
    first = runner.main_experiment()
    conditions = {
        name_of(one): Condition(name_of(one), one.policy, one.overrides, {"value": one.value}) for one in wanted
    }
    (planned,) = plan(runner, first, conditions, [seed], samples)
    where = Path(place.artifacts) / f"{planned.chain.name}.{folder}"

    def say(text: str) -> None:
        runner.print_line(f"\n{folder}, seed {seed}: {text} ({time.monotonic() - began:.0f} s so far)")

    outcomes, points = on_seed(runner, planned, conditions, where, target, say), []
    for one in wanted:
        found = [(outcomes[name_of(one)][0], {})]
        if one.best_of:
            drawn = samples_of(ArtifactStore(where, name_of(one)))
            found = [
                (point, {"n": n})
                for point, n in zip(best_of_points(drawn, one.best_of, seed), one.best_of, strict=True)
            ]
        points += [{"method": one.method, "value": one.value, **point_of(point), **more} for point, more in found]
    return points


def by_value(points: Sequence[dict]) -> list[dict]:
    """Return points of `points_of` with n as the value of best of n."""
    return [point | {"value": point.get("n", point["value"])} for point in points]


def figure_of(method: str, figure: str = "gold", value: float | None = None) -> Read:
    """Return a reader of a figure of one of a method's points; None where it was not run.

    Args:
        method: The method.
        figure: The figure.
        value: Its setting; None: the last one.
    """

    def read(found: dict) -> float | None:
        own = [p for p in found["points"] if p["method"] == method and value in (None, p["value"])]
        return own[-1][figure] if own else None

    return read


def point_of(point: Any) -> dict[str, float | None]:
    """Return the figures of a point; gold is that on tasks not trained on, if there are any."""
    own = point.figures()
    held_out = own["gold_held_out_tasks"]
    return {
        "kl": own["kl_to_sft"],
        "score": own["score"],
        "gold": own["gold"] if held_out is None else held_out,
        "eos_rate": own["eos_rate"],
        "perplexity": own["pretrain_perplexity"],
    }
