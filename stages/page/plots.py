"""Which plots the report has: rows of journals and samples in, Figures out (report_svg.py draws)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stages.page.svg import Axes, Figure, Point, dot_plot, smooth, thin
from stages.page.words import judge_of, listed, number

TRAIN, HELD_OUT = "each step", "held out"
PARTS = ("helpful", "honest", "harmless", "overall")


@dataclass(frozen=True)
class Journal:
    """Rows of a stage's metrics.jsonl, evaluations.jsonl and samples.jsonl; [] where there are none."""

    metrics: list[dict]
    evaluations: list[dict]
    samples: list[dict]


def series(rows: Sequence[dict], key: str, x: str = "step") -> list[Point]:
    """Points (x, key) of the rows that know the key."""
    return [(row[x], number(row[key])) for row in rows if key in row]


# -- learning curves -------------------------------------------------------------------------------------


def learning(journals: dict[str, Journal], rm: dict) -> list[Figure]:
    """Loss of every training stage, the reward model's accuracy, DPO's implicit rewards."""
    texts = {
        "base": (
            "Pretraining loss",
            "nats a token",
            "Cross-entropy of the next token of a document; e to its power is the perplexity.",
        ),
        "sft": (
            "Fine-tuning loss",
            "nats a token",
            "Cross-entropy of demonstrated answers; held-out dots that turn upwards mean overfitting.",
        ),
        "rm": (
            "Reward model loss",
            "nats a pair",
            "How surprised the reward model is by the labelers' choices; 0.69 = ln 2 is guessing.",
        ),
        "dpo": (
            "DPO loss",
            "loss a prompt",
            "Should fall; the sigmoid loss starts at 0.69 = ln 2, where policy and reference agree.",
        ),
    }
    figures = []
    for stage, (title, unit, caption) in texts.items():
        if stage in journals:
            figures += curve(journals[stage], title, unit, caption, stage, "loss", log_y=stage == "base")
        if stage == "rm" and stage in journals:
            known = [
                (number(rm.get(key)), mark, words)
                for key, mark, words in (
                    ("labeler_agreement", "two labelers", "how often two labelers agree"),
                    ("accuracy_ceiling", "best reachable", "the best reachable on these labels"),
                )
            ]
            known = [level for level in known if level[0] is not None]
            dashed = f"; dashed: {' and '.join(words for *_, words in known)}" if known else ""
            figures += curve(
                journals["rm"],
                "Reward model accuracy",
                "share of pairs",
                f"Share of pairs on which reward model and labeler prefer the same response{dashed}.",
                "rm",
                "accuracy",
                levels=[(value, mark) for value, mark, _ in known],
            )
    if "dpo" in journals and any("rewards/chosen" in row for row in journals["dpo"].metrics):
        chosen, rejected = (series(journals["dpo"].metrics, f"rewards/{k}") for k in ("chosen", "rejected"))
        axes = Axes(*columns(chosen, rejected), "optimizer step", "β · log-ratio, in nats")
        for points, tone in ((chosen, "dpo"), (rejected, "soft")):
            axes.line(thin(points), tone, "faint")
            axes.line(thin(smooth(points)), tone)
        figures.append(
            Figure(
                "DPO's implicit rewards",
                axes.svg("DPO's implicit rewards"),
                "How much likelier than under SFT each kind of response became; the gap counts, both may fall.",
                (("preferred", "dpo", "line"), ("other", "soft", "line")),
                ("rewards/chosen", "rewards/rejected"),
            )
        )
    return figures


def curve(
    journal: Journal,
    title: str,
    unit: str,
    caption: str,
    tone: str,
    key: str,
    *,
    log_y: bool = False,
    levels: Sequence[tuple[float, str]] = (),
) -> list[Figure]:
    """One metric over the steps: raw, smoothed, held-out dots, levels; [] if the journal has none."""
    raw, held = series(journal.metrics, key), series(journal.evaluations, key)
    if not raw and not held:
        return []
    xs, ys = columns(raw, held)
    axes = Axes(xs, ys + [v for v, _ in levels], "optimizer step", unit, log_y=log_y)
    axes.line(thin(raw), tone, "faint")
    axes.line(thin(smooth(raw)), tone)
    axes.dots(held, tone)
    highest = max((v for v, _ in levels), default=None)
    for value, text in levels:
        axes.level(value, f"{text} {value:.3f}", below=value != highest)
    keys = ((TRAIN, tone, "faint"), ("smoothed", tone, "line")) + (((HELD_OUT, tone, "dot"),) if held else ())
    return [Figure(title, axes.svg(title), caption, keys, (key,))]


# -- PPO -------------------------------------------------------------------------------------------------


PPO = (  # title, unit, log scale, (metric, key of evaluations.jsonl | None, tone, its name), caption
    (
        "Score of the reward model",
        "score",
        False,
        (("objective/scores", "score", "ppo", "score"),),
        "What PPO climbs: mean score of its samples, where demonstrations score 0.",
    ),
    (
        "KL to SFT",
        "nats a response",
        False,
        (("objective/kl", "kl", "ppo", "k1"), ("objective/kl_k3", None, "soft", "k3")),
        "How far the policy has gone from SFT, by two estimators that should agree: the price of the score.",
    ),
    (
        "Penalised reward",
        "score − kl_coef · KL",
        False,
        (("objective/rlhf_reward", "rlhf_reward", "ppo", "reward"),),
        "The score less the penalty for KL: what is truly maximised, so it should rise to a plateau.",
    ),
    (
        "Entropy",
        "nats a token",
        False,
        (("objective/entropy", "entropy", "ppo", "entropy"),),
        "How undecided the policy is at each token; a fall to 0 means that it says one thing only.",
    ),
    (
        "Length of responses",
        "tokens",
        False,
        (("objective/length", "length", "ppo", "length"),),
        "Mean tokens a response; a score that rises only with the length is a warning.",
    ),
    (
        "Responses that end",
        "share",
        False,
        (("objective/eos_rate", "eos_rate", "ppo", "share"),),
        "Share of responses that end by themselves and are not cut off at the length limit.",
    ),
    (
        "Clipped tokens",
        "share of tokens",
        False,
        (("policy/clipfrac_avg", None, "ppo", "clipped"),),
        "Share of tokens whose probability moved beyond the clip range in an update; above about 0.3 steps "
        "are too large.",
    ),
    (
        "Size of an update",
        "nats a token",
        False,
        (("policy/approxkl_avg", None, "ppo", "KL of the update"),),
        "How far one update moves the policy from the one that sampled, as an approximate KL: small and "
        "steady is sound.",
    ),
    (
        "Value model",
        "explained variance",
        False,
        (("val/explained_variance", None, "rm", "explained variance"),),
        "Share of the returns' variance that the value model foretold: 1 is perfect, 0 as good as a constant.",
    ),
    (
        "Gradient norms",
        "norm",
        True,
        (
            ("grad_norm/ppo", None, "ppo", "PPO"),
            ("grad_norm/ptx", None, "base", "ptx"),
            ("grad_norm/value", None, "rm", "value"),
        ),
        "Size of the PPO gradient beside ptx_coef times the pretraining gradient: who steers the step.",
    ),
    (
        "Loss on pretraining text",
        "nats a token",
        False,
        (("loss/ptx", None, "base", "ptx loss"),),
        "Cross-entropy on pretraining text; if it rises, the policy forgets what base knew.",
    ),
    (
        "Value loss",
        "squared reward",
        True,
        (("loss/value_avg", None, "rm", "value loss"),),
        "Squared error of the value model, clipped; it should fall and then stay low.",
    ),
)


def ppo(journal: Journal) -> list[Figure]:
    """The course of PPO over episodes."""
    if not journal.metrics:
        return []
    episodes = episodes_by_step(journal)
    looks = [row | {"episode": episodes[row["step"]]} for row in journal.evaluations if row["step"] in episodes]
    figures = []
    for title, unit, log_y, lines, caption in PPO:
        drawn = [
            (series(journal.metrics, metric, "episode"), series(looks, held, "episode") if held else [], tone, name)
            for metric, held, tone, name in lines
        ]
        drawn = [d for d in drawn if any(y is not None for _, y in d[0])]
        if not drawn:
            continue
        axes = Axes(*columns(*(d[0] for d in drawn), *(d[1] for d in drawn)), "episodes", unit, log_y=log_y)
        for raw, held, tone, _ in drawn:
            axes.line(thin(raw), tone, "faint")
            axes.line(thin(smooth(raw)), tone)
            axes.dots(held, tone)
        keys = [(name, tone, "line") for _, _, tone, name in drawn] if len(drawn) > 1 else []
        keys += [(HELD_OUT, d[2], "dot") for d in drawn if d[1]]
        metrics = tuple(metric for metric, *_ in lines)
        figures.append(Figure(title, axes.svg(f"{title} over PPO's episodes"), caption, tuple(keys), metrics))
    return figures + other_judge(looks)


def other_judge(looks: Sequence[dict]) -> list[Figure]:
    """The climbed score beside that of `ppo.held_out_reward_model`; [] where PPO was given none."""
    own, other = (series(looks, key, "episode") for key in ("score", "held_out_score"))
    if not any(y is not None for _, y in other):
        return []
    axes = Axes(*columns(own, other), "episodes", "score")
    for points, tone in ((own, "ppo"), (other, "rm")):
        axes.line(points, tone)
        axes.dots(points, tone)
    return [
        Figure(
            "Two reward models on held-out prompts",
            axes.svg("score by two reward models over PPO's episodes"),
            "The one that PPO climbs, and one that it does not: where they part, the score is won from the first one's "
            "mistakes.",
            (("climbed", "ppo", "line"), ("ppo.held_out_reward_model", "rm", "line")),
            ("score", "held_out_score"),
        )
    ]


def episodes_by_step(journal: Journal) -> dict[int, int]:
    """How many episodes PPO had made after each of its updates: batches need not all be of one size."""
    return {0: 0} | {row["step"]: row["episode"] for row in journal.metrics}


# -- what was gained, and at what price ------------------------------------------------------------------


def frontier(results: dict, journal: Journal | None, best_of: int, names: dict[str, str]) -> list[Figure]:
    """Score (and gold) of every policy against its KL to SFT."""
    policies = results["policies"]
    kl = {name: number(p["kl_to_sft"]) for name, p in policies.items()}
    if "best_of_n" in policies and kl["best_of_n"] is None:
        kl["best_of_n"] = math.log(best_of) - (best_of - 1) / best_of
    note = " Best of n stands at its theoretical KL, ln n − (n − 1)/n." if "best_of_n" in policies else ""
    climbing = [names[n] for n in ("ppo", "best_of_n") if n in policies]
    warning = f" {listed(climbing)} climb this score: what is higher here need not be better." if climbing else ""
    warning = warning.replace(" climb ", " climbs ") if len(climbing) == 1 else warning
    figures = []
    for what, title, unit in (
        ("score", "Reward against KL", "score of the reward model"),
        ("gold", "Gold against KL", "gold, overall (0 to 1)"),
    ):
        value = {n: p["score"] if what == "score" else (p["gold"] or {}).get("overall") for n, p in policies.items()}
        points = [(kl[n], value[n], names[n], n) for n in policies if None not in (kl[n], number(value[n]))]
        path = series_pairs(journal.evaluations, "kl", "score") if journal and what == "score" else []
        if len(points) < 2:
            continue
        axes = Axes(
            *columns([p[:2] for p in points], path),
            "KL to SFT, nats a response (square-root axis)",
            unit,
            width=520,
            height=320,
            root_x=True,
        )
        axes.line(path, "ppo", "faint")
        axes.dots(path, "ppo", 2.4)
        for x, y, name, tone in points:
            axes.dots([(x, y)], tone, 7, f"{name}: {y:.3f} at {x:.2f} nats")
        axes.names(points)
        caption = {
            "score": f"Up is a higher score, right is further from SFT.{warning}",
            "gold": "The same with the truth in place of the reward model: a score that gold does not "
            "follow was won from the reward model's mistakes.",
        }[what]
        keys = (("PPO while it trains, held out", "ppo", "faint"),) if path else ()
        figures.append(Figure(title, axes.svg(title), caption + note, keys))
    return figures


def series_pairs(rows: Sequence[dict], x: str, y: str) -> list[Point]:
    return [(number(row.get(x)), number(row.get(y))) for row in rows]


def win_rates(results: dict, names: dict[str, str]) -> list[Figure]:
    rows = []
    for name, p in results["policies"].items():
        rate = p["win_rate_vs_sft"]
        if name != "sft" and rate:
            rows.append((names[name], [(rate["value"], *rate["ci95"], name, f"{rate['value']:.3f}")]))
    if not rows:
        return []
    judge = judge_of(results)
    climbed = [names[n] for n, p in results["policies"].items() if p["judge_climbed"] and p["win_rate_vs_sft"]]
    warning = f" The judge is the model that {' and '.join(climbed)} climbed, which flatters it." if climbed else ""
    svg = dot_plot(rows, "win rate against SFT, share of prompts", "win rates", reference=0.5)
    return [
        Figure(
            "Win rates",
            svg,
            f"Share of evaluation prompts on which {judge} prefers the policy's "
            "response to SFT's, ties half, with 95 % intervals; one that crosses the dashed line "
            f"could be chance.{warning}",
        )
    ]


def gold_parts(results: dict, names: dict[str, str]) -> list[Figure]:
    policies = {n: p["gold"] for n, p in results["policies"].items() if p["gold"]}
    if not policies:
        return []
    mark = lambda n, part: (policies[n][part], None, None, n, f"{names[n]} {policies[n][part]:.3f}")  # noqa: E731
    rows = [(part, [mark(n, part) for n in policies]) for part in PARTS]
    halves = (("known tasks", "gold_known_tasks"), ("held-out tasks", "gold_held_out_tasks"))
    for title, key in halves:
        found = {n: results["policies"][n][key] for n in policies}
        if all(found.values()):
            spans = {n: gold["ci95"] or (None, None) for n, gold in found.items()}
            rows.append(
                (title, [(g["overall"], *spans[n], n, f"{names[n]} {g['overall']:.3f}") for n, g in found.items()])
            )
    apart = len(rows) - len(PARTS)
    rest = (
        " The last two are gold overall, apart for tasks that training set too and for those that it never set, with "
        "95 % intervals." if apart == len(halves) else ""
    )  # fmt: skip
    svg = dot_plot(rows, "mean gold, 0 to 1", "gold by part", labelled=False)
    return [
        Figure(
            "Where quality comes from",
            svg,
            f"Each line is one part of gold and each dot a policy; further right is better.{rest}",
            tuple((names[n], n, "dot") for n in policies),
        )
    ]


def columns(*points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """All x and all y of several series, for the extent of the axes."""
    pairs = [(x, y) for part in points for x, y in part if x is not None and y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]
