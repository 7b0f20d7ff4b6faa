"""Simulated labelers with known habits, who make the moves that a page makes.

The quality of an answer is the number at its end; its length says nothing about it.
"""

import random

from stages.people.rank import assign, moves
from stages.people.rank.tasks import Given, NewTask, add_task
from stages.people.store.rows import read_task

NOW = 1_700_000_000.0


def tasks(count, known=0, answers=4, seed=0):
    """Return tasks of drawn quality and length; the first `known` have a known answer."""
    rng, made = random.Random(seed), []
    for number in range(count):
        qualities = rng.sample(range(100), answers)
        given = tuple(Given(f"{'word ' * rng.randint(1, 60)}{quality:02d}", model="sft") for quality in qualities)
        ranks = [1 + sum(other > quality for other in qualities) for quality in qualities]
        made.append(NewTask(f"question {number}", given, known=tuple(ranks) if number < known else None))
    return made


def careful(rng, shown, texts):
    """Rank by quality, with small mistakes."""
    noisy = {answer: int(texts[answer][-2:]) + rng.gauss(0, 8) for answer in shown}
    return [[answer] for answer in sorted(shown, key=lambda one: -noisy[one])]


def first_shown(rng, shown, texts):
    """Rank as the answers are shown."""
    return [[answer] for answer in shown]


def at_random(rng, shown, texts):
    """Rank by a coin."""
    return [[answer] for answer in rng.sample(shown, len(shown))]


def longest(rng, shown, texts):
    """Rank by length."""
    return [[answer] for answer in sorted(shown, key=lambda one: -len(texts[one]))]


def all_equal(rng, shown, texts):
    """Give all answers the same place."""
    return [list(shown)]


def simulate(database, rules, people, new_tasks, seed=0, most=10_000, now=NOW):
    """Let people take turns until nothing is left, or each has done `most` tasks.

    Args:
        database: The database.
        rules: The rules of the page.
        people: {code: (habit, seconds a task)}; a habit of None skips everything.
        new_tasks: Tasks to add first.
        seed: Of the habits.
        most: Tasks of each.
        now: When it begins; each task takes its seconds.

    Returns:
        {code: labeler}.
    """
    rng, labelers = random.Random(seed), {}
    with database.transaction() as connection:
        for task in new_tasks:
            add_task(connection, task, now)
        for code in people:
            labelers[code] = moves.join(connection, {"name": code.title(), "code": code}, now)[0]
        going = dict.fromkeys(people, 0)
        while going:
            for code in list(going):
                habit, pace = people[code]
                now += 1
                found, _ = assign.next_assignment(connection, labelers[code], rules, now)
                if found is None or going[code] == most:
                    del going[code]
                    continue
                going[code] += 1
                seconds = pace * rng.uniform(0.5, 1.5)
                rank(connection, labelers[code], found, habit, rng, rules, (now, seconds))
                now += seconds
    return labelers


def rank(connection, labeler, assignment, habit, rng, rules, time):
    """Do one task."""
    now, seconds = time
    texts = {answer.id: answer.text for answer in read_task(connection, assignment.task_id).answers}
    seq = connection.execute("SELECT COUNT(*) FROM moves WHERE assignment_id = ?", (assignment.id,)).fetchone()[0]
    closing = {"active_ms": 1000 * seconds}
    if habit is None:
        body = {"seq": seq, "reason": "I do not know enough about this", **closing}
        moves.skip(connection, labeler, assignment.id, body, rules, now + seconds)
        return
    for tier, answers in enumerate(habit(rng, list(assignment.order_shown), texts)):
        for answer in answers:
            body = {"seq": seq, "kind": "place", "body": {"answer": answer, "tier": tier}}
            seq = moves.make_move(connection, labeler, assignment.id, body, now)["seq"]
    moves.submit(connection, labeler, assignment.id, {"seq": seq, **closing}, rules, now + seconds)
