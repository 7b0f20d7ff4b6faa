"""Compare conditional training and hindsight with PPO and best of n at equal numbers of samples.

    python tests/benchmarks/conditional.py [--seeds 3 4 5] [--ways …] [--quick] [key=value …]

For each seed, one world, SFT policy and reward model serve all ways:

- `ppo`: the stage, with the samples of SAMPLES as episodes;
- `best_of_n`: SFT's best of n answers to each evaluation prompt, n so that as many are sampled;
- `demonstrations`: SFT learns its demonstrations once more, after control tokens (Korbak 2023): no
  samples;
- `conditional`: SFT learns as many samples of its own after control tokens, in one round;
- `hindsight`: the same number in several rounds, each sampled from the policy of the one before
  and relabelled by what it turned out to be (Zhang 2023; Lu 2022).

All of them are asked for two answers to each evaluation prompt with the same seeds (best of n for
one), and judged by the world's gold scorer. Settings of conditional and hindsight (learning rate,
number of control tokens, rounds) were chosen by gold on seed 10. Prints one JSON object for each
seed and way, then a Markdown table with means over seeds, their 95 % intervals (Student's t over
seeds) and the differences to SFT, PPO and best of n, paired by seed. Lines are kept in
results/conditional.jsonl. Run it again to resume after an interruption, or to print the table of
existing results. --quick runs everything in seconds with a model of a few thousand parameters.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from sweeps.estimates import differences_over_seeds, over_seeds
from sweeps.points import provenance, save_rows
from sweeps.runner import make_parser, parse_arguments, run_command, run_rlhf
from sweeps.text import markdown, with_interval

from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SEEDS = (3, 4, 5)
TOKENS = "model.control_tokens=[<|worst|>, <|bad|>, <|good|>, <|best|>]"
REFERENCES = ("sft", "ppo", "best_of_n")
"""Measured by evaluate; the others are measured here."""
WAYS = ("demonstrations", "conditional", "hindsight")
LABELS = {"sft": "SFT", "ppo": "PPO", "best_of_n": "best of n"}

FULL = {
    "config": "configs/tiny.yaml",
    "samples": 1280,
    "evaluation_prompts": 160,
    "common": ["rankings.num_prompts=400", "rankings.judge_fraction=0", "rm.max_steps=100"],
    "demonstrations": ["sft.learning_rate=5e-4", "sft.num_train_epochs=1"],
    "conditional": ["sft.learning_rate=2e-3", "sft.num_train_epochs=3", "sft.conditional.missing_eos_score=-3"],
    "hindsight": ["sft.learning_rate=2e-3", "sft.num_train_epochs=3", "sft.conditional.missing_eos_score=-3"],
    "per_prompt": 4,
    "rounds": 2,
    "response_length": 32,
}
"""Sizes and settings. rm and PPO are shorter than in configs/tiny.yaml."""
QUICK = FULL | {
    "config": "tests/resume/micro.yaml",
    "samples": 32,
    "evaluation_prompts": 20,
    "common": ["sft.ppo_init=null", "rm.ensemble=1", "ppo.kl_target=null"],
    "demonstrations": [],
    "conditional": ["sft.max_steps=4"],
    "hindsight": ["sft.max_steps=4"],
    "per_prompt": 2,
    "rounds": 2,
    "response_length": 8,
}


def run(argv: list[str], stop: StopFlag) -> None:
    """Run every way on each seed, and print the table."""
    args = parse(argv)
    rows = [row for seed in args.seeds for row in on_seed(args, stop, seed)]
    print(f"\n{table(rows, args.seeds)}")


def on_seed(args: Namespace, stop: StopFlag, seed: int) -> list[dict]:
    """Run every way on a seed; keep, print and return their JSON objects.

    Args:
        args: The command line.
        stop: Set by a signal.
        seed: The seed.
    """
    store = ArtifactStore(args.artifacts, f"{args.name}-seed{seed}")
    samples, n = args.sizes["samples"], best_of(args.sizes)
    wanted = [f"ppo.total_episodes={samples}", f"evaluate.best_of={n}", "evaluate.samples_per_prompt=2"]
    wanted += ["evaluate.policies=[sft,ppo,best_of_n]", f"evaluate.num_prompts={args.sizes['evaluation_prompts']}"]
    common = [f"seed={seed}", *args.sizes["common"]]
    run_rlhf(args, stop, "evaluate", store.base.name, [*common, *wanted, *args.overrides])
    found = [evaluated(store, way) for way in REFERENCES]
    for way in args.ways:
        variant = ArtifactStore(args.artifacts, f"{store.base.name}-{way}")
        options = [*common, *settings_of(args.sizes, store, way), *args.overrides]
        run_rlhf(args, stop, "sft", variant.base.name, options)
        found.append(measured(args, store, variant, way))
    for row in found:
        row |= {"bench": "conditional", "experiment": args.name, "seed": seed, "overrides": args.overrides}
        print(json.dumps(row), flush=True)
    save_rows(args.results / "conditional.jsonl", found, lambda row: (row["experiment"], row["way"], row["seed"]))
    return found


def parse(argv: list[str]) -> Namespace:
    """Parse the command line; `sizes` are those of the whole benchmark, or of --quick."""
    parser = make_parser("conditional.py", __doc__, HERE / "results")
    parser.set_defaults(config=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="seeds to run")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="ways to run beside PPO and best of n")
    parser.add_argument("--quick", action="store_true", help="a model of a few thousand parameters, in seconds")
    args = parse_arguments(parser, argv)
    args.sizes = QUICK if args.quick else FULL
    args.config = str(Path(args.config or ROOT / args.sizes["config"]).resolve())
    args.artifacts = str(Path(args.artifacts).resolve())
    args.name = "conditional-quick" if args.quick else "conditional"
    return args


def best_of(sizes: dict[str, Any]) -> int:
    """Return n of best of n: as many samples as the others have, spread over evaluation prompts."""
    return max(2, round(sizes["samples"] / sizes["evaluation_prompts"]))


def settings_of(sizes: dict[str, Any], store: ArtifactStore, way: str) -> list[str]:
    """Return the settings of a way: where it starts, what scores, and what it samples.

    Args:
        sizes: FULL or QUICK.
        store: Artifacts of the seed.
        way: One of WAYS.
    """
    options = [
        TOKENS,
        f"model.name_or_path={store.folder('sft') / 'model'}",
        f"sft.conditional.scorer=[{{model: {store.folder('rm') / 'model'}}}]",
        *sizes[way],
    ]
    if way == "demonstrations":
        return options
    rounds = sizes["rounds"] if way == "hindsight" else 1
    prompts, left = divmod(sizes["samples"], rounds * sizes["per_prompt"])
    assert not left, "every way has the same number of samples"
    return options + [
        f"sft.conditional.samples_per_prompt={sizes['per_prompt']}",
        f"sft.conditional.prompts_per_round={prompts}",
        f"sft.conditional.rounds={rounds}",
        f"sft.conditional.response_length={sizes['response_length']}",
    ]


# -- figures ---------------------------------------------------------------------------------------


def evaluated(store: ArtifactStore, way: str) -> dict[str, Any]:
    """Return the figures of a policy that evaluate has measured."""
    results = json.loads((store.folder("evaluate") / "results.json").read_text(encoding="utf-8"))
    policy, stage = results["policies"][way], way if way in ("sft", "ppo") else "evaluate"
    held_out = policy["gold_held_out_tasks"]
    return {
        "way": way,
        "gold": policy["gold"]["overall"],
        "gold_held_out_tasks": held_out and held_out["overall"],
        "score": policy["score"],
        "kl_to_sft": policy["kl_to_sft"],
        "length": policy["length"],
        "eos_rate": policy["eos_rate"],
        **provenance(store.manifest(stage)),
    }


def measured(args: Namespace, store: ArtifactStore, variant: ArtifactStore, way: str) -> dict[str, Any]:
    """Sample a policy's answers as evaluate does, and return its figures.

    Args:
        args: The command line.
        store: Artifacts of the seed: its prompts, SFT and the reward model.
        variant: Artifacts of the way.
        way: One of WAYS.
    """
    from data.encode import decode_response, encode_prompts
    from data.streams import derive_seed
    from data.world.world import World
    from stages.models.loading import load_policy, load_scalar_model, load_tokenizer
    from stages.rollouts.transformers import Decoding, sample

    responses_file = store.folder("evaluate") / "responses.jsonl"
    asked = [json.loads(line) for line in responses_file.read_text(encoding="utf-8").splitlines()]
    asked = [row for row in asked if row["policy"] == "sft" and row["sample"] == 0]
    prompts, folder = [row["prompt"] for row in asked], variant.folder("sft") / "model"
    tokenizer, plain = load_tokenizer(folder), load_tokenizer(store.folder("sft") / "model")
    manifest = variant.manifest("sft")
    ids, chat_ids = (
        [own for own in encode_prompts(one, prompts, prompts) for _ in range(2)] for one in (tokenizer, plain)
    )
    seeds = [derive_seed(manifest["seed"], "evaluate", i, k) for i in range(len(prompts)) for k in range(2)]
    decoding = Decoding(args.sizes["response_length"], eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    policy, reference = load_policy(folder), load_policy(store.folder("sft") / "model")
    answers = sample(policy, ids, seeds, decoding)
    finished = [own[-1] == tokenizer.eos_token_id for own in answers]
    texts = [decode_response(tokenizer, own) for own in answers]
    world = World.from_json(json.loads((store.folder("world") / "world.json").read_text(encoding="utf-8")))
    repeated = [row for row in asked for _ in range(2)]
    gold = [
        world.gold(row["prompt"], text, ended)["overall"]
        for row, text, ended in zip(repeated, texts, finished, strict=True)
    ]
    unknown = [value for value, row in zip(gold, repeated, strict=True) if not row["known_task"]]
    pad = tokenizer.pad_token_id
    ours, theirs = logps(policy, ids, answers, pad), logps(reference, chat_ids, answers, pad)
    scores = reward(load_scalar_model(store.folder("rm") / "model"), chat_ids, answers, pad)
    missing = store.manifest("evaluate")["config"]["evaluate"]["missing_eos_score"]
    counted = [value if ended or missing is None else missing for value, ended in zip(scores, finished, strict=True)]
    return {
        "way": way,
        "gold": mean(gold),
        "gold_held_out_tasks": mean(unknown) if unknown else None,
        "score": mean(counted),
        "kl_to_sft": mean([a - b for a, b in zip(ours, theirs, strict=True)]),
        "length": mean([len(own) for own in answers]),
        "eos_rate": mean(finished),
        "samples": manifest["metrics"]["samples"],
        **provenance(manifest),
    }


def logps(model: Any, prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int) -> list[float]:
    """Return log π of each response, in nats."""
    import torch

    from data.groups import make_rows
    from stages.models.forward import response_logprobs
    from stages.objectives.logprobs import sequence_logps

    found: list[float] = []
    with torch.no_grad():
        for start in range(0, len(prompts), 64):
            part = slice(start, start + 64)
            rows = make_rows(prompts[part], responses[part], pad_id, packed=False)
            found += sequence_logps(response_logprobs(model, rows), rows.response_mask).tolist()
    return found


def reward(model: Any, prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int) -> list[float]:
    """Return the reward model's score of each response."""
    import torch

    from data.groups import make_rows
    from stages.models.forward import response_scores

    found: list[float] = []
    with torch.no_grad():
        for start in range(0, len(prompts), 64):
            part = slice(start, start + 64)
            found += response_scores(model, make_rows(prompts[part], responses[part], pad_id, packed=False)).tolist()
    return found


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def table(rows: Sequence[dict], seeds: Sequence[int]) -> str:
    """Format the Markdown table: a line for each way, over seeds.

    Args:
        rows: A row for each way and seed.
        seeds: The seeds, in order.
    """
    by_way: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: list(seeds).index(row["seed"])):
        by_way.setdefault(row["way"], []).append(row)
    lines = []
    for way, own in by_way.items():
        gold = [row["gold"] for row in own]
        held_out = [row["gold_held_out_tasks"] for row in own]
        differences = [
            "–" if way == other else with_interval(differences_over_seeds(gold, [row["gold"] for row in by_way[other]]))
            for other in REFERENCES
        ]
        kl = "–" if own[0]["kl_to_sft"] is None else with_interval(over_seeds([row["kl_to_sft"] for row in own]), 2)
        lines.append(
            [
                LABELS.get(way, way),
                with_interval(over_seeds(gold, share=True)),
                "–" if None in held_out else with_interval(over_seeds(held_out, share=True)),
                with_interval(over_seeds([row["score"] for row in own]), 2),
                kl,
                *differences,
            ]
        )
    headings = [
        "",
        "gold",
        "gold, held-out tasks",
        "score",
        "KL to SFT",
        "gold − SFT's",
        "gold − PPO's",
        "gold − best of n's",
    ]
    return markdown(headings, lines)


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
