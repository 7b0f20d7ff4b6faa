"""Choose the plots of training: learning curves of every stage, and the course of PPO."""

from collections.abc import Sequence
from dataclasses import dataclass

from stages.page.numbers import number
from stages.page.plot import Curves, Dots, Key, Level, Line, Mark, Plot, Point, smooth, thin

EACH_STEP, HELD_OUT = "each step", "held out"


@dataclass(frozen=True)
class Journal:
    """The rows that a training stage logged; a list is empty where it logged none."""

    metrics: list[dict]
    """Rows of metrics.jsonl: one for each step."""
    evaluations: list[dict]
    """Rows of evaluations.jsonl: one for each held-out evaluation."""
    samples: list[dict]
    """Rows of samples.jsonl: responses sampled at held-out evaluations."""


def series(rows: Sequence[dict], key: str, x: str = "step") -> list[Point]:
    """Return the points (x, key) of all rows that have the key."""
    return [(row[x], number(row[key])) for row in rows if key in row]


def curve_marks(raw: Sequence[Point], tone: str) -> list[Mark]:
    """Return a raw curve, drawn pale, and its moving average over it."""
    return [Line(thin(raw), tone, faint=True), Line(thin(smooth(raw)), tone)]


# -- learning curves -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LossText:
    """The words of a stage's loss curve."""

    stage: str
    """The stage whose loss it is."""
    title: str
    """The heading of the plot."""
    unit: str
    """The unit of the loss."""
    caption: str
    """How to read the plot."""


LOSSES = (
    LossText("base", "Pretraining loss", "nats per token",
             "Cross-entropy of the next token of a document. Its exponential is the perplexity."),
    LossText("sft", "Fine-tuning loss", "nats per token",
             "Cross-entropy of the demonstrated responses. Held-out dots that turn upwards mean overfitting."),
    LossText("rm", "Reward model loss", "nats per pair",
             "How surprised the reward model is by the labelers' choices. A loss of 0.69 = ln 2 is guessing."),
    LossText("dpo", "DPO loss", "loss per prompt",
             "This should fall. The sigmoid loss starts at 0.69 = ln 2, where policy and reference agree."),
)  # fmt: skip


def learning(journals: dict[str, Journal], reward_model: dict) -> list[Plot]:
    """Return the learning curves of all training stages.

    Args:
        journals: Stage → its journal.
        reward_model: The reward model's part of results.json.
    """
    plots = []
    for text in LOSSES:
        if text.stage not in journals:
            continue
        journal = journals[text.stage]
        plots += metric_plot(journal, f"{text.stage}-loss", text, "loss", log_y=text.stage == "base")
        if text.stage == "rm":
            plots += accuracy_plot(journal, reward_model)
    if "dpo" in journals:
        plots += implicit_rewards(journals["dpo"])
    return plots


def metric_plot(
    journal: Journal, name: str, text: LossText, key: str, *, log_y: bool = False, levels: Sequence[Level] = ()
) -> list[Plot]:
    """Return a plot of one metric over the steps.

    Args:
        journal: The rows that the stage logged.
        name: The name of the plot's file.
        text: The words of the plot.
        key: The metric.
        log_y: Whether the metric is drawn on a logarithmic axis.
        levels: Dashed lines for comparison.

    Returns:
        One plot, or none if the journal does not have the metric.
    """
    raw, held_out = series(journal.metrics, key), series(journal.evaluations, key)
    if not raw and not held_out:
        return []
    tone = text.stage
    marks = [*curve_marks(raw, tone), Dots(held_out, tone), *levels]
    keys = [Key(EACH_STEP, tone, "faint"), Key("smoothed", tone)]
    if held_out:
        keys.append(Key(HELD_OUT, tone, "dot"))
    drawing = Curves(marks, "optimizer step", text.unit, log_y=log_y)
    return [Plot(name, text.title, text.caption, drawing, tuple(keys), (key,))]


def accuracy_plot(journal: Journal, reward_model: dict) -> list[Plot]:
    """Return the reward model's accuracy over the steps, beside the agreement of labelers."""
    references = (
        ("labeler_agreement", "two labelers", "how often two labelers agree"),
        ("accuracy_ceiling", "best possible", "the best possible on these labels"),
    )
    known = [(value, name, meaning) for key, name, meaning in references
             if (value := number(reward_model.get(key))) is not None]  # fmt: skip
    highest = max((value for value, _, _ in known), default=None)
    levels = [Level(value, f"{name} {value:.3f}", below=value != highest) for value, name, _ in known]
    caption = "Share of pairs for which the reward model and the labeler prefer the same response"
    if known:
        caption += f". Dashed: {' and '.join(meaning for _, _, meaning in known)}"
    text = LossText("rm", "Reward model accuracy", "share of pairs", f"{caption}.")
    return metric_plot(journal, "rm-accuracy", text, "accuracy", levels=levels)


def implicit_rewards(journal: Journal) -> list[Plot]:
    """Return DPO's implicit rewards of preferred and other responses; none if it logged none."""
    if not any("rewards/chosen" in row for row in journal.metrics):
        return []
    marks: list[Mark] = []
    for key, tone in (("rewards/chosen", "dpo"), ("rewards/rejected", "soft")):
        marks += curve_marks(series(journal.metrics, key), tone)
    caption = "How much more likely each kind of response became than under SFT. What counts is the gap; both may fall."
    return [
        Plot("dpo-implicit-rewards", "DPO's implicit rewards", caption,
             Curves(marks, "optimizer step", "β · log-ratio in nats"),
             (Key("preferred", "dpo"), Key("other", "soft")), ("rewards/chosen", "rewards/rejected"))
    ]  # fmt: skip


# -- PPO -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """One metric of a plot of PPO."""

    metric: str
    """The metric's name in metrics.jsonl."""
    tone: str
    """The tone of its curve."""
    name: str
    """Its name in the legend."""
    held_out: str | None = None
    """The name of its held-out value in evaluations.jsonl, if there is one."""


@dataclass(frozen=True)
class CourseText:
    """A plot of PPO over episodes."""

    name: str
    """The name of the plot's file, without "ppo-"."""
    title: str
    """The heading of the plot."""
    unit: str
    """The unit of its y axis."""
    traces: tuple[Trace, ...]
    """What it shows."""
    caption: str
    """How to read it."""
    log_y: bool = False
    """Whether the y axis is logarithmic."""


PPO = (
    CourseText("score", "Score of the reward model", "score",
               (Trace("objective/scores", "ppo", "score", "score"),),
               "What PPO maximises: the mean score of its samples. Demonstrations score 0 on average."),
    CourseText("kl", "KL to SFT", "nats per response",
               (Trace("objective/kl", "ppo", "k1", "kl"), Trace("objective/kl_k3", "soft", "k3")),
               "How far the policy has moved from SFT, by two estimators that should agree. "
               "This is the price of the score."),
    CourseText("reward", "Penalised reward", "score − kl_coef · KL",
               (Trace("objective/rlhf_reward", "ppo", "reward", "rlhf_reward"),),
               "The score less the KL penalty. PPO maximises this, so it should rise to a plateau."),
    CourseText("entropy", "Entropy", "nats per token",
               (Trace("objective/entropy", "ppo", "entropy", "entropy"),),
               "How undecided the policy is at each token. A fall to 0 means that it gives only one response."),
    CourseText("length", "Length of responses", "tokens",
               (Trace("objective/length", "ppo", "length", "length"),),
               "Mean number of tokens per response. A score that rises only with length is a warning."),
    CourseText("ended", "Responses that end", "share",
               (Trace("objective/eos_rate", "ppo", "share", "eos_rate"),),
               "Share of responses that end by themselves instead of being cut off at the length limit."),
    CourseText("clipped", "Clipped tokens", "share of tokens",
               (Trace("policy/clipfrac_avg", "ppo", "clipped"),),
               "Share of tokens whose probability moved beyond the clip range in an update. "
               "Above about 0.3 the steps are too large."),
    CourseText("update", "Size of an update", "nats per token",
               (Trace("policy/approxkl_avg", "ppo", "KL of the update"),),
               "Approximate KL between the policy after an update and the policy that sampled. "
               "Small and steady values are healthy."),
    CourseText("value", "Value model", "explained variance",
               (Trace("val/explained_variance", "rm", "explained variance"),),
               "Share of the returns' variance that the value model predicts: 1 is perfect, 0 is no better "
               "than a constant."),
    CourseText("gradients", "Gradient norms", "norm",
               (Trace("grad_norm/ppo", "ppo", "PPO"), Trace("grad_norm/ptx", "base", "ptx"),
                Trace("grad_norm/value", "rm", "value")),
               "Norm of the PPO gradient beside ptx_coef times the pretraining gradient: which of them "
               "drives the step.", log_y=True),
    CourseText("pretraining", "Loss on pretraining text", "nats per token",
               (Trace("loss/ptx", "base", "ptx loss"),),
               "Cross-entropy on pretraining text. If it rises, the policy forgets what the base model knew."),
    CourseText("value-loss", "Value loss", "squared reward",
               (Trace("loss/value_avg", "rm", "value loss"),),
               "Clipped squared error of the value model. It should fall and then stay low.", log_y=True),
)  # fmt: skip


def ppo(journal: Journal) -> list[Plot]:
    """Return the plots of PPO over its episodes."""
    if not journal.metrics:
        return []
    episodes = episodes_by_step(journal)
    evaluations = [row | {"episode": episodes[row["step"]]} for row in journal.evaluations if row["step"] in episodes]
    plots = []
    for text in PPO:
        plots += course(text, journal.metrics, evaluations)
    return plots + two_reward_models(evaluations)


def course(text: CourseText, metrics: Sequence[dict], evaluations: Sequence[dict]) -> list[Plot]:
    """Return one plot of PPO over episodes.

    Args:
        text: What it shows, and its words.
        metrics: Rows of metrics.jsonl.
        evaluations: Rows of evaluations.jsonl, each with its episode.

    Returns:
        The plot, or none if none of its metrics was logged.
    """
    marks: list[Mark] = []
    names, dots = [], []
    for trace in text.traces:
        raw = series(metrics, trace.metric, "episode")
        if all(y is None for _, y in raw):
            continue
        marks += curve_marks(raw, trace.tone)
        names.append(Key(trace.name, trace.tone))
        held_out = series(evaluations, trace.held_out, "episode") if trace.held_out else []
        if held_out:
            marks.append(Dots(held_out, trace.tone))
            dots.append(Key(HELD_OUT, trace.tone, "dot"))
    if not names:
        return []
    keys = names + dots if len(names) > 1 else dots
    drawing = Curves(marks, "episodes", text.unit, log_y=text.log_y)
    metrics_shown = tuple(trace.metric for trace in text.traces)
    return [Plot(f"ppo-{text.name}", text.title, text.caption, drawing, tuple(keys), metrics_shown)]


def two_reward_models(evaluations: Sequence[dict]) -> list[Plot]:
    """Return the score that PPO maximises beside that of `ppo.held_out_reward_model`.

    Args:
        evaluations: Rows of evaluations.jsonl, each with its episode.

    Returns:
        The plot, or none if PPO had no held-out reward model.
    """
    maximised, other = (series(evaluations, key, "episode") for key in ("score", "held_out_score"))
    if all(y is None for _, y in other):
        return []
    marks = [Line(maximised, "ppo"), Dots(maximised, "ppo"), Line(other, "rm"), Dots(other, "rm")]
    caption = (
        "The reward model that PPO maximises, and one that it does not. Where they part, the gain in score comes "
        "from the first model's mistakes."
    )
    return [
        Plot("ppo-two-reward-models", "Two reward models on held-out prompts", caption,
             Curves(marks, "episodes", "score"),
             (Key("maximised", "ppo"), Key("ppo.held_out_reward_model", "rm")), ("score", "held_out_score"))
    ]  # fmt: skip


def episodes_by_step(journal: Journal) -> dict[int, int]:
    """Return update → episodes made until then; batches need not all be of one size."""
    return {0: 0} | {row["step"]: row["episode"] for row in journal.metrics}
