"""Rows of PPO and DPO on real preferences, by a reward model of rankings that neither learned from.

The pipeline keeps rankings for that model (`rankings.judge_fraction`): of the prompts that are not
held out, half train the reward model that PPO climbs and DPO, and half train the judge, which
starts from a seed of its own. No policy sees the judge's rankings or its scores.
"""

import json
from collections.abc import Iterable

from claims_rows.chain import finished_chain
from claims_rows.pictures import steps
from claims_rows.preferences import PART, with_rankings_of_the_world
from claims_rows.row import Draw, Figure, Measurement, Observed, Place, Read, Row, derived, minus, reader
from claims_rows.verdicts import Rule
from data.records import prompt_key
from stages.page.plot import Plot

POLICIES = {"ppo": "PPO-ptx", "dpo": "DPO"}
JUDGES = {"judge": "kept", "climbed": "reward_model"}
"""What is called so here → its name in results.json."""
SEEDS = 3
"""Seeds of a whole run, each of which takes hours."""
HALVES = (
    "rankings.validation_fraction=0.2", "rankings.judge_fraction=0.4", "evaluate.policies=[sft,ppo,dpo]",
    "evaluate.greedy_prompts=0",
)  # fmt: skip
"""Settings of every size: as many prompts for the judge as for the reward model and DPO."""


def run(place: Place, seed: int, settings: dict) -> dict:
    """Train the reward model, the judge, PPO and DPO; return what both models say of the policies.

    Returns:
        {"judge", "climbed": {"accuracy", "low"} on held-out pairs, where "low" is the lower end of
        the interval over prompts; "policies": the figures of each}.
    """
    place = derived(place, f"{place.name}-halves", [*HALVES, *settings["overrides"]])
    if settings["world"]:
        place = with_rankings_of_the_world(place, seed)
    store = finished_chain(place, seed, "evaluate")
    folder = store.folder("evaluate")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
    manifest = store.manifest("rm")
    assert manifest is not None, "evaluate needs it"
    own = manifest["metrics"]
    return {
        "judge": accuracy_of(own["judges"]["kept"]),
        "climbed": accuracy_of(own),
        "policies": {name: figures(name, results["policies"][name], rows) for name in ("sft", *POLICIES)},
    }


def accuracy_of(figures: dict) -> dict[str, float | None]:
    """Return a reward model's accuracy on held-out pairs, and the lower end of its interval."""
    return {"accuracy": figures["accuracy"], "low": (figures["accuracy_ci95"] or [None])[0]}


def figures(name: str, policy: dict, rows: list[dict]) -> dict:
    """Return the figures of a policy that rows use.

    Args:
        name: The policy.
        policy: Its entry in results.json.
        rows: The rows of responses.jsonl.

    Returns:
        {"length", "eos_rate", "kl"}; in addition, of all but SFT, "wins" (against SFT) and "gain"
        (the difference in mean score to SFT's) by the judge and by the climbed model, "low" (the
        lower end of the judge's win rate over prompts), and "at_equal_length".
    """
    found = {"length": policy["length"], "eos_rate": policy["eos_rate"], "kl": policy["kl_to_sft"]}
    if name == "sft":
        return found
    said = {ours: policy["judges"][theirs] for ours, theirs in JUDGES.items()}
    return found | {
        "wins": {one: verdict["win_rate_vs_sft"]["value"] for one, verdict in said.items()},
        "gain": {one: verdict["difference_to_sft"]["value"] for one, verdict in said.items()},
        "low": (said["judge"]["win_rate_vs_sft"]["ci95"] or [None])[0],
        "at_equal_length": at_equal_length(rows, name),
    }


def at_equal_length(rows: Iterable[dict], policy: str) -> float | None:
    """Return the judge's win rate against SFT, of answers that ended, as if they were equally long.

    Each answer of the policy is compared with each of SFT's to the same prompt. Those that were cut
    off are left out, as `missing_eos_score` decides of them, and not the judge.

    Args:
        rows: The rows of responses.jsonl.
        policy: The policy.

    Returns:
        The length-controlled win rate (Dubois 2024, equation 2); None where no pair has ended.
    """
    from stages.evaluation.judging import length_controlled, preference_by_score

    answers: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        if row["finished"]:
            answers.setdefault(row["policy"], {}).setdefault(prompt_key(row["prompt"]), []).append(row)
    preferences, gaps, clusters = [], [], []
    for key, some in answers.get(policy, {}).items():
        for ours in some:
            for theirs in answers.get("sft", {}).get(key, []):
                preferences.append(preference_by_score(ours["judges"]["kept"], theirs["judges"]["kept"]))
                gaps.append(ours["length"] - theirs["length"])
                clusters.append(key)
    found = length_controlled(preferences, gaps, clusters)
    return None if found is None else found["value"]


MEASUREMENT = Measurement(
    "by-judge",
    "PPO and DPO of a real model on real preferences, by a reward model of the other half",
    run,
    {
        "whole": {
            "overrides": [
                "ppo.total_episodes=640", "ppo.eval_steps=10", "dpo.max_steps=60", "dpo.eval_steps=60",
                "evaluate.num_prompts=64", "evaluate.samples_per_prompt=2",
            ],
            "world": False,
        },
        "quick": {
            "overrides": [
                "sft.max_steps=4", "sft.warmup_steps=2", "rm.max_steps=16", "rm.warmup_steps=2",
                "ppo.total_episodes=64", "ppo.eval_steps=2", "dpo.max_steps=4", "dpo.eval_steps=4",
                "evaluate.num_prompts=16",
            ],
            "world": False,
        },
        "micro": {"overrides": ["ppo.missing_eos_score=null", "evaluate.missing_eos_score=null"], "world": True},
    },
    config="configs/smollm2-preferences.yaml",
    micro=(),
    seeds=SEEDS,
)  # fmt: skip


# -- what rows read ------------------------------------------------------------------------------


def of(policy: str, *path: str) -> Read:
    """Return a reader of a figure of a policy."""
    return reader("policies", policy, *path)


def plots(*policies: str) -> Draw:
    """Return a function that draws what both models say of policies, their lengths and KL."""

    def draw(observed: Observed) -> list[Plot]:
        wins: list = []
        for one in policies:
            label = POLICIES[one]
            wins += [
                (f"{label}\nthe climbed", "rm", of(one, "wins", "climbed")),
                (f"{label}\nthe judge", one, of(one, "wins", "judge")),
                (f"{label}\nequal length", "best_of_n", of(one, "at_equal_length")),
                None,
            ]
        gains = [
            (f"{POLICIES[one]}\n{name}", tone, of(one, "gain", judge))
            for one in policies
            for judge, name, tone in (("climbed", "the climbed", "rm"), ("judge", "the judge", one))
        ]
        each = [("SFT", "sft"), *((POLICIES[one], one) for one in policies)]

        def by_policy(figure: str) -> list:
            return [(label, one, of(one, figure)) for label, one in each]

        text = "The climbed: the reward model that PPO climbed. Equal length: by the judge, of answers that ended."
        return [
            steps("wins", "Wins against SFT", "win rate, ties half", wins[:-1], observed, caption=text,
                  level=(0.5, "SFT")),
            steps("gains", "Mean score less SFT's", "difference, in each model's own units", gains, observed,
                  level=(0.0, "SFT")),
            steps("length", "Length of answers", "tokens per response", by_policy("length"), observed),
            steps("ended", "Answers that ended by themselves", "share of responses", by_policy("eos_rate"), observed),
            steps("kl", "Distance from SFT", "KL to SFT, nats per response", by_policy("kl")[1:], observed),
        ]  # fmt: skip

    return draw


# -- rows ----------------------------------------------------------------------------------------

EVEN = 0.5
"""Win rate of a policy that is no better than SFT."""
NOTHING, ENOUGH = 0.02, 0.05
"""Distances of win rates that count as none, and that are less than what papers say."""
NOTE = (
    "SmolLM2-135M-Instruct with LoRA; 20 updates of 32 episodes, 60 steps of DPO, 64 held-out prompts with two answers "
    "each; settings are guesses, not tuned. The reward model and DPO learn from one half of the rankings' prompts, the "
    "judge from the other, from a start of its own; both models begin as the same SFT model and learn from the same "
    "people and AI, so what these like in common, length for one, misleads both. The halves, the held-out rankings "
    "and the prompts are the same on every seed, and the interval over seeds says nothing of others. An answer that is "
    "cut off scores −2 by both models, so that ending by itself wins; the figure at equal length has none of these. "
    "One run without a judge, seed 0, shorter and with all rankings for the reward model, told nothing from SFT, and "
    "had been seen when this rule was written."
)


def over_sft(policy: str) -> tuple[Figure, ...]:
    """Return the figures of a policy's wins against SFT by the judge, and of the judge itself."""
    return (
        Figure(f"wins against SFT by the judge: {POLICIES[policy]}", of(policy, "wins", "judge"),
               Rule(than=EVEN, nothing=NOTHING, enough=ENOUGH), share=True),
        Figure("lower end of its 95 % interval over prompts", of(policy, "low"), Rule(than=EVEN), share=True),
        Figure("the same of answers that ended, at equal length", of(policy, "at_equal_length"), Rule(than=EVEN),
               share=True),
        Figure("accuracy of the judge on held-out pairs: lower end over prompts", reader("judge", "low"),
               Rule(than=EVEN), share=True),
    )  # fmt: skip


def overrated(policy: str) -> Read:
    """Return a reader of a policy's win rate by the climbed model less that by the judge."""
    return minus(of(policy, "wins", "climbed"), of(policy, "wins", "judge"))


ROWS = (
    Row(
        "preferences-ppo-by-judge",
        PART,
        "PPO-ptx on real preferences beats SFT by a judge that it did not climb.",
        "Bai 2022, section 4.2; InstructGPT (Ouyang 2022), section 4.1 and figure 3",
        "With preferences split in halves, a policy that is trained on one preference model gains by the other as "
        "well, and less so in the end; labelers whose rankings trained nothing rank models much as those of training "
        "do.",
        MEASUREMENT,
        over_sft("ppo"),
        plots("ppo"),
        f"The judge is a reward model, where the paper has people. {NOTE}",
    ),
    Row(
        "preferences-dpo-by-judge",
        PART,
        "DPO on real preferences beats SFT by a judge whose rankings it did not learn from.",
        "DPO (Rafailov 2023), section 6.2",
        "On single-turn dialogues of hh-rlhf, DPO is the only cheap method whose answers beat the preferred ones of "
        "the data set, by GPT-4; best of 128 does about as well.",
        MEASUREMENT,
        over_sft("dpo"),
        plots("dpo"),
        f"The judge is a reward model and the opponent is SFT; in the paper GPT-4 compares with the data set. {NOTE}",
    ),
    Row(
        "preferences-climbed-overrates",
        PART,
        "The reward model that PPO climbed overrates it, beside one of other rankings.",
        "Bai 2022, section 4.2; Eisenstein 2023 (helping or herding?); Gao 2023",
        "Optimised against one preference model, a policy's score by another, of other data, lags behind and may "
        "fall: alignment to one raises the score by another less, or not at all.",
        MEASUREMENT,
        (
            Figure("wins of PPO-ptx against SFT: by the climbed reward model − by the judge", overrated("ppo"),
                   Rule(nothing=NOTHING, enough=NOTHING)),
        ),
        plots("ppo", "dpo"),
        f"DPO is drawn beside it: it learnt from the same pairs as the climbed model, without its scores. {NOTE}",
    ),
)  # fmt: skip
