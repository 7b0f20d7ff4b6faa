"""Share the chain of a seed with measurements that run in experiments of their own."""

import json
from collections.abc import Sequence
from pathlib import Path

from claims_rows.row import Place
from pipeline.store.artifacts import ArtifactStore


def finished_chain(place: Place, seed: int, target: str, *others: ArtifactStore) -> ArtifactStore:
    """Bring the chain of a seed up to date, and publish its stages in other experiments.

    Those of the same settings and seed are shared; the others make their own.

    Args:
        place: Where the chain runs.
        seed: The seed.
        target: The stage up to which it is brought, and up to which stages are shared.
        *others: Artifacts of the other experiments.

    Returns:
        The chain's artifacts.
    """
    from sweeps.runner import ExperimentRunner, share

    runner = ExperimentRunner(place.config, [], place.stop)
    chain = runner.load(f"name={place.name}-seed{seed}", f"seed={seed}")
    store = ArtifactStore(place.artifacts, chain.name)
    runner.update(chain, store, target)
    for other in others:
        share(target, runner.load(f"name={other.base.name}", f"seed={seed}"), other, runner.stages, store)
    return store


def reward_model_of(
    place: Place, seed: int, chain: ArtifactStore, name: str, rows: Sequence[dict], settings: Sequence[str]
) -> ArtifactStore:
    """Train a reward model on rankings of our choice, from the SFT model of a seed.

    The other data stay those of the config.

    Args:
        place: Where the chain ran.
        seed: The seed.
        chain: Artifacts of the chain.
        name: Name of the new experiment.
        rows: The rankings.
        settings: Further settings, as `key=value`.

    Returns:
        The new experiment's artifacts.
    """
    from sweeps.runner import ExperimentRunner
    from ties import WORLD

    file = Path(place.artifacts) / f"{name}.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    store = ArtifactStore(place.artifacts, name)
    runner = ExperimentRunner(place.config, [], place.stop)
    if runner.load().data.rankings is None:  # the world's, whose other data have to be named beside a file
        given, others = str(file), WORLD
    else:
        given, others = f"{{path: {file}, templated: keep}}", []  # what their source refuses is not among them
    options = [f"data.rankings={given}", "rankings.judge_fraction=0", "rm.held_out=false", *others, *settings]
    runner.update_variant(runner.load(f"name={name}", f"seed={seed}", *options), store, "rm", chain)
    return store


def held_out_fit(store: ArtifactStore, rows: list[dict]) -> dict[str, float]:
    """Return a reward model's accuracy on rankings, and its log loss in nats a pair."""
    import numpy as np
    from ties import pairs_of, scores_of

    from stages.evaluation.statistics import rights

    gaps, verdicts = pairs_of(rows, scores_of(store, rows))
    margins = (gaps * verdicts)[verdicts != 0]
    return {"accuracy": float(rights(margins).mean()), "log_loss": float(np.logaddexp(0, -margins).mean())}
