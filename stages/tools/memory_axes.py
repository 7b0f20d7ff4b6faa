"""Say what tensor and context parallelism take off the memory of a step."""

from dataclasses import replace
from typing import Any

from stages.tools.memory_step import Sizes, Step, gathered_at_once, make, quiet


def held_together(launch: Any) -> bool:
    """Return whether processes share a model or rows (launch.tensor_parallel, context_parallel)."""
    return launch.together > 1


def gathers(launch: Any) -> bool:
    """Return whether fsdp2 gathers weights for a pass: there are several groups to share them."""
    return launch.strategy == "fsdp2" and launch.processes * launch.nodes > (launch.tensor_parallel or 1)


def whole_layers(config: Any, names: set[str], attention: str) -> int:
    """Return the most bytes of weights that fsdp2 gathers at once for one of some models.

    Args:
        config: transformers' configuration of the models.
        names: As of `memory_step.make`.
        attention: `model.attn_implementation`.
    """
    from stages.models.adapters import AdapterSettings

    with quiet():
        return max(gathered_at_once(make(config, name, AdapterSettings(), False, attention, False)) for name in names)


def on_axes(sizes: Sizes, launch: Any, config: Any, steps: list[Step], attention: str, parts: int) -> Sizes:
    """Return what a step needs where processes share a model or rows.

    Context parallelism divides activations. Tensor parallelism divides what is gathered; of
    activations it divides those inside layers, which is not counted: the most is given.

    Args:
        sizes: What the step needs with weights in `parts`.
        launch: The section launch.
        config: transformers' configuration of the model.
        steps: The step's micro-batches.
        attention: `model.attn_implementation`.
        parts: How many processes hold a share of each weight.
    """
    if not held_together(launch):
        return sizes
    names = {step.model for step in steps}
    gathered = whole_layers(config, names, attention) if parts > 1 else 0
    gradients = min(sum(sizes.trains.values()) // parts, sizes.step - gathered)
    activations = (sizes.step - gathered - gradients) // (launch.context_parallel or 1)
    return replace(sizes, step=gradients + activations + on_device(gathered, launch, config, steps))


def on_device(gathered: int, launch: Any, config: Any, steps: list[Step]) -> int:
    """Return the bytes of weights that a process gathers at once, of those that fsdp2 alone would.

    Args:
        gathered: `whole_layers`.
        launch: The section launch.
        config: transformers' configuration of the model.
        steps: The step's micro-batches.
    """
    tensor = launch.tensor_parallel or 1
    text = config.get_text_config()
    # The unembedding is gathered from its shares, and so is its gradient.
    reads_head = tensor > 1 and any(step.head in ("logprobs", "text") for step in steps)
    return gathered // tensor * gathers(launch) + 8 * text.vocab_size * text.hidden_size * reads_head
