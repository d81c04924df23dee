"""From a config to a listening server, and to its end."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn

from mmr5_train.common.files import InputError
from mmr5_train.serving.app import make_app
from mmr5_train.serving.batching import Batcher, Ranker
from mmr5_train.serving.settings import API_KEY, ServeConfig


class Server(uvicorn.Server):
    """Ends when its model can't be loaded; told to stop, it refuses what waits and ends what is being ranked."""

    def __init__(self, config: ServeConfig, load: Callable[[], Ranker], key: str | None = None) -> None:
        self.batcher = Batcher(load, config.batch_size, config.wait_ms / 1000)
        app = make_app(config, self.batcher, key)
        super().__init__(
            uvicorn.Config(
                app,
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
    """Serves until SIGTERM or SIGINT. Raises what kept the model from loading."""
    key = read_key()
    server = Server(config, load, key)
    with listen(config) as listener:
        host, port = listener.getsockname()[:2]
        if key is None and host not in ("127.0.0.1", "::1"):
            print(f"serve: {host} can be reached from elsewhere, and {API_KEY} asks for no key", file=sys.stderr)
        at = f"[{host}]" if ":" in host else host
        print(f"serve: {config.model_name} at http://{at}:{port}", flush=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _already_heeded)
        server.run(sockets=[listener])
    if server.batcher.failure is not None:
        raise server.batcher.failure
    print("serve: stopped")


def _already_heeded(number: int, frame: object) -> None:
    """uvicorn stops at a signal, and raises it again at the end: that would look as if the process had failed."""


def read_key() -> str | None:
    """The key that callers must show. Raises `InputError` for one that is set and no key."""
    key = os.environ.get(API_KEY)
    if key is not None and (not key.strip() or not key.isascii() or not key.isprintable() or " " in key):
        raise InputError(f"{API_KEY}: is set, but empty or not plain ASCII without spaces; set a key, or unset it")
    return key


def listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        what = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise InputError(
            f"{what}: {config.host}:{config.port} can't be listened at ({error.strerror or error}); "
            f"choose another {what}=…"
        ) from None
