"""The cost of a teacher: the price table, the budget, and the estimate of a dry run."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date

from pydantic import BaseModel, ConfigDict, Field

from data_construction.teacher.store import Answer, Spent
from mmr5_train.common.files import InputError

TOKENS_PER_CHARACTER = 1 / 4
TOKENS_PER_WORD = 1.5
PIXELS_PER_TOKEN = 784.0  # Qwen2.5-VL: 28 × 28
SECONDS_PER_CALL = 5.0


class Price(BaseModel):
    """One row of the price table: dollars per million tokens, and pixels of a page image per token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    pixels_per_token: float = Field(default=PIXELS_PER_TOKEN, gt=0)
    read: date | None = Field(default=None, description="the day on which the price was read")

    def dollars(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


class Budget:
    """A limit in dollars that no call may exceed.

    Each call reserves its maximum cost, and waits while the reservations of other calls leave too little budget.
    `spent` returns the tokens of all answers so far. Raises `InputError` if there is a limit but no price.
    """

    def __init__(self, model: str, price: Price | None, limit: float | None, spent: Callable[[], Spent]) -> None:
        if limit is not None and price is None:
            raise InputError(
                f"teacher.max_cost_usd is set, but teacher.prices has no {model!r}: add its price, for example "
                f"'+teacher.prices={{{model}:{{input:2.5,output:10}}}}' (dollars per million tokens)"
            )
        self._price, self._limit, self._spent = price, limit, spent
        self._reserved = 0.0
        self._changed = asyncio.Condition()

    @property
    def spent_dollars(self) -> float | None:
        """Cost of all answers so far; None without a price."""
        spent = self._spent()
        return self._price.dollars(spent.prompt_tokens, spent.completion_tokens) if self._price else None

    async def reserve(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Reserves the cost of one call and returns it, in dollars. Pass it to `release` after the call.

        Raises `InputError` if the remaining budget is too small and no other call holds a reservation.
        """
        if self._price is None or self._limit is None:
            return 0.0
        cost = self._price.dollars(prompt_tokens, completion_tokens)
        async with self._changed:
            while (self.spent_dollars or 0) + self._reserved + cost > self._limit:
                if self._reserved < 1e-12:
                    raise InputError(
                        f"teacher.max_cost_usd={self._limit:g} is reached: the answers so far cost "
                        f"${self.spent_dollars:.4f} and the next may cost ${cost:.4f}; raise the limit to continue"
                    )
                await self._changed.wait()
            self._reserved += cost
        return cost

    async def release(self, cost: float) -> None:
        if cost:
            async with self._changed:
                self._reserved -= cost
                self._changed.notify_all()


@dataclass(frozen=True)
class Estimate:
    """Estimated calls and tokens of a run; tokens are totals over all calls."""

    calls: int = 0
    image_tokens: int = 0
    text_tokens: int = 0
    output_tokens: int = 0

    def report(self, model: str, price: Price | None, concurrency: int, batch: bool = False) -> str:
        hours = f"{self.calls * SECONDS_PER_CALL / concurrency / 3600:,.2f} at {SECONDS_PER_CALL:g} s per call, "
        hours += f"{concurrency} at once"
        if batch:
            hours = "up to 24 for the batches, and the same for the batches of refinements"
        pixels = price.pixels_per_token if price else PIXELS_PER_TOKEN
        cost = f"unknown: teacher.prices has no {model!r}"
        if price:
            dollars = price.dollars(self.image_tokens + self.text_tokens, self.output_tokens)
            cost = f"${dollars:,.2f} at ${price.input:g} and ${price.output:g} per million tokens in and out"
            cost += f" (prices of {price.read})" if price.read else ""
        return (
            f"calls          {self.calls:,}\n"
            f"image tokens   {self.image_tokens:,} ({pixels:g} pixels per token)\n"
            f"text tokens    {self.text_tokens:,}\n"
            f"output tokens  {self.output_tokens:,}\n"
            f"cost           {cost}\n"
            f"hours          {hours}"
        )


def text_tokens(text: str) -> int:
    """Approximate number of tokens of a text."""
    return math.ceil(len(text) * TOKENS_PER_CHARACTER)


def with_estimates(answer: Answer, prompt_tokens: int) -> Answer:
    """The answer with both counts. One that the server does not report must not count as free for the budget."""
    prompt, count = answer.prompt_tokens, answer.completion_tokens
    return replace(
        answer,
        prompt_tokens=prompt_tokens if prompt is None else prompt,
        completion_tokens=text_tokens(answer.text) if count is None else count,
    )
