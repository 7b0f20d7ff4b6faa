"""Find the policies for which the reward model is not an independent judge."""

from collections.abc import Collection
from pathlib import Path

from pipeline.store import integrity


def policies_that_climbed(names: Collection[str], judge: Path | None, ppo_reward_model: str | None) -> set[str]:
    """Return the policies that were trained to please the judge, or selected by it.

    Best of n is selected by it. PPO is trained to please it, unless `ppo.reward_model` names a
    folder that shares no weights with it (a copy of the judge is still the judge).

    Args:
        names: The policies that are compared.
        judge: The folder of the reward model that judges; None if nothing judges.
        ppo_reward_model: `ppo.reward_model`.

    Returns:
        The names, out of `names`.
    """
    if judge is None:
        return set()
    climbed = {"best_of_n"}
    if ppo_reward_model is None or _weights(judge) & _weights(Path(ppo_reward_model).expanduser()):
        climbed.add("ppo")
    return climbed & set(names)


def _weights(folder: Path) -> set[str]:
    """Return the digests of all weight files below a folder."""
    return {integrity.sha256_file(path) for path in folder.rglob("*.safetensors")}
