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
    most = host = 0
    with console.status("taking a step of each stage without data"):
        needs = list(of_experiment(experiment, device, trust_remote_code))
    offloads, saves = any(need.host for need in needs), any(need.saving for need in needs)
    beside = [*["offloaded"] * offloads, *["saving"] * saves]
    table = Table("", *COLUMNS, "in all", *beside, box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for need in needs:
        sizes = [*(getattr(need, name) for name in COLUMNS), need.most_on(device)]
        sizes += [*[need.host] * offloads, *[need.saving] * saves]
        table.add_row(need.stage, *map(readable, sizes))
        most, host = max(most, need.most_on(device)), max(host, need.most_beside(device))
    console.print(table)
    holder, whose = ("each process on the CPU", "counted in all") if device == "cpu" else ("each GPU", "for each GPU")
    console.print(
        f"\nThe most that {holder} will hold, with the longest rows that the settings allow. moments: of Adam; kept: "
        f"averages and best weights; step: activations and gradients; sampling: the cache, and weights cast for it. "
        f"Of step and sampling only the larger counts. Rankings from a file are taken to be pairs."
        + " offloaded: what lies in the CPU's memory instead, for each GPU." * offloads
        + f" saving: the copy in the CPU's memory that a checkpoint is written from while training goes on, {whose}."
        * saves
    )
    if stages := sampling_with_vllm(experiment):
        settings = experiment.launch.vllm
        where = "this machine" if device == "cpu" else f"GPUs {settings.devices or 'of rank 0'}"
        share = f"{settings.gpu_memory_utilization:.0%} of the memory of {where}"
        console.print(
            f"vLLM takes {share} in addition, throughout {' and '.join(stages)} (launch.vllm.gpu_memory_utilization)."
        )
    warn_if_too_much(experiment, device, most, console)
    warn_of_host(experiment, host, console)
    return 0


def warn_of_host(experiment: Any, host: int, console: Any) -> None:
    """Print a line if this machine's CPUs have less memory than processes with a GPU take of it.

    Args:
        experiment: The validated experiment.
        host: The most bytes that a process offloads, or copies to save them.
        console: A rich Console.
    """
    from stages.tools.doctor_machine import memory_gb

    room, needed = memory_gb()[0], host * experiment.launch.processes / 1e9
    if needed > room:
        console.print(
            f"{needed:.1f} GB are offloaded, or copied to be saved, by {experiment.launch.processes} processes, and "
            f"this machine's CPUs have {room:.1f}: take more machines (launch.nodes), or offload less (launch.offload)"
        )


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
            f"set model.gradient_checkpointing: true, model.peft: {{method: lora}} or, for a GPU, launch.offload"
        )


def readable(size: int) -> str:
    """Return a number of bytes for people; "" for none."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size else ""
