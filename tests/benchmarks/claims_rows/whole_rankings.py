"""Rows of whole rankings: K against prompts at equal labels and compute; DPO against PPO."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from sweeps.estimates import SAME, Series

from claims_rows.pictures import steps
from claims_rows.row import Draw, Figure, Measurement, Observed, Place, Read, Row, minus, reader
from claims_rows.verdicts import Rule
from stages.page.plot import Plot

PART = "Whole rankings"


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train reward models and policies on pairs and rankings; return the means of their figures."""
    import rankings
    from sweeps.runner import ExperimentRunner

    words = [*place.words(seed), "--pairs", str(settings["pairs"]), "--passes", *map(str, settings["passes"])]
    args = rankings.parse(words)
    runner = ExperimentRunner(args.config, args.overrides, place.stop)
    bench = rankings.Benchmark(runner, args, runner.main_experiment(), time.monotonic())
    rankings.check_comparable(args, bench.first)
    with one_at_a_time(Path(place.artifacts) / ".claims-passes.lock"):  # all seeds tune on the same one
        _, passes = bench.choose_passes()
    outcomes, variants = bench.measure(seed, passes), {}
    _, samples = bench.update(seed, "SFT", "sft", [])  # is there: it tells which tasks are known
    for outcome in outcomes:
        variants[outcome.name] = {key: on_new_tasks(one, samples["known"]) for key, one in outcome.figures.items()}
        variants[outcome.name] |= {"trained_on": outcome.trained_on}
    return {"variants": variants}


def on_new_tasks(series: Series, known: list[bool] | None) -> float | None:
    """Return the mean over the prompts whose task is in no training data.

    Args:
        series: A figure of each evaluation prompt.
        known: Whether the task of each is in training data; None: it is not known, so all count.

    Returns:
        The mean; None if no such prompt has the figure.
    """
    own = series.values if known is None else series.values[~np.array(known, bool)]
    return None if np.isnan(own).all() else float(np.nanmean(own))


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


MEASUREMENT = Measurement(
    "rankings",
    "reward models and DPO on pairs and rankings",
    run,
    {
        "whole": {"pairs": 2880, "passes": [1, 2, 4, 8]},
        "quick": {"pairs": 360, "passes": [2]},
        "micro": {"pairs": 72, "passes": [1]},
    },
    version=2,
)
"""Passes of each arm are tuned on seed 2, which is not reported; a single number is not tuned."""

ORDER, WINS = "ordered as gold", "gold wins against SFT"


def of(variant: str, figure: str) -> Read:
    """Return a reader of a variant's figure."""
    return reader("variants", variant, figure)


def plots(figure: str, names: dict[str, tuple[str, str]]) -> Draw:
    """Return a function that draws a figure of several variants.

    Args:
        figure: The figure.
        names: Variant → (its short name, tone).
    """

    def draw(observed: Observed) -> list[Plot]:
        readers = [(short, tone, of(variant, figure)) for variant, (short, tone) in names.items()]
        return [steps(f"rankings-{figure.replace(' ', '-')}", figure.capitalize(), figure, readers, observed)]

    return draw


MODELS = plots(
    ORDER,
    {
        "one pair a prompt": ("pairs", "rm"),
        "K = 9, equal labels": ("K = 9\nequal labels", "rm"),
        "K = 9, equal compute": ("K = 9\nequal compute", "rm"),
    },
)
POLICIES = plots(
    WINS,
    {"DPO, pairs": ("DPO\npairs", "dpo"), "DPO, Plackett–Luce": ("DPO\nP.–Luce", "dpo"), "PPO-ptx": ("PPO", "ppo")},
)
NOTE = (
    "On tasks not trained on. Passes of each arm are tuned on seed 2, which is not reported, by order on its "
    "evaluation prompts; the learning rate is the same for all."
)
NO_PAPER = "No paper claims it; the method is of "

ROWS = (
    Row(
        "k-at-equal-labels",
        PART,
        "At equal numbers of labelled pairs, few prompts with K = 9 are worth as much as many with one pair.",
        f"{NO_PAPER}InstructGPT (Ouyang 2022), section 3.5",
        "The paper ranks K = 4 to 9 answers to speed up labelling; it does not compare at equal labels.",
        MEASUREMENT,
        (
            Figure("order by gold: K = 9, equal labels − one pair a prompt",
                   minus(of("K = 9, equal labels", ORDER), of("one pair a prompt", ORDER)), Rule(than=-0.01)),
        ),
        MODELS,
        f"{NOTE} It is what the choice of K costs in prompts. Pairs of one ranking are not independent.",
    ),
    Row(
        "k-at-equal-compute",
        PART,
        "At equal compute, K = 9 beats one pair a prompt.",
        f"{NO_PAPER}InstructGPT (Ouyang 2022), section 3.5",
        "K forward passes, one a response, give all C(K, 2) comparisons; it does not compare with one pair a prompt.",
        MEASUREMENT,
        (
            Figure("order by gold: K = 9, equal compute − one pair a prompt",
                   minus(of("K = 9, equal compute", ORDER), of("one pair a prompt", ORDER)),
                   Rule(nothing=0.005, enough=0.01)),
        ),
        MODELS,
        f"{NOTE} A pass and a step cost the same tokens; the tuned number of passes may differ. K = 9 has many more "
        "labels here, on fewer prompts.",
    ),
    Row(
        "dpo-on-whole-rankings",
        PART,
        "DPO with Plackett–Luce on whole rankings does as well as on all their pairs.",
        f"{NO_PAPER}DPO (Rafailov 2023), appendix A.3",
        "The objective under Plackett–Luce is derived; the experiments have pairs only.",
        MEASUREMENT,
        (
            Figure("wins against SFT: Plackett–Luce − pairs",
                   minus(of("DPO, Plackett–Luce", WINS), of("DPO, pairs", WINS)), Rule(than=-SAME)),
        ),
        POLICIES,
        "On tasks not trained on. Both have the chain's settings, which were chosen for pairs.",
    ),
    Row(
        "dpo-against-ppo",
        PART,
        "At equal labels, DPO does as well as PPO.",
        "DPO (Rafailov 2023), section 6",
        "DPO beats PPO on sentiment and summaries; in dialogue it does as well as best of 128, which stands in for "
        "PPO there.",
        MEASUREMENT,
        (
            Figure("wins against SFT: DPO on pairs − PPO-ptx", minus(of("DPO, pairs", WINS), of("PPO-ptx", WINS)),
                   Rule(than=-SAME)),
        ),
        POLICIES,
        "On tasks not trained on. Both have the same rankings at hand; DPO sees about half of them, and PPO samples "
        "anew. The paper compares over temperatures; here both are at 1. PPO has the pretraining gradient.",
    ),
)  # fmt: skip
