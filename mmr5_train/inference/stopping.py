"""Completions that end before their end token: the list is complete, a limit is reached, or the caller cancels."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria

from mmr5_train.common.cancelling import raise_if_cancelled
from mmr5_train.common.part_times import PartTimes
from mmr5_train.inference.constrained import PermutationLogitsProcessor
from mmr5_train.models.page_features import synchronize


class End(NamedTuple):
    """Where a completion ends."""

    text_tokens: int
    """Tokens before the end token."""
    tokens: int
    """All generated tokens, the end token included."""
    missing: str
    """Text that completes the answer: generation ends with its list, before the closing tag."""
    cut_off: bool
    """Whether a limit ended the completion."""


class StopRule(StoppingCriteria):
    """Ends each row of a batch. It holds the state of the rows, so use an instance for one call of `generate`.

    A row ends after `limits[row]` tokens. With a constraint, it ends when its list of pages is complete: only the
    closing tag can follow. All rows end when `cancel` is set. Adds the seconds of the prefill and of decoding to
    `times`.
    """

    def __init__(
        self,
        limits: Sequence[int],
        prompt_length: int,
        constraint: PermutationLogitsProcessor | None,
        cancel: Event | None,
        times: PartTimes,
        device: torch.device,
    ) -> None:
        self.limits, self.prompt_length, self.constraint = limits, prompt_length, constraint
        self.cancel, self.times, self.device = cancel, times, device
        self.complete: dict[int, tuple[int, str]] = {}
        """Row with a complete list → its tokens, and the text that is missing."""
        self._part, self._start = "prefill", time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(rows,) whether each row ends with its last token."""
        if self._part == "prefill":
            self._next_part()
        generated = input_ids.shape[1] - self.prompt_length
        if self.cancel is not None and self.cancel.is_set():
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.constraint is not None:
            for row, missing in self.constraint.complete_lists(input_ids).items():
                self.complete.setdefault(row, (generated, missing))
        ended = [generated >= limit or row in self.complete for row, limit in enumerate(self.limits)]
        return torch.tensor(ended, device=input_ids.device)

    def _next_part(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.times.add(self._part, now - self._start)
        self._part, self._start = "decode", now

    def finish(self) -> None:
        """Adds the seconds of the part that ends now."""
        self._next_part()

    def raise_if_cancelled(self) -> None:
        raise_if_cancelled(self.cancel)

    def end_of(self, row: int, ids: Sequence[int], end_ids: Collection[int]) -> End:
        """Where row `row` ends, whose generated tokens, padded with an end token, are `ids`."""
        if row in self.complete:
            tokens, missing = self.complete[row]
            return End(tokens, tokens, missing, cut_off=False)
        end = next((i for i, token in enumerate(ids[: self.limits[row]]) if token in end_ids), None)
        if end is None:
            tokens = min(len(ids), self.limits[row])
            return End(tokens, tokens, "", cut_off=True)
        return End(end, end + 1, "", cut_off=False)
