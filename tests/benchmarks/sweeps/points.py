"""Convert the output of the stage `samples` to points and variants, and write results files.

A point is a policy on one seed; a variant gathers the points of all seeds.
"""

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from pipeline.store.artifacts import ArtifactStore
from sweeps.estimates import Series, best_of, best_of_kl, estimate, over_seeds

MEASURES = ("scores", "gold", "kl", "lengths", "finished")
"""Keys of samples.json that have a value for each sample."""


@dataclass(frozen=True)
class Point:
    """Measure one policy on the evaluation prompts of one seed."""

    method: str
    """ppo, dpo, best_of_n, sft or base."""
    setting: dict[str, float]
    """The settings that vary, as {"kl_coef": 0.05}."""
    seed: int
    """The seed."""
    score: Series
    """Mean reward model score of each prompt's samples."""
    gold: Series | None
    """Mean gold of each prompt's samples; None if there is no gold scorer."""
    held_out: Series | None
    """The same, only for prompts whose task is in no training data."""
    kl: float
    """KL to SFT, in nats a response."""
    length: float
    """Mean tokens of a response."""
    eos_rate: float
    """Share of responses that end with EOS."""
    perplexity: float | None
    """On held-out pretraining text; None if there is none."""

    def figures(self) -> dict:
        """Return the figures of a JSON line, named as in results.json; intervals are over tasks."""
        score = estimate([self.score])
        gold = self.gold and estimate([self.gold], share=True)
        held_out = self.held_out and estimate([self.held_out], share=True)
        return {
            "method": self.method,
            "setting": self.setting,
            "score": score["value"],
            "score_ci95": score["ci95"],
            "gold": gold and gold["value"],
            "gold_ci95": gold and gold["ci95"],
            "gold_held_out_tasks": held_out and held_out["value"],
            "gold_held_out_tasks_ci95": held_out and held_out["ci95"],
            "kl_to_sft": self.kl,
            "length": self.length,
            "eos_rate": self.eos_rate,
            "pretrain_perplexity": self.perplexity,
            "prompts": score["n"],
            "clusters": score["clusters"],
        }


@dataclass(frozen=True)
class Variant:
    """Gather a policy with its setting, on every seed."""

    points: tuple[Point, ...]
    """A point for each seed, in the order of the seeds."""

    @property
    def method(self) -> str:
        """Return the method of all points."""
        return self.points[0].method

    @property
    def setting(self) -> dict[str, float]:
        """Return the setting of all points."""
        return self.points[0].setting

    @property
    def value(self) -> float:
        """Return the value of the setting that varies."""
        return next(iter(self.setting.values()))

    def series(self, figure: str) -> list[Series] | None:
        """Return `score`, `gold` or `held_out` of each seed; None if any seed lacks it."""
        series = [getattr(point, figure) for point in self.points]
        return None if None in series else series

    def values(self, figure: str) -> list[float]:
        """Return `kl`, `length`, `eos_rate` or `perplexity` of each seed."""
        return [getattr(point, figure) for point in self.points]

    def estimate(self, figure: str) -> dict:
        """Estimate `score`, `gold` or `held_out`, over seeds or over the tasks of the only seed."""
        return estimate(self.series(figure), share=figure != "score")

    def mean(self, figure: str) -> float | None:
        """Return the mean of kl, length, eos_rate or perplexity; None if any seed lacks it."""
        values = self.values(figure)
        return None if None in values else over_seeds(values)["value"]


def variants_of(points: Sequence[Point]) -> list[Variant]:
    """Gather the points of the same method and setting, one for each seed."""
    groups: dict[tuple, list[Point]] = {}
    for point in points:
        groups.setdefault((point.method, *point.setting.items()), []).append(point)
    return [Variant(tuple(same)) for same in groups.values()]


def samples_of(store: ArtifactStore) -> dict:
    """Read samples.json of an experiment."""
    return json.loads((store.folder("samples") / "samples.json").read_text(encoding="utf-8"))


def series_of(samples: dict, values: np.ndarray) -> Series:
    """Return a figure of each prompt, (P,), as a series."""
    return Series(np.asarray(values, float), tuple(samples["clusters"]))


def held_out(samples: dict, values: np.ndarray) -> Series | None:
    """Return a figure as a series of the prompts whose task is in no training data.

    Args:
        samples: Content of samples.json.
        values: (P,) the figure of each prompt.

    Returns:
        The series; None if tasks are not known or all are in training data.
    """
    if samples["known"] is None or all(samples["known"]):
        return None
    kept = [i for i, known in enumerate(samples["known"]) if not known]
    return Series(np.asarray(values, float)[kept], tuple(samples["clusters"][i] for i in kept))


def policy_point(samples: dict, method: str, setting: dict[str, float], seed: int) -> Point:
    """Measure a policy by the means of its samples.

    Args:
        samples: Content of samples.json.
        method: Name of the policy.
        setting: The settings that vary.
        seed: The seed.

    Returns:
        The point.
    """
    each = {key: samples[key] and np.mean(samples[key], axis=1) for key in MEASURES}
    return _point(samples, each, method, setting, seed, samples["perplexity"])


def best_of_points(samples: dict, ns: Sequence[int], seed: int) -> list[Point]:
    """Measure best of n for each n from the same samples of SFT; n = 1 is SFT itself.

    Args:
        samples: Content of samples.json.
        ns: The values of n.
        seed: The seed.

    Returns:
        A point for each n.
    """
    scores, points = np.array(samples["scores"], float), []
    for n in ns:
        each = {key: samples[key] and best_of(scores, np.array(samples[key], float), n) for key in MEASURES}
        each["kl"] = np.array([best_of_kl(n)])
        points.append(_point(samples, each, "best_of_n", {"n": n}, seed, samples["perplexity"] if n == 1 else None))
    return points


def _point(
    samples: dict, each: dict[str, np.ndarray | None], method: str, setting: dict, seed: int, perplexity: float | None
) -> Point:
    """Make a point.

    Args:
        samples: Content of samples.json.
        each: Measure → (P,) its value for each prompt.
        method: Name of the policy.
        setting: The settings that vary.
        seed: The seed.
        perplexity: Perplexity of the policy, if known.
    """
    gold = each["gold"]
    return Point(
        method=method,
        setting=setting,
        seed=seed,
        score=series_of(samples, each["scores"]),
        gold=None if gold is None else series_of(samples, gold),
        held_out=None if gold is None else held_out(samples, gold),
        kl=float(each["kl"].mean()),
        length=float(each["lengths"].mean()),
        eos_rate=float(each["finished"].mean()),
        perplexity=perplexity,
    )


# ── results files ─────────────────────────────────────────────────────────────────────────────────


def provenance(manifest: dict) -> dict:
    """Return which code made an artifact, when and where, from its manifest.

    The artifact may be older than this run.
    """
    git = manifest["git"]
    return {
        "seconds": round(seconds_of(manifest)),
        "commit": commit_of(git),
        "date": manifest["finished_at"][:10],
        "versions": {name: manifest["versions"].get(name) for name in ("torch", "transformers", "trl")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {manifest['threads']} threads",
    }


def commit_of(git: dict | None) -> str | None:
    """Return a state of git as lines name it: the commit, and whether files differed from it."""
    return git and git["commit"][:7] + (" + changes" if git["dirty"] else "")


def seconds_of(manifest: dict) -> float:
    """Return the seconds a stage took."""
    start, end = (datetime.fromisoformat(manifest[key]) for key in ("started_at", "finished_at"))
    return (end - start).total_seconds()


def save_rows(file: Path, rows: Sequence[dict], key: Callable[[dict], tuple]) -> None:
    """Write rows into a JSON Lines file with one line a key.

    Args:
        file: The file.
        rows: The rows; each replaces the line that has its key.
        key: Row → its key.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    old = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    by_key = {json.dumps(key(row)): row for row in [*old, *rows]}
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sorted(by_key.values(), key=key))
    temporary = file.with_name(f".tmp-{file.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
