"""Reads the image of one document of a request, and checks that it can be ranked."""

from __future__ import annotations

import base64
import binascii
import io
import logging
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError

from mmr5_train.common.pictures import as_seen
from mmr5_train.models.pages import MAX_ASPECT_RATIO
from mmr5_train.serving.errors import RequestError, short_repr
from mmr5_train.serving.settings import MB, Limits

# Silences Pillow's warnings about malformed images, since clients could fill the server's log with them.
logging.getLogger("PIL").setLevel(logging.CRITICAL)

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
LONGEST_PATH = 1024
SHORTEST_BASE64 = 64
# How the base64 of the formats begins: PNG, JPEG, WebP and other RIFF, GIF, TIFF of both byte orders, BMP.
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "SUkqA", "TU0AK", "Qk")

_DATA_URL = re.compile(
    r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]*)*(?P<base64>;base64)?,", re.I | re.A
)
_SCHEME = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*):", re.I | re.A)
_EXPECTED = 'pages must be images: send a data URL such as "data:image/png;base64,…"'


def read_document(document: Any, where: str, limits: Limits, folder: Path | None) -> tuple[bytes, dict[str, Any]]:
    """The encoded image of a document, and the document as `return_documents` returns it.

    `where` names the document in error messages ("documents[3]"). Raises `RequestError` unless the document is a
    valid image within the limits.
    """
    reference, document_without_extras = _image_reference(document, where)
    data = _read_reference(reference, where, limits, folder)
    check_picture(data, where, limits)
    return data, document_without_extras


def check_picture(data: bytes, where: str, limits: Limits) -> None:
    """Decodes the image once, so that a corrupt image is rejected before ranking. Raises `RequestError`."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size, where, limits)
            if image.format == "TIFF" and _has_second_frame(image):
                raise _invalid(where, "is a TIFF with several pages; send each page as a separate image")
            image.load()
            as_seen(image)  # some pixel formats can't be shown
    except RequestError:
        raise
    except UnidentifiedImageError:
        reason = f"is not an image in a supported format ({', '.join(FORMATS)})"
        raise _invalid(where, reason, "not_a_picture") from None
    except Image.DecompressionBombError:
        raise _invalid(where, f"declares more than {limits.megapixels:g} megapixels", "too_many_pixels") from None
    except Exception as error:  # decoders raise many kinds of exceptions on malicious input
        reason = f"can't be decoded ({type(error).__name__}: {short_repr(str(error))}); send a complete image"
        raise _invalid(where, reason, "not_a_picture") from None


def _check_size(width: int, height: int, where: str, limits: Limits) -> None:
    if width * height > limits.megapixels * MB:
        reason = f"is {width} × {height} pixels, more than {limits.megapixels:g} megapixels; send a smaller image"
        raise _invalid(where, reason, "too_many_pixels")
    if max(width, height) > MAX_ASPECT_RATIO * max(1, min(width, height)):
        reason = f"is {width} × {height} pixels; the ratio of its sides must be at most {MAX_ASPECT_RATIO} : 1"
        raise _invalid(where, reason)


def _has_second_frame(image: Image.Image) -> bool:
    try:
        image.seek(1)  # `n_frames` would read through every frame that the file declares
    except EOFError:
        return False
    return True


def _image_reference(document: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The data URL, base64 or path of a document's image, and the document reduced to that field.

    The second also has an empty `text`, which some clients require in a returned document.
    """
    if isinstance(document, str):
        return _non_empty_string(document, where), {"image": document, "text": ""}
    if not isinstance(document, dict):
        raise _invalid(where, f"expected a string or an object, found {_json_type(document)}")
    if "content" in document:
        return _part_with_image(document["content"], f"{where}.content")
    if "image" in document:
        image = _non_empty_string(document["image"], f"{where}.image")
        return image, {"image": image, "text": ""}
    if "image_url" in document:
        inner = document["image_url"]
        if isinstance(inner, str):
            return _non_empty_string(inner, f"{where}.image_url"), {"image_url": inner, "text": ""}
        if not isinstance(inner, dict) or "url" not in inner:
            raise _invalid(f"{where}.image_url", f'expected {{"url": "data:…"}}, found {short_repr(inner)}')
        url = _non_empty_string(inner["url"], f"{where}.image_url.url")
        return url, {"image_url": {"url": url}, "text": ""}
    text = document.get("text")
    if isinstance(text, str) and _DATA_URL.match(text):  # Cohere's client sends every document as a text
        return text, {"text": text}
    if "text" in document:
        raise _invalid(where, f"contains text; {_EXPECTED}", "not_a_picture")
    raise _invalid(where, f"expected the key image, image_url or content, found {short_repr(sorted(document))}")


def _part_with_image(parts: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The image of a document in the form of chat content: a list with one image."""
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise _invalid(where, f"expected a list of parts, found {short_repr(parts)}")
    images = [part for part in parts if "image_url" in part or "image" in part]
    if len(images) != 1 or len(parts) != 1:
        raise _invalid(where, f"expected one image and nothing else, found {len(images)} of {len(parts)} parts")
    return _image_reference(images[0], f"{where}[0]")


def _non_empty_string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _invalid(where, f"expected a string, found {_json_type(value)}")
    if not value:
        raise _invalid(where, f"is empty; {_EXPECTED}")
    return value


def _read_reference(reference: str, where: str, limits: Limits, folder: Path | None) -> bytes:
    match = _SCHEME.match(reference)
    scheme = match["scheme"].lower() if match else ""
    if scheme == "data":
        return _decode_data_url(reference, where)
    if (data := _bare_base64(reference)) is not None:
        return data
    if folder is None and any(character.isspace() for character in reference):
        raise _invalid(where, f"{short_repr(reference)} is a text; {_EXPECTED}", "not_a_picture")
    if scheme == "file" and folder is not None:
        path = unquote(reference[len("file:") :])
        return _read_from_folder(path.removeprefix("//"), where, limits, folder)
    if scheme == "file" or (scheme and "://" in reference[: len(scheme) + 3]):
        reason = f"is a URL ({scheme}:); the server does not fetch URLs, so send the image as a data URL"
        raise _invalid(where, reason, "address_refused")
    if folder is None or len(reference) > LONGEST_PATH or any(ord(character) < 32 for character in reference):
        raise _invalid(where, f"{short_repr(reference)} is not an image; {_EXPECTED}", "not_a_picture")
    return _read_from_folder(reference, where, limits, folder)


def _bare_base64(text: str) -> bytes | None:
    """The bytes of base64 without a data URL, as Jina's clients send it; None if the text is something else."""
    if len(text) < SHORTEST_BASE64 or not text.startswith(BASE64_STARTS):
        return None
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _decode_data_url(url: str, where: str) -> bytes:
    match = _DATA_URL.match(url)
    if match is None or not match["base64"]:
        found = short_repr(url.partition(",")[0])
        raise _invalid(where, f"expected a data URL data:image/…;base64,…, found {found}", "bad_data_url")
    if match["type"] and match["type"].lower() == "application/pdf":
        raise _invalid(where, "is a PDF; POST it to /pages, and send the images it returns", "not_a_picture")
    if not match["type"] or not match["type"].lower().startswith("image/"):
        found = match["type"] or "no type"
        raise _invalid(where, f"expected a data URL of type image/…, found {short_repr(found)}", "not_a_picture")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        reason = f"its data is not base64 ({error}); use the standard alphabet, without line breaks"
        raise _invalid(where, reason, "bad_data_url") from None


def _read_from_folder(name: str, where: str, limits: Limits, folder: Path) -> bytes:
    """Reads a file inside the folder. Resolves symbolic links and `..` before it checks the location."""
    max_bytes = int(limits.body_mb * MB)
    try:
        name.encode()
        root = folder.resolve()
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise _invalid(where, f"{short_repr(name)} is outside the image folder", "path_refused")
        if not path.is_file():
            raise FileNotFoundError
        # The file may have been replaced since the check, so don't follow a link or block on a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            data = stream.read(max_bytes + 1)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: circular links
        reason = f"{short_repr(name)} is not a file in the image folder; {_EXPECTED}, or a path inside the folder"
        raise _invalid(where, reason, "not_a_picture") from None
    if len(data) > max_bytes:
        raise _invalid(where, f"{short_repr(name)} is larger than {limits.body_mb:g} MB", "picture_too_large")
    return data


def _json_type(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _invalid(where: str, reason: str, code: str = "invalid_document") -> RequestError:
    return RequestError(422, code, f"{where}: {reason}", param=where)
