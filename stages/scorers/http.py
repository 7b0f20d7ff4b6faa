"""Post JSON to a server and read JSON back, in bounded time, bytes and attempts.

    post_json(url, body, timeout=60, retries=3, headers=key_headers("MY_KEY"), stop=stop)

blocks its thread; `threads.in_threads` calls it many times at once and listens to signals. It is
made of the standard library: one request a connection, no redirects, the proxies of the environment
except for addresses of this machine.
"""

import contextlib
import http.client
import ipaddress
import json
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from pipeline.errors import UserError

MOST_BYTES = 64 * 2**20
"""The largest answer."""
SHOWN = 200
"""The most characters of an answer in an error line."""
WORTH_RETRYING = {408, 425, 429, 500, 502, 503, 504}
"""HTTP statuses that may be gone the next time."""
LONGEST_PAUSE = 30.0
"""The longest wait before another attempt, in seconds; also where the server asks for more."""


class RequestFailed(Exception):
    """Say why there is no answer, in one line without keys."""

    def __init__(self, text: str, *, status: int | None = None, pause: float | None = None, again: bool = True) -> None:
        """Build the error.

        Args:
            text: Why there is no answer.
            status: The HTTP status, where there was one.
            pause: Seconds that the server asks to wait.
            again: Whether another attempt may help.
        """
        self.status, self.pause, self.again = status, pause, again
        super().__init__(text)


def post_json(
    url: str,
    value: Any,
    *,
    timeout: float,
    retries: int = 0,
    headers: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
    most_bytes: int = MOST_BYTES,
) -> Any:
    """Return the JSON value that a server answers to a JSON value.

    Args:
        url: The address, http or https.
        value: What is sent.
        timeout: Seconds for an attempt, from connecting to the last byte.
        retries: Further attempts where the network or the server fails, after 1, 2, 4, … seconds.
        headers: Further headers. Their values are in no error.
        stop: Once it is set, there are no further attempts.
        most_bytes: The largest answer.

    Raises:
        RequestFailed: If no attempt has brought an answer in JSON.
    """
    content = json.dumps(value, allow_nan=False).encode()
    stop = threading.Event() if stop is None else stop
    for attempt in range(retries + 1):
        try:
            body = attempt_once(url, content, timeout, dict(headers or {}), most_bytes)
            return parse(body, headers or {})
        except RequestFailed as failed:
            if attempt == retries or not failed.again:
                times = f" ({attempt + 1} attempts)" if attempt else ""
                raise RequestFailed(f"{failed}{times}", status=failed.status) from None
            pause = min(2.0**attempt if failed.pause is None else failed.pause, LONGEST_PAUSE)
        if stop.wait(pause):
            break
    raise RequestFailed("was asked to stop")


def key_headers(name: str | None) -> dict[str, str]:
    """Return the header with the key in an environment variable; none without a name.

    Raises:
        UserError: If there is no such variable, or its value is no key. The value is not shown.
    """
    if name is None:
        return {}
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"key_env: the environment has no variable {name}; export it")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"key_env: the variable {name} contains blanks or other letters than ASCII; export the key alone"
        )
    return {"Authorization": f"Bearer {key}"}


def attempt_once(url: str, content: bytes, timeout: float, headers: Mapping[str, str], most_bytes: int) -> bytes:
    """Post once; return the body of the answer.

    Args:
        url: The address.
        content: JSON.
        timeout: Seconds for all of it.
        headers: Further headers.
        most_bytes: The largest answer.

    Raises:
        RequestFailed: If there is no answer, or none with status 200.
    """
    request = urllib.request.Request(
        url, content, {"Content-Type": "application/json", "Accept": "application/json", **headers}, method="POST"
    )
    deadline = time.monotonic() + timeout
    opened: list[socket.socket] = []
    try:
        with cut_off(opened, timeout), opener_for(url, opened).open(request, timeout=timeout) as response:
            body = response.read(most_bytes + 1)
            is_whole = not response.length or len(body) > most_bytes
            if response.status != 200:
                raise RequestFailed(f"answers HTTP {response.status}, not 200", status=response.status, again=False)
    except urllib.error.HTTPError as error:
        with error:
            raise refusal(error, headers) from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        if time.monotonic() >= deadline or is_timeout(error):
            raise RequestFailed(f"has not answered within {timeout:g} seconds") from None
        raise RequestFailed(f"cannot be reached: {reason_of(error)}") from None
    if time.monotonic() >= deadline:  # what was read may end where it was cut off
        raise RequestFailed(f"has not answered within {timeout:g} seconds")
    if not is_whole:
        raise RequestFailed("has broken off its answer")
    if len(body) > most_bytes:
        raise RequestFailed(f"answers more than {most_bytes:,} bytes", again=False)
    return body


def parse(body: bytes, headers: Mapping[str, str]) -> Any:
    """Return the JSON value of an answer. Keys among the request's headers are in no error."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise RequestFailed(f"does not answer JSON: {excerpt(without_keys(body, headers))}", again=False) from None


def refusal(error: urllib.error.HTTPError, headers: Mapping[str, str]) -> RequestFailed:
    """Return the error for a status other than 2xx, with the reason that the server gives."""
    status = error.code
    if 300 <= status < 400:
        place = urllib.parse.urlsplit(error.headers.get("Location") or "")
        to = f"{place.hostname or ''}{place.path}"
        return RequestFailed(f"redirects to {to!r} (HTTP {status}); give the final address", status=status, again=False)
    try:
        body = error.read(4096)
    except (OSError, http.client.HTTPException):
        body = b""
    text = f"answers HTTP {status}: {reason_in(without_keys(body, headers))}"
    pause = error.headers.get("Retry-After") or ""
    return RequestFailed(
        text, status=status, pause=float(pause) if pause.isdecimal() else None, again=status in WORTH_RETRYING
    )


def reason_in(body: bytes) -> str:
    """Return the reason in the body of an error: {error}, {error: {message}}, {detail}, or text."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return excerpt(body)
    for name in ("error", "detail", "message"):
        if isinstance(value, dict) and value.get(name):
            given = value[name]
            found = given.get("message", given) if isinstance(given, dict) else given
            return excerpt((found if isinstance(found, str) else json.dumps(found)).encode())
    return excerpt(body)


def excerpt(body: bytes) -> str:
    """Return the beginning of a text in one line."""
    text = " ".join(body[: 4 * SHOWN].decode(errors="replace").split())
    text = "".join(letter for letter in text if letter.isprintable())
    return (text if len(text) <= SHOWN else f"{text[:SHOWN]}…") or "nothing"


def without_keys(body: bytes, headers: Mapping[str, str]) -> bytes:
    """Return the body of an answer without the keys of its request: a server may repeat them.

    This comes before the body is shortened, which might leave half a key.
    """
    for value in headers.values():
        for secret in (value, value.removeprefix("Bearer ")):
            body = body.replace(secret.encode(), b"[key]").replace(json.dumps(secret)[1:-1].encode(), b"[key]")
    return body


def reason_of(error: BaseException) -> str:
    """Return what an error of the network says, in one line."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if isinstance(cause, OSError) else f"{type(cause).__name__}: {text}"


def is_timeout(error: BaseException) -> bool:
    """Return whether an error of the network means that time ran out."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return isinstance(cause, TimeoutError)


# -- connections -----------------------------------------------------------------------------------


@contextlib.contextmanager
def cut_off(opened: list[socket.socket], seconds: float) -> Iterator[None]:
    """Cut connections off after some time: one that brings a byte now and then never times out.

    Args:
        opened: Their sockets, added as they connect.
        seconds: The time.
    """

    def cut() -> None:
        for connected in opened:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: scores come from the address that the settings name, or not at all."""

    def redirect_request(self, *_: Any) -> None:
        """Return no request, so that the redirect is an error."""
        return None


class Connection(http.client.HTTPConnection):
    """Connect by http, and list the socket."""

    def __init__(self, host: str, opened: list[socket.socket], **options: Any) -> None:
        """Describe the connection; it is not opened yet."""
        super().__init__(host, **options)
        self.opened = opened

    def connect(self) -> None:
        """Connect."""
        super().connect()
        self.opened.append(self.sock)


class SafeConnection(http.client.HTTPSConnection):
    """Connect by https, whose certificate is checked, and list the socket."""

    def __init__(self, host: str, opened: list[socket.socket], **options: Any) -> None:
        """Describe the connection; it is not opened yet."""
        super().__init__(host, context=ssl.create_default_context(), **options)
        self.opened = opened

    def connect(self) -> None:
        """Connect."""
        super().connect()
        self.opened.append(self.sock)


class Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Open addresses of http and https."""

    def __init__(self, opened: list[socket.socket]) -> None:
        """Remember where to list the sockets."""
        super().__init__()
        self.opened = opened

    def http_open(self, request: urllib.request.Request) -> Any:
        """Open an address of http."""
        return self.do_open(partial(Connection, opened=self.opened), request)  # type: ignore[arg-type]

    def https_open(self, request: urllib.request.Request) -> Any:
        """Open an address of https."""
        return self.do_open(partial(SafeConnection, opened=self.opened), request)  # type: ignore[arg-type]


def opener_for(url: str, opened: list[socket.socket]) -> urllib.request.OpenerDirector:
    """Return what opens an address.

    Args:
        url: The address.
        opened: Gets the sockets of the connections that are made.
    """
    proxies = {} if is_this_machine(urllib.parse.urlsplit(url).hostname or "") else None  # None: the environment's
    return urllib.request.build_opener(urllib.request.ProxyHandler(proxies), NoRedirect(), Handler(opened))


def is_this_machine(host: str) -> bool:
    """Return whether a host is this machine, by its name or by a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
