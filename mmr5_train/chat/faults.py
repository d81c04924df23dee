"""What an error of a chat server means: whether to ask again, to drop the question, or to end the run.

| Kind | Recognized by | Reaction |
|---|---|---|
| `rate_limit` | 429; also as a code in the body | retry |
| `server_error` | 408, 409, 425, 5xx (529: overloaded); an error with status 200 without a known code | retry |
| `timeout` | no reply in time | retry |
| `lost` | connection refused, reset or closed early | retry, then end the run |
| `garbage` | no chat completion | retry, then end the run if the server never sent a completion |
| `refused` | a filter or a moderator, with any status | drop the question |
| `too_large` | 413, or a prompt that is longer than the model's context | drop the question |
| `no_credit` | 402, or a code or message about quota, billing or credit | end the run |
| `key` | 401 and 403 without a sign of moderation | end the run |
| `rejected` | any other status | end the run |

The status in an error's body counts if the reply's own status is 200. A question is also dropped after the last
retry, unless the table says that the run ends.
"""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "rate_limit", "server_error", "timeout", "lost", "garbage",
    "refused", "too_large", "no_credit", "key", "rejected",
]  # fmt: skip
RETRIED: tuple[Kind, ...] = ("rate_limit", "server_error", "timeout", "lost", "garbage")
DROPPED: tuple[Kind, ...] = ("refused", "too_large")

_REFUSED = re.compile(
    r"content[_ -]?(filter|policy|management|moderation)|moderat|flagged|responsible ?ai"
    r"|safety (system|setting|polic)|data_inspection|inappropriate content|prohibited[_ ]content"
    r"|blocked by .{0,40}(safety|filter|policy)",
    re.IGNORECASE,
)
_TOO_LARGE = re.compile(
    r"context[_ ](length|window)|maximum (context|prompt|input) length|prompt is too long|too many (input )?tokens"
    r"|request_too_large|image.{0,30}(too large|exceeds|larger than)|longer than the (maximum|max)",
    re.IGNORECASE,
)
_NO_CREDIT = re.compile(
    r"insufficient[_ ](quota|balance|credit|fund)|credit balance|billing|payment required|out of credits"
    r"|exceeded your (current|monthly) (quota|budget)|arrearage|more credits",
    re.IGNORECASE,
)
_STATUS_OF_NAME = {  # codes and types that stand in a body instead of a status
    "rate_limit": 429, "too_many_requests": 429, "throttl": 429, "resource_exhausted": 429,
    "overloaded": 529, "unavailable": 503, "timeout": 504, "authentication": 401, "invalid_api_key": 401,
    "permission": 403, "not_found": 404, "invalid_request": 400, "bad_request": 400,
}  # fmt: skip
_AGAIN = re.compile(
    r"(?:try again|retry)\D{0,20}?(\d+(?:\.\d+)?) ?(ms|milliseconds|s|sec|seconds|m|min|minutes)\b"
)
_DURATION = re.compile(
    r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?"
)


@dataclass(frozen=True)
class Fault:
    """One failed request."""

    kind: Kind
    message: str
    """What the server says, on one line. `ChatClient` removes the key from it and shortens it."""
    status: int | None = None
    wait: float | None = None
    """Seconds after which the server wants to be asked again."""
    error: Any = None
    """The error in the reply's body."""

    @property
    def is_retried(self) -> bool:
        return self.kind in RETRIED

    @property
    def error_param(self) -> str:
        """The request's field that the error names in `param`."""
        param = self.error.get("param") if isinstance(self.error, Mapping) else None
        return str(param or "").rpartition(".")[2]


def read_fault(status: int, body: Any, headers: Mapping[str, str]) -> Fault:
    """The fault of a reply with an error. `body` is the parsed JSON, or the text if it is not JSON."""
    error = body
    if isinstance(body, Mapping):
        error = body.get("error") or body.get("detail") or body
    if isinstance(error, list) and len(error) == 1 and isinstance(error[0], Mapping):
        error = error[0].get("error") or error  # Gemini sends a list with one error
    message, code = _message(error), _codes(error)
    if status < 400:
        status = _status_in(error) or 500
    kind, wait = _kind(status, code, message), _wait(headers, error, message)
    if kind == "no_credit" and status == 429 and wait is not None and "insufficient_quota" not in code:
        kind = "rate_limit"  # Gemini calls the requests of a minute a quota, too
    return Fault(kind, f"{status}: {message}" if message else str(status), status, wait, error)


def _kind(status: int, code: str, message: str) -> Kind:
    text = f"{code} {message}"
    if status == 451 or (status < 500 and status not in (401, 429) and _REFUSED.search(text)):
        return "refused"
    if status == 402 or (status in (400, 403, 429) and _NO_CREDIT.search(text)):
        return "no_credit"
    if status == 413 or (status in (400, 422) and _TOO_LARGE.search(text)):
        return "too_large"
    if status == 429:
        return "rate_limit"
    if status in (408, 409, 425) or status >= 500:
        return "server_error"
    return "key" if status in (401, 403) else "rejected"


def _codes(error: Any) -> str:
    """The code and the type of an error, and those of the error inside it."""
    if not isinstance(error, Mapping):
        return ""
    inner = error.get("innererror") or error.get("metadata")
    names = [str(error[name]) for name in ("code", "type", "status") if error.get(name)]
    return " ".join([*names, _codes(inner)] if isinstance(inner, Mapping) else names)


def _status_in(error: Any) -> int | None:
    """The status that the body of a reply with status 200 states."""
    if isinstance(error, Mapping):
        for name in ("code", "status", "status_code"):
            value = str(error.get(name))
            if value.isdigit() and 400 <= int(value) < 600:
                return int(value)
    names = _codes(error).lower()
    return next((status for name, status in _STATUS_OF_NAME.items() if name in names), None)


def _message(error: Any) -> str:
    text = error
    if isinstance(error, Mapping):
        text = error.get("message") or error.get("msg") or error.get("detail") or error.get("error") or dict(error)
        metadata = error.get("metadata")
        raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
        text = f"{text} ({raw})" if isinstance(raw, str) else text  # a router quotes the provider
    elif isinstance(error, list):  # FastAPI's list of invalid fields
        text = "; ".join(
            f"{'.'.join(map(str, item.get('loc', [])))}: {item.get('msg')}"
            for item in error
            if isinstance(item, Mapping)
        )
    return " ".join(str(text or "").split())


def _wait(headers: Mapping[str, str], error: Any, message: str) -> float | None:
    """Seconds to wait: retry-after-ms, Retry-After (RFC 9110), Gemini's retryDelay, or words in the message."""
    lower = {name.lower(): value.strip() for name, value in headers.items()}
    if (milliseconds := _number(lower.get("retry-after-ms", ""))) is not None:
        return milliseconds / 1000
    if value := lower.get("retry-after", ""):
        readings = (read(value) for read in (_number, _seconds_until, _duration))
        return next((seconds for seconds in readings if seconds is not None), None)
    details = error.get("details") if isinstance(error, Mapping) else None
    for detail in details if isinstance(details, list) else []:
        if isinstance(detail, Mapping) and (seconds := _duration(str(detail.get("retryDelay") or ""))) is not None:
            return seconds
    if found := _AGAIN.search(message.lower()):
        unit = found[2]
        return float(found[1]) * (0.001 if unit.startswith(("ms", "milli")) else 60 if unit[0] == "m" else 1)
    return None


def _number(text: str) -> float | None:
    """A finite number of seconds, at least 0."""
    try:
        number = float(text)
    except ValueError:
        return None
    return max(number, 0.0) if math.isfinite(number) else None


def _seconds_until(date: str) -> float | None:
    try:
        return max(email.utils.parsedate_to_datetime(date).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _duration(text: str) -> float | None:
    """Seconds of a duration such as 34s, 1m30s or 250ms."""
    found = _DURATION.fullmatch(text.strip())
    if not found or not text.strip():
        return None
    scales = (3600, 60, 1, 0.001)
    return sum(float(part) * scale for part, scale in zip(found.groups(), scales, strict=True) if part)
