"""Batch endpoints of a teacher's server: it answers files of requests within a day, usually for half the price.

The protocol is that of OpenAI: `POST /files` takes a file with a request per line, `POST /batches` starts it,
`GET /batches/ID` tells its state, and `GET /files/ID/content` returns the answers, in any order.

A request waits in the open file until the file is full, or no other request has come for `IDLE_SECONDS`. Every
batch is recorded in the store before it is sent, with a token that is sent with it. So a run that was killed finds
its batches again: by the server's name of the batch, or else by the token in the server's list. A request that a
batch leaves without an answer is sent by itself.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from data_construction.teacher.cost import with_estimates
from data_construction.teacher.store import Answer, AnswerStore, StoredBatch
from mmr5_train.chat.client import ENDPOINT, ChatClient, ChatError, encode
from mmr5_train.chat.completion import NoCompletion, ReplyError, read_body
from mmr5_train.common.files import InputError

MAX_BYTES, MAX_REQUESTS = 190_000_000, 5_000  # of a file; OpenAI takes 200 MB and 50,000 requests
IDLE_SECONDS = 2.0
UPLOADS = 2  # files on this machine that wait for their upload, besides the open one
TRANSFER_SECONDS = 1800.0
LIST_PAGES = 20
TOKEN = "mmr5"
"""Name of the token in a batch's metadata."""
FINAL = ("completed", "expired", "cancelled", "failed")

Urls = Callable[[], Awaitable[Sequence[str]]]


@dataclass
class _Batch:
    """One file of requests: open, on its way to the server, or being answered."""

    token: str = field(default_factory=lambda: secrets.token_hex(8))
    id: str | None = None
    requests: dict[str, int] = field(default_factory=dict)
    """Request key → estimated prompt tokens."""
    file: IO[bytes] | None = None
    completed: int = 0
    answers: dict[str, Answer] = field(default_factory=dict)
    error: Exception | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)


class BatchQueue:
    """Puts requests into batches and returns their answers. Use it within one event loop, and close it there."""

    def __init__(self, client: ChatClient, store: AnswerStore, model: str, poll_seconds: float) -> None:
        self._client, self._store, self._model, self._poll_seconds = client, store, model, poll_seconds
        self._batch_of: dict[str, _Batch] = {}
        self._batches: list[_Batch] = []
        self._open: _Batch | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock, self._uploads = asyncio.Lock(), asyncio.Semaphore(UPLOADS)
        self._started = self._probing = False
        self._probed = asyncio.Event()
        self._last_added = 0.0

    def start(self) -> None:
        """Continues with the batches of an earlier run. Raises `InputError` if they are on another server."""
        if self._started:
            return
        self._started = True
        for stored in self._store.batches(self._model):
            if stored.url != self._client.shown_url:
                raise InputError(
                    f"{self._store.path}: {len(stored.requests)} requests wait in a batch on {stored.url}, but "
                    f"OPENAI_BASE_URL is {self._client.shown_url}; use that server again, or another store "
                    "(answers=…)"
                )
            batch = _Batch(stored.token, stored.id, stored.requests)
            self._batch_of |= dict.fromkeys(stored.requests, batch)
            self._run(batch)

    async def answer(self, key: str, request: Mapping[str, Any], urls: Urls, prompt_tokens: int) -> Answer | None:
        """The answer to a request, which is in the store then. None: it has to be sent by itself.

        That is so for the first request of a run, which shows whether the key is valid and which fields the model
        takes (call `probed` after it), and for a request that its batch did not answer. `urls` loads the data URLs
        of the images. Raises `InputError`.
        """
        self.start()
        while True:
            if key not in self._batch_of:
                if not self._probing:
                    self._probing = True
                    return None
                await self._probed.wait()
                await self._add(key, request, await urls(), prompt_tokens)
            batch = self._batch_of[key]
            await batch.done.wait()
            if batch.error:
                raise batch.error
            if batch.id:
                return batch.answers.get(key)
            del self._batch_of[key]  # an earlier run ended before it sent the batch

    def probed(self) -> None:
        """To be called after a request that was sent by itself."""
        self._probed.set()

    def status(self) -> str:
        """For the progress bar."""
        sent = [batch for batch in self._batches if not batch.done.is_set()]
        requests, completed = sum(len(b.requests) for b in sent), sum(b.completed for b in sent)
        return f"{len(sent)} batches: {completed:,} of {requests:,} requests" if sent else ""

    async def close(self) -> None:
        """Stops waiting. The batches go on; a run with the same store continues with them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _add(self, key: str, request: Mapping[str, Any], urls: Sequence[str], prompt_tokens: int) -> None:
        """Writes a request to the open file."""
        body = encode(self._client.dialect.apply(request), urls)
        head = json.dumps({"custom_id": key, "method": "POST", "url": f"/v1{ENDPOINT}"}).encode()
        line = head[:-1] + b', "body": ' + body + b"}\n"
        async with self._lock:
            if self._open and self._open.file and self._open.file.tell() + len(line) > MAX_BYTES:
                self._seal()
            if self._open is None:
                await self._uploads.acquire()
                self._open = _Batch(file=tempfile.TemporaryFile())  # noqa: SIM115
                self._start_task(self._seal_when_idle(self._open))
            assert self._open.file
            self._open.file.write(line)
            self._open.requests[key] = prompt_tokens
            self._batch_of[key] = self._open
            self._last_added = asyncio.get_running_loop().time()
            if len(self._open.requests) >= MAX_REQUESTS:
                self._seal()

    async def _seal_when_idle(self, batch: _Batch) -> None:
        clock = asyncio.get_running_loop().time
        while self._open is batch:
            await asyncio.sleep(IDLE_SECONDS / 4)
            async with self._lock:
                if self._open is batch and clock() - self._last_added >= IDLE_SECONDS:
                    self._seal()

    def _seal(self) -> None:
        """Closes the open file and begins to send it."""
        assert self._open
        batch, self._open = self._open, None
        self._run(batch)

    def _run(self, batch: _Batch) -> None:
        self._batches.append(batch)
        self._start_task(self._complete(batch))

    def _start_task(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _complete(self, batch: _Batch) -> None:
        """Sends a batch if it is not on the server yet, waits for its answers and stores them."""
        try:
            if batch.file:
                try:
                    await self._submit(batch, batch.file)
                finally:
                    batch.file.close()
                    self._uploads.release()
            elif batch.id is None:
                batch.id = await self._find(batch.token)
                if batch.id:
                    self._store.name_batch(batch.token, batch.id)
            if batch.id:  # None: it was never sent
                await self._collect(batch, batch.id)
            self._store.end_batch(batch.token)
        except ChatError as error:
            batch.error = InputError(f"{self._client.shown_url}: {_problem(error)}")
        except InputError as error:
            batch.error = error
        batch.done.set()

    async def _submit(self, batch: _Batch, file: IO[bytes]) -> None:
        uploaded = await self._client.call(
            "POST",
            "/files",
            timeout=TRANSFER_SECONDS,
            data={"purpose": "batch"},
            files={"file": (f"{batch.token}.jsonl", file, "application/jsonl")},
        )
        # Recorded after the upload, because a file without a batch costs nothing.
        self._store.begin_batch(
            StoredBatch(batch.token, self._client.shown_url, None, batch.requests), self._model
        )
        batch.id = await self._create(batch.token, _parsed(uploaded).get("id"))
        self._store.name_batch(batch.token, batch.id)

    async def _create(self, token: str, file_id: Any) -> str:
        """Starts a batch and returns its name. After an unclear error, it may have been started: looks for it."""
        content = {
            "input_file_id": file_id,
            "endpoint": f"/v1{ENDPOINT}",
            "completion_window": "24h",
            "metadata": {TOKEN: token},
        }
        for number in range(1, self._client.attempts + 1):
            try:
                created = _parsed(await self._client.call("POST", "/batches", attempts=1, json=content))
                if isinstance(created.get("id"), str):
                    return str(created["id"])
            except ChatError as error:
                if not error.fault.is_retried or number == self._client.attempts:
                    self._store.end_batch(token)
                    raise
                await asyncio.sleep(error.fault.wait or min(self._poll_seconds, 2**number / 4))
            if found := await self._find(token):
                return found
        raise InputError(f"{self._client.shown_url}/batches: expected a batch with an id")

    async def _find(self, token: str) -> str | None:
        """The name of the batch with this token, in the server's list."""
        after: dict[str, Any] = {}
        for _ in range(LIST_PAGES):
            page = _parsed(await self._client.call("GET", "/batches", params={"limit": 100, **after}))
            batches = [batch for batch in page.get("data") or [] if isinstance(batch, Mapping)]
            for batch in batches:
                if (batch.get("metadata") or {}).get(TOKEN) == token:
                    return str(batch["id"])
            if not batches or not page.get("has_more"):
                return None
            after = {"after": batches[-1]["id"]}
        return None

    async def _collect(self, batch: _Batch, id: str) -> None:
        """Waits for the end of a batch and stores its answers."""
        while True:
            state = _parsed(await self._client.call("GET", f"/batches/{id}"))
            batch.completed = int((state.get("request_counts") or {}).get("completed") or 0)
            if state.get("status") in FINAL:
                break
            await asyncio.sleep(self._poll_seconds)
        if state.get("status") == "failed" and not state.get("output_file_id"):
            self._store.end_batch(batch.token)  # nothing was answered, so nothing is lost
            errors = [str(error.get("message")) for error in (state.get("errors") or {}).get("data") or []]
            reason = "; ".join(errors) or "no reason given"
            raise InputError(
                f"{self._client.shown_url}: refuses the batch {id} ({reason}). "
                "Nothing was paid for it: run the same command again when that is mended"
            )
        if file_id := state.get("output_file_id"):
            text = await self._client.call("GET", f"/files/{file_id}/content", timeout=TRANSFER_SECONDS)
            for line in text.split("\n"):
                self._store_answer(batch, line)

    def _store_answer(self, batch: _Batch, line: str) -> None:
        """Stores the answer in a line of the output file. Any other line leaves its request without an answer."""
        record = _parsed(line)
        key, response = record.get("custom_id"), record.get("response")
        if key not in batch.requests or not isinstance(response, Mapping) or response.get("status_code") != 200:
            return
        with suppress(NoCompletion, ReplyError):  # the request is sent by itself
            answer = with_estimates(Answer.of(read_body(response.get("body"))), batch.requests[key])
            self._store.put(key, self._model, answer)
            batch.answers[key] = answer


def _problem(error: ChatError) -> str:
    fault = error.fault
    if fault.status in (404, 405, 501):
        return (
            f"{fault.message}; teacher.batch=true needs a server with the endpoints /files and /batches, and the "
            "key that sent the batches"
        )
    return f"{fault.message}, {error.tries} times; run the same command again to continue"


def _parsed(text: str) -> dict[str, Any]:
    """The JSON object in a text; {} if there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
