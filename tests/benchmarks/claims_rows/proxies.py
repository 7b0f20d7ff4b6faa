"""Rows of the reward model under best of n: how much data, how large, and how many."""

from sweeps.estimates import SAME

from claims_rows.conditions import Wanted, points_of
from claims_rows.fits import Fit, fit
from claims_rows.overoptimisation import PART, both
from claims_rows.pictures import against_kl, steps
from claims_rows.row import Draw, Figure, Measurement, Observed, Place, Read, Row, minus
from claims_rows.verdicts import Rule
from stages.page.plot import Plot

SIZES = {
    0.3: "{hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 208}",
    3.0: "{hidden_size: 256, num_hidden_layers: 4, num_attention_heads: 8, intermediate_size: 640}",
}
"""Millions of parameters of a reward model → its base; that of the policy is neither."""
MIN = tuple(f"{stage}.reward_ensemble=min" for stage in ("ppo", "evaluate", "samples"))
TONES = ("sft", "rm", "best_of_n", "ppo", "dpo")


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train reward models, and let each choose among the same samples of SFT."""
    ns = tuple(2**i for i in range(settings["doublings"] + 1))
    wanted = [Wanted("own", 1, "sft", (), ns)]
    for prompts, passes in settings["prompts"]:
        more = (f"rankings.num_prompts={prompts}", *([f"rm.num_train_epochs={passes}"] if passes else []))
        wanted.append(Wanted("prompts", prompts, "sft", more, ns))
    for size in settings["sizes"]:
        wanted.append(Wanted("size", size, "sft", (f"rm.base={SIZES[size]}",), ns))
    members = settings["ensemble"]
    wanted.append(Wanted("mean", members, "sft", (f"rm.ensemble={members}",), ns))
    wanted.append(Wanted("min", members, "sft", (f"rm.ensemble={members}", *MIN), ns))
    return {"points": points_of(place, seed, "proxies", wanted, ns[-1], "rm")}


MEASUREMENT = Measurement(
    "proxies",
    "reward models of several sizes, on several amounts of data, and ensembles, under best of n",
    run,
    {
        "whole": {
            "prompts": [[100, 8.0], [300, 3.0], [1000, None]],
            "sizes": [0.3, 3.0],
            "ensemble": 3,
            "doublings": 6,
        },
        "quick": {"prompts": [[100, 8.0]], "sizes": [0.3], "ensemble": 2, "doublings": 5},
        "micro": {"prompts": [[20, None]], "sizes": [0.3], "ensemble": 2, "doublings": 3},
    },
)


def at_most(found: dict, method: str, value: float | None = None) -> float | None:
    """Return gold under the largest n; None if it was not measured.

    Args:
        found: What was found on a seed.
        method: own, prompts, size, mean or min.
        value: Its setting; None: any.
    """
    own = [p for p in found["points"] if p["method"] == method and value in (None, p["value"])]
    return max(own, key=lambda p: p["n"])["gold"] if own else None


def values(found: dict, method: str) -> list[float]:
    """Return the settings of a method that were measured, in order."""
    return sorted({p["value"] for p in found["points"] if p["method"] == method})


def gain(ours: tuple[str, float | None], theirs: tuple[str, float | None]) -> Read:
    """Return a reader of a difference in gold under the largest n."""
    return minus(lambda found: at_most(found, *ours), lambda found: at_most(found, *theirs))


def least_data(found: dict) -> float | None:
    """Return gold under the largest n with all prompts, less that with the fewest."""
    fewest = min(values(found, "prompts"))
    return gain(("own", None), ("prompts", fewest))(found)


def ends_of_sizes(found: dict) -> tuple[tuple[str, float | None], tuple[str, float | None]] | None:
    """Return the largest and the smallest reward model; None if there is one size only."""
    known = values(found, "size")
    if not known:
        return None
    return ("size", known[-1]) if known[-1] > 1 else ("own", None), ("size", known[0])


def sizes_apart(found: dict) -> float | None:
    """Return gold under the largest n: the largest reward model's less the smallest's."""
    ends = ends_of_sizes(found)
    return None if ends is None else gain(*ends)(found)


def coefficients(found: dict, method: str, value: float | None = None) -> Fit | None:
    """Return the fit of Gao's curve for best of n; None if the method was not measured.

    Args:
        found: What was found on a seed.
        method: own, prompts, size, mean or min.
        value: Its setting; None: any.
    """
    own = [p for p in found["points"] if p["method"] == method and value in (None, p["value"])]
    if not own:
        return None
    start = next(p["gold"] for p in own if p["n"] == 1)
    return fit("best_of_n", [p["kl"] ** 0.5 for p in own], [p["gold"] - start for p in own])


def bend_apart(found: dict) -> float | None:
    """Return how much more the smallest reward model's curve bends than the largest's, as β/α.

    It is 1/(2d) at the d where the curve is highest, on whatever scale gold is.
    """
    ends = ends_of_sizes(found)
    if ends is None:
        return None
    largest, smallest = (coefficients(found, *end) for end in ends)
    if largest is None or smallest is None or not largest.alpha or not smallest.alpha:
        return None
    return smallest.beta / smallest.alpha - largest.beta / largest.alpha


def coefficients_plot(observed: Observed) -> list[Plot]:
    """Return α and β of each size of the reward model."""
    first = next(iter(observed.values()))
    kinds: list[tuple[str, str, float | None]] = [("as policy", "own", None)]
    kinds += [(f"{value:g}M", "size", value) for value in values(first, "size")]
    kinds.sort(key=lambda kind: kind[2] or 1.0)
    names: list = []
    for letter, key in (("α", "alpha"), ("β", "beta")):
        for label, method, value in kinds:

            def read(found: dict, method: str = method, value: float | None = value, key: str = key) -> float | None:
                return getattr(coefficients(found, method, value), key, None)

            names.append((f"{letter}\n{label}", "rm", read))
        names.append(None)
    text = "Fitted on each seed to gold less SFT's, as d(α − βd)."
    return [steps("coefficients", "Coefficients by size", "α and β", names[:-1], observed, caption=text)]


def plot_of(methods: dict[str, str]) -> Draw:
    """Return a function that draws gold of best of n by several reward models.

    Args:
        methods: Method → its name, in which {} stands for the setting.
    """

    def plots(observed: Observed) -> list[Plot]:
        first = next(iter(observed.values()))
        kinds = [(method, value) for method in methods for value in values(first, method)]
        curves = {}
        for (method, value), tone in zip(kinds, TONES, strict=False):
            by_seed = {
                seed: [(p["kl"], p["gold"]) for p in found["points"] if (p["method"], p["value"]) == (method, value)]
                for seed, found in observed.items()
            }
            curves[methods[method].format(f"{value:g}")] = (tone, by_seed)
        return [against_kl("-".join(methods), "Gold of best of n by its reward model", "gold (0 to 1)", curves)]

    return plots


RULE = Rule(nothing=SAME, enough=SAME)

ROWS = (
    Row(
        "gao-data",
        PART,
        "A reward model with more data leaves more gold under strong best of n.",
        "Gao 2023, section on the data size of the proxy",
        "More data give higher gold and less over-optimisation; below about 2,000 comparisons, proxies are hardly "
        "better than chance.",
        MEASUREMENT,
        (Figure("gold of the best of most samples: all prompts − fewest", least_data, RULE),),
        plot_of({"own": "all prompts", "prompts": "{} prompts"}),
        "The fewest prompts get 8 passes in place of 2.2, as their steps would otherwise end with the warm-up; they "
        "still have fewer steps. Passes were not tuned.",
    ),
    Row(
        "gao-size",
        PART,
        "A larger reward model leaves more gold under strong best of n.",
        "Gao 2023, figures 1 and 3",
        "Gold rises with the proxy's parameters, the peak comes later, and the coefficients change smoothly with them.",
        MEASUREMENT,
        (
            Figure("gold of the best of most samples: largest − smallest", sizes_apart, RULE),
            Figure("β/α, how much the curve bends: smallest − largest", bend_apart, Rule()),
        ),
        both(plot_of({"size": "{}M", "own": "as the policy"}), coefficients_plot),
        "Each size has a base of its own, pretrained and fine-tuned as the policy was, with its learning rates.",
    ),
    Row(
        "ensembles-by-mean",
        PART,
        "An ensemble's mean leaves more gold than one reward model.",
        "Coste 2024 (reward model ensembles help mitigate overoptimization)",
        "Under best of n, ensembles do better than one reward model, also by their mean, which is not conservative.",
        MEASUREMENT,
        (
            Figure(
                "gold of the best of most samples: mean of the ensemble − one",
                gain(("mean", None), ("own", None)),
                RULE,
            ),
        ),
        plot_of({"own": "one", "mean": "mean of {}", "min": "minimum of {}"}),
        "Members share base, SFT and rankings, and differ by the seed of the head and of the order.",
    ),
    Row(
        "ensembles-by-minimum",
        PART,
        "An ensemble's minimum leaves more gold than one reward model.",
        "Coste 2024 (reward model ensembles help mitigate overoptimization)",
        "Conservative optimisation (worst case, or by uncertainty) all but removes over-optimisation under best of n, "
        "and improves on one reward model by up to 70 %.",
        MEASUREMENT,
        (
            Figure(
                "gold of the best of most samples: minimum of the ensemble − one",
                gain(("min", None), ("own", None)),
                RULE,
            ),
        ),
        plot_of({"own": "one", "mean": "mean of {}", "min": "minimum of {}"}),
        "Members share base, SFT and rankings, and differ by the seed of the head and of the order.",
    ),
)
