"""Several processes that work on one stage: starting them on this machine, and how the first one leads the others.

`rlhf run` starts `launch.processes` copies of itself, with the environment that torchrun gives; by hand, `torchrun
--nproc-per-node 2 -m pipeline.cli run …` does the same, on several machines too. The first process plans, locks, logs,
saves and publishes as if it were alone; the others wait until it names a stage and do their share of it. All hold the
same state, so the first one's checkpoint is everybody's and it alone hears a signal: whenever it ends, the others end.
"""

import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from pipeline.errors import PeerLost, UserError
from pipeline.stage import StopFlag

PIPE = "RLHF_LAUNCHER"  # the number of a pipe's end that closes when the launcher is gone
GRACE = 5.0  # seconds in which the first process notices by itself that another one is gone
OWN_DECISIONS = (0, 2, 3, 75)  # exit codes that a process says the reason of itself
LOST_ANOTHER = 4  # the exit code of one that is not the first, when another is gone: between processes alone
LOST = r"gloo|NCCL|Connection (closed|reset|refused)|[Tt]imed out"  # how the backends say it
NOT_THE_CAUSE = (None, 0, 3, 75, LOST_ANOTHER)  # of another: it runs, took a decision of all, or lost one


def place_in_environment() -> tuple[int, int]:
    """Which of how many processes the environment says that this one is: (0, 1) for one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), size) if size > 1 else (0, 1)


def wanted(tree: dict[str, Any]) -> int:
    """How many processes to start for a config (as read, not validated): 1 = this one works itself."""
    launch = tree.get("launch")
    count, nodes = (launch.get(key, 1) if isinstance(launch, dict) else 1 for key in ("processes", "nodes"))
    return count if type(count) is int and count > 1 and nodes == 1 and place_in_environment()[1] == 1 else 1


# -- starting them ---------------------------------------------------------------------------------------


def start(argv: list[str], count: int) -> int:
    """Runs the command `rlhf ARGV` in `count` processes on this machine; → the first one's exit code. A signal is
    handed to the first one; a second SIGTERM or SIGINT ends all at once. What another one said is shown where it was
    the cause."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    reading, writing = os.pipe()
    said = [tempfile.TemporaryFile() for _ in range(count - 1)]
    children: list[subprocess.Popen] = []
    handed: list[int] = []
    deadline = None
    try:
        for rank, place in enumerate(places(count)):
            output = {} if rank == 0 else {"stdout": said[rank - 1], "stderr": said[rank - 1]}
            options = {"env": os.environ | place | {PIPE: str(reading)}, "pass_fds": [reading], **output}
            # in a session of its own: Ctrl-C reaches the first one once, by way of this process
            children.append(subprocess.Popen(this_command(argv), start_new_session=True, **options))
        while children[0].poll() is None and (deadline is None or time.monotonic() < deadline):
            for number in received:
                if number != signal.SIGUSR1 and set(handed) - {signal.SIGUSR1}:
                    end_by(number, children)
                handed.append(number)
                children[0].send_signal(number)
            received.clear()
            if deadline is None and any(child.poll() not in NOT_THE_CAUSE for child in children[1:]):
                deadline = time.monotonic() + GRACE
            time.sleep(0.05)
        for number in handed:
            if children[0].poll() == -number:  # it had not begun to listen
                end_by(number, children)
        return outcome(children, said)
    finally:
        end(children)
        for file in said:
            file.close()
        os.close(reading)
        os.close(writing)


def places(count: int) -> list[dict[str, str]]:
    """What the environment of each of `count` processes on this machine says, under torchrun's names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def this_command(argv: list[str]) -> list[str]:
    """How this process was started; of a call from Python: the command with these arguments."""
    if argv and sys.orig_argv[-len(argv) :] == argv:
        return [sys.executable, *sys.orig_argv[1:]]
    return [sys.executable, "-m", "pipeline.cli", *argv]


def end(children: list[subprocess.Popen]) -> None:
    for child in children:
        child.kill()
        child.wait()


def end_by(number: int, children: list[subprocess.Popen]) -> None:
    """All processes end, this one by the signal: as one that works alone does."""
    end(children)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def outcome(children: list[subprocess.Popen], said: list[Any]) -> int:
    """The exit code of all; a line says who ended where the first process could not know."""
    codes = [child.poll() for child in children]
    if codes[0] in OWN_DECISIONS:
        return codes[0]
    by_signal = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
    by_fault = [rank for rank, code in enumerate(codes) if rank and code not in NOT_THE_CAUSE]
    for rank in (by_signal or by_fault)[:1]:
        code = codes[rank]
        why = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        print(f"error: process {rank} of {len(children)} {why}; run again to go on", file=sys.stderr)
        if rank:
            said[rank - 1].seek(0)
            for line in said[rank - 1].read().decode(errors="replace").splitlines()[-20:]:
                print(f"  process {rank}: {line}", file=sys.stderr)
        return 2 if code == 2 else 1
    return 1


def watch_launcher(stop: StopFlag, met: threading.Event) -> None:
    """Ends this process after the one that started it: the first one saves, and the others help until it has. Before
    they have `met` there is nothing to save."""
    if PIPE not in os.environ:
        return
    pipe = int(os.environ[PIPE])

    def wait() -> None:
        os.read(pipe, 1)  # nothing is ever written: this returns when the other end closes
        stop.requested = True
        if not met.is_set():
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# -- the first one leads ---------------------------------------------------------------------------------


@dataclass
class Peers:
    """The processes of this run. `tell` is the first one's, `hear` the others'."""

    rank: int
    size: int
    board: Any  # torch's key-value store that all of them reach
    number: int = 0  # of messages so far

    def tell(self, message: dict[str, Any]) -> None:
        """What the others do next: {"stage", "at"} or {"end": whether all went well}."""
        self.board.set(f"message/{self.number}", json.dumps(message))
        self.number += 1

    def hear(self) -> dict[str, Any]:
        """Waits for the first one's next message, however long that works alone."""
        key = f"message/{self.number}"
        try:
            while not self.board.check([key]):
                time.sleep(0.05)
            message = json.loads(self.board.get(key))
        except (RuntimeError, ConnectionError) as error:  # the first one is gone, and the board with it
            raise PeerLost("the first process is gone") from error
        self.number += 1
        return message


def join(processes: int, patience: float) -> Peers | None:
    """Meets the other processes; None for one that works alone. processes: how many the config asks for; patience:
    seconds. UserError where the environment does not fit, PeerLost where they do not come in time."""
    rank, size = place_in_environment()
    if size == 1:
        return None
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"launch: WORLD_SIZE is {size} and {', '.join(missing)} not set; let torchrun set them all")
    if processes not in (1, size):
        raise UserError(f"launch: {processes} processes in the config, {size} in WORLD_SIZE; leave one of them out")
    import torch
    from torch import distributed as dist

    device = "gloo"
    if torch.cuda.is_available():
        here, visible = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > visible:
            what = f"{here} processes on a machine with {visible} GPU(s)"
            raise UserError(f"launch.processes: {what}; use at most one per GPU")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = "cpu:gloo,cuda:nccl"
    limit, again = timedelta(seconds=patience), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=limit))
        group, board = (dist.PrefixStore(f"{name}/{again}", store) for name in ("group", "board"))
        dist.init_process_group(device, store=group, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise PeerLost(f"the {size} processes did not meet: {first}") from error
    if rank > 0:
        end_with_the_first(dist, f"board/{again}", size, limit)
    return Peers(rank, size, board)


def end_with_the_first(dist: Any, prefix: str, size: int, limit: timedelta) -> None:
    """Ends this process some seconds after the first one ended without it: a wait inside NCCL would not notice."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    own = dist.PrefixStore(prefix, dist.TCPStore(address, port, size, False, limit, wait_for_workers=False))

    def watch() -> None:
        try:
            while not own.check(["ended"]):
                time.sleep(1.0)
        except RuntimeError:  # the board went with it
            pass
        time.sleep(GRACE)
        os._exit(LOST_ANOTHER)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def relying_on(peers: Peers | None) -> Iterator[None]:
    """Inside, an error that says that another process is gone, or hangs longer than launch.timeout, is a PeerLost;
    other errors are what they are."""
    try:
        yield
    except RuntimeError as error:
        from torch import distributed as dist

        if peers is not None and (isinstance(error, dist.DistError) or re.search(LOST, str(error))):
            raise PeerLost(" ".join(str(error).split())[:200]) from error
        raise


def leave(peers: Peers | None, patience: float, well: bool = True) -> None:
    """After the last stage: the first one lets the others go, and waits for them: the board may live in it. well: False
    where it ends for another reason, and the others may be in the middle of their share."""
    if peers is None:
        return
    from torch import distributed as dist

    try:
        if peers.rank == 0:
            peers.tell({"end": well})
            if not well:
                peers.board.set("ended", "")
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and peers.board.add("home", 0) < peers.size - 1:
                time.sleep(0.02)
        else:
            peers.board.add("home", 1)
        if well:
            dist.destroy_process_group()
    except RuntimeError:  # all work is done: who is gone now is not missed
        return


def end_this_one(code: int) -> NoReturn:
    """The end of the process that a command was. One that met others leaves out the interpreter's own end, but for
    what is registered for it: gloo's threads may still hold the last tensor of a sum, need the interpreter to let it
    go, and would abort the process there, with the exit code lost."""
    if place_in_environment()[1] == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads any more
            stream.flush()
    os._exit(code)
