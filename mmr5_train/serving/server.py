"""Starts the server, runs it until a signal arrives, and shuts it down."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn

from mmr5_train.common.files import InputError
from mmr5_train.serving.app import make_app
from mmr5_train.serving.batching import Batcher, Ranker
from mmr5_train.serving.metrics import log
from mmr5_train.serving.protocol import HeaderTimeoutProtocol
from mmr5_train.serving.settings import API_KEY, ServeConfig


class Server(uvicorn.Server):
    """A uvicorn server that exits if the model can't be loaded.

    On shutdown it rejects the queued requests and finishes the current batch.
    """

    def __init__(self, config: ServeConfig, load: Callable[[], Ranker], key: str | None = None) -> None:
        self.batcher = Batcher(load, config.batch_size, config.wait_ms / 1000, config.batch_pages)
        app = make_app(config, self.batcher, key)
        set_request_log(config.request_log)
        super().__init__(
            uvicorn.Config(
                app,
                http=HeaderTimeoutProtocol,
                log_level="warning",
                access_log=False,
                server_header=False,
                headers=[("X-Content-Type-Options", "nosniff")],
                timeout_graceful_shutdown=max(1, round(config.shutdown_s)),
            )
        )

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.batcher.state == "failed"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.batcher.stop()
        await super().shutdown(sockets)


def run(config: ServeConfig, load: Callable[[], Ranker]) -> None:
    """Serves until SIGTERM or SIGINT. If the model can't be loaded, raises the exception that loading raised."""
    key = read_key()
    server = Server(config, load, key)
    with listen(config) as listener:
        host, port = listener.getsockname()[:2]
        if key is None and host not in ("127.0.0.1", "::1"):
            print(f"serve: {host} is reachable from other machines, but {API_KEY} is not set", file=sys.stderr)
        url_host = f"[{host}]" if ":" in host else host
        print(f"serve: {config.model_name} at http://{url_host}:{port}", flush=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _ignore_signal)
        server.run(sockets=[listener])
    if server.batcher.failure is not None:
        raise server.batcher.failure
    print("serve: stopped")


def set_request_log(level: str) -> None:
    """Writes the lines of requests to stderr, if the level is INFO."""
    log.setLevel(level)
    if level == "INFO" and not log.handlers:
        log.addHandler(logging.StreamHandler())


def _ignore_signal(number: int, frame: object) -> None:
    """uvicorn handles the signal, then raises it again when it ends, which would give a nonzero exit code."""


def read_key() -> str | None:
    """The key that clients must send, or None. Raises `InputError` if it is set but unusable."""
    key = os.environ.get(API_KEY)
    if key is not None and (not key.strip() or not key.isascii() or not key.isprintable() or " " in key):
        raise InputError(
            f"{API_KEY}: expected printable ASCII without spaces; set such a key, or unset the variable"
        )
    return key


def listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        option = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise InputError(
            f"{option}: can't listen at {config.host}:{config.port} ({error.strerror or error}); "
            f"choose another {option}=…"
        ) from None
