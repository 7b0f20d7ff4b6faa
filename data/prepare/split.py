"""Assign users to parts by a hash, so that a user stays in its part when the data grow."""

import hashlib
from collections.abc import Iterable

from data.prepare.settings import DOCUMENTS, HELD_OUT_PARTS, PARTS, TRAINING_PARTS


def parts_of_kind(kind: str, kinds: Iterable[str]) -> tuple[str, ...]:
    """Return the parts that rows of a kind can go to.

    Where there are no demonstrations, sft gets prompts to write them for; where there are no
    rankings, rm gets prompts whose responses are to be ranked.

    Args:
        kind: The kind.
        kinds: All kinds of the input.
    """
    if kind == "documents":
        return (DOCUMENTS,)
    if kind == "evaluation_prompts":
        return HELD_OUT_PARTS
    if kind == "demonstrations":
        return ("sft", *HELD_OUT_PARTS)
    if kind == "rankings":
        return ("rm", *HELD_OUT_PARTS)
    takes = {"sft": "demonstrations" not in kinds, "rm": "rankings" not in kinds, "ppo": True}
    return (*(part for part in TRAINING_PARTS if takes[part]), *HELD_OUT_PARTS)


def fraction_of(key: str) -> float:
    """Return a number in [0, 1) that depends on a key alone: the first 52 bits of its SHA-256."""
    return int(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:13], 16) / 2**52


def part_of_user(key: str, allowed: Iterable[str], shares: dict[str, float]) -> str | None:
    """Return the part of a user.

    Validation and test have the same users whatever the others may hold, because they come first;
    the remainder is divided among the training parts that are allowed.

    Args:
        key: What identifies the user.
        allowed: The parts that at least one of the user's rows can go to.
        shares: Part → its share, relative to the other shares.

    Returns:
        The part; None if the shares of all allowed parts are 0.
    """
    wanted = [part for part in PARTS if part in set(allowed) and shares[part] > 0]
    total = sum(shares.values())
    position = fraction_of(key)
    held_out = 0.0
    for part in HELD_OUT_PARTS:
        if part in wanted:
            held_out += shares[part] / total
            if position < held_out:
                return part
    trained = [part for part in wanted if part in TRAINING_PARTS]
    if not trained:  # only evaluation prompts: validation and test share them
        return by_shares(fraction_of(f"held out {key}"), [part for part in wanted if part in HELD_OUT_PARTS], shares)
    return by_shares((position - held_out) / (1 - held_out), trained, shares)


def by_shares(position: float, parts: list[str], shares: dict[str, float]) -> str | None:
    """Return the part in whose share a position lies.

    Args:
        position: A number in [0, 1).
        parts: The parts, in order.
        shares: Part → its share.
    """
    end, total = 0.0, sum(shares[part] for part in parts)
    for part in parts:
        end += shares[part] / total
        if position < end:
            return part
    return parts[-1] if parts else None  # the sum of the shares was rounded down
