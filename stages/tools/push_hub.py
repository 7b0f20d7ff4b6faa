"""Talk to the Hub: make the repository, and send all files in one commit."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
"""Suffixes of files that would be loaded beside new weights: an update removes them."""
UNREACHABLE = {"ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "WriteError", "WriteTimeout"}
"""Names of exceptions of the network, so that its library need not be imported."""


@dataclass(frozen=True)
class Upload:
    """Hold what is sent, and where."""

    repository: str
    """ORG/NAME."""
    files: Mapping[str, Path | bytes]
    """Name in the repository → the file, or its content."""
    public: bool
    """Whether the repository is public."""
    update: bool
    """Whether it may exist already."""
    revision: str
    """Branch."""
    message: str
    """Subject of the commit."""


def upload(what: Upload, say: Callable[[str], None]) -> str:
    """Make the repository if it is missing, and commit all files to it at once.

    Args:
        what: What is sent, and where.
        say: Prints a line.

    Returns:
        The address of the commit.

    Raises:
        UserError: No token, no network, no right, or the repository exists already.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE: is set, so nothing can be sent; unset it")
    if get_token() is None:
        raise UserError(f"the Hub: there is no token; {LOGIN}")
    api, name = HfApi(), what.repository
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=inner, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for inner, content in what.files.items()
    ]
    with errors_as_lines(name, "nothing was sent"):
        is_new = existing_files(api, what) is None
        if is_new:
            api.create_repo(name, private=not what.public)
            say(f"{name}: made, {'public' if what.public else 'private'}")
    left = f"the repository {name} was made, and is empty: give --update when you try again" if is_new else ""
    with errors_as_lines(name, left or "nothing was changed there"):
        if what.revision != constants.DEFAULT_REVISION:
            api.create_branch(name, branch=what.revision, exist_ok=True)
        for old in [] if is_new else api.list_repo_files(name, revision=what.revision):
            if old.endswith(WEIGHTS) and old not in what.files:
                operations.append(CommitOperationDelete(old))
                say(f"{name}: the commit removes {old}, which the new model does not have")
        commit = api.create_commit(name, operations, commit_message=what.message, revision=what.revision)
    return commit.commit_url


def existing_files(api: Any, what: Upload) -> list[str] | None:
    """Return the files of the repository; None if there is no such repository.

    Raises:
        UserError: It exists and may not be written: not without --update, and not with another
            visibility than the one that was asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    name = what.repository
    try:
        info = api.repo_info(name)
    except RepositoryNotFoundError:
        return None
    there = [sibling.rfilename for sibling in info.siblings or []]
    is_empty = not set(there) - {".gitattributes"}
    if not what.update and not is_empty:
        raise UserError(f"{name}: exists already; add a commit to it with --update, or choose another name")
    if what.public and info.private:
        raise UserError(f"{name}: is private; make it public in its settings on the Hub, or leave out --public")
    if not what.public and not info.private:
        raise UserError(f"{name}: is public; give --public if everybody may read this model, or choose another name")
    return there


@contextmanager
def errors_as_lines(name: str, left: str) -> Iterator[None]:
    """Turn an error of the Hub or of the network into a UserError of one line, without the token.

    Args:
        name: The repository.
        left: What is there afterwards.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        raise UserError(f"{name}: {reason_of(error, name)} ({left})") from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE: is set, so nothing can be sent; unset it") from None
    except UserError:
        raise
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if not kinds & UNREACHABLE and not isinstance(error, ConnectionError | TimeoutError):
            raise
        place = os.environ.get("HF_ENDPOINT", "the Hub")
        raise UserError(f"{place}: cannot be reached; check the network and try again ({left})") from None


def status_of(error: Exception) -> int | None:
    """Return the status of the answer that an error came from."""
    return getattr(getattr(error, "response", None), "status_code", None)


def reason_of(error: Exception, name: str) -> str:
    """Return what the Hub objects to, and what to do."""
    status, owner = status_of(error), name.partition("/")[0]
    said = str(getattr(error, "server_message", None) or "").strip().split("\n")[0]
    if status == 401:
        return f"the Hub does not know the token (401); {LOGIN}"
    if status == 403:
        return f"the token may not write there (403); use one with write access to {owner}, or another owner"
    if status == 404:
        return f"the Hub finds no {owner} that this token may write to (404); check the owner and the token"
    if status == 409:
        return "somebody has made or changed it meanwhile (409); look at it, and try again with --update"
    return f"the Hub refuses ({status}{': ' + said if said else ''}); try again later, or see its page"
