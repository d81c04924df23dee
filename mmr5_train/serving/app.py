"""The routes: POST /v1/rerank and its aliases, POST /pages, the web page, health and models."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.requests import ClientDisconnect

from mmr5_train.common.files import InputError
from mmr5_train.ranking.results import RankedResults
from mmr5_train.serving.batching import Batcher, StoppingError
from mmr5_train.serving.errors import RequestError, answer_errors, internal_error, shown
from mmr5_train.serving.page import web_page
from mmr5_train.serving.pdf import PdfError, render_pdf
from mmr5_train.serving.requests import Question, answer, read_question
from mmr5_train.serving.settings import MB, ServeConfig

DECODERS = 2  # threads that check pictures; each may hold one decoded page
RENDERERS = 2  # processes that render PDFs
RETRY_S = {"loading": 5, "stopping": 30, "busy": 2}
CLOSED = 499  # what logs call a request whose client has gone; nobody reads the answer

log = logging.getLogger(__name__)

T = TypeVar("T")


class Service:
    """What the routes share: the model's queue, the settings, and how many requests are in the house."""

    def __init__(self, config: ServeConfig, batcher: Batcher, key: str | None) -> None:
        self.config, self.limits, self.batcher = config, config.limits, batcher
        self.key = key.encode() if key else None
        self.requests = 0
        self.started = time.time()
        self.decoders = ThreadPoolExecutor(DECODERS, "decoder")
        self.renderers = asyncio.Semaphore(RENDERERS)

    async def check_key(self, request: Request) -> None:
        if self.key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.key):
            message = "Authorization: expected Bearer and this server's key, found "
            message += "something else" if kind else "no such header"
            headers = {"WWW-Authenticate": "Bearer"}
            raise RequestError(401, "invalid_api_key", message, param="Authorization", headers=headers)

    async def rerank(self, request: Request) -> Response:
        check_type(request, "application/json")
        self.check_ready()
        name = self.config.model_name

        async def work(body: bytes) -> dict[str, Any]:
            run = asyncio.get_running_loop().run_in_executor
            question = await run(
                self.decoders, partial(read_question, body, self.limits, name, self.config.folder)
            )
            del body  # while the question waits, its pictures are kept once, not as base64 too
            return answer(question, await self.rank(question), name)

        return await self.admit(request, self.limits.body_mb, work)

    async def rank(self, question: Question) -> RankedResults:
        try:
            return await asyncio.wrap_future(self.batcher.submit(question.query, question.pages))
        except StoppingError:
            raise not_ready("stopping") from None
        except InputError as error:
            raise RequestError(422, "invalid_document", f"documents: {error}", param="documents") from None
        except Exception:
            log.exception("the model failed on a request of %d pages", len(question.pages))
            raise internal_error() from None

    async def pages(self, request: Request) -> Response:
        check_type(request, "application/pdf")

        async def work(body: bytes) -> dict[str, Any]:
            try:
                async with self.renderers:
                    return await render_pdf(body, self.limits.pages)
            except PdfError as error:
                raise RequestError(422, error.code, f"body: {error}", param="body") from None

        return await self.admit(request, self.limits.pdf_mb, work)

    async def admit(
        self, request: Request, body_mb: float, work: Callable[[bytes], Coroutine[Any, Any, dict[str, Any]]]
    ) -> Response:
        """The answer that `work` makes of the body: in time, for a client that still waits, or not at all."""
        if self.requests >= self.limits.requests:
            message = f"the server is busy with {self.requests} requests, its most; try again shortly"
            raise RequestError(503, "queue_full", message, retry_after=RETRY_S["busy"])
        seconds = f"{self.limits.seconds:g} s"
        slow = RequestError(408, "body_too_slow", f"body: did not arrive within {seconds}", param="body")
        message = f"not done within {seconds}; send fewer pages, or try again later"
        late = RequestError(504, "timeout", message, retry_after=RETRY_S["busy"])
        self.requests += 1
        end = asyncio.get_running_loop().time() + self.limits.seconds
        try:
            # No name for the body here: it would be kept until the answer.
            working = work(await in_time(end, read_body(request, body_mb), slow))
            return JSONResponse(await in_time(end, unless_gone(request, working), late))
        except ClientDisconnect:
            return Response(status_code=CLOSED)
        finally:
            self.requests -= 1

    def check_ready(self) -> None:
        if self.batcher.state != "ready":
            raise not_ready(self.batcher.state)

    async def health(self) -> JSONResponse:
        state = self.batcher.state
        body = {
            "status": state,
            "model": self.config.model_name,
            "mode": self.batcher.mode,
            "requests": self.requests,
            "waiting": self.batcher.waiting,
            "uptime_s": round(time.time() - self.started, 1),
        }
        return JSONResponse(body, 200 if state == "ready" else 503)

    async def models(self) -> JSONResponse:
        model = {"id": self.config.model_name, "object": "model", "created": int(self.started)}
        return JSONResponse({"object": "list", "data": [model | {"owned_by": "mmr5-train"}]})


def make_app(config: ServeConfig, batcher: Batcher, key: str | None) -> FastAPI:
    """The application; the model is loaded when it starts, and let go when it stops."""
    service = Service(config, batcher, key)
    html, headers = web_page(config.model_name, config.limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        batcher.stop()
        service.decoders.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(batcher.join, config.shutdown_s)

    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    answer_errors(app)
    guarded = [Depends(service.check_key)]
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        app.add_api_route(path, service.rerank, methods=["POST"], dependencies=guarded)
    app.add_api_route("/pages", service.pages, methods=["POST"], dependencies=guarded)
    app.add_api_route("/v1/models", service.models, methods=["GET"], dependencies=guarded)
    app.add_api_route("/health", service.health, methods=["GET"])

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    return app


def check_type(request: Request, expected: str) -> None:
    """The type is what keeps a foreign web page from posting here: a browser asks before it sends this one."""
    kind, *parameters = request.headers.get("content-type", "").lower().split(";")
    charset = next(
        (p.partition("=")[2].strip(' "') for p in parameters if p.strip().startswith("charset=")), "utf-8"
    )
    if kind.strip() != expected or charset not in ("utf-8", "utf8"):
        found = shown(request.headers.get("content-type", "")) if kind else "none"
        message = f"Content-Type: expected {expected}, found {found}"
        raise RequestError(415, "unsupported_media_type", message, param="Content-Type")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        message = f"Content-Encoding: {shown(encoding)} is not read; send the body as it is"
        raise RequestError(415, "unsupported_encoding", message, param="Content-Encoding")


async def read_body(request: Request, megabytes: float) -> bytes:
    """Raises `RequestError` as soon as it is known to be too large, however it is sent."""
    most = int(megabytes * MB)
    message = f"body: more than {megabytes:g} MB"
    too_large = RequestError(413, "body_too_large", f"{message}; send fewer or smaller pages", param="body")
    if int(request.headers.get("content-length", "0")) > most:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


async def in_time(end: float, work: Awaitable[T], late: RequestError) -> T:
    """Raises `late` where the work is not done at `end`, a time of the event loop; the work is cancelled."""
    try:
        async with asyncio.timeout_at(end):
            return await work
    except TimeoutError:
        raise late from None


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Cancels the work, and raises `ClientDisconnect`, when the client closes the connection."""

    async def closed() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    working, gone = asyncio.create_task(work), asyncio.create_task(closed())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def not_ready(state: str) -> RequestError:
    message = f"the server is {state if state in RETRY_S else 'not ready'}; try again later"
    return RequestError(503, "not_ready", message, retry_after=RETRY_S.get(state, RETRY_S["stopping"]))
