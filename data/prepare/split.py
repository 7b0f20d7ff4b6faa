"""Assign users to parts by a hash, so that a user stays in its part when the data grow."""

from collections import Counter
from collections.abc import Iterable, Mapping

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


def part_of_user(key: bytes, allowed: Iterable[str], shares: Mapping[str, float]) -> str | None:
    """Return the part of a user.

    Validation and test have the same users whatever the others may hold, because they come first;
    the remainder is divided among the training parts that are allowed.

    Args:
        key: A digest of what identifies the user, at least 16 bytes.
        allowed: The parts that at least one of the user's rows can go to.
        shares: Part → its share, relative to the other shares.

    Returns:
        The part; None if the shares of all allowed parts are 0.
    """
    wanted = [part for part in PARTS if part in allowed and shares[part] > 0]
    total = sum(shares.values())
    position = int.from_bytes(key[:6], "big") / 2**48
    held_out = 0.0
    for part in HELD_OUT_PARTS:
        if part in wanted:
            held_out += shares[part] / total
            if position < held_out:
                return part
    trained = [part for part in wanted if part in TRAINING_PARTS]
    # Further bits, so that the share of one part says nothing about the order of others. Users of
    # evaluation prompts only are divided among validation and test.
    return by_shares(int.from_bytes(key[6:12], "big") / 2**48, trained or wanted, shares)


def by_shares(position: float, parts: list[str], shares: Mapping[str, float]) -> str | None:
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


def filled_parts(allowed: Mapping[bytes, tuple[str, ...]], shares: Mapping[str, float]) -> dict[bytes, str]:
    """Return {user: part} of the few users that are moved so that no part is without users.

    With few users a hash can miss a small part. The user that moves comes from the part that has
    the most of them.

    Args:
        allowed: Key of each user → the parts that at least one of its rows can go to.
        shares: Part → its share, relative to the other shares.
    """
    parts = {key: part_of_user(key, names, shares) for key, names in allowed.items()}
    moved: dict[bytes, str] = {}
    for empty in PARTS:
        counts = Counter(parts.values())
        if counts[empty] or not shares[empty]:
            continue
        movable = [key for key, part in parts.items() if empty in allowed[key] and part and counts[part] > 1]
        if movable:
            key = min(movable, key=lambda key: (-counts[parts[key]], key))
            parts[key] = moved[key] = empty
    return moved
