"""Let the processes of a run meet, follow rank 0 and end together.

Rank 0 plans, locks, logs, saves and publishes as if it were the only process. The other ranks wait
until it names a stage, and compute their share of it. All ranks hold the same state, so that rank
0's checkpoint serves all of them, and only rank 0 acts on signals. When it ends, for whatever
reason, the others end.

`rlhf run` starts the processes itself (`launcher.py`). `torchrun --nproc-per-node 2 -m pipeline.cli
run …` does the same by hand, also on several machines.
"""

import atexit
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from pipeline.errors import PeerLost, UserError

GRACE = 5.0  # seconds in which a process may notice by itself that another one is gone
EXIT_PEER_LOST = 4  # the exit code of a rank other than 0 that has lost a peer; users never see it
PEER_LOST_MESSAGES = r"gloo|NCCL|Connection (closed|reset|refused)|[Tt]imed out"  # in the backends' errors


def rank_and_size_from_environment() -> tuple[int, int]:
    """Return this process's rank and the world size before the processes have met."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), size) if size > 1 else (0, 1)


# -- meeting ---------------------------------------------------------------------------------------


@dataclass
class Peers:
    """The processes of a run, and a channel from rank 0 to the others."""

    rank: int
    """This process's rank."""
    size: int
    """The number of processes."""
    store: Any
    """torch's key-value store, which every process can reach. Rank 0 may host it."""
    messages: int = 0
    """How many messages this process has sent or received."""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message from rank 0 to every other rank.

        Args:
            message: what they do next. {"stage": name, "at": step or None, "made_of": recorded
                inputs and config} asks for their share of a stage; {"end": whether all went well}
                is the last one.
        """
        self.store.set(f"message/{self.messages}", json.dumps(message))
        self.messages += 1

    def receive(self) -> dict[str, Any]:
        """Wait for the next message of rank 0, however long it works without the others.

        Raises:
            PeerLost: rank 0 is gone.
        """
        key = f"message/{self.messages}"
        try:
            # Polling, because a blocking `get` would end after the store's timeout, and a stage
            # that rank 0 runs without the others may take hours.
            while not self.store.check([key]):
                time.sleep(0.05)
            message = json.loads(self.store.get(key))
        except (RuntimeError, ConnectionError) as error:  # the store went with rank 0
            raise PeerLost("rank 0 is gone") from error
        self.messages += 1
        return message


def join(processes: int, timeout: float) -> Peers | None:
    """Meet the other processes and initialize torch.distributed.

    Args:
        processes: how many the config asks for, over all nodes.
        timeout: seconds to wait for the others, and for each collective operation later on.

    Returns:
        The peers, or None if this is the only process.

    Raises:
        UserError: the environment variables do not match the config or the machine.
        PeerLost: the others did not come in time.
    """
    rank, size = rank_and_size_from_environment()
    if size == 1:
        return None
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"launch: WORLD_SIZE is {size} and {', '.join(missing)} not set; let torchrun set them all")
    if processes not in (1, size):
        raise UserError(f"launch: {processes} processes in the config, {size} in WORLD_SIZE; leave one of them out")
    import torch
    from torch import distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        processes_here, visible = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes_here > visible:
            what = f"{processes_here} processes on a machine with {visible} GPU(s)"
            raise UserError(f"launch.processes: {what}; use at most one per GPU")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"  # Python objects are gathered on the CPU, gradients on the GPU
    limit = timedelta(seconds=timeout)
    # torchrun may restart the processes beside the same store: keys of the first attempt must not
    # be read again
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=limit))
        dist.init_process_group(
            backend, store=dist.PrefixStore(f"group/{attempt}", store), rank=rank, world_size=size, timeout=limit
        )
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise PeerLost(f"the {size} processes did not meet: {first_line}") from error
    prefix = f"peers/{attempt}"
    if rank > 0:
        exit_after_rank_zero(prefix, size, limit)
    return Peers(rank, size, dist.PrefixStore(prefix, store))


def exit_after_rank_zero(prefix: str, size: int, limit: timedelta) -> None:
    """Start a thread that ends this process some seconds after rank 0 has ended.

    It catches what exceptions cannot: a collective inside NCCL waits for ever for a rank that is
    gone.

    Args:
        prefix: of the keys in `Peers.store`.
        size: the number of processes.
        limit: the timeout of the store.
    """
    from torch import distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # a connection of its own: the main thread's may be blocked in a call
    connection = dist.TCPStore(address, port, size, False, limit, wait_for_workers=False)
    store = dist.PrefixStore(prefix, connection)

    def watch() -> None:
        try:
            while not store.check(["ended"]):
                time.sleep(1.0)
        except RuntimeError:  # the store went with rank 0
            pass
        time.sleep(GRACE)
        os._exit(EXIT_PEER_LOST)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def detect_lost_peers(peers: Peers | None) -> Iterator[None]:
    """Turn the backends' errors about a process that is gone, or hangs, into PeerLost.

    Args:
        peers: the other processes; None if there are none, and no error is changed.

    Raises:
        PeerLost: a peer is gone or did not answer within `launch.timeout`.
    """
    try:
        yield
    except RuntimeError as error:
        from torch import distributed as dist

        # not every backend has an error class of its own, so that some are only known by their text
        if peers is not None and (isinstance(error, dist.DistError) or re.search(PEER_LOST_MESSAGES, str(error))):
            raise PeerLost(" ".join(str(error).split())[:200]) from error
        raise


# -- ending ----------------------------------------------------------------------------------------


def disconnect(peers: Peers | None, timeout: float, succeeded: bool = True) -> None:
    """End the cooperation after the last stage: rank 0 lets the others go and waits for them.

    Args:
        peers: the other processes, if any.
        timeout: seconds that rank 0 waits.
        succeeded: False if rank 0 ends early, and the others may be in the middle of their share.
    """
    if peers is None:
        return
    from torch import distributed as dist

    try:
        if peers.rank == 0:
            peers.send({"end": succeeded})
            if not succeeded:
                peers.store.set("ended", "")  # for `exit_after_rank_zero`
            # The store may live in this process: if it ended first, the others could not read the
            # message.
            deadline = time.monotonic() + timeout
            while time.monotonic() < deadline and peers.store.add("left", 0) < peers.size - 1:
                time.sleep(0.02)
        else:
            peers.store.add("left", 1)
        if succeeded:
            dist.destroy_process_group()
    except RuntimeError:  # a peer is gone, but all work is done
        return


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code.

    One of several processes skips the interpreter's shutdown, except for what is registered with
    atexit. gloo's threads may still hold the last tensor of a sum; to release it they need the
    interpreter, and would abort the process during its shutdown, with another exit code.
    """
    if rank_and_size_from_environment()[1] == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader of a pipe may be gone
            stream.flush()
    os._exit(code)
