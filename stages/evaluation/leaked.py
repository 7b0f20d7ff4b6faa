"""Find the evaluation prompts that training data contains as well.

On those prompts a policy can score by memory.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from data.near_copies import CopyFilter, near_copies
from data.world.world import World


def find_leaked_tasks(
    prompts: Sequence[str],
    trained: dict[str, Iterable],
    world: World,
    documents: Sequence[str],
    say: Callable[[str], None],
) -> list[bool]:
    """Find the embedded world's prompts whose task also occurs in training data; say how many.

    Args:
        prompts: P evaluation prompts of the world.
        trained: The prompts that policies or the reward model were trained on, by kind of data;
            each is read once.
            Those that are not the world's own are compared word by word.
        world: The embedded world.
        documents: Texts of the pretraining corpus.
        say: Prints a line.

    Returns:
        (P,) flags.
    """
    others: list = []

    def of_world() -> Iterable[str]:
        """Yield the world's own prompts, and keep those of the others that can be copies."""
        can_be_copies = CopyFilter.of(prompts)
        for prompt in chain(*trained.values()):
            if world.knows(prompt):
                yield prompt
            else:
                others.extend(can_be_copies.passing([prompt]))

    tasks = world.tasks_in(of_world(), documents)
    copies = near_copies(prompts, others)
    leaked = [world.task(prompt) in tasks or copied for prompt, copied in zip(prompts, copies, strict=True)]
    say(
        f"{sum(leaked)} of {len(prompts)} prompts have tasks that also occur in training data, in other words; "
        f"{len(prompts) - sum(leaked)} have tasks that do not"
    )
    return leaked


def find_near_copies(prompts: Sequence, trained: dict[str, Iterable], say: Callable[[str], None]) -> list[bool]:
    """Find the prompts that are near copies of training prompts, and say how many, if any.

    Args:
        prompts: P evaluation prompts, strings or messages.
        trained: The prompts that policies or the reward model were trained on, by kind of data;
            each is read once.
        say: Prints a line.

    Returns:
        (P,) flags.
    """
    can_be_copies = CopyFilter.of(prompts)
    copies = {kind: near_copies(prompts, list(can_be_copies.passing(of_kind))) for kind, of_kind in trained.items()}
    leaked = [any(flags) for flags in zip(*copies.values(), strict=True)]
    if any(leaked):
        where = ", ".join(f"{kind} {sum(flags)}" for kind, flags in copies.items() if any(flags))
        say(
            f"{sum(leaked)} of {len(prompts)} evaluation prompts are near copies of training prompts ({where}), so "
            f"figures on them measure memory too; use other prompts (`rlhf data check FILE -c CONFIG` names these)"
        )
    return leaked
