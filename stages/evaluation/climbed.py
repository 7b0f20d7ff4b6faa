"""Find the judges of an evaluation, and the policies that each of them cannot judge fairly."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.store import integrity
from stages.evaluation.judges import GOLD, HELD_OUT, KEPT, REWARD_MODEL, Judge, in_order

FOLDERS = {REWARD_MODEL: "model", KEPT: "judge/model", HELD_OUT: "held_out/model"}
"""Judge → its folder in the artifact of rm."""
FIGURES = ("accuracy", "accuracy_ci95", "n_pairs", "rankings", "labelers_apart")
"""What is said of a judge beside its verdicts: how often it is right on held-out pairs."""


@dataclass(frozen=True)
class Climbed:
    """The reward models that PPO was trained to please, or whose score chose what it published."""

    own: bool
    """Whether the reward model of rm is among them."""
    others: Sequence[Path] = ()
    """The folders of the others."""


def judges_of(
    names: Collection[str], has_gold: bool, rm: Path | None, climbed: Climbed, rm_figures: dict[str, Any]
) -> list[Judge]:
    """Return the judges of an evaluation, the one that decides first.

    Args:
        names: The policies that are compared.
        has_gold: Whether there is a gold scorer, which nothing is trained or selected by.
        rm: The artifact of the stage rm; None without a reward model.
        climbed: What PPO climbed.
        rm_figures: The figures of the stage rm.
    """
    judges = {GOLD: Judge(GOLD)} if has_gold else {}
    for name, folder in FOLDERS.items():
        if rm is None or not (rm / folder).is_dir():
            continue
        policies = policies_that_climbed(names, rm / folder, name == REWARD_MODEL, climbed)
        measured = rm_figures if name == REWARD_MODEL else rm_figures.get("judges", {}).get(name, {})
        judges[name] = Judge(
            name,
            climbed=frozenset(policies),
            selected=frozenset(policies & {"best_of_n"}),
            figures={key: measured.get(key) for key in FIGURES},
        )
    return [judges[name] for name in in_order(list(judges))]


def policies_that_climbed(names: Collection[str], judge: Path, is_own: bool, climbed: Climbed) -> set[str]:
    """Return the policies that were trained to please a judge, or selected by it.

    Best of n is selected by the reward model of rm. PPO is trained to please that model, or another
    one, and a copy of a judge is still the judge: so weights are compared, not names.

    Args:
        names: The policies that are compared.
        judge: The folder of the judge.
        is_own: Whether the judge is the reward model of rm, not one that rm trained to judge.
        climbed: What PPO climbed.

    Returns:
        The names, out of `names`.
    """
    policies = {"best_of_n"} if is_own else set()
    if is_own and climbed.own:
        policies.add("ppo")
    elif climbed.others:
        weights = _weights(judge)
        if any(weights & _weights(folder.expanduser()) for folder in climbed.others):
            policies.add("ppo")
    return policies & set(names)


def _weights(folder: Path) -> set[str]:
    """Return the digests of all weight files below a folder."""
    return {integrity.sha256_file(path) for path in folder.rglob("*.safetensors")}
