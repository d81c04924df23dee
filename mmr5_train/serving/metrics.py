"""Counts of the server in Prometheus's format, and one log line per request.

`Observed` wraps the application: it gives each request an id, which the response has as X-Request-Id, counts the
request, and logs it as JSON to the logger `mmr5_train.serving.requests_log`. No question, page or key is logged.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mmr5_train.ranking.results import RankedResults

ROUTES = ("/v1/rerank", "/v2/rerank", "/rerank", "/pages", "/v1/models", "/health", "/metrics", "/")
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

log = logging.getLogger("mmr5_train.serving.requests_log")


class Metrics:
    """The server's counters, in a registry of their own."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        """`waiting` returns the number of requests in the queue."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("mmr5_requests", "Responses", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "mmr5_request_seconds", "Time of a request", ["route"], buckets=SECONDS, registry=registry
        )
        self.pages = Counter("mmr5_ranked_pages", "Pages of ranked requests", registry=registry)
        self.tokens = Counter("mmr5_tokens", "Tokens of ranked requests", ["kind"], registry=registry)
        self.defects = Counter("mmr5_defects", "Ranked requests with a defect", ["defect"], registry=registry)
        self.abandoned = Counter("mmr5_abandoned", "Requests that nobody waited for", registry=registry)
        Gauge("mmr5_waiting", "Requests in the queue", registry=registry).set_function(waiting)

    def add_ranked(self, ranked: RankedResults, pages: int) -> None:
        self.pages.inc(pages)
        for kind, name in (("generated", "tokens"), ("prompt", "prompt_tokens"), ("visual", "visual_tokens")):
            self.tokens.labels(kind).inc(sum(getattr(answer, name) or 0 for answer in ranked.answers))
        for defect in ranked.defects:
            self.defects.labels(defect).inc()

    def text(self) -> bytes:
        """All counts in Prometheus's text format."""
        return generate_latest(self.registry)


class Observed:
    """An ASGI application that counts and logs the requests of another one."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, status, start = request_id_of(scope), 0, time.perf_counter()

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            route = scope["path"] if scope["path"] in ROUTES else "other"
            seconds = time.perf_counter() - start
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            entry = {"id": request_id, "route": route, "status": status, "seconds": round(seconds, 3)}
            log.info("%s", json.dumps(entry))


def request_id_of(scope: Any) -> str:
    """The client's X-Request-Id if it is a plain word, else a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
