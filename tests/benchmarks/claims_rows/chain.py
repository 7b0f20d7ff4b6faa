"""Share the chain of a seed with measurements that run in experiments of their own."""

from claims_rows.row import Place
from pipeline.store.artifacts import ArtifactStore

SHARED = ("world", "base", "sft")
"""Stages that all measurements of a seed have."""


def finished_chain(place: Place, seed: int, target: str, *others: ArtifactStore) -> ArtifactStore:
    """Bring the chain of a seed up to date, and publish its first stages in other experiments.

    Where the other experiment changes what these stages read, the pipeline finds them stale, and
    makes them again.

    Args:
        place: Where the chain runs.
        seed: The seed.
        target: The stage up to which it is brought.
        *others: Artifacts of the other experiments.

    Returns:
        The chain's artifacts.
    """
    from sweeps.runner import ExperimentRunner, link

    runner = ExperimentRunner(place.config, [], place.stop)
    chain = runner.load(f"name={place.name}-seed{seed}", f"seed={seed}")
    store = ArtifactStore(place.artifacts, chain.name)
    runner.update(chain, store, target)
    for other in others:
        for stage in SHARED:
            if other.manifest(stage) is None:
                link(stage, store, other)
    return store
