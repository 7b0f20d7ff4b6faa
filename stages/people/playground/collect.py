"""Keep what people agree to share, and give it back as rows of data.

A conversation is a tree: a question follows an answer (`after`), and several policies may answer
it. So all answers to a question have one prompt, and comparing them is a ranking. Nothing of a
conversation without consent is written.

    conversation → a prompt        comparison → a ranking
    correction → a demonstration   thumbs → rows with a label
"""

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.people.playground.engine import Options, Reply
from stages.people.store.database import dumps

ORIGIN = "playground"
"""The `source` of the rows."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Locate a question in a conversation."""

    conversation: int
    """Number of the conversation."""
    seq: int
    """Number of the question's turn; its answers have the next number."""


class NotThere(LookupError):
    """Report something that is not there, or belongs to somebody else."""


# -- writing -------------------------------------------------------------------------------------


def begin(connection: sqlite3.Connection, user_id: str, system: str, kind: str | None, consent: str) -> int:
    """Begin a conversation of a person who agreed that it is kept.

    Args:
        connection: Inside a transaction.
        user_id: The person.
        system: The system message; "" for none.
        kind: What the person says it is for.
        consent: The text that the person agreed to.

    Returns:
        The number of the conversation.
    """
    row = connection.execute(
        "INSERT INTO conversations(user_id, consent, system, kind, settings, created) VALUES(?, 1, ?, ?, ?, ?)",
        (user_id, system, kind, dumps({"consent": consent}), time.time()),
    )
    assert row.lastrowid is not None
    return row.lastrowid


def add_question(
    connection: sqlite3.Connection, conversation: int, text: str, after: int | None, corrected: bool, blind: bool
) -> Place:
    """Add a question to a conversation.

    Args:
        connection: Inside a transaction.
        conversation: The conversation.
        text: The question.
        after: The answer that it follows; None for the first question.
        corrected: Whether the person goes on with the correction of that answer.
        blind: Whether the names of the policies are hidden.
    """
    last = connection.execute("SELECT max(seq) AS seq FROM turns WHERE conversation_id = ?", (conversation,))
    seq = last.fetchone()["seq"]
    # even numbers are questions, so that a question whose answers were stopped leaves a gap
    seq = 0 if seq is None else seq + 2 - seq % 2
    settings = {"after": after, "corrected": corrected, "blind": blind}
    connection.execute(
        "INSERT INTO turns(conversation_id, seq, side, role, content, settings, made) VALUES(?, ?, 0, 'user', ?, ?, ?)",
        (conversation, seq, text, dumps(settings), time.time()),
    )
    return Place(conversation, seq)


def add_answer(
    connection: sqlite3.Connection, place: Place, side: int, model: str, options: Options, reply: Reply
) -> int:
    """Add a policy's answer to a question.

    Args:
        connection: Inside a transaction.
        place: The question.
        side: Its place on the page, from 0.
        model: The policy.
        options: How it was sampled.
        reply: The answer.

    Returns:
        The number of the answer's turn.
    """
    settings = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "max_tokens": options.max_tokens,
        "forgotten": reply.forgotten,
    }
    row = connection.execute(
        "INSERT INTO turns(conversation_id, seq, side, role, content, model, seed, score, finished, settings, made) "
        "VALUES(?, ?, ?, 'assistant', ?, ?, ?, ?, ?, ?, ?)",
        (
            *(place.conversation, place.seq + 1, side, reply.text, model),
            *(options.seed, reply.score, reply.finished, dumps(settings), time.time()),
        ),
    )
    assert row.lastrowid is not None
    return row.lastrowid


def choose(connection: sqlite3.Connection, conversation: int, seq: int, tiers: Sequence[Sequence[int]]) -> list[Row]:
    """Keep which answers to a question are better; a second choice replaces the first.

    Args:
        connection: Inside a transaction.
        conversation: The conversation.
        seq: Number of the answers.
        tiers: Their numbers, the best tier first; answers in one tier are a tie.

    Returns:
        {id, model, score} of the answers.

    Raises:
        NotThere: The tiers are not these answers, each once, or there are not two.
    """
    answers = list(
        connection.execute(
            "SELECT id, model, score FROM turns WHERE conversation_id = ? AND seq = ? AND role = 'assistant' "
            "ORDER BY side",
            (conversation, seq),
        )
    )
    named = sorted(answer for tier in tiers for answer in tier)
    if len(answers) < 2 or named != sorted(row["id"] for row in answers):
        raise NotThere("name each of the answers once, and at least two")
    connection.execute(
        "INSERT INTO choices(conversation_id, seq, tiers, made) VALUES(?, ?, ?, ?) "
        "ON CONFLICT(conversation_id, seq) DO UPDATE SET tiers = excluded.tiers, made = excluded.made",
        (conversation, seq, dumps([list(tier) for tier in tiers if tier]), time.time()),
    )
    return [dict(row) for row in answers]


def set_thumb(connection: sqlite3.Connection, turn: int, up: bool | None) -> None:
    """Keep a thumb for an answer; None takes it back."""
    if up is None:
        connection.execute("DELETE FROM thumbs WHERE turn_id = ?", (turn,))
        return
    connection.execute(
        "INSERT INTO thumbs(turn_id, up, made) VALUES(?, ?, ?) "
        "ON CONFLICT(turn_id) DO UPDATE SET up = excluded.up, made = excluded.made",
        (turn, up, time.time()),
    )


def set_correction(connection: sqlite3.Connection, turn: int, text: str) -> None:
    """Keep what the answer should have been; "" takes it back."""
    if not text:
        connection.execute("DELETE FROM corrections WHERE turn_id = ?", (turn,))
        return
    connection.execute(
        "INSERT INTO corrections(turn_id, text, made) VALUES(?, ?, ?) "
        "ON CONFLICT(turn_id) DO UPDATE SET text = excluded.text, made = excluded.made",
        (turn, text, time.time()),
    )


def delete(connection: sqlite3.Connection, conversation: int) -> None:
    """Delete a conversation and all that was said of it."""
    turns = "(SELECT id FROM turns WHERE conversation_id = ?)"
    connection.execute(f"DELETE FROM thumbs WHERE turn_id IN {turns}", (conversation,))
    connection.execute(f"DELETE FROM corrections WHERE turn_id IN {turns}", (conversation,))
    for table in ("choices", "turns"):
        connection.execute(f"DELETE FROM {table} WHERE conversation_id = ?", (conversation,))
    connection.execute("DELETE FROM conversations WHERE id = ?", (conversation,))


def delete_all(connection: sqlite3.Connection, user_id: str) -> int:
    """Delete every conversation of a person, and return how many they were."""
    own = connection.execute("SELECT id FROM conversations WHERE user_id = ?", (user_id,)).fetchall()
    for row in own:
        delete(connection, row["id"])
    return len(own)


# -- reading -------------------------------------------------------------------------------------


def count(connection: sqlite3.Connection, user_id: str) -> int:
    """Return how many conversations of a person are kept."""
    query = "SELECT count(*) AS number FROM conversations WHERE user_id = ?"
    return int(connection.execute(query, (user_id,)).fetchone()["number"])


def own_conversation(connection: sqlite3.Connection, conversation: int, user_id: str) -> sqlite3.Row:
    """Return a person's conversation.

    Raises:
        NotThere: There is none, or it is somebody else's.
    """
    row = connection.execute(
        "SELECT * FROM conversations WHERE id = ? AND user_id = ?", (conversation, user_id)
    ).fetchone()
    if row is None:
        raise NotThere("this conversation is not there (any more); begin a new one")
    return row


def own_answer(connection: sqlite3.Connection, turn: int, user_id: str) -> sqlite3.Row:
    """Return an answer in a person's conversation.

    Raises:
        NotThere: There is none, or it is somebody else's.
    """
    row = connection.execute(
        "SELECT turns.* FROM turns JOIN conversations ON conversations.id = turns.conversation_id "
        "WHERE turns.id = ? AND turns.role = 'assistant' AND user_id = ?",
        (turn, user_id),
    ).fetchone()
    if row is None:
        raise NotThere("this answer is not there (any more)")
    return row


class Tree:
    """The turns of a conversation."""

    def __init__(self, connection: sqlite3.Connection, conversation: sqlite3.Row) -> None:
        """Read the turns of a conversation."""
        self.conversation = conversation
        mine = (conversation["id"],)
        rows = connection.execute("SELECT * FROM turns WHERE conversation_id = ? ORDER BY seq, side", mine)
        self.turns: dict[int, sqlite3.Row] = {row["id"]: row for row in rows}
        self.questions = {row["seq"]: row for row in self.turns.values() if row["role"] == "user"}
        join = "JOIN turns ON turns.id = turn_id WHERE conversation_id = ? ORDER BY turn_id"
        corrections = connection.execute(f"SELECT corrections.* FROM corrections {join}", mine)
        self.corrections: dict[int, sqlite3.Row] = {row["turn_id"]: row for row in corrections}
        self.thumbs = list(connection.execute(f"SELECT thumbs.* FROM thumbs {join}", mine))
        self.choices = list(connection.execute("SELECT * FROM choices WHERE conversation_id = ? ORDER BY seq", mine))

    def answers(self, seq: int) -> list[sqlite3.Row]:
        """Return the answers with a number, by side."""
        return [row for row in self.turns.values() if row["seq"] == seq and row["role"] == "assistant"]

    def history(self, after: int | None, corrected: bool) -> list[dict[str, str]]:
        """Return the turns up to an answer, without the system message.

        Args:
            after: The answer; None for no turns.
            corrected: Whether the answer is shown as the person corrected it.

        Raises:
            NotThere: There is no such answer in this conversation.
        """
        if after is None:
            return []
        answer = self.turns.get(after)
        if answer is None or answer["role"] != "assistant":
            raise NotThere("the answer to go on with is not there (any more)")
        text = answer["content"]
        if corrected and after in self.corrections:
            text = self.corrections[after]["text"]
        return [*self.messages(answer["seq"] - 1), {"role": "assistant", "content": text}]

    def messages(self, seq: int) -> list[dict[str, str]]:
        """Return the turns up to a question, without the system message."""
        question = self.questions[seq]
        settings = json.loads(question["settings"])
        before = self.history(settings["after"], settings["corrected"])
        return [*before, {"role": "user", "content": question["content"]}]

    def prompt(self, seq: int) -> str | list[dict[str, str]]:
        """Return a question with what came before it, as the prompt of a record."""
        system = self.conversation["system"]
        messages = [{"role": "system", "content": system}] if system else []
        messages += self.messages(seq)
        return messages[0]["content"] if len(messages) == 1 else messages

    def row(self, seq: int, **more: Any) -> Row:
        """Return what every row about a question has."""
        about = {"user_id": self.conversation["user_id"], "kind": self.conversation["kind"], "source": ORIGIN}
        row = {"prompt": self.prompt(seq), **more, **about}
        return {key: value for key, value in row.items() if value is not None}

    def meta(self, *answers: sqlite3.Row) -> dict[str, Any]:
        """Return what is known of answers in the order shown, for a row's meta."""
        question = self.questions[answers[0]["seq"] - 1]
        return {
            "conversation": self.conversation["id"],
            "turn": answers[0]["seq"],
            "blind": json.loads(question["settings"])["blind"],
            "models": [answer["model"] for answer in answers],
            "seeds": [answer["seed"] for answer in answers],
            "reward_model_scores": [answer["score"] for answer in answers],
            "sampling": [json.loads(answer["settings"]) for answer in answers],
        }


def trees(connection: sqlite3.Connection, since: float = 0.0) -> list[Tree]:
    """Return the conversations that may be kept, in the order in which they began.

    Args:
        connection: Inside a transaction that sees one state.
        since: Only those that began at this time or later, in seconds since 1970.
    """
    rows = connection.execute(
        "SELECT * FROM conversations WHERE consent = 1 AND created >= ? ORDER BY id", (since,)
    ).fetchall()
    return [Tree(connection, row) for row in rows]


def prompt_rows(found: Iterable[Tree]) -> list[Row]:
    """Return a row of prompts for each conversation: its last question with what came before."""
    return [
        tree.row(max(tree.questions), meta={"conversation": tree.conversation["id"]})
        for tree in found
        if tree.questions
    ]


def ranking_rows(found: Iterable[Tree]) -> list[Row]:
    """Return a row of rankings for each comparison; the responses stand in the order shown."""
    rows = []
    for tree in found:
        for choice in tree.choices:
            answers = tree.answers(choice["seq"])
            rank = {turn: place for place, tier in enumerate(json.loads(choice["tiers"]), 1) for turn in tier}
            more = {
                "id": f"{ORIGIN}-{tree.conversation['id']}-{choice['seq']}",
                "responses": [answer["content"] for answer in answers],
                "ranks": [rank.get(answer["id"]) for answer in answers],
                "finished": [bool(answer["finished"]) for answer in answers],
                "labeler": tree.conversation["user_id"],
                "meta": tree.meta(*answers),
            }
            rows.append(tree.row(choice["seq"] - 1, **more))
    return rows


def demonstration_rows(found: Iterable[Tree]) -> list[Row]:
    """Return a row of demonstrations for each correction."""
    return [
        tree.row(
            tree.turns[turn]["seq"] - 1,
            completion=correction["text"],
            meta=tree.meta(tree.turns[turn]) | {"answer": tree.turns[turn]["content"]},
        )
        for tree in found
        for turn, correction in tree.corrections.items()
    ]


def thumb_rows(found: Iterable[Tree]) -> list[Row]:
    """Return a row with a label for each thumb, which data reads as demonstrations or rankings."""
    return [
        tree.row(
            tree.turns[thumb["turn_id"]]["seq"] - 1,
            completion=tree.turns[thumb["turn_id"]]["content"],
            label=bool(thumb["up"]),
        )
        for tree in found
        for thumb in tree.thumbs
    ]


def labelled_rows(found: Iterable[Tree]) -> list[Row]:
    """Return a row of rankings for each thumb: one response with a label, and nothing preferred."""
    rows = []
    for tree in found:
        for thumb in tree.thumbs:
            answer = tree.turns[thumb["turn_id"]]
            more = {
                "id": f"{ORIGIN}-thumb-{answer['id']}",
                "responses": [answer["content"]],
                "labels": [bool(thumb["up"])],
                "finished": [bool(answer["finished"])],
                "labeler": tree.conversation["user_id"],
                "meta": tree.meta(answer),
            }
            rows.append(tree.row(answer["seq"] - 1, **more))
    return rows


EXPORTS: Mapping[str, Any] = {
    "prompts": prompt_rows,
    "rankings": ranking_rows,
    "demonstrations": demonstration_rows,
    "thumbs": thumb_rows,
}
"""Name of an exported file → what makes its rows."""
