"""Rows of learning from scores without reinforcement learning: control tokens and hindsight."""

from sweeps.estimates import SAME

from claims_rows.chain import finished_chain
from claims_rows.pictures import steps
from claims_rows.row import Figure, Measurement, Observed, Place, Read, Row, minus, reader
from claims_rows.verdicts import Rule
from pipeline.store.artifacts import ArtifactStore
from stages.page.plot import Plot

PART = "Without reinforcement learning"
WAYS = {"sft": ("SFT", "sft"), "demonstrations": ("demon-\nstrations", "sft"), "conditional": ("condi-\ntional", "dpo"),
        "hindsight": ("hindsight", "dpo"), "ppo": ("PPO", "ppo"), "best_of_n": ("best of n", "best_of_n")}  # fmt: skip


def run(place: Place, seed: int, settings: dict) -> dict:
    """Run every way on a seed, at equal numbers of samples; return the figures of each."""
    import conditional

    args = conditional.parse(place.words(seed))
    args.sizes = (conditional.QUICK if settings["sizes"] == "quick" else conditional.FULL) | settings["changes"]
    args.name = f"{place.name}-conditional"
    finished_chain(place, seed, "sft", ArtifactStore(args.artifacts, f"{args.name}-seed{seed}"))
    keys = ("gold", "gold_held_out_tasks", "kl_to_sft", "score")
    return {
        "ways": {row["way"]: {key: row[key] for key in keys} for row in conditional.on_seed(args, place.stop, seed)}
    }


MEASUREMENT = Measurement(
    "conditional",
    "control tokens and hindsight beside PPO and best of n",
    run,
    {
        "whole": {"sizes": "full", "changes": {}},
        "quick": {
            "sizes": "full",
            "changes": {
                "samples": 640,
                "evaluation_prompts": 80,
                "common": ["rankings.num_prompts=300", "rankings.judge_fraction=0", "rm.max_steps=80"],
            },
        },
        "micro": {"sizes": "quick", "changes": {}},
    },
)


def gold(way: str) -> Read:
    """Return a reader of a way's gold on held-out tasks."""
    return reader("ways", way, "gold_held_out_tasks")


def plots(observed: Observed) -> list[Plot]:
    """Return the gold of each way."""
    names = [(label, tone, gold(way)) for way, (label, tone) in WAYS.items()]
    return [steps("ways", "Gold at equal numbers of samples", "gold, tasks not trained on (0 to 1)", names, observed)]


ROWS = (
    Row(
        "conditional-over-sft",
        PART,
        "Conditional training on scored samples improves on SFT.",
        "Korbak 2023 (pretraining with human preferences)",
        "Of several objectives for pretraining with preferences, conditional training is Pareto-optimal between "
        "alignment and capabilities.",
        MEASUREMENT,
        (Figure("gold: conditional − SFT", minus(gold("conditional"), gold("sft")), Rule(nothing=SAME, enough=SAME)),),
        plots,
        "A claim near the paper's, not the same: it trains from scratch on scored text; here SFT learns samples of its "
        "own after control tokens.",
    ),
    Row(
        "hindsight-over-ppo",
        PART,
        "Relabelling samples by their score, in rounds, does better than PPO.",
        "Lu 2022 (Quark); Zhang 2023 (hindsight instruction relabelling)",
        "The first reports better results than PPO, the second than its baselines; neither needs a value model.",
        MEASUREMENT,
        (Figure("gold: hindsight − PPO", minus(gold("hindsight"), gold("ppo")), Rule(nothing=SAME, enough=SAME)),),
        plots,
        "At 1,280 samples; the papers use many more, and Quark holds its policy to the first by KL. Hindsight's "
        "settings were chosen at this size (on seed 10), PPO's at 3,200 episodes, which favours hindsight.",
    ),
    Row(
        "best-of-n-over-ppo",
        PART,
        "Best of n does as well as PPO at equal samples.",
        "Nakano 2021 (WebGPT)",
        "Best of n did better than RL, and RL in addition gave little; their samples were not equal.",
        MEASUREMENT,
        (Figure("gold: best of n − PPO", minus(gold("best_of_n"), gold("ppo")), Rule(than=-SAME)),),
        plots,
        "Equal to the samples of PPO's training; best of n pays its own anew with each prompt, PPO once.",
    ),
)
