"""How a reranker ranks: the options of `Reranker`, of a system in `evaluate`, and of the server."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmr5_train.models.config import MAX_SCORED_PAGES, Adaptive, BackendOptions, LogitsOrder
from mmr5_train.ranking.records import Mode
from mmr5_train.ranking.windows import Strategy


class RankingOptions(BackendOptions):
    """How a reranker ranks; each field is a keyword argument of `Reranker`."""

    mode: Mode | Literal["adaptive"] | None = Field(
        default=None,
        description="reason: think block and answer; direct: only the answer; logits: one forward pass, no text; "
        "adaptive: logits, then reason where logits is unsure; "
        "null: as the checkpoint was trained (reason, or direct without think blocks)",
    )
    adaptive: Adaptive = Field(default=Adaptive(), description="when mode adaptive reasons")
    logits_order: LogitsOrder = Field(
        default="first_place",
        description="of mode logits: by the probability of the first place, or place_by_place",
    )
    logits_max_pixels: int | None = Field(
        default=None, gt=0, description="size of a page in mode logits; null: as in the other modes"
    )
    constrain: bool = Field(default=True, description="constrain answers to a list of all pages")
    max_new_tokens: int | None = Field(
        default=None, gt=0, description="limit of an answer; null: by the number of pages"
    )
    window: int | None = Field(
        default=20, ge=2, description="largest number of pages in one prompt; null: no limit; mode logits: 100"
    )
    stride: int | None = Field(default=None, ge=1, description="of sliding windows; null: half a window")
    strategy: Strategy = Field(default="sliding", description="for more pages than a window: or tournament")
    samples: int = Field(default=0, ge=0, description="sampled orders that are fused; 0: one greedy order")
    temperature: float = Field(default=1.0, gt=0, description="of the samples")
    seed: int = Field(default=0, ge=0, description="of the samples")
    batch_size: int = Field(default=8, gt=0, description="prompts per batch")
    page_cache: int = Field(default=2**30, ge=0, description="bytes of vision features to keep between calls")

    @model_validator(mode="after")
    def _options_are_compatible(self) -> Self:
        if self.stride is not None and (self.window is None or self.stride >= self.window):
            raise ValueError(f"stride must be less than window ({self.window})")
        if self.mode in ("logits", "adaptive") and self.samples:
            raise ValueError(f"mode {self.mode} generates no text to sample: samples must be 0")
        if self.mode in ("logits", "adaptive") and self.backend == "vllm":
            raise ValueError(f"mode {self.mode} needs backend: transformers")
        return self


def window_size(options: RankingOptions, mode: Mode) -> int | None:
    """The largest number of pages in one prompt. One pass of mode logits takes more, unless a window is given."""
    if mode != "logits":
        return options.window
    given = options.window if "window" in options.model_fields_set else None
    return min(given or MAX_SCORED_PAGES, MAX_SCORED_PAGES)
