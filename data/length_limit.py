"""Apply max_length to encoded prompts and responses: refuse, drop or truncate, and count."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data.records import Ranking, judged_pairs
from pipeline.errors import UserError

NAMED_ROWS = 5
"""Rows that are too long and get an error line of their own; the others are counted."""


@dataclass
class LengthReport:
    """Count what the length limit did to a data set."""

    kept: int = 0
    """Rows kept whole."""
    truncated: int = 0
    """Rows whose responses lost their end."""
    dropped: int = 0
    """Rows left out."""
    longest: int = 0
    """Tokens of the longest row, before truncation."""
    problems: list[str] = field(default_factory=list)
    """An error line for each row that is refused."""
    equal: list[str] = field(default_factory=list)
    """The location of each pair of different responses whose ids are equal within the limit."""
    ties: int = 0
    """Pairs of rankings that are tied."""

    def __add__(self, other: "LengthReport") -> "LengthReport":
        """Return the report of two data sets together."""
        return LengthReport(
            kept=self.kept + other.kept,
            truncated=self.truncated + other.truncated,
            dropped=self.dropped + other.dropped,
            longest=max(self.longest, other.longest),
            problems=self.problems + other.problems,
            equal=self.equal + other.equal,
            ties=self.ties + other.ties,
        )

    def line(self, what: str) -> str:
        """Return one line for people; `what` names the rows."""
        text = (
            f"{what}: {self.kept} rows, {self.truncated} truncated, {self.dropped} dropped, "
            f"longest {self.longest} tokens"
        )
        if self.equal:
            pairs = "1 pair" if len(self.equal) == 1 else f"{len(self.equal)} pairs"
            text += f"; {pairs} left out, equal within max_length (the first: {self.equal[0]})"
        return text


def fit_lengths(
    prompts: Sequence[list[int]],
    responses: Sequence[Sequence[list[int]]],
    *,
    max_length: int,
    on_too_long: str,
    what: str,
    names: Sequence[str],
    section: str,
) -> tuple[list[int], list[list[int]], list[list[list[int]]], LengthReport]:
    """Apply `on_too_long` to rows of one prompt and its responses; the longest response counts.

    Args:
        prompts: The ids of each row's prompt.
        responses: The ids of each row's responses; none if there are only prompts.
        max_length: Tokens of a prompt and one response together.
        on_too_long: "error" refuses and names the rows; "drop" leaves the row out; "truncate" cuts
            the end of the responses (their EOS goes with it, so that no model is trained to end
            there) and drops the row only if its prompt leaves no token for a response.
        what: What a row is, for error lines.
        names: The location of each row, for error lines.
        section: The section of the config that has the limit, for error lines.

    Returns:
        The indices of the rows that are kept, their prompts, their responses, and the report.

    Raises:
        UserError: A row is too long and `on_too_long` is "error", or no row is left.
    """
    limiter = LengthLimiter(max_length, on_too_long, what, section)
    kept, kept_prompts, kept_responses = limiter.fit(prompts, responses, names)
    return kept, kept_prompts, kept_responses, limiter.finished()


@dataclass
class LengthLimiter:
    """Apply `on_too_long` to rows as `fit_lengths` does, some of them at a time."""

    max_length: int
    """Tokens of a prompt and one response together."""
    on_too_long: str
    """"error", "drop" or "truncate", as of `fit_lengths`."""
    what: str
    """What a row is, for error lines."""
    section: str
    """The section of the config that has the limit, for error lines."""
    report: LengthReport = field(default_factory=LengthReport)
    """What was done so far."""
    refused: int = 0
    """Rows that are too long where that is an error."""
    has_responses: bool = False
    """Whether any row so far has responses; otherwise there are only prompts."""

    def fit(
        self, prompts: Sequence[list[int]], responses: Sequence[Sequence[list[int]]], names: Sequence[str]
    ) -> tuple[list[int], list[list[int]], list[list[list[int]]]]:
        """Apply the limit to some rows.

        Args:
            prompts: The ids of each row's prompt.
            responses: The ids of each row's responses; none if there are only prompts.
            names: The location of each row, for error lines.

        Returns:
            The indices of the rows that are kept, their prompts and their responses.
        """
        self.has_responses = self.has_responses or any(responses)
        report = self.report
        kept: list[int] = []
        kept_prompts: list[list[int]] = []
        kept_responses: list[list[list[int]]] = []
        for i, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
            length = len(prompt) + max((len(response) for response in group), default=0)
            report.longest = max(report.longest, length)
            if length > self.max_length:
                if self.on_too_long == "error":
                    self._refuse(names[i], length)
                    continue
                if self.on_too_long == "drop" or len(prompt) >= self.max_length:
                    report.dropped += 1
                    continue
                group = [response[: self.max_length - len(prompt)] for response in group]
                report.truncated += 1
            else:
                report.kept += 1
            kept.append(i)
            kept_prompts.append(prompt)
            kept_responses.append(list(group))
        return kept, kept_prompts, kept_responses

    def finished(self) -> LengthReport:
        """Return the report on all rows.

        Raises:
            UserError: A row is too long and `on_too_long` is "error", or no row is left.
        """
        limit, remedy = self._words()
        if self.refused:
            lines = list(self.report.problems)
            others = self.refused - len(lines)
            if others > 0:
                problem = f"{others} more rows are too long, {limit}"
                lines.append(f"{self.section}.max_length: {problem}; shorten them, {remedy}")
            raise UserError(lines)
        if not self.report.kept + self.report.truncated:
            raise UserError([f"{self.section}.max_length: no {self.what} is left, {limit}; raise it"])
        return self.report

    def _refuse(self, name: str, length: int) -> None:
        """Count a row that is too long; the first ones get an error line."""
        self.refused += 1
        if len(self.report.problems) < NAMED_ROWS:
            limit, remedy = self._words()
            self.report.problems.append(f"{name}: {self.what} of {length} tokens, {limit}; shorten it, {remedy}")

    def _words(self) -> tuple[str, str]:
        """Return what the limit is and what can be done, for error lines."""
        limit = f"the limit is {self.max_length}"
        remedy = f"raise {self.section}.max_length, or set {self.section}.on_too_long: drop"
        if self.has_responses:
            return limit, f"{remedy} or truncate"
        return f"{limit} (max_length minus response_length)", remedy


def equal_pairs(ranking: Ranking, responses: Sequence[list[int]]) -> int:
    """Count the usable pairs of a ranking whose texts differ but whose ids are equal.

    Args:
        ranking: The ranking.
        responses: The ids of its responses after a length limit was applied.
    """
    usable = ((i, j) for i, j, verdict in judged_pairs(ranking) if verdict == "usable")
    return sum(responses[i] == responses[j] for i, j in usable)
