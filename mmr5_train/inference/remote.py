"""The backend that calls an OpenAI-compatible server (vLLM, SGLang, `transformers serve`).

It has the interface of `mmr5_train.inference.local`: `limits` and `generate`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal
from urllib.parse import urlsplit

import openai
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from mmr5_train.common.files import InputError
from mmr5_train.models.inputs import openai_messages
from mmr5_train.models.pages import PageLimits
from mmr5_train.models.sampling import sampling_settings
from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.answer_constraints import gbnf_grammar
from mmr5_train.ranking.prompt import THINK_OPEN, Prompt
from mmr5_train.ranking.records import Mode, ModelAnswer


class ServerConfig(BaseModel):
    """A server and its capabilities. The API key comes from the environment variable OPENAI_API_KEY."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(description="e.g. http://localhost:8000/v1")
    model: str = Field(description="the model's name on the server")
    structured: Literal["none", "vllm", "sglang"] = Field(
        default="none",
        description="server whose structured-output parameters constrain answers to a list of all pages; "
        "none: no constraint",
    )
    kind: Literal["openai", "transformers", "vllm", "sglang"] | None = Field(
        default=None,
        description="server whose request fields switch off the sampling settings in the checkpoint's "
        "generation_config; openai: only the fields that every server accepts; null: the server of `structured`, "
        "or openai",
    )
    concurrency: int = Field(default=16, gt=0, description="largest number of concurrent requests")
    timeout: float = Field(default=600, gt=0, description="seconds after which a request has failed")
    attempts: int = Field(default=5, gt=0, description="attempts of a request that fails with a temporary error")
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
        max_new_tokens: int,
        constrain: bool = False,
        min_pixels: int,
        max_pixels: int,
    ) -> None:
        if mode == "logits":
            raise InputError("mode logits: needs the model in this process; with a server, use reason or direct")
        url = urlsplit(server.url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InputError(f"server.url: expected a URL such as http://localhost:8000/v1, found {server.url}")
        self.server, self.prompt, self.mode = server, prompt, mode
        self.max_new_tokens, self.constrain = max_new_tokens, constrain and server.structured != "none"
        # Images are resized here, so the server's processor does not resize them again.
        self.limits = PageLimits(server.factor, min_pixels, max_pixels)
        self._client = openai.OpenAI(
            api_key=os.environ.get("OPENAI_API_KEY", "").strip() or "none",
            base_url=server.url,
            timeout=server.timeout,
            max_retries=server.attempts - 1,
        )

    def generate(
        self,
        queries: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        *,
        samples: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[ModelAnswer]]:
        """The answers to one batch, as in `LocalBackend.generate`. Each sample has its own seed.

        A server may return other samples for the same seed. Raises `InputError` if the server can't
        be reached or rejects a request.
        """
        group_size = max(samples, 1)
        requests = [index for index in range(len(queries)) for _ in range(group_size)]

        def send(numbered_request: tuple[int, int]) -> ModelAnswer:
            number, index = numbered_request
            sampled = {"temperature": temperature, "seed": seed + number} if samples else {"temperature": 0.0}
            return self._request(queries[index], images[index], sampled)

        with ThreadPoolExecutor(self.server.concurrency) as pool:
            try:
                answers = list(pool.map(send, enumerate(requests)))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # after the first failure, send no further requests
                raise
        return [answers[i : i + group_size] for i in range(0, len(answers), group_size)]

    def _request(self, query: str, images: Sequence[Image.Image], sampling: dict[str, Any]) -> ModelAnswer:
        try:
            response = self._client.chat.completions.create(
                model=self.server.model,
                messages=openai_messages(self.prompt, query, images),  # type: ignore[arg-type]
                max_tokens=self.max_new_tokens,
                top_p=1.0,
                frequency_penalty=0.0,  # on `transformers serve`, it replaces the repetition penalty
                extra_body=self._own_sampling(sampling["temperature"]) | self._structured_outputs(len(images)),
                **sampling,
            )
            choice = response.choices[0]
            text, reasoning = choice.message.content or "", separate_reasoning(choice.message)
        except openai.APIStatusError as error:
            raise InputError(f"{self.server.url}: rejects the request ({_status_message(error)})") from None
        except openai.APIConnectionError as error:
            raise InputError(
                f"{self.server.url}: can't be reached ({error.__cause__ or error}) after {self.server.attempts} "
                "attempts; check server.url and that the server is running"
            ) from None
        except (openai.APIError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"{self.server.url}: the response is not a chat completion ({error!r:.200})"
            ) from None
        cut_off = choice.finish_reason == "length"
        if reasoning and cut_off and not text:  # the think block was cut off, so it has no end
            text, reasoning = f"{THINK_OPEN}{reasoning}", None
        counts = {"visual_tokens": sum(image.width * image.height // self.limits.factor**2 for image in images)}
        if response.usage:
            counts |= {"tokens": response.usage.completion_tokens, "prompt_tokens": response.usage.prompt_tokens}
        return to_model_answer(
            text,
            len(images),
            counts=counts,
            reasoning=reasoning,
            cut_off=cut_off,
            expect_think=self.mode == "reason",
        )

    def _own_sampling(self, temperature: float) -> dict[str, Any]:
        """The request's parameters that replace the sampling settings in the generation_config on the server."""
        kind = self.server.kind or ("openai" if self.server.structured == "none" else self.server.structured)
        if kind == "openai":
            return {}
        if kind == "transformers":
            settings = sampling_settings(temperature or None, self.max_new_tokens)
            return {"generation_config": json.dumps(settings)}
        return {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

    def _structured_outputs(self, n_pages: int) -> dict[str, Any]:
        """The request's parameters that constrain the answer to a list of all pages."""
        if not self.constrain:
            return {}
        grammar = gbnf_grammar(n_pages, think=self.mode == "reason")
        return (
            {"structured_outputs": {"grammar": grammar}} if self.server.structured == "vllm" else {"ebnf": grammar}
        )


def separate_reasoning(message: Any) -> str | None:
    """The think block, if the server returned it separately: `reasoning_content`, or `reasoning` (newer vLLM)."""
    return getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)


def _status_message(error: openai.APIStatusError) -> str:
    body = error.body
    message = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
    return f"{error.status_code}: {' '.join(str(message or error.response.reason_phrase).split())[:300]}"
