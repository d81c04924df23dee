"""The backend that calls an OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`, a router).

It has the interface of `mmr5_train.inference.local`: `limits` and `generate`.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import wait
from threading import Event
from typing import Any, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from mmr5_train.chat.client import ChatClient, ChatError, api_key, base_url, explain_rejection
from mmr5_train.chat.completion import Completion
from mmr5_train.chat.dialect import Dialect
from mmr5_train.common.cancelling import raise_if_cancelled
from mmr5_train.common.files import InputError
from mmr5_train.common.part_times import PartTimes
from mmr5_train.models.config import answer_tokens
from mmr5_train.models.inputs import data_url, openai_messages
from mmr5_train.models.pages import PageLimits
from mmr5_train.models.sampling import sampling_settings
from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.answer_constraints import gbnf_grammar
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Mode, ModelAnswer

ResultT = TypeVar("ResultT")
POLL_SECONDS = 0.05


class ServerConfig(BaseModel):
    """A server and its capabilities. The API key comes from the environment variable OPENAI_API_KEY."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(description="e.g. http://localhost:8000/v1")
    model: str = Field(description="the model's name on the server")
    structured: Literal["none", "vllm", "sglang", "llama_cpp"] = Field(
        default="none",
        description="server whose structured-output parameters constrain answers to a list of all pages; "
        "none: no constraint",
    )
    kind: Literal["openai", "transformers", "vllm", "sglang", "llama_cpp"] | None = Field(
        default=None,
        description="server whose request fields switch off the sampling settings in the checkpoint's "
        "generation_config; openai: only the fields that every server accepts; null: the server of `structured`, "
        "or openai",
    )
    concurrency: int = Field(default=16, gt=0, description="largest number of concurrent requests")
    timeout: float = Field(default=600, gt=0, description="seconds after which a request has failed")
    attempts: int = Field(default=5, gt=0, description="attempts of a request that fails with a temporary error")
    max_wait: float = Field(default=60, gt=0, description="longest wait between two attempts, seconds")
    dialect: Dialect = Field(
        default=Dialect(limit="max_tokens"), description="the request fields to begin with; others are learned"
    )
    factor: int = Field(
        default=28, gt=0, description="pixels along one side of a visual token: 28; 32 for Qwen3-VL"
    )


class RemoteBackend:
    """Sends one request per completion, several at a time, and parses the answers as `LocalBackend` does."""

    def __init__(
        self,
        server: ServerConfig,
        prompt: Prompt,
        *,
        mode: Mode = "reason",
        max_new_tokens: int | None = None,
        constrain: bool = False,
        min_pixels: int,
        max_pixels: int,
    ) -> None:
        if mode == "logits":
            raise InputError("mode logits: needs the model in this process; with a server, use reason or direct")
        self.server, self.prompt, self.mode = server, prompt, mode
        self.max_new_tokens, self.constrain = max_new_tokens, constrain and server.structured != "none"
        # Images are resized here, so the server's processor does not resize them again.
        self.limits = PageLimits(server.factor, min_pixels, max_pixels)
        self._url, self._key = base_url(server.url, "server.url"), api_key(required=False)
        self.dialect = server.dialect
        """The request fields that the server takes, as learned so far."""

    def generate(
        self,
        queries: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        *,
        samples: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
        times: PartTimes | None = None,
        cancel: Event | None = None,
    ) -> list[list[ModelAnswer]]:
        """The answers to one batch, as in `LocalBackend.generate`. Each sample has its own seed.

        After `cancel` is set, the open requests end and `RankingCancelled` is raised. All seconds are of `decode`.
        A server may return other samples for the same seed. An answer that a filter of the server refused is
        empty. Raises `InputError` if the server can't be reached or rejects a request.
        """
        group_size = max(samples, 1)

        async def ask_all() -> list[ModelAnswer]:
            client = ChatClient(
                self._url,
                self._key,
                timeout=self.server.timeout,
                attempts=self.server.attempts,
                max_wait=self.server.max_wait,
                dialect=self.dialect,
            )
            slots = asyncio.Semaphore(self.server.concurrency)

            async def ask(number: int) -> ModelAnswer:
                index = number // group_size
                sampled = {"temperature": temperature, "seed": seed + number} if samples else {"temperature": 0.0}
                async with slots:
                    return await self._ask(client, queries[index], images[index], sampled)

            try:
                async with asyncio.TaskGroup() as group:  # after the first failure, it cancels the other requests
                    tasks = [group.create_task(ask(number)) for number in range(len(queries) * group_size)]
            finally:
                self.dialect = client.dialect
                await client.close()
            return [task.result() for task in tasks]

        with (times or PartTimes()).part("decode"):
            answers = run_in_thread(ask_all(), cancel)
        return [answers[i : i + group_size] for i in range(0, len(answers), group_size)]

    async def _ask(
        self, client: ChatClient, query: str, images: Sequence[Image.Image], sampling: dict[str, Any]
    ) -> ModelAnswer:
        urls = await asyncio.to_thread(lambda: [data_url(image) for image in images])
        request = {
            "model": self.server.model,
            "messages": openai_messages(self.prompt, query, len(images)),
            "max_tokens": self._limit(len(images)),
            "top_p": 1.0,
            "frequency_penalty": 0.0,  # on `transformers serve`, it replaces the repetition penalty
            **self._own_sampling(sampling["temperature"], self._limit(len(images))),
            **self._structured_outputs(len(images)),
            **sampling,
        }
        try:
            completion = await client.complete(request, urls)
        except ChatError as error:
            if error.fault.kind != "refused":
                raise self._input_error(error) from None
            completion = Completion("", finish="content_filter")
        visual = sum(image.width * image.height // self.limits.factor**2 for image in images)
        counts = {
            "visual_tokens": visual,
            "tokens": completion.completion_tokens,
            "prompt_tokens": completion.prompt_tokens,
        }
        return to_model_answer(
            completion.whole,
            len(images),
            counts=counts,
            cut_off=completion.finish == "length",
            expect_think=self.mode == "reason",
        )

    def _input_error(self, error: ChatError) -> InputError:
        fault, url = error.fault, self.server.url
        if fault.kind == "lost":
            return InputError(
                f"{url}: can't be reached ({fault.message}) after {error.tries} attempts; check server.url and "
                "that the server is running"
            )
        if fault.kind == "garbage":
            return InputError(f"{url}: the response is not a chat completion ({fault.message})")
        if fault.kind == "timeout":
            return InputError(f"{url}: {fault.message}, {error.tries} times; raise server.timeout")
        hint = explain_rejection(fault, url, "server.url")
        return InputError(f"{url}: rejects the request ({fault.message}){hint}")

    def _limit(self, n_pages: int) -> int:
        """The limit on the tokens of an answer."""
        return self.max_new_tokens or answer_tokens(n_pages, think=self.mode == "reason")

    def _own_sampling(self, temperature: float, limit: int) -> dict[str, Any]:
        """The request's parameters that replace the sampling settings in the generation_config on the server."""
        kind = self.server.kind or ("openai" if self.server.structured == "none" else self.server.structured)
        if kind == "openai":
            return {}
        if kind == "transformers":
            settings = sampling_settings(temperature or None, limit)
            return {"generation_config": json.dumps(settings)}
        if kind == "llama_cpp":
            return {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
        return {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

    def _structured_outputs(self, n_pages: int) -> dict[str, Any]:
        """The request's parameters that constrain the answer to a list of all pages."""
        if not self.constrain:
            return {}
        grammar = gbnf_grammar(n_pages, think=self.mode == "reason")
        if self.server.structured == "vllm":
            return {"structured_outputs": {"grammar": grammar}}
        return {"ebnf": grammar} if self.server.structured == "sglang" else {"grammar": grammar}


def run_in_thread(coroutine: Coroutine[Any, Any, ResultT], cancel: threading.Event | None = None) -> ResultT:
    """Runs a coroutine in an event loop of its own thread, so that the caller may have a running event loop.

    Cancels the coroutine if the caller is interrupted, and if `cancel` is set: then it raises `RankingCancelled`.
    An exception of a task group is raised as the first exception in it.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        while cancel is not None and not future.done():
            wait([future], timeout=POLL_SECONDS)
            raise_if_cancelled(cancel)
        return future.result()
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        future.cancel()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
        if not thread.is_alive():
            loop.close()
