"""Read and encode PPO's prompts, keep them beside the stage, and split off the held-out ones."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from data import sources
from data.encode import AT_ONCE, encode_some_prompts
from data.error_lines import shorten
from data.length_limit import LengthLimiter, LengthReport
from data.prompt_rows import EncodedPrompt, PromptRows, part_of, read_prompts, schema, write_prompts
from data.records import own_text, prompt_key
from data.source import Loaded
from data.streams import held_out_limit, position_of
from pipeline.errors import UserError
from pipeline.stage import Source
from stages.rollouts.rollout import DrawnPrompt
from stages.settings.checks import reader_source
from stages.settings.ppo import PPOSettings
from stages.settings.scorers.common import ScorerSection
from stages.shared.data_notes import NotTaken, not_taken
from stages.shared.inputs import GivenText, content_of
from stages.shared.row_cache import RowCache
from stages.training.session import Session

NAME = "prompts"
"""The name of the prompts in the cache."""

Part = TypeVar("Part")


def load_prompts(
    session: Session, c: PPOSettings, tokenizer: Any, given: GivenText, cache: RowCache
) -> tuple[PromptRows, PromptRows]:
    """Read and encode prompts, now or at an earlier start, and split them by their text.

    Args:
        session: The run, for a line on the lengths.
        c: The stage's settings.
        tokenizer: The tokenizer with its chat template.
        given: Where the prompts are.
        cache: Where encoded prompts are kept.

    Returns:
        Training prompts and held-out ones.

    Raises:
        UserError: If fewer than two prompts are left within the limits.
    """
    limiter = limiter_of(c, session.stage)

    def write(paths: dict[str, Path]) -> dict[str, Any]:
        with cache.progress(NAME, given.rows) as note:
            loaded = Loaded()
            write_prompts(paths["arrow"], encoded_prompts(given.source, tokenizer, limiter, loaded, note))
            what = not_taken(NAME, reader_source(given.source).name, loaded)
            return {"not_taken": asdict(what), "report": asdict(limiter.report)}

    content = content_of(given.source)
    made_of = None if content is None else [content, limiter.max_length, limiter.on_too_long, schema().names]
    says = cache.entry(NAME, ("arrow",), made_of, write)
    session.notes.write_down(NAME, NotTaken(**says["not_taken"]))
    session.say(LengthReport(**says["report"]).line(NAME))
    prompts, positions = read_prompts(cache.path(NAME, "arrow"))
    limit = held_out_limit(positions, 0.0, least=max(1, min(c.eval_prompts, len(prompts) // 5)))
    is_held_out = positions <= limit
    if not is_held_out.any():
        raise UserError(
            [
                f"data.prompts: one prompt is left within {limiter.max_length} tokens; PPO needs at least 2, one of "
                f"them to hold out"
            ]
        )
    return part_of(prompts, ~is_held_out), part_of(prompts, is_held_out)


def limiter_of(c: PPOSettings, section: str) -> LengthLimiter:
    """Return the limit of a prompt, which leaves room for a response.

    Args:
        c: The stage's settings.
        section: The section of the config that has them, for error lines.
    """
    # a prompt that is cut would be another prompt
    on_too_long = "drop" if c.on_too_long == "truncate" else c.on_too_long
    return LengthLimiter(c.max_length - c.response_length, on_too_long, "prompt", section)


def encoded_prompts(
    source: Source, tokenizer: Any, limiter: LengthLimiter, loaded: Loaded, note: Callable[[int], None]
) -> Iterator[tuple[EncodedPrompt, float]]:
    """Read and encode prompts, AT_ONCE at a time; those that are too long are left out.

    Args:
        source: Where the prompts are.
        tokenizer: The tokenizer with its chat template.
        limiter: The limit of a prompt.
        loaded: Gets the counts of what was read.
        note: Called with the number of prompts so far, now and then.

    Yields:
        Each prompt with what decides on which side of the held-out split it is.

    Raises:
        UserError: With the errors of the data, or of prompts that the chat template refuses or that
            are too long; there are fewer than two prompts.
    """
    placed, count = sources.stream(NAME, reader_source(source), loaded), 0
    problems: list[str] = []
    while batch := list(islice(placed, AT_ONCE)):
        count += len(batch)
        places, records = [place for place, _ in batch], [record for _, record in batch]
        if not loaded.errors:  # otherwise only further errors are looked for
            ids = encode_some_prompts(tokenizer, (record.prompt for record in records), places, problems)
            kept, fitting, _ = limiter.fit(ids, [[] for _ in ids], places)
            for i, own in zip(kept, fitting, strict=True):
                position = position_of(prompt_key(own_text(records[i])))
                yield EncodedPrompt(own, records[i].row(), places[i]), position
        note(count)
    if loaded.errors:
        raise UserError(shorten(loaded.errors))
    if count < 2:
        raise UserError([f"data.prompts: {count} prompt; PPO needs at least 2, one of them to hold out"])
    if problems:
        raise UserError(shorten(problems))
    limiter.finished()


def drawn_prompt(prompt: EncodedPrompt, index: int) -> DrawnPrompt:
    """Return a prompt as responses are sampled to it.

    Args:
        prompt: The prompt.
        index: Its index in the list that it was drawn from.
    """
    return DrawnPrompt(prompt.ids, index, prompt.data_row, prompt.place)


@dataclass(frozen=True)
class Parts(Sequence[Part]):
    """Read a part of each prompt when it is asked for."""

    prompts: Sequence[EncodedPrompt]
    """The prompts."""
    part: Callable[[EncodedPrompt], Part]
    """What of a prompt is read."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompts)

    @overload
    def __getitem__(self, at: int) -> Part: ...

    @overload
    def __getitem__(self, at: slice) -> list[Part]: ...

    def __getitem__(self, at: int | slice) -> Part | list[Part]:
        """Return the part of a prompt, or of several."""
        return [self.part(one) for one in self.prompts[at]] if isinstance(at, slice) else self.part(self.prompts[at])


def refuse_rows(rewards: Sequence[ScorerSection], train: PromptRows, held_out: PromptRows) -> None:
    """Raise UserError if a scorer cannot score by the row of a prompt, before anything is sampled.

    Args:
        rewards: The settings of the scorers.
        train: Training prompts.
        held_out: Held-out prompts.
    """
    prompts = PromptRows(train.reader, np.concatenate([train.indices, held_out.indices]))
    rows, places = Parts(prompts, lambda one: one.data_row), Parts(prompts, lambda one: one.place)
    lines = [line for settings in rewards for line in settings.row_problems(rows, places)]
    if lines:
        raise UserError(shorten(lines))
