"""Serve a reward model to other programs, by the protocol that the scorer `url:` speaks."""

import ipaddress
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore
from stages.settings.checks import context_of
from stages.settings.ppo import ensemble_ways
from stages.tools.serve_reward_http import Batch, RewardServer, WrongRequest

WAIT_SECONDS = 0.1
"""Time between two looks whether a signal has come."""

OWN = {"rm": "model", "judge": "judge/model"}
"""Names of this experiment's reward models → their folders in the artifact of rm."""


@dataclass(frozen=True)
class Options:
    """Say what is served, and where."""

    model: str = "rm"
    """rm, judge, or a folder."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 0
    """Port; 0: any that is free."""
    key_env: str | None = None
    """Environment variable with the key that clients must send."""
    batch_size: int | None = None
    """The most responses in a forward pass; None: as ppo.per_device_train_batch_size."""
    how: str | None = None
    """How the models of an ensemble score as one: mean or min; None: as PPO does it."""


def run(
    experiment: Any,
    store: ArtifactStore,
    options: Options,
    stop: StopFlag,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Serve until a signal comes; requests that have come are answered first.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        options: What is served, and where.
        stop: Is set when a signal comes.
        trust_remote_code: Whether code that the model brings may run.
        say: Prints a line.

    Returns:
        The exit code, 0: there is nothing that a later start could go on with.

    Raises:
        UserError: If the model or the key is missing, or the address cannot be had.
    """
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch-size: {options.batch_size} is not positive; give 1 or more")
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port: {options.port} is no port; give 1 to 65535, or 0 for any that is free")
    key = key_of(options.key_env)
    folder = find_model(options.model, store)
    score = load_score(experiment, folder, options, trust_remote_code)
    try:
        server = RewardServer(options.host, options.port, score, {"model": options.model}, key)
    except OSError as error:
        where = f"{options.host}:{options.port}"
        raise UserError(f"--host, --port: cannot listen on {where} ({error}); give others") from error
    if key is None and not is_loopback(options.host):
        say(f"whoever reaches {options.host} can ask for scores: --key-env NAME asks for a key")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": WAIT_SECONDS}, daemon=True)
    thread.start()
    say(f"{options.model} ({folder}) scores at {server.url}")
    while not stop.requested:
        thread.join(WAIT_SECONDS)
    server.finish()
    return 0


def key_of(name: str | None) -> str | None:
    """Return the key in an environment variable; None without a name.

    Raises:
        UserError: If there is no such variable.
    """
    if name is None:
        return None
    if not os.environ.get(name):
        raise UserError(f"--key-env: the environment has no variable {name}; export it, or leave --key-env out")
    return os.environ[name]


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_model(name: str, store: ArtifactStore) -> Path:
    """Return the folder of a reward model.

    Args:
        name: rm or judge, whose artifact is verified; or a folder.
        store: The experiment's artifacts.

    Raises:
        UserError: If there is no such model.
    """
    if name not in OWN:
        if (Path(name).expanduser() / "config.json").is_file():
            return Path(name).expanduser()
        raise UserError(f"--model: {name} has no config.json; give rm, judge, or the folder of a reward model")
    store.verify("rm")
    folder = store.folder("rm") / OWN[name]
    if not (folder / "config.json").is_file():
        raise UserError(f"--model: rm has published no {OWN[name]}; give rm, or the folder of a reward model")
    return folder


def load_score(
    experiment: Any, folder: Path, options: Options, trust_remote_code: bool
) -> Callable[[Batch], list[float]]:
    """Load a reward model; return the function that scores a request with it.

    Args:
        experiment: The validated experiment: device, dtype, and what the options leave open.
        folder: The folder of the model.
        options: How it scores.
        trust_remote_code: Whether code that the model brings may run.
    """
    from transformers.utils import logging

    from stages.models.ensemble import load_reward_model, members
    from stages.models.loading import load_tokenizer
    from stages.models.precision import frozen
    from stages.scorers.reward_model import RewardModelScorer
    from stages.scorers.scorer import ScorerSpec
    from stages.shared.runtime import device_of, dtype_of, make_accelerator

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = dtype_of(experiment)
    accelerator = make_accelerator(device_of(experiment), dtype)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if tokenizer.chat_template is None:
        raise UserError(f"--model: the tokenizer in {folder} has no chat template, which prompts are read by")
    model = load_reward_model(
        folder,
        options.how or next(iter(ensemble_ways(experiment.ppo).values()), "mean"),
        attn_implementation=experiment.model.attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    model = frozen(model, dtype).to(accelerator.device)
    spec = ScorerSpec(
        reward_model=model,
        pad_id=tokenizer.pad_token_id,
        accelerator=accelerator,
        batch_size=options.batch_size or experiment.ppo.per_device_train_batch_size,
    )
    context = context_of(members(model)[0].config.to_dict())
    scorer = RewardModelScorer(spec)
    return lambda batch: score_batch(batch, scorer, tokenizer, context)


def score_batch(batch: Batch, scorer: Any, tokenizer: Any, context: int | None) -> list[float]:
    """Return the scores of a request's responses.

    Args:
        batch: The request.
        scorer: A RewardModelScorer.
        tokenizer: The model's.
        context: The longest row of the model, in tokens; None if it states none.

    Raises:
        WrongRequest: If the chat template refuses a prompt, or a row is too long.
    """
    import torch

    from stages.scorers.scorer import ScoreRequest

    prompts, responses = ids_in(batch, tokenizer)
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        length = len(prompt) + len(response)
        if context is not None and length > context:
            raise WrongRequest(f"responses[{index}] has {length} tokens with its prompt; the model reads {context}")
    scores = scorer.score(ScoreRequest(prompts, responses, tokenizer)).total
    if not torch.isfinite(scores).all():
        raise ValueError("the model's scores are not finite")
    return scores.tolist()


def ids_in(batch: Batch, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Return the prompts and the responses of a request as ids.

    The client's own ids are taken where they are of the same tokenizer: what was sampled need not
    be what its text is encoded as.

    Args:
        batch: The request.
        tokenizer: The model's.

    Raises:
        WrongRequest: If the chat template refuses a prompt, or an id is none of the tokenizer's.
    """
    from data.encode import encode_prompts, encode_responses
    from stages.scorers.url_protocols import tokenizer_name

    if batch.ids is not None and {one.tokenizer for one in batch.ids} == {tokenizer_name(tokenizer)}:
        for index, one in enumerate(batch.ids):
            if not all(0 <= token < len(tokenizer) for token in one.prompt + one.response):
                raise WrongRequest(f"ids[{index}] has an id that the tokenizer does not have")
        return [one.prompt for one in batch.ids], [one.response for one in batch.ids]
    try:
        names = [f"prompts[{index}]" for index in range(len(batch.prompts))]
        prompts = encode_prompts(tokenizer, batch.prompts, names)
    except UserError as error:
        raise WrongRequest(" ".join(error.lines)) from error
    return prompts, encode_responses(tokenizer, list(zip(batch.responses, batch.finished, strict=True)))
