"""Find the files that a path stands for: a file, a folder or a glob."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from data.files.json_document import SPLITS
from data.files.raw import without_packed_suffix

FAMILIES: dict[str, tuple[str, ...]] = {
    "json": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "text": (".txt", ".md", ".text", ".markdown"),
}
"""Format → the suffixes of its files, each also with .gz, .xz, .bz2 or .zst after it."""
BESIDE = re.compile(
    r"(README|LICEN[CS]E|NOTICE|CITATION|CHANGELOG|MD5SUMS|SHA256SUMS)(\.\w+)?|_SUCCESS|dataset_infos?\.json|.+\.(py|ya?ml|lock)",
    re.IGNORECASE,
)
"""Names of files that lie beside data and are none."""
SPLIT_WORD = re.compile(rf"(?<![a-z0-9])({'|'.join(SPLITS)})(?![a-z])", re.IGNORECASE)
SAME_SPLIT = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}


def format_of(name: str) -> str | None:
    """Return the format that a file's name says; None for any other name."""
    suffix = Path(without_packed_suffix(name)).suffix.lower()
    return next((family for family, suffixes in FAMILIES.items() if suffix in suffixes), None)


def is_glob(path: str | Path) -> bool:
    """Return whether a path is a glob and not the name of a file."""
    return glob.has_magic(str(path)) and not Path(path).exists()


def matched_files(path: str | Path) -> dict[str, Path]:
    """Return the files of a folder or glob by their names in it, sorted, without hidden ones.

    Args:
        path: A folder, or a glob; the names are relative to the folder before its first wildcard.
    """
    if is_glob(path):
        fixed = Path()
        for part in Path(path).parts:
            if glob.has_magic(part):
                break
            fixed /= part
        found = [Path(match) for match in glob.glob(str(path), recursive=True)]
    else:
        fixed = Path(path)
        found = list(fixed.rglob("*"))
    names = sorted((str(file.relative_to(fixed)), file) for file in found if file.is_file())
    return {name: file for name, file in names if not any(part.startswith(".") for part in Path(name).parts)}


def data_files(path: str | Path, files: dict[str, Path], split: str | None) -> list[Path]:
    """Return the files of a folder or glob that hold rows, in the order in which they are read.

    Args:
        path: The folder or glob.
        files: Its files, as of `matched_files`.
        split: The split that is wanted of several; None: there may be only one.

    Raises:
        ValueError: There are none, or of several formats or splits, or other files among them.
    """
    if not files:
        raise ValueError(
            "matches no file; correct the glob" if is_glob(path) else "the folder holds no files; give one of data"
        )
    by_format: dict[str | None, list[str]] = {}
    for name in files:
        by_format.setdefault(format_of(name), []).append(name)
    aside = {name for name in files if BESIDE.fullmatch(Path(name).name)}
    families = [family for family, names in by_format.items() if family and set(names) - aside]
    families = families or [family for family in by_format if family == "text"]
    if len(families) > 1:
        examples = ", ".join(f"{family} ({by_format[family][0]})" for family in sorted(map(str, families)))
        raise ValueError(f"files of several formats: {examples}; give one as a glob, such as {example_of(path)}")
    others = [name for name in by_format.get(None, []) if name not in aside]
    if others or not families:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        known = " ".join(suffix for suffixes in FAMILIES.values() for suffix in suffixes)
        raise ValueError(f"not known as data: {shown or 'any file'}; give a glob of files that end in {known}")
    family = families[0]
    names = [name for name in by_format[family] if family == "text" or name not in aside]
    return [files[name] for name in of_split(path, names, split)]


def of_split(path: str | Path, names: list[str], split: str | None) -> list[str]:
    """Return the names of one split.

    Args:
        path: The folder or glob, for the error.
        names: Its files.
        split: The split that is wanted of several; None: there may be only one.

    Raises:
        ValueError: There are several splits, and none is named, or one that is not there.
    """
    by_split: dict[str, list[str]] = {}
    for name in names:
        by_split.setdefault(split_in(name), []).append(name)
    if split is None and (family_of_documents(names) or len(by_split) == 1):
        return names
    if split is not None and SAME_SPLIT.get(split, split) in by_split:
        return by_split[SAME_SPLIT.get(split, split)]
    examples = ", ".join(f"{key or 'no split'} ({found[0]})" for key, found in sorted(by_split.items()))
    if set(by_split) == {""}:
        raise ValueError(f"no name of its files has the split {split} in it; leave split out")
    if len(by_split) == 1:
        raise ValueError(f"no files of the split {split}, only of {examples}; name that split, or other files")
    raise ValueError(f"files of several splits: {examples}; give one as a glob, such as {example_of(path)}")


def split_in(name: str) -> str:
    """Return the split that the name of a file says, the last one of several; "" for none."""
    words = [word.lower() for word in SPLIT_WORD.findall(name)]
    return SAME_SPLIT.get(words[-1], words[-1]) if words else ""


def check_split_of_file(path: str | Path, split: str) -> None:
    """Check that a split asked for is the one in the name of a single file.

    Args:
        path: The file.
        split: The split.

    Raises:
        ValueError: It is not, so that nobody knows which rows are meant.
    """
    if split_in(Path(path).name) != SAME_SPLIT.get(split, split):
        raise ValueError(f"split: a file has no splits, and its name does not say {split}; leave split out")


def family_of_documents(names: list[str]) -> bool:
    """Return whether files are texts, whose names may have words such as "test" without meaning."""
    return format_of(names[0]) == "text"


def example_of(path: str | Path) -> str:
    """Return a glob for an error line."""
    return f"{Path(path).parent if is_glob(path) else path}/train*.jsonl"
