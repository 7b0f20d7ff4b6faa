"""Let lm-evaluation-harness measure a model in this process, and read what it found."""

import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy
import torch

from pipeline.errors import UserError
from pipeline.tracking import json_value
from stages.external.quiet import quiet_unless_at_terminal
from stages.external.tasks import CODE
from stages.models.soft_prompts import unanswered_ids, without_soft_prompt

BOOTSTRAPS = 1000
"""Resamples for the standard error of a metric that is no mean (F1, BLEU, perplexity)."""
SEED = 1234
"""lm-eval's default seed, with which few-shot examples are drawn."""


@dataclass(frozen=True)
class Asked:
    """Say how a model is prompted."""

    through_template: bool
    """Whether questions go through the chat template."""
    batch_size: int
    """Rows in a forward pass."""
    max_length: int | None
    """The longest row in tokens; None for the model's context."""
    limit: int | None
    """Documents per task; None for all."""
    num_fewshot: int | None
    """Examples before each question; None as the task says."""
    run_unsafe_code: bool
    """Whether tasks may run code that the model writes."""


@dataclass(frozen=True)
class Found:
    """Hold lm-eval's results for one model."""

    metrics: dict[str, dict[str, dict[str, Any]]]
    """Task or group → metric ("acc,none": its name and its filter) → {value, stderr, n}."""
    samples: list[dict[str, Any]]
    """{task, doc_id, doc, filter, prompt, target, answers, metrics} per document and filter."""
    tasks: dict[str, dict[str, Any]]
    """Task or group → {version, num_fewshot, higher_is_better: metric → bool or None, of}."""
    asked: str
    """"chat" or "plain"."""

    def state(self) -> dict[str, Any]:
        """Return the fields for a checkpoint."""
        return asdict(self)


def evaluate_model(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    asked: Asked,
    mixed_precision: str | None,
    poll: Callable[[], None],
    template_kwargs: dict[str, Any],
) -> Found:
    """Measure a model on tasks.

    Args:
        model: A causal language model, on its device.
        tokenizer: Its tokenizer.
        tasks: As `load_tasks` returns them; loaded again for each model, because they keep answers.
        asked: How it is asked.
        mixed_precision: "bfloat16" or "float16" to compute in it, or None.
        poll: Called before each forward pass; raises if the run is to stop.
        template_kwargs: Variables of the chat template.

    Raises:
        UserError: A task cannot be measured.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    prepare(tasks["tasks"].values(), asked.num_fewshot)
    hooks = [model.register_forward_pre_hook(lambda *_: poll())]
    if unanswered_ids(model):
        hooks.append(model.register_forward_hook(exclude_soft_prompt))
    try:
        with quiet_unless_at_terminal():
            lm = HFLM(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=asked.batch_size,
                max_length=asked.max_length,
                mixed_precision_dtype=mixed_precision,
                chat_template_args=template_kwargs,
            )
            results = evaluate(
                lm=lm,
                task_dict=tasks,
                limit=asked.limit,
                bootstrap_iters=BOOTSTRAPS,
                apply_chat_template=asked.through_template,
                fewshot_as_multiturn=asked.through_template,
                confirm_run_unsafe_code=asked.run_unsafe_code,
            )
    except ValueError as error:
        if CODE in str(error):
            raise UserError(
                "lm_eval.tasks: a task runs code that the model writes; lm_eval.run_unsafe_code: true allows it"
            ) from None
        raise
    finally:
        for hook in hooks:
            hook.remove()
    assert results is not None, "only rank 0 measures"
    return read_results(results, "chat" if asked.through_template else "plain")


def exclude_soft_prompt(model: Any, arguments: Any, out: Any) -> Any:
    """Give the tokens of a soft prompt no probability, as a forward hook."""
    out.logits = without_soft_prompt(model, out.logits)
    return out


def prepare(tasks: Iterable[Any], num_fewshot: int | None) -> None:
    """Set the number of examples and the seeds of tasks, as lm-eval's command line does.

    Args:
        tasks: lm-eval's tasks.
        num_fewshot: Examples before each question; None as each task says. A task that says 0 is
            left as it is.
    """
    for task in tasks:
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    random.seed(0)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


def read_results(results: dict[str, Any], asked: str) -> Found:
    """Read lm-eval's results.

    Args:
        results: What `lm_eval.evaluate` returned.
        asked: "chat" or "plain".
    """
    metrics: dict[str, dict[str, dict[str, Any]]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    for name, figures in results["results"].items():
        counts = (results.get("n-samples") or {}).get(name) or {}
        found = {}
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not is_number(value):
                continue
            stderr = figures.get(f"{metric}_stderr,{kind}")
            found[key] = {
                "value": float(value),
                "stderr": float(stderr) if is_number(stderr) else None,
                "n": counts.get("effective"),
            }
        if not found:  # a group that has no mean of its own
            continue
        metrics[name] = found
        better = (results.get("higher_is_better") or {}).get(name) or {}
        tasks[name] = {
            "version": json_value((results.get("versions") or {}).get(name)),
            "num_fewshot": (results.get("n-shot") or {}).get(name),
            "higher_is_better": {key: better.get(key.partition(",")[0]) for key in found},
            "of": list((results.get("group_subtasks") or {}).get(name) or []),
        }
    samples = [sample_row(task, sample) for task, rows in (results.get("samples") or {}).items() for sample in rows]
    return Found(metrics, samples, tasks, asked)


def sample_row(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a document: how it was asked, what was answered, and its figures."""
    arguments = sample["arguments"]
    first = arguments[0] if arguments else ()
    return {
        "task": task,
        "doc_id": sample["doc_id"],
        "doc": sample["doc_hash"],
        "filter": sample["filter"],
        "prompt": first[0] if first else None,
        "target": json_value_of(sample["target"]),
        "answers": json_value_of(sample["filtered_resps"]),
        "metrics": {name: float(sample[name]) for name in sample["metrics"] if is_number(sample.get(name))},
    }


def json_value_of(value: Any) -> Any:
    """Return a value as JSON holds it; what JSON cannot hold becomes its text."""
    if isinstance(value, dict):
        return {str(key): json_value_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [json_value_of(item) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)) or hasattr(value, "item"):
        return json_value(value)
    return str(value)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite or infinite number, numpy's included, and no NaN."""
    try:
        return not isinstance(value, (str, bytes)) and float(value) == float(value)
    except (TypeError, ValueError):
        return False
