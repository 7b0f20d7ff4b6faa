"""Encode demonstrations whole, for tests that look at all rows."""

from dataclasses import dataclass

from data.encode import DemonstrationEncoder
from data.length_limit import LengthLimiter, LengthReport


@dataclass
class Encoded:
    """Rows {input_ids, labels}, the index of each row's demonstration, and what was counted."""

    rows: list[dict]
    origins: list[int]
    answer_tokens: list[int]
    apart: tuple[int, str]
    report: LengthReport


def encode_demonstrations(tokenizer, demonstrations, names, max_length, on_too_long, section, turns="all") -> Encoded:
    """Encode demonstrations with distinct names."""
    encoder = DemonstrationEncoder(tokenizer, LengthLimiter(max_length, on_too_long, "demonstration", section), turns)
    rows = list(encoder.rows(demonstrations, names))
    return Encoded(
        rows=[{"input_ids": row.ids, "labels": row.labels} for row in rows],
        origins=[list(names).index(row.place) for row in rows],
        answer_tokens=[end - begin for row in rows for begin, end in row.spans],
        apart=(encoder.apart, encoder.first_apart),
        report=encoder.finished(),
    )
