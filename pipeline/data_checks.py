"""Check the data of stages before anything runs: a stage that reads a file may come hours later.

A file is read whole, once a command. What was found right is remembered beside the artifacts, under
the digests of the file and of the code that reads it, and is not read again.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.chain import Chain, print_line
from pipeline.data_progress import PATIENCE, reading_line
from pipeline.fingerprints import sources
from pipeline.stage import Source
from pipeline.store import files, integrity
from pipeline.store.digests import code_sha256
from pipeline.store.hub import HubName, cached_commits
from pipeline.tracking import format_duration

MEMORY = ".checked.json"
"""The file beside the artifacts that lists what was found right."""
MOST_REMEMBERED = 200
"""Sources that are remembered at most, the newest."""
READER = Path(__file__).parents[1] / "data"
"""The code that reads data: after a change of it everything is checked again."""


@dataclass
class DataChecks:
    """Check the sources of stages that are going to run, each source once."""

    chain: Chain
    """The assessed stages."""
    console: Console
    """Where progress is printed."""
    _found: dict[str, list[str]] = field(default_factory=dict)
    """Digest of a source and how it is read → its error lines, in this command."""

    def lines(self, name: str, data: dict[str, Any]) -> list[str]:
        """Return the error lines of all data that a stage reads and the config names.

        Args:
            name: The stage.
            data: What its manifest would record of its data.
        """
        stage, lines = self.chain.stages[name], []
        if stage.check_data is None:
            return []
        for kind, source in sources(stage, self.chain.experiment).items():
            for number, part in enumerate(source.parts or (source,), 1):
                if part.path is None and part.hub is None:
                    continue  # the stage world writes it
                record = data[kind]["parts"][str(number)] if source.parts else data[kind]
                lines += self._lines_of(name, kind, part, record)
        return lines

    def remember(self) -> None:
        """Write down what was found right, for later commands."""
        right = [key for key, lines in self._found.items() if not lines]
        known = self._remembered()
        if set(right) <= set(known):
            return
        listed = [*dict.fromkeys([*known, *right])][-MOST_REMEMBERED:]
        self.chain.store.base.mkdir(parents=True, exist_ok=True)
        files.write_json(self._memory, listed)

    @property
    def _memory(self) -> Path:
        return self.chain.store.base / MEMORY

    def _remembered(self) -> list[str]:
        """Return the keys of sources that an earlier command found right."""
        with suppress(OSError, ValueError):
            known = json.loads(self._memory.read_text(encoding="utf-8"))
            if isinstance(known, list):
                return known
        return []

    def _lines_of(self, name: str, kind: str, source: Source, record: dict[str, Any]) -> list[str]:
        """Return the error lines of one source.

        Args:
            name: A stage that reads it.
            kind: The kind of data.
            source: The source; not a mixture.
            record: What the manifest would record of it.
        """
        if source.path is not None:
            facts = self.chain.digests.facts(source.path)
            content: str | None = facts.sha256
            source = replace(source, sha256=content)
        else:
            content = record.get("revision")
            source = replace(source, revision=content or source.revision)
            if not self._is_reached(source):
                return self._unreached(kind, source)
        made_of = {key: item for key, item in record.items() if key not in ("rows", "sha256")}
        key = integrity.sha256_json([kind, content, made_of, code_sha256(READER)])
        if key not in self._found and content is not None and key in self._remembered():
            self._found[key] = []
        if key not in self._found:
            check = self.chain.stages[name].check_data
            assert check is not None
            with self._progress(f"data.{kind}: {source.path or source.hub}") as note:
                self._found[key] = check(kind, source, note)
        return self._found[key]

    def _is_reached(self, source: Source) -> bool:
        """Return whether the Hub has answered for a data set."""
        assert source.hub is not None
        asked = [name for name in self.chain.hub.unanswered if name.name == source.hub]
        return not asked

    def _unreached(self, kind: str, source: Source) -> list[str]:
        """Return an error line for a data set that is not cached, where the Hub gave no answer."""
        assert source.hub is not None
        if source.revision is not None or cached_commits(HubName("dataset", source.hub, source.revision)):
            return []  # `Hub.notes` say so
        problem = "the Hub gave no answer, and this machine's cache does not have it"
        return [f"data.{kind}: {source.hub}: {problem}; check the network, or give a file"]

    @contextmanager
    def _progress(self, what: str) -> Iterator[Any]:
        """Give a function that is told how far reading is, and shows it if that takes long.

        Args:
            what: The kind and the name of the source.
        """
        began = time.monotonic()
        said = False
        with reading_line(what, self.console) as show:

            def note(rows: int, share: float | None) -> None:
                nonlocal said
                if time.monotonic() - began < PATIENCE:
                    return
                if not said:
                    said = True
                    print_line(self.console, f"{what}: is checked whole before anything runs")
                show(rows, share)

            yield note
        if said:
            print_line(self.console, f"{what}: checked in {format_duration(time.monotonic() - began)}")
