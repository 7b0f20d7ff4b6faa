"""Start the processes of a run on this machine, relay signals and report how they ended.

`rlhf run` starts `launch.processes` copies of itself with the environment variables that torchrun
sets. This parent process does no work: it waits, and makes sure that none of its children outlives
the others.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO, Any

from pipeline.launch.processes import EXIT_PEER_LOST, GRACE, rank_and_size_from_environment
from pipeline.stage import StopFlag

PIPE_VARIABLE = "RLHF_LAUNCHER"  # the number of a file descriptor that closes when the launcher dies
EXPLAINED_CODES = (0, 2, 3, 75)  # exit codes whose reason rank 0 has printed
# Exit codes of another rank that are not why a run failed: it still runs (None), it ended by a
# decision that all ranks took, or it ended because it had lost a peer.
HARMLESS_CODES = (None, 0, 3, 75, EXIT_PEER_LOST)
POLL_SECONDS = 0.05
OUTPUT_LINES = 20  # how much of a failed rank's output is shown


def processes_to_start(tree: dict[str, Any]) -> int:
    """Return how many processes to start on this machine.

    Args:
        tree: the config as parsed, before validation.

    Returns:
        The number of processes, or 1 if this process does the work itself: because the config asks
            for one
        process, for several nodes, or because torchrun, SLURM or a launcher has started this one.
    """
    launch = tree.get("launch")
    if not isinstance(launch, dict):
        return 1
    count, nodes = launch.get("processes", 1), launch.get("nodes", 1)
    was_started_with_others = rank_and_size_from_environment()[1] > 1
    if type(count) is not int or count <= 1 or nodes != 1 or was_started_with_others:
        return 1
    return count


def start(argv: list[str], count: int) -> int:
    """Run `rlhf ARGV` in several processes on this machine, and wait for rank 0.

    Signals are passed on to rank 0. A second SIGTERM or SIGINT kills all processes, this one
    included.

    Args:
        argv: the command's arguments.
        count: the number of processes.

    Returns:
        The exit code of rank 0, or 1 if another process was the cause of its end.
    """
    received: list[int] = []
    for handled in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(handled, lambda number, frame: received.append(number))
    children: list[subprocess.Popen] = []
    passed_on: list[int] = []
    deadline = None
    with ExitStack() as open_files:
        # Only rank 0 prints: the others' output is kept for the case that one of them fails.
        outputs = [open_files.enter_context(tempfile.TemporaryFile()) for _ in range(count - 1)]
        # Nothing is ever written to this pipe. Its writing end is only here, so that the children
        # notice by its closing that this process is gone, even if it was killed.
        reading, writing = os.pipe()
        try:
            for variables, output in zip(process_environments(count), [None, *outputs], strict=True):
                child = subprocess.Popen(
                    own_command(argv),
                    env=os.environ | variables | {PIPE_VARIABLE: str(reading)},
                    stdout=output,
                    stderr=output,
                    pass_fds=[reading],
                    start_new_session=True,  # Ctrl-C then reaches rank 0 once, through this process
                )
                children.append(child)
            while children[0].poll() is None and (deadline is None or time.monotonic() < deadline):
                for number in received:
                    # SIGUSR1 is a queue's warning, which SIGTERM follows: not the first of two
                    # requests
                    if number != signal.SIGUSR1 and set(passed_on) - {signal.SIGUSR1}:
                        kill_all_and_die(number, children)
                    passed_on.append(number)
                    children[0].send_signal(number)
                received.clear()
                # Rank 0 usually notices that a peer is gone, and says so. It gets some time for
                # that.
                if deadline is None and any(child.poll() not in HARMLESS_CODES for child in children[1:]):
                    deadline = time.monotonic() + GRACE
                time.sleep(POLL_SECONDS)
            for number in passed_on:
                if children[0].poll() == -number:  # it came before rank 0 had installed its handlers
                    kill_all_and_die(number, children)
            return report_end([child.poll() for child in children], outputs)
        finally:
            kill_all(children)
            os.close(reading)
            os.close(writing)


def process_environments(count: int) -> list[dict[str, str]]:
    """Return the variables that torchrun would set for each of `count` processes here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # port 0: the system chooses one that is free
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def own_command(argv: list[str], instead: list[str] | None = None) -> list[str]:
    """Return the command line that started this process.

    Args:
        argv: the arguments for `rlhf`, used where this process was started in another way.
        instead: other arguments, to put in their place; None: the same ones.
    """
    words = argv if instead is None else instead
    if argv and sys.orig_argv[-len(argv) :] == argv:
        return [sys.executable, *sys.orig_argv[1 : -len(argv)], *words]
    return [sys.executable, "-m", "pipeline.cli", *words]


def kill_all(children: list[subprocess.Popen]) -> None:
    """Kill the processes and wait until they are gone."""
    for child in children:
        child.kill()
        child.wait()


def kill_all_and_die(number: int, children: list[subprocess.Popen]) -> None:
    """Kill the child processes, then end this one by the same signal."""
    kill_all(children)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def report_end(codes: list[int | None], outputs: Sequence[IO[bytes]]) -> int:
    """Return the run's exit code, and print which process failed if rank 0 could not know.

    Args:
        codes: the exit code of each rank, negative for a signal, None if it still runs.
        outputs: what ranks 1, 2, … have printed.
    """
    if codes[0] in EXPLAINED_CODES:
        return codes[0]
    ended = {rank: code for rank, code in enumerate(codes) if code is not None}
    killed = [rank for rank, code in ended.items() if code < 0]
    failed = [rank for rank, code in ended.items() if rank > 0 and code not in HARMLESS_CODES]
    if not killed and not failed:
        return 1
    rank = killed[0] if killed else failed[0]  # the others may have failed because one was killed
    code = ended[rank]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    print(f"error: process {rank} of {len(codes)} {how}; run again to resume", file=sys.stderr)
    if rank > 0:
        outputs[rank - 1].seek(0)
        for line in outputs[rank - 1].read().decode(errors="replace").splitlines()[-OUTPUT_LINES:]:
            print(f"  process {rank}: {line}", file=sys.stderr)
    return 2 if code == 2 else 1


def watch_launcher(stop: StopFlag, met: threading.Event) -> None:
    """End this process if its launcher dies.

    Rank 0 saves and stops as after a signal, and the others help until it has. Before the processes
    have met there is nothing to save, and each of them exits at once.

    Args:
        stop: the flag to set.
        met: set once the processes have met.
    """
    if PIPE_VARIABLE not in os.environ:
        return
    pipe = int(os.environ[PIPE_VARIABLE])

    def wait() -> None:
        os.read(pipe, 1)  # returns when the launcher's end of the pipe closes
        stop.requested = True
        if not met.is_set():
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
