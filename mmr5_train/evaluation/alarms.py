"""Alarms of a GRPO run that collapses: what its log shows, and which knob to turn.

Each compares blocks of `BLOCK` logged steps. What counts as a change must be larger than chance: more than five
standard errors of the difference, and more than a floor that is stated beside it. docs/collapse.md shows each of
them ring on a run that was made to collapse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any, Literal

from mmr5_train.common.files import InputError

ALARMS = "alarms.json"
BLOCK = 20  # logged steps; a change can be told after two blocks
SURE = 5.0  # standard errors: in 300 steps of noise alone, fewer than one run in 100 shows such a change

Entry = Mapping[str, Any]
Action = Literal["warn", "stop", "off"]


@dataclass(frozen=True)
class Alarm:
    name: str
    step: int
    seen: str
    knob: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.name}: {self.seen}. {self.knob}"


@dataclass(frozen=True)
class Change:
    """A logged value's last block beside the block before it that it is furthest from, in one direction."""

    key: str
    then: float
    now: float

    def __str__(self) -> str:
        return f"{self.key} {self.then:.3g} → {self.now:.3g}"


def rose(history: Sequence[Entry], key: str, floor: float) -> Change | None:
    """The rise of the last block above the lowest one before it, None where it is less than `floor` or chance."""
    return _changed(history, key, floor, 1)


def fell(history: Sequence[Entry], key: str, floor: float) -> Change | None:
    """The fall of the last block below the highest one before it, None where it is less than `floor` or chance."""
    return _changed(history, key, floor, -1)


def _changed(history: Sequence[Entry], key: str, floor: float, sign: int) -> Change | None:
    blocks = _blocks(history, key)
    if len(blocks) < 2:
        return None
    last = blocks[-1]
    then = min(blocks[:-1], key=lambda block: sign * fmean(block))
    error = math.sqrt((variance(last) + variance(then)) / BLOCK)
    change = Change(key, fmean(then), fmean(last))
    return change if sign * (change.now - change.then) > max(floor, SURE * error) else None


def _blocks(history: Sequence[Entry], key: str) -> list[list[float]]:
    """What was logged under a key, in whole blocks counted from the end."""
    values = [entry[key] for entry in history if entry.get(key) is not None]
    return [values[end - BLOCK : end] for end in range(len(values), BLOCK - 1, -BLOCK)][::-1]


def _last_block(history: Sequence[Entry], key: str) -> float | None:
    blocks = _blocks(history, key)
    return fmean(blocks[-1]) if blocks else None


def ranking_falls(history: Sequence[Entry]) -> str | None:
    change = fell(history, "answers/reranking", 0.05)
    if change is None:
        return None
    form = rose(history, "rewards/template/mean", 0.0) or rose(history, "answers/complete", 0.0)
    return f"{change}" + (f", while {form}" if form else "")


def held_out_falls(history: Sequence[Entry]) -> str | None:
    """Fewer questions move more by chance: 200 must fall by 0.07, 400 or more by 0.05."""
    ranked = [entry for entry in history if "heldout/recall@1" in entry]
    if not ranked:
        return None
    best, now = max(entry["heldout/recall@1"] for entry in ranked), ranked[-1]["heldout/recall@1"]
    if now >= best - max(0.05, 1 / math.sqrt(ranked[-1]["heldout/questions"])):
        return None
    return f"heldout/recall@1 {best:.3g} → {now:.3g}"


def duplicates_rise(history: Sequence[Entry]) -> Change | None:
    return rose(history, "defects/duplicates", 0.05)


def length_runs_off(history: Sequence[Entry]) -> Change | None:
    lengths = _last_block(history, "completions/mean_length")
    longer = rose(history, "completions/mean_length", 0.3 * (lengths or 0))
    return longer or rose(history, "completions/clipped_ratio", 0.1)


def reasoning_rots(history: Sequence[Entry]) -> Change | None:
    return fell(history, "answers/true_verdicts", 0.05) or fell(history, "answers/follow_verdicts", 0.05)


def one_place_first(history: Sequence[Entry]) -> str | None:
    """Shuffled pages make every place equally likely: a model that reads them names each as often."""
    keys = {key for entry in history for key in entry if key.startswith("first/")}
    shares = {key: share for key in keys if (share := _last_block(history, key)) is not None}
    if len(shares) < 2:
        return None
    place, share = max(shares.items(), key=lambda item: item[1])
    if share < 1 / len(shares) + 0.3:
        return None
    return f"place {place.removeprefix('first/')} of the prompt is put first in {share:.0%} of the answers"


def no_spread(history: Sequence[Entry]) -> str | None:
    share = _last_block(history, "frac_reward_zero_std")
    if share is None or share < 0.95:
        return None
    return f"in {share:.0%} of the groups all completions earn the same"


# name → (what shows it in the log, what to do about it)
CHECKS: dict[str, tuple[Callable[[Sequence[Entry]], Change | str | None], str]] = {
    "ranking falls": (
        ranking_falls,
        "A reward that pays for the form alone is the easy way out: reward=gated; or a smaller "
        "trainer.learning_rate, more questions a step, trainer.beta above 0.",
    ),
    "held-out ranking falls": (
        held_out_falls,
        "The best checkpoint is kept. Try a trainer.learning_rate that falls to 0, or more questions a step.",
    ),
    "duplicates rise": (
        duplicates_rise,
        "Repeated ids cost nothing under the reward template: reward=gated or reward=permutation.",
    ),
    "length runs off": (
        length_runs_off,
        "trainer.beta above 0, trainer.mask_truncated_completions=true, or a smaller trainer.learning_rate.",
    ),
    "reasoning rots": (
        reasoning_rots,
        "Only the answer is paid and nothing holds what is said before it: trainer.beta above 0, "
        "reward=true_reasoning, or a smaller trainer.learning_rate.",
    ),
    "one place comes first": (
        one_place_first,
        "The answer no longer depends on the pages: train SFT until its answers follow its verdicts, then "
        "trainer.beta above 0 and a smaller trainer.learning_rate.",
    ),
    "groups without spread": (
        no_spread,
        "There is nothing left to learn from: harder questions (difficulty of mmr5_train.select), a higher "
        "trainer.temperature, more trainer.num_generations.",
    ),
}


def ringing(history: Sequence[Entry], step: int) -> list[Alarm]:
    """The alarms that a log up to now gives reason for."""
    return [
        Alarm(name, step, str(seen), knob) for name, (check, knob) in CHECKS.items() if (seen := check(history))
    ]


def read_alarms(out: Path) -> list[Alarm]:
    """The alarms that rang in a training stage's folder, in order."""
    path = out / ALARMS
    if not path.is_file():
        return []
    try:
        return [Alarm(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: not a list of alarms ({error}); remove it, or train again") from None
