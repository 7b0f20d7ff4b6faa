"""Points of a sweep: what the stage `samples` found → Points; Points → lines of a results file."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from pipeline.artifacts import ArtifactStore
from sweeps.estimates import best_of, best_of_kl, mean_ci


@dataclass(frozen=True)
class Point:
    """One policy, measured on the evaluation prompts. kl: to SFT, nats a response; each (G,): mean gold a prompt."""

    method: str  # ppo, dpo, best_of_n, sft or base
    setting: dict[str, float]  # what was varied, as {"kl_coef": 0.05}
    score: float
    score_ci95: list[float]
    gold: float | None
    gold_ci95: list[float] | None
    kl: float
    length: float
    eos_rate: float
    perplexity: float | None
    prompts: int
    each: np.ndarray | None

    def figures(self) -> dict:
        """For a JSON line; the names are those of results.json."""
        return {
            "method": self.method,
            "setting": self.setting,
            "score": self.score,
            "score_ci95": self.score_ci95,
            "gold": self.gold,
            "gold_ci95": self.gold_ci95,
            "kl_to_sft": self.kl,
            "length": self.length,
            "eos_rate": self.eos_rate,
            "pretrain_perplexity": self.perplexity,
            "prompts": self.prompts,
        }


def samples_of(store: ArtifactStore) -> dict:
    """samples.json of an experiment."""
    return json.loads((store.folder("samples") / "samples.json").read_text(encoding="utf-8"))


def policy_point(samples: dict, method: str, setting: dict[str, float], seed: int) -> Point:
    """A policy by the mean of its samples."""
    return _point(method, setting, {k: v and np.mean(v, axis=1) for k, v in _measures(samples).items()}, samples, seed)


def best_of_points(samples: dict, numbers: Sequence[int], seed: int) -> list[Point]:
    """Best of n for each n, from the same samples of SFT; n = 1 is SFT itself."""
    scores, points = np.array(samples["scores"], float), []
    for n in numbers:
        chosen = {k: v and best_of(scores, np.array(v, float), n) for k, v in _measures(samples).items()}
        known = {"perplexity": samples["perplexity"] if n == 1 else None}
        points.append(_point("best_of_n", {"n": n}, chosen | {"kl": np.array([best_of_kl(n)])}, known, seed))
    return points


def _measures(samples: dict) -> dict:
    return {key: samples[key] for key in ("scores", "gold", "kl", "lengths", "finished")}


def _point(method: str, setting: dict[str, float], each: dict, samples: dict, seed: int) -> Point:
    """each: a number for each prompt (G,) of what was measured, or None."""
    scores, gold = each["scores"], each["gold"]
    return Point(
        method=method,
        setting=setting,
        score=float(scores.mean()),
        score_ci95=mean_ci(scores, seed),
        gold=None if gold is None else float(gold.mean()),
        gold_ci95=None if gold is None else mean_ci(gold, seed),
        kl=0.0 if each["kl"] is None else float(each["kl"].mean()),
        length=float(each["lengths"].mean()),
        eos_rate=float(each["finished"].mean()),
        perplexity=samples["perplexity"],
        prompts=len(scores),
        each=gold,
    )


# -- results files -----------------------------------------------------------------------------------------------


def provenance(manifest: dict) -> dict:
    """Which code made an artifact, with what, when and where, from its manifest: it may be older than this run."""
    start, end = (datetime.fromisoformat(manifest[key]) for key in ("started_at", "finished_at"))
    git = manifest["git"]
    return {
        "seconds": round((end - start).total_seconds()),
        "commit": git and git["commit"][:7] + (" + changes" if git["dirty"] else ""),
        "date": manifest["finished_at"][:10],
        "versions": {name: manifest["versions"].get(name) for name in ("torch", "transformers", "trl")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {manifest['threads']} threads",
    }


def keep(file: Path, rows: Sequence[dict], key: Callable[[dict], tuple]) -> None:
    """Puts rows into a JSON Lines file, one line a key: a row replaces the one that had its key."""
    file.parent.mkdir(parents=True, exist_ok=True)
    old = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    kept = {json.dumps(key(row)): row for row in [*old, *rows]}
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sorted(kept.values(), key=key))
    staged = file.with_name(f".tmp-{file.name}")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, file)
