"""Rows of a real model that learns an instruction from a rule, with and without a value model."""

from claims_rows.pictures import steps
from claims_rows.row import Figure, Measurement, Observed, Place, Read, Row, minus, reader
from claims_rows.verdicts import Rule
from stages.page.plot import Plot

PART = "A rule as the reward, on a real model"
UNITS = {"score": "score by the rule", "kl": "KL to SFT, nats per response", "length": "tokens per response"}
"""Figure of the held-out evaluations → what it is."""


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train PPO by the rule in each way; return its held-out figures before and after."""
    import rule_reward

    args = rule_reward.parse([*place.words(seed), *settings["overrides"]])
    rows = rule_reward.on_seed(args, place.stop, seed)
    return {"ways": {row["advantage"]: {when: figures(row[when]) for when in ("before", "after")} for row in rows}}


def figures(evaluation: dict) -> dict:
    """Return the figures of a held-out evaluation that rows use."""
    return {key: evaluation[key] for key in UNITS}


MEASUREMENT = Measurement(
    "rule",
    "a real model by a rule, PPO with rloo and gae",
    run,
    {
        "whole": {"overrides": []},
        "quick": {"overrides": ["ppo.total_episodes=96", "ppo.eval_steps=3", "ppo.eval_prompts=24"]},
        "micro": {"overrides": []},
    },
    config="configs/rule-reward.yaml",
    micro=(
        "ppo.rewards=[{rule: words, at_most: 4, name: rule}]", "ppo.missing_eos_score=null",
        "evaluate.missing_eos_score=null", "ppo.ptx_coef=0",
    ),
)  # fmt: skip


def of(way: str, when: str, figure: str = "score") -> Read:
    """Return a reader of a figure before or after PPO in a way."""
    return reader("ways", way, when, figure)


def plots(observed: Observed) -> list[Plot]:
    """Return score, KL and length before PPO and after it in each way."""
    drawn = []
    for figure, unit in UNITS.items():
        names = [
            ("SFT", "sft", of("rloo", "before", figure)),
            ("PPO\ngae", "rm", of("gae", "after", figure)),
            ("PPO\nrloo", "ppo", of("rloo", "after", figure)),
        ]
        title = f"{unit.partition(',')[0]} on held-out prompts"
        drawn.append(steps(f"rule-{figure}", f"{title[0].upper()}{title[1:]}", unit, names, observed))
    return drawn


SEEN = "Seeds 0 to 2 had been seen when this rule was written, and settings were chosen on seed 10, with rloo."

ROWS = (
    Row(
        "rule-taught",
        PART,
        "PPO by a rule that a program checks teaches a real model the instruction.",
        "Lambert 2024 (Tülu 3), reinforcement learning with verifiable rewards",
        "PPO whose reward is a program's check improves an instructed model on what is checked: answers to mathematics "
        "and instructions that can be verified.",
        MEASUREMENT,
        (
            Figure("score by the rule: after − before, rloo", minus(of("rloo", "after"), of("rloo", "before")),
                   Rule(nothing=0.05, enough=0.1)),
        ),
        plots,
        "One instruction for all prompts, which do not state it: at most 20 words and no commas; 5 updates of 32 "
        "episodes on SmolLM2-135M-Instruct with LoRA. Advantages are rloo's; the paper's PPO has a value model. The "
        f"score is that of the reward itself, on 48 held-out prompts, one sample each. {SEEN}",
    ),
    Row(
        "rule-without-value-model",
        PART,
        "On a short run, PPO without a value model does as well as with one.",
        "Ahmadian 2024 (back to basics: REINFORCE style optimization)",
        "RLOO, which has no value model, reaches higher rewards and win rates than PPO with one on summaries and "
        "dialogue.",
        MEASUREMENT,
        (
            Figure("score by the rule after training: rloo − gae", minus(of("rloo", "after"), of("gae", "after")),
                   Rule(than=-0.05)),
        ),
        plots,
        "The paper's reward is a reward model's, and its RLOO takes a whole response as one action; here only the "
        "advantages differ, and ratios are clipped a token at a time in both. The value model starts as the policy "
        f"with a new head, and has 5 updates. {SEEN}",
    ),
)  # fmt: skip
