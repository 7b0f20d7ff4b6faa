"""Names on the Hub → commits: what a name stood for when a stage was made of it.

A commit is asked for once a command. Where the Hub cannot be asked, the commit that was recorded stands, or the one
that lies in this machine's cache.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

COMMIT = re.compile(r"[0-9a-f]{40}")
PATIENCE = 10.0  # seconds for the Hub's answer


class Named(NamedTuple):
    """A data set or model on the Hub. kind: "dataset" or "model"; revision: the branch, tag or commit that the config
    names, None for the main branch."""

    kind: str
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")


class Recorded(NamedTuple):
    """What a manifest, or a run that is not finished, says of a name on the Hub. commit: None if it was made by a
    version that did not record it."""

    name: str
    revision: str | None
    commit: str | None


@dataclass
class Hub:
    """Commits, asked for once. `notes`: lines to say of names that the Hub could not be asked for."""

    notes: list[str] = field(default_factory=list)
    _asked: dict[Named, tuple[str | None, str]] = field(default_factory=dict)

    def commit(self, thing: Named, recorded: Iterable[Recorded] = ()) -> tuple[str | None, str]:
        """Return (the commit, None where nobody knows; what the Hub has against the name, or "").

        Args:
            thing: what is asked for.
            recorded: what is known of it from before, the likeliest first.
        """
        if thing.revision is not None and COMMIT.fullmatch(thing.revision):
            return thing.revision, ""
        if thing not in self._asked:
            self._asked[thing] = ask(thing)
        found, problem = self._asked[thing]
        if found is not None:
            return found, ""
        known = [r.commit for r in recorded if (r.name, r.revision) == (thing.name, thing.revision) and r.commit]
        where = "recorded" if known else "cached"
        known = known or cached(thing)
        if not known:
            return None, problem
        note = f"{thing}: the Hub cannot be asked; going on with the {where} commit {known[0][:7]}"
        if note not in self.notes:
            self.notes.append(note)
        return known[0], ""


def ask(thing: Named) -> tuple[str | None, str]:
    """Return (the commit that the Hub names, "") or (None, why it names none, "" where it cannot be reached)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    info: Callable[..., Any] = api.dataset_info if thing.kind == "dataset" else api.model_info
    try:
        return info(thing.name, revision=thing.revision, timeout=PATIENCE).sha, ""
    except (HfHubHTTPError, HFValidationError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and status >= 500:  # it is ill, and need not know
            return None, ""
        return None, f"{thing}: {first}; check the name, the revision and `hf auth login`, or name local files"
    except Exception:  # no network, a proxy's page, offline mode: each layer has errors of its own
        return None, ""


def cached(thing: Named) -> list[str]:
    """Return the commits in this machine's cache that a name may stand for, the likeliest first."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=thing.name, repo_type=thing.kind)
    reference = folder / "refs" / (thing.revision or "main")
    if reference.is_file() and COMMIT.fullmatch(commit := reference.read_text().strip()):
        return [commit]
    if thing.revision is not None:
        return []
    places = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    if thing.kind == "dataset":
        places += prepared(thing.name)
    places = [path for path in places if COMMIT.fullmatch(path.name)]
    return [path.name for path in sorted(places, key=lambda path: path.stat().st_mtime, reverse=True)]


def prepared(name: str) -> list[Path]:
    """Return the folders where `datasets` keeps what it made of a data set: …/CONFIG/VERSION/COMMIT."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, own = name.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(own)])
    return [path for path in folder.glob("*/*/*") if path.is_dir()]
