"""Which samples the report shows, and how: prompts side by side, greedy answers beside sampled ones, system prompts
once. Rows of responses.jsonl, greedy.jsonl and PPO's samples.jsonl in, what the page draws out. Pure."""

import json
from dataclasses import dataclass, field

from stages.evaluation.shown_prompts import BETWEEN, FLATTERED, GAINS, LOSES, choose, main_policy
from stages.page.plots import Journal, episodes_by_step
from stages.page.trust import by_prompt


@dataclass(frozen=True)
class Shown:
    """A prompt and what the policies answered. answers: (policy, first sample or None, greedy answer or None)."""

    turns: list[dict]
    system: int | None
    """The number of its system prompt among those of the page, from 0; None without one."""
    answers: list[tuple[str, dict | None, dict | None]]


@dataclass
class Systems:
    """The system prompts of the page, each once, in the order in which they were met."""

    texts: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    without: int = 0

    def split(self, prompt) -> tuple[list[dict], int | None]:
        """Take the system prompt off a prompt: the other turns, and its number (None without one)."""
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not turns or turns[0].get("role") != "system" or not turns[1:]:
            self.without += 1
            return turns, None
        text = turns[0]["content"]
        if text not in self.texts:
            self.texts.append(text)
            self.counts.append(0)
        number = self.texts.index(text)
        self.counts[number] += 1
        return turns[1:], number

    @property
    def is_one_for_all(self) -> bool:
        """Whether every prompt has the same system prompt, so that none needs to name it."""
        return len(self.texts) == 1 and self.without == 0


def side_by_side(
    responses: list[dict], greedy: list[dict], results: dict, names: dict[str, str], count: int, systems: Systems
) -> list[tuple[str, list[Shown]]]:
    """Choose prompts by rule, and put every policy's answers to each beside each other.

    Args:
        responses: Rows of responses.jsonl.
        greedy: Rows of greedy.jsonl; none of an older version.
        results: results.json, completed.
        names: Policy → its name on the page.
        count: How many prompts, at most.
        systems: Takes in the system prompts.

    Returns:
        (title, prompts) of each group: largest gains and losses, some in between, and where the reward model flatters
        most. Without a judge: prompts at even distances.
    """
    policies = list(results["policies"])
    main, gold = main_policy(policies), results["judge"] == "gold"
    rows = {n: [some[0] for some in by_prompt(responses, n)] for n in policies}
    if not rows["sft"]:
        return []
    judged = {n: judgements(rows[n], gold) for n in {main, "sft"}}
    scores = judgements(rows[main], False) if gold else None
    titles = {
        GAINS: f"{names[main]} gains most over SFT",
        BETWEEN: "In between, at even distances" if judged[main] else "At even distances in the file",
        LOSES: f"{names[main]} loses most against SFT",
        FLATTERED: f"The reward model overrates {names[main]} most",
    }
    likeliest = {(row["policy"], key(row["prompt"])): row for row in greedy}

    def show(i: int) -> Shown:
        prompt = rows["sft"][i]["prompt"]
        answers = [(n, rows[n][i] if i < len(rows[n]) else None, likeliest.get((n, key(prompt)))) for n in policies]
        return Shown(*systems.split(prompt), answers)

    chosen = choose(judged[main], judged["sft"], scores, len(rows["sft"]), count)
    return [(titles[name], [show(i) for i in some]) for name, some in chosen]


def judgements(rows: list[dict], gold: bool) -> list[float] | None:
    """Return what the judge says of each row; None where it says nothing of some."""
    found = [row["gold"]["overall"] if gold else row.get("score") for row in rows]
    return None if any(value is None for value in found) else found


def key(prompt) -> str:
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def looks(journal: Journal, count: int, systems: Systems) -> list[tuple[int, list[dict]]]:
    """(episode, samples) at `count` moments of PPO, the first and the last among them; samples with `turns` and
    `system` in place of their prompt."""
    episodes = episodes_by_step(journal)
    steps = sorted({row["step"] for row in journal.samples} & episodes.keys())
    if not steps or not journal.metrics:
        return []
    count = min(count, len(steps))
    chosen = sorted({steps[round(k * (len(steps) - 1) / max(1, count - 1))] for k in range(count)})

    def show(row: dict) -> dict:
        turns, system = systems.split(row["prompt"])
        return {**row, "turns": turns, "system": system}

    return [(episodes[step], [show(r) for r in journal.samples if r["step"] == step]) for step in chosen]
