"""Measure what losses that count ties are worth where labelers are coarse.

    python tests/benchmarks/ties.py [-c configs/tiny.yaml] [--seeds 3 4 5 6 7] [--rankings 600]

The embedded world's labelers rank as always, by utility with noise, but say only which grade a
response has: the scale of utility and noise is cut into grades `--grade` wide, and responses of one
grade are tied. For each seed, SFT samples six responses a prompt once; reward models then learn
from the same prompts, in equally many steps: from pairs (the first two responses) by sigmoid and
davidson, from all six by sigmoid, davidson, plackett_luce and davidson_luce. Sigmoid and
plackett_luce leave ties out.

Held-out prompts have requests that training has not. On all pairs of their six responses:
  gold order    how often the score orders two responses of unequal gold as gold does
  log loss      nats a pair for what a coarse labeler says of it (better, worse, tied)
  tie error     |expected − observed| share of ties, a mean over tenths of the pairs, sorted by
                the expected share
Both of the last come from Davidson's model of the scores. Its ν, and a factor on the scores, are
fitted on one half of the held-out prompts for the other half, for every reward model alike, so that
a loss without ν can be compared; `own ν` is the one that a loss has learnt, without any fit.

Seeds are the unit: intervals are Student's t over seeds, differences are paired. Lines are kept in
results/ties.jsonl, artifacts in NAME-ties-seed3 and so on. Run it again to resume after an
interruption. `--quick` runs one seed of the micro chain, in seconds, to show that it runs.
"""

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from sweeps.estimates import differences_over_seeds, over_seeds
from sweeps.points import provenance, save_rows
from sweeps.runner import make_parser, parse_arguments, run_command, run_rlhf
from sweeps.text import markdown, with_interval

from data.streams import derive_seed
from data.world.labelers import LABELERS
from data.world.world import World
from pipeline.errors import UserError
from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

SEEDS = (3, 4, 5, 6, 7)
"""Settings were chosen on seeds 0 to 2, and `--grade` on seed 30."""
LOSSES = {2: ("sigmoid", "davidson"), 6: ("sigmoid", "davidson", "plackett_luce", "davidson_luce")}
"""Responses of a ranking → the losses to compare; each that counts ties comes after its other."""
WITHOUT = {"davidson": "sigmoid", "davidson_luce": "plackett_luce"}
"""Loss that counts ties → the same without ties."""
FIGURES = {"gold_order": "gold order", "log_loss": "log loss", "tie_error": "tie error"}
SHARED = ["rankings.labelers_per_prompt=1", "rankings.judge_fraction=0"]
WORLD = [f"data.{kind}=world" for kind in ("documents", "demonstrations", "prompts", "evaluation_prompts")]
"""What is still the embedded world's where a file has the rankings."""
QUICK = ["rankings.num_prompts=null", "rm.max_steps=3", "rm.ensemble=1", "rm.label_smoothing=0"]
TENTHS = 10


def run(argv: list[str], stop: StopFlag) -> None:
    """Train every reward model on every seed, and print the tables."""
    args = parse(argv)
    rows = [row for responses in LOSSES for seed in args.seeds for row in on_seed(args, stop, seed, responses)]
    for responses in LOSSES:
        print(f"\nRankings of {responses}\n\n{table([row for row in rows if row['responses'] == responses])}")


def on_seed(args: Namespace, stop: StopFlag, seed: int, responses: int) -> list[dict]:
    """Train the reward models of one seed on rankings of one length; return their JSON objects.

    Args:
        args: The command line.
        stop: Set by a signal.
        seed: The seed.
        responses: Responses of a training ranking.
    """
    name, rows = f"{args.name}-ties-seed{seed}", []
    settings = [f"seed={seed}", *args.overrides]
    run_rlhf(args, stop, "rankings", name, [*settings, *SHARED])
    shared = ArtifactStore(args.artifacts, name)
    world = World.from_json(json.loads((shared.folder("world") / "world.json").read_text(encoding="utf-8")))
    noise = shared.manifest("rankings")["metrics"]["noise"]
    held = coarse(read(shared, "validation"), world, noise, args.grade, seed)
    first = one_a_prompt(read(shared, "train"))[: args.rankings]
    train = coarse(first, world, noise, args.grade, seed, responses)
    file = Path(args.artifacts) / f"{name}-{responses}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in train), encoding="utf-8")
    for loss in LOSSES[responses]:
        own = ArtifactStore(args.artifacts, f"{name}-{responses}-{loss}")
        for stage in ("world", "base", "sft"):
            if not own.folder(stage).exists():
                shutil.copytree(shared.folder(stage), own.folder(stage))
        options = [f"data.rankings={file}", "rankings.judge_fraction=0", "rm.held_out=false", *WORLD]
        options += [f"rm.loss_type={loss}", *steps_of(args, train)]
        run_rlhf(args, stop, "rm", own.base.name, [*settings, *options])
        row = line(own, args, seed, responses, loss, train, held, world)
        save_rows(args.results / "ties.jsonl", [row], lambda row: (row["responses"], row["loss"], row["seed"]))
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def parse(argv: list[str]) -> Namespace:
    """Parse and check the command line."""
    parser = make_parser("ties.py", __doc__, HERE / "results")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="seeds to run")
    parser.add_argument("--grade", type=float, default=3.0, help="width of a grade, in units of the labelers' noise")
    parser.add_argument("--rankings", type=int, default=600, help="prompts to train on, one ranking of each")
    parser.add_argument("--passes", type=float, default=2.0, help="passes over the rankings")
    parser.add_argument("--quick", action="store_true", help="one seed of the micro chain, to show that it runs")
    args = parse_arguments(parser, argv)
    if args.quick:
        args.config, args.seeds = str(ROOT / "tests" / "resume" / "micro.yaml"), args.seeds[:1]
        args.overrides = [*QUICK, *args.overrides]
    args.config, args.artifacts = str(Path(args.config).resolve()), str(Path(args.artifacts).resolve())
    if not Path(args.config).is_file():
        raise UserError(f"{args.config}: no such file")
    args.name = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))["name"]
    return args


def steps_of(args: Namespace, train: list[dict]) -> list[str]:
    """Return settings for as many steps with every loss: passes over all rankings."""
    if args.quick:
        return []
    settings = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))["rm"]
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    steps = round(args.passes * len(train) / batch)
    return [f"rm.max_steps={steps}", f"rm.eval_steps={steps}"]


# -- coarse labelers -----------------------------------------------------------------------------


def read(store: ArtifactStore, part: str) -> list[dict]:
    """Return the rows of a file of rankings."""
    text = (store.folder("rankings") / f"{part}.jsonl").read_text(encoding="utf-8")
    return [json.loads(row) for row in text.splitlines()]


def one_a_prompt(rows: list[dict]) -> list[dict]:
    """Return the first ranking of each prompt."""
    first: dict[str, dict] = {}
    for row in rows:
        first.setdefault(row["prompt"], row)
    return list(first.values())


def coarse(
    rows: list[dict], world: World, noise: float, grade: float, seed: int, responses: int | None = None
) -> list[dict]:
    """Let the labelers of rankings rank again, by grades.

    Args:
        rows: Their rankings.
        world: The embedded world.
        noise: Scale of the labelers' noise.
        grade: Width of a grade, in units of the noise.
        seed: Of the noise.
        responses: How many responses each ranks, from the first; None: all.

    Returns:
        The rankings, with ranks by grade.
    """
    rng = np.random.default_rng(derive_seed(seed, "coarse", responses or 0))
    names = [labeler.name for labeler in LABELERS]
    ranked = []
    for row in rows:
        texts, finished = row["responses"][:responses], row["finished"][:responses]
        utilities = world.labeler_utilities(row["prompt"], texts, finished)[names.index(row["labeler"])]
        answers = list(zip(texts, finished, strict=True))
        drawn = {answer: rng.gumbel() for answer in dict.fromkeys(answers)}  # one for equal responses
        noisy = [u / noise + drawn[answer] for u, answer in zip(utilities, answers, strict=True)]
        ranked.append(row | {"responses": texts, "finished": finished, "ranks": ranks_of(noisy, grade)})
    return ranked


def ranks_of(values: Sequence[float], grade: float) -> list[int]:
    """Return ranks of values, 1 for the highest; those of one grade share a rank.

    Args:
        values: The values.
        grade: Width of a grade.
    """
    grades = [int(np.floor(value / grade)) for value in values]
    order = sorted(set(grades), reverse=True)
    return [1 + order.index(g) for g in grades]


# -- figures -------------------------------------------------------------------------------------


def line(
    store: ArtifactStore,
    args: Namespace,
    seed: int,
    responses: int,
    loss: str,
    train: list[dict],
    held: list[dict],
    world: World,
) -> dict:
    """Return the JSON object of a reward model.

    Args:
        store: Artifacts of its experiment.
        args: The command line.
        seed: Its seed.
        responses: Responses of a training ranking.
        loss: Its loss.
        train: The coarse rankings of training.
        held: Coarse rankings of held-out prompts.
        world: The embedded world.
    """
    manifest = store.manifest("rm")
    scores = scores_of(store, held)
    found, verdicts = fitted_on_the_other_half(held, scores)
    log_loss, tie_error = calibration(found, verdicts)
    own = manifest["metrics"].get("tie_strengths")
    gaps, said = pairs_of(held, scores)
    own_log_loss, own_tie_error = calibration(outcomes(gaps, own[0]), said) if own else (None, None)
    return {
        "bench": "ties",
        "experiment": args.name,
        "responses": responses,
        "loss": loss,
        "seed": seed,
        "grade": args.grade,
        "rankings": len(train),
        "steps": manifest["metrics"]["steps"],
        "ties": share_of_ties(train),
        "held_out_ties": share_of_ties(held),
        "gold_order": gold_order(held, scores, world),
        "log_loss": log_loss,
        "tie_error": tie_error,
        "own_strengths": own,
        "own_log_loss": own_log_loss,
        "own_tie_error": own_tie_error,
        **provenance(manifest),
    }


def scores_of(store: ArtifactStore, rows: list[dict]) -> list[list[float]]:
    """Return the published reward model's scores of the responses of each ranking."""
    from accelerate import Accelerator

    from data.encode import encode_prompt, encode_response
    from stages.models.forward import score_all
    from stages.models.loading import load_scalar_model, load_tokenizer

    folder = store.folder("rm") / "model"
    tokenizer, model = load_tokenizer(folder), load_scalar_model(folder)
    prompts, responses = [], []
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        for text, finished in zip(row["responses"], row["finished"], strict=True):
            prompts.append(prompt)
            responses.append(encode_response(tokenizer, text, finished))
    options: dict[str, Any] = {"pad_id": tokenizer.pad_token_id, "batch_size": 64}
    flat = score_all(model, prompts, responses, accelerator=Accelerator(cpu=True), **options).tolist()
    ends = np.cumsum([len(row["responses"]) for row in rows])[:-1]
    return [part.tolist() for part in np.split(np.asarray(flat), ends)]


def pairs_of(rows: list[dict], scores: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (score difference, verdict) of all pairs of different responses, two arrays (P,).

    A verdict is 1 where the first is better, −1 where the second is, 0 for a tie.
    """
    gaps, verdicts = [], []
    for row, own in zip(rows, scores, strict=True):
        answers = list(zip(row["responses"], row["finished"], strict=True))
        for i in range(len(own)):
            for j in range(i + 1, len(own)):
                if answers[i] != answers[j]:
                    gaps.append(own[i] - own[j])
                    verdicts.append(np.sign(row["ranks"][j] - row["ranks"][i]))
    return np.asarray(gaps), np.asarray(verdicts)


def gold_order(rows: list[dict], scores: list[list[float]], world: World) -> float:
    """Return how often scores order two responses of unequal gold as gold does; equal ones half."""
    right, pairs = 0.0, 0
    for row, own in zip(rows, scores, strict=True):
        answers = zip(row["responses"], row["finished"], strict=True)
        gold = [world.gold(row["prompt"], *answer)["overall"] for answer in answers]
        for i in range(len(own)):
            for j in range(len(own)):
                if gold[i] > gold[j]:
                    right += (1 + np.sign(own[i] - own[j])) / 2
                    pairs += 1
    return float(right / max(1, pairs))


def outcomes(gaps: np.ndarray, strength: float) -> np.ndarray:
    """Return Davidson's P(second is better), P(tie) and P(first is better), (P, 3)."""
    half = np.clip(gaps / 2, -300, 300)
    terms = np.stack([np.exp(-half), np.full_like(half, strength), np.exp(half)], axis=1)
    return terms / terms.sum(axis=1, keepdims=True)


def fit_davidson(gaps: np.ndarray, verdicts: np.ndarray) -> tuple[float, float]:
    """Return the factor on score differences and ν that make verdicts the most likely.

    Args:
        gaps: Score differences, (P,).
        verdicts: As of `pairs_of`, (P,).
    """

    def loss(theta: np.ndarray) -> float:
        found = outcomes(np.exp(theta[0]) * gaps, np.exp(theta[1]))
        return float(-np.log(found[np.arange(len(gaps)), verdicts + 1] + 1e-300).mean())

    best = minimize(loss, np.zeros(2), method="Nelder-Mead").x
    return float(np.exp(best[0])), float(np.exp(best[1]))


def fitted_on_the_other_half(rows: list[dict], scores: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return Davidson's probabilities of all pairs, as of `outcomes`, and the verdicts.

    Those of every second prompt are fitted on the other prompts.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    half_of = {prompt: i % 2 for i, prompt in enumerate(prompts)}
    halves = []
    for half in (0, 1):
        own = [(row, x) for row, x in zip(rows, scores, strict=True) if half_of[row["prompt"]] == half]
        halves.append(pairs_of([row for row, _ in own], [x for _, x in own]))
    found = []
    for (gaps, _), other in zip(halves, reversed(halves), strict=True):
        factor, strength = fit_davidson(*other)
        found.append(outcomes(factor * gaps, strength))
    return np.concatenate(found), np.concatenate([verdicts for _, verdicts in halves])


def share_of_ties(rows: list[dict]) -> float:
    """Return the share of pairs of different responses that are tied."""
    _, verdicts = pairs_of(rows, [[0.0] * len(row["responses"]) for row in rows])
    return float(np.mean(verdicts == 0))


def calibration(found: np.ndarray, verdicts: np.ndarray) -> tuple[float, float]:
    """Return the log loss a pair, and how far expected shares of ties are from those observed.

    Args:
        found: Probabilities, as of `outcomes`, (P, 3).
        verdicts: As of `pairs_of`, (P,).
    """
    log_loss = float(-np.log(found[np.arange(len(verdicts)), verdicts + 1]).mean())
    order = np.argsort(found[:, 1], kind="stable")
    parts = [part for part in np.array_split(order, TENTHS) if len(part)]
    errors = [abs(found[part, 1].mean() - np.mean(verdicts[part] == 0)) * len(part) for part in parts]
    return log_loss, float(sum(errors) / len(verdicts))


def table(rows: Sequence[dict]) -> str:
    """Format the Markdown table of rankings of one length: figures over seeds, and differences."""
    by_loss: dict[str, list[dict]] = {}
    for row in rows:
        by_loss.setdefault(row["loss"], []).append(row)
    headings = ["loss", *FIGURES.values(), "own ν", "log loss with it", "tie error with it"]
    cells = []
    for loss, own in by_loss.items():
        figures = [with_interval(over_seeds([row[key] for row in own], key == "gold_order")) for key in FIGURES]
        learnt = ["–"] * 3
        if own[0]["own_strengths"]:
            learnt = [f"{np.mean([row['own_strengths'][0] for row in own]):.2f}"]
            learnt += [
                with_interval(over_seeds([row[f"own_{key}"] for row in own])) for key in ("log_loss", "tie_error")
            ]
        cells.append([loss, *figures, *learnt])
    for loss, other in WITHOUT.items():
        if loss in by_loss and other in by_loss:
            pairs = [[[row[key] for row in by_loss[x]] for x in (loss, other)] for key in FIGURES]
            gains = [with_interval(differences_over_seeds(*pair)) for pair in pairs]
            cells.append([f"{loss} − {other}", *gains, *["–"] * 3])
    ties = np.mean([row["ties"] for row in rows])
    return f"{ties:.0%} of the training pairs are tied.\n\n{markdown(headings, cells)}"


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
