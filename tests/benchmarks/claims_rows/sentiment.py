"""Rows of controlled sentiment on a real model: reward against KL, where a lexicon is gold."""

from dataclasses import replace

from sweeps.estimates import SAME

from claims_rows.conditions import PREFERRED, best_of_n, by_value, figure_of, over, points_of
from claims_rows.overoptimisation import both, gap, plot_of
from claims_rows.row import Draw, Figure, Measurement, Observed, Place, Read, Row, minus
from claims_rows.verdicts import Rule
from stages.page.plot import Plot

PART = "Controlled sentiment on SmolLM2-135M"
NOTE = (
    "SmolLM2-135M-Instruct with LoRA completes sentences of film reviews (configs/sentiment.yaml; settings of the "
    "reward model were chosen on seed 0, those of PPO and DPO are guesses). Five labelers rank the answers to a "
    "prompt, but none that was cut off. Gold is how positive the lexicon VADER finds the completion, 0 to 1. On the "
    "data's sentences it correlates by 0.33 with what people say of the whole sentence, and a few kind words in a row "
    "come near 1: it is the truth of this task, not people's. Three seeds, for time, so intervals are wide."
)
SEEDS = 3
"""Seeds of a whole run."""


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train PPO and DPO over their penalties, PPO on gold, and on preferred answers alone."""
    from sweeps.runner import ExperimentRunner

    chain = ExperimentRunner(place.config, [], place.stop).main_experiment()
    own = {"ppo": chain.ppo.kl_coef, "dpo": chain.dpo.beta}
    kl_coefs, betas = sorted({*settings["kl_coefs"], own["ppo"]}), sorted({*settings["betas"], own["dpo"]})
    wanted = [
        best_of_n(settings["doublings"]),
        *over("ppo", "ppo", "ppo.kl_coef", kl_coefs),
        *over("ppo_gold", "ppo", "ppo.kl_coef", kl_coefs, tuple(settings["gold"])),
        *over("dpo", "dpo", "dpo.beta", betas),
        PREFERRED,
    ]
    judged = () if settings["judge"] is None else (f"samples.gold_judge={settings['judge']}",)
    wanted = [replace(one, overrides=(*one.overrides, *judged)) for one in wanted]
    points = points_of(place, seed, "sentiment", wanted, settings["samples"], "dpo")
    return {"points": by_value(points), "own": own}


LEXICON = {
    "gold": [
        "ppo.rewards=[{rule: sentiment, weight: 4.0}]", "ppo.missing_eos_score=0.5", "evaluate.missing_eos_score=0.5",
    ],
    "judge": "sentiment",
}  # fmt: skip
"""Gold as PPO's reward and as the judge.

Four times the lexicon's score has a spread of 0.9 on the sentences of the data, as a reward model
has 1, and a mean of 2.3; a response that is cut off is two spreads below that, in both PPOs.
"""
MEASUREMENT = Measurement(
    "sentiment",
    "SmolLM2-135M on film reviews: PPO and DPO over their penalties, PPO on gold, best of n",
    run,
    {
        "whole": {"kl_coefs": [0.2], "betas": [0.5], "doublings": 3, "samples": 2, **LEXICON},
        "quick": {"kl_coefs": [0.2], "betas": [0.5], "doublings": 2, "samples": 2, **LEXICON},
        "micro": {
            "kl_coefs": [0.02, 0.5],
            "betas": [0.5, 1.0],
            "doublings": 2,
            "samples": 2,
            "gold": ["ppo.rewards=[{rule: words, at_most: 3, tolerance: 6}]"],
            "judge": None,
        },
    },
    config="configs/sentiment.yaml",
    micro=(),
    seeds=SEEDS,
)


def own(method: str, figure: str) -> Read:
    """Return a reader of a method's figure at the config's own setting; SFT is best of 1."""
    return lambda found: figure_of(method, figure, found["own"].get(method, 1))(found)


SFT = "best_of_n"


def perplexity_ratio(method: str) -> Read:
    """Return a reader of a method's perplexity of held-out text as a multiple of SFT's, less 1."""

    def read(found: dict) -> float | None:
        ours, theirs = own(method, "perplexity")(found), own(SFT, "perplexity")(found)
        return None if ours is None or theirs is None else ours / theirs - 1

    return read


def frontier(*methods: str) -> Draw:
    """Return a function that draws gold, and the reward model's score, over KL."""
    scored = tuple(method for method in methods if method != "ppo_gold")

    def plots(observed: Observed) -> list[Plot]:
        return both(plot_of(methods, "gold"), plot_of(scored, "score"))(observed)

    return plots


EVERY = frontier("dpo", "ppo", "ppo_gold", "best_of_n")

ROWS = (
    Row(
        "sentiment-gold",
        PART,
        "A reward model of noisy rankings is enough for PPO-ptx to make a real model more positive.",
        "Ziegler 2019",
        "GPT-2 that is fine-tuned on rewards learnt from 5,000 comparisons is preferred to the model that it starts "
        "from in most comparisons.",
        MEASUREMENT,
        (
            Figure("gold: PPO-ptx − SFT", minus(own("ppo", "gold"), own(SFT, "gold")), Rule(nothing=SAME, enough=SAME)),
            Figure(
                "increase of C4's perplexity over SFT's, as a share", perplexity_ratio("ppo"), Rule("below", than=0.05)
            ),
        ),
        EVERY,
        f"{NOTE} Labelers rank four answers by the lexicon with noise, such that two agree on 72.6 % of pairs of "
        "different texts. Many texts have the same score, and on these they toss a coin, so other pairs are ranked "
        "with less noise than that sounds like.",
    ),
    Row(
        "sentiment-dpo-frontier",
        PART,
        "DPO has more of the true reward than PPO at the same KL.",
        "DPO (Rafailov 2023), figure 2",
        "On controlled sentiment, DPO's frontier of true reward against KL lies above PPO's at every KL.",
        MEASUREMENT,
        (Figure("gold at equal KL: DPO − PPO-ptx", gap("dpo", "ppo"), Rule(nothing=SAME, enough=SAME)),),
        frontier("dpo", "ppo"),
        f"{NOTE} PPO has the pretraining gradient, as InstructGPT's; the paper's has none.",
    ),
    Row(
        "sentiment-dpo-over-ppo-on-gold",
        PART,
        "DPO has more of the true reward at the same KL even than PPO that is trained on it.",
        "DPO (Rafailov 2023), figure 2",
        "Its frontier lies above that of PPO with the true reward.",
        MEASUREMENT,
        (Figure("gold at equal KL: DPO − PPO on gold", gap("dpo", "ppo_gold"), Rule(nothing=SAME, enough=SAME)),),
        frontier("dpo", "ppo_gold"),
        f"{NOTE} PPO on gold has a value model that starts as the policy with a new head, where the other PPO's starts "
        "as the reward model, and its learning rates were not chosen for this reward.",
    ),
    Row(
        "sentiment-dpo-over-preferred",
        PART,
        "DPO beats fine-tuning on the preferred answers.",
        "DPO (Rafailov 2023), figure 2",
        "Preferred-FT reaches less true reward than DPO.",
        MEASUREMENT,
        (
            Figure(
                "gold: DPO − SFT on the preferred",
                minus(own("dpo", "gold"), own("preferred", "gold")),
                Rule(nothing=SAME, enough=SAME),
            ),
        ),
        frontier("dpo", "best_of_n"),
        f"{NOTE} The preferred answers are learnt by the loss `sft` of dpo, with DPO's learning rate and steps.",
    ),
)
