"""Find and load tasks of lm-evaluation-harness; those of a folder need no network."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from stages.external.quiet import quiet_unless_at_terminal

NEAR = 3
"""Known names that are suggested for one that is not known."""
CODE = "Set confirm_run_unsafe_code"
"""What lm-eval says where a task runs code that the model writes."""


def task_manager(names: Sequence[str], include_path: str | None) -> Any:
    """Return lm-eval's TaskManager that knows the names.

    lm-eval's own 14,000 tasks take ten seconds to list, so they are listed only if the folder does
    not define every name as a task.

    Args:
        names: What the user asks for.
        include_path: The folder with tasks of the user's own.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        folder = str(Path(include_path).expanduser().resolve())  # tasks are loaded from another one
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
        return TaskManager(include_path=folder)
    return TaskManager()


def unknown_tasks(names: Sequence[str], include_path: str | None) -> list[str]:
    """Return a line for each name that is not a task, group or tag, and for missing data files.

    Args:
        names: What the user asks for; `*` stands for any letters.
        include_path: The folder with tasks of the user's own.
    """
    import difflib

    manager = task_manager(names, include_path)
    lines = []
    for name in names:
        if manager.match_tasks([name]) or (Path(name).suffix == ".yaml" and Path(name).is_file()):
            continue
        near = difflib.get_close_matches(name, manager.all_tasks, NEAR)
        advice = f"did you mean {' or '.join(near)}?" if near else "correct it"
        where = "" if include_path is None else f" and none of {include_path}"
        if include_path is None and not near:
            advice += ", or give the folder of your own tasks with --include-path"
        lines.append(f"lm_eval.tasks: {name!r} is no task of lm-eval{where}; {advice}")
    return lines or data_folder(manager, include_path)[1]


def problems_of_tasks(names: Sequence[str], include_path: str | None) -> list[str]:
    """Return why tasks cannot be loaded with their data, a line for each reason.

    Args:
        names: What the user asks for.
        include_path: The folder with tasks of the user's own.
    """
    if lines := unknown_tasks(names, include_path):
        return lines
    try:
        load_tasks(task_manager(names, include_path), names, include_path)
    except UserError as error:
        return error.lines
    return []


def load_tasks(manager: Any, names: Sequence[str], include_path: str | None) -> dict[str, Any]:
    """Load the tasks with their data.

    Args:
        manager: As `task_manager` returns it.
        names: As of `unknown_tasks`, all known.
        include_path: The folder with tasks of the user's own.

    Returns:
        {"tasks": name → task, "groups": name → group, "group_map"}, as `lm_eval.evaluate` takes it.
        Tasks keep a model's answers, so that each model needs its own.

    Raises:
        UserError: Data cannot be read, or a task is wrong.
    """
    folder, lines = data_folder(manager, include_path)
    if lines:
        raise UserError(lines)
    found = [match for name in names for match in manager.match_tasks([name]) or [str(Path(name).resolve())]]
    try:
        with quiet_unless_at_terminal(), contextlib.chdir(folder):
            return manager.load(list(dict.fromkeys(found)))
    except Exception as error:  # whatever datasets, yaml and the task's own functions raise
        raise UserError(f"lm_eval.tasks: {problem_of(error, names)}") from error


def problem_of(error: Exception, names: Sequence[str]) -> str:
    """Return what a failure to load tasks means, and what to do."""
    from pipeline.cli import hub_error

    first = (str(error).strip() or type(error).__name__).split("\n")[0]
    listed = ", ".join(names)
    if hub_error(error) is not None:
        return (
            f"{listed}: data of the Hub cannot be read ({first}); check the network, or give tasks whose data are "
            f"files here with --include-path"
        )
    return f"{listed}: cannot be loaded ({type(error).__name__}: {first}); correct the task's YAML or its data"


def data_folder(manager: Any, include_path: str | None) -> tuple[Path, list[str]]:
    """Return the folder from which the data files of the user's tasks are to be read.

    lm-eval reads relative paths from the working folder. A folder of tasks with their data is read
    from anywhere, too: then from that folder.

    Args:
        manager: lm-eval's TaskManager.
        include_path: The folder with tasks of the user's own.

    Returns:
        The folder, and an error line for each file that is in neither.
    """
    here = Path.cwd()
    if include_path is None:
        return here, []
    own = Path(include_path).expanduser().resolve()
    needed = list(relative_files(manager, own))
    if all((here / name).exists() for _, name in needed):
        return here, []
    lines = [
        f"{yaml}: no data file {name} in {here} or {own}; correct data_files"
        for yaml, name in needed
        if not (own / name).exists()
    ]
    return own, lines


def relative_files(manager: Any, folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield (YAML, path) of the relative data files of the tasks in a folder."""
    for entry in manager.task_index.values():
        if entry.yaml_path is None or not Path(entry.yaml_path).resolve().is_relative_to(folder):
            continue
        for name in texts_of(((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files")):
            if "://" not in name and not Path(name).is_absolute() and not set(name) & set("*?["):
                yield Path(entry.yaml_path), name


def texts_of(value: Any) -> Iterable[str]:
    """Yield the texts in a text, or in a list or mapping of texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_of(part)
