"""Models that bring their own code: it runs only if the user says so, and stands beside the weights in what we publish.

transformers copies such a folder's Python files to its module cache (HF_MODULES_CACHE) and imports them there, as
`transformers_modules.…`; `auto_map` in config.json says which class of which file serves as what.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.errors import UserError
from stages.models.families import (
    HEAD_FILE,
    SCALAR,
    grafted,
    head_problem,
    head_text,
    is_own_head,
    parent_of,
    scalar_name,
)

REMOTE = "transformers_modules."


def read(auto, name, *, trust_remote_code: bool, where: str = "", **options):
    """auto.from_pretrained(name, …), and a UserError where code would have to run that nobody allowed. where: the
    setting that names the model."""
    try:
        return auto.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        files = ", ".join(sorted(path.name for path in Path(name).glob("*.py")))
        code = f"its own code ({files})" if files else "its own code"
        remedy = "read it, and if you trust it, add --trust-remote-code"
        raise UserError(f"{where}{': ' * bool(where)}{name} brings {code}, which was not run; {remedy}") from None
    finally:
        forget(auto)


def forget(auto) -> None:
    """Let the next load of a model with code be as the first: transformers remembers which model class came with a
    configuration class, takes it for other folders with the same configuration file, and without the `generate` that
    it gives to older code."""
    known = auto._model_mapping._extra_content if hasattr(auto, "_model_mapping") else {}
    remote = lambda kind: getattr(kind, "__module__", "").startswith(REMOTE)  # noqa: E731
    for kind in [kind for kind, model in known.items() if remote(kind) or remote(model)]:
        del known[kind]


def is_remote(thing) -> bool:
    """Whether the class of a model or tokenizer is code that came with it."""
    return type(thing).__module__.startswith(REMOTE)


def keep_code(model, tokenizer, folder: Path) -> None:
    """Copy to `folder` every file that the model's auto_map needs (save_pretrained: the file of this one class), and
    let auto_map name these; without code of its own, a model or tokenizer names none."""
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
    commit = getattr(model.config, "_commit_hash", None)  # of a Hub id: what was loaded, whatever is newest by now
    for role, classes in model.config.auto_map.items():
        names = classes if isinstance(classes, (list, tuple)) else [classes]  # a tokenizer's: [slow, fast], or None
        try:
            for name in filter(None, names):
                copy_module(source, name, folder, commit)
        except (OSError, ImportError):
            continue  # a file, or a package that it imports, is not there: a role that nobody here plays
        own = [name and name.rpartition("--")[2] for name in names]
        kept[role] = own if isinstance(classes, (list, tuple)) else own[0]
    model.config.auto_map = kept


def copy_module(source: str, name: str, folder: Path, commit: str | None = None) -> None:
    """The file of the class `name` (module.Class, or repository--module.Class), and those it imports from beside it.
    commit: of `source`, where that is a Hub id."""
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


def write_scalar_head(model, folder: Path) -> None:
    """For a causal model published in `folder` whose code has no sequence classification that serves: a class with its
    trunk and the head `score`, in a file beside its own."""
    name = write_head_file(model, scalar_name(type(model)), parent_of(model), folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["auto_map"][SCALAR] = name
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_head_file(model, name: str, parent: type, folder: Path) -> str:
    """Write the file of the class `name`, a scalar head on the trunk of `model`; → how auto_map names the class."""
    text = head_text(name, type(model.base_model), parent, type(model.config), model.base_model_prefix, module_of)
    (folder / HEAD_FILE).write_text(text, encoding="utf-8")
    return f"{HEAD_FILE.removesuffix('.py')}.{name}"


def module_of(kind: type) -> str:
    """How a file in the model's folder names the module of a class."""
    remote = kind.__module__.startswith(REMOTE)
    return f".{kind.__module__.rpartition('.')[2]}" if remote else kind.__module__


def scalar_problem(model, folder: Path) -> str | None:
    """Why the code in `folder` gives no reward model on the trunk of `model`; None if it does. Nothing is computed."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, num_labels=1, trust_remote_code=True)
    if SCALAR not in config.auto_map:
        return "it brings no sequence classification"
    try:
        with torch.device("meta"), unasked():
            scalar = AutoModelForSequenceClassification.from_config(config, trust_remote_code=True)
    except Exception as error:  # code of any kind
        return f"{type(error).__name__}: {error}"
    finally:
        forget(AutoModelForSequenceClassification)
    kind = type(scalar).__name__
    if not kind.endswith("ForSequenceClassification"):
        return f"its sequence classification is a {kind}, and the name should end with ForSequenceClassification"
    if not isinstance(getattr(scalar, "score", None), torch.nn.Linear):
        return f"{kind} has no linear head `score`"
    trunk = {name for name, _ in scalar.named_parameters() if not name.startswith("score.")}
    if missing := sorted(trunk - {name for name, _ in model.named_parameters()}):
        return f"{kind} has weights that {type(model).__name__} lacks ({missing[0]})"
    return head_problem(grafted(scalar, model.base_model))


@contextmanager
def unasked() -> Iterator[None]:
    """Inside, transformers refuses code that is not allowed, and asks nobody at the terminal: a class may itself load
    another by name, and without a word about trust."""
    from transformers import dynamic_module_utils

    patience, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = patience
