"""Measure what a reward model has to beat on the held-out rankings of an experiment.

    python tests/benchmarks/priors.py artifacts/NAME

Three rows for each source of rankings: the reward model, as the manifest of rm says; "the longer
answer is better", in characters; and a linear model of the answers' words and neighbouring word
pairs, which never sees the prompt. The linear model is fitted on rankings/train.jsonl, for each
source by itself, its penalty by cross-validation there; validation.jsonl is only read for the
figures. Intervals are clustered by prompt.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, vstack

from data import sources
from data.records import Ranking, judged_pairs, prompt_key
from data.source import Source
from stages.evaluation.statistics import pair_accuracy

PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Penalties of the linear model that cross-validation chooses from."""
FOLDS = 5
"""Parts of the training rankings in cross-validation."""
FEWEST = 3
"""Training answers that a word or a word pair must occur in."""

Pairs = list[tuple[Ranking, int, int]]
"""A ranking and the indices of the better and the worse answer."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures as a Markdown table.

    Args:
        arguments: As on the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="folder of the experiment, artifacts/NAME")
    folder = parser.parse_args(arguments).experiment
    train, validation = (load(folder / "rankings" / f"{part}.jsonl") for part in ("train", "validation"))
    manifest = folder / "rm" / "manifest.json"
    figures = json.loads(manifest.read_text(encoding="utf-8"))["metrics"] if manifest.is_file() else {}
    print("| source | rankings trained on, held out | judge | accuracy, 95 % interval | pairs |")
    print("| --- | --- | --- | --- | --- |")
    for source in sorted({row.source or "" for row in validation}):
        own = [[row for row in part if (row.source or "") == source] for part in (train, validation)]
        judges = {"reward model": figures.get("accuracy_by_source", {}).get(source) or figures}
        judges |= priors(*own)
        for judge, figure in judges.items():
            if figure:
                low, high = figure["accuracy_ci95"]
                shown = f"{figure['accuracy']:.3f} ({low:.3f} to {high:.3f}) | {figure['n_pairs']:,}"
                print(f"| {source or 'all'} | {len(own[0]):,}, {len(own[1]):,} | {judge} | {shown} |")


def load(path: Path) -> list[Ranking]:
    """Load the rankings of a file."""
    return sources.load("rankings", Source(path=path, templated="keep"))


def priors(train: list[Ranking], validation: list[Ranking]) -> dict[str, dict[str, Any]]:
    """Return the accuracy of both priors.

    Args:
        train: Rankings that the linear model is fitted on.
        validation: Rankings whose pairs are judged.
    """
    pairs = pairs_of(validation)
    clusters = [prompt_key(row.prompt) for row, _, _ in pairs]
    longer = [float(len(row.responses[i]) - len(row.responses[j])) for row, i, j in pairs]
    penalty = best_penalty(train)
    words = linear_margins(train, pairs, penalty)
    return {
        "longer answer": pair_accuracy(longer, clusters),
        f"words and word pairs, penalty {penalty:g}": pair_accuracy(words, clusters),
    }


def pairs_of(rankings: list[Ranking]) -> Pairs:
    """Return the usable pairs of rankings."""
    return [(row, i, j) for row in rankings for i, j, verdict in judged_pairs(row) if verdict == "usable"]


# -- the linear model ----------------------------------------------------------------------------


def best_penalty(train: list[Ranking]) -> float:
    """Return the penalty with the best accuracy in cross-validation by prompt.

    Args:
        train: The training rankings; nothing else is looked at.
    """
    keys = [prompt_key(row.prompt) for row in train]
    fold_of = {key: position % FOLDS for position, key in enumerate(dict.fromkeys(keys))}
    scores = []
    for penalty in PENALTIES:
        margins: list[float] = []
        for fold in range(FOLDS):
            fitted = [row for row, key in zip(train, keys, strict=True) if fold_of[key] != fold]
            judged = [row for row, key in zip(train, keys, strict=True) if fold_of[key] == fold]
            margins += linear_margins(fitted, pairs_of(judged), penalty)
        scores.append(float(np.mean(np.asarray(margins) > 0)))
    return PENALTIES[int(np.argmax(scores))]


def linear_margins(train: list[Ranking], pairs: Pairs, penalty: float) -> list[float]:
    """Fit the linear model, and return its score differences of pairs.

    Args:
        train: The rankings that it is fitted on; each prompt weighs 1.
        pairs: The pairs to judge.
        penalty: Weight of half the squared norm of its weights.
    """
    seen = Counter(word for row in train for answer in row.responses for word in words_of(answer))
    columns = {word: column for column, word in enumerate(sorted(w for w, n in seen.items() if n >= FEWEST))}
    fitted = pairs_of(train)
    share = Counter(row.id for row, _, _ in fitted)
    weights = np.array([1.0 / share[row.id] for row, _, _ in fitted])
    differences = difference_matrix(fitted, columns)
    transposed = differences.T.tocsr()

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        margins = differences @ theta
        value = (weights * np.logaddexp(0, -margins)).sum() + 0.5 * penalty * theta @ theta
        slope = -(transposed @ (weights / (1 + np.exp(margins)))) + penalty * theta
        return float(value), slope

    theta = minimize(loss, np.zeros(len(columns)), jac=True, method="L-BFGS-B", options={"maxiter": 100}).x
    return list(difference_matrix(pairs, columns) @ theta)


def difference_matrix(pairs: Pairs, columns: dict[str, int]) -> csr_matrix:
    """Return log counts of the better answer's words minus those of the other, (pairs, columns).

    Args:
        pairs: The pairs.
        columns: The column of each word or word pair; others are left out.
    """
    rows = []
    counted: dict[str, csr_matrix] = {}
    for ranking, i, j in pairs:
        for answer in (ranking.responses[i], ranking.responses[j]):
            if answer not in counted:
                known = {columns[word]: n for word, n in words_of(answer).items() if word in columns}
                values = np.log1p(list(known.values()))
                shape = (1, len(columns))
                counted[answer] = csr_matrix((values, ([0] * len(known), list(known))), shape=shape)
        rows.append(counted[ranking.responses[i]] - counted[ranking.responses[j]])
    return vstack(rows).tocsr()


def words_of(text: str) -> Counter[str]:
    """Count the words and marks of a text, and each two neighbours."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return Counter(words) + Counter(f"{one} {other}" for one, other in pairwise(words))


if __name__ == "__main__":
    main()
