"""Print the memory that each stage with models needs of a device."""

from typing import Any

from pipeline.launch import devices

COLUMNS = ("weights", "moments", "kept", "step", "sampling")


def print_memory(experiment: Any, console: Any = None, trust_remote_code: bool = False) -> int:
    """Print a table of the memory that each stage needs, and whether this machine has it.

    Args:
        experiment: The validated experiment.
        console: A rich Console; by default the terminal.
        trust_remote_code: Whether code that the model brings may run.

    Returns:
        The exit code, 0.
    """
    from rich.console import Console
    from rich.table import Table

    from stages.settings.rollout import sampling_with_vllm
    from stages.shared.runtime import device_of
    from stages.tools.memory import of_experiment

    console, device = console or Console(), device_of(experiment)
    table = Table("", *COLUMNS, "in all", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    most = 0
    with console.status("taking a step of each stage without data"):
        for need in of_experiment(experiment, device, trust_remote_code):
            sizes = [getattr(need, name) for name in COLUMNS]
            table.add_row(need.stage, *[readable(size) for size in sizes], readable(need.most))
            most = max(most, need.most)
    console.print(table)
    holder = "each process on the CPU" if device == "cpu" else "each GPU"
    console.print(
        f"\nThe most that {holder} will hold, with the longest rows that the settings allow. moments: of Adam; kept: "
        f"averages and best weights; step: activations and gradients; sampling: the cache, and weights cast for it. "
        f"Of step and sampling only the larger counts. Rankings from a file are taken to be pairs."
    )
    if stages := sampling_with_vllm(experiment):
        settings = experiment.launch.vllm
        where = "this machine" if device == "cpu" else f"GPUs {settings.devices or 'of rank 0'}"
        share = f"{settings.gpu_memory_utilization:.0%} of the memory of {where}"
        console.print(
            f"vLLM takes {share} in addition, throughout {' and '.join(stages)} (launch.vllm.gpu_memory_utilization)."
        )
    warn_if_too_much(experiment, device, most, console)
    return 0


def warn_if_too_much(experiment: Any, device: str, most: int, console: Any) -> None:
    """Print a line if this machine has less memory than an experiment needs.

    Args:
        experiment: The validated experiment.
        device: "cuda", "mps" or "cpu"; a GPU that this machine does not have is not checked.
        most: The most bytes that a process needs.
        console: A rich Console.
    """
    from stages.tools.doctor_machine import memory_gb

    if not devices.is_there(device):
        return
    gpu, room = devices.total_memory(device), memory_gb()[0]
    if gpu is not None:
        room = gpu / 1e9
    else:
        most *= experiment.launch.processes  # the processes share this machine's memory
    if most > room * 1e9:
        console.print(
            f"{most / 1e9:.1f} GB are needed, and this machine has {room:.1f}: lower per_device_train_batch_size, or "
            f"set model.gradient_checkpointing: true or model.peft: {{method: lora}}"
        )


def readable(size: int) -> str:
    """Return a number of bytes for people; "" for none."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size else ""
