"""Rows of PPO that climbs reward models of several sizes, or an ensemble, without a penalty."""

from sweeps.estimates import SAME

from claims_rows.conditions import Wanted, figure_of, points_of
from claims_rows.overoptimisation import PART
from claims_rows.pictures import steps
from claims_rows.proxies import MIN, SIZES
from claims_rows.row import Draw, Figure, Measurement, Observed, Place, Row, minus
from claims_rows.verdicts import Rule
from stages.page.plot import Plot

FREE = ("ppo.ptx_coef=0.0", "ppo.kl_coef=0.0")
"""PPO without what holds it back, as the reward model is what is asked about."""


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train PPO against each reward model, for the same number of episodes."""
    free, members = (*FREE, f"ppo.total_episodes={settings['episodes']}"), settings["ensemble"]
    wanted = [
        Wanted("sft", 0, "sft"),
        Wanted("one", 1, "ppo", free),
        Wanted("mean", members, "ppo", (*free, f"rm.ensemble={members}")),
        Wanted("min", members, "ppo", (*free, f"rm.ensemble={members}", *MIN)),
    ]
    wanted += [Wanted("size", size, "ppo", (*free, f"rm.base={SIZES[size]}")) for size in settings["sizes"]]
    return {"points": points_of(place, seed, "climbed", wanted, settings["samples"], "rm")}


MEASUREMENT = Measurement(
    "climbed",
    "PPO without a penalty by reward models of several sizes, and by an ensemble",
    run,
    {
        "whole": {"episodes": 6400, "ensemble": 3, "sizes": [0.3, 3.0], "samples": 8},
        "quick": {"episodes": 640, "ensemble": 2, "sizes": [0.3], "samples": 2},
        "micro": {"episodes": 32, "ensemble": 2, "sizes": [0.3], "samples": 2},
    },
)


def by_size(found: dict) -> dict[float, float]:
    """Return millions of parameters of the reward model → gold; 1 is the policy's own size."""
    sizes = {p["value"]: p["gold"] for p in found["points"] if p["method"] == "size"}
    return dict(sorted({**sizes, 1.0: figure_of("one")(found)}.items()))


def sizes_apart(found: dict) -> float | None:
    """Return gold by the largest reward model less that by the smallest."""
    values = list(by_size(found).values())
    return None if None in values else values[-1] - values[0]


def ensembles_plot(observed: Observed) -> list[Plot]:
    """Return gold of SFT, and of PPO by one model, by a mean and by a minimum."""
    names = [("SFT", "sft", figure_of("sft")), ("one", "rm", figure_of("one"))]
    names += [("mean", "ppo", figure_of("mean")), ("minimum", "best_of_n", figure_of("min"))]
    return [steps("ensembles", "Gold of PPO by its reward model", "gold (0 to 1)", names, observed)]


def sizes_plot() -> Draw:
    """Return a function that draws gold over the size of the reward model."""

    def plots(observed: Observed) -> list[Plot]:
        first = next(iter(observed.values()))
        names: list = [("SFT", "sft", figure_of("sft"))]
        for size in by_size(first):
            label = "as policy" if size == 1 else f"{size:g}M"
            names.append((label, "ppo", lambda found, size=size: by_size(found).get(size)))
        return [steps("sizes", "Gold of PPO by its reward model", "gold (0 to 1)", names, observed)]

    return plots


RULE = Rule(nothing=SAME, enough=SAME)
NOTE = (
    "No KL penalty and no pretraining gradient; in a whole run twice as many episodes as the demo's. Learning rates "
    "are those chosen for one reward model of the policy's size."
)

ROWS = (
    Row(
        "ppo-over-proxy-size",
        PART,
        "A larger reward model leaves more gold under PPO.",
        "Gao 2023, figure 1",
        "Under RL as well, gold rises with the proxy's parameters.",
        MEASUREMENT,
        (Figure("gold: by the largest − by the smallest", sizes_apart, RULE),),
        sizes_plot(),
        f"{NOTE} Each size has a base of its own, pretrained and fine-tuned as the policy was.",
    ),
    Row(
        "ppo-by-ensemble-minimum",
        PART,
        "Under PPO, an ensemble's minimum leaves more gold than one reward model.",
        "Coste 2024 (reward model ensembles help mitigate overoptimization)",
        "With PPO, conservative ensembles always lessen over-optimisation and do better than one reward model; with a "
        "small KL penalty they prevent it.",
        MEASUREMENT,
        (Figure("gold: minimum of the ensemble − one", minus(figure_of("min"), figure_of("one")), RULE),),
        ensembles_plot,
        f"{NOTE} Members share base, SFT and rankings, and differ by the seed of the head and of the order. The mean "
        "of the ensemble is drawn beside it.",
    ),
)
