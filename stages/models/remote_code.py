"""Handle models that bring their own code.

The code runs only if the user allows it, and is published beside the weights. transformers copies
the Python files of such a folder to its module cache (HF_MODULES_CACHE) and imports them from there
as `transformers_modules.…`. `auto_map` in config.json says which class of which file serves as
what.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError
from stages.models.families import (
    HEAD_FILE,
    SCALAR,
    graft,
    head_problem,
    head_text,
    is_own_head,
    parent_of,
    scalar_name,
)

REMOTE = "transformers_modules."


def from_pretrained(auto: Any, name: str | Path, *, trust_remote_code: bool, where: str = "", **options: Any) -> Any:
    """Return auto.from_pretrained(name, …).

    Args:
        auto: An Auto class of transformers.
        name: A folder or a Hub id.
        trust_remote_code: Whether code that the model brings may run.
        where: The setting that names the model, for the error line.
        options: More of from_pretrained's.

    Raises:
        UserError: Code would have to run that was not allowed.
    """
    try:
        return auto.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        files = ", ".join(sorted(path.name for path in Path(name).glob("*.py")))
        code = f"its own code ({files})" if files else "its own code"
        remedy = "read it, and if you trust it, add --trust-remote-code"
        prefix = f"{where}: " if where else ""
        raise UserError(f"{prefix}{name} brings {code}, which was not run; {remedy}") from None
    finally:
        forget_remote_classes(auto)


def forget_remote_classes(auto: Any) -> None:
    """Let the next load of a model with code be as the first.

    transformers remembers which model class came with a configuration class. It would use it for
    other folders with the same configuration file, and without the `generate` that it adds to older
    code.
    """
    known = auto._model_mapping._extra_content if hasattr(auto, "_model_mapping") else {}
    for kind, model in list(known.items()):
        if any(getattr(c, "__module__", "").startswith(REMOTE) for c in (kind, model)):
            del known[kind]


def is_remote(thing: Any) -> bool:
    """Return whether the class of a model or tokenizer is code that came with it."""
    return type(thing).__module__.startswith(REMOTE)


def keep_code(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Copy every file that the model's auto_map needs, and let auto_map name the copies.

    save_pretrained copies the file of one class only. A model or tokenizer without code of its own
    names none.

    Args:
        model: Its auto_map is changed.
        tokenizer: Its auto_map is removed if it has no code of its own.
        folder: Where to write.
    """
    if not is_remote(tokenizer):
        getattr(tokenizer, "init_kwargs", {}).pop("auto_map", None)
    if not is_remote(model.config) and not is_remote(model):
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map
        if is_own_head(model):
            parent = type(model).__mro__[2]  # after the class and ScalarHead
            model.config.auto_map = {SCALAR: write_head_file(model, type(model).__name__, parent, folder)}
        return
    source, kept = model.config.name_or_path, {}
    commit = getattr(model.config, "_commit_hash", None)  # of a Hub id: what was loaded
    for role, classes in model.config.auto_map.items():
        names = classes if isinstance(classes, (list, tuple)) else [classes]  # of a tokenizer: [slow, fast], or None
        try:
            for name in filter(None, names):
                copy_module(source, name, folder, commit)
        except (OSError, ImportError):
            continue  # a file, or a package that it imports, is missing: a role that is not used here
        own = [name and name.rpartition("--")[2] for name in names]
        kept[role] = own if isinstance(classes, (list, tuple)) else own[0]
    model.config.auto_map = kept


def copy_module(source: str, name: str, folder: Path, commit: str | None = None) -> None:
    """Copy the file of a class, and the files beside it that it imports.

    Args:
        source: The model, a folder or a Hub id.
        name: module.Class, or repository--module.Class.
        folder: Where to write.
        commit: Of `source`, if that is a Hub id.
    """
    from transformers.dynamic_module_utils import get_cached_module_file, get_relative_import_files
    from transformers.utils import HF_MODULES_CACHE

    repository, _, reference = name.rpartition("--")
    revision = commit if repository in ("", source) else None
    found = get_cached_module_file(repository or source, f"{reference.split('.')[0]}.py", revision=revision)
    file = Path(HF_MODULES_CACHE) / found
    for path in (file, *map(Path, get_relative_import_files(file))):
        target = folder / path.relative_to(file.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def write_scalar_head(model: nn.Module, folder: Path) -> None:
    """Write a class of reward models for a published causal model whose code has none that serves.

    It has the model's trunk and the head `score`, in a file beside the model's own.

    Args:
        model: The causal model.
        folder: Where it was published.
    """
    name = write_head_file(model, scalar_name(type(model)), parent_of(model), folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["auto_map"][SCALAR] = name
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_head_file(model: nn.Module, name: str, parent: type, folder: Path) -> str:
    """Write the file of a class with a scalar head on a model's trunk.

    Args:
        model: Gives the trunk and the configuration class.
        name: Of the class.
        parent: The pretrained class of its family.
        folder: Where to write.

    Returns:
        How auto_map names the class.
    """
    text = head_text(name, type(model.base_model), parent, type(model.config), model.base_model_prefix, module_of)
    (folder / HEAD_FILE).write_text(text, encoding="utf-8")
    return f"{HEAD_FILE.removesuffix('.py')}.{name}"


def module_of(kind: type) -> str:
    """Return how a file in the model's folder names the module of a class."""
    remote = kind.__module__.startswith(REMOTE)
    return f".{kind.__module__.rpartition('.')[2]}" if remote else kind.__module__


def scalar_problem(model: nn.Module, folder: Path) -> str | None:
    """Return why a folder's code gives no reward model on a model's trunk, or None if it does.

    Args:
        model: The causal model.
        folder: Where its code is.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, num_labels=1, trust_remote_code=True)
    if SCALAR not in config.auto_map:
        return "it brings no sequence classification"
    try:
        with torch.device("meta"), without_questions():
            scalar = AutoModelForSequenceClassification.from_config(config, trust_remote_code=True)
    except Exception as error:  # code of any kind
        return f"{type(error).__name__}: {error}"
    finally:
        forget_remote_classes(AutoModelForSequenceClassification)
    kind = type(scalar).__name__
    if not kind.endswith("ForSequenceClassification"):
        return f"its sequence classification is a {kind}, and the name should end with ForSequenceClassification"
    if not isinstance(getattr(scalar, "score", None), torch.nn.Linear):
        return f"{kind} has no linear head `score`"
    trunk = {name for name, _ in scalar.named_parameters() if not name.startswith("score.")}
    if missing := sorted(trunk - {name for name, _ in model.named_parameters()}):
        return f"{kind} has weights that {type(model).__name__} lacks ({missing[0]})"
    return head_problem(graft(scalar, model.base_model))


@contextmanager
def without_questions() -> Iterator[None]:
    """Let transformers refuse code that is not allowed, without a question at the terminal.

    A class may itself load another one by name, without a setting for trust.
    """
    from transformers import dynamic_module_utils

    patience, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = patience
