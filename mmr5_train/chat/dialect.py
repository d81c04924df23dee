"""The request fields that a model takes, learned from its refusals.

Models disagree on the name of the token limit, and some accept no temperature, no seed or only streams. A server
says so with status 400 or 422. `learn` reads the refusal and changes the dialect. All later requests of the run
use it, and the manifest contains it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmr5_train.chat.faults import Fault

LIMITS = ("max_completion_tokens", "max_tokens")
OPTIONAL = (
    "temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "top_k", "min_p",
    "repetition_penalty", "repeat_penalty", "generation_config", "detail", "stream_options",
)  # fmt: skip
"""Fields that a request can do without. Without temperature, top_p and seed, the server's own values apply."""

_UNKNOWN = re.compile(
    r"unsupported|not support|not accept|unknown|unrecogni[sz]ed|unexpected|not permitted|extra (inputs|fields)"
    r"|not allowed|deprecated",
    re.IGNORECASE,
)
_REFUSED_VALUE = re.compile(r"only the default|invalid|must be|can ?not be|can't be", re.IGNORECASE)
_STREAM_ONLY = re.compile(
    r"only .{0,30}stream|stream(ing)?\b.{0,30}(required|must|only)|must .{0,20}stream"
    r"|(non|without)[- ]?stream(ing)?",
    re.IGNORECASE,
)


class Dialect(BaseModel):
    """How a request is written for a model. Immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: Literal["max_completion_tokens", "max_tokens"] = Field(
        default="max_completion_tokens", description="name of the token limit"
    )
    omit: tuple[str, ...] = Field(default=(), description="fields that are not sent")
    limit_is_known: bool = Field(default=False, description="the model has refused the other name of the limit")
    stream: bool = Field(default=False, description="ask for a stream")

    def apply(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request in this dialect. `request` has the token limit under "max_tokens"."""
        spoken = {name: value for name, value in request.items() if name not in self.omit}
        if "max_tokens" in spoken:
            spoken[self.limit] = spoken.pop("max_tokens")
        if "detail" in self.omit:
            spoken["messages"] = [_without_detail(message) for message in spoken.get("messages", [])]
        if self.stream:
            spoken["stream"] = True
            if "stream_options" not in self.omit:
                spoken["stream_options"] = {"include_usage": True}
        return spoken


def learn(dialect: Dialect, request: Mapping[str, Any], fault: Fault) -> Dialect | None:
    """The dialect in which the server may accept the request that it refused; None if the fault shows none.

    `request` is the refused request, as it was sent.
    """
    if fault.kind != "rejected" or fault.status not in (400, 404, 422, 501):
        return None
    text = fault.message
    if not dialect.stream and _STREAM_ONLY.search(text):
        return dialect.model_copy(update={"stream": True})
    named = _named_fields(fault)
    other = next(name for name in LIMITS if name != dialect.limit)
    if dialect.limit in named and (other in text or _UNKNOWN.search(text)) and not dialect.limit_is_known:
        return dialect.model_copy(update={"limit": other, "limit_is_known": True})
    refused = [name for name in OPTIONAL if name in named and name not in dialect.omit and _is_in(name, request)]
    if refused and (_UNKNOWN.search(text) or _REFUSED_VALUE.search(text) or fault.error_param in refused):
        return dialect.model_copy(update={"omit": (*dialect.omit, *refused)})
    return None


def _named_fields(fault: Fault) -> set[str]:
    """Fields of a request that a refusal names: in `param`, in `loc`, or as a word of the message."""
    words = set(re.findall(r"[a-z_]+", fault.message.lower()))
    return {name for name in (*LIMITS, *OPTIONAL) if name in words or name == fault.error_param}


def _is_in(name: str, request: Mapping[str, Any]) -> bool:
    return name in request or name == "detail"


def _without_detail(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = []
    for part in content:
        image = part.get("image_url")
        if isinstance(image, Mapping) and "detail" in image:
            part = {**part, "image_url": {name: value for name, value in image.items() if name != "detail"}}
        parts.append(part)
    return {**message, "content": parts}
