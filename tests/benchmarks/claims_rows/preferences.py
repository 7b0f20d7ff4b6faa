"""Rows of real preferences on a real model: people's pairs and an AI's rankings, over prompts."""

import random
from collections.abc import Sequence
from pathlib import Path

from claims_rows.chain import finished_chain, reward_model_of
from claims_rows.fits import PowerLaw, power_law
from claims_rows.pictures import steps
from claims_rows.reward_models import pairs_of_rankings
from claims_rows.row import Draw, Figure, Measurement, Observed, Place, Read, Row, derived, minus, reader
from claims_rows.verdicts import Rule
from data.records import prompt_key, write_jsonl
from pipeline.errors import UserError
from pipeline.store.artifacts import ArtifactStore
from stages.page.plot import Plot

PART = "Real preferences, on a real model"
KINDS = {"pairs": "people's pairs", "rankings": "AI's rankings"}
"""Kind of rankings → whose they are in the config: one of two responses, or of more."""


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train a reward model on the rankings of each number of prompts; return its held-out figures.

    Fewer prompts are among the more. The prompts held out are those of the config's split, the same
    for every number and on every seed.
    """
    from ties import read

    place = derived(place, f"{place.name}-own", ["rankings.judge_fraction=0", *settings["overrides"]])
    if settings["world"]:
        place = with_rankings_of_the_world(place, seed)
    chain = finished_chain(place, seed, "rankings")
    train, held_out = ([by_kind(row) for row in read(chain, part)] for part in ("train", "validation"))
    found = {}
    for count in settings["prompts"]:
        rows = of_prompts(train, count, seed)
        name = f"{chain.base.name}-{count}"
        store = reward_model_of(place, seed, chain, name, [*rows, *held_out], settings["rm"])
        found[str(count)] = {kind: held_out_figures(store, kind) for kind in KINDS}
    return {"prompts": found}


def with_rankings_of_the_world(place: Place, seed: int) -> Place:
    """Export a seed's rankings of the embedded world, and return a place whose data they are.

    Every second prompt keeps one pair of each of its rankings.

    Args:
        place: Where the embedded world is the data.
        seed: The seed.
    """
    from ties import WORLD, read

    chain = finished_chain(place, seed, "rankings")
    rows = [*read(chain, "train"), *read(chain, "validation")]
    order = list(dict.fromkeys(row["prompt"] for row in rows))
    paired = set(order[::2])
    file = Path(place.artifacts) / f"{chain.base.name}-exported.jsonl"
    cut = [pairs_of_rankings([row], seed)[:1] if row["prompt"] in paired else [row] for row in rows]
    write_jsonl(file, [row for some in cut for row in some])
    # The file is that of a seed, and several seeds may run at a time.
    other = derived(place, f"{place.name}-files{seed}", [f"data.rankings={file}", *WORLD])
    finished_chain(place, seed, "sft", ArtifactStore(place.artifacts, f"{other.name}-seed{seed}"))
    return other


def by_kind(row: dict) -> dict:
    """Return a ranking with its kind as its source, so that each kind's accuracy is told."""
    return row | {"source": "pairs" if len(row["responses"]) == 2 else "rankings"}


def of_prompts(rows: Sequence[dict], count: int, seed: int) -> list[dict]:
    """Return the rankings of a number of prompts, drawn by the seed; of a smaller number, a part.

    Args:
        rows: The rankings.
        count: How many prompts.
        seed: The seed.

    Raises:
        UserError: There are not so many prompts.
    """
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(prompt_key(row["prompt"]), []).append(row)
    if len(by_prompt) < count:
        raise UserError(f"data.rankings: {len(by_prompt)} prompts are left to train on; give {count} or more")
    keys = sorted(by_prompt)
    random.Random(seed).shuffle(keys)
    return [row for key in keys[:count] for row in by_prompt[key]]


def held_out_figures(store: ArtifactStore, kind: str) -> dict:
    """Return a reward model's accuracy on the held-out pairs of a kind, and that of length.

    Args:
        store: Artifacts of its experiment.
        kind: One of KINDS.

    Returns:
        {"accuracy", "low", "longer", "pairs"}: "low" is the lower end of the accuracy's interval
        over held-out prompts, "longer" the accuracy of the prior that the longer answer wins.

    Raises:
        UserError: The data have one kind only.
    """
    figures = store.manifest("rm")["metrics"]
    own = figures.get("accuracy_by_source", {}).get(kind)
    if own is None:
        raise UserError("data.rankings: held out are only pairs, or only rankings of three or more; give both")
    return {
        "accuracy": own["accuracy"],
        "low": own["accuracy_ci95"][0],
        "longer": figures["longer_wins_by_source"][kind]["accuracy"],
        "pairs": own["n_pairs"],
    }


MEASUREMENT = Measurement(
    "preferences",
    "reward models of a real model on real preferences, over numbers of prompts",
    run,
    {
        "whole": {"prompts": [50, 100, 200, 400], "overrides": [], "world": False, "rm": ["rm.warmup_steps=2"]},
        "quick": {
            "prompts": [25, 50],
            "overrides": ["sft.max_steps=4", "sft.warmup_steps=2"],
            "world": False,
            "rm": ["rm.warmup_steps=2"],
        },
        "micro": {"prompts": [10, 20, 40], "overrides": [], "world": True, "rm": ["rm.max_steps=4"]},
    },
    config="configs/smollm2-preferences.yaml",
    micro=(),
)


# -- what rows read ------------------------------------------------------------------------------


def with_most(kind: str, figure: str) -> Read:
    """Return a reader of a figure of a kind after training on the most prompts."""
    return lambda found: reader("prompts", max(found["prompts"], key=int), kind, figure)(found)


def law(found: dict, kind: str) -> PowerLaw | None:
    """Return the power law of a seed's held-out error, 1 − accuracy, over the number of prompts.

    Args:
        found: What was found on the seed.
        kind: One of KINDS.

    Returns:
        The law; None where an error is 0.
    """
    errors = [1 - figures[kind]["accuracy"] for figures in found["prompts"].values()]
    if min(errors) <= 0:
        return None
    return power_law([float(count) for count in found["prompts"]], errors)


def of_law(kind: str, what: str) -> Read:
    """Return a reader of a coefficient of a kind's power law, or of the share that it explains."""

    def read(found: dict) -> float | None:
        fitted = law(found, kind)
        return None if fitted is None else getattr(fitted, what)

    return read


def plots(*kinds: str) -> Draw:
    """Return a function that draws a kind's accuracy over prompts, beside that of length."""

    def draw(observed: Observed) -> list[Plot]:
        counts = next(iter(observed.values()), {"prompts": {}})["prompts"]
        drawn = []
        for kind in kinds:
            names: list = [(count, "rm", reader("prompts", count, kind, "accuracy")) for count in counts]
            names += [None, ("the longer\nanswer", "sft", with_most(kind, "longer"))]
            title, unit = f"Accuracy on {KINDS[kind]}", "accuracy on held-out pairs"
            drawn.append(
                steps(f"prompts-{kind}", title, unit, names, observed, level=(0.5, "chance"), x_label="prompts")
            )
        return drawn

    return draw


# -- rows ----------------------------------------------------------------------------------------

CHANCE, NOTHING = 0.5, 0.02
"""Accuracy of a guess; the difference in accuracy that counts as none."""
NOTE = (
    "SmolLM2-135M-Instruct with LoRA, the rankings of 400 prompts of both kinds together, one pass. Held-out prompts "
    "are the same on every seed: seeds differ in which prompts train, in the start and in the order, and the interval "
    "over them says nothing of other held-out prompts."
)
SEEN = "One run with all rankings, seed 0, had been seen when this rule was written."


def over_chance(kind: str) -> tuple[Figure, ...]:
    """Return the figures of a kind's accuracy against chance: over seeds, and over prompts."""
    return (
        Figure(f"accuracy on {KINDS[kind]}", with_most(kind, "accuracy"), Rule(than=CHANCE), share=True),
        Figure("lower end of its 95 % interval over held-out prompts", with_most(kind, "low"), Rule(than=CHANCE),
               share=True),
    )  # fmt: skip


def over_length(kind: str) -> tuple[Figure, ...]:
    """Return the figure of a kind's accuracy less that of "the longer answer wins"."""
    gap = minus(with_most(kind, "accuracy"), with_most(kind, "longer"))
    return (Figure(f"accuracy on {KINDS[kind]}: reward model − the longer answer", gap, Rule(nothing=NOTHING)),)


ROWS = (
    Row(
        "people-over-chance",
        PART,
        "A reward model learns from a few hundred prompts which answer people prefer.",
        "Bai 2022 (hh-rlhf), section 3; Stiennon 2020, section 4.3",
        "Reward models predict people's choices better than chance, and the better the more data they have, from "
        "8,000 comparisons on.",
        MEASUREMENT,
        over_chance("pairs"),
        plots("pairs"),
        f"{NOTE} So the second figure asks the same of these. {SEEN}",
    ),
    Row(
        "people-over-length",
        PART,
        "On people's pairs it knows more than that the longer answer wins.",
        "Singhal 2023 (a long way to go: length correlations in RLHF)",
        "Scores of reward models go with length, and length alone accounts for much of what RLHF gains in the "
        "settings studied.",
        MEASUREMENT,
        over_length("pairs"),
        plots("pairs"),
        f"{NOTE} The paper's finding is the worry, not the claim: here it is asked whether length could be all. "
        f"Length is in tokens. {SEEN}",
    ),
    Row(
        "ai-over-chance",
        PART,
        "It learns an AI's rankings of several answers as well.",
        "Cui 2023 (UltraFeedback)",
        "A reward model trained only on GPT-4's ratings of four answers to a prompt predicts people's preferences in "
        "other data sets.",
        MEASUREMENT,
        over_chance("rankings"),
        plots("rankings"),
        f"{NOTE} Accuracy is on held-out rankings of the same AI, not on people's. A ranking counts as many times as "
        f"it states choices, so that pairs do not drown rankings. {SEEN}",
    ),
    Row(
        "ai-over-length",
        PART,
        "On an AI's rankings it knows more than that the longer answer wins.",
        "Dubois 2024 (length-controlled AlpacaEval)",
        "A language model that judges answers prefers longer ones: one model's win rate goes from 23 to 64 % by "
        "asking it to be concise or detailed.",
        MEASUREMENT,
        over_length("rankings"),
        plots("rankings"),
        f"{NOTE} The paper's finding is the worry, not the claim: a reward model of such rankings could say no more. "
        f"Length is in tokens. {SEEN}",
    ),
    Row(
        "preferences-over-prompts",
        PART,
        "Held-out error falls with the number of prompts as a power law.",
        "Stiennon 2020, figure 6; Bai 2022, section 3",
        "Held-out accuracy rises about evenly with each doubling of the data, and of the parameters.",
        MEASUREMENT,
        (
            Figure("exponent of the error on people's pairs", of_law("pairs", "exponent"), Rule(nothing=0.02)),
            Figure("share of the log error's variance that the law explains, people's pairs",
                   of_law("pairs", "r_squared"), Rule(than=0.5), share=True),
            Figure("exponent of the error on AI's rankings", of_law("rankings", "exponent"), Rule(nothing=0.02)),
        ),
        plots("pairs", "rankings"),
        "The error is 1 − accuracy, over 50, 100, 200 and 400 prompts of both kinds together, one pass over each, so "
        "more prompts are also more steps. Over so short a range a power law of the error and an even rise of accuracy "
        "look alike. A law without a floor is asked for, though people do not always agree. Held-out prompts are the "
        "same on every seed.",
    ),
)  # fmt: skip
