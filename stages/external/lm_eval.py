"""Measure what training costs elsewhere: the policies on tasks of lm-evaluation-harness.

InstructGPT calls a loss on public tasks the alignment tax. Each policy is measured on the same
documents, so that differences to SFT and to base are paired. Base continues plain text unless
`lm_eval.chat_template` says otherwise; the others are asked through the chat template.
"""

import json
from functools import partial
from importlib.metadata import version
from typing import Any

from pipeline.errors import UserError
from pipeline.stage import StageRun
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tracking import json_value
from stages.evaluation.writing import write_jsonl
from stages.external.differences import difference
from stages.external.harness import Asked, Found, evaluate_model
from stages.external.tasks import load_tasks, task_manager
from stages.models.loading import load_policy, load_tokenizer
from stages.models.precision import frozen
from stages.settings.experiment import Experiment
from stages.settings.lm_eval import LMEvalSettings, measured_policies
from stages.shared.runtime import runtime_of
from stages.training.session import session_of

REFERENCES = ("base", "sft")
"""Policies that the others are compared with."""


def run(ctx: StageRun[LMEvalSettings, Experiment]) -> dict[str, Any]:
    """Measure each policy, compare them, and publish results.json and task_samples.jsonl.

    Returns:
        The figures for the manifest.
    """
    settings, session, runtime = ctx.config, session_of(ctx, trains=False), runtime_of(ctx)
    assert settings.tasks is not None, "missing_requirements refuses this"
    names = measured_policies(ctx.experiment)
    plain = [name for name in names if not through_template(name, settings)]
    if plain:
        session.say(f"{', '.join(plain)} continues plain text, without the chat template")

    # 1. Measure each policy, with a checkpoint after each.
    measured, manager = measured_before(session.checkpoints), task_manager(settings.tasks, settings.include_path)
    with session.tracker.progress(len(names), "lm_eval", len(measured)) as progress:
        for name in names:
            if name in measured:
                continue
            folder = ctx.inputs[name] / "model"
            model = frozen(load_policy(folder, **runtime.load_options()), runtime.dtype).to(runtime.device)
            measured[name] = evaluate_model(
                model,
                load_tokenizer(folder, trust_remote_code=runtime.trust_remote_code),
                load_tasks(manager, settings.tasks, settings.include_path),
                asked_of(name, settings),
                runtime.dtype if runtime.dtype != "float32" else None,
                partial(session.leave_if_requested, len(measured), len(names)),
                template_kwargs=dict(ctx.experiment.model.chat_template_kwargs or {}),
            )
            del model
            progress.update(len(measured))
            if len(measured) < len(names):
                state = {"measured": {done: found.state() for done, found in measured.items()}}
                session.checkpoints.save(len(measured), {}, state, len(names))
                session.leave_if_requested(len(measured), len(names))

    # 2. Compare, and publish.
    measured = {name: measured[name] for name in names}
    results = compare(measured) | {"limit": settings.limit, "lm_eval_version": version("lm_eval")}
    text = json.dumps(json_value(results), indent=1) + "\n"
    (ctx.publish / "results.json").write_text(text, encoding="utf-8")
    rows = ({"policy": name, **row} for name, found in measured.items() for row in found.samples)
    write_jsonl(ctx.publish / "task_samples.jsonl", rows)
    return {"policies": len(names), "tasks": len(results["tasks"])} | headline_figures(results)


def through_template(name: str, settings: LMEvalSettings) -> bool:
    """Return whether a policy is asked through the chat template."""
    return {"all": True, "none": False, "trained": name != "base"}[settings.chat_template]


def asked_of(name: str, settings: LMEvalSettings) -> Asked:
    """Return how a policy is asked."""
    return Asked(
        through_template=through_template(name, settings),
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        run_unsafe_code=settings.run_unsafe_code,
    )


def compare(measured: dict[str, Found]) -> dict[str, Any]:
    """Return the content of results.json.

    Args:
        measured: Policy → what lm-eval found.

    Returns:
        {"asked": policy → "chat" or "plain", "tasks": task or group → {version, num_fewshot, of,
        metrics: metric → {higher_is_better, policies: policy → {value, stderr, n,
        difference_to_base, difference_to_sft}}}}.
    """
    first = next(iter(measured.values()))
    tasks: dict[str, Any] = {}
    for task, about in first.tasks.items():
        metrics = {}
        for metric, better in about["higher_is_better"].items():
            policies = {}
            for name, found in measured.items():
                figure = found.metrics.get(task, {}).get(metric)
                if figure is None:
                    continue
                policies[name] = figure | {
                    f"difference_to_{other}": difference(found, measured[other], task, metric)
                    for other in REFERENCES
                    if other in measured and other != name
                }
            metrics[metric] = {"higher_is_better": better, "policies": policies}
        known = {key: about[key] for key in ("version", "num_fewshot", "of")}
        tasks[task] = known | {"metrics": metrics}
    return {"asked": {name: found.asked for name, found in measured.items()}, "tasks": tasks}


def headline_figures(results: dict[str, Any]) -> dict[str, float]:
    """Return each policy's figures for the manifest, {"task/metric/policy": value}."""
    return {
        f"{task}/{metric}/{name}": policy["value"]
        for task, about in results["tasks"].items()
        for metric, figures in about["metrics"].items()
        for name, policy in figures["policies"].items()
    }


def measured_before(checkpoints: CheckpointStore) -> dict[str, Found]:
    """Return what an interrupted run measured, by policy."""
    checkpoint = checkpoints.newest()
    if checkpoint is None:
        return {}
    if "measured" not in checkpoint.state:
        raise UserError("lm_eval: the checkpoint was written by another version; start again with --restart")
    return {name: Found(**fields) for name, fields in checkpoint.state["measured"].items()}
