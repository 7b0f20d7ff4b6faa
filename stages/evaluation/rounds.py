"""Measure a round against the rounds before it: rounds.json, which the report shows.

Each round's reward model judges the held-out rankings that are new in each round, so one sees
whether an old reward model still ranks what a newer policy answers, and whether a new one has
forgotten the old answers. Prompts that any of the reward models trained on are left out, so all are
compared on the same pairs.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.encode import encode_response
from data.group_rows import EncodedRanking, groups_of
from data.groups import PromptGroup, batch_groups
from data.length_limit import LengthLimiter
from data.records import Ranking, prompt_key
from data.row_reader import records
from data.source import Loaded
from data.world.world import World
from pipeline.config.sections import RoundSettings
from pipeline.errors import UserError
from stages.evaluation.forms import Answer
from stages.evaluation.judges import GOLD
from stages.evaluation.measuring import answer_logps
from stages.evaluation.prompts import EvaluationPrompts
from stages.evaluation.results import Measured
from stages.evaluation.statistics import (
    agreement_figures,
    difference_estimate,
    mean_estimate,
    pair_accuracy,
    share_estimate,
)
from stages.evaluation.tools import Tools
from stages.models.forward import response_scores
from stages.settings.rounds import FOLDER, OLD_RANKINGS, artifact
from stages.shared.inputs import encoded_rankings, published
from stages.training.batching import micro_batches

NEWEST = ("ppo", "dpo")
"""Policies that a round may go on with, the likelier one first."""


@dataclass(frozen=True)
class RoundFolders:
    """Hold the folders of a round's artifacts."""

    number: int
    """The number of the round."""
    name: str
    """Its experiment."""
    rm: Path | None
    """Its reward model's stage; None without one."""
    rankings: Path | None
    """Its rankings' stage; None without one."""
    old: Path
    """Its file of rankings of earlier rounds, if there is one."""
    evaluate: Path | None
    """Its figures' stage; None for a round that was not evaluated, and for this one."""


def folders_of(settings: RoundSettings, inputs: dict[str, Path], name: str) -> list[RoundFolders]:
    """Return where the artifacts of all rounds are, this one last.

    Args:
        settings: The section round.
        inputs: The artifact folder of each stage of this round.
        name: This round's experiment.
    """
    found = []
    for number, text in enumerate(settings.earlier, 1):
        base = Path(text).expanduser()
        stages = {stage: artifact(base, stage) for stage in ("rm", "rankings", "evaluate")}
        found.append(RoundFolders(number, base.name, old=base / FOLDER / OLD_RANKINGS, **stages))
    own = Path(settings.folder).expanduser() / OLD_RANKINGS
    # evaluate need not read the rankings, so they may not be among its inputs
    rankings = inputs.get("rankings") or (inputs["rm"].parent / "rankings" if "rm" in inputs else None)
    found.append(RoundFolders(settings.number, name, inputs.get("rm"), rankings, own, None))
    return found


# -- labels --------------------------------------------------------------------------------------


def read_rankings(path: Path) -> list[Ranking]:
    """Return the rankings of a file that a stage or `rlhf round next` wrote; none without one."""
    if not path.is_file():
        return []
    return [ranking for _, ranking in records("rankings", published(path), Loaded())]


def is_of(ranking: Ranking) -> tuple:
    """Return what tells a ranking from others, whatever file it is in."""
    return prompt_key(ranking.prompt), ranking.responses, ranking.ranks, ranking.labeler


def new_in(place: RoundFolders, file: str) -> list[Ranking]:
    """Return the rankings of a round that are not of earlier rounds.

    Args:
        place: Where the round is.
        file: The file of its stage rankings.
    """
    if place.rankings is None:
        return []
    before = {is_of(ranking) for ranking in read_rankings(place.old)}
    return [one for one in read_rankings(place.rankings / file) if is_of(one) not in before]


def trained_prompts(places: Sequence[RoundFolders]) -> set[str]:
    """Return the keys of the prompts that any reward model trained on."""
    files = [place.rankings / "train.jsonl" for place in places if place.rankings is not None]
    return {prompt_key(ranking.prompt) for file in files for ranking in read_rankings(file)}


def groups(rankings: Sequence[Ranking], tools: Tools, file: Path) -> Sequence[PromptGroup]:
    """Return rankings as groups that reward models score; what is too long is left out.

    Args:
        rankings: Rankings of the file.
        tools: The tokenizer and the longest row.
        file: The file.
    """
    wanted = {is_of(ranking) for ranking in rankings}
    limiter = LengthLimiter(tools.max_length, "drop", "ranking", "evaluate")
    rows: list[EncodedRanking] = []
    try:
        rows += [row for row in encoded_rankings(file, tools.tokenizer, limiter) if is_of(row.ranking) in wanted]
    except UserError:  # all rows of the file are too long
        return []
    return groups_of(rows) if rows else []


@torch.no_grad()
def margins(model: Any, chosen: Sequence[PromptGroup], tools: Tools) -> list[float]:
    """Return the score of the preferred response minus the other one's, of each pair.

    Args:
        model: The reward model.
        chosen: The groups.
        tools: The accelerator and the size of a batch.
    """
    found: list[float] = []
    for part in micro_batches(chosen, max(1, tools.batch_size // 4)):
        batch = batch_groups(list(part), tools.tokenizer.pad_token_id, packed=False).to(tools.accelerator.device)
        with tools.accelerator.autocast():
            scores = response_scores(model, batch.rows)
        found += (scores[batch.winners] - scores[batch.losers]).tolist()
    return found


def accuracy_table(
    places: Sequence[RoundFolders], tools: Tools, world: World | None, poll: Callable[[], None]
) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """Let each round's reward model judge each round's held-out labels.

    Args:
        places: Where the artifacts of the rounds are.
        tools: The tokenizer, and how models are loaded.
        world: The embedded world, whose tasks are the clusters of intervals; otherwise prompts are.
        poll: Called between two models; raises if the run is to stop.

    Returns:
        {reward_model, labels, accuracy, ci95, n_pairs} of each two rounds; and by round, the number
        of its held-out labels and how far its labelers agree.
    """
    trained = trained_prompts(places)
    by_round, labels = {}, {}
    for place in places:
        found = new_in(place, "validation.jsonl")
        trains = [] if place.rankings is None else new_in(place, "train.jsonl")
        counts = {"labels": len(trains), "held_out_labels": len(found)}
        labels[place.number] = counts | {"agreement": agreement(trains + found)}
        apart = [one for one in found if prompt_key(one.prompt) not in trained]
        if apart and place.rankings is not None:
            by_round[place.number] = groups(apart, tools, place.rankings / "validation.jsonl"), clusters(apart, world)
    rows = []
    for place in places:
        if place.rm is None:
            continue
        poll()
        model = tools.reward_model_in(place.rm / "model")
        for number, (chosen, cluster_of) in by_round.items():
            owners = [cluster_of[group.id] for group in chosen for _ in group.pairs()]
            if owners:
                figures = pair_accuracy(margins(model, chosen, tools), owners)
                rows.append(
                    {
                        "reward_model": place.number,
                        "labels": number,
                        "accuracy": figures["accuracy"],
                        "ci95": figures["accuracy_ci95"],
                        "n_pairs": figures["n_pairs"],
                    }
                )
        del model  # the next one takes its place
    return rows, labels


def clusters(rankings: Sequence[Ranking], world: World | None) -> dict[str, str]:
    """Return the cluster of each ranking by its id: its task if known, otherwise its prompt."""
    if world is not None and all(is_of_world(world, ranking.prompt) for ranking in rankings):
        return {ranking.id: str(world.task(ranking.prompt)) for ranking in rankings}
    return {ranking.id: prompt_key(ranking.prompt) for ranking in rankings}


def is_of_world(world: World, prompt: Any) -> bool:
    """Return whether the embedded world knows the task of a prompt."""
    try:
        world.task(prompt)
    except (KeyError, ValueError, TypeError, AttributeError):
        return False
    return True


def agreement(rankings: Sequence[Ranking]) -> dict[str, Any] | None:
    """Return how far labelers agree, {value, ci95}; None where no pair has two of them."""
    figures = agreement_figures(rankings)
    if figures["labeler_agreement"] is None:
        return None
    return {"value": figures["labeler_agreement"], "ci95": figures["labeler_agreement_ci95"]}


# -- policies ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Hold the scores that a judge gives the samples of one policy."""

    values: list[list[float]]
    """(P, S) values."""
    clusters: Sequence[str]
    """The cluster of each prompt."""
    by: str
    """The judge: gold, or the name of a reward model."""

    def estimate(self) -> dict[str, Any]:
        """Return the mean, {value, ci95, by}."""
        flat = [value for row in self.values for value in row]
        owners = [cluster for cluster, row in zip(self.clusters, self.values, strict=True) for _ in row]
        found = share_estimate(flat, owners) if self.by == GOLD else mean_estimate(flat, owners)
        return {"value": found["value"], "ci95": found["ci95"], "by": self.by}


def scored_before(
    folder: Path | None, policy: str, tools: Tools, prompts: EvaluationPrompts, judge: str | None
) -> Scored | None:
    """Score what a policy of an earlier round answered, by the judge of this round.

    Args:
        folder: The stage evaluate of that round.
        policy: The policy.
        tools: The judges of this round.
        prompts: The evaluation prompts.
        judge: The judge that decides in this round.

    Returns:
        None where that round answered other prompts, or nobody can judge.
    """
    if folder is None or judge is None or not (folder / "responses.jsonl").is_file():
        return None
    with (folder / "responses.jsonl").open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["policy"] == policy]
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(prompt_key(row["prompt"]), []).append(row)
    if any(prompt_key(prompt) not in by_prompt for prompt in prompts.prompts):
        return None
    chosen = [by_prompt[prompt_key(prompt)] for prompt in prompts.prompts]
    if judge == GOLD:
        if any("gold" not in row for of_prompt in chosen for row in of_prompt):
            return None
        return Scored([[row["gold"]["overall"] for row in of_prompt] for of_prompt in chosen], prompts.clusters, judge)
    if judge not in tools.judges:
        return None
    flat = [(i, row) for i, of_prompt in enumerate(chosen) for row in of_prompt]
    answers = [answer_of(tools, row["response"], row["finished"]) for _, row in flat]
    ids = [prompts.chat_ids[i] for i, _ in flat]
    values = tools.with_missing_eos(tools.raw_scores(tools.judge(judge), ids, answers, packed=False), answers).tolist()
    scores = iter(values)
    return Scored([[next(scores) for _ in of_prompt] for of_prompt in chosen], prompts.clusters, judge)


def answer_of(tools: Tools, text: str, finished: bool) -> Answer:
    """Return an answer as models read it."""
    ids = encode_response(tools.tokenizer, text, finished)
    return Answer(sampled=ids, response=ids, text=text, finished=finished)


def kl_to_first(
    first: Path | None, name: str, tools: Tools, prompts: EvaluationPrompts, measured: Measured, temperature: float
) -> float | None:
    """Estimate a policy's KL to the first round's SFT, in nats a response.

    Args:
        first: The folder of that SFT; None where it is gone.
        name: The policy.
        tools: The tokenizer and how models are loaded.
        prompts: The evaluation prompts.
        measured: What was measured of the policy.
        temperature: The temperature it was sampled at.

    Returns:
        None where tokens were drawn from a part of the distribution, or the SFT is gone.
    """
    if measured.kl is None or first is None:
        return None
    if first.resolve() == tools.reference_folder.resolve():
        ratios = [value for row in measured.kl for value in row]
        return sum(ratios) / len(ratios)
    flat = [(i, k) for i, texts in enumerate(measured.responses) for k in range(len(texts))]
    answers = [answer_of(tools, measured.responses[i][k], measured.finished[i][k]).response for i, k in flat]
    ids = [prompts.chat_ids[i] for i, _ in flat]

    def logps(folder: Path) -> torch.Tensor:
        model = tools.policy_in(folder)
        return torch.tensor(answer_logps(tools, model, ids, answers, temperature, packed=False))

    ratios = (logps(tools.folders[name]) - logps(first)).tolist()
    return sum(sum(part) for part in micro_batches(ratios, tools.batch_size)) / len(flat)


def newest_in(results: dict[str, Any]) -> str | None:
    """Return the policy of results.json that a round goes on with; None without one."""
    return next((name for name in NEWEST if name in results["policies"]), None)


# -- all of it -----------------------------------------------------------------------------------


def measure_rounds(
    settings: RoundSettings,
    places: Sequence[RoundFolders],
    tools: Tools,
    prompts: EvaluationPrompts,
    measured: dict[str, Measured],
    *,
    judge: str | None,
    temperature: float,
    poll: Callable[[], None],
) -> dict[str, Any]:
    """Return rounds.json.

    Args:
        settings: The section round.
        places: Where the artifacts of all rounds are, this one last.
        tools: The judges, and how models are loaded.
        prompts: The evaluation prompts.
        measured: What was measured of each policy of this round.
        judge: The judge that decides in this round; None: nobody.
        temperature: The temperature that responses were sampled at.
        poll: Called between two models; raises if the run is to stop.
    """
    first_sft = artifact(Path(settings.earlier[0]).expanduser(), "sft")
    accuracy, labels = accuracy_table(places, tools, prompts.world, poll)
    rows: list[dict[str, Any]] = []
    before: Scored | None = scored_before(places[0].evaluate, "sft", tools, prompts, judge)
    start = before and before.estimate()
    for place in places:
        is_own = place is places[-1]
        results = {"policies": measured} if is_own else results_of(place)
        policy = newest_in(results)
        scored, kl = None, None
        if policy is not None and is_own:
            poll()
            if judge is not None:
                scored = Scored(measured[policy].judged_by(judge).tolist(), prompts.clusters, judge)
            folder = None if first_sft is None else first_sft / "model"
            kl = kl_to_first(folder, policy, tools, prompts, measured[policy], temperature)
        elif policy is not None:
            scored = scored_before(place.evaluate, policy, tools, prompts, judge)
            kl = kl_before(place, results, policy)
        rows.append(
            {
                "round": place.number,
                "experiment": place.name,
                "policy": policy,
                "score": scored and scored.estimate(),
                "gain": gain(scored, before),
                "kl_to_first_sft": kl,
                **labels[place.number],
            }
        )
        before = scored
    measured_labels = {row["labels"] for row in accuracy}
    notes = [
        f"round {place.number}: none of its held-out labels can compare the reward models: they are too long "
        f"(evaluate.max_length), without a usable pair, or of prompts that another round trained on"
        for place in places
        if place.number not in measured_labels
    ]
    return {"rounds": rows, "first_sft": start, "accuracy": accuracy, "notes": notes}


def gain(now: Scored | None, before: Scored | None) -> dict[str, Any] | None:
    """Estimate what a round gained over the one before, paired by prompt: {value, ci95}."""
    if now is None or before is None:
        return None
    ours, theirs = ([sum(row) / len(row) for row in scored.values] for scored in (now, before))
    found = difference_estimate(ours, theirs, list(now.clusters))
    ci95 = found["ci95"]
    is_point = ci95 is None or ci95[0] == ci95[1]  # equal differences show no spread
    return {"value": found["value"], "ci95": None if is_point else ci95}


def results_of(place: RoundFolders) -> dict[str, Any]:
    """Return results.json of an earlier round; without policies where it was not evaluated."""
    if place.evaluate is None:
        return {"policies": {}}
    return json.loads((place.evaluate / "results.json").read_text(encoding="utf-8"))


def kl_before(place: RoundFolders, results: dict[str, Any], policy: str) -> float | None:
    """Return the KL to the first SFT of an earlier round's policy, as that round measured it."""
    assert place.evaluate is not None, "it has a policy"
    if place.number == 1:
        return results["policies"][policy]["kl_to_sft"]
    path = place.evaluate / "rounds.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["rounds"][-1]["kl_to_first_sft"]
