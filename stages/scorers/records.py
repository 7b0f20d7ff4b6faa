"""Keep the answers of a scorer by content, so that a resumed run gets the answers that it had.

The answers are in JSONL files, one for each process of a run, one object {key, answer} a line. The
key is the digest of what was asked. A line is on disk before its answer is used. What a crash left
of a line is ignored, and asked again.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.launch import parallel
from pipeline.store import files, integrity


def key_of(asked: Any) -> str:
    """Return the key of an answer: the digest of a JSON value that says what was asked."""
    return integrity.sha256_json(asked)


class Records:
    """The answers that a process has recorded, and those of an earlier start of the same run."""

    def __init__(self, folder: Path) -> None:
        """Read the answers that are there; nothing is written yet.

        Args:
            folder: The folder of a scorer's records.
        """
        rank, size = parallel.rank_and_world_size()
        self.path = folder / f"{rank}of{size}.jsonl"
        self.answers: dict[str, Any] = {}
        # those of a run with another number of processes first; this process's own count most
        for path in sorted(folder.glob("*of*.jsonl")):
            if not path.stem.endswith(f"of{size}"):
                self.answers |= read(path)
        self.answers |= read(self.path)
        self.file: Any = None

    def __contains__(self, key: str) -> bool:
        """Return whether the answer to a question is known."""
        return key in self.answers

    def __getitem__(self, key: str) -> Any:
        """Return a known answer."""
        return self.answers[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Record answers; they are on disk when this returns.

        Args:
            answers: Key → answer, a JSON value.
        """
        if not answers:
            return
        rows = [{"key": key, "answer": answer} for key, answer in answers.items()]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with files.name_in_errors(self.path):
            if self.file is None:
                self.file = open_to_append(self.path)
            self.file.write("".join(lines).encode())
            self.file.flush()
            os.fsync(self.file.fileno())
        self.answers |= answers

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self.file is not None:
            self.file.close()
            self.file = None


def read(path: Path) -> dict[str, Any]:
    """Return the answers of a file, by key; none if there is no file.

    A line that is not whole is the last one before a crash: it is left out.
    """
    if not path.is_file():
        return {}
    answers: dict[str, Any] = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            answers.setdefault(row["key"], row["answer"])  # the first one was used
        except (ValueError, KeyError, TypeError):
            continue
    return answers


def open_to_append(path: Path) -> Any:
    """Open a file to append lines, on a line of its own where a crash has left half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_torn = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    file = path.open("ab")
    files.fsync_folder(path.parent)
    if is_torn:
        file.write(b"\n")
    return file
