"""Start the process that feeds trackers, tell it of runs, and warn once of one that failed."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.trackers.run import TrackedRun

FINISH_SECONDS = 60.0  # how long the end of a stage waits for trackers to take the rest of its rows
LEAVE_SECONDS = 15.0  # the same where the stage was interrupted or has failed
CLOSE_SECONDS = 15.0  # how long the end of the command waits for the process
ROOT = Path(__file__).resolve().parents[2]
# Of the process that trains: the other one is alone, and computes nothing.
OWN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
OWN_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_")


class Relay:
    """The trackers of one command: after one failure, no stage tries that tracker again."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self.lost: set[str] = set()  # trackers that have failed
        self._process: subprocess.Popen | None = None
        self._answers: queue.Queue[dict[str, str] | None] = queue.Queue()  # None: the process has ended
        self._open: set[str] = set()  # trackers that have the current run
        self._done: set[str] = set()  # those of them that have all of it
        self._run_id = ""

    def begin(self, run: TrackedRun) -> None:
        """Have the rows of a run sent; what the journals hold already comes first."""
        names = tuple(name for name in run.names if name not in self.lost)
        if not names:
            return
        self._open, self._done, self._run_id = set(names), set(), run.run_id
        try:
            if self._process is None:
                self._start(run)
        except OSError as error:
            self._lose(names, str(error))
            return
        self._tell({"begin": run.as_json() | {"names": list(names)}})

    def heed(self, wait: float = 0.0) -> None:
        """Print a warning for each tracker that has failed since.

        Args:
            wait: Seconds to wait for an answer.
        """
        try:
            answer = self._answers.get(timeout=wait) if wait > 0 else self._answers.get_nowait()
        except queue.Empty:
            return
        if answer is None:
            self._lose(self._open - self._done, self._how_it_ended())
        elif answer["event"] == "lost":
            self._lose([answer["tracker"]], answer["reason"])
        elif answer["run"] == self._run_id:
            self._done.add(answer["tracker"])
        self.heed()

    def finish(self, seconds: float) -> bool:
        """Wait until all trackers have the whole run, or give them up.

        Args:
            seconds: How long to wait.

        Returns:
            Whether any tracker has the run.
        """
        if self._open:
            self._tell({"finish": self._run_id})
        deadline = time.monotonic() + seconds
        self.heed()
        while self._open - self._done and (left := deadline - time.monotonic()) > 0:
            self.heed(left)
        self._lose(self._open - self._done, f"no answer within {seconds:.0f} s")
        self._open = set()
        return bool(self._done)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        try:
            process.stdin.close()
            process.wait(CLOSE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()

    def _start(self, run: TrackedRun) -> None:
        """Start the process and a thread that collects its answers."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in OWN_VARIABLES and not name.startswith(OWN_PREFIXES)
        }
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        if "wandb" in run.names:
            environment["WANDB_MODE"] = run.wandb_mode
        trackio = run.options.get("trackio", {})
        if trackio.get("space_id") or "TRACKIO_SPACE_ID" in os.environ:
            environment["HF_HUB_OFFLINE"] = "0"  # a Space is on the Hub
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.trackers.process", str(os.getpid())],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the command
        )
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)  # a process that hangs must not hold up training
        self._process = process
        threading.Thread(target=self._collect, args=(process,), daemon=True, name="trackers").start()

    def _collect(self, process: subprocess.Popen) -> None:
        """Put the answers of the process into the queue, until it ends."""
        assert process.stdout is not None
        with process.stdout as output:
            for line in iter(output.readline, b""):
                self._answers.put(json.loads(line))
        self._answers.put(None)

    def _tell(self, message: dict) -> None:
        """Send the process a message."""
        if self._process is None or self._process.stdin is None:
            return
        unsent = json.dumps(message).encode() + b"\n"
        try:
            if self._process.stdin.write(unsent) == len(unsent):
                return
        except OSError:
            pass  # it has ended, as the queue says too
        self._lose(self._open - self._done, self._how_it_ended())

    def _how_it_ended(self) -> str:
        """Return why the process does nothing more."""
        try:
            code = None if self._process is None else self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "its process does not read on"
        return f"its process ended with signal {-code}" if code and code < 0 else f"its process ended with code {code}"

    def _lose(self, names: Iterable[str], reason: str) -> None:
        """Stop using trackers, and print a warning the first time."""
        new = sorted(set(names) - self.lost)
        self.lost |= set(new)
        self._open -= set(new)
        self._done -= set(new)
        if new:
            print(
                f"warning: {', '.join(new)} failed ({reason or 'no reason given'}); this command continues without it; "
                f"metrics.jsonl has every value",
                file=sys.stderr,
            )
