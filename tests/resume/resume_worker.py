"""Runs `rlhf` in a child process that can be made to die, by SIGKILL, at a chosen step of a chosen stage."""

import multiprocessing
import os
import signal
from pathlib import Path

CONFIG = Path(__file__).with_name("micro.yaml")


def rlhf(
    *argv: str,
    die: tuple[str, int] | None = None,
    term: tuple[str, int] | None = None,
    term_at_token: int | None = None,
) -> int:
    """Exit code of `rlhf argv` in a fresh process; −9 where it died of SIGKILL. The libraries are imported only once.

    die, term: (stage, step) after whose row of metrics.jsonl (rankings, evaluate: whose checkpoint) the process
    kills itself, or gets SIGTERM. term_at_token: which of the tokens that it draws (rows at a time) brings SIGTERM; if
    it draws another one after that, the exit code is 99.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl", "transformers", "datasets", "accelerate", "torch", "peft"])
    child = context.Process(target=_main, args=(list(argv), die, term, term_at_token))
    child.start()
    child.join(300)
    if child.exitcode is None:
        child.kill()
        raise AssertionError(f"rlhf {' '.join(argv)} did not end within 300 s")
    return child.exitcode


def _main(argv: list[str], die, term, term_at_token) -> None:
    from pipeline import cli

    arm(die, term)
    if term_at_token is None:
        os._exit(cli.main(argv))
    from stages.rollouts import transformers

    pick, drawn = transformers.pick, [0]

    def pick_and_count(*args):
        drawn[0] += 1
        if drawn[0] == term_at_token:
            os.kill(os.getpid(), signal.SIGTERM)
        return pick(*args)

    transformers.pick = pick_and_count
    code = cli.main(argv)
    os._exit(99 if drawn[0] > term_at_token else code)


def arm(die: tuple[str, int] | None, term: tuple[str, int] | None) -> None:
    """Let this process die, or get SIGTERM, at a step."""
    from pipeline import checkpoints, tracking

    def at(stage: str, step: int) -> None:
        if (stage, step) == die:
            os.kill(os.getpid(), signal.SIGKILL)
        if (stage, step) == term:
            os.kill(os.getpid(), signal.SIGTERM)

    log, save = tracking.Tracker.log, checkpoints.CheckpointStore.save

    def dying_log(self, step, metrics):
        log(self, step, metrics)
        at(self.stage, step)

    def dying_save(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        stage = Path(self.folder).parent.name
        if stage in ("rankings", "evaluate"):
            at(stage, step)

    tracking.Tracker.log = dying_log
    checkpoints.CheckpointStore.save = dying_save
