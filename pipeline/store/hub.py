"""Resolve names on the Hugging Face Hub to commits, which manifests record.

Each name is looked up once per command. If the Hub cannot be reached, the recorded commit is used,
or otherwise the one in this machine's cache.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT = 10.0  # seconds for the Hub's answer


class HubName(NamedTuple):
    """The name of a data set or model on the Hub."""

    kind: str
    """Either "dataset" or "model"."""
    name: str
    """OWNER/NAME, or NAME."""
    revision: str | None = None
    """The branch, tag or commit from the config; None for the main branch."""

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")


class RecordedCommit(NamedTuple):
    """The commit that a manifest or an unfinished run recorded for a name on the Hub."""

    name: str
    """OWNER/NAME, or NAME."""
    revision: str | None
    """The revision that the config asked for at that time."""
    commit: str | None
    """None if the record is from a version that did not store commits."""


@dataclass
class Hub:
    """The commits that one command has looked up."""

    notes: list[str] = field(default_factory=list)
    """A line to print for each name that could not be looked up."""
    _answers: dict[HubName, tuple[str | None, str]] = field(default_factory=dict)
    """What `request_commit` returned, by name."""

    @property
    def unanswered(self) -> list[HubName]:
        """Return the names for which the Hub could not be reached."""
        return [name for name, answer in self._answers.items() if answer == (None, "")]

    def commit(self, name: HubName, recorded: Iterable[RecordedCommit] = ()) -> tuple[str | None, str]:
        """Resolve a name to a commit.

        Args:
            name: the name to resolve.
            recorded: commits from earlier runs, the most likely first.

        Returns:
            The commit, or None if it is unknown; and the Hub's objection to the name, or "".
        """
        if name.revision is not None and COMMIT.fullmatch(name.revision):
            return name.revision, ""
        if name not in self._answers:
            self._answers[name] = request_commit(name)
        commit, problem = self._answers[name]
        if commit is not None:
            return commit, ""
        known = [r.commit for r in recorded if (r.name, r.revision) == (name.name, name.revision) and r.commit]
        origin = "recorded"
        if not known:
            known, origin = cached_commits(name), "cached"
        if not known:
            return None, problem
        note = f"{name}: the Hub gave no answer; continuing with the {origin} commit {known[0][:7]}"
        if note not in self.notes:
            self.notes.append(note)
        return known[0], ""


def request_commit(name: HubName) -> tuple[str | None, str]:
    """Ask the Hub for the commit of a name.

    Returns:
        (commit, "") if the Hub knows it; (None, error line) if it refuses; (None, "") if it cannot
        be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    request: Callable[..., Any] = api.dataset_info if name.kind == "dataset" else api.model_info
    try:
        return request(name.name, revision=name.revision, timeout=TIMEOUT).sha, ""
    except (HfHubHTTPError, HFValidationError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and status >= 500:  # the server is broken: that says nothing about the name
            return None, ""
        return None, f"{name}: {first_line}; check the name, the revision and `hf auth login`, or use local files"
    except Exception:  # no network, a proxy's page, offline mode: each layer raises errors of its own
        return None, ""


def cached_commits(name: HubName) -> list[str]:
    """Return the cached commits that a name may refer to, the most likely first."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.name, repo_type=name.kind)
    reference = folder / "refs" / (name.revision or "main")
    if reference.is_file() and COMMIT.fullmatch(commit := reference.read_text().strip()):
        return [commit]
    if name.revision is not None:
        return []  # without its reference, nothing connects a branch or tag with a commit
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    if name.kind == "dataset":
        snapshots += prepared_datasets(name.name)
    snapshots = [path for path in snapshots if COMMIT.fullmatch(path.name)]
    return [path.name for path in sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True)]


def prepared_datasets(name: str) -> list[Path]:
    """Return the folders that `datasets` has converted a data set to: …/CONFIG/VERSION/COMMIT."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, repository = name.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(repository)])
    return [path for path in folder.glob("*/*/*") if path.is_dir()]
