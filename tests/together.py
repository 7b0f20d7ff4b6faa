"""Run a check in several processes that have met by gloo."""

import os
from datetime import timedelta

import torch
from torch import distributed as dist

from pipeline.launch.launcher import process_environments
from tests.forked import process


def together(size, check, *args):
    """Run check(*args) in `size` processes; its assertions are those of the test."""
    children = [process(_run, check, args, variables) for variables in process_environments(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(240)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * size


def _run(check, args, place):
    os.environ.update(place)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    check(*args)
    dist.destroy_process_group()
