"""Which completions of a GRPO run share a prompt, and which micro-batches one training pass computes.

TRL puts the G completions of a prompt next to each other, deals them to the ranks in order, and splits a rank's
completions into micro-batches. A rank has R = batch × steps_per_generation completions of a rollout batch:

- R is a multiple of G: whole groups are on a rank. If a micro-batch is smaller than a group, the micro-batches of
  the group are computed in one pass, in so far as they belong to the same optimizer step.
- otherwise each prompt has gcd(R, G) completions next to each other on a rank. These share it. At the published
  setting (batch 1, accumulation 2, G 4, 4 ranks) R is 2: each rank has one half of a group. It computes P + 2 C
  tokens in a pass over the step instead of 2 (P + C). With whole groups, two of the four ranks would compute
  P + 4 C tokens and the other two nothing.

An optimizer step has the gradient of TRL's: that of the sum of the losses of its micro-batches. If a rollout batch
makes one step per iteration (TRL's default), the step also has the same completions. Otherwise TRL deals single
completions to the steps at random; here blocks that share a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any


@dataclass(frozen=True)
class Sharing:
    """Sizes of a rank's share of the work, in completions unless stated otherwise."""

    group: int  # G, completions of a prompt on all ranks
    rollout: int  # R, on this rank in one rollout batch
    sampled: int  # of one prompt next to each other on this rank: they share its prefill, and its scoring
    micro_batches: int  # micro-batches that one training pass computes
    trained: int  # in one training pass

    @property
    def block(self) -> int:
        """Rows that stay together when the rollout batch is shuffled."""
        return self.sampled if self.trained % self.sampled == 0 else self.trained

    @property
    def scored(self) -> int:
        """Rows in one pass without gradients: whole blocks of a prompt."""
        return self.trained if self.trained % self.sampled == 0 else self.sampled

    @property
    def prompts(self) -> int:
        """The largest number of prompts that one training pass reads."""
        starts = range(0, self.rollout, self.trained)
        return max(_blocks(start, self.trained, self.sampled) for start in starts)

    @property
    def nothing_to_share(self) -> str | None:
        """The reason why no two completions of a rank share a prompt, or None."""
        if self.sampled > 1:
            return None
        return (
            f"the {self.rollout} completions of a rank in a rollout batch (trainer.per_device_train_batch_size × "
            f"steps_per_generation) and trainer.num_generations {self.group} have no common divisor, so that no "
            "two completions of a prompt are next to each other on a rank"
        )

    def __str__(self) -> str:
        if self.sampled == self.group:
            text = f"each prompt is computed once for its {self.group} completions"
        else:
            text = (
                f"each prompt is computed once for {self.sampled} of its {self.group} completions, because a rank "
                f"has {self.rollout} completions of a rollout batch"
            )
        if self.trained < self.sampled:
            text += f" in sampling and scoring; an optimizer step has {self.trained} of them on a rank"
        if self.micro_batches > 1:
            text += f"; {self.micro_batches} micro-batches are computed in one pass"
        return text


def share(batch: int, accumulation: int, steps_per_generation: int, group: int) -> Sharing:
    """The arrangement in which a rank reads the fewest prompts, and among these that with the smallest passes.

    A pass can only hold micro-batches of one optimizer step and of one rollout batch.
    """
    rollout = batch * steps_per_generation
    sampled = gcd(rollout, group)
    limit = gcd(accumulation, steps_per_generation)

    def prompts_read(count: int) -> int:
        return sum(_blocks(start, count * batch, sampled) for start in range(0, rollout, count * batch))

    divisors = [count for count in range(1, limit + 1) if limit % count == 0]
    micro_batches = min(divisors, key=lambda count: (prompts_read(count), count))
    return Sharing(group, rollout, sampled, micro_batches, micro_batches * batch)


def sharing_of(args: Any) -> Sharing:
    """The arrangement of a run with the settings `args`, a GRPOConfig."""
    return share(
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.steps_per_generation,
        args.num_generations,
    )


def _blocks(start: int, rows: int, size: int) -> int:
    """How many blocks of `size` rows the rows from `start` on touch."""
    return (start + rows - 1) // size - start // size + 1
