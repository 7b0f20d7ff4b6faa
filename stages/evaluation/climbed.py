"""Find the policies for which the reward model is not an independent judge."""

from collections.abc import Collection
from pathlib import Path

from pipeline.store import integrity


def policies_that_climbed(
    names: Collection[str], judge: Path | None, climbed_folders: Collection[Path] | None
) -> set[str]:
    """Return the policies that were trained to please the judge, or selected by it.

    Best of n is selected by it. PPO is trained to please it, unless it climbs other scorers, none
    of which shares weights with it (a copy of the judge is still the judge).

    Args:
        names: The policies that are compared.
        judge: The folder of the reward model that judges; None if nothing judges.
        climbed_folders: The folders of the reward models that PPO climbs; None if the judge is one
            of them.

    Returns:
        The names, out of `names`.
    """
    if judge is None:
        return set()
    climbed = {"best_of_n"}
    if climbed_folders is None or any(_weights(judge) & _weights(folder) for folder in climbed_folders):
        climbed.add("ppo")
    return climbed & set(names)


def _weights(folder: Path) -> set[str]:
    """Return the digests of all weight files below a folder."""
    return {integrity.sha256_file(path) for path in folder.rglob("*.safetensors")}
