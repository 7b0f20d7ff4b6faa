"""Choose the evaluation prompts, and hold what is known about each of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.records import Demonstration, as_messages, prompt_key
from data.streams import Stream, derive_seed, held_out
from data.turns import split_key
from data.world.world import World
from stages.evaluation.forms import Form, Query, make_query


@dataclass(frozen=True)
class EvaluationPrompts:
    """The P prompts that every policy answers."""

    prompts: list[str | list[dict]]
    """Each prompt, a string or messages."""
    chat_ids: list[list[int]]
    """The ids of each prompt through the chat template, which the judges read."""
    clusters: list[str]
    """The cluster of each prompt: its task in the embedded world, otherwise the prompt itself."""
    leaked: list[bool]
    """Whether training data sets each prompt's task (embedded world), or has a near copy of it."""
    world: World | None
    """The embedded world if the prompts are its own: it knows their tasks and scores gold."""
    examples: list[Demonstration]
    """Demonstrations to show before a few-shot question."""
    room: int | None
    """The longest prompt that leaves room for a response in the context; None if unknown."""

    rows: Sequence[Mapping[str, Any]] = ()
    """The row of data of each prompt, with all its keys, for judges that read them."""

    @property
    def known_tasks(self) -> list[bool] | None:
        """Whether training data sets each prompt's task; None where tasks are not known."""
        return self.leaked if self.world is not None else None

    def queries(self, tokenizer: Any, form: Form, indices: Sequence[int] | None = None) -> list[Query]:
        """Write prompts in the form in which a policy is prompted.

        Args:
            tokenizer: The policy's tokenizer.
            form: The form.
            indices: Which prompts; None takes all.

        Returns:
            One query per prompt.
        """
        chosen = range(len(self.prompts)) if indices is None else indices
        if form == "chat":
            return [Query("chat", self.chat_ids[i], tokenizer.eos_token_id) for i in chosen]
        return [make_query(tokenizer, form, self.prompts[i], self.examples, self.room) for i in chosen]


def split_demonstrations(demonstrations: Sequence[Demonstration], fraction: float) -> tuple[list[int], list[int]]:
    """Return the indices of the demonstrations that sft trains on, and of those it holds out.

    This is sft's own split, whatever sft drops afterwards.
    """
    return held_out([split_key(demonstration) for demonstration in demonstrations], fraction)


def first_of_each_prompt(demonstrations: Sequence[Demonstration], indices: Sequence[int]) -> list[int]:
    """Return the first of `indices` for each different prompt, in ascending order."""
    first: dict[str, int] = {}
    for i in indices:
        first.setdefault(prompt_key(demonstrations[i].prompt), i)
    return sorted(first.values())


def choose_records(
    records: list, locations: list[str], *, limit: int | None, fraction: float | None, say: Callable[[str], None]
) -> tuple[list, list[str]]:
    """Choose the records whose prompts are evaluated.

    Args:
        records: Evaluation prompts, or demonstrations.
        locations: The location of each record, for error messages.
        limit: `evaluate.num_prompts`.
        fraction: If the records are demonstrations, the fraction that sft holds out: those are
            chosen, each prompt once. None for evaluation prompts.
        say: Prints a line.

    Returns:
        The chosen records and their locations.
    """
    if fraction is not None:
        chosen = first_of_each_prompt(records, split_demonstrations(records, fraction)[1])
        records, locations = [records[i] for i in chosen], [locations[i] for i in chosen]
    if limit is not None and limit < len(records):
        say(f"the first {limit} of {len(records)} evaluation prompts; evaluate.num_prompts takes more (null: all)")
    return records[:limit], locations[:limit]


def row_of(record: Any) -> dict[str, Any]:
    """Return the row of data of an evaluation prompt; of a demonstration its completion, too."""
    if isinstance(record, Demonstration):
        prompt = record.prompt if isinstance(record.prompt, str) else as_messages(record.prompt)
        return {**(record.extra or {}), "prompt": prompt, "completion": record.completion}
    return record.row()


def choose_examples(demonstrations: Sequence[Demonstration], count: int, seed: int) -> list[Demonstration]:
    """Draw the demonstrations that are shown before every few-shot question."""
    order = Stream(len(demonstrations), derive_seed(seed, "few_shot"))
    return [demonstrations[i] for i in order.take(min(len(demonstrations), count))]
