"""Rows of reward against KL: over-optimisation of PPO and DPO, and Gao's curve of best of n."""

import time
from collections.abc import Callable

import numpy as np
from sweeps.estimates import SAME

from claims_rows.conditions import point_of
from claims_rows.fits import Fit, Form, curve, extrapolate, fit, gap_at_equal_kl, line_share, share_explained
from claims_rows.pictures import Points, against_kl, steps
from claims_rows.row import Draw, Figure, Measurement, Observed, Place, Read, Row
from claims_rows.verdicts import Rule
from stages.page.plot import Plot

PART = "Over-optimisation, and reward against KL"
GAO = "Gao 2023, introduction (functional forms) and figure 1"
NAMES = {
    "best_of_n": ("best of n", "best_of_n"),
    "ppo": ("PPO", "ppo"),
    "dpo": ("DPO", "dpo"),
    "early": ("PPO, stopped early", "rm"),
    "ppo_gold": ("PPO on gold", "sft"),
}
"""Method → its name and tone."""
RISING = ("best_of_n", "early")
"""Methods that go further from SFT as their setting grows; the others do as it falls."""
LEFT_OUT = 2
"""Points furthest from SFT that a curve is not fitted to when its extrapolation is tested."""
NEAR = 2.0
"""KL, in nats a response, up to which the start of a curve goes."""
FEWEST_NEAR = 3
"""Points that the start of a curve needs for a line through it to say anything."""


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train and sample PPO over β, DPO over its β, and best of n; return every point."""
    import frontier
    from sweeps.runner import ExperimentRunner

    words = [*place.words(seed), "--samples", str(settings["samples"]), "--best-of", str(settings["best_of"])]
    words += ["--kl-coefs", *map(str, settings["kl_coefs"]), "--betas", *map(str, settings["betas"])]
    args = frontier.parse(words)
    runner = ExperimentRunner(args.config, args.overrides, place.stop)
    first, _, outcomes = frontier.measure(args, runner, time.monotonic())
    points = [
        {"method": point.method, "value": next(iter(point.setting.values())), **point_of(point)}
        for point, _ in outcomes
    ]
    return {"points": points, "own": {"ppo": first.ppo.kl_coef, "dpo": first.dpo.beta}}


MEASUREMENT = Measurement(
    "frontier",
    "PPO over kl_coef, DPO over beta, best of n",
    run,
    {
        "whole": {
            "kl_coefs": [0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
            "betas": [0.05, 0.1, 0.2, 0.5, 1.0],
            "best_of": 64,
            "samples": 8,
        },
        "quick": {"kl_coefs": [0.0, 0.03, 0.3], "betas": [0.1, 1.0], "best_of": 32, "samples": 2},
        "micro": {"kl_coefs": [0.0, 0.5, 1.0], "betas": [0.5, 1.0], "best_of": 16, "samples": 2},
    },
)


def gains(found: dict, method: str, figure: str = "gold") -> Points:
    """Return (KL, figure less that of SFT) of a method's points, the strongest leash first.

    SFT is best of 1.
    """
    start = next(p[figure] for p in found["points"] if p["method"] == "best_of_n" and p["value"] == 1)
    own = [p for p in found["points"] if p["method"] == method and not (method == "best_of_n" and p["value"] == 1)]
    own = sorted(own, key=lambda p: p["value"], reverse=method not in RISING)
    return [(max(p["kl"], 0.0), p[figure] - start) for p in own]


def with_start(points: Points) -> Points:
    """Return points after (0, 0), which is SFT itself."""
    return [(0.0, 0.0), *points]


def fitted(method: str, form: Form) -> Callable[[dict], Fit | None]:
    """Return a function that fits a method's curve on a seed; None where that is not possible."""

    def read(found: dict) -> Fit | None:
        kl, reward = np.array(gains(found, method)).T
        try:
            return fit(form, np.sqrt(kl), reward)
        except ValueError:
            return None

    return read


def coefficient(method: str, form: Form, name: str) -> Read:
    """Return a reader of alpha, beta or r_squared of a method's fitted curve."""
    return lambda found: getattr(fitted(method, form)(found), name, None)


def beyond_line(method: str, form: Form) -> Read:
    """Return a reader of the share of what a line through SFT leaves that the curve explains.

    Where the truth is a straight line, it is 1/(points − 1) on average, by noise.
    """

    def read(found: dict) -> float | None:
        kl, reward = np.array(gains(found, method)).T
        own, line = fitted(method, form)(found), line_share(np.sqrt(kl), reward)
        if own is None or own.r_squared is None or line is None or line > 1 - 1e-9:
            return None
        return share_explained(1 - own.r_squared, 1 - line)

    return read


def foretold(method: str, form: Form) -> Read:
    """Return a reader of the curve's error on the furthest points less that of a straight line."""

    def read(found: dict) -> float | None:
        kl, reward = np.array(gains(found, method)).T
        try:
            tried = extrapolate(form, np.sqrt(kl), reward, LEFT_OUT)
        except ValueError:
            return None
        return tried.rms - tried.line_rms

    return read


def change_to_furthest(method: str, figure: str) -> Read:
    """Return a reader of how a figure changes from the config's own setting to the furthest one."""

    def read(found: dict) -> float | None:
        own = [p for p in found["points"] if p["method"] == method]
        start = [p for p in own if p["value"] == found["own"][method]]
        return min(own, key=lambda p: p["value"])[figure] - start[0][figure] if start else None

    return read


def gap(ours: str, theirs: str) -> Read:
    """Return a reader of how far one method's gold lies above another's at equal KL.

    A line from SFT itself to the first point would flatter the method whose first point is nearer,
    as these curves bend; so only KL between measured points of both counts.
    """
    return lambda found: gap_at_equal_kl(gains(found, ours), gains(found, theirs))


def near_line(method: str, figure: str, power: float = 0.5) -> Read:
    """Return a reader of how much of the start of a method's curve a line in KL^power explains.

    It is None with fewer than three points, as a line explains almost all of two.
    """

    def read(found: dict) -> float | None:
        near = [(kl, gain) for kl, gain in gains(found, method, figure) if kl <= NEAR]
        if len(near) < FEWEST_NEAR:
            return None
        kl, reward = np.array(near).T
        return line_share(kl**power, reward)

    return read


def plot_of(methods: tuple[str, ...], figure: str, form: Form | None = None) -> Draw:
    """Return a function that draws methods' curves; with a form, also its fit to all seeds."""

    def plots(observed: Observed) -> list[Plot]:
        curves: dict[str, tuple[str, dict[int, Points]]] = {}
        for method in methods:
            label, tone = NAMES[method]
            curves[label] = (tone, {seed: with_start(gains(found, method, figure)) for seed, found in observed.items()})
        together = [point for found in observed.values() for point in gains(found, methods[0])]
        kl, reward = np.array(together).T
        fits = []
        if form is not None and len(set(kl[kl > 0])) > 1:
            whole = fit(form, np.sqrt(kl), reward)
            fits = [(NAMES[methods[0]][1], lambda d: curve(whole, d))]
        unit = "gold less SFT's" if figure == "gold" else "reward model score less SFT's"
        name = f"{'-'.join(methods)}-{figure}"
        return [against_kl(name, f"{unit[0].upper()}{unit[1:]} over KL", unit, curves, fits=fits)]

    return plots


def both(*drawn: Draw) -> Draw:
    """Return a function that draws everything that the given ones draw."""
    return lambda observed: [plot for one in drawn for plot in one(observed)]


def residuals_plot(method: str, form: Form) -> Draw:
    """Return a function that draws the residuals of each seed's fit."""

    def plots(observed: Observed) -> list[Plot]:
        own = fitted(method, form)
        counts = {len(gains(found, method)) for found in observed.values() if own(found)}
        if len(counts) != 1:
            return []
        names = [
            (str(i + 1), NAMES[method][1], lambda found, i=i: None if own(found) is None else own(found).residuals[i])
            for i in range(counts.pop())
        ]
        text = "Points in the order of their setting, the one nearest to SFT first."
        title = "Residuals of the fit on each seed"
        return [steps(f"{method}-residuals", title, "gold less the curve", names, observed, caption=text)]

    return plots


def gao(method: str, form: Form) -> tuple[Figure, ...]:
    """Return the figures that a fitted curve is judged by."""
    return (
        Figure("share of what a straight line leaves unexplained that the curve explains", beyond_line(method, form),
               Rule(than=0.5), share=True),
        Figure("coefficient β of the curve, fitted on each seed", coefficient(method, form, "beta"), Rule()),
        Figure(
            f"error on the {LEFT_OUT} furthest points, left out of the fit: the curve's − a straight line's",
            foretold(method, form), Rule("below"),
        ),
    )  # fmt: skip


ROWS = (
    Row(
        "overoptimisation-ppo",
        PART,
        "Without a KL penalty, PPO's reward model score rises on while gold falls.",
        "Stiennon 2020, figure 5",
        "Under ever weaker penalties what people prefer rises, then falls, while the proxy's score keeps rising.",
        MEASUREMENT,
        (
            Figure("gold: kl_coef 0 − the config's own", change_to_furthest("ppo", "gold"),
                   Rule("below", nothing=SAME)),
            Figure("score: kl_coef 0 − the config's own", change_to_furthest("ppo", "score"), Rule()),
        ),
        both(plot_of(("ppo",), "gold"), plot_of(("ppo",), "score")),
        "From the config's own kl_coef, chosen on seeds 0 to 2, to none, at an equal number of episodes, with the "
        "pretraining gradient, which may keep PPO from going far enough. A row below lets it go further.",
    ),
    Row(
        "gao-best-of-n",
        PART,
        "Gold under best of n follows d(α − βd), d = √KL.",
        GAO,
        "The form was chosen on points nearer to the start, and foretold gold at a larger KL.",
        MEASUREMENT,
        gao("best_of_n", "best_of_n"),
        both(plot_of(("best_of_n",), "gold", "best_of_n"), residuals_plot("best_of_n", "best_of_n")),
        "KL is ln n − (n − 1)/n, as in the paper. Gold lies between 0 and 1 here and is no score, so that its curve "
        "bends for that reason too: β above 0 is not over-optimisation by itself. All n share the same samples.",
    ),
    Row(
        "overoptimisation-dpo",
        PART,
        "DPO over-optimises too: with a small β gold falls.",
        "Rafailov 2024 (scaling laws for over-optimisation in direct alignment), figure 1",
        "Win rates rise, then fall, as β lets KL grow.",
        MEASUREMENT,
        (Figure("gold: the smallest beta − the config's own", change_to_furthest("dpo", "gold"),
                Rule("below", nothing=SAME)),),
        plot_of(("dpo",), "gold"),
        "The config's own beta was chosen on seeds 0 to 2; the number of steps is the same.",
    ),
)  # fmt: skip
