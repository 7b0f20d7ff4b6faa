"""Answer HTTP requests as a test says, on a free port of this machine."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any


@dataclass
class Given:
    """What a test server answers to a request."""

    body: Any = None
    """A value of JSON; bytes are sent as they are."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """How long the answer takes."""
    drip: float | None = None
    """Seconds between two bytes of the answer."""
    claims: int | None = None
    """The Content-Length that is stated; None: the right one."""


@dataclass
class Served:
    """A server in this process."""

    url: str
    requests: list[dict] = field(default_factory=list)
    """JSON of the requests so far."""
    headers: list[dict] = field(default_factory=list)
    """Their headers."""
    most_at_once: int = 0
    """The most requests that were answered at the same time."""


@contextlib.contextmanager
def serving(answer: Callable[[dict, int], Given | Any], port: int = 0) -> Iterator[Served]:
    """Serve while the block runs.

    Args:
        answer: Returns what is answered, from the JSON of a request and its number from 0 on: a
            Given, or a value of JSON.
        port: The port; 0: any that is free.
    """
    lock, now = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(served.requests)
                served.requests.append(body)
                served.headers.append(dict(self.headers))
                now[0] += 1
                served.most_at_once = max(served.most_at_once, now[0])
            try:
                given = answer(body, number)
                given = given if isinstance(given, Given) else Given(given)
                time.sleep(given.seconds)
            finally:
                # before the answer goes: a client that has it may ask again at once
                with lock:
                    now[0] -= 1
            self.send(given)

        def send(self, given):
            content = given.body if isinstance(given.body, bytes) else json.dumps(given.body).encode()
            with contextlib.suppress(OSError):
                self.send_response(given.status)
                for name, value in given.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content) if given.claims is None else given.claims))
                self.end_headers()
                if given.drip is None:
                    self.wfile.write(content)
                else:
                    for byte in content:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(given.drip)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        server_bind = TCPServer.server_bind  # without a name service

    server = Server(("127.0.0.1", port), Handler)
    served = Served(f"http://127.0.0.1:{server.server_address[1]}/score")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with serving(lambda body, number: None) as served:
        return int(served.url.rsplit(":", 1)[1].split("/")[0])
