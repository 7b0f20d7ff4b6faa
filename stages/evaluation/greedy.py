"""Answers for people to read: what a policy says when it does not gamble.

Samples at temperature 1 show what a policy's distribution holds; its likeliest answer shows what a user of a low
temperature would get. Answers may be longer than those that are scored: people should see how they end.
"""

from collections.abc import Callable, Sequence

from data.streams import derive_seed
from stages.evaluation.asking import Answer, Asked, answer_of
from stages.rollouts.transformers import sample

LIKELIEST = 1e-9
"""A nucleus (top_p) that holds nothing but the likeliest token."""


def answer_greedily(
    model,
    tokenizer,
    asked: Sequence[Asked],
    longest: int,
    context: int | None,
    *,
    batch_size: int,
    poll: Callable[[], None] | None = None,
) -> list[Answer]:
    """Answer prompts by the likeliest token at each place.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        asked: The prompts in the form in which this policy is asked; all of one form.
        longest: Tokens of an answer at most.
        context: The longest row that the model reads; None where it names none.
        batch_size: Rows sampled at a time.
        poll: Called between tokens; raises to leave.

    Returns:
        An answer a prompt. All have the room that the longest prompt leaves.
    """
    if not asked:
        return []
    room = longest if context is None else max(1, min(longest, context - max(len(one.ids) for one in asked)))
    sampled = sample(
        model,
        [one.ids for one in asked],
        [derive_seed(0, "greedy", i) for i in range(len(asked))],  # of no consequence: nothing is left to chance
        response_length=room,
        top_p=LIKELIEST,
        batch_size=batch_size,
        eos_id=asked[0].end_id,
        pad_id=tokenizer.pad_token_id,
        poll=poll,
    )
    return [answer_of(tokenizer, one, ids) for one, ids in zip(asked, sampled, strict=True)]
