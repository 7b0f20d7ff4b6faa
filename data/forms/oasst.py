"""Convert the message trees of OpenAssistant (OASST1, OASST2), whole or as a flat table.

A tree is a prompt, the answers to it, the replies to each answer, and so on. The answers to one
message were ranked by people, 0 being the best. So a tree gives rankings, demonstrations (the best
answer to each message) and prompts, at every depth. Messages that were deleted, not reviewed, or
marked as spam take no part, nor does what replies to them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.judged import number
from data.forms.messages import Messages
from data.forms.scores import ranks_of_scores
from data.parsing import describe

ROLES = {"prompter": "user", "assistant": "assistant"}
"""OASST's names of the roles."""
STOPPED = ("aborted_low_grade", "halted_by_moderator")
"""States of trees that were given up."""
DELETED = "a message that was deleted"
UNREVIEWED = "a message that did not pass its review"
SPAM = "a message that was marked as spam"
ABORTED = "a tree that was given up"
ORPHAN = "a message whose parent is not among the rows"
FEW = "a prompt with fewer than two ranked answers"
UNRANKED = "a prompt none of whose answers is ranked"


@dataclass
class Node:
    """Hold a message of a tree and the replies to it."""

    row: Row
    """The message as it is in the file."""
    location: str = ""
    """Where it is."""
    replies: list["Node"] = field(default_factory=list)
    """The replies, in the order of the file."""


Take = Callable[[Node, list[Node], Messages], Row | LeftOut | None]
"""(the user's message, the good answers to it, the conversation up to it) → a row of our own form,
why there is none, or None where the message has no answers at all."""

# ── which messages count ─────────────────────────────────────────────────────────────────────────


def label_value(labels: object, name: str) -> float | None:
    """Return the mean value of a label, in the form of the trees or that of the flat table.

    Args:
        labels: {name: {value}} or {name: [names], value: [values]}.
        name: The name of the label.
    """
    if not isinstance(labels, dict):
        return None
    names, values = labels.get("name"), labels.get("value")
    if isinstance(names, list) and isinstance(values, list):
        return number(values[names.index(name)], name) if name in names else None
    label = labels.get(name)
    return number(label.get("value"), name) if isinstance(label, dict) else None


def why_bad(message: Row) -> str | None:
    """Return why a message takes no part; None if it does."""
    if message.get("deleted"):
        return DELETED
    if not message.get("review_result"):
        return UNREVIEWED
    spam = label_value(message.get("labels"), "spam")
    return SPAM if spam is not None and spam >= 0.5 else None


# ── what is taken at each message of the user ────────────────────────────────────────────────────


def about(message: Row) -> Row:
    """Return what a record keeps of the user's message: who wrote it."""
    return {"user_id": message.get("user_id")}


def ranking_at(asked: Node, answers: list[Node], conversation: Messages) -> Row | LeftOut | None:
    """Rank the answers to a message."""
    if not answers:
        return None
    ranks = [number(answer.row.get("rank"), "rank") for answer in answers]
    kept = [(answer.row["text"], rank) for answer, rank in zip(answers, ranks, strict=True) if rank is not None]
    if len(kept) < 2:
        return LeftOut(FEW)
    # Ranks are made anew: where a message was taken out, the others no longer count from 0.
    return {
        "prompt": conversation,
        "responses": [text for text, _ in kept],
        "ranks": ranks_of_scores([-rank for _, rank in kept]),
        **about(asked.row),
    }


def demonstration_at(asked: Node, answers: list[Node], conversation: Messages) -> Row | LeftOut | None:
    """Take the best answer to a message, or its only one."""
    if not answers:
        return None
    ranked = [(rank, answer) for answer in answers if (rank := number(answer.row.get("rank"), "rank")) is not None]
    if not ranked and len(answers) > 1:
        return LeftOut(UNRANKED)
    best = min(ranked, key=lambda pair: pair[0])[1] if ranked else answers[0]
    return {"prompt": conversation, "completion": best.row["text"], **about(asked.row)}


def prompt_at(asked: Node, answers: list[Node], conversation: Messages) -> Row | LeftOut | None:
    """Take the conversation up to a message."""
    return {"prompt": conversation, **about(asked.row)}


def walk(root: Node, take: Take) -> Iterator[tuple[str, Row | LeftOut]]:
    """Yield what is taken at each message of the user in a tree, from the root down.

    Args:
        root: The first message.
        take: What to take.

    Yields:
        (location of the message, a row of our own form or why there is none)
    """
    waiting: list[tuple[Node, Messages]] = [(root, [])]
    while waiting:
        node, before = waiting.pop()
        reason = why_bad(node.row)
        if reason is not None:
            yield node.location, LeftOut(reason)
            continue
        role = node.row.get("role")
        if role not in ROLES:
            raise ValueError(f"the role of message {node.row.get('message_id')} is {describe(role)}; expected prompter")
        conversation = [*before, {"role": ROLES[role], "content": node.row.get("text")}]
        if role == "prompter":
            answers = [reply for reply in node.replies if reply.row.get("role") == "assistant"]
            item = take(node, [answer for answer in answers if why_bad(answer.row) is None], conversation)
            if item is not None:
                yield node.location, item
        waiting += [(reply, conversation) for reply in reversed(node.replies)]


# ── whole trees ──────────────────────────────────────────────────────────────────────────────────


def tree_of(message: object, location: str = "") -> Node:
    """Return a message with its `replies`, and theirs, as nodes."""
    if not isinstance(message, dict) or not isinstance(message.get("replies") or [], list):
        raise ValueError(f"a message of the tree is {describe(message)}; expected {{text, role, replies}}")
    root = Node(message, location)
    waiting = [root]
    while waiting:
        node = waiting.pop()
        for reply in node.row.get("replies") or []:
            if not isinstance(reply, dict):
                raise ValueError(f"a reply in the tree is {describe(reply)}; expected {{text, role, replies}}")
            node.replies.append(Node(reply, location))
        waiting += node.replies
    return root


def from_tree(take: Take) -> Callable[[Row, Options], list[Row | LeftOut]]:
    """Return the conversion of a row {prompt: {text, role, replies}, tree_state}."""

    def convert(row: Row, options: Options) -> list[Row | LeftOut]:
        """Take what the tree holds."""
        if row.get("tree_state") in STOPPED:
            raise LeftOut(ABORTED)
        return [item for _, item in walk(tree_of(row["prompt"]), take)]

    return convert


def is_tree(row: Row) -> bool:
    """Return whether `prompt` is a message with replies."""
    return isinstance(row["prompt"], dict) and "text" in row["prompt"]


# ── the flat table ───────────────────────────────────────────────────────────────────────────────


def from_rows(take: Take) -> Callable[[Sequence[tuple[str, Row]], Options], Iterator[tuple[str, Row | ValueError]]]:
    """Return the conversion of rows {message_id, parent_id, text, role, rank}."""

    def gather(rows: Sequence[tuple[str, Row]], options: Options) -> Iterator[tuple[str, Row | ValueError]]:
        """Build the trees, and take what they hold."""
        nodes = {row["message_id"]: Node(row, location) for location, row in rows}
        roots = []
        for node in nodes.values():
            parent = node.row.get("parent_id")
            if node.row.get("tree_state") in STOPPED:
                yield node.location, LeftOut(ABORTED)
            elif parent is None:
                roots.append(node)
            elif parent in nodes:
                nodes[parent].replies.append(node)
            else:
                yield node.location, LeftOut(ORPHAN)
        for root in roots:
            try:
                yield from walk(root, take)
            except ValueError as error:
                yield root.location, error

    return gather


def single_message(row: Row, options: Options) -> Row:
    """Refuse a single message: what it belongs to stands in other rows."""
    raise LeftOut("a single message")


def tree_form(take: Take) -> Form:
    """Return the form of whole trees."""
    needs = ("message_tree_id", "tree_state", "prompt")
    return Form(needs, (), from_tree(take), name="OASST trees", fits=is_tree)


def flat_form(take: Take) -> Form:
    """Return the form of the flat table."""
    needs = ("message_id", "text", "role", "message_tree_id")
    also = ("parent_id", "rank", "deleted", "review_result", "labels", "tree_state", "user_id")
    return Form(needs, also, single_message, name="OASST messages", gather=from_rows(take))


OASST_RANKINGS = (tree_form(ranking_at), flat_form(ranking_at))
OASST_DEMONSTRATIONS = (tree_form(demonstration_at), flat_form(demonstration_at))
OASST_PROMPTS = (tree_form(prompt_at), flat_form(prompt_at))
