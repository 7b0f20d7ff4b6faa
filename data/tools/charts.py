"""Count what records hold, one by one, and make charts of the counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from data.check.lengths import LengthTally, quantile, spread, texts_of
from data.check.report import Limits
from data.check.scripts import scripts_of
from data.records import Demonstration, Document, Ranking, Record, as_messages, judged_pairs
from data.turns import turns_of

MOST_BINS = 12
"""Bars of a histogram at most."""
MOST_NAMES = 12
"""Bars of names, such as labelers, at most."""
TAIL = 0.99
"""Share of the values that the equal bins cover; the rest is in a last one."""


@dataclass(frozen=True)
class Chart:
    """Hold a bar chart."""

    title: str
    """What is counted."""
    bars: list[tuple[str, int]]
    """(label, count) of each bar, in order."""
    note: str = ""
    """A sentence under the title."""


@dataclass
class Counts:
    """Count records of one kind."""

    kind: str
    """The kind of data."""
    limits: Limits
    """What lengths are counted with, and which answers are taught."""
    rows: int = 0
    """Records."""
    roles: Counter[str] = field(default_factory=Counter)
    """Role → messages."""
    turns: Counter[int] = field(default_factory=Counter)
    """Assistant turns of a conversation → conversations."""
    taught: Counter[bool] = field(default_factory=Counter)
    """Whether an assistant turn is taught → turns."""
    scripts: Counter[str] = field(default_factory=Counter)
    """Script → characters."""
    main_scripts: Counter[str] = field(default_factory=Counter)
    """Script that a record has most of → records."""
    responses: Counter[int] = field(default_factory=Counter)
    """K → rankings."""
    verdicts: Counter[str] = field(default_factory=Counter)
    """Verdict on a pair → pairs."""
    tiers: Counter[int] = field(default_factory=Counter)
    """Number of different ranks → rankings."""
    gaps: Counter[float] = field(default_factory=Counter)
    """Difference of the scores of a pair, to three digits → pairs."""
    labelers: Counter[str] = field(default_factory=Counter)
    """Labeler → rankings."""
    kinds: Counter[str] = field(default_factory=Counter)
    """The record's own `kind` → records."""
    users: Counter[str] = field(default_factory=Counter)
    """user_id → records."""

    def __post_init__(self) -> None:
        self.lengths = LengthTally(self.limits)

    def add(self, batch: Sequence[tuple[str, Record]]) -> None:
        """Count records.

        Args:
            batch: (location, record) of each.
        """
        self.lengths.add([record for _, record in batch], [name for name, _ in batch])
        for _, record in batch:
            self._add(record)

    def _add(self, record: Record) -> None:
        """Count one record."""
        self.rows += 1
        if record.kind is not None:
            self.kinds[record.kind] += 1
        if record.user_id is not None:
            self.users[record.user_id] += 1
        scripts: Counter[str] = Counter()
        for texts in texts_of(record).values():
            for text in texts:
                scripts += scripts_of(text)
        self.scripts += scripts
        self.main_scripts[scripts.most_common(1)[0][0] if scripts else "none"] += 1
        if isinstance(record, Document):
            return
        messages = as_messages(record.prompt)
        self.roles.update(message["role"] for message in messages)
        answers = sum(message["role"] == "assistant" for message in messages)
        if isinstance(record, Demonstration):
            taught = len(turns_of(record, self.limits.turns))
            self.roles["assistant"] += 1
            self.taught[True] += taught
            self.taught[False] += answers + 1 - taught
        self.turns[answers + 1] += 1
        if isinstance(record, Ranking):
            self._add_ranking(record)

    def _add_ranking(self, ranking: Ranking) -> None:
        """Count what only rankings have."""
        self.responses[len(ranking.responses)] += 1
        self.tiers[len({rank for rank in ranking.ranks if rank is not None})] += 1
        if ranking.labeler is not None:
            self.labelers[ranking.labeler] += 1
        for i, j, verdict in judged_pairs(ranking):
            self.verdicts[verdict] += 1
            if ranking.scores is None or verdict not in ("usable", "tie"):
                continue
            one, other = ranking.scores[i], ranking.scores[j]
            if one is not None and other is not None:
                self.gaps[float(f"{abs(one - other):.3g}")] += 1

    def charts(self) -> list[Chart]:
        """Return a chart of everything that was counted."""
        charts = []
        for part, counts in self.lengths.counted.items():
            unit = self.lengths.unit
            charts.append(histogram(f"{part} length in {unit}", counts, spread(counts, unit)))
        if self.roles:
            charts.append(Chart("messages by role", self.roles.most_common()))
            many = "" if not self.taught[False] else f"{self.taught[True]:,} of {self.taught.total():,} are learnt"
            charts.append(histogram("assistant turns of a conversation", self.turns, many))
        charts.append(named("records by the script they have most of", self.main_scripts))
        if len(self.scripts) > 1:
            charts.append(named("characters by script", self.scripts))
        if self.responses:
            charts.append(histogram("responses of a ranking, K", self.responses))
            charts.append(histogram("different ranks of a ranking", self.tiers, "fewer than K are ties"))
            charts.append(named("pairs", self.verdicts))
        if self.gaps:
            charts.append(float_histogram("score gap of a pair", self.gaps))
        if self.labelers:
            charts.append(named("rankings by labeler", self.labelers, f"{len(self.labelers):,} labelers"))
        if self.kinds:
            charts.append(named("records by kind", self.kinds, f"{len(self.kinds):,} kinds"))
        if self.users:
            charts.append(histogram("records of a user", Counter(self.users.values()), f"{len(self.users):,} users"))
        return charts


def named(title: str, counts: Counter[str], note: str = "") -> Chart:
    """Return a chart of named things, the most frequent first."""
    bars = counts.most_common(MOST_NAMES)
    rest = counts.total() - sum(count for _, count in bars)
    return Chart(title, [*bars, (f"{len(counts) - len(bars):,} others", rest)] if rest else bars, note)


def histogram(title: str, counts: Counter[int], note: str = "") -> Chart:
    """Return a chart of whole numbers, in bins of equal width and a last one for the tail.

    Args:
        title: What is counted.
        counts: {number: how many}.
        note: A sentence under the title.
    """
    low, high = min(counts), max(counts)
    width = nice_width(quantile(counts, TAIL) - low + 1)
    start = low // width * width
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[min((value - start) // width, MOST_BINS - 1)] += count
    bars = []
    for number in range(max(bins) + 1):
        first, last = start + number * width, start + (number + 1) * width - 1
        if number == MOST_BINS - 1 and high > last:
            last = high
        bars.append((f"{first:,}" if first == last else f"{first:,} to {last:,}", bins[number]))
    return Chart(title, bars, note)


def nice_width(span: int) -> int:
    """Return a bin width, 1, 2 or 5 times a power of ten, that cuts a span into few enough bins."""
    width = max(1, math.ceil(span / (MOST_BINS - 2)))
    power = 10 ** (len(str(width)) - 1)
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width)


def float_histogram(title: str, counts: Counter[float]) -> Chart:
    """Return a chart of numbers of at least 0, in equal bins from 0; zero has a bin of its own.

    Args:
        title: What is counted.
        counts: {number: how many}.
    """
    highest = max(counts)
    if highest == 0:
        return Chart(title, [("0", counts[0.0])])
    if len(counts) <= MOST_BINS:
        return Chart(title, [(f"{value:g}", counts[value]) for value in sorted(counts)])
    width = highest / (MOST_BINS - 2)
    power = 10 ** math.floor(math.log10(width))
    width = next(step * power for step in (1, 2, 5, 10) if step * power >= width)
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[0 if value == 0 else 1 + math.floor(value / width)] += count
    bars = [("0", bins[0])] if bins[0] else []
    for number in range(1, max(bins) + 1):
        bars.append((f"{(number - 1) * width:g} to {number * width:g}", bins[number]))
    return Chart(title, bars)


def text_lines(chart: Chart, width: int) -> Iterable[str]:
    """Yield the lines of a chart for the terminal.

    Args:
        chart: The chart.
        width: Columns.
    """
    yield f"{chart.title}{f'  ({chart.note})' if chart.note else ''}"
    total = sum(count for _, count in chart.bars) or 1
    largest = max((count for _, count in chart.bars), default=0) or 1
    labels = max((len(label) for label, _ in chart.bars), default=0)
    numbers = max((len(f"{count:,}") for _, count in chart.bars), default=0)
    room = max(10, width - labels - numbers - 14)
    for label, count in chart.bars:
        eighths = round(count / largest * room * 8)
        bar = "\u2588" * (eighths // 8) + " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[eighths % 8].strip()
        if count and not bar:
            bar = "\u258f"
        yield f"  {label:>{labels}}  {count:>{numbers},}  {count / total:4.0%}  {bar}".rstrip()
