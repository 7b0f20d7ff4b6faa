"""Rows of DPO beside SFT on preferred answers, over its steps, and beside PPO on gold."""

import json
from pathlib import Path

from sweeps.estimates import SAME

from claims_rows.conditions import PREFERRED, Wanted, figure_of, over, points_of
from claims_rows.overoptimisation import gap, plot_of
from claims_rows.pictures import steps
from claims_rows.row import Figure, Measurement, Observed, Place, Row, minus
from claims_rows.verdicts import Rule
from pipeline.store.artifacts import ArtifactStore
from stages.page.plot import Plot

PART = "DPO"
REWARD = '''"""Score by the embedded world's gold, on the scale of a reward model."""

import json

from data.world.world import World

WORLD = World.from_json(json.loads({world}))


def score(prompts, responses, finished):
    """Return 4 × gold − 2 of each response."""
    each = zip(prompts, responses, finished, strict=True)
    return [4 * WORLD.gold(*answer)["overall"] - 2 for answer in each]
'''


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train DPO over beta and steps, on preferred answers alone, and PPO on gold over kl_coef."""
    wanted = [Wanted("best_of_n", 1, "sft"), *over("dpo", "dpo", "dpo.beta", settings["betas"])]
    for count in settings["steps"]:
        wanted.append(Wanted("steps", count, "dpo", (f"dpo.max_steps={count}", f"dpo.eval_steps={count}")))
    wanted.append(PREFERRED)
    reward = f"ppo.rewards=[{{python: '{true_reward(place, seed)}:score'}}]"
    # The paper's PPO has no pretraining gradient.
    wanted += over("ppo_gold", "ppo", "ppo.kl_coef", settings["kl_coefs"], (reward, "ppo.ptx_coef=0.0"))
    points = points_of(place, seed, "direct", wanted, settings["samples"], "dpo")
    return {"points": points, "own_steps": settings["steps"][settings["own"]]}


def true_reward(place: Place, seed: int) -> Path:
    """Write the file of a reward function that scores by the gold of a seed's world."""
    from claims_rows.chain import finished_chain

    chain: ArtifactStore = finished_chain(place, seed, "world")
    file = Path(place.artifacts) / "configs" / f"gold_{seed}_{place.name.replace('-', '_')}.py"
    world = (chain.folder("world") / "world.json").read_text(encoding="utf-8")
    file.write_text(REWARD.format(world=repr(json.dumps(json.loads(world)))), encoding="utf-8")
    return file


MEASUREMENT = Measurement(
    "direct",
    "DPO over beta and steps, on preferred answers alone, and PPO on gold",
    run,
    {
        "whole": {
            "betas": [0.1, 0.5, 1.0],
            "steps": [20, 80, 320],
            "own": 1,
            "kl_coefs": [0.02, 0.1, 0.5],
            "samples": 8,
        },
        "quick": {"betas": [0.1, 1.0], "steps": [24, 96], "own": 0, "kl_coefs": [0.02, 0.1], "samples": 2},
        "micro": {"betas": [0.1, 1.0], "steps": [8, 16], "own": 0, "kl_coefs": [0.02, 0.5], "samples": 2},
    },
)


def own_dpo(found: dict) -> float | None:
    """Return gold of DPO at the chain's own settings."""
    return figure_of("steps", value=found["own_steps"])(found)


def steps_plot(observed: Observed) -> list[Plot]:
    """Return gold of SFT, of DPO after each number of steps, and on preferred answers alone."""
    first = next(iter(observed.values()), {"points": []})
    counts = [p["value"] for p in first["points"] if p["method"] == "steps"]
    names = [("SFT", "sft", figure_of("best_of_n")), ("preferred\nonly", "rm", figure_of("preferred"))]
    names += [(f"{count:g}\nsteps", "dpo", figure_of("steps", value=count)) for count in counts]
    return [steps("dpo-steps", "Gold of DPO", "gold, tasks not trained on (0 to 1)", names, observed)]


ROWS = (
    Row(
        "dpo-over-preferred",
        PART,
        "DPO beats fine-tuning on the preferred answers.",
        "DPO (Rafailov 2023), figures 2 and 3",
        "Preferred-FT stays below DPO on sentiment, summaries and dialogue.",
        MEASUREMENT,
        (
            Figure(
                "gold: DPO − SFT on the preferred",
                minus(own_dpo, figure_of("preferred")),
                Rule(nothing=SAME, enough=SAME),
            ),
        ),
        steps_plot,
        "Responses ranked first are learnt by the loss `sft` of dpo, with DPO's learning rate and steps, which were "
        "not chosen for it.",
    ),
    Row(
        "dpo-over-steps",
        PART,
        "Trained for longer, DPO loses gold again.",
        "Rafailov 2024 (scaling laws for over-optimisation in direct alignment), figure 2",
        "Quality often falls before a single epoch is over, most where β is small.",
        MEASUREMENT,
        (
            Figure(
                "gold: most steps − the chain's own", minus(figure_of("steps"), own_dpo), Rule("below", nothing=SAME)
            ),
        ),
        steps_plot,
        "At the chain's own β. 80 steps of 16 rankings are about half a pass, 320 about two. Each number of steps is a "
        "run of its own, over which the learning rate falls.",
    ),
    Row(
        "dpo-over-ppo-on-gold",
        PART,
        "DPO has more reward at the same KL than PPO on the true reward.",
        "DPO (Rafailov 2023), figure 2",
        "Its frontier lies above that of PPO, even where PPO has the true reward.",
        MEASUREMENT,
        (Figure("gold at equal KL: DPO − PPO on gold", gap("dpo", "ppo_gold"), Rule(nothing=SAME, enough=SAME)),),
        plot_of(("dpo", "ppo_gold"), "gold"),
        "The mean is over √KL between points that both have measured. PPO climbs gold itself, on prompts and tasks "
        "other than those of this comparison. Its value model starts as the policy, and its learning rates were chosen "
        "for the reward model.",
    ),
)
