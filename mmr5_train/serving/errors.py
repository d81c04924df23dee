"""What goes wrong with a request, always as JSON: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import reprlib
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

log = logging.getLogger(__name__)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


class RequestError(Exception):
    """A request that gets no answer. The message says what is wrong, where, and what was expected."""

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
        return JSONResponse({"error": error}, self.status, self.headers)


def shown(value: Any) -> str:
    """A value of a request as a message shows it: short, and free of what can't be sent as UTF-8."""
    return _short.repr(value).encode("utf-8", "backslashreplace").decode()


def answer_errors(app: FastAPI) -> None:
    """Every fault of the app's routes is answered in the one shape; one that was not foreseen is logged."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {shown(request.url.path)}"
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "")
            message, code = f"{where}: this path takes {allowed}", "method_not_allowed"
        else:
            message = f"{where}: no such path; pages are ranked by POST /v1/rerank, and shown at GET /"
            code = "not_found"
        return RequestError(error.status_code, code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return internal_error().response()  # Starlette raises the error again, and the server logs it


def internal_error() -> RequestError:
    """What a caller is told of a fault that is not theirs: nothing of its text, which may hold paths."""
    return RequestError(500, "internal_error", "the server failed on this request; its log says why")
