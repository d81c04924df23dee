"""Calls of the teacher's chat server: which faults drop a question, and which end the run.

`mmr5_train.chat.faults` lists the faults and how they are recognized. A question is dropped (`TeacherFailure`) if
the server refuses it, if it is too large, or if temporary errors outlast `attempts` tries. A wrong key, no credit,
a rejected request and a server that can't be reached end the run (`InputError`). When the run ends, it waits for
the calls in flight, since they will be billed. No message contains the key.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from data_construction.teacher.batches import BatchQueue
from data_construction.teacher.store import Answer, AnswerStore
from mmr5_train.chat.client import ChatClient, ChatError, api_key, base_url, explain_rejection
from mmr5_train.chat.dialect import Dialect
from mmr5_train.common.files import InputError

OPENAI = "https://api.openai.com/v1"


class TeacherFailure(Exception):
    """A call gave no usable answer. Its question is dropped and the run continues.

    `reason` is the same for all failures of a kind; `detail` quotes the server.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class CallSettings(Protocol):
    """The settings of a teacher's config that calls use."""

    @property
    def model(self) -> str | None: ...
    @property
    def timeout(self) -> float: ...
    @property
    def attempts(self) -> int: ...
    @property
    def max_wait(self) -> float: ...
    @property
    def dialect(self) -> Dialect: ...


class ChatServer:
    """The server at `OPENAI_BASE_URL`, used with `OPENAI_API_KEY`.

    Raises `InputError` if one of the two is unusable, or if the config names no model.
    """

    def __init__(self, config: CallSettings) -> None:
        self.config = config
        key = api_key(required=True)
        if not config.model:
            raise InputError("teacher.model is not set: give teacher.model=… or export OPENAI_MODEL")
        url = base_url(os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI, "OPENAI_BASE_URL")
        self._client = ChatClient(
            url,
            key,
            timeout=config.timeout,
            attempts=config.attempts,
            max_wait=config.max_wait,
            dialect=config.dialect,
        )
        self._in_flight: set[asyncio.Task[Answer]] = set()

    @property
    def faults(self) -> Counter[str]:
        """The failed tries of this run by kind."""
        return self._client.faults

    @property
    def dialect(self) -> Dialect:
        """The request fields that the model takes, as learned so far."""
        return self._client.dialect

    def remember_dialect(self, store: AnswerStore) -> None:
        """Continues with the dialect in the store, and stores what the model's refusals teach."""
        model, configured = self.config.model or "", self.config.dialect.model_dump_json()
        if learned := store.dialect(model, configured):
            self._client.dialect = Dialect.model_validate_json(learned)
        self._client.on_learned = lambda dialect: store.put_dialect(model, configured, dialect.model_dump_json())

    def batch_queue(self, store: AnswerStore, poll_seconds: float) -> BatchQueue:
        """A queue for this server's batch endpoint."""
        return BatchQueue(self._client, store, self.config.model or "", poll_seconds)

    async def complete(
        self, request: Mapping[str, Any], images: Sequence[str], store: Callable[[Answer], Answer]
    ) -> Answer:
        """Sends a request (see `ChatClient.complete`) and returns the answer.

        `store` is called with the answer as soon as it arrives, and returns it, possibly completed. Raises
        `TeacherFailure` and `InputError` as the module says.
        """

        async def send() -> Answer:
            return store(Answer.of(await self._client.complete(request, images)))

        task = asyncio.create_task(send())
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)
        try:
            return await asyncio.shield(task)
        except ChatError as error:
            raise self._final_error(error) from None

    async def close(self) -> None:
        """Waits for the calls in flight, whose answers are stored, and closes the connection."""
        self._client.stop_retrying()
        await asyncio.gather(*self._in_flight, return_exceptions=True)
        await self._client.close()

    def _final_error(self, error: ChatError) -> Exception:
        """The exception after the last try: `InputError` ends the run, `TeacherFailure` drops the question."""
        fault, server, tries = error.fault, self._client.shown_url, f"{error.tries} times"
        if fault.kind == "refused":
            return TeacherFailure("the teacher refused to answer", fault.message)
        if fault.kind == "too_large":
            return TeacherFailure("the request is too large for the teacher's model", fault.message)
        if fault.kind == "timeout":
            detail = f"nothing within {self.config.timeout:g} s, {tries}"
            return TeacherFailure("the teacher did not answer", detail)
        if fault.kind == "garbage" and self._client.got_completion:
            return TeacherFailure("the teacher's answer was not a chat completion", f"{tries} ({fault.message})")
        if fault.wait is not None and fault.wait > self.config.max_wait:
            return InputError(
                f"{server}: asks to wait {fault.wait:.0f} s, longer than teacher.max_wait ({fault.message}); "
                "try later"
            )
        if fault.kind in ("rate_limit", "server_error"):
            return TeacherFailure("the teacher's server failed", f"{tries} ({fault.message})")
        return InputError(f"{server}: {self._end_of_run(error)}")

    def _end_of_run(self, error: ChatError) -> str:
        fault = error.fault
        if fault.kind == "key":
            return f"refuses the key in OPENAI_API_KEY ({fault.message}); export a valid one"
        if fault.kind == "no_credit":
            return f"the quota of this key is used up, or it has no credit ({fault.message})"
        if fault.kind == "garbage":
            return (
                f"answers, but not with a chat completion ({fault.message}); check that OPENAI_BASE_URL ends as "
                "the server expects, usually in /v1"
            )
        if fault.kind == "lost":
            return (
                f"can't be reached ({fault.message}); check the network and OPENAI_BASE_URL, and that the server "
                "is running"
            )
        hint = explain_rejection(fault, self._client.url, "OPENAI_BASE_URL")
        return (
            f"refuses the request ({fault.message}){hint}; check teacher.model={self.config.model}, and that the "
            "model takes images"
        )
