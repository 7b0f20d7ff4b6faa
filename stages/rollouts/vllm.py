"""Sample with vLLM, which runs in a process and a Python environment of its own (`vllm_server.py`).

One vLLM serves all ranks. Rank 0 talks to it, and hands the policy's weights over: as files, in
shared memory, or of a policy with an adapter only that (`handover.py`). vLLM's log-probabilities
differ a little from the trainer's, so PPO computes those of its samples again and watches the KL
between both.
"""

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data.streams import derive_seed
from pipeline.errors import UserError
from pipeline.launch import devices, parallel
from stages.models.adapter_folder import is_adapter_folder, method_in
from stages.models.adapters import is_adapted, unwrapped
from stages.models.file_tensors import file_tensors, tied_head
from stages.models.soft_prompts import unanswered_ids_of
from stages.rollouts.engine import EngineLost, EngineSpec, Sampled, SampleRequest
from stages.rollouts.handover import batches, handle_of, lora_arguments, shareable, write_adapter
from stages.settings.rollout import no_vllm

SCRIPT = Path(__file__).with_name("vllm_server.py")
SECONDS_TO_END = 10.0
FILE_BYTES = 2 * 2**30  # about the size of a file of weights, of which memory holds two copies at a time
OWN_VARIABLES = (  # of the training process, which vLLM must not inherit: ranks, threads, libraries
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONHOME",
)  # fmt: skip


@dataclass(frozen=True)
class VllmOptions:
    """Where and how vLLM runs."""

    model: Path
    """Folder of the model that the policy was loaded from: its configuration and tokenizer."""
    folder: Path
    """Folder for weights while they are handed over."""
    log: Path
    """File for vLLM's output."""
    python: str
    """Python of the environment that vLLM is installed in."""
    devices: str | None
    """CUDA_VISIBLE_DEVICES for vLLM; None: the same as here."""
    dtype: str
    """"float32", "bfloat16" or "float16": the dtype of its weights."""
    timeout: float
    """Seconds without an answer after which vLLM counts as lost."""
    arguments: dict[str, Any]
    """Further arguments of vllm.LLM."""
    through_memory: bool = False
    """Whether weights that have changed are handed over in shared memory, not in files."""
    adapter_alone: bool = False
    """Whether of a policy with an adapter only that is handed over."""
    sleeps: bool = False
    """Whether vLLM frees its GPU memory between rollouts."""
    other_models: bool = False
    """Whether weights of other models than the first one will follow."""


def make_vllm(spec: EngineSpec) -> "Vllm":
    """Return vLLM as the settings launch.vllm describe it, not started yet."""
    launch = spec.launch
    folder = spec.scratch
    if launch["folder"] is not None:
        # the named folder may serve several runs at once; each has its own folder in it
        folder = Path(launch["folder"]).expanduser() / f"rlhf-{derive_seed(spec.scratch.resolve())}"
    arguments = {
        "seed": 0,  # each sample has a seed of its own
        "max_model_len": spec.max_length,
        "max_num_seqs": spec.batch_size,
        "tensor_parallel_size": launch["tensor_parallel_size"],
        "gpu_memory_utilization": launch["gpu_memory_utilization"],
        "trust_remote_code": spec.trust_remote_code,
    }
    options = VllmOptions(
        model=spec.model,
        folder=folder,
        log=spec.log,
        python=sys.executable if launch["python"] is None else os.path.expanduser(launch["python"]),
        devices=launch["devices"],
        dtype=spec.dtype,
        timeout=spec.timeout,
        arguments=arguments | launch["options"],
        through_memory=launch["hand_over"] == "memory",
        adapter_alone=launch["adapter_alone"],
        sleeps=launch["sleep"],
        other_models=spec.other_models,
    )
    return Vllm(options)


class Vllm:
    """vLLM and the connection to it.

    Every rank has one of these, and all ranks call its methods together. The process belongs to
    rank 0, and ends with rank 0, however that ends."""

    is_policy = False

    def __init__(self, options: VllmOptions):
        self.options = options
        self.dtype: torch.dtype = getattr(torch, options.dtype)
        self.timeout = options.timeout
        self.unties_head = False
        self.adapters = 0  # how many were handed over alone
        self.process: subprocess.Popen | None = None
        self.connection: socket.socket | None = None
        self.finalizer: weakref.finalize | None = None

    def start(self, model: nn.Module, poll: Callable[[], None] = lambda: None) -> None:
        """Start vLLM with the weights of `model`.

        Args:
            model: The policy.
            poll: Is called while waiting; what it raises ends the wait.

        Raises:
            EngineLost: With vLLM's own message, if it does not start.
            UserError: If its files cannot be written, or if the files of the model name weights
                differently from its modules.
        """
        options = self.options
        refuse_in_place(method_in(unwrapped(model)))
        lora = lora_arguments(model) if self._hands_over_adapter(model) else None  # it may refuse
        names = {name for name, _ in file_tensors(model)} - {tied_head(model)}
        model_type = unwrapped(model).config.model_type
        parallel.from_rank_zero(lambda: refuse_other_names(names, options.model, model_type))
        parallel.from_rank_zero(self._launch)
        try:
            if lora is None:
                self._start_with_weights(model, poll)
            else:
                # vLLM reads the base model, which does not change, from the folder it came from
                self._ask({"start": {"model": str(options.model)} | self._arguments() | lora}, poll)
                self._hand_over_adapter(model)
        except EngineLost as lost:
            raise EngineLost(f"{lost}, with {options.python}") from lost

    def start_from_folder(self, poll: Callable[[], None] = lambda: None) -> None:
        """Start vLLM with the weights in the model's folder, which this process need not load.

        Args:
            poll: Is called while waiting; what it raises ends the wait.

        Raises:
            EngineLost: With vLLM's own message, if it does not start.
            UserError: If its files cannot be written.
        """
        options = self.options
        refuse_in_place("the folder" if is_adapter_folder(options.model) else None)
        parallel.from_rank_zero(self._launch)
        try:
            self._ask({"start": {"model": str(options.model)} | self._arguments()}, poll)
        except EngineLost as lost:
            raise EngineLost(f"{lost}, with {options.python}") from lost

    def update_weights(self, model: nn.Module) -> None:
        """Hand the weights of `model` over: adapters merged or alone, shards gathered by layer."""
        if self.options.sleeps:
            devices.empty_cache(devices.in_use())  # vLLM wakes up for the weights, and needs its memory again
        if self._hands_over_adapter(model):
            self._hand_over_adapter(model)
        elif self.options.through_memory:
            self._share(model)
        else:
            self._hand_over(model, lambda folder: {"weights": folder}, lambda: None)

    def sample(self, request: SampleRequest, poll: Callable[[], None] = lambda: None) -> Sampled:
        """Return one response to each prompt, on all ranks; vLLM gives no entropies (0)."""
        message = {
            "prompts": [list(prompt) for prompt in request.prompts],
            "seeds": list(request.seeds),
            "max_tokens": request.response_length,
            "temperature": request.temperature,
            "eos_id": request.eos_id,
            "top_k": request.top_k,
            "top_p": request.top_p,
        }
        if excluded := unanswered_ids_of(self.options.model):
            message["excluded"] = excluded
        if self.options.sleeps:
            devices.empty_cache(devices.in_use())
        responses, logprobs = self._ask({"generate": message}, poll)
        if self.options.sleeps:
            self._ask({"sleep": None}, poll)
        lengths = [len(r) for r in responses]
        if len(lengths) != len(request.prompts) or lengths != [len(row) for row in logprobs]:
            raise EngineLost("vLLM returned a wrong number of responses or log-probabilities")
        if not 1 <= min(lengths) <= max(lengths) <= request.response_length:
            raise EngineLost("vLLM returned a response without tokens, or one that is too long")
        width = max(lengths)
        padded = torch.stack([F.pad(torch.tensor(row), (0, width - len(row))) for row in logprobs])
        return Sampled(responses, padded, torch.zeros_like(padded))

    def close(self) -> None:
        """End the process, and remove its files except the log."""
        if self.finalizer is not None:
            self.finalizer()

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of vllm.LLM, except the model."""
        sleep = {"enable_sleep_mode": True} if self.options.sleeps else {}
        return {"dtype": self.options.dtype} | self.options.arguments | sleep

    def _start_with_weights(self, model: nn.Module, poll: Callable[[], None]) -> None:
        """Start vLLM on a folder with the weights of `model`."""
        # vLLM 0.32 copies a head that is the embedding once, and does not update it with the
        # embedding
        embedding = unwrapped(model).get_input_embeddings().weight
        self.unties_head = tied_head(model) is not None and (embedding.requires_grad or self.options.other_models)
        arguments = self._arguments()
        if self.unties_head:
            overrides = dict(arguments.get("hf_overrides") or {})  # the user's own
            arguments["hf_overrides"] = overrides | {"tie_word_embeddings": False}
        self._hand_over(model, lambda folder: {"start": {"model": folder} | arguments}, poll)

    def _launch(self) -> None:
        """Start the process. Only rank 0 calls this."""
        options = self.options
        try:
            shutil.rmtree(options.folder, ignore_errors=True)
            options.folder.mkdir(parents=True)
            self.process, self.connection = launch(options.python, options.log, options.devices)
        except OSError as problem:
            raise UserError(f"launch.vllm: {problem}; check its folder and python") from problem
        # also at the end of this process, or when this object is no longer used
        self.finalizer = weakref.finalize(self, end, self.process, self.connection, options.folder)

    def _hand_over(self, model: nn.Module, message: Callable[[str], dict], poll: Callable[[], None]) -> None:
        """Write the weights, name their folder to vLLM, and remove it once vLLM has answered.

        Args:
            model: The policy.
            message: Makes the message from the name of the folder.
            poll: Is called while waiting for the answer.
        """
        folder = self.options.folder / "model"
        skipped = None if self.unties_head else tied_head(model)
        problem = write_model(model, folder, self.dtype, self.options.model, skipped)
        # the other ranks wait twice, for the files here and for vLLM below: each wait may take the
        # whole timeout
        problem = parallel.from_rank_zero(lambda: problem)
        if problem:
            raise EngineLost(f"vLLM cannot be given the weights: {problem}")
        self._ask(message(str(folder)), poll)
        if parallel.is_rank_zero():
            shutil.rmtree(folder, ignore_errors=True)  # half a model or more, and maybe in memory

    def _hands_over_adapter(self, model: nn.Module) -> bool:
        return self.options.adapter_alone and is_adapted(model)

    def _hand_over_adapter(self, model: nn.Module) -> None:
        """Write the adapter, name its folder to vLLM, and remove the folder of the one before."""
        self.adapters += 1
        folder = self.options.folder / f"adapter-{self.adapters}"
        problem = write_adapter(model, folder, self.dtype)
        problem = parallel.from_rank_zero(lambda: problem)
        if problem:
            raise EngineLost(f"vLLM cannot be given the adapter: {problem}")
        self._ask({"adapter": str(folder)}, lambda: None)
        if parallel.is_rank_zero():
            # vLLM may read its current adapter again, so that one stays
            shutil.rmtree(folder.with_name(f"adapter-{self.adapters - 1}"), ignore_errors=True)

    def _share(self, model: nn.Module) -> None:
        """Hand the weights over in shared memory, a batch at a time. All ranks gather."""
        skipped = None if self.unties_head else tied_head(model)
        # in the loop on all ranks: gathering a sharded weight takes all of them
        weights = ((name, shareable(x, self.dtype)) for name, x in file_tensors(model) if name != skipped)
        for batch, is_last in batches(weights):
            handles = parallel.from_rank_zero(lambda batch=batch: [[name, handle_of(x)] for name, x in batch.items()])
            self._ask({"tensors": handles, "last": is_last}, lambda: None)

    def _ask(self, message: dict, poll: Callable[[], None]) -> Any:
        """Send a message from rank 0; return vLLM's answer, or raise EngineLost, on all ranks."""

        def answer() -> Any:
            try:
                return exchange(self.connection, message, self.timeout, poll)
            except EngineLost as lost:
                return lost
            except ConnectionError:
                poll()  # the signal that ended vLLM may have been sent to the whole job
                return EngineLost(f"vLLM {how_it_ended(self.process, self.options.log)}")

        reply = parallel.from_rank_zero(answer)
        if isinstance(reply, EngineLost):
            raise reply
        return reply


def launch(python: str, log: Path, devices: str | None) -> tuple[subprocess.Popen, socket.socket]:
    """Start vllm_server.py; return its process and our end of the connection."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in OWN_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    environment |= {
        "PYTHONSAFEPATH": "1",  # otherwise the files beside the script would be imported as libraries
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # keeps its engine in that process, which ends with ours
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
    """Close the connection, which ends vLLM's process (or kill it), and remove its folder."""
    connection.close()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def exchange(connection: socket.socket, message: dict, timeout: float, poll: Callable[[], None]) -> Any:
    """Send a message and wait for its answer.

    Args:
        connection: Our end of the connection, not blocking.
        message: Is sent as one line of JSON.
        timeout: Seconds to wait for the answer.
        poll: Is called while waiting; what it raises ends the wait.

    Raises:
        EngineLost: If the answer is an error, or does not come in time.
        ConnectionError: If vLLM's process is gone.
    """
    unsent, received = memoryview(json.dumps(message).encode() + b"\n"), bytearray()
    deadline = time.monotonic() + timeout
    while not received.endswith(b"\n"):
        poll()
        if time.monotonic() > deadline:
            raise EngineLost(f"vLLM has not answered for {timeout:g} seconds (nine tenths of launch.timeout)")
        # both directions at once: vLLM may not read on before its own output is read
        writers = [connection] if unsent else []
        readable, writable, _ = select.select([connection], writers, [], 0.2)
        if writable:
            unsent = unsent[connection.send(unsent) :]
        if readable:
            chunk = connection.recv(2**20)
            if not chunk:
                raise ConnectionError
            received += chunk
    reply = json.loads(received)
    if "error" in reply:
        raise EngineLost(f"vLLM says {' '.join(reply['error'].split())[:400]}")
    return reply["ok"]


def how_it_ended(process: subprocess.Popen, log: Path) -> str:
    """Describe for an error line how vLLM ended: exit code or signal, last line of its log."""
    try:
        code = process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        return f"closed its connection, but its process still runs; see {log}"
    lines = [line.strip() for line in log.read_text(errors="replace").split("\n")] if log.exists() else []
    last_line = next((line[:300] for line in reversed(lines) if line), "nothing")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"ended with {how}; its last words: {last_line} (more in {log})"


def refuse_in_place(method: str | None) -> None:
    """Refuse a model with an adapter that stays in it.

    Args:
        method: The adapter's method; None: the model has no such adapter.

    Raises:
        UserError: There is one.
    """
    if method is not None:
        raise UserError(f"rollout.engine: {no_vllm(method)}")


def refuse_other_names(names: set[str], model: Path, model_type: str) -> None:
    """Raise UserError unless the files of a model's folder name exactly these weights.

    Args:
        names: Names of the policy's weights, as its modules give them.
        model: The folder.
        model_type: The kind of model, for the message.
    """
    in_files: set[str] = set()
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            in_files |= set(opened.keys())
    if different := sorted(names ^ in_files):
        raise UserError(
            f"ppo.rollout.engine: vllm cannot be given the weights of a {model_type} model, whose files name them "
            f"differently from its modules ({different[0]}); use transformers"
        )


def write_model(
    model: nn.Module, folder: Path, dtype: torch.dtype, like: Path, skipped: str | None = None
) -> str | None:
    """Write a model's weights as a folder of safetensors. All ranks gather; rank 0 writes.

    Args:
        model: The policy.
        folder: Is created or replaced.
        dtype: Dtype of the weights that are floating-point numbers.
        like: Folder whose other files (configuration, tokenizer) are copied.
        skipped: Name of a weight to leave out.

    Returns:
        Why the weights cannot be written; None if they are. Other ranks than 0 return something
        else.
    """
    pending: dict[str, torch.Tensor] = {}

    def begin() -> str | None:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for file in like.iterdir():
                if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
                    shutil.copy(file, folder)
        except OSError as error:
            return str(error)
        return None

    def write() -> str | None:
        try:
            save_file(pending, folder / f"{next(iter(pending))}.safetensors", metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:  # the disk is full
            return str(error)
        finally:
            pending.clear()
        return None

    problem = begin() if parallel.is_rank_zero() else "rank 0 writes"
    # the loop runs to its end on all ranks, whatever the problem: gathering a sharded weight takes
    # all of them
    for name, x in file_tensors(model):
        if problem is not None or name == skipped:
            continue
        pending[name] = x.to("cpu", dtype if x.is_floating_point() else x.dtype, copy=True).contiguous()
        if sum(tensor.nbytes for tensor in pending.values()) >= FILE_BYTES:
            problem = write()
    return write() if pending else problem
