"""Start child processes that are forked after the libraries and our modules were imported."""

import gc
import multiprocessing
import os
from collections.abc import Callable

# A pytest process has one fork server, and its first start fixes what it imports. So the list is
# the
# same for all tests: an import that is missing here costs each child seconds.
MODULES = [
    "torch",
    "datasets",
    "accelerate",
    "peft",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
    "pipeline.cli",
    "pipeline.plan",
    "pipeline.running",
    "stages.base",
    "stages.sft",
    "stages.rankings",
    "stages.rm",
    "stages.ppo.run",
    "stages.dpo",
    "stages.evaluate",
    "stages.training.text_trainers",
]


def process(target: Callable, *args) -> multiprocessing.Process:
    """Return a process, not yet started, that calls target(*args) in a fork of the fork server.

    Args:
        target: A function of a module that the child can import.
        args: Its arguments, which are pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    return context.Process(target=_call, args=(target, args))


def _call(target: Callable, args: tuple) -> None:
    """Call a function without the costs of a process that has imported everything."""
    gc.freeze()  # otherwise each full collection walks through all objects of the libraries
    os.fsync = lambda handle: None  # no test cuts the power, and the page cache survives a kill
    target(*args)
