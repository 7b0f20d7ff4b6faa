"""Convert the state of a torch optimizer to tensors and JSON, and load it back exactly."""

from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:  # torch is imported late: signal handlers and environment variables come before it
    from torch import Tensor
    from torch.optim import Optimizer


def optimizer_tensors(optimizer: "Optimizer") -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Split an optimizer's state into tensors for safetensors and a remainder for JSON.

    Returns:
        `{"INDEX.NAME": tensor}`, where INDEX counts the parameters over all groups, and
        `{"scalars": …, "param_groups": …}`. `load_optimizer` takes both.
    """
    import torch

    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    groups = []
    for group in state["param_groups"]:
        bad = [name for name, value in group.items() if torch.is_tensor(value)]
        assert not bad, f"optimizer options that are tensors cannot be saved: {bad}"
        groups.append(dict(group))
    return tensors, {"scalars": scalars, "param_groups": groups}


def load_optimizer(optimizer: "Optimizer", tensors: dict[str, "Tensor"], saved: dict[str, Any]) -> None:
    """Load what `optimizer_tensors` returned into an optimizer over the same parameters.

    Args:
        optimizer: the optimizer to change; it stays as it is when an error is raised.
        tensors: the saved tensors by name.
        saved: the saved remainder.

    Raises:
        UserError: the parameter groups, shapes or options do not match the checkpoint.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    current_groups = optimizer.state_dict()["param_groups"]
    sizes = [len(group["params"]) for group in current_groups]
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != saved_sizes:
        raise _mismatch(f"the optimizer's groups have {sizes} parameters, the checkpoint's {saved_sizes}")
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *saved["scalars"].items()]:
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        shape = getattr(value, "shape", ())
        if len(shape) > 0 and shape != parameter.shape:  # a step counter is a tensor without dimensions
            raise _mismatch(f"optimizer state {key} is {tuple(shape)}, its parameter {tuple(parameter.shape)}")
        state.setdefault(int(index), {})[name] = value
    groups = []
    for group, saved_group in zip(current_groups, saved["param_groups"], strict=True):
        if set(group) != set(saved_group):
            raise _mismatch(f"optimizer options differ: {sorted(set(group) ^ set(saved_group))}")
        # JSON has no tuples: AdamW's betas come back as a list
        groups.append(
            {name: tuple(value) if isinstance(group[name], tuple) else value for name, value in saved_group.items()}
        )
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _mismatch(what: str) -> UserError:
    return UserError(f"checkpoint: {what}; start again with --restart")
