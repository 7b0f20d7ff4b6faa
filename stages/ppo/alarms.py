"""Watch the figures of a PPO run, and name the setting to change when something goes wrong.

An alarm is a warning, or a stop if `ppo.on_alarm` says so. The windows are part of a checkpoint, so
a resumed run raises the same alarms as an uninterrupted one.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median_high, median_low
from typing import Any

WINDOW = 20  # updates over which the two gradients are compared by their median
IN_A_ROW = 3  # updates in a row that need no median
MUCH_LARGER = 10.0  # a gradient so many times the other drowns it
HABIT = 5  # updates in a row that make a habit
QUIET = 50  # updates before the same alarm is raised again
EVALUATIONS = 2  # held-out evaluations in a row
HARDLY_ANY = 0.05  # fewer responses than this share end with EOS
FAR_FEWER = 0.5  # of the share at first: if fewer end while the score rises, being cut off pays
NEARLY_FULL = 0.9  # of response_length: responses this long on average run to the limit


@dataclass
class Alarms:
    """What is remembered of a run's figures, and the alarms that were raised."""

    kl_limit: float | None
    """Nats a response; None: no limit."""
    entropy_floor: float
    """Share of the entropy of the first updates."""
    response_length: int | None = None
    """The longest response in tokens; None: not known."""
    windows: dict[str, list[float]] = field(default_factory=dict)
    """Kind of figure → its last values (`first_…`: its first ones)."""
    raised: dict[str, int] = field(default_factory=dict)
    """Alarm → the update at which it was last raised."""
    count: dict[str, int] = field(default_factory=dict)
    """Alarm → how often its condition held."""

    def updated(self, step: int, row: dict[str, float]) -> list[str]:
        """Take an update into account; return the alarms to raise, a sentence each.

        Args:
            step: Index of the update.
            row: Its line of metrics.jsonl.
        """
        kl, eos_rate, entropy = (row[f"objective/{name}"] for name in ("kl", "eos_rate", "entropy"))
        first_entropies = self._push("first_entropy", entropy, HABIT, keep_first=True)
        alarms: dict[str, str] = {}
        if self.kl_limit is not None and kl > self.kl_limit:
            alarms["kl"] = (
                f"KL to the reference is {kl:.1f} nats a response, over alarm_kl {self.kl_limit:g}; raise ppo.kl_coef, "
                f"or lower ppo.learning_rate"
            )
        entropies = self._push("entropy", entropy, HABIT)
        first_entropy = sum(first_entropies) / max(1, len(first_entropies))
        if len(entropies) == HABIT and max(entropies) < self.entropy_floor * first_entropy:
            alarms["entropy"] = (
                f"entropy is {entropy:.3g} nats a token and was {first_entropy:.3g} at first: the policy collapses to "
                f"few answers; raise ppo.kl_coef or ppo.ptx_coef, or lower ppo.learning_rate"
            )
        eos_rates = self._push("eos_rate", eos_rate, HABIT)
        if len(eos_rates) == HABIT and max(eos_rates) < HARDLY_ANY:
            alarms["length"] = (
                f"hardly any response of the last {HABIT} updates ended with EOS within response_length; raise "
                f"ppo.response_length, set ppo.missing_eos_score below the scores, or ppo.length_penalty, or train sft "
                f"longer"
            )
        alarms |= self._unfinished(row, eos_rates)
        if "grad_norm/ptx" in row and math.isfinite(row["grad_norm/ppo"] + row["grad_norm/ptx"]):
            alarms |= self._drowned(row["grad_norm/ppo"], row["grad_norm/ptx"])
        return self._raise(step, alarms)

    def evaluated(self, step: int, figures: dict[str, float]) -> list[str]:
        """Take a held-out evaluation into account; return the alarms to raise, a sentence each.

        The score of the reward model that PPO climbs is compared with that of another one.

        Args:
            step: Updates so far.
            figures: Of the evaluation; without `held_out_score` there is nothing to compare.
        """
        if "held_out_score" not in figures:
            return []
        climbed = self._push("score", figures["score"], EVALUATIONS + 1)
        other = self._push("held_out_score", figures["held_out_score"], EVALUATIONS + 1)
        rises = all(after > before for before, after in pairwise(climbed))
        falls = all(after < before for before, after in pairwise(other))
        if len(climbed) <= EVALUATIONS or not (rises and falls):
            return []
        text = (
            f"the score rose over {EVALUATIONS} evaluations ({climbed[0]:.3g} to {climbed[-1]:.3g}) while the held-out "
            f"reward model's fell ({other[0]:.3g} to {other[-1]:.3g}): the policy exploits its reward model; raise "
            f"ppo.kl_coef, use ppo.keep: best, or train rm on more rankings"
        )
        return self._raise(step, {"overoptimisation": text})

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint records."""
        return {"windows": self.windows, "raised": self.raised, "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue as a checkpoint says."""
        self.windows, self.raised, self.count = state["windows"], state["raised"], state["count"]

    def _unfinished(self, row: dict[str, float], eos_rates: list[float]) -> dict[str, str]:
        """Return the alarms about responses that are cut off.

        One is raised if far fewer responses end than at first while the score rises, one if
        responses run to the limit: being cut off pays then, and the policy learns not to finish.

        Args:
            row: Figures of this update.
            eos_rates: The share of responses with EOS, of the last updates.
        """
        alarms: dict[str, str] = {}
        first_eos_rates = self._push("first_eos_rate", row["objective/eos_rate"], HABIT, keep_first=True)
        first_scores = self._push("first_scores", row["objective/scores"], HABIT, keep_first=True)
        scores = self._push("scores", row["objective/scores"], HABIT)
        lengths = self._push("length", row["objective/length"], HABIT)
        if min(map(len, (eos_rates, first_eos_rates, scores, first_scores))) == HABIT:
            before, now = sum(first_eos_rates) / HABIT, sum(eos_rates) / HABIT
            low, high = sum(first_scores) / HABIT, sum(scores) / HABIT
            if before > HARDLY_ANY and max(eos_rates) < FAR_FEWER * before and high > low:
                alarms["unfinished"] = (
                    f"{now:.0%} of the responses of the last {HABIT} updates ended with EOS, {before:.0%} did at "
                    f"first, and the score rose from {low:.3g} to {high:.3g}: being cut off pays; set "
                    f"ppo.missing_eos_score below the scores of finished answers, or raise ppo.response_length"
                )
        room = self.response_length
        if room is not None and len(lengths) == HABIT and min(lengths) > NEARLY_FULL * room:
            alarms["limit"] = (
                f"responses run to the limit: {sum(lengths) / HABIT:.0f} tokens on average in the last {HABIT} "
                f"updates, of ppo.response_length {room}; raise it, set ppo.missing_eos_score below the scores, or "
                f"ppo.length_penalty"
            )
        return alarms

    def _drowned(self, ppo: float, ptx: float) -> dict[str, str]:
        """Return the alarm if one gradient is more than ten times the other.

        It has to be so in each of the last three updates, or in more than half of the last twenty.
        Three in a row show a wrong ptx_coef before it has spoilt the policy; the median shows one
        that a balanced update now and then would hide. Two updates out of three show nothing.

        Args:
            ppo: Norm of PPO's policy gradient in this update, before ptx is added.
            ptx: Norm of ptx_coef times the pretraining gradient.
        """
        norms = zip(self._push("ppo", ppo, WINDOW), self._push("ptx", ptx, WINDOW), strict=True)
        ratios = [_ratio(ptx_norm, ppo_norm) for ppo_norm, ptx_norm in norms]
        recent = ratios[-IN_A_ROW:]
        if len(recent) == IN_A_ROW and (min(recent) > MUCH_LARGER or max(recent) < 1 / MUCH_LARGER):
            judged = recent
        elif len(ratios) == WINDOW:
            judged = ratios
        else:
            return {}
        updates = f"over the last {len(judged)} updates"
        times = median_low(judged)
        if times > MUCH_LARGER:
            return {
                "ptx": f"the pretraining gradient was {times:.3g} times PPO's {updates}: the policy learns from the "
                f"pretraining text and hardly from its reward; lower ppo.ptx_coef{_fold(times)}"
            }
        times = _ratio(1, median_high(judged))
        if times > MUCH_LARGER:
            return {
                "ppo": f"PPO's gradient was {times:.3g} times the pretraining gradient {updates}: the pretraining text "
                f"hardly counts; raise ppo.ptx_coef{_fold(times)}, or set it to 0, which saves that gradient's cost"
            }
        return {}

    def _push(self, name: str, value: float, length: int, keep_first: bool = False) -> list[float]:
        """Append a value to a window unless it is not finite; return the window.

        Args:
            name: Name of the window.
            value: The value.
            length: The most values of the window.
            keep_first: Keep the first values in place of the last ones.
        """
        window = self.windows.setdefault(name, [])
        is_full = keep_first and len(window) == length
        if math.isfinite(value) and not is_full:
            window.append(value)
            del window[:-length]
        return window

    def _raise(self, step: int, alarms: dict[str, str]) -> list[str]:
        """Count the alarms, and return the sentences of those that were not raised lately."""
        lines = []
        for name, text in alarms.items():
            self.count[name] = self.count.get(name, 0) + 1
            if step - self.raised.get(name, -QUIET) >= QUIET:
                self.raised[name] = step
                lines.append(f"update {step}: {text}")
        return lines


def _ratio(numerator: float, denominator: float) -> float:
    """Return a ratio of norms; 1 if both are 0, infinity if only the denominator is."""
    if denominator:
        return numerator / denominator
    return math.inf if numerator else 1.0


def _fold(times: float) -> str:
    """Return by which factor to change a setting, in words; nothing if it is infinite."""
    return f" about {times:.0f}-fold" if math.isfinite(times) else ""
