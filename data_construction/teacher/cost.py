"""What a teacher costs: the price table, the budget, and the estimate before anything is paid."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from data_construction.teacher.store import Spent
from mmr5_train.common.files import InputError

TOKENS_A_CHARACTER = 1 / 4
TOKENS_A_WORD = 1.5
PIXELS_A_TOKEN = 784.0  # Qwen2.5-VL: 28 × 28
SECONDS_A_CALL = 5.0


class Price(BaseModel):
    """A line of the price table: dollars for a million tokens, and how many pixels of a page make a token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    pixels_per_token: float = Field(default=PIXELS_A_TOKEN, gt=0)

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Dollars."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


class Budget:
    """A limit in dollars that no call may break: each sets aside the most that it can cost, and waits if need be.

    `spent` says what the answers so far took. Without a price table entry a limit can't be kept: `InputError`.
    """

    def __init__(self, model: str, price: Price | None, limit: float | None, spent: Callable[[], Spent]) -> None:
        if limit is not None and price is None:
            raise InputError(
                f"teacher.max_cost_usd is set, but teacher.prices has no {model!r}: add its price, such as "
                f"'+teacher.prices={{{model}:{{input:2.5,output:10}}}}' (dollars for a million tokens)"
            )
        self._price, self._limit, self._spent = price, limit, spent
        self._set_aside = 0.0
        self._changed = asyncio.Condition()

    @property
    def dollars(self) -> float | None:
        """What was paid so far, None where there is no price."""
        spent = self._spent()
        return self._price.of(spent.prompt_tokens, spent.completion_tokens) if self._price else None

    async def reserve(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Dollars set aside for one call, to be given back by `settle`.

        Raises `InputError` where the limit leaves no room for it and no other call may yet give some back.
        """
        if self._price is None or self._limit is None:
            return 0.0
        most = self._price.of(prompt_tokens, completion_tokens)
        async with self._changed:
            while (self.dollars or 0) + self._set_aside + most > self._limit:
                if self._set_aside < 1e-12:
                    raise InputError(
                        f"teacher.max_cost_usd={self._limit:g} is reached: the answers so far cost "
                        f"${self.dollars:.4f} and the next may cost ${most:.4f}; set it higher to go on"
                    )
                await self._changed.wait()
            self._set_aside += most
        return most

    async def settle(self, most: float) -> None:
        if most:
            async with self._changed:
                self._set_aside -= most
                self._changed.notify_all()


@dataclass(frozen=True)
class Estimate:
    """What explaining some questions will take. Tokens are those of all calls together."""

    calls: int = 0
    image_tokens: int = 0
    text_tokens: int = 0
    output_tokens: int = 0

    def report(self, model: str, price: Price | None, concurrency: int) -> str:
        hours = self.calls * SECONDS_A_CALL / concurrency / 3600
        pixels = price.pixels_per_token if price else PIXELS_A_TOKEN
        cost = f"unknown: teacher.prices has no {model!r}"
        if price:
            dollars = price.of(self.image_tokens + self.text_tokens, self.output_tokens)
            cost = f"${dollars:,.2f} at ${price.input:g} and ${price.output:g} for a million tokens in and out"
        return (
            f"calls          {self.calls:,}\n"
            f"image tokens   {self.image_tokens:,} (a token for {pixels:g} pixels)\n"
            f"text tokens    {self.text_tokens:,}\n"
            f"output tokens  {self.output_tokens:,}\n"
            f"cost           {cost}\n"
            f"hours          {hours:,.2f} at {SECONDS_A_CALL:g} s a call, {concurrency} at once"
        )


def text_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return math.ceil(len(text) * TOKENS_A_CHARACTER)
