"""Alarms for a GRPO run that collapses. Each one says what the training log shows and which setting to change.

Each alarm compares blocks of `BLOCK` logged steps. A change counts only if it exceeds both a fixed floor and
`STANDARD_ERRORS` standard errors of the difference, so noise rarely raises an alarm. docs/training.md shows every
alarm on a run that was set up to collapse.
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
BLOCK = 20  # logged steps in a block; detecting a change takes two blocks
STANDARD_ERRORS = 5.0  # 300 steps of pure noise exceed this in fewer than 1 of 100 runs

Entry = Mapping[str, Any]
Action = Literal["warn", "stop", "off"]


@dataclass(frozen=True)
class Alarm:
    """One raised alarm, and one entry of alarms.json: what the log showed and what to change."""

    name: str
    step: int
    seen: str
    knob: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.name}: {self.seen}. {self.knob}"


@dataclass(frozen=True)
class Change:
    """Means of a logged value over two blocks: an earlier one, and the latest one."""

    key: str
    before: float
    now: float

    def __str__(self) -> str:
        return f"{self.key} {self.before:.3g} → {self.now:.3g}"


def rise(history: Sequence[Entry], key: str, floor: float) -> Change | None:
    """Rise of the latest block above the lowest earlier block; None if below `floor` or not significant."""
    return _change(history, key, floor, 1)


def fall(history: Sequence[Entry], key: str, floor: float) -> Change | None:
    """Fall of the latest block below the highest earlier block; None if below `floor` or not significant."""
    return _change(history, key, floor, -1)


def _change(history: Sequence[Entry], key: str, floor: float, sign: int) -> Change | None:
    blocks = _blocks(history, key)
    if len(blocks) < 2:
        return None
    latest = blocks[-1]
    reference = min(blocks[:-1], key=lambda block: sign * fmean(block))
    error = math.sqrt((variance(latest) + variance(reference)) / BLOCK)
    change = Change(key, fmean(reference), fmean(latest))
    return change if sign * (change.now - change.before) > max(floor, STANDARD_ERRORS * error) else None


def _blocks(history: Sequence[Entry], key: str) -> list[list[float]]:
    """The values logged under a key, split into full blocks counted from the end."""
    values = [entry[key] for entry in history if entry.get(key) is not None]
    return [values[end - BLOCK : end] for end in range(len(values), BLOCK - 1, -BLOCK)][::-1]


def _latest_mean(history: Sequence[Entry], key: str) -> float | None:
    blocks = _blocks(history, key)
    return fmean(blocks[-1]) if blocks else None


def ranking_falls(history: Sequence[Entry]) -> str | None:
    change = fall(history, "answers/reranking", 0.05)
    if change is None:
        return None
    format_rise = rise(history, "rewards/template/mean", 0.0) or rise(history, "answers/complete", 0.0)
    return f"{change}" + (f", while {format_rise}" if format_rise else "")


def held_out_falls(history: Sequence[Entry]) -> str | None:
    """The threshold grows as the question set shrinks: 0.07 for 200 questions, 0.05 for 400 or more."""
    evaluations = [entry for entry in history if "heldout/recall@1" in entry]
    if not evaluations:
        return None
    best, now = max(entry["heldout/recall@1"] for entry in evaluations), evaluations[-1]["heldout/recall@1"]
    if now >= best - max(0.05, 1 / math.sqrt(evaluations[-1]["heldout/questions"])):
        return None
    return f"heldout/recall@1 {best:.3g} → {now:.3g}"


def duplicates_rise(history: Sequence[Entry]) -> Change | None:
    return rise(history, "defects/duplicates", 0.05)


def length_grows(history: Sequence[Entry]) -> Change | None:
    mean_length = _latest_mean(history, "completions/mean_length")
    longer = rise(history, "completions/mean_length", 0.3 * (mean_length or 0))
    return longer or rise(history, "completions/clipped_ratio", 0.1)


def reasoning_degrades(history: Sequence[Entry]) -> Change | None:
    return fall(history, "answers/true_verdicts", 0.05) or fall(history, "answers/follow_verdicts", 0.05)


def one_position_first(history: Sequence[Entry]) -> str | None:
    """GRPO shuffles the pages of a prompt, so a model that reads them ranks every position first equally often."""
    keys = {key for entry in history for key in entry if key.startswith("first/")}
    shares = {key: share for key in keys if (share := _latest_mean(history, key)) is not None}
    if len(shares) < 2:
        return None
    position, share = max(shares.items(), key=lambda item: item[1])
    if share < 1 / len(shares) + 0.3:
        return None
    return (
        f"position {position.removeprefix('first/')} of the prompt is ranked first in {share:.0%} of the answers"
    )


def zero_variance_groups(history: Sequence[Entry]) -> str | None:
    share = _latest_mean(history, "frac_reward_zero_std")
    if share is None or share < 0.95:
        return None
    return f"in {share:.0%} of the groups all completions get the same reward"


def engine_differs(history: Sequence[Entry]) -> str | None:
    """With vLLM: how far its log-probabilities of the sampled tokens are from the trainer's."""
    difference = _latest_mean(history, "sampling/sampling_logp_difference/mean")
    if difference is None or difference < 0.1:
        return None
    return f"the log-probabilities of vLLM and of the trainer differ by {difference:.2g} per token"


# name → (check of the log, which settings to change)
CHECKS: dict[str, tuple[Callable[[Sequence[Entry]], Change | str | None], str]] = {
    "ranking falls": (
        ranking_falls,
        "The model can raise the format reward without ranking better. Set reward=gated, lower "
        "trainer.learning_rate, use more questions per step, or set trainer.beta above 0.",
    ),
    "held-out ranking falls": (
        held_out_falls,
        "The best checkpoint is saved. Decay trainer.learning_rate to 0, or use more questions per step.",
    ),
    "duplicates rise": (
        duplicates_rise,
        "The template reward does not penalize repeated ids. Set reward=gated or reward=permutation.",
    ),
    "length grows": (
        length_grows,
        "Set trainer.beta above 0 or trainer.mask_truncated_completions=true, or lower trainer.learning_rate.",
    ),
    "reasoning degrades": (
        reasoning_degrades,
        "The reward depends only on the answer, so nothing preserves the reasoning. Set trainer.beta above 0 or "
        "reward=true_reasoning, or lower trainer.learning_rate.",
    ),
    "one position comes first": (
        one_position_first,
        "The answer no longer depends on the pages. Train SFT until its answers follow its verdicts, then run "
        "GRPO with trainer.beta above 0 and a lower trainer.learning_rate.",
    ),
    "zero-variance groups": (
        zero_variance_groups,
        "Groups without reward variance give no gradient. Select harder questions (difficulty of "
        "mmr5_train.select), or raise trainer.temperature or trainer.num_generations.",
    ),
    "engine differs": (
        engine_differs,
        "The rollouts are not those of the trained policy. Check that vLLM has the trainer's weights, dtype and "
        "prompts, and keep trainer.vllm_importance_sampling_correction=true.",
    ),
}


def raised_alarms(history: Sequence[Entry], step: int) -> list[Alarm]:
    """The alarms that the log up to `step` raises, in the order of `CHECKS`."""
    return [
        Alarm(name, step, str(finding), knob)
        for name, (check, knob) in CHECKS.items()
        if (finding := check(history))
    ]


def read_alarms(out: Path) -> list[Alarm]:
    """The alarms raised in a training stage's folder, in order; empty if it has no alarms.json."""
    path = out / ALARMS
    if not path.is_file():
        return []
    try:
        return [Alarm(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: not a list of alarms ({error}); remove it, or train again") from None
