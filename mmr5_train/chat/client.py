"""The client of an OpenAI-compatible chat server, for teachers and for rerankers.

A request is repeated after temporary errors (`mmr5_train.chat.faults`), in the dialect that the model takes
(`mmr5_train.chat.dialect`), and its reply is read in every form (`mmr5_train.chat.completion`).

The key comes from the environment variable OPENAI_API_KEY. No message contains it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx

from mmr5_train.chat.completion import Completion, NoCompletion, ReplyError, read_reply
from mmr5_train.chat.dialect import Dialect, learn
from mmr5_train.chat.faults import Fault, read_fault
from mmr5_train.common.files import InputError

MAX_REPLY_BYTES = 64 * 2**20
ENDPOINT = "/chat/completions"


class ChatError(Exception):
    """A request that failed for good. `fault` is its last fault, after `tries` tries."""

    def __init__(self, fault: Fault, tries: int) -> None:
        super().__init__(fault.message)
        self.fault, self.tries = fault, tries


def api_key(required: bool) -> str:
    """OPENAI_API_KEY, or "none" if it is not set and not required. Raises `InputError` for an unusable key."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and required:
        raise InputError(
            "OPENAI_API_KEY is not set: export the server's key (any word if the server needs no key)"
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError("OPENAI_API_KEY contains characters that are not printable ASCII: export it again")
    return key or "none"


def base_url(url: str, setting: str) -> str:
    """The server's address without a final slash. Raises `InputError` that names `setting` for another address."""
    address = url.strip().rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"{setting}: expected a URL such as http://localhost:8000/v1, found {_without_login(url)}"
        )
    if parts.path.endswith((ENDPOINT, "/completions", "/responses")):
        raise InputError(
            f"{setting}: found {_without_login(address)}, the address of one endpoint; expected the address "
            "before it, which usually ends in /v1"
        )
    if parts.query or parts.fragment:
        raise InputError(f"{setting}: expected a URL without ? and #, found {_without_login(address)}")
    return address


class ChatClient:
    """Sends requests to one server. Use it within one event loop, and close it there.

    `faults` counts the failed tries by kind. `dialect` is the present one. A server that asks to wait longer than
    `max_wait` seconds fails the request. `on_learned` is called with each dialect that a refusal teaches.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        timeout: float,
        attempts: int,
        max_wait: float,
        dialect: Dialect,
    ) -> None:
        self.url, self.timeout, self.attempts, self.max_wait = url, timeout, attempts, max_wait
        self.faults: Counter[str] = Counter()
        self.dialect = dialect
        self.on_learned: Callable[[Dialect], None] | None = None
        self.got_completion = False
        self._key = key
        self._stopped = asyncio.Event()
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"},
            timeout=None,  # `_send` limits the time of a whole call
            follow_redirects=False,  # a redirect would send the key to another address
            verify=_tls_context(),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
        )

    @property
    def shown_url(self) -> str:
        """The address without a user name or password, for messages."""
        return _without_login(self.url)

    def stop_retrying(self) -> None:
        """From now on, a try that fails is the last one of its request."""
        self._stopped.set()

    async def close(self) -> None:
        await self._http.aclose()

    async def complete(self, request: Mapping[str, Any], images: Sequence[str] = ()) -> Completion:
        """Sends a request until it succeeds.

        Args:
            request: the body without the images: each image is a part whose url is "". The token limit is under
                "max_tokens", whatever the server calls it.
            images: the data URLs of the images, in the order of the parts.

        Raises `ChatError`.
        """
        tries = 0
        while True:
            dialect = self.dialect
            spoken = dialect.apply(request)
            result = await self._try(encode(spoken, images))
            if isinstance(result, Completion):
                self.got_completion = True
                return result
            if dialect != self.dialect:
                continue  # another request has learned the dialect in the meantime
            if learned := learn(dialect, spoken, result):
                self.dialect = learned
                if self.on_learned:
                    self.on_learned(learned)
                continue
            tries += 1
            self.faults[result.kind] += 1
            if not self._is_repeated(result, tries, self.attempts):
                raise ChatError(result, tries)
            await self._wait(self._seconds_to_wait(result, tries))

    async def call(
        self, method: str, path: str, *, attempts: int | None = None, timeout: float | None = None, **content: Any
    ) -> str:
        """The text of the reply of another endpoint, such as "/batches". Repeats it after temporary errors.

        Args:
            path: the address below the base URL.
            attempts, timeout: other values than the client's.
            **content: the content as httpx takes it: `params`, `json`, or `data` and `files`. Files are read again
                from their beginning when the request is repeated.

        Raises `ChatError`.
        """
        tries = 0
        while True:
            for _, file, _ in content.get("files", {}).values():
                file.seek(0)
            reply = await self._send(method, path, timeout or self.timeout, **content)
            if isinstance(reply, Fault):
                fault = reply
            else:
                status, headers, text = reply
                if status < 300:
                    return text
                fault = self._fault(status, _parsed(text), headers)
            tries += 1
            self.faults[fault.kind] += 1
            if not self._is_repeated(fault, tries, attempts or self.attempts):
                raise ChatError(fault, tries)
            await self._wait(self._seconds_to_wait(fault, tries))

    def _is_repeated(self, fault: Fault, tries: int, attempts: int) -> bool:
        too_long = fault.wait is not None and fault.wait > self.max_wait
        return fault.is_retried and tries < attempts and not too_long and not self._stopped.is_set()

    async def _try(self, body: bytes) -> Completion | Fault:
        headers = {"Content-Type": "application/json"}
        reply = await self._send("POST", ENDPOINT, self.timeout, content=body, headers=headers)
        if isinstance(reply, Fault):
            return reply
        status, reply_headers, text = reply
        if status != 200:
            return self._fault(status, _parsed(text), reply_headers)
        try:
            return read_reply(text)
        except NoCompletion as error:
            return Fault("garbage", self._one_line(str(error)), status)
        except ReplyError as error:
            return self._fault(status, {"error": error.error}, reply_headers)

    async def _send(
        self, method: str, path: str, timeout: float, **content: Any
    ) -> tuple[int, httpx.Headers, str] | Fault:
        """Status, headers and text of a reply of at most `MAX_REPLY_BYTES` bytes."""
        try:
            async with (
                asyncio.timeout(timeout),
                self._http.stream(method, f"{self.url}{path}", **content) as response,
            ):
                data = bytearray()
                async for piece in response.aiter_bytes():
                    data += piece
                    if len(data) > MAX_REPLY_BYTES:
                        raise httpx.ReadError(f"the reply is longer than {MAX_REPLY_BYTES:,} bytes")
                return response.status_code, response.headers, data.decode("utf-8", "replace")
        except TimeoutError:
            return Fault("timeout", f"no reply within {timeout:g} s")
        except httpx.HTTPError as error:
            return Fault("lost", self._one_line(str(error) or type(error).__name__))

    def _fault(self, status: int, body: Any, headers: Mapping[str, str]) -> Fault:
        fault = read_fault(status, body, headers)
        message = self._one_line(fault.message)
        if 300 <= status < 400:
            message = f"{status}: redirects to {headers.get('location', 'another address')}"
            return Fault("rejected", message, status)
        return Fault(fault.kind, message, fault.status, fault.wait, fault.error)

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    def _seconds_to_wait(self, fault: Fault, tries: int) -> float:
        if fault.wait is not None:
            return fault.wait
        return min(0.5 * 2 ** (tries - 1), self.max_wait) + random.uniform(0, 0.5)

    def _one_line(self, text: str) -> str:
        """The text on one line of at most 300 characters, without the key."""
        hidden = text.replace(self._key, "[key]") if self._key != "none" else text
        line = " ".join(hidden.split())
        return line if len(line) <= 300 else line[:300] + "…"


@cache
def _tls_context() -> ssl.SSLContext:
    """The certificates that httpx trusts. Reading them takes 50 ms, and a reranker makes a client per batch."""
    return httpx.create_ssl_context()


def encode(request: Mapping[str, Any], images: Sequence[str]) -> bytes:
    """The JSON of a request, with the images put in after encoding.

    Escaping a megabyte of base64 would take as long as the rest of a call. No text can hold the mark, because
    JSON escapes the quotes in it.
    """
    mark = b'"url": ""'
    pieces = json.dumps(request).encode().split(mark)
    if len(pieces) != len(images) + 1:
        raise ValueError(f"expected {len(pieces) - 1} images, found {len(images)}")
    body = [pieces[0]]
    for image, piece in zip(images, pieces[1:], strict=True):
        body += [b'"url": "', image.encode(), b'"', piece]
    return b"".join(body)


def explain_rejection(fault: Fault, url: str, setting: str) -> str:
    """What to check after a `rejected` fault, as the end of a message."""
    if fault.status == 404 and not urlsplit(url).path.rstrip("/").endswith(("/v1", "/v1beta/openai", "/openai")):
        return f"; {setting} usually ends in /v1"
    if fault.status is not None and 300 <= fault.status < 400:
        return f"; give {setting} the address that the server redirects to"
    return ""


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text[:2000]


def _without_login(url: str) -> str:
    parts = urlsplit(url.strip())
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if parts.netloc else url
