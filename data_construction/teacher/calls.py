"""One call of an OpenAI-compatible server: where it is, what is waited out, what ends the run.

| What comes back | What is done | Counted as |
|---|---|---|
| 429 | waited out as Retry-After says, or longer and longer, `attempts` tries in all | `rate_limit` |
| 408, 5xx | the same | `server_error` |
| connection refused, reset or cut off | the same; then the run ends | `lost` |
| nothing within `timeout` | the same | `timeout` |
| something else than a chat completion | the same; the run ends if there was never one | `garbage` |
| a content filter's refusal | its question is dropped | `refused` |
| a wrong key, no quota, any other status | the run ends at once | – |

After the last try the question is dropped (`TeacherFailure`) where nothing else is said. A call that is on its way
when the run ends is waited for: it will be paid for. The key is in no message.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_exponential_jitter

from data_construction.teacher.store import Answer
from mmr5_train.common.files import InputError

REFUSAL_CODES = ("content_filter", "content_policy_violation")


class TeacherFailure(Exception):
    """A call gave no answer that can be used: its question is dropped, the run goes on.

    `reason` is the same for all failures of a kind, `detail` is what the server said.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class NoCompletion(Exception):
    """A reply that is no chat completion."""


class CallSettings(Protocol):
    """What a call needs of a teacher's config."""

    @property
    def model(self) -> str | None: ...
    @property
    def timeout(self) -> float: ...
    @property
    def attempts(self) -> int: ...
    @property
    def max_wait(self) -> float: ...


class ChatServer:
    """The server that `OPENAI_BASE_URL` and `OPENAI_API_KEY` name. Raises `InputError` where they are no use."""

    def __init__(self, config: CallSettings) -> None:
        self.config = config
        self.faults: Counter[str] = Counter()
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self._key:
            raise InputError(
                "OPENAI_API_KEY is not set: export the server's key (any word for a server that asks for none)"
            )
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError("OPENAI_API_KEY holds characters that no key has: export it again")
        if not config.model:
            raise InputError("teacher.model is not set: give teacher.model=… or export OPENAI_MODEL")
        base_url = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InputError("OPENAI_BASE_URL is not a web address; expected one like http://localhost:8000/v1")
        self._server = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
        # The one time limit is the one around a whole call, in _send.
        self._client = openai.AsyncOpenAI(api_key=self._key, base_url=base_url, timeout=None, max_retries=0)
        self._on_the_way: set[asyncio.Task[Answer]] = set()
        self._answered = False

    async def complete(self, body: bytes, keep: Callable[[Answer], Answer]) -> Answer:
        """The answer to the JSON body of a chat completion request.

        `keep` gets it as soon as it is there, and may complete it. Raises `TeacherFailure` and `InputError` as the
        table above says.
        """
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.config.attempts),
            wait=self._pause,
            retry=retry_if_exception(self._passes),
            reraise=True,
        )

        async def send() -> Answer:
            task = asyncio.create_task(self._send(body, keep))
            self._on_the_way.add(task)
            task.add_done_callback(self._on_the_way.discard)
            return await asyncio.shield(task)

        try:
            return await retrying(send)
        except (openai.APIError, TimeoutError, NoCompletion) as error:
            raise self._meaning(error) from None

    async def close(self) -> None:
        """Waits for the calls on their way, each kept as it arrives, and hangs up."""
        await asyncio.gather(*self._on_the_way, return_exceptions=True)
        await self._client.close()

    async def _send(self, body: bytes, keep: Callable[[Answer], Answer]) -> Answer:
        try:
            async with asyncio.timeout(self.config.timeout):
                # The body as bytes and the reply as text: half the time that the typed way takes, page and all.
                headers = {"Content-Type": "application/json"}
                reply = await self._client.post(
                    "/chat/completions", cast_to=str, content=body, options={"headers": headers}
                )
            answer = read_reply(reply)
        except (openai.APIError, TimeoutError, NoCompletion) as error:
            if name := fault(error):
                self.faults[name] += 1
            raise
        self._answered = True
        return keep(answer)

    def _passes(self, error: BaseException) -> bool:
        """Whether the same request may succeed later, and soon enough."""
        if isinstance(error, openai.APIStatusError) and (retry_after(error) or 0) > self.config.max_wait:
            return False
        return fault(error) not in (None, "refused")

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        told = retry_after(error) if isinstance(error, openai.APIStatusError) else None
        return told if told is not None else wait_exponential_jitter(0.5, self.config.max_wait, jitter=0.5)(state)

    def _meaning(self, error: Exception) -> Exception:
        """What an error that was not waited out means: the end of the run, or of a question."""
        tries = f"{self.config.attempts} times"
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error)
        if isinstance(error, TimeoutError):
            return TeacherFailure(
                "the teacher did not answer", f"nothing within {self.config.timeout:g} s, {tries}"
            )
        if isinstance(error, NoCompletion):
            said = self._plain(error)
            if self._answered:
                return TeacherFailure("the teacher's answer was not a chat completion", f"{tries} ({said})")
            return InputError(
                f"{self._server}: answers, but not with a chat completion ({said}); check that OPENAI_BASE_URL "
                "ends as the server wants it, mostly in /v1"
            )
        return InputError(
            f"{self._server}: can't be reached ({self._plain(error.__cause__ or error)}); "
            "check the network, OPENAI_BASE_URL and that the server runs"
        )

    def _refusal(self, error: openai.APIStatusError) -> Exception:
        status, said = error.status_code, f"{error.status_code}: {self._plain(error)}"
        if status in (401, 403):
            return InputError(f"{self._server}: refuses the key in OPENAI_API_KEY ({said}); export a valid one")
        if error.code in REFUSAL_CODES:
            return TeacherFailure("the teacher refused to answer", said)
        if error.code == "insufficient_quota":
            return InputError(f"{self._server}: the quota of this key is used up ({said})")
        told = retry_after(error)
        if told is not None and told > self.config.max_wait:
            return InputError(
                f"{self._server}: asks to wait {told:.0f} s, longer than teacher.max_wait ({said}); run it later"
            )
        if fault(error):
            return TeacherFailure("the teacher's server failed", f"{self.config.attempts} times ({said})")
        return InputError(
            f"{self._server}: refuses the request ({said}); check teacher.model={self.config.model}, that it "
            "takes images, and that OPENAI_BASE_URL ends as the server wants it, mostly in /v1"
        )

    def _plain(self, error: BaseException) -> str:
        """An error's own words on one short line, without the key."""
        said: object = str(error) or type(error).__name__
        if isinstance(error, openai.APIStatusError):
            body = error.body
            said = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
            said = said or error.response.reason_phrase
        line = " ".join(str(said).replace(self._key, "[key]").split())
        return line if len(line) <= 300 else line[:300] + "…"


def fault(error: BaseException | None) -> str | None:
    """What a call's error counts as, in the words of the table above; None for one that ends the run at once."""
    if isinstance(error, NoCompletion):
        return "garbage"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "lost"
    if not isinstance(error, openai.APIStatusError) or error.code == "insufficient_quota":
        return None
    if error.code in REFUSAL_CODES:
        return "refused"
    if error.status_code == 429:
        return "rate_limit"
    return "server_error" if error.status_code == 408 or error.status_code >= 500 else None


def read_reply(reply: str) -> Answer:
    """The answer in a chat completion's JSON. Raises `NoCompletion` for anything else, a cut-off text included."""
    try:
        completion: Any = json.loads(reply)
        choice = completion["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise NoCompletion(f"found {' '.join(reply[:60].split())!r}") from None
    if not isinstance(content, str | None):
        raise NoCompletion(f"its content is {type(content).__name__}, not text")
    usage = completion.get("usage") or {}
    tokens = [
        usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
    ]
    finish = "refusal" if refusal and not content else str(choice.get("finish_reason") or "")
    return Answer(content or str(refusal or ""), finish, *(n if isinstance(n, int) else 0 for n in tokens))


def retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds the server asks to wait (header Retry-After: seconds or a date, RFC 9110), None where it doesn't."""
    value = error.response.headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
