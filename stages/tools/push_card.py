"""Make a card fit for the Hub: its own name in the examples, and nothing of this machine."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.config.sections import is_hub_id

CARD = "README.md"
TEXTS = (".json", ".jinja", ".py", ".txt", ".md")
"""Suffixes of files that are searched for paths."""
VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"}
"""Files made of pieces of text, in which a path means nothing."""
PATH = re.compile(r"(?<![\w.:/<~*\\-])(?:~|[A-Za-z]:)?/[\w.+@-]+(?:/[\w.+@-]+)+")
"""An absolute path of at least two parts; not a part of an address such as https://…"""
LOCAL = "a local file"
MANIFEST = " `manifest.json` beside it records settings, inputs and digests."
FOLDER = re.compile(r'folder = "[\w]+"  # where this folder is')
ADAPTER = re.compile(r"^## Adapter\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")


def text_for_hub(text: str, repository: str, local: set[str], has_adapter: bool = True) -> str:
    """Return the text of a card as it stands on the Hub.

    Args:
        text: The published card.
        repository: ORG/NAME, which the examples then load.
        local: Names of files and folders of this machine, which are not told.
        has_adapter: Whether the adapter beside the weights is uploaded as well.
    """
    text = text.replace(MANIFEST, "")
    text = FOLDER.sub(f'folder = "{repository}"', text)
    if not has_adapter:
        text = ADAPTER.sub("", text)
    text = PATH.sub(lambda found: LOCAL if is_here(found[0]) else found[0], text)
    return CODE.sub(lambda found: without_names(found[0], local), text)


def without_names(code: str, local: set[str]) -> str:
    """Return a piece of code of a card, or LOCAL if it has one of the names in it."""
    words = set(re.split(r"[\s\"'\[\]{},:]+", code.strip("`")))
    return LOCAL if words & local else code


def local_names(manifests: Mapping[str, dict[str, Any]]) -> set[str]:
    """Return the names of files and folders of this machine that the manifests record.

    Args:
        manifests: Manifests of the stage and of those that led to it.
    """
    names: set[str] = set()
    for manifest in manifests.values():
        config = {key: value for key, value in manifest["config"].items() if key not in ("launch", "tracking")}
        for text in strings_of(config):
            is_function = re.fullmatch(r"[^:\s]+\.py:\w+", text) is not None
            path = text.partition(":")[0] if is_function else text
            if is_function or is_local(path):
                names.add(PurePosixPath(path).name)
                names.add(PurePosixPath(path).stem)
    return names - {"", "model", "."}


def is_local(text: str) -> bool:
    """Return whether a setting's value is a path of this machine, and not a name on the Hub."""
    if not text or len(text) > 4096 or "\n" in text or "://" in text or text.startswith("package:"):
        return False
    looks_like_one = os.sep in text or text.startswith("~") or re.search(r"\.\w{1,8}$", text) is not None
    return looks_like_one and not is_hub_id(text) and " " not in text


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_of(inner)


def path_in(path: Path) -> str | None:
    """Return a path of this machine that a text file names; None if it names none.

    Args:
        path: The file. Others than texts, and vocabularies, are not searched.
    """
    if path.suffix not in TEXTS or path.name in VOCABULARIES:
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    return next((found for found in PATH.findall(text) if is_here(found)), None)


def is_here(text: str) -> bool:
    """Return whether an absolute path leads to, or below, a folder of this machine."""
    path = Path(os.path.expanduser(text)) if text.startswith("~") else Path(text)
    tops = {Path.home(), Path.cwd(), Path("/tmp"), Path("/home"), Path("/Users"), Path("/root")}
    if text.startswith("~") or any(path.is_relative_to(top) for top in tops if len(top.parts) > 1):
        return True
    return path.exists() or (len(path.parts) > 2 and path.parent.exists())


def base_of(config: Path) -> str:
    """Return the base model that an adapter names; "" if it names none."""
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return base if isinstance(base, str) else ""


def names_folder(base: str) -> bool:
    """Return whether the base model of an adapter is a folder, which the Hub does not have."""
    return base == "" or base.startswith((".", "/", "~")) or not is_hub_id(base)
