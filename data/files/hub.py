"""Read the rows of a data set on the Hub; null means no such key."""

from __future__ import annotations

from collections.abc import Generator, Sized
from pathlib import Path
from typing import Any

from data.files.reading import Reading
from data.files.tables import first_line, plain


def hub_rows(
    hub: str,
    split: str,
    subset: str | None,
    revision: str | None,
    limit: int | None,
    reading: Reading,
    data_dir: str | None = None,
    data_files: str | None = None,
) -> Generator[tuple[str, dict]]:
    """Read a data set on the Hub row by row.

    Args:
        hub: The id of the data set.
        split: The split, "train" for example.
        subset: The subset; None for the default one.
        revision: A commit, read from this machine's cache if it is there. None: whatever the Hub
            has, or the newest commit in the cache.
        limit: With a limit the rows are streamed, so that no more is downloaded than is read.
        reading: Gets an error line where the data set cannot be loaded, or has no such split.
        data_dir: A folder of the repository; None for all.
        data_files: A file or a glob of the repository; None for all.

    Yields:
        ("ID SPLIT: index I", row), I from 0.
    """
    import datasets

    try:
        # The cache is not searched for a part of a repository: its names do not show the part.
        part = {key: value for key, value in (("data_dir", data_dir), ("data_files", data_files)) if value}
        rows = cached_rows(hub, split, subset, revision) if revision and not part else None
        if rows is None:
            pinned = {"revision": revision} if revision else {}
            streaming = limit is not None
            rows = datasets.load_dataset(hub, subset, split=split, streaming=streaming, **pinned, **part)
    except Exception as error:  # name, subset, split, network: every library below has its own exceptions
        reading.errors.append(f"{hub} {split}: {hub_problem(hub, subset, split, revision, error)}")
        return
    index = 0
    if isinstance(rows, Sized):  # streamed rows have no length
        number = max(1, len(rows))
        reading.file_share = lambda: index / number
    rows = iter(rows)
    while True:
        location = f"{hub} {split}: index {index}"
        try:
            row = next(rows, None)
        except Exception as error:  # the network, or a damaged file, where rows are streamed
            reading.errors.append(f"{location}: cannot be loaded: {first_line(error)}; check the network, run again")
            return
        if row is None:
            return
        index += 1
        try:
            row = plain(row)
        except ValueError as error:
            reading.errors.append(f"{location}: {error}")
            continue
        yield location, row


def hub_problem(hub: str, subset: str | None, split: str, revision: str | None, error: Exception) -> str:
    """Return why a data set cannot be loaded, with its splits if it has no such split.

    Args:
        hub, subset, split, revision: As of `hub_rows`.
        error: What loading it raised.
    """
    reason = first_line(error)
    if "split" in reason.lower() and f"{split}" in reason:
        try:
            import datasets

            splits = datasets.get_dataset_split_names(hub, subset, revision=revision)
        except Exception:  # then what was raised first has to do
            splits = []
        if splits and split not in splits:
            return f"has no split {split!r}; give one of {', '.join(splits)}"
    return f"cannot be loaded: {reason}; check name, split, subset and network, or give a local file"


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
