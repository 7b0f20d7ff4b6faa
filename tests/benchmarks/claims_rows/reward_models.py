"""Rows of what reward models learn from: held-out labelers, whole rankings, shuffled pairs."""

import random
from itertools import combinations

from claims_rows.chain import finished_chain, held_out_fit, reward_model_of
from claims_rows.pictures import steps
from claims_rows.row import Figure, Measurement, Observed, Place, Read, Row, minus, reader
from claims_rows.verdicts import Rule
from stages.page.plot import Plot

PART = "Reward models"


# -- held-out labelers ---------------------------------------------------------------------------


def run_labelers(place: Place, seed: int, settings: dict) -> dict:
    """Train a reward model without each labeler in turn; return its accuracy on both groups.

    Training and test prompts differ too: the test rankings are the chain's held-out ones.
    """
    from ties import read

    chain = finished_chain(place, seed, "rankings")
    train, test = read(chain, "train"), read(chain, "validation")
    prompts = list(dict.fromkeys(row["prompt"] for row in train))[: settings["prompts"]]
    kept = [row for row in train if row["prompt"] in set(prompts)]
    folds = {}
    for labeler in sorted({row["labeler"] for row in test}):
        others = [row for row in kept if row["labeler"] != labeler]
        store = reward_model_of(place, seed, chain, f"{chain.base.name}-without-{labeler}", others, settings["rm"])
        folds[labeler] = {
            "known": held_out_fit(store, [row for row in test if row["labeler"] != labeler])["accuracy"],
            "held_out": held_out_fit(store, [row for row in test if row["labeler"] == labeler])["accuracy"],
        }
    mean = {group: sum(fold[group] for fold in folds.values()) / len(folds) for group in ("known", "held_out")}
    return {"folds": folds, "mean": mean}


LABELERS = Measurement(
    "labelers",
    "a reward model without each labeler",
    run_labelers,
    {
        "whole": {"prompts": 1500, "rm": ["rm.num_train_epochs=2", "rm.eval_steps=100000"]},
        "quick": {"prompts": 400, "rm": ["rm.num_train_epochs=2", "rm.eval_steps=100000"]},
        "micro": {"prompts": 60, "rm": ["rm.max_steps=2"]},
    },
)


def labelers_plot(observed: Observed) -> list[Plot]:
    """Return the accuracy on labelers of training and on the one held out, for each fold."""
    first = next(iter(observed.values()), {"folds": {}})
    names = [("known", "rm", reader("mean", "known")), ("held out", "dpo", reader("mean", "held_out"))]
    names += [(labeler, "dpo", reader("folds", labeler, "held_out")) for labeler in first["folds"]]
    text = "Known: the four labelers of training; held out: the fifth, a mean over folds, then each fold."
    return [steps("labelers", "Accuracy by labeler", "accuracy on held-out pairs", names, observed, caption=text)]


# -- whole rankings against shuffled pairs -------------------------------------------------------


def pairs_of_rankings(rows: list[dict], seed: int) -> list[dict]:
    """Return every two responses of each ranking as a ranking of its own, shuffled."""
    pairs = [
        row
        | {
            "id": f"{row['id']}-{i}-{j}",
            "responses": [row["responses"][i], row["responses"][j]],
            "ranks": [1, 2] if row["ranks"][i] < row["ranks"][j] else [2, 1],
            "finished": [row["finished"][i], row["finished"][j]],
        }
        for row in rows
        for i, j in combinations(range(len(row["responses"])), 2)
        if row["ranks"][i] != row["ranks"][j]
    ]
    random.Random(seed).shuffle(pairs)
    return pairs


def one_labeler_a_prompt(rows: list[dict]) -> list[dict]:
    """Return a ranking of each prompt, by each labeler in turn."""
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    return [own[i % len(own)] for i, own in enumerate(by_prompt.values())]


def run_epochs(place: Place, seed: int, settings: dict) -> dict:
    """Train on whole rankings and on the same pairs, shuffled, for 1 to 4 epochs."""
    from ties import read

    chain = finished_chain(place, seed, "rankings")
    test, rankings = read(chain, "validation"), one_labeler_a_prompt(read(chain, "train"))[: settings["prompts"]]
    per_ranking = len(pairs_of_rankings(rankings, seed)) / len(rankings)
    arms = {
        "whole": (rankings, settings["batch"]),
        "pairs": (pairs_of_rankings(rankings, seed), round(settings["batch"] * per_ranking)),
    }
    found: dict[str, dict] = {}
    for arm, (rows, batch) in arms.items():
        for epochs in settings["epochs"]:
            options = [f"rm.num_train_epochs={epochs}", "rm.max_steps=null", "rm.gradient_accumulation_steps=1"]
            options += [f"rm.per_device_train_batch_size={batch}", "rm.eval_steps=100000", "rm.keep=last"]
            name = f"{chain.base.name}-{arm}-{epochs}"
            store = reward_model_of(place, seed, chain, name, rows, options)
            found.setdefault(arm, {})[str(epochs)] = held_out_fit(store, test)
    return {"arms": found}


EPOCHS = Measurement(
    "epochs",
    "whole rankings against the same pairs shuffled, over epochs",
    run_epochs,
    {
        "whole": {"prompts": 800, "batch": 8, "epochs": [1, 2, 3, 4]},
        "quick": {"prompts": 150, "batch": 8, "epochs": [1, 4]},
        "micro": {"prompts": 20, "batch": 4, "epochs": [1, 4]},
    },
)


def after(arm: str, epochs: int, figure: str) -> Read:
    """Return a reader of an arm's figure after some epochs."""
    return reader("arms", arm, str(epochs), figure)


def epochs_plot(observed: Observed) -> list[Plot]:
    """Return held-out loss and accuracy over epochs, for both arms."""
    first = next(iter(observed.values()), {"arms": {"whole": {}}})
    drawn = []
    for figure, unit in (("log_loss", "held-out loss, nats a pair"), ("accuracy", "accuracy on held-out pairs")):
        names = [
            (f"{epochs}\n{label}" if i == 0 else epochs, tone, after(arm, epochs, figure))
            for arm, label, tone in (("whole", "rankings", "rm"), ("pairs", "pairs", "dpo"))
            for i, epochs in enumerate(first["arms"]["whole"])
        ]
        names.insert(len(names) // 2, None)
        title = unit.partition(",")[0]
        drawn.append(steps(f"epochs-{figure}", f"{title} over epochs", unit, names, observed, x_label="epochs"))
    return drawn


ROWS = (
    Row(
        "rankings-as-one-element",
        PART,
        "All pairs of a prompt as one batch element overfit less than the same pairs shuffled.",
        "InstructGPT (Ouyang 2022), section 3.5",
        "Shuffled into one data set, a single pass over the pairs makes the reward model overfit; as one batch "
        "element a prompt they do not, with lower validation loss and higher accuracy.",
        EPOCHS,
        (
            Figure("held-out loss after 1 epoch: shuffled pairs − whole rankings",
                   minus(after("pairs", 1, "log_loss"), after("whole", 1, "log_loss")), Rule(nothing=0.005)),
            Figure("held-out loss after 4 epochs: shuffled pairs − whole rankings",
                   minus(after("pairs", 4, "log_loss"), after("whole", 4, "log_loss")), Rule(nothing=0.005)),
            Figure("accuracy after 1 epoch: whole rankings − shuffled pairs",
                   minus(after("whole", 1, "accuracy"), after("pairs", 1, "accuracy")), Rule(nothing=0.005)),
        ),
        epochs_plot,
        "As many pairs a step and as many steps on both sides, at one learning rate. Batches hold rows of like "
        "length, so two pairs of a prompt meet in a batch more often than in a plain shuffle.",
    ),
    Row(
        "held-out-labelers",
        PART,
        "A reward model agrees almost as well with labelers that it was not trained on.",
        "InstructGPT (Ouyang 2022), section 4.1",
        "In five folds of labelers: accuracy 69.6 ± 0.9 % on those held out, 72.4 ± 0.4 % on those of training.",
        LABELERS,
        (
            Figure("accuracy: held-out labeler − labelers of training",
                   minus(reader("mean", "held_out"), reader("mean", "known")), Rule(than=-0.028)),
            Figure("accuracy on the held-out labeler", reader("mean", "held_out"), Rule(than=0.5), share=True),
        ),
        labelers_plot,
        "Holds if the loss is smaller than the paper's 2.8 points. Simulated labelers differ by their weights and "
        "small biases, with noise set to 72.6 % agreement.",
    ),
)  # fmt: skip
