"""Keep encoded rankings beside a stage, so that only the first start of it encodes them.

An entry is three files: the rows, their index (both Arrow), and a JSON file with their digests,
which says what they were made of and is written last. An entry that was made of anything else, or
that is damaged, is made again.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.group_rows import EncodedRanking, GroupRows, RowFile, write_rows
from data.length_limit import LengthLimiter, LengthReport
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
"""Rankings from which on encoding shows its progress."""


@dataclass(frozen=True)
class GroupCache:
    """The encoded rankings of one stage."""

    cache: Cache
    """The stage's cache; only rank 0 writes there."""
    tokenizer: Path
    """The folder of the model whose tokenizer encodes."""
    tracker: Tracker
    """Shows progress."""
    leave: Callable[[], None] = lambda: None
    """Called now and then; may raise Interrupted."""

    def groups(
        self, file: Path, settings: list[Any], rows: Callable[..., Iterator[EncodedRanking]], limiter: LengthLimiter
    ) -> tuple[GroupRows, LengthReport]:
        """Return the groups of a file of rankings, encoded now or earlier.

        Args:
            file: The rankings.
            settings: What encoding depends on besides the file and the tokenizer, as JSON values.
            rows: Encodes the rankings; takes a function to call with their number now and then.
            limiter: Its report is complete when the rows are.

        Returns:
            The groups, and the report on rows that were cut or dropped.
        """
        name = f"groups-{file.stem}"

        def make_if_missing() -> None:
            made_of = integrity.sha256_json([integrity.sha256_file(file), settings, self._made_by])
            if self._read(name, made_of) is None:
                self._write(name, made_of, self._with_progress(file, rows), limiter)

        parallel.from_rank_zero(make_if_missing)
        with files.name_in_errors(self._path(name, "json")):
            entry = json.loads(self._path(name, "json").read_text(encoding="utf-8"))
        return self._open(name), LengthReport(**entry["report"])

    @cached_property
    def _made_by(self) -> list[Any]:
        """What encoding depends on besides the file and the stage's settings."""
        own = {
            path.name: integrity.sha256_file(path)
            for path in sorted(self.tokenizer.iterdir())
            if path.is_file() and path.suffix not in WEIGHTS
        }
        return [own, code_sha256(READER), version("transformers"), version("tokenizers")]

    def _path(self, name: str, kind: str) -> Path:
        return self.cache.folder / f"{name}.{kind}"

    def _open(self, name: str) -> GroupRows:
        """Map the files of an entry into memory."""
        import pyarrow as pa

        with pa.memory_map(str(self._path(name, "index"))) as file:
            index = pa.ipc.open_file(file).read_all()
        return GroupRows(RowFile.open(self._path(name, "arrow")), index)

    def _read(self, name: str, made_of: str) -> dict[str, Any] | None:
        """Return what an entry says of itself; None if it is missing, damaged or of another digest.

        Args:
            name: The name of the entry.
            made_of: Digest of everything that it should have been made of.
        """
        with suppress(OSError, ValueError, KeyError, TypeError):
            entry = json.loads(self._path(name, "json").read_text(encoding="utf-8"))
            if entry["made_of"] != made_of:
                return None
            if all(integrity.sha256_file(self._path(name, kind)) == entry[kind] for kind in ("arrow", "index")):
                return entry
        return None

    def _write(self, name: str, made_of: str, rows: Iterator[EncodedRanking], limiter: LengthLimiter) -> None:
        """Write an entry.

        Args:
            name: Its name.
            made_of: Digest of everything that it is made of.
            rows: The encoded rankings.
            limiter: Its report is complete when the rows are.
        """
        import pyarrow as pa

        self.cache.folder.mkdir(exist_ok=True)
        staged = {kind: self.cache.folder / f".tmp-{name}.{kind}" for kind in ("arrow", "index")}
        try:
            with files.name_in_errors(staged["arrow"]):
                index = write_rows(str(staged["arrow"]), rows)
                with pa.ipc.new_file(str(staged["index"]), index.schema) as writer:
                    writer.write_table(index)
            entry = {"made_of": made_of, "report": dataclasses.asdict(limiter.finished())}
            for kind, path in staged.items():
                files.fsync_file(path)
                entry[kind] = integrity.sha256_file(path)
                os.chmod(path, files.default_mode(self.cache.folder))
                os.replace(path, self._path(name, kind))
            files.write_json(self._path(name, "json"), entry)
        finally:
            for path in staged.values():
                path.unlink(missing_ok=True)

    def _with_progress(self, file: Path, rows: Callable[..., Iterator[EncodedRanking]]) -> Iterator[EncodedRanking]:
        """Yield the encoded rankings of a file, and show progress where there are many.

        Args:
            file: The rankings.
            rows: Encodes them.
        """
        with open(file, "rb") as handle:
            total = sum(1 for line in handle if line.strip())
        if total < MANY_ROWS:
            yield from rows(note=lambda count: self.leave())
            return
        with self.tracker.progress(total, f"{self.tracker.stage} encoding {file.stem}") as progress:

            def note(count: int) -> None:
                self.leave()
                progress.update(count)

            yield from rows(note=note)
