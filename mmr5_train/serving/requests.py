"""A rerank request from its bytes, and the answer to it: the fields that hosted rerank services share."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmr5_train.ranking.results import RankedResults
from mmr5_train.serving.errors import RequestError, shown
from mmr5_train.serving.pictures import read_document
from mmr5_train.serving.settings import MB, Limits

# Fields of other services' requests that say how text is cut, or who asks: nothing depends on them here.
WITHOUT_EFFECT = ("max_chunks_per_doc", "max_tokens_per_doc", "priority", "truncate_prompt_tokens", "user")

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes it; in pairs they are a character


class RerankRequest(BaseModel):
    """The body of POST /v1/rerank."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: str
    documents: list[Any] = Field(min_length=1)
    model: str | None = None
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = False
    return_reasoning: bool = False


@dataclass(frozen=True)
class Question:
    """A request that can be ranked, without the text of its documents."""

    query: str
    pages: list[bytes]
    """Pictures, known to be whole, still encoded: decoded, a queue of them would fill the memory."""
    top_n: int
    echoes: list[dict[str, Any]] | None
    """The documents, where they are wanted back."""
    reasoning: bool


def read_question(body: bytes, limits: Limits, name: str, folder: Path | None) -> Question:
    """Raises `RequestError` for whatever is not a question with pages. Takes time: not for the event loop."""
    request = read_request(body, limits, name)
    pages, echoes = [], []
    for i, document in enumerate(request.documents):
        data, echo = read_document(document, f"documents[{i}]", limits, folder)
        pages.append(data)
        echoes.append(echo)
        if sum(map(len, pages)) > limits.body_mb * MB:  # by paths into the folder a small body can name much
            message = f"documents: the first {i + 1} pictures are more than {limits.body_mb:g} MB; send fewer"
            raise RequestError(422, "pictures_too_large", message, param="documents")
    return Question(
        query=request.query,
        pages=pages,
        top_n=request.top_n or len(pages),
        echoes=echoes if request.return_documents else None,
        reasoning=request.return_reasoning,
    )


def read_request(body: bytes, limits: Limits, name: str) -> RerankRequest:
    """The request's fields; its documents are not looked at yet."""
    values = read_json(body)
    if not isinstance(values, dict):
        raise RequestError(422, "invalid_request", f"expected a JSON object, found {shown(values)}")
    try:
        request = RerankRequest.model_validate({k: v for k, v in values.items() if k not in WITHOUT_EFFECT})
    except ValidationError as error:
        raise _field_error(error) from None
    if request.model not in (None, name):
        message = f"model: this server has {name!r}, found {shown(request.model)}; name that one, or none"
        raise RequestError(404, "model_not_found", message, param="model")
    if not request.query.strip():
        raise RequestError(422, "invalid_query", "query: is empty; ask a question", param="query")
    if len(request.query) > limits.query_chars:
        message = f"query: {len(request.query)} characters, at most {limits.query_chars} are taken"
        raise RequestError(422, "query_too_long", message, param="query")
    if len(request.documents) > limits.pages:
        message = f"documents: {len(request.documents)} pages, at most {limits.pages} are taken in a request"
        raise RequestError(422, "too_many_documents", message, param="documents")
    return request


def read_json(body: bytes) -> Any:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8 ({error.reason} at byte {error.start})"
        raise RequestError(400, "invalid_encoding", message) from None
    try:
        value = json.loads(text, parse_constant=_no_constant)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RequestError(400, "invalid_json", f"the body is not JSON ({error.msg}, {where})") from None
    except UnicodeEncodeError as error:
        found = shown(error.object[error.start])
        message = f"the body holds half a surrogate pair ({found}), which is no character"
        raise RequestError(422, "invalid_character", message) from None
    except RecursionError:
        raise RequestError(400, "invalid_json", "the body is not usable JSON (nested too deeply)") from None
    except ValueError:  # Python's limit on the digits of an integer; nothing else is left that may go wrong
        raise RequestError(
            400, "invalid_json", "the body is not usable JSON (a number of too many digits)"
        ) from None


def _no_constant(name: str) -> NoReturn:
    raise RequestError(400, "invalid_json", f"the body is not JSON ({name} is no JSON value)")


def _field_error(error: ValidationError) -> RequestError:
    """The first problem, with its field, what was expected and what was found."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = ", ".join(RerankRequest.model_fields)
        message = f"{shown(field)}: no such field (fields: {known})"
    elif problem["type"] == "missing":
        message = f"{field}: is missing, and is needed"
    else:
        message = f"{field}: {problem['msg']}, found {shown(problem['input'])}"
    return RequestError(422, "invalid_field", message, param=shown(field).strip("'"))


def answer(question: Question, ranked: RankedResults, name: str) -> dict[str, Any]:
    """The JSON of a ranking."""
    results = []
    for result in ranked.top_k(question.top_n):
        entry: dict[str, Any] = {"index": result.doc_id, "relevance_score": result.score}
        if question.echoes is not None:
            entry["document"] = question.echoes[result.doc_id]
        if question.reasoning:
            entry["reasoning"] = result.note
        results.append(entry)
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": name,
        "results": results,
        "has_scores": ranked.has_scores,
        "usage": {"total_tokens": sum(answered.tokens for answered in ranked.answers)},
        "reasoning": ranked.reasoning if question.reasoning else None,
        "defects": list(ranked.defects),
    }
