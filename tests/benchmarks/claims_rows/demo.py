"""Rows of the whole chain: SFT against base, PPO-ptx and DPO against SFT, over policy sizes."""

import json
from argparse import Namespace

from sweeps.estimates import SAME

from claims_rows.pictures import steps
from claims_rows.row import Draw, Figure, Measurement, Observed, Place, Read, Row, derived, minus, reader
from claims_rows.verdicts import Rule
from pipeline.store.artifacts import ArtifactStore
from stages.page.plot import Plot

PART = "SFT, PPO-ptx and DPO"
POLICIES = {"base": "base", "sft": "SFT", "ppo": "PPO-ptx", "dpo": "DPO", "best_of_n": "best of n"}
SIZES = {
    "small": ["model.hidden_size=64", "model.num_hidden_layers=4", "model.num_attention_heads=4",
              "model.intermediate_size=208"],
    "large": ["model.hidden_size=256", "model.num_hidden_layers=5", "model.num_attention_heads=8",
              "model.intermediate_size=832"],
}  # fmt: skip
"""Policies of 0.3M and 4M parameters beside the config's own."""
LABELS = {"small": "0.3M", "own": "1M", "large": "4M"}


def run(place: Place, seed: int, settings: dict) -> dict:
    """Run the chain of a seed; return gold, perplexity and KL of each policy."""
    import demo_seeds

    row = demo_seeds.on_seed(demo_seeds.parse(place.words(seed)), place.stop, seed)
    return {"policies": {name: figures(policy) for name, policy in row["policies"].items()}}


def figures(policy: dict) -> dict:
    """Return the figures of a policy in results.json that rows use."""
    held_out = policy.get("gold_held_out_tasks")
    return {
        "gold": policy["gold"]["overall"],
        "held_out": held_out and held_out["overall"],
        "perplexity": policy["pretrain_perplexity"],
        "kl": policy["kl_to_sft"],
    }


def run_sizes(place: Place, seed: int, settings: dict) -> dict:
    """Run base, SFT and PPO-ptx with policies of several sizes, in the same world."""
    from sweeps.runner import run_rlhf

    found = {"own": run(place, seed, settings)["policies"]}
    for label in settings["sizes"]:
        other = derived(place, f"{place.name}-{label}", SIZES[label])
        args = Namespace(config=other.config, artifacts=place.artifacts)
        store = ArtifactStore(place.artifacts, f"{other.name}-seed{seed}")
        run_rlhf(args, place.stop, "evaluate", store.base.name, [f"seed={seed}", "evaluate.policies=[base,sft,ppo]"])
        results = json.loads((store.folder("evaluate") / "results.json").read_text(encoding="utf-8"))
        found[label] = {name: figures(policy) for name, policy in results["policies"].items()}
    return {"sizes": found}


CHAIN = Measurement("demo", "the whole chain", run, {"whole": {}, "quick": {}, "micro": {}})
OVER_SIZES = Measurement(
    "sizes",
    "the whole chain at three sizes of the policy",
    run_sizes,
    {"whole": {"sizes": ["small", "large"]}, "quick": {"sizes": ["small"]}, "micro": {"sizes": ["small"]}},
)


def gold(policy: str, half: str = "held_out") -> Read:
    """Return a reader of a policy's gold."""
    return reader("policies", policy, half)


def compared(ours: str, theirs: str) -> tuple[Figure, ...]:
    """Return the differences in gold of two policies: on held-out tasks, and on all prompts."""
    rule = Rule(nothing=SAME, enough=2 * SAME)
    names = f"{POLICIES[ours]} − {POLICIES[theirs]}"
    return (
        Figure(f"gold, tasks not trained on: {names}", minus(gold(ours), gold(theirs)), rule),
        Figure(f"gold, all prompts: {names}", minus(gold(ours, "gold"), gold(theirs, "gold")), rule),
    )


def pair_plot(ours: str, theirs: str) -> Draw:
    """Return a function that draws the gold of two policies, on new tasks and on all prompts."""

    def plots(observed: Observed) -> list[Plot]:
        names: list = []
        for half, where in (("held_out", "new tasks"), ("gold", "all prompts")):
            names += [(f"{POLICIES[one]}\n{where}", one, gold(one, half)) for one in (theirs, ours)] + [None]
        title = f"{POLICIES[theirs]} and {POLICIES[ours]}"
        return [steps(f"{theirs}-{ours}", title, "gold (0 to 1)", names[:-1], observed)]

    return plots


def at_size(size: str, policy: str) -> Read:
    """Return a reader of a policy's gold at a size."""
    return reader("sizes", size, policy, "held_out")


def largest(policy: str) -> Read:
    """Return a reader of a policy's gold at the largest size that was run."""
    return lambda found: at_size("large" if "large" in found["sizes"] else "own", policy)(found)


def smallest(policy: str) -> Read:
    """Return a reader of a policy's gold at the smallest size that was run."""
    return lambda found: at_size("small" if "small" in found["sizes"] else "own", policy)(found)


def least_gain(ours: str, theirs: str) -> Read:
    """Return a reader of the smallest difference in gold over all sizes."""

    def read(found: dict) -> float | None:
        gaps = [minus(at_size(size, ours), at_size(size, theirs))(found) for size in found["sizes"]]
        return None if None in gaps else min(gaps)

    return read


def sizes_plot(observed: Observed) -> list[Plot]:
    """Return the gold of base, SFT and PPO-ptx at each size."""
    known = [size for size in LABELS if all(size in found["sizes"] for found in observed.values())]
    names: list = []
    for size in known:
        names += [(f"{POLICIES[one]}\n{LABELS[size]}", one, at_size(size, one)) for one in ("base", "sft", "ppo")] + [
            None
        ]
    title = "Gold of each policy at each number of parameters"
    return [steps("sizes", title, "gold, tasks not trained on (0 to 1)", names[:-1], observed)]


ROWS = (
    Row(
        "sft-over-base",
        PART,
        "Fine-tuning on demonstrations beats the base model, asked fairly.",
        "InstructGPT (Ouyang 2022), figure 1",
        "Labelers prefer SFT models to GPT-3, also when that is prompted, at each of three sizes.",
        CHAIN,
        compared("sft", "base"),
        pair_plot("sft", "base"),
        "Base is asked in plain text, the form of its corpus; the world's gold scorer judges in place of labelers.",
    ),
    Row(
        "ppo-over-sft",
        PART,
        "PPO-ptx beats the SFT model that it starts from.",
        "InstructGPT (Ouyang 2022), figure 1",
        "Labelers prefer PPO-ptx to SFT at each of three sizes.",
        CHAIN,
        compared("ppo", "sft"),
        pair_plot("ppo", "sft"),
        "PPO has climbed the reward model only; gold, which judges, was not climbed.",
    ),
    Row(
        "dpo-over-sft",
        PART,
        "DPO beats the SFT model that it starts from.",
        "DPO (Rafailov 2023), section 6.2",
        "On summaries DPO wins against the reference more often than SFT does; on dialogue it improves on the "
        "preferred responses of the data set.",
        CHAIN,
        compared("dpo", "sft"),
        pair_plot("dpo", "sft"),
    ),
    Row(
        "order-at-every-size",
        PART,
        "Base, SFT and PPO-ptx come in this order at every size.",
        "InstructGPT (Ouyang 2022), figure 1",
        "The order is the same at 1.3B, 6B and 175B parameters.",
        OVER_SIZES,
        (
            Figure("least gain of PPO-ptx over SFT at any size", least_gain("ppo", "sft"), Rule(nothing=SAME)),
            Figure("least gain of SFT over base at any size", least_gain("sft", "base"), Rule(nothing=SAME)),
        ),
        sizes_plot,
        "Sizes here are 0.3M, 1M and 4M parameters; the learning rates are those of 1M.",
    ),
    Row(
        "small-ppo-over-large-base",
        PART,
        "The smallest PPO-ptx model beats the largest base model.",
        "InstructGPT (Ouyang 2022), abstract",
        "Labelers prefer the 1.3B model's answers to those of GPT-3 with 175B parameters.",
        OVER_SIZES,
        (
            Figure(
                "gold: smallest PPO-ptx − largest base",
                minus(smallest("ppo"), largest("base")),
                Rule(nothing=SAME, enough=2 * SAME),
            ),
        ),
        sizes_plot,
        "13 times as many parameters here, 135 times there. PPO-ptx has learnt from demonstrations and rankings, base "
        "has not, in both.",
    ),
)
