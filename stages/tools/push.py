"""Upload the model that a stage published to the Hugging Face Hub: the command `rlhf push`.

What is sent is the published folder alone: weights, tokenizer, settings of the model, card. Its
digests are verified first, and nothing that names a folder of this machine leaves it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chain import Chain
from pipeline.errors import UserError
from pipeline.store import files
from pipeline.store.artifacts import ArtifactStore
from stages.tools import push_card, push_hub

LARGEST = 500 * 10**9
"""The largest file that the Hub takes, in bytes."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Suffixes of weights that can carry code: never published here, and never sent."""
FOLDERS = {"model": "", "model_ema": " with --ema", "value_model": " with --value-model"}
"""Published folders → the flag of `rlhf push` and `rlhf export` that takes each."""
BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


@dataclass(frozen=True)
class Options:
    """Say what is uploaded, and where."""

    stage: str
    """Stage whose model is uploaded."""
    repository: str
    """ORG/NAME on the Hub."""
    folder: str = "model"
    """Published folder: model, model_ema or value_model."""
    public: bool = False
    """Whether everybody may read the repository; otherwise it is private."""
    update: bool = False
    """Whether the repository may exist already."""
    revision: str = "main"
    """Branch that gets the commit; it is made if it is missing."""
    message: str | None = None
    """Subject of the commit; None: what was uploaded."""
    dry_run: bool = False
    """Whether to list the files and send nothing."""


@dataclass(frozen=True)
class Published:
    """Hold a published model whose digests were just verified."""

    folder: Path
    """Where it is."""
    sizes: dict[str, int]
    """Its files, relative to the folder → bytes."""
    manifests: dict[str, dict[str, Any]]
    """Manifests of the stage and of all that led to it, by stage."""
    outputs: dict[str, Any]
    """What the stage's manifest says of all its files."""


def published_model(
    experiment: Any, store: ArtifactStore, stages: Mapping[str, Any], stage: str, folder: str
) -> Published:
    """Return a published model of a stage that is up to date, after reading all its files.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        stages: All stages by name.
        stage: The stage.
        folder: Its published folder, one of FOLDERS.

    Raises:
        UserError: The stage is stale, missing, damaged or running, or has no such model.
    """
    chain = Chain(experiment, store, stages)
    for name in chain.closure(stage):
        chain.states[name] = chain.assess(name)
    state = chain.states[stage]
    if state.kind != "done":
        raise UserError(f"{stage}: is {state.sentence()}; `rlhf run {stage} -c CONFIG` brings it up to date")
    assert state.manifest is not None
    store.verify(stage)
    prefix, outputs = f"{folder}/", state.manifest["outputs"]
    sizes = {name.removeprefix(prefix): facts["bytes"] for name, facts in outputs.items() if name.startswith(prefix)}
    if "config.json" not in sizes and not any(name.startswith("base/") for name in sizes):
        there = [name + flag for name, flag in FOLDERS.items() if f"{name}/config.json" in outputs]
        remedy = f"it has {', '.join(there)}" if there else "take a stage that trains one, such as sft or ppo"
        raise UserError(f"{stage}: has published no {folder}; {remedy}")
    manifests = {name: found.manifest for name, found in chain.states.items() if found.manifest is not None}
    return Published(store.folder(stage) / folder, dict(sorted(sizes.items())), manifests, outputs)


def run(
    experiment: Any,
    store: ArtifactStore,
    stages: Mapping[str, Any],
    options: Options,
    say: Callable[[str], None] = print,
) -> int:
    """Upload a model in one commit, or list what would be uploaded.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        stages: All stages by name.
        options: What is uploaded, and where.
        say: Prints a line.

    Returns:
        The exit code.

    Raises:
        UserError: There is nothing to upload, a file must not leave this machine, or the Hub
            refuses.
    """
    check_names(options)
    found = published_model(experiment, store, stages, options.stage, options.folder)
    sent, left_out = files_to_send(found)
    refuse_files(found, sent)
    card = found.folder / push_card.CARD
    texts = {}
    if push_card.CARD in sent:
        local = push_card.local_names(found.manifests)
        texts[push_card.CARD] = push_card.text_for_hub(
            card.read_text(encoding="utf-8"), options.repository, local, has_adapter=not left_out
        )
        sent[push_card.CARD] = len(texts[push_card.CARD].encode())
    what = f"{experiment.name}/{options.stage}/{options.folder}"
    where = f"{options.repository} ({'public' if options.public else 'private'}, branch {options.revision})"
    say(f"{where}: {len(sent)} files of {what}, {files.human_bytes(sum(sent.values()))}")
    width = max(len(name) for name in sent)
    for name, size in sent.items():
        say(f"  {name:<{width}}  {files.human_bytes(size):>9}")
    for name in left_out:
        say(f"not sent: {name} (it needs a base model in a folder of this machine; the other weights have it merged)")
    if options.folder == "model" and any(name.startswith("ensemble/") for name in found.outputs):
        say("not sent: ensemble/ (the other models of the ensemble; the repository holds the first)")
    if push_card.CARD in texts and not re.search(r"^license: ", texts[push_card.CARD], re.MULTILINE):
        say("the card names no licence; choose one on the page of the repository")
    if options.dry_run:
        say("nothing was sent (--dry-run)")
        return 0
    address = push_hub.upload(
        push_hub.Upload(
            repository=options.repository,
            files={name: texts[name].encode() if name in texts else found.folder / name for name in sent},
            public=options.public,
            update=options.update,
            revision=options.revision,
            message=options.message or f"Upload {what}",
        ),
        say,
    )
    say(f"uploaded: {address}")
    return 0


def check_names(options: Options) -> None:
    """Raise UserError if the repository or the branch has no name that the Hub takes."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(options.repository)
        if options.repository.count("/") != 1:
            raise HFValidationError("it names no owner")
    except HFValidationError as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(f"{options.repository}: is no repository on the Hub ({reason}); write ORG/NAME") from None
    if not BRANCH.fullmatch(options.revision) or ".." in options.revision:
        raise UserError(f"--revision: {options.revision!r} is no name of a branch; use letters, digits, . _ - /")
    if options.message is not None and not options.message.strip():
        raise UserError("--message: is empty; write what the commit is, or leave it out")


def files_to_send(found: Published) -> tuple[dict[str, int], list[str]]:
    """Return the files to send, and what is left out.

    An adapter beside the weights is left out where its base model is a folder of this machine:
    peft could not load it from the Hub.
    """
    config = found.folder / "adapter" / "adapter_config.json"
    if not config.is_file() or not push_card.names_folder(push_card.base_of(config)):
        return dict(found.sizes), []
    return {name: size for name, size in found.sizes.items() if not name.startswith("adapter/")}, ["adapter/"]


def refuse_files(found: Published, sent: Mapping[str, int]) -> None:
    """Raise UserError with a line for each file that must not be sent, or that the Hub refuses."""
    lines = []
    for name, size in sent.items():
        path = found.folder / name
        if name.endswith(PICKLES):
            lines.append(f"{path}: may carry code; only safetensors are sent")
        if size == 0:
            lines.append(f"{path}: is empty; make the stage again with --force")
        if size > LARGEST:
            shown = files.human_bytes(LARGEST)
            lines.append(
                f"{path}: has {files.human_bytes(size)}, and the Hub takes {shown} a file; upload it elsewhere"
            )
    if not any(name.endswith(".safetensors") for name in sent):
        lines.append(f"{found.folder}: has no weights; make the stage again with --force")
    for name in sent:
        if name != push_card.CARD and (leak := push_card.path_in(found.folder / name)) is not None:
            lines.append(f"{found.folder / name}: names the path {leak} of this machine; take it out of what was given")
    if lines:
        raise UserError(lines)
