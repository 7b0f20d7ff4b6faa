"""Rows of the alignment tax: what PPO forgets, and whether γ or β brings it back."""

import time
from typing import Any

from sweeps.estimates import SAME

from claims_rows.pictures import steps
from claims_rows.row import Figure, Measurement, Observed, Place, Read, Row, minus, reader
from claims_rows.verdicts import Rule
from stages.page.numbers import capitalised
from stages.page.plot import Plot

PART = "The alignment tax"
PTX, PLAIN = "PPO-ptx", "plain PPO"
SOURCE = "InstructGPT (Ouyang 2022), section 4.2 and appendix E.6"


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train and sample PPO with each γ and each multiple of β; return the figures of each."""
    import ptx
    from sweeps.runner import ExperimentRunner

    words = [*place.words(seed), "--samples", str(settings["samples"])]
    words += ["--kl-factors", *map(str, settings["kl_factors"]), "--ptx-coefs", *map(str, settings["ptx_coefs"])]
    args = ptx.parse(words)
    _, outcomes = ptx.measure(args, ExperimentRunner(args.config, args.overrides, place.stop), time.monotonic())
    found = {}
    for name, ((point, _),) in outcomes.items():
        own = point.figures()
        found[name] = {
            "gold": own["gold"],
            "held_out": own["gold_held_out_tasks"],
            "perplexity": own["pretrain_perplexity"],
            "facts": facts_of(point),
            "kl": own["kl_to_sft"],
            "setting": own["setting"],
        }
    return {"conditions": found}


def facts_of(point: Any) -> float | None:
    """Return mean gold on the prompts that ask for facts; None if there are none."""
    asked = [value for value, task in zip(point.gold.values, point.gold.clusters, strict=True) if "kind='fact'" in task]
    return sum(map(float, asked)) / len(asked) if asked else None


MEASUREMENT = Measurement(
    "tax",
    "PPO over γ and β",
    run,
    {
        "whole": {"kl_factors": [1, 3, 10, 30, 100], "ptx_coefs": [0.1, 3, 10], "samples": 8},
        "quick": {"kl_factors": [1, 10, 100], "ptx_coefs": [10], "samples": 2},
        "micro": {"kl_factors": [1], "ptx_coefs": [], "samples": 2},
    },
)


def of(condition: str, figure: str) -> Read:
    """Return a reader of a condition's figure."""
    return reader("conditions", condition, figure)


def plain_names(found: dict) -> list[str]:
    """Return the conditions without a pretraining gradient, from the smallest β to the largest."""
    return [name for name in found["conditions"] if name.startswith(PLAIN)]


def ptx_names(found: dict) -> list[str]:
    """Return the conditions with a pretraining gradient, from the smallest γ to the largest."""
    names = [name for name in found["conditions"] if name.startswith(PTX)]
    return sorted(names, key=lambda name: found["conditions"][name]["setting"]["ptx_coef"])


def strongest(figure: str) -> Read:
    """Return a reader of a figure of plain PPO under the largest β, less that of PPO-ptx."""
    return lambda found: minus(of(plain_names(found)[-1], figure), of(PTX, figure))(found)


def least_over_kl(condition: str) -> Read:
    """Return a reader of the perplexity of the least forgetful plain PPO less a condition's."""

    def read(found: dict) -> float | None:
        gaps = [minus(of(name, "perplexity"), of(condition, "perplexity"))(found) for name in plain_names(found)]
        return None if None in gaps else min(gaps)

    return read


FIGURES = {
    "perplexity": "perplexity of held-out text",
    "held_out": "gold, tasks not trained on",
    "facts": "gold, questions of fact",
}


def over_gamma(observed: Observed, figure: str) -> Plot:
    """Return a figure over γ, at the config's own β."""
    first = next(iter(observed.values()))
    names = [("SFT", "sft", of("sft", figure)), ("0", "ppo", of(plain_names(first)[0], figure))]
    for name in ptx_names(first):
        names.append((f"{first['conditions'][name]['setting']['ptx_coef']:g}", "ppo", of(name, figure)))
    title = f"{capitalised(FIGURES[figure])} over γ"
    return steps(f"{figure}-gamma", title, FIGURES[figure], names, observed, x_label="γ (ptx_coef)")


def over_beta(observed: Observed, figure: str) -> Plot:
    """Return a figure over β, without γ, beside PPO-ptx."""
    first = next(iter(observed.values()))
    names = [("SFT", "sft", of("sft", figure)), ("PPO-ptx", "best_of_n", of(PTX, figure))]
    names += [(name.rpartition(" ")[2] + " β", "ppo", of(name, figure)) for name in plain_names(first)]
    title = f"{capitalised(FIGURES[figure])} over β, without γ"
    return steps(f"{figure}-beta", title, FIGURES[figure], names, observed, x_label="multiples of β (kl_coef)")


ROWS = (
    Row(
        "tax-exists",
        PART,
        "PPO without a pretraining gradient forgets.",
        SOURCE,
        "Plain PPO does worse than GPT-3 on several public tasks: an alignment tax.",
        MEASUREMENT,
        (
            Figure(
                "perplexity: plain PPO − SFT",
                minus(of(f"{PLAIN}, kl_coef × 1", "perplexity"), of("sft", "perplexity")),
                Rule(nothing=0.05, enough=0.1),
                2,
            ),
        ),
        lambda observed: [over_gamma(observed, "perplexity"), over_gamma(observed, "facts")],
        "The tax is the perplexity of held-out pretraining text, beyond that of SFT, which has forgotten too. "
        "Questions of fact are drawn only: they are part of what the reward model learns here, unlike the paper's "
        "public tasks.",
    ),
    Row(
        "tax-gamma",
        PART,
        "The pretraining gradient γ brings back what PPO forgets, at little reward.",
        SOURCE,
        "A large enough γ reverses the regressions on SQuADv2 and DROP at a small loss of reward; the final models "
        "still lag GPT-3 on some tasks.",
        MEASUREMENT,
        (
            Figure(
                "perplexity: PPO-ptx − plain PPO",
                minus(of(PTX, "perplexity"), of(f"{PLAIN}, kl_coef × 1", "perplexity")),
                Rule("below", nothing=0.05, enough=0.1),
                2,
            ),
            Figure(
                "perplexity: PPO-ptx − SFT",
                minus(of(PTX, "perplexity"), of("sft", "perplexity")),
                Rule("below", than=0.05),
                2,
            ),
            Figure(
                "gold: PPO-ptx − plain PPO",
                minus(of(PTX, "held_out"), of(f"{PLAIN}, kl_coef × 1", "held_out")),
                Rule(than=-SAME),
            ),
        ),
        lambda observed: [over_gamma(observed, figure) for figure in ("perplexity", "held_out")],
        "Judged at the config's own γ of 1, which was chosen on seeds 0 to 2; other values are only drawn.",
    ),
    Row(
        "tax-kl",
        PART,
        "No KL penalty β brings back what PPO forgets.",
        SOURCE,
        "At 1.3B, regressions stay although β is raised to 100 times its default, and reward is lost; the reference "
        "of its KL was the pretrained model.",
        MEASUREMENT,
        (
            Figure("perplexity: the best β − SFT", least_over_kl("sft"), Rule(nothing=0.05, enough=0.1), 2),
            Figure("perplexity: the best β − PPO-ptx", least_over_kl(PTX), Rule(nothing=0.05, enough=0.1), 2),
            Figure("gold: the largest β − PPO-ptx", strongest("held_out"), Rule("below", nothing=SAME)),
        ),
        lambda observed: [over_beta(observed, figure) for figure in ("perplexity", "held_out")],
        "The β with the lowest perplexity is taken on each seed, which favours β. The paper's regressions are against "
        "GPT-3. SFT, where PPO starts, has forgotten much itself here, and that no β can bring back, while γ can: so β "
        "is judged by what PPO adds, and the figure beside PPO-ptx may lie above 0 for SFT's part alone.",
    ),
)
