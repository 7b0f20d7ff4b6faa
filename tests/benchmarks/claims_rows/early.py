"""Rows of PPO without a pretraining gradient: over its updates, over penalties, beside DPO."""

from sweeps.estimates import SAME

from claims_rows.conditions import best_of_n, by_value, over, points_of
from claims_rows.overoptimisation import NEAR, PART, both, gao, gap, near_line, plot_of, residuals_plot
from claims_rows.row import Figure, Measurement, Place, Read, Row, minus
from claims_rows.verdicts import Rule
from pipeline.config.yaml_tree import read_tree


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train PPO for several numbers of episodes and with several penalties, and DPO over beta."""
    plain = "ppo.ptx_coef=0.0"  # as in the papers
    own = read_tree(place.config, []).values["ppo"]["kl_coef"]
    wanted = [
        best_of_n(settings["doublings"]),
        *over("early", "ppo", "ppo.total_episodes", settings["episodes"], (plain, "ppo.kl_coef=0.0")),
        *over("ppo", "ppo", "ppo.kl_coef", sorted({*settings["kl_coefs"], own}), (plain,)),
        *over("dpo", "dpo", "dpo.beta", settings["betas"]),
    ]
    points = points_of(place, seed, "early", wanted, settings["samples"], "ppo")
    return {"points": by_value(points), "own": {"ppo": own}}


MEASUREMENT = Measurement(
    "early",
    "plain PPO over its episodes without a penalty, and over penalties; DPO over beta; best of n",
    run,
    {
        "whole": {
            "episodes": [192, 448, 832, 1600, 3200, 6400],
            "kl_coefs": [0.02, 0.1, 0.5],
            "betas": [0.1, 0.2, 0.5, 1.0],
            "doublings": 6,
            "samples": 8,
        },
        "quick": {
            "episodes": [128, 256, 448, 640],
            "kl_coefs": [0.03, 0.3],
            "betas": [0.1, 1.0],
            "doublings": 4,
            "samples": 2,
        },
        "micro": {
            "episodes": [16, 32, 64, 96],
            "kl_coefs": [0.02, 0.5],
            "betas": [0.1, 1.0],
            "doublings": 2,
            "samples": 2,
        },
    },
)
NOTE = (
    "The learning rate is constant after its warm-up, so that a shorter run is the beginning of a longer one. "
    "There is no pretraining gradient, as in the papers."
)
OVER = "The mean is over √KL between points that both have measured."


def trained_on(figure: str) -> Read:
    """Return a reader of a figure after the most episodes, less that under the config's penalty."""

    def read(found: dict) -> float:
        most = max((p for p in found["points"] if p["method"] == "early"), key=lambda p: p["value"])
        own = next(p for p in found["points"] if p["method"] == "ppo" and p["value"] == found["own"]["ppo"])
        return most[figure] - own[figure]

    return read


ROWS = (
    Row(
        "overoptimisation-ppo-long",
        PART,
        "Trained on without a KL penalty, PPO gains score and loses gold.",
        "Gao 2023, figure 1",
        "Gold rises, then falls, while the proxy's score keeps rising.",
        MEASUREMENT,
        (
            Figure(
                "gold: no penalty, most episodes − the config's own", trained_on("gold"), Rule("below", nothing=SAME)
            ),
            Figure("score: no penalty, most episodes − the config's own", trained_on("score"), Rule()),
        ),
        both(plot_of(("early", "ppo"), "gold"), plot_of(("early", "ppo"), "score")),
        f"{NOTE} From the config's own kl_coef and episodes, chosen on seeds 0 to 2, to none and, in a whole "
        "run, to twice as many.",
    ),
    Row(
        "gao-rl",
        PART,
        "Gold under PPO without a penalty follows d(α − β ln d), d = √KL, over its updates.",
        "Gao 2023, introduction (functional forms) and figure 1",
        "The curve describes gold at each size of the proxy; a true forecast is claimed for best of n only.",
        MEASUREMENT,
        gao("early", "rl"),
        both(plot_of(("early",), "gold", "rl"), residuals_plot("early", "rl")),
        f"{NOTE} Gold lies between 0 and 1 here and is no score, so that its curve bends for that reason too.",
    ),
    Row(
        "penalty-is-early-stopping",
        PART,
        "A KL penalty gives as much gold at the same KL as stopping early.",
        "Gao 2023, section on the KL penalty",
        "The penalty raises the proxy's score at a given KL, but not the frontier of gold over KL.",
        MEASUREMENT,
        (Figure("gold at equal KL: with penalties − stopped early", gap("ppo", "early"), Rule("equal", nothing=SAME)),),
        plot_of(("ppo", "early"), "gold"),
        f"{NOTE} {OVER}",
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
                share=True,
            ),
            Figure(
                "the same share, less that of a line in KL itself",
                minus(near_line("early", "score"), near_line("early", "score", 1.0)),
                Rule(),
            ),
        ),
        plot_of(("early",), "score"),
        NOTE,
    ),
    Row(
        "kl-of-ppo-and-best-of-n",
        PART,
        "PPO needs more KL than best of n for the same gold.",
        "Gao 2023, introduction (RL versus best of n)",
        "RL consumes far more KL than best of n, in optimisation and in over-optimisation.",
        MEASUREMENT,
        (Figure("gold at equal KL: best of n − PPO without a penalty", gap("best_of_n", "early"), Rule(nothing=SAME)),),
        plot_of(("best_of_n", "early"), "gold"),
        f"{NOTE} {OVER} Best of n stands at ln n − (n − 1)/n, which is the most its KL can be.",
    ),
    Row(
        "dpo-frontier",
        PART,
        "DPO has more reward than PPO at the same KL.",
        "DPO (Rafailov 2023), figure 2",
        "On controlled sentiment, DPO's frontier of true reward against KL lies above PPO's at every KL.",
        MEASUREMENT,
        (Figure("gold at equal KL: DPO − PPO", gap("dpo", "ppo"), Rule(nothing=SAME, enough=SAME)),),
        plot_of(("dpo", "ppo"), "gold"),
        f"Neither has a pretraining gradient. {OVER} So it does not say that DPO leads "
        "at each KL; the picture does. PPO on the true reward is a row of its own.",
    ),
)
