"""Copy finished artifacts to and from object storage (`--artifacts s3://bucket/prefix`).

The address may be any URL that fsspec knows. Stages always work in a folder of this machine. A
stage that was finished on another machine is downloaded before it is needed, whole and verified; a
stage that finishes here is uploaded, its manifest last. Checkpoints and interrupted runs stay on
this machine.
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
from pipeline.store import files, integrity
from pipeline.store.artifacts import ArtifactStore, is_publishable, manifest_problem

FOLDER = "RLHF_CACHE"  # the environment variable that says where the local folders are


def is_url(location: str) -> bool:
    """Return whether `--artifacts` names an object storage.

    Raises:
        UserError: the URL is of a local folder, or contains a user name or password.
    """
    if location.startswith(("file://", "local://")):
        raise UserError(f"--artifacts {location}: is a folder of this machine; give only its path")
    if "://" in location and "@" in location.split("://", 1)[1].split("/")[0]:
        raise UserError(
            "--artifacts: keep names and passwords out of the address; use the storage's environment variables"
        )
    return "://" in location


def local_folder(url: str) -> Path:
    """Return the folder of this machine that mirrors a URL.

    It is below $RLHF_CACHE, or else below ~/.cache/rlhf-pipeline.
    """
    root = Path(os.environ.get(FOLDER) or "~/.cache/rlhf-pipeline").expanduser()
    # The readable part is for people; the digest keeps two URLs apart that look the same without
    # punctuation.
    readable = "".join(c if c.isalnum() or c in "._-" else "-" for c in url.split("://", 1)[1]).strip("-.")
    return root / f"{readable[-60:]}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:8]}"


@dataclass
class Remote:
    """An object storage that mirrors the finished stages of a local store."""

    url: str
    """The address given with `--artifacts`."""
    store: ArtifactStore
    """The local store."""

    def __post_init__(self) -> None:
        import fsspec

        with storage_errors(self.url):
            self.files, root = fsspec.core.url_to_fs(self.url)
        self.base = f"{root.rstrip('/')}/{self.store.base.name}"

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """Return the manifest of a stage in the storage, or None if there is none.

        Raises:
            UserError: it is damaged, is not a manifest of this stage, or the storage cannot be
                reached.
        """
        content = self._read_manifest(stage)
        return None if content is None else self._parse_manifest(stage, content)

    def _read_manifest(self, stage: str) -> bytes | None:
        """Download the bytes of a manifest; return None if there is none."""
        with storage_errors(self.url):
            self.files.invalidate_cache()  # fsspec caches listings, and another machine may have published since
            try:
                return self.files.cat_file(f"{self.base}/{stage}/manifest.json")
            except FileNotFoundError:
                return None

    def _parse_manifest(self, stage: str, content: bytes) -> dict[str, Any]:
        """Parse and check a manifest; raise a UserError if it is not a valid one of the stage."""
        name = f"{self.url}: {stage}/manifest.json"
        remedy = f"`rlhf run {stage} -c CONFIG --force` rebuilds it"
        try:
            manifest = integrity.parse_sealed(content, name)
        except UserError as error:
            raise UserError([f"{line}; {remedy}" for line in error.lines]) from None
        problem, outputs = manifest_problem(manifest, stage), manifest.get("outputs")
        # The names become paths on this machine: one such as ../../x must not get any further.
        if problem is None and not (isinstance(outputs, dict) and all(map(_is_valid_output, outputs.items()))):
            problem = "names files that no stage publishes"
        if problem is not None:
            raise UserError(f"{name}: {problem}; {remedy}")
        return manifest

    def fetch(self, stage: str, manifest: dict[str, Any]) -> None:
        """Download a stage as the local artifact, whole or not at all. Needs the lock.

        Args:
            stage: the stage to download.
            manifest: its manifest in the storage.

        Raises:
            UserError: a file is missing or damaged, the disk is full or the storage cannot be
                reached.
        """
        folder = self.store.folder(stage)
        content = folder / ".tmp-fetch"
        content.mkdir()
        files.require_space(folder, sum(entry["bytes"] for entry in manifest["outputs"].values()))
        for name in manifest["outputs"]:
            (content / name).parent.mkdir(parents=True, exist_ok=True)
            # a file that is missing is reported by `check_files` below
            with storage_errors(self.url), suppress(FileNotFoundError):
                self.files.get_file(f"{self.base}/{stage}/{name}", str(content / name))
        files.set_default_modes(content)  # before the files are read: it changes their ctime
        if problems := integrity.check_files(content, manifest["outputs"], self.store.digests.matching):
            remote_folder, remedy = f"{self.url}: {stage}/", f"`rlhf run {stage} -c CONFIG --force` rebuilds it"
            raise UserError([f"{line.replace(f'{content}/', remote_folder)}; {remedy}" for line in problems])
        files.write_json(content / "manifest.json", manifest)
        self.store.install(stage, content)

    def push(self, stage: str, is_new: bool) -> None:
        """Upload a finished stage, unless the storage has it or a newer one. Needs the lock.

        Args:
            stage: the stage to upload.
            is_new: it was produced by this command, and replaces whatever the storage has.
                Otherwise it only replaces an artifact there that is older or damaged.

        Raises:
            UserError: the storage cannot be reached or refuses.
        """
        local, content, remote = self.store.manifest(stage), self._read_manifest(stage), None
        assert local is not None, f"{stage} is not finished"
        if content is not None:
            with suppress(UserError):
                remote = self._parse_manifest(stage, content)
        if remote is not None:
            is_older = remote["finished_at"] < local["finished_at"]
            is_replaced = is_new and remote["digest"] != local["digest"]
            if not is_older and not is_replaced:
                return
        self.store.verify(stage)
        target = f"{self.base}/{stage}"
        with storage_errors(self.url):
            # The manifest goes first and comes back last: while files change, no manifest vouches
            # for them, and an upload that breaks off leaves no artifact rather than a mixed one.
            if self.files.exists(f"{target}/manifest.json"):
                self.files.rm_file(f"{target}/manifest.json")
            for name in local["outputs"]:
                self.files.put_file(str(self.store.folder(stage) / name), f"{target}/{name}")
            self.files.pipe_file(f"{target}/manifest.json", json.dumps(local, indent=2, ensure_ascii=False).encode())
            for path in self.files.find(target):
                # some file systems return paths with a leading slash, others without
                before, separator, name = path.partition(f"{target.lstrip('/')}/")
                is_ours = bool(separator) and not before.strip("/")
                if is_ours and name != "manifest.json" and name not in local["outputs"]:
                    self.files.rm_file(path)


def _is_valid_output(item: tuple[str, Any]) -> bool:
    """Return whether an entry of `outputs` has a size, a digest and a permitted name."""
    name, entry = item
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
        return False
    return integrity.is_inside(name) and is_publishable(name)


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn whatever a storage raises into a one-line UserError that names its address."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        remedy = "pip install 'rlhf-pipeline[s3]'" if url.startswith("s3:") else "install what it names"
        raise UserError(f"--artifacts {url}: {error}; {remedy}") from error
    except Exception as error:  # each storage raises errors of its own
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"--artifacts {url}: {first[0]}; check the address, the permissions and the connection"
        ) from error
