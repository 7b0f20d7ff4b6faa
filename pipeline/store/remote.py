"""Finished artifacts on object storage (`--artifacts s3://bucket/prefix`), or wherever else fsspec reaches.

Stages work on a folder of this machine, as ever. What finished elsewhere comes there before it is needed, whole and
verified; what finishes here goes to the storage, its manifest last. Checkpoints and interrupted runs stay here.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store import files
from pipeline.store.artifacts import ArtifactStore, is_publishable, problem

FOLDER = "RLHF_CACHE"  # the environment variable for where the local folders are


def is_url(place: str) -> bool:
    """UserError for one that is of no use here."""
    if place.startswith(("file://", "local://")):
        raise UserError(f"--artifacts {place}: is a folder of this machine; give its path alone")
    if "://" in place and "@" in place.split("://", 1)[1].split("/")[0]:
        raise UserError("--artifacts: keep names and passwords out of the address; the storage has variables for them")
    return "://" in place


def local_folder(url: str) -> Path:
    """The folder of this machine that stands for a URL."""
    root = Path(os.environ.get(FOLDER) or "~/.cache/rlhf-pipeline").expanduser()
    words = "".join(c if c.isalnum() or c in "._-" else "-" for c in url.split("://", 1)[1]).strip("-.")
    return root / f"{words[-60:]}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:8]}"


@dataclass
class Remote:
    """The storage behind a store: `fetch` what is not done here, `push` what is."""

    url: str
    store: ArtifactStore

    def __post_init__(self):
        import fsspec

        with told(self.url):
            self.files, root = fsspec.core.url_to_fs(self.url)
        self.base = f"{root.rstrip('/')}/{self.store.base.name}"

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """What the storage says of a stage; None where it is not there. UserError where that does not hold."""
        content = self._content(stage)
        return None if content is None else self._checked(stage, content)

    def _content(self, stage: str) -> bytes | None:
        with told(self.url):
            self.files.invalidate_cache()
            try:
                return self.files.cat_file(f"{self.base}/{stage}/manifest.json")
            except FileNotFoundError:
                return None

    def _checked(self, stage: str, content: bytes) -> dict[str, Any]:
        name = f"{self.url}: {stage}/manifest.json"
        remedy = f"`rlhf run {stage} -c CONFIG --force` makes it anew"
        try:
            manifest = files.unsealed(content, name)
        except UserError as error:
            raise UserError([f"{line}; {remedy}" for line in error.lines]) from None
        what, outputs = problem(manifest, stage), manifest.get("outputs")
        if what is None and not (isinstance(outputs, dict) and all(map(_is_output, outputs.items()))):
            what = "names files that no stage publishes"
        if what is not None:
            raise UserError(f"{name}: {what}; {remedy}")
        return manifest

    def fetch(self, stage: str, there: dict[str, Any]) -> None:
        """Brings the stage of that manifest here, whole or not at all. Under the lock."""
        folder = self.store.folder(stage)
        content = folder / ".tmp-fetch"
        content.mkdir()
        files.require_space(folder, sum(entry["bytes"] for entry in there["outputs"].values()))
        for name in there["outputs"]:
            (content / name).parent.mkdir(parents=True, exist_ok=True)
            with told(self.url):
                try:
                    self.files.get_file(f"{self.base}/{stage}/{name}", str(content / name))
                except FileNotFoundError:
                    pass  # said below
        if problems := files.check_files(content, there["outputs"]):
            where, remedy = f"{self.url}: {stage}/", f"`rlhf run {stage} -c CONFIG --force` makes it anew"
            raise UserError([f"{line.replace(f'{content}/', where)}; {remedy}" for line in problems])
        files.write_json(content / "manifest.json", there)
        self.store.install(stage, content)

    def push(self, stage: str, made: bool) -> None:
        """Puts the finished stage there. No manifest stands there over files that change; other files go. made: it was
        made just now; else what is there stays, unless it is older or damaged. Under the lock."""
        here, content, there = self.store.manifest(stage), self._content(stage), None
        if content is not None:
            with suppress(UserError):
                there = self._checked(stage, content)
        if there is not None and (there["digest"] == here["digest"] or not made):
            if there["finished_at"] >= here["finished_at"]:
                return
        target = f"{self.base}/{stage}"
        with told(self.url):
            if self.files.exists(f"{target}/manifest.json"):
                self.files.rm_file(f"{target}/manifest.json")
            for name in here["outputs"]:
                self.files.put_file(str(self.store.folder(stage) / name), f"{target}/{name}")
            self.files.pipe_file(f"{target}/manifest.json", json.dumps(here, indent=2, ensure_ascii=False).encode())
            for path in self.files.find(target):
                before, found, name = path.partition(f"{target.lstrip('/')}/")
                if found and not before.strip("/") and name != "manifest.json" and name not in here["outputs"]:
                    self.files.rm_file(path)


def _is_output(item: tuple[str, Any]) -> bool:
    name, entry = item
    facts = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
    return facts and files.is_inside(name) and is_publishable(name)


@contextmanager
def told(url: str) -> Iterator[None]:
    """What a storage refuses is one line."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        extra = "pip install 'rlhf-pipeline[s3]'" if url.startswith("s3:") else "install what it names"
        raise UserError(f"--artifacts {url}: {error}; {extra}") from error
    except Exception as error:  # each storage has errors of its own
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--artifacts {url}: {first[0]}; check the address, the rights and the connection") from error
