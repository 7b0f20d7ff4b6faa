"""Read rows from parquet files and from data sets on the Hub; null means no such key."""

import hashlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from data.files.json_rows import Reading


def is_parquet(path: str | Path) -> bool:
    """Return whether a file's name ends in .parquet."""
    return Path(path).suffix.lower() == ".parquet"


def parquet_rows(path: str | Path, reading: Reading) -> Generator[tuple[str, dict]]:
    """Read a parquet file row by row.

    Args:
        path: The file.
        reading: Gets an error line where the file cannot be read, and its digest if asked for.

    Yields:
        ("FILE: index I", row), I from 0.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    index = 0
    try:
        content = Path(path).read_bytes()  # at once, so that the bytes hashed are the bytes read
        if reading.hashes:
            reading.sha256 = hashlib.sha256(content).hexdigest()
        with ParquetFile(pyarrow.BufferReader(content)) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    yield f"{path}: index {index}", without_nulls(row)
                    index += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reading.errors.append(f"{path}: not readable as parquet: {first_line(error)}; write it again")


def hub_rows(
    hub: str, split: str, subset: str | None, revision: str | None, limit: int | None, reading: Reading
) -> Generator[tuple[str, dict]]:
    """Read a data set on the Hub row by row.

    Args:
        hub: The id of the data set.
        split: The split, "train" for example.
        subset: The subset; None for the default one.
        revision: A commit, read from this machine's cache if it is there. None: whatever the Hub
            has, or the newest commit in the cache.
        limit: With a limit the rows are streamed, so that no more is downloaded than is read.
        reading: Gets an error line where the data set cannot be loaded.

    Yields:
        ("ID SPLIT: index I", row), I from 0.
    """
    import datasets

    try:
        rows = cached_rows(hub, split, subset, revision) if revision else None
        if rows is None:
            pinned = {"revision": revision} if revision else {}
            rows = datasets.load_dataset(hub, subset, split=split, streaming=limit is not None, **pinned)
        for index, row in enumerate(rows):
            yield f"{hub} {split}: index {index}", without_nulls(row)
    except Exception as error:  # name, subset, split, network: every library below has its own exceptions
        remedy = "check name, split, subset and network, or give a local file"
        reading.errors.append(f"{hub} {split}: cannot be loaded: {first_line(error)}; {remedy}")


def cached_rows(hub: str, split: str, subset: str | None, commit: str) -> Any:
    """Return the rows of a commit from the cache of `datasets`; None if it is not there.

    Without a network, `datasets` itself would silently take the newest commit that it has prepared.

    Args:
        hub: The id of the data set.
        split: The split.
        subset: The subset; None for the default one, or the only one in the cache.
        commit: The full commit id.

    Raises:
        ConnectionError: Other commits are on this machine, and the Hub does not give this one.
    """
    import datasets
    from huggingface_hub import HfApi

    try:
        from datasets.naming import camelcase_to_snakecase
        from datasets.packaged_modules.cache.cache import Cache
    except ImportError:  # internals of `datasets`: a version without them takes the commit from the Hub
        return None
    *owner, name = hub.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(name)])
    # The cache's layout: SUBSET/VERSION/COMMIT
    prepared = [path for path in folder.glob("*/*/*") if path.is_dir() and subset in (None, path.parts[-3])]
    by_subset = {path.parts[-3]: path for path in prepared if path.name == commit}
    only = next(iter(by_subset.values()), None)
    found = by_subset.get("default") if len(by_subset) > 1 else only
    if found is not None:
        config, version, _ = found.parts[-3:]
        builder = Cache(dataset_name=name, repo_id=hub, config_name=config, version=version, hash=commit)
        return builder.as_dataset(split=split)
    if prepared and not by_subset:
        try:
            HfApi().dataset_info(hub, revision=commit, timeout=10.0)
        except Exception as error:
            known = ", ".join(sorted({path.name[:7] for path in prepared}))
            raise ConnectionError(
                f"commit {commit[:7]} is not on this machine (commits {known} are), and the Hub does not give it: "
                f"{first_line(error)}"
            ) from error
    return None


def without_nulls(row: dict) -> dict:
    """Return a row without the keys whose value is null."""
    return {key: value for key, value in row.items() if value is not None}


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
