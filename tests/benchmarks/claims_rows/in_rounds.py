"""Row of labels that are collected in rounds, on answers of the newest policy."""

from sweeps.estimates import SAME

from claims_rows.pictures import steps
from claims_rows.row import Figure, Measurement, Observed, Place, Row, derived
from claims_rows.verdicts import Rule
from pipeline.config.yaml_tree import read_tree
from stages.page.plot import Plot


def run(place: Place, seed: int, settings: dict) -> dict:
    """Run the rounds, and the same labels at once; return gold of PPO in each."""
    import rounds

    smaller = rounds.QUICK if settings["overrides"] == "micro" else settings["overrides"]
    place = derived(place, f"{place.name}-own", smaller)
    args = rounds.parse([*place.words(seed), "--rounds", str(settings["rounds"])])
    row = rounds.run_seed(args, read_tree(args.config, []).values, seed, place.stop)
    gold = [one["ppo_gold_held_out_tasks"] for one in row["rounds"]]
    return {"rounds": gold, "once": row["once"]["ppo_gold_held_out_tasks"]}


MEASUREMENT = Measurement(
    "rounds",
    "labels in rounds and at once",
    run,
    {
        "whole": {"rounds": 2, "overrides": []},
        "quick": {
            "rounds": 2,
            "overrides": [
                "world.demonstrations=800", "world.prompts=600", "world.evaluation_prompts=120", "base.max_steps=200",
                "base.eval_steps=200", "sft.num_train_epochs=2", "rank.prompts=50", "ppo.total_episodes=320",
            ],
        },
        "micro": {"rounds": 2, "overrides": "micro"},
    },
    config="tests/benchmarks/rounds.yaml",
)  # fmt: skip


def gain(found: dict) -> float:
    """Return gold of PPO in the last round less that with the same labels at once."""
    return found["rounds"][-1] - found["once"]


def plots(observed: Observed) -> list[Plot]:
    """Return gold of PPO in each round, and at once."""
    count = len(next(iter(observed.values()), {"rounds": []})["rounds"])
    names = [(f"round {i + 1}", "ppo", lambda found, i=i: found["rounds"][i]) for i in range(count)]
    names.append(("at once", "best_of_n", lambda found: found["once"]))
    return [steps("rounds", "Gold of PPO, in rounds and at once", "gold, tasks not trained on", names, observed)]


ROWS = (
    Row(
        "rounds-over-once",
        "Collecting labels in rounds",
        "Labels on answers of the newest policy are worth more than as many at once.",
        "Bai 2022, section 4.5 (iterated online RLHF) and figure 16",
        "At equal size and settings, a policy trained on a mixture of data from rounds is preferred to one trained on "
        "the first round's data alone.",
        MEASUREMENT,
        (Figure("gold: last round − at once", gain, Rule(nothing=SAME, enough=SAME)),),
        plots,
        "Two rounds of 200 rankings; PPO starts from SFT again in each.",
    ),
)
