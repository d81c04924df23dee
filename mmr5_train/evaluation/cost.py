"""What a system of an evaluation costs: timing.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmr5_train.common.part_times import PARTS
from mmr5_train.evaluation.scoring import known_mean
from mmr5_train.ranking.records import ModelAnswer


def cost(
    answers: Sequence[ModelAnswer], greedy: float, sampling: float, parts: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """A system's time and tokens, from its greedy answers and the seconds of greedy answers and of samples.

    `seconds` is the total and includes sampling. `seconds_per_question`, its `parts` (`common.part_times`) and the
    mean token counts are those of the greedy answers; a count that a server does not report is left out.
    """
    names = ("tokens", "prompt_tokens", "visual_tokens")
    means = {name: known_mean(getattr(answer, name) for answer in answers) for name in names}
    seconds = {part: sum(batch.get(part, 0.0) for batch in parts) for part in PARTS}
    return {
        "seconds": greedy + sampling,
        "seconds_per_question": greedy / len(answers),
        "parts": {part: total / len(answers) for part, total in seconds.items() if total},
        **{name: mean for name, mean in means.items() if mean is not None},
    }
