"""Run `rlhf` in a child process and inject a fault: at a system call, at a moment, or in a load.

The child is forked from a server that has imported the libraries. It waits until strace (6 or
later) is attached, so that a try takes only the time of the run itself.
"""

import gc
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.launch.environment import set_environment

LIBRARIES = ["torch", "datasets", "accelerate", "peft", "transformers.trainer",
             "transformers.models.llama.modeling_llama", "trl.trainer.sft_trainer"]  # fmt: skip
# calls that change the disk; with ? where not every machine has the call
CALLS = ("write", "pwrite64", "writev", "fsync", "fdatasync", "?rename", "?renameat", "renameat2", "?unlink",
         "unlinkat", "?rmdir", "?mkdir", "mkdirat", "ftruncate", "?link", "linkat", "?sendfile",
         "?copy_file_range")  # fmt: skip
LINE = re.compile(r"(?P<pid>\d+) +(?P<name>\w+)\((?P<rest>.*)")
PATH = re.compile(r'"(/[^"]*)"|(?<!AT_FDCWD)<(/[^>]*)>')
PATIENCE = 300.0  # seconds


@dataclass(frozen=True)
class Fault:
    """What happens to a run.

    at: (name, n): at the main thread's n-th call of that name it is killed, or the call fails with
    `error`, such as "ENOSPC". die, term: (stage, step): after that row of metrics.jsonl it is
    killed, or gets SIGTERM. trace: record its system calls. forget: an item of the checkpoint to
    leave out of the load (see `forget`). file_size: the largest file in bytes that it may write.
    user: the number of another user to run as. exhaust: the step after whose row torch asks for
    more memory than there is. place: the environment variables of one of several processes.
    """

    at: tuple[str, int] | None = None
    error: str = ""
    die: tuple[str, int] | None = None
    term: tuple[str, int] | None = None
    trace: bool = False
    forget: str = ""
    file_size: int | None = None
    exhaust: int | None = None
    user: int | None = None
    place: dict[str, str] | None = None


@dataclass(frozen=True)
class Call:
    """One system call: its name, its number among those of that name in its thread, its paths."""

    name: str
    number: int
    paths: tuple[str, ...]
    failed: bool


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (−9 for SIGKILL), output, seconds since strace was attached."""

    code: int
    output: str
    seconds: float
    calls: tuple[Call, ...] = ()


def preload() -> None:
    """Make the server import the libraries once, in the environment of a run.

    Some of them read the environment when they are imported. Without it the server has a second
    thread (jemalloc's, in Arrow) when it forks, and its children share Arrow's allocator with it.
    """
    set_environment({})
    multiprocessing.get_context("forkserver").set_forkserver_preload(LIBRARIES)


class Running:
    """A run in progress; its output and trace are in `folder`."""

    def __init__(self, argv: list[str], folder: Path, fault: Fault | None = None):
        fault = fault or Fault()
        self.output, self.trace, gate = folder / "output.txt", folder / "trace.txt", folder / "go"
        for leftover in (self.output, self.trace, gate):
            leftover.unlink(missing_ok=True)
        self.child = multiprocessing.get_context("forkserver").Process(target=_main, args=(argv, str(folder), fault))
        self.child.start()
        multiprocessing.process._children.discard(self.child)  # a start in another thread would reap this child
        self.tracer = self._attach(fault) if fault.trace or fault.at else None
        gate.touch()
        self.began = time.monotonic()

    def _attach(self, fault: Fault) -> subprocess.Popen:
        if shutil.which("strace") is None:
            raise RuntimeError("strace is not installed, and system calls cannot be interrupted without it")
        names = ",".join(CALLS)
        command = ["strace", "-f", "-y", "-s", "0", "-p", str(self.child.pid), "-o", str(self.trace)]
        command += ["-e", f"trace={names}", "-e", "signal=none"]
        if fault.at:
            what = f"error={fault.error}" if fault.error else "signal=KILL"
            command += ["-e", f"inject={fault.at[0]}:{what}:when={fault.at[1]}"]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        output = tracer.stderr.readline()
        if "attached" not in output:
            self.child.kill()
            raise RuntimeError(f"strace cannot hold a process here: {output.strip()}")
        return tracer

    def signal(self, number: int) -> None:
        if self.child.is_alive():
            os.kill(self.child.pid, number)

    def wait(self, timeout: float = PATIENCE) -> Ended:
        self.child.join(timeout)
        if self.child.exitcode is None:
            self.child.kill()
            self.child.join()
            raise TimeoutError(f"it did not end within {timeout:.0f} s")
        seconds = time.monotonic() - self.began
        if self.tracer is not None:
            self.tracer.communicate(timeout=30)
        output = self.output.read_text(errors="replace") if self.output.exists() else ""
        calls = read_calls(self.trace, self.child.pid) if self.trace.exists() else ()
        return Ended(self.child.exitcode, output, seconds, calls)


def run(argv: list[str], folder: Path, fault: Fault | None = None) -> Ended:
    return Running(argv, folder, fault).wait()


def two_together(argv: list[str], folder: Path) -> list[Running]:
    """Start two processes of one run."""
    from pipeline.launch.launcher import process_environments

    folders = [folder / f"process-{i}" for i in range(2)]
    for one in folders:
        one.mkdir(exist_ok=True)
    return [Running(argv, one, Fault(place=place)) for one, place in zip(folders, process_environments(2), strict=True)]


def killed_after(argv: list[str], folder: Path, seconds: float, number: int = signal.SIGKILL) -> Ended:
    """Kill a run some seconds after its start, unless it has ended before."""
    running = Running(argv, folder)
    running.child.join(seconds)
    running.signal(number)
    return running.wait()


def read_calls(trace: Path, pid: int) -> tuple[Call, ...]:
    """Return the system calls of one thread, in order."""
    found, numbers = [], {}
    for line in trace.read_text(errors="replace").splitlines():
        match = LINE.match(line)
        if match is None or int(match["pid"]) != pid:
            continue
        name, rest = match["name"], match["rest"]
        numbers[name] = numbers.get(name, 0) + 1
        paths = tuple(a or b for a, b in PATH.findall(rest.rpartition(" = ")[0] or rest))
        found.append(Call(name, numbers[name], paths, " = -1 " in rest))
    return tuple(found)


def _main(argv: list[str], folder: str, fault: Fault) -> None:
    gc.freeze()  # otherwise each full collection walks through all objects of the libraries
    out = os.open(os.path.join(folder, "output.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(out, 1), os.dup2(out, 2)
    while not os.path.exists(os.path.join(folder, "go")):
        time.sleep(0.002)
    if fault.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_size, fault.file_size))
    if fault.place is not None:
        os.environ.update(fault.place)
    if fault.user is not None:
        os.setgroups([]), os.setgid(fault.user), os.setuid(fault.user)
    from pipeline import cli

    if fault.forget:
        forget(fault.forget)
    if fault.die or fault.term:
        from resume_worker import arm

        arm(fault.die, fault.term)
    if fault.exhaust is not None:
        exhaust(fault.exhaust)
    code = cli.main(argv)
    sys.stdout.flush()
    os._exit(code)


def exhaust(step: int) -> None:
    """Make torch's allocator fail after a step."""
    import torch

    from pipeline.tracking import Tracker

    log = Tracker.log

    def log_and_ask(self, at, metrics, *times):
        log(self, at, metrics, *times)
        if at == step:
            torch.empty(2**60, dtype=torch.uint8)

    Tracker.log = log_and_ask


def forget(item: str) -> None:
    """Leave an item out of every checkpoint that is loaded.

    "state.KEY" is a key of the JSON; "tensors.NAME" a group of tensors, which become zeros;
    "trainer.NAME" what the transformers Trainer loads from that file, which stays as at the start;
    "journals" keeps the rows after the checkpoint.
    """
    kind, _, name = item.partition(".")
    if kind == "state":
        from pipeline.store.checkpoints import CheckpointStore

        newest = CheckpointStore.newest

        def forgetful(self):
            found = newest(self)
            if found is not None:
                found.state.pop(name, None)
            return found

        CheckpointStore.newest = forgetful
    elif kind == "tensors":
        from pipeline.store.checkpoints import Checkpoint

        stored = Checkpoint.stored

        def zeros(self, group):
            found = stored(self, group)
            for one in found.values() if group == name else ():
                object.__setattr__(one, "read", lambda runs=None, read=one.read: read(runs) * 0)
            return found

        Checkpoint.stored = zeros  # `tensors` reads through it
    elif kind == "trainer":
        from transformers import Trainer, TrainerState

        if name == "trainer_state":
            TrainerState.load_from_json = classmethod(lambda cls, path: cls())
        else:
            setattr(Trainer, {"optimizer": "_load_optimizer_and_scheduler", "model": "_load_from_checkpoint",
                              "rng_state": "_load_rng_state"}[name], lambda *_, **__: None)  # fmt: skip
    else:
        from pipeline.tracking import Tracker

        assert item == "journals", item
        Tracker.rewind = lambda *_, **__: None


def instants(count: int, least: float, most: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [draw.uniform(least, most) for _ in range(count)]
