"""Rows of rankings with many ties: losses that count them against losses that leave them out."""

from claims_rows.chain import finished_chain
from claims_rows.pictures import steps
from claims_rows.row import Figure, Measurement, Observed, Place, Read, Row, minus, reader
from claims_rows.verdicts import Rule
from pipeline.store.artifacts import ArtifactStore
from stages.page.plot import Plot

PART = "Reward models"
FIGURES = ("gold_order", "log_loss", "tie_error", "ties")
SHORT = {"sigmoid": "sigmoid", "davidson": "davidson", "plackett_luce": "P.-Luce", "davidson_luce": "D.-Luce"}


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train reward models on coarse rankings of 2 and 6 answers; return the figures of each."""
    import ties

    words = [*place.words(seed), "--rankings", str(settings["rankings"]), "--grade", str(settings["grade"])]
    args = ties.parse(words)
    finished_chain(place, seed, "sft", ArtifactStore(args.artifacts, f"{args.name}-ties-seed{seed}"))
    models = {}
    for responses in ties.LOSSES:
        for row in ties.on_seed(args, place.stop, seed, responses):
            models[f"{row['loss']} of {responses}"] = {key: row[key] for key in FIGURES}
    return {"models": models}


MEASUREMENT = Measurement(
    "ties",
    "reward models on rankings with ties",
    run,
    {
        "whole": {"rankings": 600, "grade": 3.0},
        "quick": {"rankings": 200, "grade": 3.0},
        "micro": {"rankings": 40, "grade": 3.0},
    },
)


def gain(ours: str, theirs: str, figure: str) -> Read:
    """Return a reader of a difference between two models."""
    return minus(reader("models", ours, figure), reader("models", theirs, figure))


def plots(observed: Observed) -> list[Plot]:
    """Return the order by gold, and the log loss, of each model."""
    first = next(iter(observed.values()), {"models": {}})
    names = [
        (f"{SHORT[name.split(' of ')[0]]}\n{name.rpartition(' ')[2]} answers", "rm", name) for name in first["models"]
    ]
    drawn = []
    for figure, unit in (("gold_order", "pairs ordered as gold does"), ("log_loss", "log loss, nats a pair")):
        readers = [(label, tone, reader("models", name, figure)) for label, tone, name in names]
        drawn.append(steps(f"ties-{figure}", unit, unit, readers, observed))
    return drawn


ROWS = (
    Row(
        "ties-in-pairs",
        PART,
        "With many ties, a loss that counts them orders no worse than one that leaves them out.",
        "Davidson 1970; Chen 2024 (extending DPO to accommodate ties)",
        "A DPO that models ties learns from tied pairs without the loss in performance that they cause in plain DPO.",
        MEASUREMENT,
        (
            Figure("pairs ordered as gold: davidson − sigmoid", gain("davidson of 2", "sigmoid of 2", "gold_order"),
                   Rule(than=-0.005)),
            Figure("log loss: davidson − sigmoid", gain("davidson of 2", "sigmoid of 2", "log_loss"),
                   Rule("below")),
        ),
        plots,
        "The paper's is DPO; ours are reward models, with a third of the pairs tied. Log loss is that of labels with "
        "ties, by a ν and a scale that are fitted for both on other prompts.",
    ),
    Row(
        "ties-in-rankings",
        PART,
        "Counting ties helps where whole rankings of six answers are given, too.",
        "No paper claims it; the model is of Davidson 1970",
        "Ties of two are modelled; here the same is done for whole rankings.",
        MEASUREMENT,
        (
            Figure("pairs ordered as gold: davidson_luce − plackett_luce",
                   gain("davidson_luce of 6", "plackett_luce of 6", "gold_order"), Rule(nothing=0.005, enough=0.01)),
        ),
        plots,
        "Asks for more than the row above: a better order.",
    ),
)  # fmt: skip
