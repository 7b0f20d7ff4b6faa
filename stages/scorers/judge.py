"""Score responses by a language model: a grade for each, or a verdict on two.

The prompt is a file, and the verdict is what a regular expression finds in the answer. An answer
without a valid verdict is asked again, more plainly, `attempts` times in all; then it counts as
invalid: a stated grade, or no verdict. Answers are recorded by content (`judge_asking.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pipeline.errors import UserError
from stages.evaluation.judging import Verdict
from stages.scorers.judge_asking import Asker
from stages.scorers.judge_prompts import AGAIN, grade_of, load_prompt, values_of, verdict_of
from stages.scorers.scorer import ScoreRequest, ScorerSpec, Scores, no_poll
from stages.settings.scorers import judge

Found = TypeVar("Found")


@dataclass(frozen=True)
class PairRequest:
    """N pairs of responses that are to be compared."""

    data_rows: Sequence[Mapping[str, Any]]
    """The row of data of each pair's prompt, with `prompt`."""
    first: Sequence[str]
    """The response of each pair that is shown first."""
    second: Sequence[str]
    """The other one."""
    poll: Callable[[], None] = no_poll
    """Is called while waiting; what it raises ends it."""


class JudgeScorer:
    """Grade responses, or compare two."""

    reads_rows = False

    def __init__(self, spec: ScorerSpec) -> None:
        """Take the settings, and read what an earlier start of the run has recorded."""
        assert isinstance(spec.settings, judge.JudgeScorer)
        self.settings, self.name = spec.settings, spec.name
        self.prompt = load_prompt(spec.settings.prompt_file(), spec.name)
        self.asker = Asker(spec)
        self.invalid_answer = ""  # the last answer without a valid verdict, for error lines

    def score(self, request: ScoreRequest) -> Scores:
        """Return the grades (B,); the part `invalid` is 1 where the judge gave no valid verdict.

        Raises:
            ScorerLost, ScorerDropped: If the judge does not answer.
            UserError: If the user has to change something.
        """
        assert self.settings.mode == "grade", "settings refuse a judge of pairs here"
        if request.data_rows is None:
            raise UserError(f"{self.name}: the texts of these prompts are not known; leave this judge out")
        texts = request.response_texts()
        questions = [
            self.prompt(values_of(row) | {"response": text}) for row, text in zip(request.data_rows, texts, strict=True)
        ]
        lowest, highest = self.settings.scale
        pattern = self.settings.pattern()
        grades = self.verdicts(questions, lambda answer: grade_of(answer, pattern, lowest, highest), request.poll)
        middle = self.settings.middle()
        total = torch.tensor([middle if grade is None else grade for grade in grades], dtype=torch.float32)
        return Scores(total, {"invalid": torch.tensor([float(grade is None) for grade in grades])})

    def compare(self, request: PairRequest) -> list[Verdict | None]:
        """Return the verdict on each pair in the order in which it is shown; None is not valid.

        Raises:
            ScorerLost: If the judge does not answer.
            UserError: If the user has to change something.
        """
        assert self.settings.mode == "pairwise"
        questions = [
            self.prompt(values_of(row) | {"response_a": first, "response_b": second})
            for row, first, second in zip(request.data_rows, request.first, request.second, strict=True)
        ]
        pattern = self.settings.pattern()
        return self.verdicts(questions, lambda answer: verdict_of(answer, pattern), request.poll)

    def verdicts(
        self, questions: Sequence[str], read: Callable[[str], Found | None], poll: Callable[[], None]
    ) -> list[Found | None]:
        """Return the verdict on each question; None where no attempt has brought a valid one.

        Args:
            questions: The filled prompts.
            read: Answer → verdict, or None.
            poll: Is called while waiting.
        """
        found: list[Found | None] = [None] * len(questions)
        for attempt in range(self.settings.attempts):
            todo = [i for i, verdict in enumerate(found) if verdict is None]
            if not todo:
                break
            asked = [(questions[i] if attempt == 0 else f"{questions[i].rstrip()}\n\n{AGAIN}", attempt) for i in todo]
            for i, answer in zip(todo, self.asker.answers(asked, poll), strict=True):
                found[i] = read(answer)
                self.invalid_answer = answer if found[i] is None else self.invalid_answer
        return found

    def close(self) -> None:
        """Free a local model, and close the file of the records. May be called twice."""
        self.asker.close()
