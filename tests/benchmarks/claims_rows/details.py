"""Rows of implementation details of PPO, each switched off (or changed) alone."""

import time
from pathlib import Path

from sweeps.estimates import SAME

from claims_rows.pictures import steps
from claims_rows.row import Figure, Measurement, Observed, Place, Read, Row, minus, reader
from claims_rows.verdicts import Rule
from stages.page.plot import Plot

PART = "Implementation details of PPO"
CONDITIONS = {
    "as it is": [],
    "no EOS trick": ["ppo.missing_eos_score=null", "evaluate.missing_eos_score=null"],
    "advantages not whitened": ["ppo.whiten_advantages=false"],
    "rewards whitened": ["ppo.whiten_rewards=true"],
    "no clipping": ["ppo.cliprange=1000", "ppo.cliprange_value=1000"],
    "four PPO epochs": ["ppo.num_ppo_epochs=4"],
}
"""Name → the settings that differ from the chain's."""
SHORT = ("as it is", "no EOS\ntrick", "no whit.\nadvant.", "whit.\nrewards", "no\nclipping", "four\nepochs")


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train and sample PPO with each detail changed; return the figures of each."""
    from sweeps.conditions import Condition, on_seed, plan
    from sweeps.runner import ExperimentRunner

    runner = ExperimentRunner(place.config, [], place.stop)
    first = runner.main_experiment()
    conditions = {
        name: Condition(name.lower().replace(" ", "-"), "ppo", tuple(CONDITIONS[name]), {"condition": name})
        for name in settings["conditions"]
    }
    (planned,) = plan(runner, first, conditions, [seed], settings["samples"])
    folder, began = Path(place.artifacts) / f"{planned.chain.name}.details", time.monotonic()

    def say(text: str) -> None:
        runner.print_line(f"\ndetails, seed {seed}: {text} ({time.monotonic() - began:.0f} s so far)")

    found = {}
    for name, (point, _) in on_seed(runner, planned, conditions, folder, "ppo", say).items():
        own = point.figures()
        found[name] = {
            "gold": own["gold_held_out_tasks"],
            "kl": own["kl_to_sft"],
            "eos_rate": own["eos_rate"],
            "length": own["length"],
        }
    return {"conditions": found}


MEASUREMENT = Measurement(
    "details",
    "PPO with one detail changed at a time",
    run,
    {
        "whole": {"conditions": list(CONDITIONS), "samples": 8},
        "quick": {"conditions": list(CONDITIONS), "samples": 2},
        "micro": {"conditions": ["as it is", "no EOS trick"], "samples": 2},
    },
)


def with_it(condition: str, figure: str = "gold") -> Read:
    """Return a reader of a figure as it is, less that with a detail changed."""
    return minus(reader("conditions", "as it is", figure), reader("conditions", condition, figure))


def plots(observed: Observed) -> list[Plot]:
    """Return gold and KL with each detail changed."""
    first = next(iter(observed.values()), {"conditions": {}})
    drawn = []
    for figure, unit in (("gold", "gold, tasks not trained on"), ("kl", "KL to SFT, nats per response")):
        names = [
            (short, "sft" if name == "as it is" else "ppo", reader("conditions", name, figure))
            for name, short in zip(CONDITIONS, SHORT, strict=True)
            if name in first["conditions"]
        ]
        drawn.append(steps(f"details-{figure}", unit.partition(",")[0], unit, names, observed))
    return drawn


def gain(condition: str, what: str) -> tuple[Figure, ...]:
    """Return the figure of a detail that is said to help: what it is worth in gold."""
    return (Figure(f"gold: {what}", with_it(condition), Rule(nothing=SAME, enough=SAME)),)


STEADY = "Judged by gold at the end of training; how steady training is, is not measured."

ROWS = (
    Row(
        "eos-trick",
        PART,
        "A low score for answers that do not end makes answers end.",
        "Huang 2024 (the N+ implementation details of RLHF with PPO), the EOS trick",
        "Responses without EOS get a low constant score in place of the reward model's, so that the policy learns to "
        "end.",
        MEASUREMENT,
        (
            Figure(
                "share of answers that end: with − without", with_it("no EOS trick", "eos_rate"), Rule(nothing=0.01)
            ),
            Figure("gold: with − without", with_it("no EOS trick"), Rule(than=-SAME)),
        ),
        plots,
        "Here −3 in place of −1. SFT ends almost all of its answers already, which leaves little to gain.",
    ),
    Row(
        "whitened-advantages",
        PART,
        "Whitening advantages helps.",
        "Huang 2024; Zheng 2023 (secrets of RLHF, part I)",
        "The first lists it among the details; the second studies normalised and clipped advantages as a means against "
        "unstable training.",
        MEASUREMENT,
        gain("advantages not whitened", "with − without whitened advantages"),
        plots,
        f"{STEADY} Without it PPO's gradient is also of another size beside that of γ.",
    ),
    Row(
        "whitened-rewards",
        PART,
        "Scaling rewards over the batch, without clipping, changes hardly anything.",
        "Zheng 2023 (secrets of RLHF, part I), section 5.3.1",
        "Rewards that are normalised by a running mean and deviation and clipped make training steadier, but scaling "
        "alone does hardly anything.",
        MEASUREMENT,
        (
            Figure(
                "gold: rewards whitened − as it is",
                minus(reader("conditions", "rewards whitened", "gold"), reader("conditions", "as it is", "gold")),
                Rule("equal", nothing=SAME),
            ),
        ),
        plots,
        "Rewards are scaled to a standard deviation of 1 over the batch and not clipped; the mean is kept. In Huang "
        f"2024 (detail 24), whitened rewards give shorter answers that are preferred less often. {STEADY}",
    ),
    Row(
        "clipping",
        PART,
        "Clipping ratios and values helps.",
        "Schulman 2017 (PPO), table 1; Huang 2024",
        "On continuous control the clipped objective did best of those compared; RLHF with PPO has kept it.",
        MEASUREMENT,
        gain("no clipping", "with − without clipping"),
        plots,
        f"With one pass over each batch the ratio moves little, so clipping has little to do. {STEADY}",
    ),
    Row(
        "one-ppo-epoch",
        PART,
        "Several passes over each batch do no better than one.",
        "InstructGPT (Ouyang 2022), appendix C.4",
        "A single inner epoch is used; no comparison with several is given.",
        MEASUREMENT,
        (Figure("gold: one − four passes", with_it("four PPO epochs"), Rule(than=-SAME)),),
        plots,
        "At an equal number of episodes, so that four passes take four times as many optimizer steps.",
    ),
)
