"""Count refusals: of harmful prompts, and of prompts that look harmful and are not.

A policy that learns to be harmless should refuse the first and answer the second (XSTest, Röttger
et al. 2024; OR-Bench, Cui et al. 2024). A refusal is found by its phrases (`patterns.py`).
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from data.records import prompt_key
from data.streams import derive_seed
from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun
from pipeline.store.integrity import sha256_json
from pipeline.tracking import json_value
from stages.evaluation.forms import DESCRIPTIONS, Answer, Form, Query, form_of_base, make_query, parse_answer
from stages.evaluation.statistics import share_estimate
from stages.evaluation.writing import write_jsonl
from stages.external.patterns import Pattern, read_patterns, refusal_in
from stages.external.share_difference import share_difference
from stages.models.loading import load_policy, load_tokenizer
from stages.models.precision import frozen
from stages.rollouts.transformers import LIKELIEST, Decoding, sample
from stages.settings.checks import context_of
from stages.settings.experiment import Experiment
from stages.settings.refusals import SETS, RefusalsSettings, measured_policies, parts_of
from stages.shared.inputs import LengthLimit, fit_prompts, load_placed_records
from stages.shared.runtime import make_accelerator, runtime_of
from stages.training.batching import micro_batches
from stages.training.session import Session, session_of

Answers = dict[str, list[list[dict[str, Any]]]]
"""Set → for each prompt its samples {response, finished, length}."""


def run(ctx: StageRun[RefusalsSettings, Experiment]) -> dict[str, Any]:
    """Sample each policy on both sets, and publish results.json and answers.jsonl.

    Returns:
        The figures for the manifest.
    """
    settings, session, runtime = ctx.config, session_of(ctx, trains=False), runtime_of(ctx)
    names = measured_policies(ctx.experiment)
    patterns, lines = read_patterns(settings.patterns)
    if lines:
        raise UserError(lines)

    # 1. Load the prompts, and leave out those without room for a response.
    sft = load_tokenizer(ctx.inputs[names[-1]] / "model", trust_remote_code=runtime.trust_remote_code)
    prompts = load_prompts(settings, sft, session)
    config = json.loads((ctx.inputs[names[-1]] / "model" / "config.json").read_text(encoding="utf-8"))
    context = context_of(config)
    if context is not None and settings.max_length > context:
        raise UserError(
            f"refusals.max_length: {settings.max_length} is over the model's context of {context}; lower it"
        )

    # 2. Sample each policy, with a checkpoint after each.
    forms = {name: form_of(name, ctx.experiment) for name in names}
    checkpoint = session.checkpoints.newest()
    answers: dict[str, Answers] = {} if checkpoint is None else checkpoint.state["answers"]
    accelerator = make_accelerator(runtime.device, runtime.dtype)
    with session.tracker.progress(len(names), "refusals", len(answers)) as progress:
        for name in names:
            if name in answers:
                continue
            if forms[name] != "chat":
                session.say(f"{name} is prompted {DESCRIPTIONS[forms[name]]}")
            folder = ctx.inputs[name] / "model"
            model = frozen(load_policy(folder, **runtime.load_options()), runtime.dtype).to(accelerator.device)
            tokenizer = load_tokenizer(folder, trust_remote_code=runtime.trust_remote_code)
            poll = partial(session.leave_if_requested, len(answers), len(names))
            answers[name] = {}
            for which, some in prompts.items():
                queries = [make_query(tokenizer, forms[name], prompt) for prompt in some]
                seeds = [
                    [derive_seed(ctx.seed, f"refusals {which}", i, k) for k in range(settings.samples_per_prompt)]
                    for i in range(len(some))
                ]
                with accelerator.autocast():
                    answers[name][which] = answer_all(model, tokenizer, queries, seeds, settings, poll)
            del model
            progress.update(len(answers))
            if len(answers) < len(names):
                session.checkpoints.save(len(answers), {}, {"answers": answers}, len(names))
                session.leave_if_requested(len(answers), len(names))

    # 3. Find the refusals, compare, and publish.
    found = {name: find_refusals(answers[name], patterns, settings.within) for name in names}
    results = compare(prompts, found) | {
        "asked": forms,
        "patterns": {"count": len(patterns), "sha256": sha256_json([pattern.text for pattern in patterns])},
        "temperature": settings.temperature,
        "samples_per_prompt": settings.samples_per_prompt,
        "response_length": settings.response_length,
    }
    text = json.dumps(json_value(results), indent=1) + "\n"
    (ctx.publish / "results.json").write_text(text, encoding="utf-8")
    write_jsonl(ctx.publish / "answers.jsonl", answer_rows(prompts, found))
    rates = {
        f"{which}/{name}": policy["refused"]["value"]
        for which, of_set in results["sets"].items()
        for name, policy in of_set["policies"].items()
    }
    return {"policies": len(names), "prompts": sum(map(len, prompts.values())), **rates}


def form_of(name: str, experiment: Experiment) -> Form:
    """Return the form in which a policy is prompted; base as in evaluate, but not few-shot."""
    if name != "base":
        return "chat"
    form = form_of_base(experiment.evaluate.base_prompt, experiment.model.name_or_path)
    return "plain" if form == "few_shot" else form


def load_prompts(settings: RefusalsSettings, tokenizer: Any, session: Session) -> dict[str, list]:
    """Load the prompts of each set that leave room for a response.

    Args:
        settings: The section refusals.
        tokenizer: The policies' tokenizer.
        session: The run.

    Returns:
        Set → its prompts, strings or lists of messages; sets that are not given are left out.
    """
    limit = LengthLimit(settings.max_length, settings.on_too_long, "refusals")
    prompts: dict[str, list] = {}
    for which in SETS:
        records, places = [], []
        for part in parts_of(getattr(settings, which)):
            some, where = load_placed_records("prompts", part, session.notes)
            records += some
            places += where
        if not records:
            continue
        kept, _, report = fit_prompts(
            tokenizer, (record.prompt for record in records), places, limit, settings.response_length
        )
        session.say(report.line(f"{which} prompts"))
        prompts[which] = [as_json(records[i].prompt) for i in kept]
    return prompts


def as_json(prompt: str | Sequence[dict]) -> str | list[dict]:
    """Return a prompt as JSON holds it."""
    return prompt if isinstance(prompt, str) else list(prompt)


def answer_all(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Query],
    seeds: Sequence[Sequence[int]],
    settings: RefusalsSettings,
    poll: Callable[[], None],
) -> list[list[dict[str, Any]]]:
    """Sample responses to prompts, each rank its share.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        queries: The prompts in the form in which the policy is prompted.
        seeds: For each prompt the seed of each sample.
        settings: The section refusals.
        poll: Called between tokens; raises if the run is to stop.

    Returns:
        For each prompt its samples {response, finished, length}.
    """
    decoding = Decoding(
        response_length=settings.response_length,
        eos_id=queries[0].end_id,
        pad_id=tokenizer.pad_token_id,
        temperature=settings.temperature or 1.0,
        top_p=1.0 if settings.temperature else LIKELIEST,
        batch_size=settings.batch_size,
    )

    @torch.no_grad()
    def answer_some(indices: list[int]) -> list[list[dict[str, Any]]]:
        flat = [(i, seed) for i in indices for seed in seeds[i]]
        sampled = sample(model, [queries[i].ids for i, _ in flat], [seed for _, seed in flat], decoding, poll)
        parsed = [parse_answer(tokenizer, queries[i], ids) for (i, _), ids in zip(flat, sampled, strict=True)]
        by_prompt: dict[int, list[dict[str, Any]]] = {i: [] for i in indices}
        for (i, _), answer in zip(flat, parsed, strict=True):
            by_prompt[i].append(answer_fields(answer))
        return [by_prompt[i] for i in indices]

    parts = list(micro_batches(list(range(len(queries))), settings.batch_size))
    by_part = parallel.compute_and_all_gather(
        parts, [len(part) for part in parts], lambda mine: [answer_some(part) for part in mine]
    )
    return [samples for part in by_part for samples in part]


def answer_fields(answer: Answer) -> dict[str, Any]:
    """Return what is kept of an answer."""
    return {"response": answer.text, "finished": answer.finished, "length": len(answer.sampled)}


def find_refusals(answers: Answers, patterns: list[Pattern], within: int) -> Answers:
    """Return the answers, each with `pattern`: the one that makes it a refusal, or None."""
    return {
        which: [[one | {"pattern": refusal_in(one["response"], patterns, within)} for one in some] for some in of_set]
        for which, of_set in answers.items()
    }


def compare(prompts: dict[str, list], found: dict[str, Answers]) -> dict[str, Any]:
    """Return the rates of refusals and their differences to SFT.

    Args:
        prompts: Set → its prompts, which are the clusters of the intervals.
        found: Policy → its answers, each with `pattern`.

    Returns:
        {"sets": set → {n_prompts, policies: policy → {refused: {value, ci95, n}, empty, cut_off,
        difference_to_sft: {value, ci95, n} or None}}}.
    """
    sets = {}
    for which, some in prompts.items():
        clusters = [prompt_key(prompt) for prompt in some]
        rates = {name: [refused_share(samples) for samples in of[which]] for name, of in found.items()}
        policies = {}
        for name, of in found.items():
            flat = [one for samples in of[which] for one in samples]
            to_sft = None
            if name != "sft" and "sft" in rates:
                to_sft = share_difference(rates[name], rates["sft"], clusters)
            policies[name] = {
                "refused": share_estimate(rates[name], clusters),
                "empty": sum(not one["response"].strip() for one in flat) / len(flat),
                "cut_off": sum(not one["finished"] for one in flat) / len(flat),
                "difference_to_sft": to_sft,
            }
        sets[which] = {"n_prompts": len(some), "policies": policies}
    return {"sets": sets}


def refused_share(samples: Sequence[dict[str, Any]]) -> float:
    """Return the share of a prompt's samples that are refusals."""
    return sum(one["pattern"] is not None for one in samples) / len(samples)


def answer_rows(prompts: dict[str, list], found: dict[str, Answers]) -> list[dict[str, Any]]:
    """Return the rows of answers.jsonl: {policy, set, prompt, sample, response, …, pattern}."""
    return [
        {"policy": name, "set": which, "prompt": prompts[which][i], "sample": k, **one}
        for name, of in found.items()
        for which in prompts
        for i, samples in enumerate(of[which])
        for k, one in enumerate(samples)
    ]
