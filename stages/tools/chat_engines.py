"""Start a vLLM for each policy of a chat, from its folder: the policy is not loaded here."""

import json
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from stages.settings.checks import context_of
from stages.settings.rollout import INSTALL, missing_vllm

if TYPE_CHECKING:
    from stages.rollouts.engine import SampleRequest
    from stages.rollouts.vllm import Vllm

LONGEST = 8192
"""The most tokens of a conversation, unless launch.vllm.options sets max_model_len."""


class ChatEngine:
    """A vLLM that holds one policy."""

    def __init__(self, engine: "Vllm", folder: Path):
        self.engine = engine
        self.folder = folder
        """For vLLM's files and its log."""

    def sample(self, request: "SampleRequest") -> list[int]:
        """Return the response to the only prompt of a request, as token ids.

        Raises:
            EngineLost: vLLM fails.
        """
        with held_back():
            return self.engine.sample(request).responses[0]

    def close(self) -> None:
        """End vLLM, and remove its files."""
        self.engine.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends: half an answer must not stay in the connection."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def room_of(experiment: Any, folder: Path) -> int:
    """Return the most tokens of a conversation with the policy in a folder."""
    asked = experiment.launch.vllm.options.get("max_model_len")
    if asked is not None:
        return int(asked)
    context = context_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return LONGEST if context is None else min(context, LONGEST)


def start_engines(
    experiment: Any, names: Sequence[str], folders: Sequence[Path], trust_remote_code: bool
) -> list[ChatEngine]:
    """Start a vLLM for each policy; each takes launch.vllm.gpu_memory_utilization of its GPUs.

    Args:
        experiment: The validated experiment.
        names: The policies as the user named them.
        folders: Their model folders.
        trust_remote_code: Whether code that a model brings may run.

    Raises:
        UserError: vLLM is not installed, or does not start.
    """
    import torch

    from stages.rollouts.engine import EngineLost, EngineSpec
    from stages.rollouts.vllm import make_vllm
    from stages.shared.runtime import device_of, dtype_of

    if lines := missing_vllm(experiment, "--engine"):
        raise UserError(lines)
    engines: list[ChatEngine] = []
    for name, folder in zip(names, folders, strict=True):
        own = Path(tempfile.mkdtemp(prefix="rlhf-chat-"))
        spec = EngineSpec(
            model=folder,
            scratch=own / "weights",
            log=own / "vllm.log",
            device=torch.device(device_of(experiment)),
            dtype=dtype_of(experiment),
            autocast=nullcontext,
            pad_id=0,  # vLLM pads by itself
            max_length=room_of(experiment, folder),
            batch_size=1,
            timeout=0.9 * experiment.launch.timeout,
            trust_remote_code=trust_remote_code,
            launch=experiment.launch.vllm.model_dump(),
        )
        engine = make_vllm(spec)
        try:
            engine.start_from_folder()
        except EngineLost as lost:
            for other in engines:
                other.close()
            engine.close()
            remedy = INSTALL if "No module named 'vllm'" in str(lost) else f"see launch.vllm and {spec.log}"
            raise UserError(f"--engine: {name}: {lost}; {remedy}") from lost
        engines.append(ChatEngine(engine, own))
    return engines
