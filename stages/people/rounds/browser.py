"""Send the ranking page what its script sends from a browser, and again where no answer comes."""

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import Interrupted, UserError

PATIENCE = 15.0
"""Seconds until a request counts as unanswered, as in the page's script."""
GIVE_UP = 120.0
"""Seconds without any answer after which the page counts as gone."""
FIRST_WAIT = 0.25
LONGEST_WAIT = 5.0
BUSY = (429, 503)
"""Statuses that pass: they count as no answer."""


class NotAnswered(Exception):
    """Report that nothing came back, or that the server is busy."""


class Refusal(Exception):
    """Report that the server refuses a request."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        """Build the error from the status and the server's answer."""
        super().__init__(body.get("error") or f"the page refused a request ({status})")
        self.status, self.body = status, body


@dataclass
class Browser:
    """A browser that has opened the page's address: cookies, and one connection."""

    address: str
    """The address with its token."""
    is_stopped: Callable[[], bool]
    """Returns whether to stop."""
    give_up: float = GIVE_UP
    """Seconds without any answer after which the page counts as gone."""
    sent_again: int = 0
    """Requests that were sent again because no answer came."""
    cookies: dict[str, str] = field(default_factory=dict)
    """The session's and the labeler's."""
    connection: http.client.HTTPConnection | None = None
    """The open connection."""

    @property
    def host(self) -> str:
        """Return the host and the port of the page."""
        return urlsplit(self.address).netloc

    def open(self) -> None:
        """Open the address, which begins a session.

        Raises:
            UserError: The page does not answer, or the address is not valid.
            Interrupted: It is to stop.
        """
        parts = urlsplit(self.address)
        try:
            self.ask("GET", f"{parts.path or '/'}?{parts.query}")
        except Refusal as refusal:
            raise UserError(f"{self.address}: {refusal}") from None

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request until it is answered, and return the answer.

        Args:
            method: GET or POST.
            path: The path.
            body: What a POST sends.

        Raises:
            Refusal: The server refuses it.
            UserError: The page does not answer any more.
            Interrupted: It is to stop.
        """
        began, wait = time.monotonic(), FIRST_WAIT
        while True:
            if self.is_stopped():
                raise Interrupted()
            try:
                return self.send(method, path, body)
            except NotAnswered as problem:
                if time.monotonic() - began > self.give_up:
                    raise UserError(
                        f"http://{self.host}: the ranking page has not answered for {self.give_up:.0f} s ({problem}); "
                        f"start it, and then this again"
                    ) from None
                self.sent_again += 1
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)

    def send(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Send a request once, and return the answer; {} for a page.

        Raises:
            NotAnswered: Nothing readable came back, or the server is busy.
            Refusal: The server refuses it.
        """
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items()), "X-RLHF": "1"}
        if body is not None:
            headers |= {"Content-Type": "application/json", "Origin": f"http://{self.host}"}
        try:
            if self.connection is None:
                self.connection = http.client.HTTPConnection(self.host, timeout=PATIENCE)
            self.connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = self.connection.getresponse()
            raw = answer.read()
            is_json = "json" in (answer.headers.get("content-type") or "")
            content = json.loads(raw) if is_json else {}
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise NotAnswered(str(error) or type(error).__name__) from None
        if answer.status in BUSY:
            raise NotAnswered(content.get("error", "busy"))
        if answer.status >= 400:
            raise Refusal(answer.status, content or {"error": raw.decode("utf-8", "replace").strip()})
        for cookie in answer.headers.get_all("set-cookie") or []:
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name.strip()] = value
        return content

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
