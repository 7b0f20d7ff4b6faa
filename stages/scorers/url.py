"""Score responses by a server, over HTTP.

What was asked once is not asked again: scores are recorded by content (`records.py`). Where no
valid scores come, `on_failure` says whether the run saves and stops, or goes on without them for
now. What a server answers to a request is used whole or not at all.
"""

import json
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from pipeline.errors import UserError
from stages.scorers.http import RequestFailed, key_headers, post_json, without_keys
from stages.scorers.records import Records, key_of
from stages.scorers.scorer import ScorerDropped, ScoreRequest, ScorerLost, ScorerSpec, Scores
from stages.scorers.threads import in_threads
from stages.scorers.url_protocols import PROTOCOLS, Answer, Asked, WrongAnswer, WrongScore, shown
from stages.settings.scorers import url

PROMPT_FIELDS = ("prompts", "prompt", "messages")
"""Where the protocols have the prompt of a response, for error lines."""


class UrlScorer:
    """Score by a server: batches of responses, several requests at a time."""

    reads_rows = False

    def __init__(self, spec: ScorerSpec) -> None:
        """Take the settings, and read what an earlier start of the run has recorded.

        Raises:
            UserError: If the environment lacks the key.
        """
        assert isinstance(spec.settings, url.UrlScorer)
        self.settings, self.name = spec.settings, spec.name
        self.protocol = PROTOCOLS[spec.settings.protocol]
        self.headers = key_headers(spec.settings.key_env)
        folder = spec.records if spec.settings.record else None
        self.records = None if folder is None else Records(folder / spec.name)
        self.is_lost = False

    def score(self, request: ScoreRequest) -> Scores:
        """Return the server's scores (B,), with the parts that it names, on the CPU.

        Raises:
            ScorerLost: If it gives no valid scores (`on_failure: stop`).
            ScorerDropped: The same with `on_failure: drop`.
            UserError: If the data cannot be sent.
        """
        asked = [sendable(one, self.name) for one in self.protocol.asked(request, self.settings)]
        # the address is a part of what was asked: another server may score otherwise
        keys = [key_of([self.settings.url, self.settings.protocol, one]) for one in asked]
        wanted = dict(zip(keys, asked, strict=True))  # equal texts once
        answers = self.recorded(wanted)
        todo = [key for key in wanted if key not in answers]
        size = 1 if self.protocol.one_a_request else self.settings.batch_size
        batches = [todo[start : start + size] for start in range(0, len(todo), size)]

        def post(batch: Sequence[str], stop: threading.Event) -> list[Answer]:
            return self.post([wanted[key] for key in batch], stop)

        try:
            for index, found in in_threads(batches, post, self.settings.concurrency, request.poll):
                new = dict(zip(batches[index], found, strict=True))
                self.record(new)
                answers |= new
        except (RequestFailed, WrongAnswer) as failed:
            self.fail(str(failed))
        self.is_lost = False
        return as_scores([answers[key] for key in keys])

    def close(self) -> None:
        """Close the file of the records. May be called twice."""
        if self.records is not None:
            self.records.close()

    def post(self, asked: Sequence[Asked], stop: threading.Event) -> list[Answer]:
        """Return the answers to a request.

        Args:
            asked: Its responses.
            stop: Once it is set, there are no further attempts.

        Raises:
            RequestFailed: If the server does not answer.
            WrongAnswer: If it answers something else than scores.
        """
        value = post_json(
            self.settings.url,
            self.protocol.body(asked),
            timeout=self.settings.timeout,
            retries=0 if self.is_lost else self.settings.retries,  # an update must not wait long for it again
            headers=self.headers,
            stop=stop,
        )
        try:
            return self.protocol.read(value, len(asked))
        except WrongAnswer as wrong:
            index = wrong.index if isinstance(wrong, WrongScore) else 0
            where = "for prompt" if isinstance(wrong, WrongScore) else "to the request that begins with prompt"
            reason = without_keys(str(wrong).encode(), self.headers).decode()
            raise WrongAnswer(f"answers wrongly {where} {prompt_of(asked[index])}: {reason}") from None

    def recorded(self, wanted: Mapping[str, Asked]) -> dict[str, Answer]:
        """Return the recorded answers among those that are wanted, by key."""
        if self.records is None:
            return {}
        return {key: Answer(**self.records[key]) for key in wanted if key in self.records}

    def record(self, answers: Mapping[str, Answer]) -> None:
        """Record answers, if answers are recorded."""
        if self.records is not None:
            self.records.add({key: {"score": one.score, "parts": dict(one.parts)} for key, one in answers.items()})

    def fail(self, text: str) -> NoReturn:
        """Raise what `on_failure` asks for.

        Args:
            text: What the server did, in one line.
        """
        parts = urllib.parse.urlsplit(self.settings.url)
        line = f"{self.name}: {parts.scheme}://{parts.netloc}{parts.path} {text}"
        self.is_lost = True
        if self.settings.may_drop():
            raise ScorerDropped(line)
        raise ScorerLost(f"{line}; run again to resume when the server answers")


def sendable(asked: Asked, name: str) -> Asked:
    """Return what is sent of a response if JSON can hold it.

    Args:
        asked: What is sent.
        name: The scorer's name.

    Raises:
        UserError: If the row of data holds something else, such as a date or NaN.
    """
    try:
        json.dumps(asked, allow_nan=False)
    except (TypeError, ValueError) as error:
        prompt = prompt_of(asked)
        raise UserError(
            f"{name}: the row of prompt {prompt} cannot be sent as JSON ({error}); leave that key out of the data"
        ) from error
    return asked


def prompt_of(asked: Asked) -> str:
    """Return the beginning of a response's prompt, for an error line."""
    prompt: Any = next((asked[name] for name in PROMPT_FIELDS if name in asked), "")
    if isinstance(prompt, list):
        prompt = next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")
    return shown(prompt)


def as_scores(answers: Sequence[Answer]) -> Scores:
    """Return the scores of B answers; a part that an answer does not name is NaN."""
    names = dict.fromkeys(name for answer in answers for name in answer.parts)
    parts = {name: torch.tensor([answer.parts.get(name, torch.nan) for answer in answers]) for name in names}
    return Scores(torch.tensor([answer.score for answer in answers], dtype=torch.float32), parts)
