"""Mode adaptive at every margin, from the answers of the modes logits and reason to the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

Row = dict[str, float]


def margin_curve(
    margins: Sequence[float],
    quick: Sequence[float],
    slow: Sequence[float],
    quick_seconds: float,
    slow_seconds: float,
) -> list[Row]:
    """For each margin that makes a difference: recall@1, the share of reasoned questions, seconds per question.

    `margins` are the differences of each question's two best scores. `quick` and `slow` are its recall@1 without
    and with reasoning.
    """
    rows = []
    for limit in [0.0, *(_above(value) for value in sorted({value for value in margins if value < 1})), 1.0]:
        reasons = [value < limit for value in margins]
        values = [s if reason else q for reason, q, s in zip(reasons, quick, slow, strict=True)]
        share = fmean(reasons)
        rows.append(
            {
                "margin": limit,
                "recall@1": fmean(values),
                "reasoned": share,
                "seconds_per_question": quick_seconds + share * slow_seconds,
            }
        )
    return rows


def _above(margin: float) -> float:
    """A number of six decimals just above a margin, so that a question with it is reasoned about."""
    return min(1.0, (math.floor(margin * 1e6) + 1) / 1e6)


def choose(curve: Mapping[str, Any], tolerance: float) -> Row:
    """The row with the least reasoning whose recall@1 is within `tolerance` of that of reason; else the best."""
    wanted = curve["modes"]["reason"]["recall@1"] - tolerance
    rows: list[Row] = curve["adaptive"]
    good = [row for row in rows if row["recall@1"] >= wanted - 1e-9]
    return min(good, key=lambda row: row["reasoned"]) if good else max(rows, key=lambda row: row["recall@1"])
