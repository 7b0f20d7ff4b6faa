"""Sampling by vLLM, in a process and an environment of its own (`vllm_server.py`): one for all training processes, led
by the first of them, with the policy's weights handed over as files before a rollout.

vLLM's numbers are not the trainer's: it computes log-probs of its samples again, and watches how far off vLLM was.
"""

import json
import os
import select
import shutil
import socket
import subprocess
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.errors import TrainingStopped, UserError
from pipeline.launch import parallel
from stages.models.adapters import plain
from stages.models.file_tensors import file_tensors, tied_head
from stages.rollouts.transformers import Sampled

SCRIPT = Path(__file__).with_name("vllm_server.py")
SECONDS_TO_END = 10.0
FILE_BYTES = 2 * 2**30  # of weights, about: what is in memory twice at a time
OURS = (  # of the training process alone: its place in a group, its threads, its libraries
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONHOME",
)  # fmt: skip


class EngineLost(TrainingStopped):
    """vLLM is gone, failed, or samples from another distribution (exit 3, if the run does not go on without it)."""


class Vllm:
    """vLLM and the line to it. Every training process has one of these, and all call its methods together; the process
    behind it belongs to the first of them, and ends with that, however it ends.

    running: between `start` and `close`. stale: whether the policy has changed since its weights were handed over; who
    changes it sets this.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        log: Path,
        *,
        python: str,
        devices: str | None,
        dtype: str,
        timeout: float,
        arguments: dict,
    ):
        """model: the folder that the policy was loaded from. folder: for weights, while they are handed over. log: for
        what vLLM says. devices: CUDA_VISIBLE_DEVICES for it; None: as here. timeout: seconds without an answer after
        which it is lost. arguments: of vllm.LLM."""
        self.model, self.folder, self.log, self.python, self.devices = model, folder, log, python, devices
        self.dtype, self.timeout, self.arguments = getattr(torch, dtype), timeout, {"dtype": dtype} | arguments
        self.running, self.stale, self.unties = False, True, False
        self.process = self.connection = self.end = None

    def start(self, model, poll: Callable[[], None] = lambda: None) -> None:
        """With this model's weights. Raises EngineLost with vLLM's own message if it does not start; UserError if there
        is no room for its files, or the model's files name weights otherwise than its modules. poll() is called
        meanwhile, as in `sample`: what it raises ends the wait."""

        def launched() -> None:
            try:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                self.process, self.connection = launch(self.python, self.log, self.devices)
            except OSError as problem:
                raise UserError(f"launch.vllm: {problem}; see its folder and python") from problem
            self.end = weakref.finalize(self, end, self.process, self.connection, self.folder)

        names = {name for name, _ in file_tensors(model)} - {tied_head(model)}
        parallel.from_rank_zero(lambda: refuse_other_names(names, self.model, plain(model).config.model_type))
        parallel.from_rank_zero(launched)
        self.running = True
        # vLLM 0.32 takes a head that is the embedding over once, and then leaves it as it was
        self.unties = tied_head(model) is not None and plain(model).get_input_embeddings().weight.requires_grad
        arguments = dict(self.arguments)
        if self.unties:  # beside what the user overrides
            arguments["hf_overrides"] = (arguments.get("hf_overrides") or {}) | {"tie_word_embeddings": False}
        self._hand_over(model, lambda folder: {"start": {"model": folder} | arguments}, poll)

    def follow(self, model) -> None:
        """Hands the model's weights over, if they have changed: adapters folded in; sharded ones are gathered layer by
        layer."""
        if self.stale:
            self._hand_over(model, lambda folder: {"weights": folder})

    def _hand_over(self, model, message: Callable[[str], dict], poll: Callable[[], None] = lambda: None) -> None:
        """As a model's folder that is gone when the message that names it has been answered."""
        folder = self.folder / "model"
        problem = write_model(model, folder, self.dtype, self.model, None if self.unties else tied_head(model))
        # others wait for the writing here, and for vLLM below: as long as they have to for each
        if problem := parallel.from_rank_zero(lambda: problem):
            raise EngineLost(f"vLLM cannot be handed the weights: {problem}")
        self._ask(message(str(folder)), poll)
        if parallel.is_rank_zero():
            shutil.rmtree(folder, ignore_errors=True)  # half a model or more, in memory maybe
        self.stale = False

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        response_length: int,
        temperature: float,
        eos_id: int,
        poll: Callable[[], None],
        device: torch.device,
    ) -> Sampled:
        """One response a prompt, on all processes; entropies are 0, vLLM does not tell them."""
        settings = {"max_tokens": response_length, "temperature": temperature, "eos_id": eos_id}
        asked = {"prompts": [list(p) for p in prompts], "seeds": list(seeds), **settings}
        responses, logprobs = self._ask({"generate": asked}, poll)
        lengths = [len(r) for r in responses]
        if len(lengths) != len(prompts) or lengths != [len(row) for row in logprobs]:
            raise EngineLost("vLLM answered with another number of responses, or of log-probs")
        if not 1 <= min(lengths) <= max(lengths) <= response_length:
            raise EngineLost("vLLM answered with a response of no token, or of too many")
        rows = torch.stack([F.pad(torch.tensor(row), (0, max(lengths) - len(row))) for row in logprobs]).to(device)
        return Sampled(responses, rows, torch.zeros_like(rows))

    def close(self) -> None:
        """Ends the process behind it, and removes its files, but for the log."""
        self.running = False
        if self.end is not None:
            self.end()

    def _ask(self, message: dict, poll: Callable[[], None] = lambda: None):
        """vLLM's answer to the first process, on all of them; an EngineLost on all of them if there is none."""

        def answer():
            try:
                return exchange(self.connection, message, self.timeout, poll)
            except EngineLost as lost:
                return lost
            except ConnectionError:
                poll()  # a signal that ended it may have been meant for all
                return EngineLost(f"vLLM {how_it_ended(self.process, self.log)}")

        found = parallel.from_rank_zero(answer)
        if isinstance(found, EngineLost):
            raise found
        return found


def launch(python: str, log: Path, devices: str | None) -> tuple[subprocess.Popen, socket.socket]:
    """(vLLM's process, our end of the line to it)."""
    environment = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith("TORCHELASTIC_")}
    environment |= {
        "PYTHONSAFEPATH": "1",  # or the files beside the script would be taken for libraries
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine in this process, which ends with us
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs, open(log, "wb") as output:
        process = subprocess.Popen(
            [python, str(SCRIPT), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for the trainer
        )
    return process, ours


def end(process: subprocess.Popen, connection: socket.socket, folder: Path) -> None:
    """vllm_server.py ends with its line; one that does not is killed."""
    connection.close()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def exchange(connection: socket.socket, message: dict, timeout: float, poll: Callable[[], None]):
    """Sends a message and waits for its answer; poll() is called meanwhile, and what it raises ends the wait. An
    EngineLost for an error, or where there is no answer in time; a ConnectionError where nobody is there."""
    unsent, received = memoryview(json.dumps(message).encode() + b"\n"), bytearray()
    deadline = time.monotonic() + timeout
    while not received.endswith(b"\n"):
        poll()
        if time.monotonic() > deadline:
            raise EngineLost(f"vLLM has not answered for {timeout:g} seconds (nine tenths of launch.timeout)")
        readable, writable, _ = select.select([connection], [connection] if unsent else [], [], 0.2)
        if writable:
            unsent = unsent[connection.send(unsent) :]
        if readable:
            part = connection.recv(2**20)
            if not part:
                raise ConnectionError
            received += part
    reply = json.loads(received)
    if "error" in reply:
        raise EngineLost(f"vLLM says {' '.join(reply['error'].split())[:400]}")
    return reply["ok"]


def how_it_ended(process: subprocess.Popen, log: Path) -> str:
    """For an error line: exit code or signal, and its last words."""
    try:
        code = process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        return f"is gone, though its process is not; see {log}"
    lines = [line.strip() for line in log.read_text(errors="replace").split("\n")] if log.exists() else []
    said = next((line[:300] for line in reversed(lines) if line), "nothing")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"is gone, by {how}; its last words: {said} (more in {log})"


def refuse_other_names(names: set[str], model: Path, kind: str) -> None:
    """A UserError if `names` of weights are not those in the files of the folder `model`."""
    known: set[str] = set()
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            known |= set(opened.keys())
    if other := sorted(names ^ known):
        raise UserError(
            f"ppo.rollout.engine: vllm cannot follow a {kind} model, whose files name weights otherwise than its "
            f"modules ({other[0]}); use transformers"
        )


def write_model(model, folder: Path, dtype: torch.dtype, like: Path, without: str | None = None) -> str | None:
    """folder/: the model's weights (but `without`) in `dtype`, beside the other files of the folder `like`; → why not,
    if they cannot be written. All processes call it and gather; the first one writes."""
    part: dict[str, torch.Tensor] = {}

    def begin() -> str | None:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for file in like.iterdir():
                if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
                    shutil.copy(file, folder)
        except OSError as error:
            return str(error)

    def write() -> str | None:
        try:
            save_file(part, folder / f"{next(iter(part))}.safetensors", metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:  # no room
            return str(error)
        finally:
            part.clear()

    problem = begin() if parallel.is_rank_zero() else "another process writes"
    for name, x in file_tensors(model):
        if problem is not None or name == without:
            continue
        part[name] = x.to("cpu", dtype if x.is_floating_point() else x.dtype, copy=True).contiguous()
        if sum(held.nbytes for held in part.values()) >= FILE_BYTES:
            problem = write()
    return write() if part else problem
