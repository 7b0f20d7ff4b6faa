"""Rows of PPO over its updates without a penalty: Gao's curve, √KL, and the penalty beside it."""

from sweeps.estimates import SAME

from claims_rows.conditions import Wanted, points_of
from claims_rows.overoptimisation import NEAR, PART, both, gao, gap, near_line, plot_of, residuals_plot
from claims_rows.row import Figure, Measurement, Place, Row
from claims_rows.verdicts import Rule


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train PPO without a penalty for several numbers of episodes, and with several penalties."""
    plain = "ppo.ptx_coef=0.0"  # as in the papers
    wanted = [Wanted("best_of_n", 1, "sft")]
    for episodes in settings["episodes"]:
        wanted.append(Wanted("early", episodes, "ppo", (plain, "ppo.kl_coef=0.0", f"ppo.total_episodes={episodes}")))
    wanted += [Wanted("ppo", value, "ppo", (plain, f"ppo.kl_coef={value!r}")) for value in settings["kl_coefs"]]
    return {"points": points_of(place, seed, "early", wanted, settings["samples"], "ppo")}


MEASUREMENT = Measurement(
    "early",
    "PPO over its episodes without a penalty, and over penalties",
    run,
    {
        "whole": {"episodes": [192, 448, 832, 1600, 3200, 6400], "kl_coefs": [0.02, 0.1, 0.5], "samples": 8},
        "quick": {"episodes": [192, 448, 832, 1280], "kl_coefs": [0.03, 0.3], "samples": 4},
        "micro": {"episodes": [16, 32, 64, 96], "kl_coefs": [0.02, 0.5], "samples": 2},
    },
)
NOTE = (
    "The learning rate is constant after its warm-up, so that a shorter run is the beginning of a longer one. "
    "There is no pretraining gradient, as in the papers."
)

ROWS = (
    Row(
        "gao-rl",
        PART,
        "Gold under PPO without a penalty follows d(α − β ln d), d = √KL, over its updates.",
        "Gao 2023, introduction (functional forms) and figure 1",
        "The curve fits at every size of the proxy, and foretells gold beyond the points it was fitted to.",
        MEASUREMENT,
        gao("early", "rl"),
        both(plot_of(("early",), "gold", "rl"), residuals_plot("early", "rl")),
        NOTE,
    ),
    Row(
        "penalty-is-early-stopping",
        PART,
        "A KL penalty gives no more gold at the same KL than stopping early.",
        "Gao 2023, section on the KL penalty",
        "The penalty raises the proxy's score at a given KL, but not the frontier of gold over KL.",
        MEASUREMENT,
        (Figure("gold at equal KL: with penalties − stopped early", gap("ppo", "early"), Rule("equal", nothing=SAME)),),
        plot_of(("ppo", "early"), "gold"),
        f"{NOTE} Over the range of √KL that both reach.",
    ),
    Row(
        "linear-in-root-kl",
        PART,
        "Early in PPO, reward grows linearly in √KL.",
        "Bai 2022, section 4.3",
        "The preference model's score is about linear in √KL over most of training.",
        MEASUREMENT,
        (
            Figure(
                f"share of the score's gains up to {NEAR:g} nats that a line in √KL explains",
                near_line("early", "score"),
                Rule(than=0.9),
            ),
        ),
        plot_of(("early",), "score"),
        NOTE,
    ),
)
