"""Answer the requests of the lead's page."""

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from stages.people.rank import exports, lead
from stages.people.rank.lead_figures import overview, read_all
from stages.people.rank.lead_rows import list_rows, whole
from stages.people.rank.state import RankState
from stages.people.web.errors import Handler, Refused, endpoint, text_of

TYPES = {".jsonl": "application/x-ndjson; charset=utf-8", ".zip": "application/zip"}
"""Content types of what is downloaded."""
PIECE = 64 * 1024
"""Bytes of a download that are in memory at a time."""


def routes(state: RankState) -> list[Route]:
    """Return the routes of the lead's page; the gate lets nobody else in."""
    one_at_a_time = threading.Lock()  # figures take seconds of CPU where there are thousands of rankings

    def post(path: str, handler: Handler) -> Route:
        return Route(path, endpoint(handler), methods=["POST"])

    def get(path: str, handler: Handler) -> Route:
        return Route(path, endpoint(handler), methods=["GET"])

    def judge(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        decision, message = decision_in(body)
        made = body.get("made")
        if made is not None and not isinstance(made, int | float):
            raise Refused(400, "made: a time in seconds is needed")
        with state.database.transaction() as connection:
            lead.judge(connection, request.path_params["id"], decision, message, made)
        return {"ok": True}

    def judge_all(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        decision, message = decision_in(body)
        with state.database.transaction() as connection:
            changed = lead.judge_all(connection, request.path_params["id"], decision, message)
        return {"ok": True, "changed": changed}

    def labeler(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        wanted = text_of(body, "state", 20)
        with state.database.transaction() as connection:
            lead.set_labeler(connection, request.path_params["id"], wanted)
        return {"ok": True}

    def figures(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        with_excluded = request.query_params.get("excluded") == "1"
        with one_at_a_time:
            now = state.clock()
            # A connection of its own: labelers go on meanwhile.
            with state.database.read_beside() as connection:
                judged, facts, labelers, progress = read_all(connection, state.rules, now)
            found = overview(judged, facts, labelers, with_excluded)
        return {"experiment": state.experiment, "made": now, "progress": progress, **found}

    def rows(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        whose, before = id_of(request, "labeler"), id_of(request, "before")
        with state.database.read_beside() as connection:
            return list_rows(connection, whose, request.query_params.get("show", "all"), before)

    def row(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        with state.database.read_beside() as connection:
            return whole(connection, request.path_params["id"])

    def download(request: Request, _: dict[str, Any]) -> StreamingResponse:
        form = request.query_params.get("format", "rankings")
        if form not in exports.TOOLS:
            raise Refused(400, f"format: {form!r} is none of {', '.join(exports.TOOLS)}")
        with tempfile.TemporaryDirectory() as folder:
            path = exports.download(state.database, form, Path(folder))
            size = path.stat().st_size
            file = path.open("rb")  # stays readable when the folder is gone, and leaves nothing behind
        day = time.strftime("%Y-%m-%d", time.localtime(state.clock()))
        name = f"{state.experiment}-{form}-{day}{path.suffix}"
        headers = {"Content-Disposition": f'attachment; filename="{name}"', "Content-Length": str(size)}
        return StreamingResponse(pieces(file), media_type=TYPES[path.suffix], headers=headers)

    return [
        get("/api/lead/figures", figures),
        get("/api/lead/rows", rows),
        get("/api/lead/verdicts/{id:int}", row),
        post("/api/lead/verdicts/{id:int}", judge),
        post("/api/lead/labelers/{id:int}", labeler),
        post("/api/lead/labelers/{id:int}/verdicts", judge_all),
        get("/api/lead/download", download),
    ]


def decision_in(body: dict[str, Any]) -> tuple[str, str]:
    """Return the decision and the message of a body."""
    return text_of(body, "decision", 20), text_of(body, "message", lead.LONGEST_MESSAGE, default="")


def id_of(request: Request, name: str) -> int | None:
    """Return an id of the query; None where it is missing.

    Raises:
        Refused: It is no id.
    """
    text = request.query_params.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise Refused(400, f"{name}: a number is needed")
    return int(text)


def pieces(file: BinaryIO) -> Iterator[bytes]:
    """Yield a file in pieces, and close it."""
    with file:
        while piece := file.read(PIECE):
            yield piece
