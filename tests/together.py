"""Run a check in several processes that have met by gloo."""

import os
from datetime import timedelta

import torch
from torch import distributed as dist

from pipeline.launch.launcher import process_environments
from tests.forked import process


def together(size, check, *args, seconds=240, patience=60):
    """Run check(*args) in `size` processes; its assertions are those of the test.

    Args:
        size: Number of processes. One alone does not initialize torch.distributed.
        check: The check.
        *args: Its arguments.
        seconds: How long a process may take.
        patience: How many seconds a process waits for the others.
    """
    environments = process_environments(size) if size > 1 else [{}]
    children = [process(_run, check, args, environment, patience) for environment in environments]
    for child in children:
        child.start()
    for child in children:
        child.join(seconds)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * size


def _run(check, args, environment, patience):
    os.environ.update(environment)
    torch.set_num_threads(1)
    if environment:
        dist.init_process_group("gloo", timeout=timedelta(seconds=patience))
    check(*args)
    if dist.is_initialized():
        dist.destroy_process_group()
