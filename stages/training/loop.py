"""The step that everything learning from preferences takes: accumulate, clip, refuse non-finite, step, keep the best.

PPO drives these pieces itself; the reward model and DPO share the loop `fit`.
"""

import heapq
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.errors import Interrupted, TrainingStopped, UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun
from stages.models.adalora import adamw_for
from stages.models.adapters import trainable
from stages.models.sharding import full, is_sharded, like, number, part
from stages.objectives.control import update_average


@dataclass
class Trainee:
    """A model, the parameters of it that train (a fixed order), their optimizer, and the norm they are clipped to."""

    name: str
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float

    def tensors(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Strict: the same names and shapes, or a UserError."""
        if set(tensors) != set(self.parameters):
            odd = sorted(set(tensors) ^ set(self.parameters))[:3]
            raise UserError(
                f"checkpoint of {self.name}: its weights are not this model's ({odd}); start again with --restart"
            )
        for name, p in self.parameters.items():
            if p.shape != tensors[name].shape:
                raise UserError(
                    f"checkpoint of {self.name}: {name} is {tuple(tensors[name].shape)}, the model's is "
                    f"{tuple(p.shape)}; start again with --restart"
                )
        for name, p in self.parameters.items():
            p.copy_(like(p, tensors[name]))


def make_accelerator(device: str, dtype: str):
    """accelerate's view of this process: device, autocast to `dtype` over fp32 weights, backward."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    # accumulation is ours, by sums over global counts; a launcher's setting in the environment would divide once more
    once = GradientAccumulationPlugin(num_steps=1)
    mixed = "bf16" if dtype == "bfloat16" else "no"
    return Accelerator(cpu=device == "cpu", mixed_precision=mixed, gradient_accumulation_plugin=once)


def make_trainee(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float,
    max_grad_norm: float,
    adam_beta2: float = 0.95,
    weight_decay: float = 0.0,
    steps: int | None = None,
) -> Trainee:
    """AdamW with β = (0.9, `adam_beta2`) over what requires a gradient. steps: of the training, which AdaLoRA asks."""
    parameters = trainable(model)
    adamw, more = adamw_for(model, steps)
    options = {"lr": learning_rate, "betas": (0.9, adam_beta2), "weight_decay": weight_decay, "fused": True}
    names = grouped(model, parameters, 2 if weight_decay else 1)
    groups = [{"params": [parameters[n] for n in some]} for some in names]
    for group in groups[1:]:
        group["weight_decay"] = 0.0
    optimizer = adamw(groups, **options, **more)
    return Trainee(name, model, parameters, optimizer, max_grad_norm)


def grouped(model: nn.Module, names: Iterable[str], groups: int) -> list[list[str]]:
    """Names of parameters as AdamW has them: all in one group; or in two, those that decay and those that do not."""
    if groups == 1:
        return [list(names)]
    from transformers import Trainer  # by whose rule base and sft train

    decays = set(Trainer.get_decay_parameter_names(None, model))
    return [[n for n in names if n in decays], [n for n in names if n not in decays]]


@contextmanager
def keeping_settings(optimizer) -> Iterator[None]:
    """Whatever state is loaded inside: betas and weight_decay stay what today's settings say."""
    today = [{name: group[name] for name in ("betas", "weight_decay")} for group in optimizer.param_groups]
    yield
    for group, options in zip(optimizer.param_groups, today, strict=True):
        group.update(options)


def gradient_norm(parameters) -> float:
    """‖g‖₂ over all parameters that have a gradient; 0 if none has."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return number(torch.nn.utils.get_total_norm(grads)) if grads else 0.0


def gradient_cosine(one, other) -> float:
    """Cosine between two lists of gradients (None = 0); 0 where one of them vanishes."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    parts = [(part(a).flatten().float(), part(b).flatten().float()) for a, b in pairs]
    dot = sum(float(torch.dot(a, b)) for a, b in parts)
    if any(isinstance(a, DTensor) for a, _ in pairs):
        dot = parallel.all_reduce_figures({"dot": dot})["dot"]
    norms = [torch.nn.utils.get_total_norm([g for g in gs if g is not None] or [torch.zeros(1)]) for gs in (one, other)]
    size = number(norms[0] * norms[1])
    return dot / size if size > 0 else 0.0


def not_finite(trainee: Trainee, step: int) -> str | None:
    """What is wrong with the gradient, in words, if it is not finite."""
    norm = gradient_norm(trainee.parameters.values())
    return None if math.isfinite(norm) else f"{trainee.name}: the gradient at step {step} is {norm}"


def stop_training(problem: str) -> None:
    """TrainingStopped (exit 3), with what can be done about a number that is not finite."""
    raise TrainingStopped(
        f"{problem}; this step was not taken. Run again with a lower learning_rate or max_grad_norm and "
        f"--override-config, or with model.dtype: float32 and --restart"
    )


def optimizer_step(trainee: Trainee, learning_rate: float, step: int) -> float:
    """Clip, step, clear; → the gradient's norm before clipping. TrainingStopped if it is not finite (no step taken)."""
    if problem := not_finite(trainee, step):
        trainee.optimizer.zero_grad(set_to_none=True)
        stop_training(problem)
    norm = number(torch.nn.utils.clip_grad_norm_(trainee.parameters.values(), trainee.max_grad_norm))
    for group in trainee.optimizer.param_groups:
        group["lr"] = learning_rate
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    return norm


@dataclass
class Skips:
    """Steps left out because a number was not finite: `count` so far, of at most `limit`."""

    limit: int
    count: int = 0

    def skip(self, problem: str) -> str:
        """One more; → a line to say. TrainingStopped once there were too many."""
        if self.count >= self.limit:
            stop_training(f"{problem} (max_skipped_steps {self.limit})")
        self.count += 1
        return f"{problem}: step skipped ({self.count} of at most {self.limit})"


@dataclass
class Average:
    """Exponential average of a trainee's weights, a step of the optimizer at a time; `decay` None: none is kept."""

    decay: float | None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def start(self, trainee: Trainee) -> None:
        if self.decay is not None:
            self.tensors = {name: p.clone() for name, p in trainee.tensors().items()}

    def step(self, trainee: Trainee) -> None:
        if self.decay is not None:
            update_average(self.tensors, trainee.tensors(), self.decay)


@dataclass
class Best:
    """The best held-out figure so far and, where `keep: best`, the weights that reached it."""

    keep: str
    patience: int | None
    higher_is_better: bool
    value: float | None = None
    step: int = 0
    since: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, value: float, step: int, trainee: Trainee) -> None:
        sign = 1 if self.higher_is_better else -1
        if self.value is None or math.isnan(self.value) or sign * value > sign * self.value:
            self.value, self.step, self.since = value, step, 0
            if self.keep == "best":
                self.tensors = {k: v.clone() for k, v in trainee.tensors().items()}
        else:
            self.since += 1

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.since >= self.patience

    def state(self) -> dict:
        return {"value": self.value, "step": self.step, "since": self.since, "kept": bool(self.tensors)}

    def restore(self, checkpoint) -> None:
        state = checkpoint.state["best"]
        if self.keep == "best" and not state["kept"]:
            return  # the run had been told to keep the last weights until now: the best is looked for from here on
        self.value, self.step, self.since = state["value"], state["step"], state["since"]
        self.tensors = checkpoint.tensors("best") if self.keep == "best" else {}


def save_checkpoint(
    ctx: StageRun,
    step: int,
    total: int,
    trainees: list[Trainee],
    best: Best | None,
    state: dict,
    average: Average | None = None,
    carried: dict[str, dict[str, Tensor]] | None = None,
) -> None:
    """Weights that train and optimizers as safetensors, the rest as JSON; one step, atomically; whole, whoever holds
    which part of them. carried: further groups of tensors."""
    from pipeline.store.optimizer_state import optimizer_tensors

    tensors = dict(carried or {})
    if average is not None and average.tensors:
        tensors["average"] = average.tensors
    for trainee in trainees:
        tensors[trainee.name] = trainee.tensors()
        tensors[f"{trainee.name}_optimizer"], state[f"{trainee.name}_optimizer"] = optimizer_tensors(trainee.optimizer)
    if best is not None:
        state["best"] = best.state()
        if best.tensors:
            tensors["best"] = best.tensors
    if any(is_sharded(trainee.model) for trainee in trainees) and parallel.is_rank_zero():  # gathering takes its time
        ctx.checkpoints.require_space(sum(x.nbytes for group in tensors.values() for x in group.values()))
    ctx.checkpoints.save(step, {name: full(group) for name, group in tensors.items()}, state, total)


def load_checkpoint(
    ctx: StageRun,
    trainees: list[Trainee],
    best: Best | None,
    total: int,
    average: Average | None = None,
    first: int = 0,
):
    """Restore from the newest valid checkpoint; → (step, state), (0, {}) where there is none. first: steps that other
    trainings of the stage took before this one."""
    from pipeline.store.optimizer_state import load_optimizer

    found = ctx.checkpoints.newest()
    if found is None or found.step <= first:
        if average is not None:
            average.start(trainees[0])
        return 0, {}
    refuse_shorter(ctx, found.step - first, total)
    for trainee in trainees:
        trainee.load(found.tensors(trainee.name))
        name = f"{trainee.name}_optimizer"
        tensors, saved = regrouped(trainee, found.tensors(name), found.state[name])
        with keeping_settings(trainee.optimizer):
            load_optimizer(trainee.optimizer, optimizer_parts(trainee.optimizer, tensors), saved)
    if best is not None:
        best.restore(found)
    if average is not None and average.decay is not None:
        if (found.path / "average.safetensors").is_file():
            held = trainees[0].parameters
            average.tensors = {name: like(held[name], x) for name, x in found.tensors("average").items()}
        else:  # the run had been told to keep none until now: it begins here
            average.start(trainees[0])
    return found.step - first, found.state


def regrouped(trainee: Trainee, tensors: dict[str, Tensor], saved: dict) -> tuple[dict[str, Tensor], dict]:
    """What `optimizer_tensors` gave, in the groups of today: weight_decay may have become 0 since then, or no longer
    be 0."""
    today, before = trainee.optimizer.state_dict()["param_groups"], saved["param_groups"]
    if len(today) == len(before):
        return tensors, saved
    then, now = (sum(grouped(trainee.model, trainee.parameters, len(groups)), []) for groups in (before, today))

    def moved(items: dict) -> dict:
        parts = ((*key.split(".", 1), x) for key, x in items.items())
        return {f"{now.index(then[int(i)])}.{name}": x for i, name, x in parts}

    groups = [before[0] | {"params": group["params"]} for group in today]
    return moved(tensors), {"scalars": moved(saved["scalars"]), "param_groups": groups}


def optimizer_parts(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `optimizer_tensors` gave, of sharded weights the part that is held here."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = {key: parameters[int(key.split(".")[0])] for key in tensors}
    return {key: like(held[key], x) if isinstance(held[key], DTensor) and x.dim() else x for key, x in tensors.items()}


def has_settings_of_today(ctx: StageRun, checkpoint) -> bool:
    """Whether a checkpoint was made with the settings and inputs of this run; the same answer in all processes."""
    return parallel.from_rank_zero(lambda: checkpoint.fingerprint == ctx.checkpoints.fingerprint)


def refuse_shorter(ctx: StageRun, step: int, total: int) -> None:
    """UserError if a run that has come to `step` is now asked to end before."""
    if step > total:
        raise UserError(
            f"{ctx.stage}: {step} steps are done and the settings now ask for {total}; ask for more, or --restart"
        )


def pause_if_asked(ctx: StageRun, step: int, total: int, save: Callable[[], None], together: bool = False) -> None:
    """If a signal asked to stop: save what `step` steps have come to, and leave with Interrupted (exit 75). together:
    all processes are here, and all leave: each holds a part of what is saved."""
    if asked_to_stop(ctx, together):
        save()
        raise Interrupted(step, total)


def asked_to_stop(ctx: StageRun, together: bool = False) -> bool:
    """Whether a signal has come. together: to the first process, which hears them; the same answer everywhere."""
    return parallel.from_rank_zero(lambda: ctx.stop.requested) if together else ctx.stop.requested


def is_due(ctx: StageRun, step: int, together: bool = False) -> bool:
    """Whether to save after this step. together: the first process's answer, everywhere."""
    due = partial(ctx.checkpoints.due, step)
    return parallel.from_rank_zero(due) if together else due()


def perplexity_of(loss: float) -> float:
    """exp of a mean cross-entropy in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def micro_batches(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def balanced(rows: list[int], tokens: Sequence[int], size: int, budget: int | None) -> list[list[int]]:
    """`rows` in as few parts as hold at most `size` rows each, or, with a budget, at most so many tokens each (a row
    with more is alone); the parts are about equal in tokens. Longest first, each to the part that has least."""
    ordered = sorted(rows, key=lambda i: tokens[i], reverse=True)
    least = -(-len(rows) // size) if budget is None else -(-sum(tokens[i] for i in rows) // budget)
    for count in range(max(1, least), len(rows) + 1):
        parts, heap = [[] for _ in range(count)], [(0, i) for i in range(count)]
        for row in ordered:
            total, i = heapq.heappop(heap)
            parts[i].append(row)
            if budget is not None or len(parts[i]) < size:  # else it is full, and stays out
                heapq.heappush(heap, (total + tokens[row], i))
        if budget is None or all(len(p) == 1 or sum(tokens[i] for i in p) <= budget for p in parts):
            return parts
    return [[row] for row in ordered]


def sorted_chunks(
    rows: list[int], tokens: Sequence[int], cost: Callable[[list[int]], int], size: int, budget: int | None
) -> list[list[int]]:
    """`rows`, shortest first, cut into parts of at most `size` rows, or, with a budget, of at most that cost(tokens of
    the part) (a row over it is alone)."""
    parts: list[list[int]] = []
    for row in sorted(rows, key=lambda i: tokens[i]):
        fits = parts and len(parts[-1]) < size
        if parts and budget is not None:
            fits = cost([tokens[i] for i in [*parts[-1], row]]) <= budget
        if fits:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def fit(
    ctx: StageRun,
    trainee: Trainee,
    accelerator,
    *,
    order: list[int],
    batch_size: int,
    costs: Sequence[int],
    cut: Callable[[list[int]], Iterable[list[int]]],
    learning_rate: Callable[[int], float],
    loss: Callable[[list[int], list[int]], tuple[Tensor, dict[str, float]]],
    evaluate: Callable[[Callable[[], None]], dict[str, float]],
    judge: str,
    higher_is_better: bool,
    keep: str,
    patience: int | None,
    eval_steps: int,
    samples: Callable[[], list[dict]] | None = None,
    first: int = 0,
    total: int | None = None,
    carried: tuple[dict, dict] = ({}, {}),
) -> dict:
    """Train on the rows of `order`, `batch_size` of them a step; → the final held-out figures.

    A stage may train several times: then `first` steps were taken before this training, `total` are taken in all, and
    each checkpoint also holds the tensors and the state that are `carried` on from before.

    costs: of each row, by which a batch is shared among processes. cut(batch) → its micro-batches; loss(rows of one of
    them, rows of the batch) → (that micro-batch's share of the batch loss, sums to log): however it is cut, the
    gradient is the batch's. evaluate(poll) runs every `eval_steps`, `judge` being the figure that keep and patience
    look at; what poll() raises between two of its forward passes ends it: the checkpoint then says that it is owed.
    Processes that hold parts of the model save together, between steps alone.
    """
    together = is_sharded(trainee.model)
    best = Best(keep, patience, higher_is_better)
    steps = len(order) // batch_size
    whole = steps if total is None else total
    start, kept = load_checkpoint(ctx, [trainee], best, steps, first=first)
    tensors, state = carried

    def save(step: int, owes_look: bool = False) -> None:
        if first + step:  # else there is nothing to go on from
            said = dict(state) | {"owes_look": owes_look}
            save_checkpoint(ctx, first + step, whole, [trainee], best, said, carried=tensors)

    def look(step: int) -> dict[str, float]:
        leave = partial(pause_if_asked, ctx, first + step, whole, partial(save, step, owes_look=True))
        figures = evaluate((lambda: None) if together else leave)
        ctx.tracker.evaluation(first + step, figures)
        best.offer(figures[judge], step, trainee)
        if samples is not None:
            ctx.tracker.samples(first + step, samples())
        return figures

    none_kept = keep == "best" and start == steps and not best.tensors  # a setting that was overridden
    figures = look(start) if first + start == 0 or kept.get("owes_look") or none_kept else {}
    step = start
    with ctx.tracker.progress(whole, ctx.stage, first + start) as progress:
        while step < steps and not best.exhausted:
            step, began = step + 1, time.perf_counter()
            batch = order[(step - 1) * batch_size : step * batch_size]
            logged: dict[str, float] = {}
            parts = list(cut(parallel.rows_of_this_rank(batch, [costs[i] for i in batch])))
            for rows, own in parallel.padded_micro_batches(parts, batch[:1] if together else None):
                share, sums = loss(rows, batch)
                accelerator.backward(share if own else 0.0 * share)
                for key, value in sums.items() if own else ():
                    logged[key] = logged.get(key, 0.0) + value
            parallel.all_reduce_gradients(trainee.parameters.values())
            logged = parallel.all_reduce_figures(logged)
            rate = learning_rate(step)
            logged["grad_norm"] = optimizer_step(trainee, rate, step)
            took, tokens = time.perf_counter() - began, sum(costs[i] for i in batch)
            ctx.tracker.log(first + step, {**logged, "lr": rate}, took, tokens)
            progress.update(first + step, **{k: v for k, v in logged.items() if k in ("loss", judge)})
            if step % eval_steps == 0 or step == steps:
                figures = look(step)
            if is_due(ctx, first + step, together) and step < steps:
                save(step)
            if step < steps:
                pause_if_asked(ctx, first + step, whole, lambda at=step: save(at), together)
    if keep == "best" and best.step != step:
        trainee.load(best.tensors)
        figures = {}
    figures = figures or evaluate(lambda: None)
    return {**figures, "best_step": best.step, "steps": step}
