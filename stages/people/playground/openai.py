"""Answer the clients of OpenAI's interface: /v1/chat/completions and /v1/models.

What a request asks for is done, or refused in OpenAI's form of errors; nothing is left out
in silence.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stages.people.playground.engine import Busy, Engine, Event, Failed, Piece, Question, Reply, Waiting
from stages.people.playground.requests import BadField, Defaults, messages_of, options_of
from stages.people.playground.waiting import ALIVE, EventStream, Gone, Limits, TooMany, Wait
from stages.people.web.security import is_same

LARGEST_BODY = 1024 * 1024
"""Bytes of a request."""
READ = (
    "model", "messages", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "seed", "stop",
    "stream", "stream_options", "user", "safety_identifier", "metadata",
)  # fmt: skip
"""Keys that are read; metadata is for OpenAI's own dashboard."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""Keys whose other values ask for what a policy cannot do → the values that ask for nothing."""
GONE = 499
"""Status for a client that has closed the connection, who never sees it."""


class ApiError(Exception):
    """Report a refused request in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Build the error.

        Args:
            status: The status of HTTP.
            message: What is wrong and what to do.
            kind: OpenAI's `type`.
            code: OpenAI's `code`.
            param: The key of the request that is at fault.
            retry_after: Seconds after which to try again.
        """
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Api:
    """Hold what the interface serves."""

    engine: Engine
    """Answers questions."""
    token: str
    """What clients show as `Authorization: Bearer TOKEN`."""
    defaults: Defaults
    """What holds where a request says nothing."""
    fingerprints: Mapping[str, str]
    """Name of a policy → a word that changes with its weights."""
    limits: Limits
    """Counts the open requests of each user that a client names."""
    created: int
    """When the server began, in seconds since 1970."""


@dataclass(frozen=True)
class Wanted:
    """A chat completion that a client asks for."""

    question: Question
    """The conversation."""
    stream: bool
    """Whether the answer comes in pieces."""
    usage: bool
    """Whether a stream ends with the numbers of tokens."""
    user: str | None
    """The client's name for its user."""


def routes(api: Api) -> Starlette:
    """Return the app below /v1."""

    async def chat(request: Request) -> Response | EventStream:
        return await complete(api, request)

    async def models(request: Request) -> Response:
        authorize(api, request)
        return JSONResponse({"object": "list", "data": [model_of(api, name) for name in api.engine.policies]})

    async def model(request: Request) -> Response:
        authorize(api, request)
        return JSONResponse(model_of(api, known(api, request.path_params["name"])))

    return Starlette(
        routes=[
            Route("/chat/completions", chat, methods=["POST"]),
            Route("/models", models),
            Route("/models/{name:path}", model),
        ],
        exception_handlers={ApiError: on_error, HTTPException: on_http, Exception: on_bug},
    )


async def on_error(_: Request, error: Exception) -> Response:
    """Answer a refused request."""
    assert isinstance(error, ApiError)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers=headers)


async def on_http(request: Request, error: Exception) -> Response:
    """Answer an unknown address or method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: there is nothing here; use /v1/chat/completions or /v1/models"
    return await on_error(request, ApiError(error.status_code, what, code="unknown_url"))


async def on_bug(request: Request, error: Exception) -> Response:
    """Answer a request that hit a bug; Starlette also prints the traceback."""
    return await on_error(request, ApiError(500, f"unexpected {type(error).__name__}", "server_error"))


def authorize(api: Api, request: Request) -> None:
    """Raise ApiError unless the request shows the token."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not is_same(given.strip(), api.token):
        raise ApiError(
            401,
            "the token is missing or wrong; send the one that the server printed as `Authorization: Bearer TOKEN`",
            code="invalid_api_key",
        )


def known(api: Api, name: Any) -> str:
    """Return the name of a policy.

    Raises:
        ApiError: There is none of this name.
    """
    there = ", ".join(api.engine.policies)
    if name is None:
        raise ApiError(400, f"model: is missing; use {there}", code="missing_required_parameter", param="model")
    if not isinstance(name, str) or name not in api.engine.policies:
        raise ApiError(
            404, f"model: {str(name)[:60]!r} is not here; use {there}", code="model_not_found", param="model"
        )
    return name


def model_of(api: Api, name: str) -> dict[str, Any]:
    """Return what /v1/models says of a policy."""
    return {"id": name, "object": "model", "created": api.created, "owned_by": "rlhf"}


async def read_body(request: Request) -> dict[str, Any]:
    """Return the request's body as an object.

    Raises:
        ApiError: It is none, or too large.
    """
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > LARGEST_BODY:
            raise ApiError(413, f"the request has more than {LARGEST_BODY:,} bytes; send less")
    try:
        body = json.loads(raw)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        raise ApiError(400, "the request is not JSON in UTF-8") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the request is not a JSON object")
    return body


def read_wanted(api: Api, body: dict[str, Any]) -> Wanted:
    """Return what a request asks for.

    Raises:
        ApiError: Something in it is wrong, or cannot be done.
    """
    given = {key: value for key, value in body.items() if value is not None}
    for key, value in given.items():
        if key in NEUTRAL and value not in NEUTRAL[key]:
            raise ApiError(400, f"{key}: {json.dumps(value)[:60]} is not supported; leave it out", param=key)
        if key not in NEUTRAL and key not in READ:
            raise ApiError(400, f"{key[:60]}: unknown argument; leave it out", code="unknown_parameter", param=key[:60])
    policy = known(api, given.get("model"))
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise ApiError(400, "max_tokens and max_completion_tokens are one; send one of them", param="max_tokens")
    length_key = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    stream, stream_options = given.get("stream", False), given.get("stream_options", {})
    if type(stream) is not bool:
        raise ApiError(400, "stream: use true or false", param="stream")
    if not isinstance(stream_options, dict) or set(stream_options) - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, "stream_options: only include_usage is supported", param="stream_options")
    user = given.get("safety_identifier", given.get("user"))
    if user is not None and not (isinstance(user, str) and len(user) <= 512):
        raise ApiError(400, "user: use a text of at most 512 characters", param="user")
    try:
        messages, options = messages_of(given.get("messages")), options_of(given, api.defaults, length_key)
    except BadField as error:
        raise ApiError(400, str(error), code="invalid_value", param=error.key) from None
    question = Question(policy, messages, options, forgets=False, scored=False)
    return Wanted(question, stream, stream_options.get("include_usage") is True, user)


async def complete(api: Api, request: Request) -> Response | EventStream:
    """Answer POST /v1/chat/completions.

    The status is sent only once the answer has begun, so that a client sees what is wrong as the
    status that it knows.
    """
    authorize(api, request)
    wanted = read_wanted(api, await read_body(request))
    person = None if wanted.user is None else f"v1:{wanted.user}"
    if person is not None:
        try:
            api.limits.enter(person)
        except TooMany as error:
            raise ApiError(429, str(error), "rate_limit_error", "rate_limit_exceeded", retry_after=1) from None
    wait: Wait | None = None
    handed_on = False

    def at_end() -> None:
        if wait is not None:
            wait.cancel()
        if person is not None:
            api.limits.leave(person)

    try:
        wait = Wait(api.engine, [wanted.question])
        _, event = await wait.next_for(request)
        while isinstance(event, Waiting) or not (wanted.stream or isinstance(event, Reply | Failed)):
            _, event = await wait.next_for(request)
        if isinstance(event, Failed):
            raise error_of(event)
        if wanted.stream:
            handed_on = True
            return EventStream(stream(api, wanted, wait, event), at_end)
        assert isinstance(event, Reply)
        return JSONResponse(completion_of(api, wanted, event))
    except Busy as error:
        raise ApiError(503, str(error), "server_error", "overloaded", retry_after=error.retry_after) from None
    except Gone:
        return Response(status_code=GONE)
    finally:
        if not handed_on:
            at_end()


async def stream(api: Api, wanted: Wanted, wait: Wait, first: Event) -> AsyncIterator[str]:
    """Yield the server-sent events of an answer whose first event has come."""
    head = head_of(api, wanted, "chat.completion.chunk")
    if wanted.usage:
        head["usage"] = None  # in every chunk but the last, as OpenAI has it
    yield line_of(head | {"choices": [choice_of({"role": "assistant", "content": ""}, None)]})
    event: Event = first
    while True:
        if isinstance(event, Piece):
            yield line_of(head | {"choices": [choice_of({"content": event.text}, None)]})
        elif isinstance(event, Failed):
            yield line_of(error_of(event).body)
            return
        elif isinstance(event, Reply):
            yield line_of(head | {"choices": [choice_of({}, reason_of(event))]})
            if wanted.usage:
                yield line_of(head | {"choices": [], "usage": usage_of(event)})
            yield "data: [DONE]\n\n"
            return
        while (found := await wait.next(ALIVE)) is None:
            yield ": waiting\n\n"
        event = found[1]


def line_of(event: Mapping[str, Any]) -> str:
    """Return an object as a server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


def head_of(api: Api, wanted: Wanted, kind: str) -> dict[str, Any]:
    """Return what every part of an answer begins with."""
    policy = wanted.question.policy
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": policy,
        "system_fingerprint": api.fingerprints.get(policy),
    }


def choice_of(delta: Mapping[str, str], reason: str | None) -> dict[str, Any]:
    """Return the only choice of a chunk."""
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


def completion_of(api: Api, wanted: Wanted, reply: Reply) -> dict[str, Any]:
    """Return a whole answer."""
    message = {"role": "assistant", "content": reply.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason_of(reply)}
    return head_of(api, wanted, "chat.completion") | {"choices": [choice], "usage": usage_of(reply)}


def reason_of(reply: Reply) -> str:
    """Return why an answer has ended."""
    return "stop" if reply.finished else "length"


def usage_of(reply: Reply) -> dict[str, int]:
    """Return how many tokens were read and written."""
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.tokens,
        "total_tokens": reply.prompt_tokens + reply.tokens,
    }


def error_of(event: Failed) -> ApiError:
    """Return the error of an answer that failed."""
    if event.is_users:
        return ApiError(400, event.sentence, code=event.code, param="messages")
    status = 503 if event.code == "stopped" else 500
    return ApiError(status, event.sentence, "server_error", event.code, retry_after=30 if status == 503 else None)
