"""Simulate evaluations with a known truth, and count how often an interval covers it.

A case draws data like those of an evaluation: tasks of uneven sizes and difficulties, with several
prompts for each task and several samples for each prompt; or prompts with rankings of K responses;
or seeds. `coverage` counts how often the interval of `stages.evaluation.statistics` contains the
truth, and how often that of a bootstrap over observations does, which takes them for independent.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stages.evaluation.statistics import difference_estimate, mean_estimate, pair_accuracy, share_estimate, win_rate

Data = tuple[np.ndarray, np.ndarray]
"""Observations (N, …) and the cluster of each (N,)."""
SAMPLES = 4
"""Number of samples of a prompt."""
SPREAD = 3.0
"""a + b of the Beta distribution of the tasks' rates: the smaller, the more tasks differ."""


@dataclass(frozen=True)
class Case:
    """Data with a known truth, and the interval that is tested on them."""

    kind: str
    """The estimated quantity."""
    setting: str
    """The parameters of the data, in words."""
    clusters: int
    """Number of clusters."""
    truth: float
    """The true value."""
    draw: Callable[[np.random.Generator], Data]
    """Draws a data set."""
    interval: Callable[[np.ndarray, np.ndarray], list[float]]
    """Estimates the interval from observations and clusters."""
    naive: Callable[[np.ndarray], np.ndarray] | None = None
    """Maps observations to the numbers that the bootstrap resamples."""

    @property
    def name(self) -> str:
        """Return a title of the case."""
        return f"{self.kind}, {self.setting}, {self.clusters} clusters"


def coverage(case: Case, draws: int, seed: int = 0, naive: bool = False) -> dict:
    """Count how often intervals contain the truth.

    Args:
        case: The data and their estimate.
        draws: Number of data sets.
        seed: Seed of the generator.
        naive: Whether to try the bootstrap over observations, too (slow).

    Returns:
        {"coverage": share of intervals that contain the truth, "width": their mean width,
        "naive_coverage": the share for the bootstrap, or None}.
    """
    rng = np.random.default_rng(seed)
    hits, naive_hits, widths = 0, 0, []
    for _ in range(draws):
        values, clusters = case.draw(rng)
        low, high = case.interval(values, clusters)
        hits += low <= case.truth <= high
        widths.append(high - low)
        if naive:
            low, high = bootstrap(case.naive(values), rng)
            naive_hits += low <= case.truth <= high
    return {
        "coverage": hits / draws,
        "width": float(np.mean(widths)),
        "naive_coverage": naive_hits / draws if naive else None,
    }


def bootstrap(values: np.ndarray, rng: np.random.Generator, draws: int = 200) -> np.ndarray:
    """Return the percentile interval of a mean, with observations taken for independent."""
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    return np.quantile(means, [0.025, 0.975])


# ── cases ────────────────────────────────────────────────────────────────────────────


def prompts_of_tasks(rng: np.random.Generator, tasks: int, one_large: bool = False) -> np.ndarray:
    """Return the task of each prompt: 1 to about 8 prompts for each task, in random order."""
    sizes = 1 + rng.poisson(2.2, tasks)
    if one_large:
        sizes[0] = sizes[1:].sum() // 2  # a third of all prompts
    return rng.permutation(np.repeat(np.arange(tasks), sizes))


def task_rates(rng: np.random.Generator, tasks: int, mean: float) -> np.ndarray:
    """Return a rate for each task, with the given mean."""
    return rng.beta(mean * SPREAD, (1 - mean) * SPREAD, tasks)


def wins_case(tasks: int, rate: float, ties: float = 0.0, samples: int = SAMPLES, one_large: bool = False) -> Case:
    """Return a case of win rates: comparisons that are not tied are won at the task's rate."""

    def draw(rng):
        task = prompts_of_tasks(rng, tasks, one_large)
        rates = task_rates(rng, tasks, rate)[task, None]
        won = np.where(rng.random((len(task), samples)) < rates, 1.0, -1.0)
        return np.where(rng.random(won.shape) < ties, 0.0, won), task

    def interval(values, task):
        return win_rate(values, np.zeros((len(values), 1)), task)["ci95"]

    def naive(values):
        return (1 + values.mean(1)) / 2

    setting = f"rate {rate}"
    if ties:
        setting += f", {ties:.0%} ties"
    if one_large:
        setting += ", one task with a third of all prompts"
    return Case("wins", setting, tasks, rate * (1 - ties) + 0.5 * ties, draw, interval, naive)


def gold_case(tasks: int, perfect: float) -> Case:
    """Return a case of mean gold: 1 at the task's rate, otherwise uniform from 0.1 to 0.9."""

    def draw(rng):
        task = prompts_of_tasks(rng, tasks)
        right = rng.random((len(task), SAMPLES)) < task_rates(rng, tasks, perfect)[task, None]
        return np.where(right, 1.0, rng.uniform(0.1, 0.9, right.shape)).mean(1), task

    def interval(values, task):
        return share_estimate(values, task)["ci95"]

    return Case("gold", f"{perfect:.0%} perfect", tasks, perfect + 0.5 * (1 - perfect), draw, interval, lambda x: x)


def harder_tasks_asked_more_case(tasks: int) -> Case:
    """Return a case where tasks with more than three prompts are won at 0.6, the others at 0.9.

    The truth is the mean over prompts.
    """
    counts = np.random.default_rng(1).poisson(2.2, 1_000_000) + 1
    truth = float((counts * np.where(counts > 3, 0.6, 0.9)).sum() / counts.sum())

    def draw(rng):
        task = prompts_of_tasks(rng, tasks)
        rate = np.where(np.bincount(task) > 3, 0.6, 0.9)
        rates = rng.beta(rate * SPREAD, (1 - rate) * SPREAD)[task, None]
        return (rng.random((len(task), SAMPLES)) < rates).mean(1), task

    def interval(values, task):
        return share_estimate(values, task)["ci95"]

    return Case("wins", "harder tasks have more prompts", tasks, truth, draw, interval, lambda x: x)


def difference_case(tasks: int) -> Case:
    """Return a case of gold differences of two policies on prompts that are hard for both."""
    gain = 0.1

    def draw(rng):
        task = prompts_of_tasks(rng, tasks)
        hard = rng.uniform(0.2, 0.6, tasks)[task] + rng.uniform(-0.1, 0.1, len(task))
        gains = rng.exponential(gain, tasks)[task] + rng.normal(0, 0.1, len(task))
        return np.stack([hard + gains, hard], 1), task

    def interval(values, task):
        return difference_estimate(values[:, 0], values[:, 1], task)["ci95"]

    return Case("difference", "on the same prompts", tasks, gain, draw, interval, lambda x: x[:, 0] - x[:, 1])


def pairs_case(prompts: int, accuracy: float) -> Case:
    """Return a case of a reward model's accuracy over all pairs of 4 to 9 responses to a prompt."""

    def draw(rng):
        responses = rng.integers(4, 10, prompts)
        prompt = np.repeat(np.arange(prompts), responses * (responses - 1) // 2)
        right = rng.random(len(prompt)) < task_rates(rng, prompts, accuracy)[prompt]
        return np.where(right, 1.0, -1.0), prompt

    def interval(margins, prompt):
        return pair_accuracy(margins, prompt)["accuracy_ci95"]

    return Case("pairs", f"accuracy {accuracy}", prompts, accuracy, draw, interval, lambda x: (1 + x) / 2)


def seeds_case(seeds: int, share: bool = False) -> Case:
    """Return a case of a mean over seeds, of a policy's gold on each seed's 60 prompts.

    Args:
        seeds: Number of seeds.
        share: Whether the figure is estimated as a share.
    """
    prompts = 60

    def draw(rng):
        seed = np.repeat(np.arange(seeds), prompts)
        return rng.normal(0.8, 0.03, seeds)[seed] + rng.normal(0, 0.1, len(seed)), seed

    def interval(values, seed):
        means = values.reshape(seeds, prompts).mean(1)
        return (share_estimate if share else mean_estimate)(means, range(seeds))["ci95"]

    setting = "60 prompts each, as a share" if share else "60 prompts each"
    return Case("seeds", setting, seeds, 0.8, draw, interval, lambda x: x)


TASKS = (8, 16, 47, 74)
CASES = [
    *(wins_case(tasks, rate) for tasks in TASKS for rate in (0.5, 0.7, 0.9, 0.97)),
    *(wins_case(tasks, 0.7, ties=0.3, samples=1) for tasks in TASKS),
    *(wins_case(tasks, 0.9, ties=0.9, samples=1) for tasks in TASKS),
    *(wins_case(tasks, 0.7, one_large=True) for tasks in TASKS),
    *(harder_tasks_asked_more_case(tasks) for tasks in TASKS),
    *(gold_case(tasks, perfect) for tasks in TASKS for perfect in (0.4, 0.7, 0.9)),
    *(difference_case(tasks) for tasks in TASKS),
    *(pairs_case(prompts, accuracy) for prompts in (8, 16, 100) for accuracy in (0.6, 0.75, 0.9)),
    *(seeds_case(seeds, share) for seeds in (3, 5) for share in (False, True)),
]
