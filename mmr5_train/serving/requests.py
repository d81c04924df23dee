"""Parses rerank requests and builds their responses, with the fields that hosted rerank services share."""

from __future__ import annotations

import io
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mmr5_train.common.pictures import seen_size
from mmr5_train.models.pages import PageLimits, visual_tokens
from mmr5_train.ranking.results import RankedResults
from mmr5_train.serving.errors import RequestError, short_repr
from mmr5_train.serving.pictures import read_document
from mmr5_train.serving.settings import MB, Limits

# Optional fields of other services (Cohere, Jina, Voyage, vLLM, LiteLLM) that mean nothing here. They are ignored,
# and the response says so in `warnings`.
IGNORED_FIELDS = (
    "activation", "add_special_tokens", "additional_data", "cache_salt", "chat_template", "chat_template_kwargs",
    "client_name", "encoding_format", "max_chunks_per_doc", "max_tokens_per_doc", "mm_processor_kwargs",
    "priority", "rank_fields", "raw_scores", "request_id", "softmax", "truncate", "truncate_prompt_tokens",
    "truncation", "truncation_side", "use_activation", "user",
)  # fmt: skip

# A JSON escape of a surrogate. A pair of them encodes one character; an unpaired one is invalid.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class RerankRequest(BaseModel):
    """The body of POST /v1/rerank."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: str
    documents: list[Any] = Field(min_length=1)
    model: str | None = None
    top_n: int | None = Field(default=None, ge=1)
    top_k: int | None = Field(default=None, ge=1)
    """Voyage's name of `top_n`; the response then also has its list `data`."""
    return_documents: bool | None = False
    return_reasoning: bool = False

    @field_validator("documents", mode="before")
    @classmethod
    def _list_of_parts(cls, documents: Any) -> Any:
        """vLLM takes one object with a part for each document."""
        return documents["content"] if isinstance(documents, dict) and set(documents) == {"content"} else documents


@dataclass(frozen=True)
class RankingJob:
    """A validated request with its images."""

    query: str
    pages: list[bytes]
    """The images, checked but still encoded, since a queue of decoded images would need too much memory."""
    top_n: int
    documents: list[dict[str, Any]] | None
    """The documents to return, if the request has `return_documents`."""
    return_reasoning: bool
    warnings: tuple[str, ...] = ()
    with_data: bool = False
    """Whether the response repeats the results under `data`, where Voyage's client looks."""


def read_job(
    body: bytes, limits: Limits, model_name: str, folder: Path | None, page_limits: PageLimits | None = None
) -> RankingJob:
    """Parses a request and reads its images. Raises `RequestError`. With `page_limits`, counts visual tokens.

    Decodes every image to check it. This is slow, so it must not run on the event loop.
    """
    request, warnings = parse_request(body, limits, model_name)
    pages, documents = [], []
    for i, document in enumerate(request.documents):
        data, returned_document = read_document(document, f"documents[{i}]", limits, folder)
        pages.append(data)
        documents.append(returned_document)
        if sum(map(len, pages)) > limits.body_mb * MB:  # a small body can name large files in the folder
            message = f"documents: the first {i + 1} images exceed {limits.body_mb:g} MB; send fewer"
            raise RequestError(422, "pictures_too_large", message, param="documents")
    if page_limits is not None:
        check_visual_tokens(pages, limits, page_limits)
    return RankingJob(
        query=request.query,
        pages=pages,
        top_n=request.top_n or request.top_k or len(pages),
        documents=documents if request.return_documents else None,
        return_reasoning=request.return_reasoning,
        warnings=warnings,
        with_data=request.top_k is not None,
    )


def check_visual_tokens(pages: Sequence[bytes], limits: Limits, page_limits: PageLimits) -> None:
    """Raises `RequestError` if the pages have more visual tokens than allowed."""
    tokens = 0
    for number, data in enumerate(pages, 1):
        with Image.open(io.BytesIO(data)) as image:  # the header only
            tokens += visual_tokens(*seen_size(image), page_limits)
        if tokens > limits.visual_tokens:
            message = f"documents: the first {number} pages have {tokens:,} visual tokens, more than the "
            message += f"{limits.visual_tokens:,} that are allowed; send fewer or smaller pages"
            raise RequestError(422, "too_many_visual_tokens", message, param="documents")


def parse_request(body: bytes, limits: Limits, model_name: str) -> tuple[RerankRequest, tuple[str, ...]]:
    """Parses a request without reading its documents. Returns it with warnings. Raises `RequestError`."""
    values = parse_json(body)
    if not isinstance(values, dict):
        raise RequestError(422, "invalid_request", f"expected a JSON object, found {short_repr(values)}")
    given = {name: value for name, value in values.items() if name not in IGNORED_FIELDS}
    try:
        request = RerankRequest.model_validate(given)
    except ValidationError as error:
        raise _field_error(error) from None
    if request.model not in (None, model_name):
        message = f"model: expected {model_name!r}, found {short_repr(request.model)}; send this name, or omit it"
        raise RequestError(404, "model_not_found", message, param="model")
    if not request.query.strip():
        raise RequestError(422, "invalid_query", "query: is empty; send a question", param="query")
    if len(request.query) > limits.query_chars:
        message = f"query: expected at most {limits.query_chars} characters, found {len(request.query)}"
        raise RequestError(422, "query_too_long", message, param="query")
    if len(request.documents) > limits.pages:
        message = f"documents: expected at most {limits.pages} pages, found {len(request.documents)}"
        raise RequestError(422, "too_many_documents", message, param="documents")
    return request, tuple(
        f"{name}: ignored; it has no meaning for page images" for name in values if name not in given
    )


def parse_json(body: bytes) -> Any:
    """Strict JSON: raises `RequestError` for NaN, Infinity and unpaired surrogates, too."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8 ({error.reason} at byte {error.start})"
        raise RequestError(400, "invalid_encoding", message) from None
    try:
        value = json.loads(text, parse_constant=_reject_constant)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RequestError(400, "invalid_json", f"the body is not JSON ({error.msg}, {where})") from None
    except UnicodeEncodeError as error:
        found = short_repr(error.object[error.start])
        message = f"the body contains an unpaired surrogate ({found}), which is not a valid character"
        raise RequestError(422, "invalid_character", message) from None
    except RecursionError:
        raise RequestError(400, "invalid_json", "the body can't be parsed as JSON (nested too deeply)") from None
    except ValueError:  # Python's limit on the digits of an integer, the only remaining cause
        message = "the body can't be parsed as JSON (a number has too many digits)"
        raise RequestError(400, "invalid_json", message) from None


def _reject_constant(name: str) -> NoReturn:
    raise RequestError(400, "invalid_json", f"the body is not JSON ({name} is not a JSON value)")


def _field_error(error: ValidationError) -> RequestError:
    """An error for the first invalid field: its name, what was expected and what was found."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = ", ".join(RerankRequest.model_fields)
        message = f"{short_repr(field)}: no such field (fields: {known})"
    elif problem["type"] == "missing":
        message = f"{field}: is required, but missing"
    else:
        message = f"{field}: {problem['msg']}, found {short_repr(problem['input'])}"
    return RequestError(422, "invalid_field", message, param=short_repr(field).strip("'"))


def response_body(job: RankingJob, ranked: RankedResults, model_name: str) -> dict[str, Any]:
    """The JSON response to a rerank request."""
    results = []
    for result in ranked.top_k(job.top_n):
        entry: dict[str, Any] = {"index": result.index, "relevance_score": result.score}
        if job.documents is not None:
            entry["document"] = job.documents[result.index]
        if job.return_reasoning:
            entry["reasoning"] = result.note
        results.append(entry)
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": model_name,
        "results": results,
        "has_scores": ranked.has_scores,
        "usage": {"total_tokens": sum(answer.tokens or 0 for answer in ranked.answers)},
        "reasoning": ranked.reasoning if job.return_reasoning else None,
        "defects": list(ranked.defects),
        "warnings": list(job.warnings),
        **({"object": "list", "data": results} if job.with_data else {}),
    }
