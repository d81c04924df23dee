"""Calls that another thread can end."""

from __future__ import annotations

from threading import Event


class RankingCancelled(Exception):
    """The event `cancel` of a call was set."""


def raise_if_cancelled(cancel: Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise RankingCancelled("the ranking was cancelled")
