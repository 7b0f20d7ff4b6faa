"""Several processes that work on one stage: starting them on this machine, and how the first one leads the others.

`rlhf run` starts `launch.processes` copies of itself, with the environment that torchrun gives; by hand, `torchrun
--nproc-per-node 2 -m pipeline.cli run …` does the same, on several machines too. The first process plans, locks, saves
and publishes as if it were alone; the others wait until it names a stage, do their share of it, and write nothing. All
hold the same state, so the first one's checkpoint is everybody's and it alone hears a signal: whenever it ends, the
others end.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from pipeline.errors import PeerLost, UserError
from pipeline.stage import StopFlag

PIPE = "RLHF_LAUNCHER"  # the number of a pipe's end that closes when the launcher is gone
GRACE = 5.0  # seconds in which a process notices by itself that another one is gone


def rank_and_size() -> tuple[int, int]:
    """Which of how many processes this one is: (0, 1) for one alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wanted(tree: dict[str, Any]) -> int:
    """How many processes to start for a config (as read, not validated): 1 = this one works itself."""
    launch = tree.get("launch")
    count = launch.get("processes") if isinstance(launch, dict) else None
    return count if isinstance(count, int) and count > 1 and "WORLD_SIZE" not in os.environ else 1


# -- starting them
# ------------------------------------------------------------------------------------------------


def start(argv: list[str], count: int) -> int:
    """Runs the command `rlhf ARGV` in `count` processes on this machine; → the first one's exit code. A signal is
    handed to the first one alone. What another one said is shown where it was the cause of the end."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reading, writing = os.pipe()
    common = os.environ | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), PIPE: str(reading)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children, said = [], [tempfile.TemporaryFile() for _ in range(count - 1)]
    try:
        for rank in range(count):
            output = {} if rank == 0 else {"stdout": said[rank - 1], "stderr": said[rank - 1]}
            options = {"env": common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, "pass_fds": [reading], **output}
            # in a session of its own: Ctrl-C reaches the first one once, by way of this process
            command = [sys.executable, "-m", "pipeline.cli", *argv]
            children.append(subprocess.Popen(command, start_new_session=True, **options))
        while children[0].poll() is None and lost(children) is None:
            while received:
                children[0].send_signal(received.pop(0))
            time.sleep(0.05)
        return outcome(children, said)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for file in said:
            file.close()
        os.close(reading)
        os.close(writing)


def lost(children: list[subprocess.Popen]) -> int | None:
    """The first of the others that has ended, and not well."""
    return next((rank for rank, child in enumerate(children) if rank and child.poll() not in (None, 0)), None)


def outcome(children: list[subprocess.Popen], said: list[Any]) -> int:
    """After a process ended: the exit code of all. The first one gets time to see it and to end by itself."""
    try:
        code = children[0].wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        code = None
    if code in (0, 2, 3, 75):
        return code
    rank = lost(children) or 0
    found = children[rank].poll()
    why = f"was ended by {signal.Signals(-found).name}" if found < 0 else f"ended with {found}"
    print(f"error: process {rank} of {len(children)} {why}; run again to go on", file=sys.stderr)
    if rank:
        said[rank - 1].seek(0)
        for line in said[rank - 1].read().decode(errors="replace").splitlines()[-20:]:
            print(f"  process {rank}: {line}", file=sys.stderr)
    return 1


def watch_launcher(stop: StopFlag) -> None:
    """Ends this process with the one that started it: the first one saves before, the others end at once."""
    if PIPE not in os.environ:
        return
    end = int(os.environ[PIPE])

    def wait() -> None:
        os.read(end, 1)  # nothing is ever written: this returns when the other end closes
        if rank_and_size()[0] == 0:
            stop.requested = True
        else:
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# -- the first one leads
# ------------------------------------------------------------------------------------------


@dataclass
class Peers:
    """The processes of this run. `tell` is the first one's, `hear` the others'."""

    rank: int
    size: int
    board: Any  # torch's key-value store that all of them reach
    patience: float  # seconds
    number: int = field(default=0)

    def tell(self, message: dict[str, Any] | None) -> None:
        """What the others do next; None: go home."""
        self.board.set(f"message/{self.number}", json.dumps(message))
        self.number += 1

    def hear(self) -> dict[str, Any] | None:
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


def join(patience: float) -> Peers | None:
    """Meets the other processes; None for a process that works alone. UserError where they do not come in time."""
    rank, size = rank_and_size()
    if size == 1:
        return None
    import torch
    from torch import distributed as dist

    device = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    limit = timedelta(seconds=patience)
    try:
        board, rank, size = next(dist.rendezvous("env://", rank, size, timeout=limit))
        dist.init_process_group(
            device, store=dist.PrefixStore("group", board), rank=rank, world_size=size, timeout=limit
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"launch: the {size} processes did not meet ({first}); look at what the others say") from error
    return Peers(rank, size, dist.PrefixStore("board", board), patience)


def leave(peers: Peers | None) -> None:
    """After the last stage: the first one lets the others go."""
    if peers is None:
        return
    from torch import distributed as dist

    if peers.rank == 0:
        peers.tell(None)
        # the board lives in this process (torchrun's does not): it stands until all have read
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and peers.board.add("home", 0) < peers.size - 1:
            time.sleep(0.02)
    else:
        peers.board.add("home", 1)
    dist.destroy_process_group()
