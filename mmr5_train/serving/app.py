"""The HTTP routes: POST /v1/rerank and its aliases, POST /pages, GET /, /health, /metrics and /v1/models."""

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
from mmr5_train.serving.errors import RequestError, install_error_handlers, internal_error, short_repr
from mmr5_train.serving.metrics import Metrics, Observed
from mmr5_train.serving.page import web_page
from mmr5_train.serving.pdf import PdfError, render_pdf
from mmr5_train.serving.requests import RankingJob, read_job, response_body
from mmr5_train.serving.settings import MB, ServeConfig

DECODERS = 2  # threads that check images; each holds at most one decoded image
RENDERERS = 2  # processes that render PDFs
RETRY_S = {"loading": 5, "stopping": 30, "busy": 2}  # Retry-After, in seconds
CLIENT_CLOSED_REQUEST = 499  # nginx's status for logs; no client receives it

log = logging.getLogger(__name__)

T = TypeVar("T")


class Service:
    """State that the routes share. `requests` is the number of requests in progress."""

    def __init__(self, config: ServeConfig, batcher: Batcher, key: str | None) -> None:
        self.config, self.limits, self.batcher = config, config.limits, batcher
        self.key = key.encode() if key else None
        self.requests = 0
        self.metrics = Metrics(lambda: batcher.waiting)
        self.started = time.time()
        self.decoders = ThreadPoolExecutor(DECODERS, "decoder")
        self.renderers = asyncio.Semaphore(RENDERERS)

    async def check_key(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode("latin-1"), self.key):
            message = "Authorization: expected Bearer and this server's key, found "
            message += "another value" if scheme else "no header"
            headers = {"WWW-Authenticate": "Bearer"}
            raise RequestError(401, "invalid_api_key", message, param="Authorization", headers=headers)

    async def rerank(self, request: Request) -> Response:
        check_type(request, "application/json")
        self.check_ready()
        name = self.config.model_name

        async def work(body: bytes) -> dict[str, Any]:
            read = partial(read_job, body, self.limits, name, self.config.folder, self.batcher.page_limits)
            job = await asyncio.get_running_loop().run_in_executor(self.decoders, read)
            del body, read  # free the base64 text while the job waits; the job holds the decoded bytes
            ranked = await self.rank(job)
            self.metrics.add_ranked(ranked, len(job.pages))
            return response_body(job, ranked, name)

        return await self.admit(request, self.limits.body_mb, work)

    async def rank(self, job: RankingJob) -> RankedResults:
        try:
            queued = self.batcher.submit(job.query, job.pages)
        except StoppingError:
            raise not_ready("stopping") from None
        try:
            return await asyncio.wrap_future(queued.future)
        except asyncio.CancelledError:  # the client is gone, or its time is over
            self.metrics.abandoned.inc()
            self.batcher.abandon(queued)
            raise
        except StoppingError:
            raise not_ready("stopping") from None
        except InputError as error:
            raise RequestError(422, "invalid_document", f"documents: {error}", param="documents") from None
        except Exception:
            log.exception("the model failed on a request with %d pages", len(job.pages))
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
        """Reads the body and responds with the result of `work`.

        Raises `RequestError` if too many requests are in progress, if the body is too large, or on a timeout.
        Cancels `work` on a timeout, or when the client disconnects.
        """
        if self.requests >= self.limits.requests:
            message = f"the server is busy with {self.requests} requests, its maximum; try again shortly"
            raise RequestError(503, "queue_full", message, retry_after=RETRY_S["busy"])
        seconds = f"{self.limits.seconds:g} s"
        body_late = RequestError(408, "body_too_slow", f"body: did not arrive within {seconds}", param="body")
        message = f"not finished within {seconds}; send fewer pages, or try again later"
        work_late = RequestError(504, "timeout", message, retry_after=RETRY_S["busy"])
        self.requests += 1
        deadline = asyncio.get_running_loop().time() + self.limits.seconds
        try:
            # Don't assign the body to a variable: it would stay in memory until the response.
            pending = work(await with_deadline(deadline, read_body(request, body_mb), body_late))
            result = await with_deadline(deadline, cancel_on_disconnect(request, pending), work_late)
            return JSONResponse(result)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
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
            "ranking": self.batcher.ranking,
            "uptime_s": round(time.time() - self.started, 1),
        }
        return JSONResponse(body, 200 if state == "ready" else 503)

    async def report_metrics(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> JSONResponse:
        model = {"id": self.config.model_name, "object": "model", "created": int(self.started)}
        return JSONResponse({"object": "list", "data": [model | {"owned_by": "mmr5-train"}]})


def make_app(config: ServeConfig, batcher: Batcher, key: str | None) -> FastAPI:
    """The application. It starts the batcher, which loads the model, on startup and stops it on shutdown."""
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
    install_error_handlers(app)
    key_required = [Depends(service.check_key)]
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        app.add_api_route(path, service.rerank, methods=["POST"], dependencies=key_required)
    app.add_api_route("/pages", service.pages, methods=["POST"], dependencies=key_required)
    app.add_api_route("/v1/models", service.models, methods=["GET"], dependencies=key_required)
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/metrics", service.report_metrics, methods=["GET"], dependencies=key_required)
    app.add_middleware(Observed, metrics=service.metrics)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    return app


def check_type(request: Request, expected: str) -> None:
    """Rejects other content types with `RequestError`.

    This prevents other web sites from posting to this server: a browser sends a preflight request before it posts
    these types across origins, and the server rejects that request.
    """
    kind, *parameters = request.headers.get("content-type", "").lower().split(";")
    charset = next(
        (p.partition("=")[2].strip(' "') for p in parameters if p.strip().startswith("charset=")), "utf-8"
    )
    if kind.strip() != expected or charset not in ("utf-8", "utf8"):
        found = short_repr(request.headers.get("content-type", "")) if kind else "none"
        message = f"Content-Type: expected {expected}, found {found}"
        raise RequestError(415, "unsupported_media_type", message, param="Content-Type")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        message = f"Content-Encoding: {short_repr(encoding)} is not supported; send the body uncompressed"
        raise RequestError(415, "unsupported_encoding", message, param="Content-Encoding")


async def read_body(request: Request, megabytes: float) -> bytes:
    """The body. Raises `RequestError` as soon as the declared or received size exceeds the limit."""
    max_bytes = int(megabytes * MB)
    message = f"body: more than {megabytes:g} MB"
    too_large = RequestError(413, "body_too_large", f"{message}; send fewer or smaller pages", param="body")
    if int(request.headers.get("content-length", "0")) > max_bytes:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


async def with_deadline(deadline: float, work: Awaitable[T], error: RequestError) -> T:
    """The result of `work`. At `deadline`, a time of the event loop, cancels it and raises `error`."""
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError:
        raise error from None


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client closes the connection, cancels it and raises `ClientDisconnect`."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    work_task, disconnect_task = asyncio.create_task(work), asyncio.create_task(disconnect())
    try:
        await asyncio.wait({work_task, disconnect_task}, return_when=asyncio.FIRST_COMPLETED)
        if not work_task.done():
            raise ClientDisconnect
        return work_task.result()
    finally:
        work_task.cancel()
        disconnect_task.cancel()
        await asyncio.gather(work_task, disconnect_task, return_exceptions=True)


def not_ready(state: str) -> RequestError:
    message = f"the server is {state if state in RETRY_S else 'not ready'}; try again later"
    return RequestError(503, "not_ready", message, retry_after=RETRY_S.get(state, RETRY_S["stopping"]))
