"""Add up the scores of several scorers, each times its weight."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.scorers.scorer import Scorer, ScoreRequest, Scores


@dataclass(frozen=True)
class WeightedScorer:
    """A scorer of a sum, with its name and its factor."""

    name: str
    """Its name in metrics and samples."""
    weight: float
    """The factor of its score."""
    scorer: Scorer
    """What scores."""

    def parts(self, request: ScoreRequest) -> dict[str, Tensor]:
        """Return its score under its own name, and what that was made of under NAME/PART."""
        scores = self.scorer.score(request)
        return {self.name: scores.total} | {f"{self.name}/{part}": x for part, x in scores.parts.items()}


class Drops:
    """Say when scorers are left out of the sum, and when they count again: once each."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Begin with all scorers counting."""
        self.say, self.out = say, set[str]()

    def note(self, failed: Mapping[str, str]) -> None:
        """Take the scorers that have failed in a rollout into account.

        Args:
            failed: Name of a scorer → a line that says what it did.
        """
        for name in failed:
            if name not in self.out:
                self.say(f"{failed[name]}; updates go on without {name} until it answers (on_failure: drop)")
        for name in sorted(self.out - failed.keys()):
            self.say(f"{name}: answers again, and counts again")
        self.out = set(failed)


@dataclass(frozen=True)
class WeightedSum:
    """Scorers whose scores are added, each times its weight."""

    scorers: tuple[WeightedScorer, ...]
    """In the order of the settings."""
    shows_parts: bool = True
    """Whether the score of each scorer is shown; not where there is only the reward model."""
    drops: Drops | None = None
    """Says which of them are left out, if the settings let an update go on without one that has
    failed."""

    @property
    def of_rows(self) -> list[WeightedScorer]:
        """The scorers that run a model over rows of ids."""
        return [one for one in self.scorers if one.scorer.reads_rows]

    @property
    def of_texts(self) -> list[WeightedScorer]:
        """The scorers that read texts and rows of data."""
        return [one for one in self.scorers if not one.scorer.reads_rows]

    def total(self, parts: Mapping[str, Tensor], dropped: Collection[str] = ()) -> Tensor:
        """Return the weighted sum (B,) of the scores under the scorers' own names.

        A scorer of texts that does not apply to a response, and says so with NaN, adds nothing.

        Args:
            parts: Name → (B,), with at least one entry for each scorer that counts.
            dropped: Names of scorers that do not count this time; the settings leave at least one.
        """
        sums = []
        for one in self.scorers:
            if one.name in dropped:
                continue
            scores = parts[one.name] if one.scorer.reads_rows else parts[one.name].nan_to_num(nan=0.0)
            sums.append(one.weight * scores)
        return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]

    def score(self, request: ScoreRequest) -> Scores:
        """Return the sum and the parts of a request's responses, on the CPU.

        Raises:
            ScorerLost, ScorerDropped, UserError: As the scorers do.
        """
        parts: dict[str, Tensor] = {}
        for one in self.scorers:
            parts |= {name: x.float().cpu() for name, x in one.parts(request).items()}
        return Scores(self.total(parts), parts if self.shows_parts else {})

    def close(self) -> None:
        """Free what the scorers hold."""
        for one in self.scorers:
            one.scorer.close()


def merged(shares: Sequence[Mapping[str, Tensor]], owners: Sequence[Sequence[int]], count: int) -> dict[str, Tensor]:
    """Return parts of all responses from those of the ranks.

    Args:
        shares: For each rank, name → scores of its responses; a rank without responses has none.
        owners: For each rank, the indices of its responses.
        count: The number of all responses, B.

    Returns:
        Name → (B,); NaN where a scorer has named a part only for other responses.
    """
    whole: dict[str, Tensor] = {}
    for parts, index in zip(shares, owners, strict=True):
        for name, scores in parts.items():
            whole.setdefault(name, torch.full((count,), torch.nan))[list(index)] = scores
    return whole
