"""Score responses by a Python function of the user.

    def score(prompts, responses, **columns): ...

returns a list with an entry for each response: a number, None where the function does not apply, or
{"score": number, part: number, …}. It gets what it has parameters for, each a list with one entry a
response: `prompts` (texts or messages, as the data have them), `responses` (texts), `finished`
(whether each ended by itself), any key of the rows of data (`answer`, …), and what trl's reward
functions get: `completions` (texts, or messages where the prompts are messages) and
`completion_ids`. It may be a coroutine function.

A score that cannot be had ends the run, or is `error_score` (`on_error`). Which response it was is
found by calling again with one response at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.errors import UserError
from stages.scorers.python_pool import Pool
from stages.scorers.python_worker import BadAnswer, CallFailed, Columns, Outcome, call, load_function
from stages.scorers.scorer import ScoreRequest, ScorerSpec, Scores, part_columns
from stages.settings.scorers import python

SHOWN = 60
"""The most characters of a prompt or response in an error line."""


class PythonScorer:
    """Score by the function that the settings name, in this process or in workers."""

    reads_rows = False

    def __init__(self, spec: ScorerSpec) -> None:
        assert isinstance(spec.settings, python.PythonScorer)
        self.name, self.say, self.settings = spec.name, spec.say, spec.settings
        self.file, function = spec.settings.file_and_function()
        self.errors = self.errors_said = 0  # so far; of them, when a line last said so
        self.has_said_singly = False
        self.pool: Pool | None = None
        processes = spec.settings.processes()
        if processes:
            self.pool = Pool(self.file, function, processes, spec.settings.timeout)
            self.pool.start()
            return
        try:
            self.function = load_function(self.file, function)
        except CallFailed as error:
            raise UserError(str(error)) from error

    def score(self, request: ScoreRequest) -> Scores:
        """Return the function's scores (B,), on the CPU; NaN where it does not apply."""
        columns = columns_of(request, self.settings.completions)
        outcomes = self.outcomes(columns, request)
        problems = {i: outcome["problem"] for i, outcome in enumerate(outcomes) if "problem" in outcome}
        if problems and self.settings.on_error == "stop":
            i = min(problems)
            raise UserError(f"{self.place(request, i)} {problems[i]}; correct it, or set on_error: score")
        if problems:
            self.count(request, problems)
        scores = [
            self.settings.error_score if i in problems else outcome["score"] for i, outcome in enumerate(outcomes)
        ]
        parts = part_columns([outcome.get("parts", {}) for outcome in outcomes])
        if self.settings.on_error == "score":
            parts["errors"] = torch.tensor([float(i in problems) for i in range(len(outcomes))])
        return Scores(torch.tensor([torch.nan if score is None else score for score in scores]), parts)

    def outcomes(self, columns: Columns, request: ScoreRequest) -> list[Outcome]:
        """Return what the function says of each response, calling it again where a call fails.

        Args:
            columns: What it is given.
            request: Prompts and responses, for `poll`.
        """
        count = len(columns["responses"])
        chunks = slices(count, 1 if self.pool is None else self.pool.size)
        answers = self.calls([chosen(columns, chunk) for chunk in chunks], request)
        outcomes: list[Outcome] = []
        for chunk, answer in zip(chunks, answers, strict=True):
            if not isinstance(answer, CallFailed):
                outcomes += answer
                continue
            outcomes += self.singly(columns, chunk, answer, request)
            if "problem" in outcomes[-1] and self.settings.on_error == "stop":
                break
        return outcomes

    def singly(self, columns: Columns, chunk: range, failure: CallFailed, request: ScoreRequest) -> list[Outcome]:
        """Return the outcomes of a call that failed, from a call for each response.

        With `on_error: stop` the first problem is the last outcome.

        Args:
            columns: What the function is given.
            chunk: The responses of the call.
            failure: Why it failed.
            request: Prompts and responses, for `poll`.
        """
        if len(chunk) == 1:
            return [{"problem": str(failure)}]
        outcomes: list[Outcome] = []
        at_once = 1 if self.pool is None else self.pool.size
        for start in range(chunk.start, chunk.stop, at_once):
            few = range(start, min(start + at_once, chunk.stop))
            for answer in self.calls([chosen(columns, range(i, i + 1)) for i in few], request):
                outcomes.append({"problem": str(answer)} if isinstance(answer, CallFailed) else answer[0])
                if "problem" in outcomes[-1] and self.settings.on_error == "stop":
                    return outcomes
        if not any("problem" in outcome for outcome in outcomes) and not self.has_said_singly:
            self.has_said_singly = True
            self.say(
                f"{self.name}: with {len(chunk)} responses it {failure}, and with one at a time it did not; scored one "
                f"at a time where that happens"
            )
        return outcomes

    def calls(self, tasks: Sequence[Columns], request: ScoreRequest) -> list[list[Outcome] | CallFailed]:
        """Make calls of the function and return the outcomes of each, or why it has none."""
        try:
            if self.pool is not None:
                return self.pool.calls(tasks, request.poll)
            answers: list[list[Outcome] | CallFailed] = []
            for task in tasks:
                request.poll()
                try:
                    answers.append(call(self.function, task, self.file))
                except CallFailed as failure:
                    answers.append(failure)
            return answers
        except BadAnswer as error:
            raise UserError(f"{self.settings.python}: {error}") from error

    def place(self, request: ScoreRequest, i: int) -> str:
        """Return where the prompt of a response is, and what both say, as an error line begins."""
        row = (request.data_rows or [{}] * (i + 1))[i]
        where = request.places[i] if request.places else "a prompt"
        prompt, response = (shown(text) for text in (row.get("prompt"), request.response_texts()[i]))
        return f"{where}: {self.settings.python}, for the prompt {prompt} and the response {response},"

    def count(self, request: ScoreRequest, problems: dict[int, str]) -> None:
        """Print a line about responses that got `error_score`, whenever their number has doubled.

        Args:
            request: Prompts and responses.
            problems: Why a response has no score, by its index.
        """
        self.errors += len(problems)
        if self.errors < 2 * self.errors_said:
            return
        self.errors_said = self.errors
        i = min(problems)
        self.say(
            f"{self.place(request, i)} {problems[i]}; {self.errors:,} so far got error_score = "
            f"{self.settings.error_score:g}"
        )

    def close(self) -> None:
        """End the workers."""
        if self.pool is not None:
            self.pool.close()


def columns_of(request: ScoreRequest, completions: str | None) -> Columns:
    """Return what a function can be given: a list with one entry a response under each name.

    Args:
        request: Prompts, responses and rows of data.
        completions: Whether `completions` are "text" or "messages"; None: as each prompt is.
    """
    rows = request.data_rows or [{} for _ in request.responses]
    columns: Columns = {key: [row.get(key) for row in rows] for row in rows for key in row}
    columns.pop("prompt", None)
    texts = request.response_texts()
    as_messages = [completions == "messages" or (completions is None and is_conversation(row)) for row in rows]
    columns["prompts"] = [row.get("prompt") for row in rows]
    columns["responses"] = texts
    columns["finished"] = request.finished()
    columns["completions"] = [
        [{"role": "assistant", "content": text}] if messages else text
        for text, messages in zip(texts, as_messages, strict=True)
    ]
    columns["completion_ids"] = [list(ids) for ids in request.responses]
    return columns


def is_conversation(row: Any) -> bool:
    """Return whether the prompt of a row is messages."""
    return not isinstance(row.get("prompt", ""), str)


def slices(count: int, parts: int) -> list[range]:
    """Return the indices of responses in at most so many ranges of about the same length."""
    size = max(1, -(-count // parts))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def chosen(columns: Columns, indices: range) -> Columns:
    """Return the entries of some responses in each column."""
    return {name: column[indices.start : indices.stop] for name, column in columns.items()}


def shown(text: Any) -> str:
    """Return a text, or messages, in quotes and shortened for an error line."""
    whole = text if isinstance(text, str) else " … ".join(message["content"] for message in text or [])
    words = " ".join(whole.split())
    return f"{words if len(words) <= SHOWN else words[: SHOWN - 1] + '…'!r}"
