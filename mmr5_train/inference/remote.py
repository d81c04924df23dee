"""A model behind an OpenAI-compatible server (vLLM, SGLang, `transformers serve`), asked as one in process is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import openai
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from mmr5_train.common.files import InputError
from mmr5_train.models.inputs import openai_messages
from mmr5_train.models.pages import fit_page, open_image
from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.answer_constraints import gbnf_grammar
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Mode, ModelAnswer


class ServerConfig(BaseModel):
    """Where a server is, and what it can do. The key stands in the environment: OPENAI_API_KEY."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(description="e.g. http://localhost:8000/v1")
    model: str = Field(description="the name the server knows the model by")
    structured: Literal["none", "vllm", "sglang"] = Field(
        default="none", description="whose words for structured outputs hold answers to a list of all pages"
    )
    concurrency: int = Field(default=16, gt=0, description="requests on the way at once")
    timeout: float = Field(default=600, gt=0, description="seconds until a request counts as lost")
    attempts: int = Field(default=5, gt=0, description="tries of a request that a passing fault stopped")
    factor: int = Field(default=28, gt=0, description="pixels of a side of a visual token: 28; 32 for Qwen3-VL")


class RemoteBackend:
    """Sends each question as a request of its own, several at once, and reads the answers by the same grammar."""

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
            raise InputError("mode logits: needs the model in this process; over HTTP take reason or direct")
        url = urlsplit(server.url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InputError(f"server.url: expected one like http://localhost:8000/v1, found {server.url}")
        self.server, self.prompt, self.mode = server, prompt, mode
        self.max_new_tokens, self.constrain = max_new_tokens, constrain and server.structured != "none"
        self.limits = min_pixels, max_pixels
        self._client = openai.OpenAI(
            api_key=os.environ.get("OPENAI_API_KEY", "").strip() or "none",
            base_url=server.url,
            timeout=server.timeout,
            max_retries=server.attempts - 1,
        )

    def prepare(self, page: Image.Image) -> Image.Image:
        """A page as the model sees it: the server's own processor finds nothing to resize."""
        return fit_page(page, self.server.factor, *self.limits)

    def load(self, path: Path) -> Image.Image:
        """A page file as the model sees it."""
        return self.prepare(open_image(path))

    def ask(
        self,
        queries: Sequence[str],
        pages: Sequence[Sequence[Image.Image]],
        *,
        samples: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[ModelAnswer]]:
        """As `LocalBackend.ask`. Servers may draw other samples for the same seed.

        Raises `InputError` where the server can't be reached or refuses the request.
        """
        rows = [row for row in range(len(queries)) for _ in range(max(samples, 1))]

        def send(job: tuple[int, int]) -> ModelAnswer:
            drawn = {"temperature": temperature, "seed": seed + job[0]} if samples else {"temperature": 0.0}
            return self._send(queries[job[1]], pages[job[1]], drawn)

        with ThreadPoolExecutor(self.server.concurrency) as pool:
            try:
                answers = list(pool.map(send, enumerate(rows)))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # the first failure ends it: no more requests are sent
                raise
        count = max(samples, 1)
        return [answers[i : i + count] for i in range(0, len(answers), count)]

    def _send(self, query: str, pages: Sequence[Image.Image], drawn: dict[str, Any]) -> ModelAnswer:
        try:
            reply = self._client.chat.completions.create(
                model=self.server.model,
                messages=openai_messages(self.prompt, query, pages),  # type: ignore[arg-type]
                max_tokens=self.max_new_tokens,
                extra_body=self._structure(len(pages)),
                **drawn,
            )
            choice = reply.choices[0]
            text, apart = choice.message.content or "", reasoning_of(choice.message)
        except openai.APIStatusError as error:
            raise InputError(f"{self.server.url}: refuses the request ({_said(error)})") from None
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise InputError(
                f"{self.server.url}: can't be reached ({reason}), {self.server.attempts} tries; check server.url "
                "and that the server runs"
            ) from None
        except (openai.APIError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{self.server.url}: the answer is no chat completion ({error!r:.200})") from None
        counts = {"visual_tokens": sum(page.width * page.height // self.server.factor**2 for page in pages)}
        if reply.usage:
            counts |= {"tokens": reply.usage.completion_tokens, "prompt_tokens": reply.usage.prompt_tokens}
        cut_off, think = choice.finish_reason == "length", self.mode == "reason"
        return to_model_answer(
            text, len(pages), counts=counts, reasoning=apart, cut_off=cut_off, expect_think=think
        )

    def _structure(self, n: int) -> dict[str, Any] | None:
        if not self.constrain:
            return None
        # A server with a reasoning parser lets the think block pass and holds what follows to the grammar.
        grammar = gbnf_grammar(n)
        return (
            {"structured_outputs": {"grammar": grammar}} if self.server.structured == "vllm" else {"ebnf": grammar}
        )


def reasoning_of(message: Any) -> str | None:
    """The think block where the server returned it apart: `reasoning_content`, or `reasoning` in later vLLMs."""
    return getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)


def _said(error: openai.APIStatusError) -> str:
    body = error.body
    said = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
    return f"{error.status_code}: {' '.join(str(said or error.response.reason_phrase).split())[:300]}"
