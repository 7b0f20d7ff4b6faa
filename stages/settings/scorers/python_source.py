"""Read a user's Python file without running it: its functions, and the local files it imports."""

import ast
from dataclasses import dataclass
from pathlib import Path

GIVEN = frozenset({"prompts", "responses", "finished", "completions", "completion_ids", "log_extra", "log_metric"})
"""Parameters that a function may have beside the keys of the rows of data."""
NOT_GIVEN = frozenset({"trainer_state", "environments"})
"""Parameters that trl gives and that nothing here corresponds to."""


@dataclass(frozen=True)
class Parameters:
    """The parameters of a function, as its file declares them."""

    required: frozenset[str]
    """Those without a default."""
    takes_all: bool
    """Whether it has **columns."""


def parse_file(file: Path) -> ast.Module:
    """Return the syntax tree of a file.

    Raises:
        ValueError: With what is wrong, and where, if it is not Python.
    """
    try:
        return ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno} is not Python ({error.msg}); correct it") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"cannot be read ({error}); give a Python file") from error


def defined_names(tree: ast.Module) -> set[str] | None:
    """Return the names that a module defines at its top level; None if that cannot be told.

    Args:
        tree: The module.
    """
    names: set[str] = set()
    for node in ast.walk(tree):  # also inside `if` and `try`, which may define it as well
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*":
                    return None
                names.add(alias.asname or alias.name.partition(".")[0])
    return names


def parameters_of(tree: ast.Module, function: str) -> Parameters | None:
    """Return the parameters of a function; None if the module does not define it with `def`.

    Args:
        tree: The module.
        function: The function's name.
    """
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function:
            if node.decorator_list:
                return None  # what the decorator returns may take something else
            given = node.args
            positional = given.posonlyargs + given.args
            required = [a.arg for a in positional[: len(positional) - len(given.defaults)]]
            required += [
                a.arg for a, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None
            ]
            return Parameters(frozenset(required), given.kwarg is not None)
    return None


def local_imports(file: Path) -> list[Path]:
    """Return the Python files beside a file that it imports, those included that they import.

    A module is local if it lies in the file's folder, as a file or as a folder of a package, all of
    whose files then count.

    Args:
        file: The file.
    """
    folder = file.resolve().parent
    found: list[Path] = []
    waiting = [file.resolve()]
    while waiting:
        try:
            tree = parse_file(waiting.pop())
        except ValueError:
            continue  # Python itself will say so, if it is ever imported
        for name in sorted(imported_modules(tree)):
            module, package = folder / f"{name}.py", folder / name
            files = sorted(package.rglob("*.py")) if (package / "__init__.py").is_file() else [module]
            for one in files:
                if one.is_file() and one != file.resolve() and one not in found:
                    found.append(one)
                    waiting.append(one)
    return sorted(found)


def imported_modules(tree: ast.Module) -> set[str]:
    """Return the first part of the name of each module that is imported anywhere in a module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names
