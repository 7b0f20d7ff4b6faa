"""Train and sample policies of one chain under several conditions, on one seed after another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.store.artifacts import ArtifactStore
from sweeps.points import Point, policy_point, samples_of
from sweeps.runner import ExperimentRunner, sampling_overrides


@dataclass(frozen=True)
class Condition:
    """Describe a policy and how its experiment differs from the chain."""

    experiment: str
    """Name of its experiment."""
    policy: str
    """Policy that is sampled: base, sft, ppo or dpo."""
    overrides: tuple[str, ...] = ()
    """Settings that differ, as `key=value`; also those of the stage samples."""
    setting: dict[str, Any] = field(default_factory=dict)
    """What its point is labelled with, as {"kl_coef": 0.05}."""


@dataclass(frozen=True)
class Plan:
    """Hold the validated experiments of one seed."""

    chain: Any
    """The chain whose finished stages all conditions share."""
    variations: dict[str, Any]
    """Condition → its experiment."""


def plan(
    runner: ExperimentRunner, first: Any, conditions: dict[str, Condition], seeds: Sequence[int], samples: int
) -> list[Plan]:
    """Validate every experiment before anything runs.

    Args:
        runner: Runs the experiments of this config.
        first: The config's own experiment.
        conditions: Name → condition.
        seeds: The seeds.
        samples: Samples of each prompt.

    Returns:
        A plan for each seed; its chain is called NAME-seed3, as those of demo_seeds are.
    """
    plans = []
    for seed in seeds:
        chain = runner.load(f"name={first.name}-seed{seed}", f"seed={seed}")
        variations = {}
        for name, one in conditions.items():
            sampling = sampling_overrides(first, one.policy, samples)
            variations[name] = runner.load(f"name={one.experiment}", f"seed={seed}", *sampling, *one.overrides)
        plans.append(Plan(chain, variations))
    return plans


def on_seed(
    runner: ExperimentRunner,
    planned: Plan,
    conditions: dict[str, Condition],
    folder: Path,
    target: str,
    say: Callable[[str], None],
) -> dict[str, tuple[Point, dict]]:
    """Train and sample every condition of a seed.

    Args:
        runner: Runs the experiments.
        planned: The seed's experiments.
        conditions: Name → condition.
        folder: Folder of the conditions' artifacts; that of the chain lies beside it.
        target: Stage up to which the chain is brought up to date first.
        say: Prints what is running.

    Returns:
        Condition → (its point, the manifest of its policy).
    """
    main, outcomes, siblings = ArtifactStore(folder.parent, planned.chain.name), {}, []
    say("the chain")
    runner.update(planned.chain, main, target)
    for name, one in conditions.items():
        store = ArtifactStore(folder, one.experiment)
        say(name)
        runner.update_variant(planned.variations[name], store, "samples", main, *siblings)
        siblings.append(store)
        point = policy_point(samples_of(store), one.policy, one.setting, planned.chain.seed)
        outcomes[name] = (point, store.manifest(one.policy))
    return outcomes
