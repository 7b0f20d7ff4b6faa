"""Keep encoded rows beside a stage, so that only the first start of it encodes them.

An entry is one or more files that are mapped into memory, and a JSON file with their digests, which
says what they were made of and is written last. An entry that was made of anything else, or that is
damaged, is made again.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.launch import parallel
from pipeline.store import files, integrity
from pipeline.store.cache import Cache
from pipeline.store.digests import code_sha256
from pipeline.tracking import Tracker

READER = Path(__file__).parents[2] / "data"
"""The code that reads and encodes: after a change of it everything is encoded again."""
WEIGHTS = (".safetensors", ".bin", ".md")
"""Files of a model's folder that say nothing about its tokenizer."""
MANY_ROWS = 10_000
"""Rows from which on encoding shows its progress."""


@dataclass(frozen=True)
class RowCache:
    """The encoded rows of one stage."""

    cache: Cache
    """The stage's cache; only rank 0 writes there."""
    tokenizer: Path
    """The folder of the model whose tokenizer encodes."""
    tracker: Tracker
    """Shows progress."""
    leave: Callable[[], None] = lambda: None
    """Called now and then; may raise Interrupted."""

    def entry(
        self, name: str, kinds: tuple[str, ...], made_of: list[Any] | None, write: Callable[[dict[str, Path]], dict]
    ) -> dict[str, Any]:
        """Return what an entry says of its rows; rank 0 makes it, now or earlier.

        Args:
            name: The name of the entry.
            kinds: The suffixes of its files.
            made_of: What the rows depend on besides the tokenizer and the code, as JSON values;
                None if that is not known, and they are encoded at each start.
            write: Writes the files, whose paths it gets by suffix, and returns what there is to say
                of the rows, as JSON values.
        """

        def make_if_missing() -> None:
            digest = None if made_of is None else integrity.sha256_json([*made_of, self._made_by])
            if digest is None or self._read(name, kinds, digest) is None:
                self._write(name, kinds, digest, write)

        parallel.from_rank_zero(make_if_missing)
        with files.name_in_errors(self.path(name, "json")):
            return json.loads(self.path(name, "json").read_text(encoding="utf-8"))["says"]

    def path(self, name: str, kind: str) -> Path:
        """Return the path of a file of an entry."""
        return self.cache.folder / f"{name}.{kind}"

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Give a function to call with the number of rows so far; of many rows progress is shown.

        Args:
            what: What is encoded.
            total: About how many rows there are; None if that is not known.
        """
        if total is None or total < MANY_ROWS:
            yield lambda count: self.leave()
            return
        with self.tracker.progress(total, f"{self.tracker.stage} encoding {what}") as line:

            def note(count: int) -> None:
                self.leave()
                line.update(min(count, total))

            yield note

    @cached_property
    def _made_by(self) -> list[Any]:
        """List what encoding depends on besides the rows and the stage's settings."""
        own = {
            path.name: integrity.sha256_file(path)
            for path in sorted(self.tokenizer.iterdir())
            if path.is_file() and path.suffix not in WEIGHTS
        }
        return [own, code_sha256(READER), version("transformers"), version("tokenizers")]

    def _read(self, name: str, kinds: tuple[str, ...], made_of: str) -> dict[str, Any] | None:
        """Return an entry; None if it is missing, damaged or of another digest.

        Args:
            name: The name of the entry.
            kinds: The suffixes of its files.
            made_of: Digest of everything that it should have been made of.
        """
        with suppress(OSError, ValueError, KeyError, TypeError):
            entry = json.loads(self.path(name, "json").read_text(encoding="utf-8"))
            if entry["made_of"] != made_of:
                return None
            if integrity.sha256_json(entry["says"]) != entry["says_sha256"]:
                return None
            if all(integrity.sha256_file(self.path(name, kind)) == entry[kind] for kind in kinds):
                return entry
        return None

    def _write(
        self, name: str, kinds: tuple[str, ...], made_of: str | None, write: Callable[[dict[str, Path]], dict]
    ) -> None:
        """Write an entry.

        Args:
            name: Its name.
            kinds: The suffixes of its files.
            made_of: Digest of everything that it is made of; None if that is not known.
            write: As of `entry`.
        """
        self.cache.folder.mkdir(exist_ok=True)
        staged = {kind: self.cache.folder / f".tmp-{name}.{kind}" for kind in kinds}
        try:
            with files.name_in_errors(self.path(name, kinds[0])):
                says = write(staged)
            entry = {"made_of": made_of, "says": says, "says_sha256": integrity.sha256_json(says)}
            for kind, path in staged.items():
                files.fsync_file(path)
                entry[kind] = integrity.sha256_file(path)
                os.chmod(path, files.default_mode(self.cache.folder))
                os.replace(path, self.path(name, kind))
            files.write_json(self.path(name, "json"), entry)
        finally:
            for path in staged.values():
                path.unlink(missing_ok=True)
