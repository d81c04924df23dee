"""Malformed requests to the server, one of each kind, and the check that it rejects them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

JSON = {"Content-Type": "application/json"}
PDF = {"Content-Type": "application/pdf"}


@dataclass(frozen=True)
class Malformed:
    """A request that the server must reject with `status` and a message that contains `message_part`."""

    name: str
    status: int
    message_part: str
    body: bytes
    path: str = "/v1/rerank"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: JSON)


def malformed_requests(body_mb: float = 32, pages: int = 50, query_chars: int = 2000) -> list[Malformed]:
    """One request of each kind, for a server with these limits and without an image folder."""
    return [
        *_invalid_json(),
        *_invalid_fields(pages, query_chars),
        *_documents_without_images(),
        *_invalid_images(),
        *_invalid_http(body_mb),
    ]


def rejection_problem(malformed: Malformed, response: httpx.Response) -> str | None:
    """What is wrong with the response to a malformed request, or None."""
    if response.status_code != malformed.status:
        return f"expected status {malformed.status}, found {response.status_code}: {response.text[:200]}"
    try:
        error = response.json()["error"]
        message, fields = error["message"], set(error)
    except (ValueError, KeyError, TypeError):
        return f"expected an error as JSON, found {response.text[:200]}"
    if fields != {"message", "type", "param", "code"} or malformed.message_part not in message:
        return f"expected a message with {malformed.message_part!r}, found {error}"
    return None


def encode_image(image_format: str, size: tuple[int, int] = (90, 120), color: str = "red") -> bytes:
    """An image with noise in its lower half, so that decoding half of the file fails."""
    image = Image.effect_noise(size, 60).convert("RGB")
    image.paste(color, (0, 0, size[0], size[1] // 2))
    return to_bytes(image, image_format)


def to_bytes(image: Image.Image, image_format: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format)
    return stream.getvalue()


def data_url(image: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(image).decode()}"


def _valid_document() -> str:
    return data_url(encode_image("PNG"))


def _body(**fields: Any) -> bytes:
    """A valid request body with some fields replaced."""
    return json.dumps({"query": "Which page?", "documents": [_valid_document()]} | fields).encode()


def _body_with(documents: Sequence[Any]) -> bytes:
    return _body(documents=list(documents))


def _invalid_json() -> list[Malformed]:
    return [
        Malformed("empty body", 400, "not JSON", b""),
        Malformed("not JSON", 400, "not JSON", b"which page shows a bar chart?"),
        Malformed("truncated JSON", 400, "line 1", _body()[:-20]),
        Malformed("not UTF-8", 400, "not UTF-8", _body().replace(b"Which", b"Wh\xff\xfech")),
        Malformed("NaN", 400, "NaN", b'{"query": "?", "documents": [NaN]}'),
        Malformed("Infinity", 400, "Infinity", b'{"query": "?", "documents": ["x"], "top_n": -Infinity}'),
        Malformed("deep nesting", 400, "nested", b'{"documents": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        Malformed("number with 100,000 digits", 400, "digits", b'{"top_n": ' + b"9" * 100_000 + b"}"),
        Malformed("list as body", 422, "JSON object", b"[1, 2]"),
    ]


def _invalid_fields(pages: int, query_chars: int) -> list[Malformed]:
    document = _valid_document()
    return [
        Malformed("unknown field", 422, "topn", _body(topn=3)),
        Malformed("surrogate in a field name", 422, "surrogate", _body(**{"\ud800": 1})),
        Malformed("no query", 422, "query", json.dumps({"documents": [document]}).encode()),
        Malformed("empty query", 422, "query", _body(query=" \n")),
        Malformed("number as query", 422, "query", _body(query=7)),
        Malformed("unpaired surrogate in the query", 422, "surrogate", _body(query="Which \ud83d page?")),
        Malformed("query too long", 422, str(query_chars), _body(query="w" * (query_chars + 1))),
        Malformed("no documents", 422, "documents", json.dumps({"query": "?"}).encode()),
        Malformed("empty list of documents", 422, "documents", _body_with([])),
        Malformed("string as documents", 422, "documents", _body(documents="page.png")),
        Malformed("too many pages", 422, str(pages), _body_with([document] * (pages + 1))),
        Malformed("top_n of 0", 422, "top_n", _body(top_n=0)),
        Malformed("top_n as string", 422, "top_n", _body(top_n="3")),
        Malformed("another model", 404, "model", _body(model="rerank-v3.5")),
    ]


def _documents_without_images() -> list[Malformed]:
    document = _valid_document()
    http_url, ftp_url = "http://127.0.0.1:22/page.png", {"image_url": {"url": "ftp://host/page.png"}}
    return [
        Malformed("text", 422, "documents[1]: 'Water use", _body_with([document, "Water use fell in 2019."])),
        Malformed("text object", 422, "documents[0]: contains text", _body_with([{"text": "Water use"}])),
        Malformed("object without an image", 422, "documents[0]", _body_with([{"page": 3}])),
        Malformed("number as document", 422, "documents[1]", _body_with([document, 3])),
        Malformed("null as image", 422, "documents[0].image", _body_with([{"image": None}])),
        Malformed("number as image_url", 422, "documents[0].image_url", _body_with([{"image_url": 3}])),
        Malformed("http URL", 422, "documents[0]: is a URL", _body_with([http_url])),
        Malformed("ftp URL", 422, "does not fetch", _body_with([ftp_url])),
        Malformed("file URL", 422, "documents[0]", _body_with(["file:///etc/passwd"])),
        Malformed("path to a parent folder", 422, "documents[0]", _body_with([{"image": "../../etc/passwd"}])),
    ]


def _invalid_images() -> list[Malformed]:
    document = _valid_document()
    bomb = data_url(b"BM" + bytes(8) + (54).to_bytes(4, "little") + _bmp_header(30_000, 30_000))
    pdf = "data:application/pdf;base64,JVBERi0="
    narrow = data_url(encode_image("PNG", (2, 900)))
    unsupported = "supported format"
    truncated = []
    for image_format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        data = encode_image(image_format)
        body = _body_with([document, data_url(data[: len(data) // 2])])
        truncated.append(Malformed(f"truncated {image_format}", 422, "documents[1]", body))
    return [
        Malformed("not base64", 422, "base64", _body_with(["data:image/png;base64,!!!!"])),
        Malformed("percent-encoded data URL", 422, "base64", _body_with(["data:image/png,%89PNG"])),
        Malformed("PDF as document", 422, "/pages", _body_with([pdf])),
        Malformed("SVG", 422, unsupported, _body_with([data_url(b"<svg xmlns='x'/>")])),
        Malformed("empty image", 422, unsupported, _body_with([data_url(b"")])),
        *truncated,
        Malformed("decompression bomb", 422, "megapixels", _body_with([bomb])),
        Malformed("extreme aspect ratio", 422, "ratio of its sides", _body_with([narrow])),
    ]


def _invalid_http(body_mb: float) -> list[Malformed]:
    text, compressed = {"Content-Type": "text/plain"}, JSON | {"Content-Encoding": "gzip"}
    return [
        Malformed("body too large", 413, f"{body_mb:g} MB", b" " * int(body_mb * 1e6 + 1)),
        Malformed("another content type", 415, "Content-Type", _body(), headers=text),
        Malformed("no content type", 415, "Content-Type", _body(), headers={}),
        Malformed("compressed body", 415, "Content-Encoding", _body(), headers=compressed),
        Malformed("another method", 405, "POST", b"", method="GET"),
        Malformed("another path", 404, "no such path", _body(), path="/v1/rerankk/../%00"),
        Malformed("not a PDF", 422, "not a PDF", b"hello", path="/pages", headers=PDF),
        Malformed("truncated PDF", 422, "PDF", b"%PDF-1.7\n1 0 obj <<", path="/pages", headers=PDF),
    ]


def _bmp_header(width: int, height: int) -> bytes:
    """A BMP information header that declares the size of an image, with no pixels after it."""
    fields = [(40, 4), (width, 4), (height, 4), (1, 2), (24, 2), (0, 4), (0, 4), (0, 4), (0, 4), (0, 4), (0, 4)]
    return b"".join(value.to_bytes(size, "little") for value, size in fields)
