"""What goes wrong in a PPO run, seen from its figures: each alarm names what to turn. Warnings, or a stop if asked.

The windows are part of a checkpoint, so that a resumed run raises what an uninterrupted one raises.
"""

import math
from dataclasses import dataclass, field
from statistics import median_high, median_low

WINDOW = 20  # updates over which the two gradients are compared by the median
AT_ONCE = 3  # updates in a row that need no median
BESIDE = 10.0  # one gradient drowns the other beyond this ratio
SHORT = 5  # updates in a row that make a habit
QUIET = 50  # updates before the same alarm is raised again
LOOKS = 2  # held-out looks in a row
ENDS = 0.05  # share of responses with EOS below which hardly any ends
FEWER = 0.5  # of the share that ended at first: if fewer end while the score rises, being cut is what pays
FULL = 0.9  # of response_length: responses this long on average run to the limit


@dataclass
class Alarms:
    """kl_limit: nats a response, None = no limit; entropy_floor: share of the entropy of the first updates; room: the
    longest response in tokens, None = not known.

    windows: the last figures of each kind; first: the entropy of the first updates; raised: alarm → update of the
    last time it was said; count: alarm → how often.
    """

    kl_limit: float | None
    entropy_floor: float
    room: int | None = None
    windows: dict[str, list[float]] = field(default_factory=dict)
    raised: dict[str, int] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def watch(self, step: int, row: dict[str, float]) -> list[str]:
        """After an update: row, its line of metrics.jsonl → alarms, a sentence each."""
        kl, eos, entropy = (row[f"objective/{name}"] for name in ("kl", "eos_rate", "entropy"))
        first = self._push("first_entropy", entropy, SHORT, keep_first=True)
        found = {}
        if self.kl_limit is not None and kl > self.kl_limit:
            found["kl"] = (
                f"KL to the reference is {kl:.1f} nats a response, over alarm_kl {self.kl_limit:g}; raise ppo.kl_coef, "
                f"or lower ppo.learning_rate"
            )
        entropies, start = self._push("entropy", entropy, SHORT), sum(first) / max(1, len(first))
        if len(entropies) == SHORT and max(entropies) < self.entropy_floor * start:
            found["entropy"] = (
                f"entropy is {entropy:.3g} nats a token and was {start:.3g} at first: the policy collapses to few "
                f"answers; raise ppo.kl_coef or ppo.ptx_coef, or lower ppo.learning_rate"
            )
        ends = self._push("eos_rate", eos, SHORT)
        if len(ends) == SHORT and max(ends) < ENDS:
            found["length"] = (
                f"hardly a response of {SHORT} updates ended with EOS within response_length; raise "
                f"ppo.response_length, set ppo.missing_eos_score below the scores, or ppo.length_penalty, or train sft "
                f"longer"
            )
        found |= self._unfinished(row, ends)
        if "grad_norm/ptx" in row and math.isfinite(row["grad_norm/ppo"] + row["grad_norm/ptx"]):
            found |= self._drowned(row["grad_norm/ppo"], row["grad_norm/ptx"])
        return self._say(step, found)

    def look(self, step: int, figures: dict[str, float]) -> list[str]:
        """After a look at held-out prompts: score (the judge PPO climbs) against held_out_score (another's)."""
        if "held_out_score" not in figures:
            return []
        own = self._push("score", figures["score"], LOOKS + 1)
        other = self._push("held_out_score", figures["held_out_score"], LOOKS + 1)
        rises = all(b > a for a, b in zip(own, own[1:], strict=False))
        falls = all(b < a for a, b in zip(other, other[1:], strict=False))
        if len(own) <= LOOKS or not (rises and falls):
            return []
        text = (
            f"the score rose over {LOOKS} looks ({own[0]:.3g} to {own[-1]:.3g}) while the held-out reward model's fell "
            f"({other[0]:.3g} to {other[-1]:.3g}): the policy outwits its reward model; raise ppo.kl_coef, use "
            f"ppo.keep: best, or train rm on more rankings"
        )
        return self._say(step, {"overoptimisation": text})

    def state(self) -> dict:
        return {"windows": self.windows, "raised": self.raised, "count": self.count}

    def restore(self, state: dict) -> None:
        self.windows, self.raised, self.count = state["windows"], state["raised"], state["count"]

    def _unfinished(self, row: dict[str, float], ends: list[float]) -> dict[str, str]:
        """Return the alarms if far fewer responses end than at first while the score rises, and if responses run to
        the limit: cut answers pay then, and the policy learns not to finish.

        Args:
            row: figures of this update.
            ends: the share of responses with EOS, of the last updates.
        """
        found = {}
        first_ends = self._push("first_eos_rate", row["objective/eos_rate"], SHORT, keep_first=True)
        first_scores = self._push("first_scores", row["objective/scores"], SHORT, keep_first=True)
        scores = self._push("scores", row["objective/scores"], SHORT)
        lengths = self._push("length", row["objective/length"], SHORT)
        if min(map(len, (ends, first_ends, scores, first_scores))) == SHORT:
            before, now, low, high = (sum(x) / SHORT for x in (first_ends, ends, first_scores, scores))
            if before > ENDS and max(ends) < FEWER * before and high > low:
                found["unfinished"] = (
                    f"{now:.0%} of the responses of {SHORT} updates ended with EOS, {before:.0%} did at first, and the "
                    f"score rose from {low:.3g} to {high:.3g}: being cut pays; set ppo.missing_eos_score below the "
                    f"scores of finished answers, or raise ppo.response_length"
                )
        if self.room is not None and len(lengths) == SHORT and min(lengths) > FULL * self.room:
            found["limit"] = (
                f"responses run to the limit: {sum(lengths) / SHORT:.0f} tokens on average in {SHORT} updates, of "
                f"ppo.response_length {self.room}; raise it, set ppo.missing_eos_score below the scores, or "
                f"ppo.length_penalty"
            )
        return found

    def _drowned(self, ppo: float, ptx: float) -> dict[str, str]:
        """Return the alarm if one gradient is more than ten times the other: in each of the last
        three updates, or in more than half of the last twenty.

        Three in a row show a wrong ptx_coef before it has spoilt the policy; the median shows one
        that an even update now and then would hide. Two updates out of three show nothing.

        Args:
            ppo: norm of PPO's policy gradient in this update, before ptx is added.
            ptx: norm of ptx_coef times the pretraining gradient.
        """
        pairs = zip(self._push("ppo", ppo, WINDOW), self._push("ptx", ptx, WINDOW), strict=True)
        ratios = [_ratio(of_text, of_reward) for of_reward, of_text in pairs]
        recent = ratios[-AT_ONCE:]
        if len(recent) == AT_ONCE and (min(recent) > BESIDE or max(recent) < 1 / BESIDE):
            judged = recent
        elif len(ratios) == WINDOW:
            judged = ratios
        else:
            return {}
        updates = f"over the last {len(judged)} updates"
        if (times := median_low(judged)) > BESIDE:
            return {
                "ptx": f"the pretraining gradient was {times:.3g} times PPO's {updates}: the policy learns from the "
                f"pretraining text and hardly from its reward; lower ppo.ptx_coef{_fold(times)}"
            }
        if (times := _ratio(1, median_high(judged))) > BESIDE:
            return {
                "ppo": f"PPO's gradient was {times:.3g} times the pretraining gradient {updates}: the pretraining text "
                f"hardly counts; raise ppo.ptx_coef{_fold(times)}, or set it to 0, which saves that gradient's cost"
            }
        return {}

    def _push(self, name: str, value: float, length: int, keep_first: bool = False) -> list[float]:
        window = self.windows.setdefault(name, [])
        if math.isfinite(value) and not (keep_first and len(window) == length):
            window.append(value)
            del window[:-length]
        return window

    def _say(self, step: int, found: dict[str, str]) -> list[str]:
        lines = []
        for name, text in found.items():
            self.count[name] = self.count.get(name, 0) + 1
            if step - self.raised.get(name, -QUIET) >= QUIET:
                self.raised[name] = step
                lines.append(f"update {step}: {text}")
        return lines


def _ratio(one: float, other: float) -> float:
    """Return one / other; 1 where both are 0, infinity where only the other is."""
    return one / other if other else math.inf if one else 1.0


def _fold(times: float) -> str:
    return f" about {times:.0f}-fold" if math.isfinite(times) else ""
