"""Report what rankings hold: K, unfinished responses, pairs and contradictions."""

from __future__ import annotations

from collections import Counter, defaultdict
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from data.check.report import Report, rankings_of
from data.encode import encode_prompt, encode_response
from data.length_limit import equal_pairs
from data.records import Ranking, judged_pairs, prompt_key
from data.sources import Loaded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = 20
"""Locations that are named at most."""
Answer = tuple[str, bool]
"""The text of a response, and whether it is finished."""


def add_pairs(report: Report, loaded: Loaded, tokenizer: PreTrainedTokenizerBase | None, limit: int | None) -> None:
    """Report K, unfinished responses, labelers, pairs and contradictions of rankings.

    Args:
        report: Where facts go.
        loaded: The rankings.
        tokenizer: The tokenizer, if responses are truncated; otherwise None.
        limit: max_length in tokens, if responses are truncated; otherwise None.
    """
    rankings = rankings_of(loaded)
    sizes = Counter(len(ranking.responses) for ranking in rankings)
    report.add("K", " · ".join(f"{k}: {count:,} rows" for k, count in sorted(sizes.items())))
    finished = [value for ranking in rankings for value in ranking.finished or ()]
    if finished:
        cut = finished.count(False)
        report.add("unfinished", f"{cut:,} of {len(finished):,} responses were cut off: taught without EOS")
    labelers = {ranking.labeler for ranking in rankings if ranking.labeler is not None}
    if labelers:
        report.add("labelers", f"{len(labelers):,}")
    verdicts = Counter(verdict for ranking in rankings for *_, verdict in judged_pairs(ranking))
    others = " · ".join(f"{verdicts[name]:,} {name}" for name in ("tie", "unjudged", "identical"))
    equal = equal_within(loaded, tokenizer, limit) if tokenizer is not None and limit is not None else []
    usable = verdicts["usable"] - sum(count for _, count in equal)
    if equal:
        others += f" · {verdicts['usable'] - usable:,} equal within {limit} tokens"
    report.add("pairs", f"{usable:,} usable of {verdicts.total():,} · {others}")
    if equal:
        named = ", ".join(f"{location} ({count:,})" if count > 1 else location for location, count in equal[:NAMED])
        more = f" and {len(equal) - NAMED:,} more rows" if len(equal) > NAMED else ""
        report.add("equal within", f"{limit} tokens, and so left out: at {named}{more}")
    report.add("contradictions", contradictions(rankings))


def contradictions(rankings: list[Ranking]) -> str:
    """Describe how often labelers contradict each other, or themselves in a circle."""
    votes: defaultdict[tuple[str, frozenset[Answer]], list[Answer]] = defaultdict(list)  # pair → its winners
    better: defaultdict[str, dict[Answer, set[Answer]]] = defaultdict(dict)  # prompt → loser → winners
    for ranking in rankings:
        prompt, answers = prompt_key(ranking.prompt), ranking.answers
        usable = {(answers[i], answers[j]) for i, j, verdict in judged_pairs(ranking) if verdict == "usable"}
        for winner, loser in usable:
            votes[prompt, frozenset((winner, loser))].append(winner)
            better[prompt].setdefault(loser, set()).add(winner)
    repeated = [winners for winners in votes.values() if len(winners) > 1]
    split = sum(len(set(winners)) > 1 for winners in repeated)
    circles = sum(has_cycle(graph) for graph in better.values())
    return f"{split:,} of {len(repeated):,} pairs judged more than once · {circles:,} prompts ranked in a circle"


def equal_within(loaded: Loaded, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[tuple[str, int]]:
    """Find rankings with pairs that differ only after the limit, where long rows are truncated.

    Args:
        loaded: The rankings.
        tokenizer: The tokenizer.
        limit: max_length in tokens.

    Returns:
        (location, number of such pairs) of each such ranking.
    """
    affected = []
    for record, location in zip(rankings_of(loaded), loaded.locations, strict=True):
        responses = [encode_response(tokenizer, text, finished) for text, finished in record.answers]
        left = limit - len(encode_prompt(tokenizer, record.prompt))
        if left < 1 or max(map(len, responses)) <= left:
            continue  # dropped as a whole, or not truncated
        count = equal_pairs(record, [response[:left] for response in responses])
        if count:
            affected.append((location, count))
    return affected


def has_cycle(better: dict[Answer, set[Answer]]) -> bool:
    """Return whether a response is better than itself over some steps.

    Args:
        better: Response → the responses that beat it.
    """
    try:
        TopologicalSorter(better).prepare()
    except CycleError:
        return True
    return False
