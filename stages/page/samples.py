"""Choose the samples that the page shows: policies side by side, and PPO's while it trained."""

import json
from dataclasses import dataclass, field
from typing import Any

from stages.evaluation.shown_prompts import BETWEEN, FLATTERED, GAINS, LOSES, choose, main_policy
from stages.page.curves import Journal, episodes_by_step
from stages.page.trust import by_prompt

Row = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a policy answered to a prompt."""

    policy: str
    """The policy."""
    sampled: Row | None
    """Its first sample, a row of responses.jsonl."""
    greedy: Row | None
    """Its greedy response, a row of greedy.jsonl."""


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt and what the policies answered."""

    turns: list[dict[str, str]]
    """The messages of the prompt, without the system prompt."""
    system: int | None
    """The index of its system prompt in `SystemPrompts`; None without one."""
    answers: list[Answer]
    """An answer of each policy."""


@dataclass
class SystemPrompts:
    """The system prompts of the page, each once, in the order in which they occur."""

    texts: list[str] = field(default_factory=list)
    """The texts."""
    counts: list[int] = field(default_factory=list)
    """How many shown prompts have each of them."""
    without: int = 0
    """How many shown prompts have none."""

    def split(self, prompt: str | list[dict[str, str]]) -> tuple[list[dict[str, str]], int | None]:
        """Separate a prompt from its system prompt, which is recorded.

        Returns:
            The other turns, and the index of the system prompt (None without one).
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if len(turns) < 2 or turns[0].get("role") != "system":
            self.without += 1
            return turns, None
        text = turns[0]["content"]
        if text not in self.texts:
            self.texts.append(text)
            self.counts.append(0)
        index = self.texts.index(text)
        self.counts[index] += 1
        return turns[1:], index

    @property
    def is_one_for_all(self) -> bool:
        """Return whether every prompt has the same system prompt, so that none needs to name it."""
        return len(self.texts) == 1 and self.without == 0


def side_by_side(
    responses: list[Row], greedy: list[Row], results: Row, names: dict[str, str], count: int, systems: SystemPrompts
) -> list[tuple[str, list[ShownPrompt]]]:
    """Choose prompts by rule, and put the answers of all policies side by side.

    Args:
        responses: Rows of responses.jsonl.
        greedy: Rows of greedy.jsonl; empty for an older version.
        results: results.json, completed.
        names: Policy → its name on the page.
        count: How many prompts to show, at most.
        systems: Records the system prompts.

    Returns:
        (title, prompts) of each group: the largest gains and losses, some in between, and those
        that the reward model overrates most. Without a judge, prompts at regular intervals.
    """
    policies = list(results["policies"])
    main, judge = main_policy(policies), results["judge_name"]
    first_samples = {name: [group[0] for group in by_prompt(responses, name)] for name in policies}
    sft_rows = first_samples["sft"]
    if not sft_rows:
        return []
    ours, theirs = (judgements(first_samples[name], judge) for name in (main, "sft"))
    scores = judgements(first_samples[main], "reward_model") if judge != "reward_model" else None
    titles = {
        GAINS: f"{names[main]} gains most over SFT",
        BETWEEN: "In between, at regular intervals" if ours else "At regular intervals in the file",
        LOSES: f"{names[main]} loses most against SFT",
        FLATTERED: f"The reward model overrates {names[main]} most",
    }
    greedy_rows = {(row["policy"], key(row["prompt"])): row for row in greedy}
    groups = []
    for group, indices in choose(ours, theirs, scores, len(sft_rows), count):
        prompts = []
        for i in indices:
            prompt = sft_rows[i]["prompt"]
            answers = []
            for name in policies:
                rows = first_samples[name]
                sampled = rows[i] if i < len(rows) else None
                answers.append(Answer(name, sampled, greedy_rows.get((name, key(prompt)))))
            prompts.append(ShownPrompt(*systems.split(prompt), answers))
        groups.append((titles[group], prompts))
    return groups


def judgements(rows: list[Row], judge: str | None) -> list[float] | None:
    """Return a judge's value of each row; None where any row has none."""
    values = [judgement(row, judge) for row in rows]
    return None if any(value is None for value in values) else values


def judgement(row: Row, judge: str | None) -> float | None:
    """Return a judge's value of a row of responses.jsonl; None if it has none."""
    if judge == "gold":
        return row["gold"]["overall"]
    if judge == "reward_model":
        return row.get("score")
    return row.get("judges", {}).get(judge)


def key(prompt: str | list[dict[str, str]]) -> str:
    """Return a prompt as a key of a dictionary."""
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def moments(journal: Journal, count: int, systems: SystemPrompts) -> list[tuple[int, list[Row]]]:
    """Choose moments of PPO, and return the samples of each.

    Args:
        journal: PPO's journal.
        count: How many moments to show, at most; the first and the last are among them.
        systems: Records the system prompts.

    Returns:
        (episode, rows of samples.jsonl) of each, with `turns` and `system` added to the rows.
    """
    episodes = episodes_by_step(journal)
    steps = sorted({row["step"] for row in journal.samples} & episodes.keys())
    if not steps or not journal.metrics:
        return []
    count = min(count, len(steps))
    chosen = sorted({steps[round(k * (len(steps) - 1) / max(1, count - 1))] for k in range(count)})
    shown = []
    for step in chosen:
        rows = []
        for row in journal.samples:
            if row["step"] == step:
                turns, system = systems.split(row["prompt"])
                rows.append({**row, "turns": turns, "system": system})
        shown.append((episodes[step], rows))
    return shown
