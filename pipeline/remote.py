"""Finished artifacts on object storage (`--artifacts s3://bucket/prefix`), or wherever else fsspec reaches.

Stages work on a folder of this machine, as ever. What finished elsewhere comes there before it is needed, whole and
verified; what finishes here goes to the storage, its manifest last. Checkpoints and interrupted runs stay here.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.artifacts import ArtifactStore
from pipeline.errors import UserError

FOLDER = "RLHF_CACHE"  # the environment variable for where the local folders are


def is_url(place: str) -> bool:
    return "://" in place


def local_folder(url: str) -> Path:
    """The folder of this machine that stands for a URL."""
    root = Path(os.environ.get(FOLDER) or "~/.cache/rlhf-pipeline").expanduser()
    words = "".join(c if c.isalnum() or c in "._-" else "-" for c in url.split("://", 1)[1]).strip("-.")
    return root / f"{words[-60:]}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:8]}"


@dataclass
class Remote:
    """The storage behind a store: `fetch` before a stage is looked at, `push` once it is known to hold here."""

    url: str
    store: ArtifactStore

    def __post_init__(self):
        import fsspec

        if self.url.startswith(("file:", "local:")):
            raise UserError(f"--artifacts {self.url}: is a folder of this machine; give its path alone")
        with told(self.url):
            self.files, root = fsspec.core.url_to_fs(self.url)
        self.base = f"{root.rstrip('/')}/{self.store.base.name}"

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """What the storage says of a stage; None where it is not there. UserError where that does not hold."""
        path = f"{self.base}/{stage}/manifest.json"
        with told(self.url):
            self.files.invalidate_cache()
            try:
                content = self.files.cat_file(path)
            except FileNotFoundError:
                return None
        manifest = files.unsealed(content, f"{self.url}: {stage}/manifest.json")
        outputs = manifest.get("outputs")
        if manifest.get("stage") != stage or not isinstance(outputs, dict) or not all(map(files.is_inside, outputs)):
            raise UserError(f"{self.url}: {stage}/manifest.json is not one of this stage")
        return manifest

    def fetch(self, stage: str) -> str | None:
        """Brings a stage that finished elsewhere after it did here, or never here; → a line about it. An interrupted
        run of this machine stays what it is."""
        there, here = self.manifest(stage), self._here(stage)
        if there is None or (here is not None and here["digest"] == there["digest"]):
            return None
        if here is not None and here["finished_at"] >= there["finished_at"]:
            return None
        folder = self.store.folder(stage)
        if (folder / "run.json").exists():
            return f"{stage}: a run was interrupted here, so it is not fetched from {self.url}"
        with self.store.lock(stage):
            content = folder / ".tmp-fetch"
            size = sum(entry["bytes"] for entry in there["outputs"].values())
            content.mkdir()
            files.require_space(folder, size)
            for name in there["outputs"]:
                (content / name).parent.mkdir(parents=True, exist_ok=True)
                with told(self.url):
                    self.files.get_file(f"{self.base}/{stage}/{name}", str(content / name))
            if problems := files.check_files(content, there["outputs"]):
                raise UserError([f"{line}; it came so from {self.url}" for line in problems])
            files.write_json(content / "manifest.json", there)
            self.store.install(stage, content)
        return f"{stage}: fetched from {self.url} ({size / 1e6:.1f} MB)"

    def push(self, stage: str) -> None:
        """Puts the finished stage there. No manifest stands there over files that change; other files go."""
        here, there = self.store.manifest(stage), None
        with told(self.url):
            try:
                there = self.manifest(stage)
            except UserError:  # damaged: made anew
                pass
            if there is not None and there["digest"] == here["digest"]:
                return
            target = f"{self.base}/{stage}"
            if self.files.exists(f"{target}/manifest.json"):
                self.files.rm_file(f"{target}/manifest.json")
            same = {} if there is None else there["outputs"]
            for name, entry in here["outputs"].items():
                if same.get(name, {}).get("sha256") != entry["sha256"] or not self.files.exists(f"{target}/{name}"):
                    self.files.put_file(str(self.store.folder(stage) / name), f"{target}/{name}")
            self.files.pipe_file(f"{target}/manifest.json", json.dumps(here, indent=2, ensure_ascii=False).encode())
            for path in self.files.find(target):
                name = path.rsplit(f"{self.base.lstrip('/')}/{stage}/", 1)[-1]
                if name != "manifest.json" and name not in here["outputs"]:
                    self.files.rm_file(path)

    def _here(self, stage: str) -> dict[str, Any] | None:
        try:
            return self.store.manifest(stage)
        except UserError:
            return None


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
