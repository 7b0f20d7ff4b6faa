"""Call a function of the user; as a program, do it for another process.

This file needs only the standard library, so that a worker starts fast. `python_pool.py` starts
it with the number of a connection, the file and the name of the function. The worker sends what
came of loading it, {} or {"refused": why}; then it answers each dictionary of columns with
{"outcomes": …} or {"failed": why}, and with what was `printed`.
"""

import asyncio
import contextlib
import ctypes
import importlib.util
import inspect
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Columns = dict[str, list]
"""Name of a parameter → one entry for each response."""
Outcome = dict[str, Any]
"""{"score": number or None, "parts": {name: number}}, or {"problem": why there is no number}."""

LARGEST = 3.4e38
"""The largest number that counts as finite: scores are float32."""

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that this process gets when its parent ends


class CallFailed(Exception):
    """Say why a call gave no scores: it raised, took too long, or its process ended."""


class BadAnswer(Exception):
    """Say that an answer is not one entry for each response: the function itself is wrong."""


def load_function(file: Path, name: str) -> Callable[..., Any]:
    """Return a function of a file; modules beside the file can be imported.

    Raises:
        CallFailed: The file cannot be imported, or has no such function.
    """
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise CallFailed(f"{file}: cannot be imported ({described(error, file)}); correct it") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise CallFailed(f"{file}: has no function {name}; define it, or name another one")
    return function


def call(function: Callable[..., Any], columns: Columns, file: Path) -> list[Outcome]:
    """Call a function and return what it says of each response.

    Args:
        function: The function, which may be a coroutine function.
        columns: What it can be given.
        file: Its file, whose line is named if it raises.

    Raises:
        CallFailed: It raised.
        BadAnswer: The answer is not one entry for each response.
    """
    try:
        answer = function(**arguments(function, columns))
        if inspect.isawaitable(answer):
            answer = result_of(answer)
        if inspect.isgenerator(answer):  # the function's code runs only now
            answer = list(answer)
    except (Exception, SystemExit) as error:
        raise CallFailed(f"raised {described(error, file)}") from error
    count = len(columns["responses"])
    try:
        answers = list(answer)
    except TypeError as error:
        raise BadAnswer(f"gave {short(answer)} for {count} responses; give a list with a number for each") from error
    if isinstance(answer, Mapping | str) or len(answers) != count:
        what = short(answer) if isinstance(answer, Mapping | str) else f"{len(answers)} scores"
        raise BadAnswer(f"gave {what} for {count} responses; give a list with a number for each")
    return [outcome_of(one) for one in answers]


def result_of(awaitable: Any) -> Any:
    """Return what an awaitable comes to; a notebook's thread has a loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(finished(awaitable))
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, finished(awaitable)).result()


async def finished(awaitable: Any) -> Any:
    """Return what an awaitable comes to."""
    return await awaitable


def arguments(function: Callable[..., Any], columns: Columns) -> dict[str, Any]:
    """Return the arguments of a function: the columns that it has parameters for.

    Args:
        function: The user's function. With **columns it gets all of them. A parameter without a
            default that no row here has a key for gets a list of None: rows of another source may.
        columns: What it can be given.
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        given: dict[str, Any] = dict(columns)
    else:
        given = {name: column for name, column in columns.items() if name in parameters}
    for name, parameter in parameters.items():
        is_variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if name in given or is_variable or parameter.default is not parameter.empty:
            continue
        # trl's loggers, where a function insists on them
        given[name] = ignore if name in ("log_extra", "log_metric") else [None] * len(columns["responses"])
    return given


def ignore(*args: Any) -> None:
    """Stand in for trl's functions that log; what counts is what a scorer returns as parts."""


def outcome_of(answer: Any) -> Outcome:
    """Return what a function says of one response: a number, None, or {score, part: …}."""
    if not isinstance(answer, Mapping):
        answer = {"score": answer}
    if "score" not in answer:
        return {"problem": f"gave {short(dict(answer))}, which has no score"}
    parts: dict[str, float] = {}
    for name, value in answer.items():
        if value is None and name == "score":
            continue
        number = number_of(value)
        if number is None:
            return {"problem": f"gave {short(value)} as {name}, which is not a finite number"}
        parts[str(name)] = number
    return {"score": parts.pop("score", None), "parts": parts}


def number_of(value: Any) -> float | None:
    """Return a value as a float, those of numpy and torch too; None if float32 has none such."""
    if not hasattr(value, "__float__"):
        return None
    try:
        number = float(value)
    except Exception:  # an array of several numbers, or whatever a class of the user raises
        return None
    return number if abs(number) <= LARGEST else None  # false of NaN, too


def described(error: BaseException, file: Path) -> str:
    """Return an exception in a line, with the last line of the user's file that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")
    return f"{text} at line {lines[-1]} of {file.name}" if lines else text


def short(value: Any, most: int = 60) -> str:
    """Return a value as Python shows it, in at most so many characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[: most - 1] + "…"


# ── as a program ─────────────────────────────────────────────────────────────────────────────────


def main(connection: Connection, file: Path, name: str, parent: int) -> None:
    """Answer requests until the connection ends.

    Args:
        connection: To the process that asks.
        file: The user's file.
        name: The function.
        parent: The process that asks. This one ends with it, even in the middle of a call.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    end_with(parent)
    os.dup2(2, 1)  # whatever prints without Python's help goes to standard error
    try:
        with contextlib.redirect_stdout(sys.stderr):
            function = load_function(file, name)
    except CallFailed as error:
        connection.send({"refused": str(error)})
        return
    connection.send({})
    while True:
        try:
            columns = connection.recv()
        except (EOFError, ConnectionError):
            return
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                answer: dict[str, Any] = {"outcomes": call(function, columns, file)}
        except CallFailed as error:
            answer = {"failed": str(error)}
        except BadAnswer as error:
            answer = {"bad": str(error)}
        connection.send(answer | {"printed": printed.getvalue()})


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, where the kernel can (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(1)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
