"""Start a server: its port, its tokens, its address, and how it ends."""

import json
import os
import secrets
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.errors import UserError

MOST_CONNECTIONS = 500
"""Requests at a time; beyond them people get a 503 and the page tries again."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Tokens:
    """Hold what a server's addresses consist of, kept over restarts so that links work."""

    page: str
    """Token of the page."""
    lead: str
    """Token of the lead's page."""
    port: int = 0
    """The port of last time."""


def load_tokens(path: Path, renew: bool = False) -> Tokens:
    """Return the tokens in a file; new ones where there is none.

    Args:
        path: The file, which only its owner may read.
        renew: Make new ones in any case: earlier addresses are worth nothing then.

    Raises:
        UserError: The file holds something else.
    """
    if not path.exists() or renew:
        return save_tokens(path, Tokens(secrets.token_urlsafe(24), secrets.token_urlsafe(24)))
    try:
        tokens = Tokens(**json.loads(path.read_text(encoding="utf-8")))
        if not (len(tokens.page) > 15 and len(tokens.lead) > 15 and type(tokens.port) is int):
            raise ValueError
    except (ValueError, TypeError):
        raise UserError(f"{path}: cannot be read as tokens; remove it, and new ones are made") from None
    return tokens


def save_tokens(path: Path, tokens: Tokens) -> Tokens:
    """Write the tokens into a file that only its owner may read, and return them."""
    write_private(path, asdict(tokens))
    return tokens


def write_private(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that only its owner may read, in place of an earlier one."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(content, file)
    temporary.replace(path)


CLOSED_PORTS = frozenset(
    [1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, *range(6665, 6670), 6679, 6697, 10080]
)
"""Ports from 1024 up that browsers refuse, since other services use them (WHATWG, Fetch, § 2.9)."""


def bind(host: str, port: int, key: str, last: int = 0) -> socket.socket:
    """Return a socket bound to a host and a port.

    Args:
        host: The host, or an address of this machine.
        port: The port; 0: the last one if it is free, otherwise any.
        key: The section of the settings, for error lines.
        last: The port of last time; 0 if there was none.

    Raises:
        UserError: It cannot be bound, or browsers do not open it.
    """
    if port in CLOSED_PORTS:
        raise UserError(f"{key}.port: {port} is one that browsers refuse to open; choose another one, or 0 for any")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UserError(f"{key}.host: {host!r} is no address of this machine ({error}); use 127.0.0.1") from None
    tries = [last, 0] if port == 0 and last else [port]
    problem: OSError | None = None
    for number in tries:
        # With the protocol named, asyncio sends small pieces at once; otherwise an answer may wait
        # 40 ms for the delayed acknowledgement of its header.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address[0], number, *address[2:]))
            return listener
        except OSError as error:
            listener.close()
            problem = error
    assert problem is not None
    where = f"{key}.port: {port}" if port else f"{key}.host: {host}"
    raise UserError(f"{where} cannot be used ({problem.strerror}); choose another one")


def address_of(listener: socket.socket, host: str) -> str:
    """Return the address that a browser opens, without a token."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    if ":" in name:
        name = f"[{name}]"
    return f"http://{name}:{listener.getsockname()[1]}"


def exposed_line(host: str, key: str) -> str | None:
    """Return a line for a server that others can reach; None for one on loopback."""
    if host in LOOPBACK or host.startswith("127."):
        return None
    return (
        f"{key}.host: {host} can be reached from other machines, and nothing is encrypted: whoever listens on the "
        f"network reads the token. Put a proxy with TLS in front, or keep 127.0.0.1 and use `ssh -L`"
    )


def serve(
    app: Any,
    listener: socket.socket,
    on_start: Callable[[], None],
    on_stop: Callable[[], None] = lambda: None,
    is_over: Callable[[], bool] = lambda: False,
) -> int:
    """Serve an app until SIGINT or SIGTERM, and return the exit code 0.

    Requests in progress are completed first.

    Args:
        app: The ASGI app.
        listener: The bound socket.
        on_start: Is called when connections are taken.
        on_stop: Is called after the signal, before requests in progress are waited for.
        is_over: Returns whether to end without a signal; asked ten times a second.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
    )
    server = uvicorn.Server(config)
    shut_down, tick = server.shutdown, server.on_tick

    async def stop_first(sockets: list[socket.socket] | None = None) -> None:
        on_stop()
        await shut_down(sockets)

    async def tick_or_end(counter: int) -> bool:
        return is_over() or await tick(counter)

    server.shutdown = stop_first  # type: ignore[method-assign]
    server.on_tick = tick_or_end  # type: ignore[method-assign]

    # uvicorn ends on these signals by itself, and at its end raises them once more for whoever
    # handled them before. That is this function: it has nothing more to do then, and before
    # uvicorn's own handlers stand it makes the server end as soon as it begins.
    def end(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    listener.listen(2048)  # from now on connections wait, and none is refused
    on_start()
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            with suppress(ValueError):
                signal.signal(number, handler)
    return 0
