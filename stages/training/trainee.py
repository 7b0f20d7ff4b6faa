"""Take an optimizer step: check that the gradient is finite, clip it, step, average weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.errors import TrainingStopped, UserError
from pipeline.launch import parallel
from pipeline.store.shares import StoredTensor
from stages.models.adalora import adamw_for
from stages.models.adapters import trainable_parameters, unwrapped
from stages.models.layout import Layout
from stages.models.loading import score_head
from stages.models.sharding import free_gathered, local_shard, shard_like, to_float, whole
from stages.objectives.control import update_average
from stages.training.stand_ins import StandIns, stand_in


@dataclass
class Trainee:
    """A model that trains, with its optimizer."""

    name: str
    """Name of its tensors in checkpoints, and of the model in error lines."""
    model: nn.Module
    """The model; sharded over the ranks or whole."""
    parameters: dict[str, nn.Parameter]
    """The parameters that train, by name, in the order of the optimizer's state."""
    optimizer: torch.optim.Optimizer | None
    """Its optimizer; None where only the weights are of interest."""
    max_grad_norm: float
    """The gradient is clipped to this norm."""
    rate_factors: dict[str, float] = field(default_factory=dict)
    """Parameters whose learning rate is this many times that of the others."""
    stand_ins: StandIns | None = None
    """What the optimizer steps in place of the parameters; None: the parameters themselves."""

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for p in self.parameters.values():
            p.grad = None

    def take_step(self) -> None:
        """Step the parameters down their gradients."""
        if self.stand_ins is not None:
            self.stand_ins.before_step()
        self.optimizer.step()
        if self.stand_ins is not None:
            self.stand_ins.after_step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights that train, by name; they share memory with the model."""
        return {name: p.detach() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor | StoredTensor]) -> None:
        """Load weights that train.

        Args:
            tensors: Whole tensors by name, or those of a checkpoint; of sharded parameters this
                rank's shard is taken.

        Raises:
            UserError: Names or shapes are not those of this model.
        """
        if set(tensors) != set(self.parameters):
            odd = sorted(set(tensors) ^ set(self.parameters))[:3]
            raise UserError(
                f"checkpoint of {self.name}: its weights are not this model's ({odd}); start again with --restart"
            )
        # All shapes are checked before any weight is copied: an error leaves the model as it was.
        for name, p in self.parameters.items():
            if tuple(p.shape) != tuple(tensors[name].shape):
                raise UserError(
                    f"checkpoint of {self.name}: {name} is {tuple(tensors[name].shape)}, the model's is "
                    f"{tuple(p.shape)}; start again with --restart"
                )
        free_gathered(self.model)
        for name, p in self.parameters.items():
            p.copy_(shard_like(p, tensors[name]))


def make_trainee(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float,
    max_grad_norm: float,
    adam_beta2: float = 0.95,
    weight_decay: float = 0.0,
    steps: int | None = None,
    further: dict[str, nn.Parameter] | None = None,
    layout: Layout | None = None,
) -> Trainee:
    """Build AdamW, with β = (0.9, `adam_beta2`), over the parameters that require a gradient.

    Args:
        name: Name of the model in checkpoints and error lines.
        model: The model, on its device.
        learning_rate: Rate before the first step; `optimizer_step` sets that of each step.
        max_grad_norm: The gradient is clipped to this norm.
        adam_beta2: AdamW's second β.
        weight_decay: Decoupled weight decay, of all parameters but norms and biases.
        steps: Optimizer steps of the training; only AdaLoRA needs it.
        further: Parameters of the loss, by name; they do not decay.
        layout: What else the optimizer may step in place of the weights; None: nothing.
    """
    parameters = trainable_parameters(model) | (further or {})
    adamw, more = adamw_for(model, steps)
    options = {"lr": learning_rate, "betas": (0.9, adam_beta2), "weight_decay": weight_decay, "fused": True}
    names = parameter_groups(model, parameters, 2 if weight_decay else 1)
    groups = [{"params": [parameters[n] for n in group]} for group in names]
    # An explicit 0 overrides the default that AdamW gives to every group.
    for group in groups[1:]:
        group["weight_decay"] = 0.0
    optimizer = adamw(groups, **options, **more)
    stand_ins = stand_in(optimizer, layout or Layout())
    return Trainee(name, model, parameters, optimizer, max_grad_norm, stand_ins=stand_ins)


def parameter_groups(model: nn.Module, names: Iterable[str], count: int) -> list[list[str]]:
    """Divide the names of parameters into AdamW's groups.

    Args:
        model: The model that the parameters belong to.
        names: Names of the parameters that train.
        count: 1: all in one group; 2: those with weight decay, then those without.
    """
    if count == 1:
        return [list(names)]
    from transformers import Trainer  # base and sft train by its rule

    decays = set(Trainer.get_decay_parameter_names(None, model))
    return [[n for n in names if n in decays], [n for n in names if n not in decays]]


def total_norm(grads: Iterable[Tensor | None]) -> Tensor:
    """Return ‖g‖₂ of gradients, on their device; of sharded ones it is distributed as they are.

    Args:
        grads: A gradient for each parameter; None means 0.
    """
    return torch.nn.utils.get_total_norm([g for g in grads if g is not None] or [torch.zeros(1)])


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
    """Return the gradient of each parameter; None where it has none."""
    return [p.grad for p in parameters]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Return ‖g‖₂ over all parameters that have a gradient; 0 if none has."""
    return to_float(total_norm(gradients_of(parameters)))


@dataclass(frozen=True)
class DotProduct:
    """The dot product of two lists of gradients, still on the device."""

    terms: list[Tensor]
    """The product of each pair, a scalar."""
    is_share: bool
    """Whether each rank has the products of its shards only."""

    def sum(self, terms: Sequence[float]) -> float:
        """Return the product over all ranks; they call this together.

        Args:
            terms: What was read of `self.terms`.
        """
        dot = sum(terms)
        return parallel.all_reduce_figures({"dot": dot})["dot"] if self.is_share else dot


def dot_product(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> DotProduct:
    """Multiply two lists of gradients, pair by pair.

    Args:
        one: A gradient for each parameter; None means 0.
        other: Gradients of the same parameters, in the same order.
    """
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if parallel.arrangement().weights is not None:
        # Shares of some weights, and copies of others: DTensor knows what is summed once.
        return DotProduct([whole((a.float() * b.float()).sum()) for a, b in pairs], is_share=False)
    shards = [(local_shard(a).flatten().float(), local_shard(b).flatten().float()) for a, b in pairs]
    return DotProduct([torch.dot(a, b) for a, b in shards], any(isinstance(a, DTensor) for a, _ in pairs))


def cosine(dot: float, size: float) -> float:
    """Return the cosine of two gradients; 0 where one of them vanishes.

    Args:
        dot: Their dot product.
        size: The product of their norms.
    """
    return dot / size if size > 0 else 0.0


def norm_problem(trainee: Trainee, norm: float, step: int) -> str | None:
    """Return what is wrong with a gradient that is not finite, in words; None if it is finite.

    Args:
        trainee: The model.
        norm: Norm of its gradient.
        step: The step's index.
    """
    return None if math.isfinite(norm) else f"{trainee.name}: the gradient at step {step} is {norm}"


def stop_training(problem: str) -> None:
    """Raise TrainingStopped (exit code 3) for a value that is not finite, with a remedy."""
    raise TrainingStopped(
        f"{problem}; this step was not taken. Run again with a lower learning_rate or max_grad_norm and "
        f"--override-config, or with model.dtype: float32 and --restart"
    )


def optimizer_step(trainee: Trainee, learning_rate: float, step: int) -> float:
    """Clip the gradient, take an optimizer step and clear the gradient.

    Args:
        trainee: The model, with its gradient.
        learning_rate: The rate of this step.
        step: The step's index, for the error line.

    Returns:
        The gradient's norm before clipping.

    Raises:
        TrainingStopped: The gradient is not finite; no step is taken.
    """
    norm = total_norm(gradients_of(trainee.parameters.values()))
    number = to_float(norm)
    if problem := norm_problem(trainee, number, step):
        trainee.zero_grad()
        stop_training(problem)
    clipped_step(trainee, norm, learning_rate)
    return number


def clipped_step(trainee: Trainee, norm: Tensor, learning_rate: float) -> None:
    """Clip a finite gradient, take an optimizer step and clear the gradient.

    Args:
        trainee: The model, with its gradient.
        norm: The gradient's norm, as `total_norm` gives it.
        learning_rate: The rate of this step.
    """
    torch.nn.utils.clip_grads_with_norm_(trainee.parameters.values(), trainee.max_grad_norm, norm)
    # No scheduler: the rate depends on the step only, so a resumed run has no state to restore.
    for group in trainee.optimizer.param_groups:
        group["lr"] = learning_rate
    before = {name: trainee.parameters[name].detach().clone() for name in trainee.rate_factors}
    trainee.take_step()
    # AdamW's step is proportional to its rate. A group of its own would change saved states.
    with torch.no_grad():
        for name, old in before.items():
            new = trainee.parameters[name]
            new.copy_(old + trainee.rate_factors[name] * (new - old))
    trainee.zero_grad()


@dataclass
class Skips:
    """Count the steps that were skipped because a value was not finite."""

    limit: int
    """The most steps that may be skipped."""
    count: int = 0
    """Steps skipped so far."""

    def skip(self, problem: str) -> str:
        """Count one more skipped step and return the line to print.

        Raises:
            TrainingStopped: The limit is reached.
        """
        if self.count >= self.limit:
            stop_training(f"{problem} (max_skipped_steps {self.limit})")
        self.count += 1
        return f"{problem}: step skipped ({self.count} of at most {self.limit})"


@dataclass
class Average:
    """An exponential moving average of a trainee's weights, updated after each optimizer step."""

    decay: float | None
    """Share of the old average in the new one; None: no average is kept."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """The averaged weights, by name."""

    def start(self, trainee: Trainee) -> None:
        """Start with the trainee's present weights."""
        if self.decay is not None:
            # clones: the trainee's tensors share memory with the model
            self.tensors = {name: p.clone() for name, p in trainee.tensors().items()}

    def step(self, trainee: Trainee) -> None:
        """Move the average towards the trainee's present weights."""
        if self.decay is not None:
            update_average(self.tensors, trainee.tensors(), self.decay)


def trainee_of(
    section: Any,
    model: nn.Module,
    steps: int,
    head_rate: float | None = None,
    further: dict[str, nn.Parameter] | None = None,
    further_rate: float = 0.0,
    layout: Layout | None = None,
) -> Trainee:
    """Return the trainee that the settings of rm or dpo ask for.

    Args:
        section: The stage's settings.
        model: The model, on its device.
        steps: Optimizer steps of the training.
        head_rate: Peak learning rate of a reward model's head; None: that of all weights.
        further: Parameters of the loss, by name.
        further_rate: Their peak learning rate.
        layout: What is sharded, and what lies in the CPU's memory.
    """
    trainee = make_trainee(
        "model",
        model,
        learning_rate=section.learning_rate,
        max_grad_norm=section.max_grad_norm,
        weight_decay=section.weight_decay,
        adam_beta2=section.adam_beta2,
        steps=steps,
        further=further,
        layout=layout,
    )
    if head_rate is not None:
        head = {id(p) for p in score_head(unwrapped(model)).parameters()}
        factor = head_rate / section.learning_rate
        trainee.rate_factors = {name: factor for name, p in trainee.parameters.items() if id(p) in head}
    trainee.rate_factors |= dict.fromkeys(further or {}, further_rate / section.learning_rate)
    return trainee
