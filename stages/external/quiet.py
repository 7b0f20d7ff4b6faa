"""Silence lm-eval and the libraries below it, whose messages are not for the user."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_unless_at_terminal() -> Iterator[None]:
    """Silence lm-eval's messages; its progress bars stay where somebody watches them."""
    logger = logging.getLogger("lm_eval")
    level, multiprocessing = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap would fork a process that holds a model
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if sys.stderr.isatty():
                yield
            else:
                with contextlib.redirect_stderr(io.StringIO()):
                    yield
    finally:
        logger.setLevel(level)
        if multiprocessing is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = multiprocessing
