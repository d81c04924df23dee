"""Error responses, always as JSON: {"error": {"message", "type", "param", "code"}, "message", "detail"}.

The message is repeated where the clients of Cohere ("message") and of Jina and Voyage ("detail") look for it.
"""

from __future__ import annotations

import logging
import reprlib
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

log = logging.getLogger(__name__)

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


class RequestError(Exception):
    """A rejected request. The message says what is wrong, where, and what was expected."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)

    def response(self) -> JSONResponse:
        kind = "invalid_request_error"
        if self.status == HTTPStatus.UNAUTHORIZED:
            kind = "authentication_error"
        elif self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            kind = "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        body = {"error": error, "message": self.message, "detail": self.message}
        return JSONResponse(body, self.status, self.headers)


def short_repr(value: Any) -> str:
    """A request's value for an error message: truncated, with characters that are invalid in UTF-8 escaped."""
    return _repr.repr(value).encode("utf-8", "backslashreplace").decode()


def install_error_handlers(app: FastAPI) -> None:
    """Makes the app respond to all errors in the format of `RequestError`. Also logs unexpected exceptions."""

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def routing_error(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {short_repr(request.url.path)}"
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "")
            message, code = f"{where}: this path accepts {allowed}", "method_not_allowed"
        else:
            message = f"{where}: no such path; use POST /v1/rerank to rank pages, or GET / for the web page"
            code = "not_found"
        return RequestError(error.status_code, code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def unexpected_error(request: Request, error: Exception) -> JSONResponse:
        return internal_error().response()  # Starlette re-raises the error, and the server logs it


def internal_error() -> RequestError:
    """The error for a failure of the server. It omits the exception's text, which may contain paths."""
    return RequestError(500, "internal_error", "the server failed on this request; see the server's log")
