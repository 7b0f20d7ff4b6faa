"""Answer the requests of the protocol `rlhf` over HTTP: a body of JSON in, scores out.

It is the standard library's server: a thread a connection, no framework. Requests wait in the line
of one model anyway, there are two addresses, and no dependency is needed to offer a reward model.
"""

import contextlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MOST_BYTES = 32 * 2**20
"""The largest body of a request."""
MOST_DISCARDED = 8 * MOST_BYTES
"""The most bytes of a larger one that are read before it is refused."""
MOST_RESPONSES = 4096
"""The most responses in a request."""
SOCKET_SECONDS = 30.0
"""The longest wait for the next bytes of a client."""
SECONDS_TO_FINISH = 20.0
"""The longest wait, at the end, for requests that are being scored."""
PLACE = "/score"
"""The address of the scores."""

Messages = list[dict[str, str]]


class WrongRequest(ValueError):
    """Say what is wrong with a request: the client gets the text and this status."""

    def __init__(self, text: str, status: int = 400) -> None:
        """Build the error from its text and the HTTP status."""
        self.status = status
        super().__init__(text)


@dataclass(frozen=True)
class Ids:
    """The token ids of a prompt, through the chat template, and of a response."""

    tokenizer: str
    """Tells tokenizers apart (`tokenizer_fingerprint`)."""
    prompt: list[int]
    """Ids, at least one."""
    response: list[int]
    """Ids, with EOS if the response ended by itself."""


@dataclass(frozen=True)
class Batch:
    """The B responses of a request."""

    prompts: list[Messages]
    """The prompt of each response."""
    responses: list[str]
    """Texts, without the end of the turn."""
    finished: list[bool]
    """Whether each ended by itself."""
    ids: list[Ids] | None = None
    """The same as token ids, if the client sends them."""


def parse(body: bytes) -> Batch:
    """Return the responses of a request's body.

    Raises:
        WrongRequest: If it is not {prompts, responses, finished?, ids?}; others are not read.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WrongRequest(f"the body is not JSON ({error}); send {{prompts: […], responses: […]}}") from error
    if not isinstance(value, dict):
        raise WrongRequest("the body is not an object; send {prompts: […], responses: […]}")
    prompts, responses = list_of(value, "prompts"), list_of(value, "responses")
    finished = list_of(value, "finished") if "finished" in value else [True] * len(responses)
    if not responses:
        raise WrongRequest("responses is an empty list; send at least one")
    if len(responses) > MOST_RESPONSES:
        raise WrongRequest(f"{len(responses)} responses; send at most {MOST_RESPONSES} at a time", 413)
    if not len(prompts) == len(responses) == len(finished):
        raise WrongRequest(
            f"{len(prompts)} prompts, {len(responses)} responses and {len(finished)} entries of finished; send one of "
            f"each for every response"
        )
    for index, response in enumerate(responses):
        if not is_text(response):
            raise WrongRequest(f"responses[{index}] is not a text")
        if not isinstance(finished[index], bool):
            raise WrongRequest(f"finished[{index}] is neither true nor false")
    ids = None
    if "ids" in value:
        ids = [ids_of(one, f"ids[{index}]") for index, one in enumerate(list_of(value, "ids"))]
        if len(ids) != len(responses):
            raise WrongRequest(f"{len(ids)} entries of ids for {len(responses)} responses; send one for every response")
    return Batch([messages_of(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)], responses, finished, ids)


def ids_of(value: Any, place: str) -> Ids:
    """Return the ids of a response as the client sent them.

    Args:
        value: {tokenizer, prompt, response}.
        place: Its field, for error lines.
    """
    if isinstance(value, dict) and isinstance(value.get("tokenizer"), str):
        lists = [value.get("prompt"), value.get("response")]
        if lists[0] and all(isinstance(ids, list) and all(type(one) is int for one in ids) for ids in lists):
            return Ids(value["tokenizer"], *lists)
    raise WrongRequest(f"{place} is wrong; send {{tokenizer: TEXT, prompt: [id], response: [id]}}, or leave ids out")


def list_of(value: dict[str, Any], name: str) -> list[Any]:
    """Return a field that must be a list."""
    if not isinstance(value.get(name), list):
        raise WrongRequest(f"{name} is missing or not a list; send {{prompts: […], responses: […]}}")
    return value[name]


def is_text(value: Any) -> bool:
    """Return whether a JSON value is a text; JSON can write half of a letter, which is none."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def messages_of(prompt: Any, place: str) -> Messages:
    """Return a prompt as messages: a text is one message of the user.

    Args:
        prompt: What the client sent.
        place: Its field, for error lines.
    """
    if is_text(prompt):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise WrongRequest(f"{place} is neither a text nor a list of messages")
    for index, message in enumerate(prompt):
        texts = [message.get("role"), message.get("content")] if isinstance(message, dict) else [None]
        if not all(is_text(text) for text in texts):
            raise WrongRequest(f"{place}[{index}] is no message; send {{role: TEXT, content: TEXT}}")
    return prompt


class RewardServer(ThreadingHTTPServer):
    """Listen on an address, and score what is sent there."""

    daemon_threads = True  # a client that sends nothing must not keep the process alive
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self, host: str, port: int, score: Callable[[Batch], list[float]], about: dict[str, Any], key: str | None
    ) -> None:
        """Start to listen; `serve_forever` answers.

        Args:
            host: Address to listen on.
            port: Port; 0: any that is free.
            score: Returns the scores of a batch; raises WrongRequest. It is called by one thread at
                a time.
            about: What /health says besides its status.
            key: What clients must send as `Authorization: Bearer KEY`; None: nothing.

        Raises:
            OSError: If it cannot listen there.
        """
        self.address_family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.score, self.about, self.key = score, about, key
        self.one_at_a_time = threading.Lock()
        self.unanswered = 0
        self.changed = threading.Condition()
        super().__init__(address[:2], RewardHandler)

    def server_bind(self) -> None:
        """Bind without asking the name service for this machine's name, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def url(self) -> str:
        """The address of the scores."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in str(host) else host}:{port}{PLACE}"

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request as unanswered until this ends."""
        with self.changed:
            self.unanswered += 1
        try:
            yield
        finally:
            with self.changed:
                self.unanswered -= 1
                self.changed.notify_all()

    def finish(self, seconds: float = SECONDS_TO_FINISH) -> None:
        """Listen no longer, and wait for the answers to what has come."""
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + seconds
        with self.changed:
            while self.unanswered and time.monotonic() < deadline:
                self.changed.wait(deadline - time.monotonic())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has gone away."""


class RewardHandler(BaseHTTPRequestHandler):
    """Answer the requests of one connection."""

    server: RewardServer
    timeout = SOCKET_SECONDS
    server_version, sys_version = "rlhf", ""

    def do_GET(self) -> None:
        """Answer GET /health, which needs no key."""
        if self.path.split("?")[0] != "/health":
            self.refuse(404, f"there is nothing at this address; POST to {PLACE}, or GET /health")
            return
        self.answer(200, {"status": "ok"} | self.server.about)

    def do_POST(self) -> None:
        """Answer POST /score."""
        with self.server.answering():
            try:
                self.answer(200, {"scores": self.scores()})
            except WrongRequest as error:
                self.refuse(error.status, str(error))

    def scores(self) -> list[float]:
        """Return the scores of the request's responses.

        Raises:
            WrongRequest: With the status and the reason that the client gets.
        """
        if self.path.split("?")[0] != PLACE:
            raise WrongRequest(f"there is nothing at this address; POST to {PLACE}", 404)
        if self.server.key is not None:
            given = self.headers.get("Authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, f"Bearer {self.server.key}".encode()):
                raise WrongRequest("the key is missing or wrong; send `Authorization: Bearer KEY`", 401)
        batch = parse(self.body())
        with self.server.one_at_a_time:
            try:
                return self.server.score(batch)
            except WrongRequest:
                raise
            except Exception as error:
                raise WrongRequest(f"scoring failed ({type(error).__name__}: {error})", 500) from error

    def body(self) -> bytes:
        """Return the body of the request."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise WrongRequest("the header Content-Length is missing; send it, and no chunks", 411)
        if int(length) > MOST_BYTES:
            self.discard(min(int(length), MOST_DISCARDED))  # who is still sending does not read the answer
            raise WrongRequest(f"the body has {int(length)} bytes; send at most {MOST_BYTES} at a time", 413)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise WrongRequest("the body ended early")
        return body

    def discard(self, count: int) -> None:
        """Read so many bytes of the body and forget them."""
        while count > 0 and (chunk := self.rfile.read(min(count, 2**16))):
            count -= len(chunk)

    def refuse(self, status: int, reason: str) -> None:
        """Answer {"error": reason}."""
        self.answer(status, {"error": reason})

    def answer(self, status: int, value: dict[str, Any]) -> None:
        """Send a JSON object, and close the connection."""
        content = json.dumps(value).encode()
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client may have gone away
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer in JSON what the base class would answer in HTML, such as an unknown method."""
        self.refuse(code, message or explain or "the request is wrong")

    def log_message(self, format: str, *args: Any) -> None:
        """Print no line a request."""
