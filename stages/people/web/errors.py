"""Define the error of a request that is refused, and how requests and answers are read as JSON."""

import json
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pipeline.errors import UserError

Handler = Callable[[Request, dict[str, Any]], dict[str, Any] | Response]
"""What answers a request: takes it and its JSON body, and runs in a thread."""


class Refused(Exception):
    """Report that a request is refused, with a status of HTTP and a sentence for the person."""

    def __init__(self, status: int, sentence: str, **more: Any) -> None:
        """Build the error.

        Args:
            status: The status: 400, 401, 403, 404, 409, 413, 429 or 503.
            sentence: What is wrong and what to do.
            **more: Further keys of the answer.
        """
        super().__init__(sentence)
        self.status, self.sentence, self.more = status, sentence, more


def refusal(status: int, sentence: str, **more: Any) -> JSONResponse:
    """Return the answer to a refused request."""
    return JSONResponse({"error": sentence, **more}, status_code=status)


def endpoint(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Return what Starlette calls for a handler, which runs in a thread."""

    async def answer(request: Request) -> Response:
        body = parse_body(await request.body()) if request.method == "POST" else {}
        result = await run_in_threadpool(handler, request, body)
        return result if isinstance(result, Response) else JSONResponse(result)

    return answer


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return a body as a JSON object whose texts can be written as UTF-8.

    Raises:
        Refused: It is something else.
    """
    try:
        body = json.loads(raw or b"{}", parse_constant=refuse_constant)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair cannot be stored
    except (ValueError, RecursionError):
        raise Refused(400, "the request is not JSON in UTF-8; reload the page") from None
    if not isinstance(body, dict):
        raise Refused(400, "the request is not a JSON object; reload the page")
    return body


def refuse_constant(name: str) -> None:
    """Refuse NaN and infinite numbers, which are not JSON."""
    raise ValueError(name)


async def on_refused(_: Request, error: Exception) -> Response:
    """Answer a request that a handler refused."""
    assert isinstance(error, Refused)
    return refusal(error.status, error.sentence, **error.more)


async def on_http(_: Request, error: Exception) -> Response:
    """Answer a request that Starlette refused: an unknown address or method."""
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, {404: "there is nothing here"}.get(error.status_code, str(error.detail)))


async def on_user_error(_: Request, error: Exception) -> Response:
    """Answer a request that failed by a mistake in files or settings."""
    return refusal(400, " ".join(str(error).split()))


async def on_database(_: Request, error: Exception) -> Response:
    """Answer a request whose transaction failed, such as on a full disk."""
    return refusal(503, f"not saved: the database cannot be written now ({error}); try again")


async def on_bug(_: Request, error: Exception) -> Response:
    """Answer a request that hit a bug; Starlette also prints the traceback."""
    return refusal(500, f"not saved: unexpected {type(error).__name__}; the server's terminal says where")


HANDLERS: dict[Any, Any] = {
    Refused: on_refused,
    HTTPException: on_http,
    UserError: on_user_error,
    sqlite3.Error: on_database,
    Exception: on_bug,
}
"""Exception → what answers, for `Starlette(exception_handlers=...)`."""


def text_of(body: dict[str, Any], key: str, most: int, default: str | None = None) -> str:
    """Return a text of a body, without white space around it.

    Args:
        body: The body.
        key: Its key.
        most: The most characters.
        default: What a missing one stands for; None: it must be there and not be blank.

    Raises:
        Refused: It is missing, no text, or too long.
    """
    value = body.get(key, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise Refused(400, f"{key}: a text is needed")
    if len(value) > most:
        raise Refused(413, f"{key}: {len(value):,} characters are more than {most:,}; shorten it")
    return value.strip()


def number_of(body: dict[str, Any], key: str, low: int, high: int) -> int:
    """Return a whole number of a body.

    Raises:
        Refused: It is none, or out of bounds.
    """
    value = body.get(key)
    if type(value) is not int or not low <= value <= high:
        raise Refused(400, f"{key}: a whole number from {low} to {high:,} is needed")
    return value
