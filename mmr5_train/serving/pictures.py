"""The picture behind one document of a request: found, and proved to be one that can be ranked."""

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

from mmr5_train.models.pages import LONGEST
from mmr5_train.serving.errors import RequestError, shown
from mmr5_train.serving.settings import MB, Limits

# What is wrong with a picture is told to who sent it; the server's log is not theirs to fill.
logging.getLogger("PIL").setLevel(logging.CRITICAL)

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
LONGEST_PATH = 1024

_DATA_URL = re.compile(
    r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]*)*(?P<base64>;base64)?,", re.I | re.A
)
_SCHEME = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*):", re.I | re.A)
_EXPECTED = 'pages must be pictures: a data URL such as "data:image/png;base64,…"'


def read_document(document: Any, where: str, limits: Limits, folder: Path | None) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a document's picture, and the document as `return_documents` gives it back.

    `where` names the document in messages ("documents[3]"). Raises `RequestError` for anything but a picture.
    """
    reference, echo = _reference(document, where)
    data = _fetch(reference, where, limits, folder)
    check_picture(data, where, limits)
    return data, echo


def check_picture(data: bytes, where: str, limits: Limits) -> None:
    """Decodes the picture once, so that what is ranked later is known to be whole."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height, where, limits)
            if image.format == "TIFF" and _has_second_frame(image):
                raise _refused(where, "holds several pages (TIFF); send each page as its own picture")
            image.load()
            image.convert("RGB")  # as the model will see it: not every kind of pixel can be turned into it
    except RequestError:
        raise
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise _refused(where, f"its bytes are no picture of a known kind ({kinds})", "not_a_picture") from None
    except Image.DecompressionBombError:
        raise _refused(where, f"claims more than {limits.megapixels:g} megapixels", "too_many_pixels") from None
    except Exception as error:  # decoders raise almost anything on bytes that someone made for them
        reason = f"can't be decoded ({type(error).__name__}: {shown(str(error))}); send the whole picture"
        raise _refused(where, reason, "not_a_picture") from None


def _check_size(width: int, height: int, where: str, limits: Limits) -> None:
    if width * height > limits.megapixels * MB:
        reason = f"is {width} × {height} pixels, more than {limits.megapixels:g} megapixels; send it smaller"
        raise _refused(where, reason, "too_many_pixels")
    if max(width, height) > LONGEST * max(1, min(width, height)):
        raise _refused(where, f"is {width} × {height} pixels, too long for its width ({LONGEST} : 1 at most)")


def _has_second_frame(image: Image.Image) -> bool:
    try:
        image.seek(1)  # `n_frames` would walk through all that a file claims to have
    except EOFError:
        return False
    return True


def _reference(document: Any, where: str) -> tuple[str, dict[str, Any]]:
    """What a document says its picture is, and the document without anything but that."""
    if isinstance(document, str):
        return _text(document, where), {"image": document}
    if isinstance(document, dict):
        if "image" in document:
            image = _text(document["image"], f"{where}.image")
            return image, {"image": image}
        if "image_url" in document:
            inner = document["image_url"]
            if not isinstance(inner, dict) or "url" not in inner:
                raise _refused(f"{where}.image_url", f'expected {{"url": "data:…"}}, found {shown(inner)}')
            url = _text(inner["url"], f"{where}.image_url.url")
            return url, {"image_url": {"url": url}}
        if "text" in document:
            raise _refused(where, f"holds text; {_EXPECTED}", "not_a_picture")
        raise _refused(where, f"has the keys {shown(sorted(document))}; expected image or image_url")
    raise _refused(where, f"expected a string or an object, found {_kind(document)}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _refused(where, f"expected a string, found {_kind(value)}")
    if not value:
        raise _refused(where, f"is empty; {_EXPECTED}")
    return value


def _fetch(reference: str, where: str, limits: Limits, folder: Path | None) -> bytes:
    match = _SCHEME.match(reference)
    scheme = match["scheme"].lower() if match else ""
    if scheme == "data":
        return _from_data_url(reference, where)
    if scheme == "file" and folder is not None:
        path = unquote(reference[len("file:") :])
        return _from_folder(path.removeprefix("//"), where, limits, folder)
    if scheme == "file" or (scheme and "://" in reference[: len(scheme) + 3]):
        reason = f"is an address ({scheme}:), and addresses are not fetched; send the picture as a data URL"
        raise _refused(where, reason, "address_refused")
    if folder is None or len(reference) > LONGEST_PATH or any(ord(letter) < 32 for letter in reference):
        raise _refused(where, f"{shown(reference)} is no picture; {_EXPECTED}", "not_a_picture")
    return _from_folder(reference, where, limits, folder)


def _from_data_url(url: str, where: str) -> bytes:
    match = _DATA_URL.match(url)
    if match is None or not match["base64"]:
        found = shown(url.partition(",")[0])
        raise _refused(where, f"expected a data URL data:image/…;base64,… and found {found}", "bad_data_url")
    if match["type"] and match["type"].lower() == "application/pdf":
        raise _refused(where, "is a PDF; POST it to /pages, and send the pictures it gives", "not_a_picture")
    if not match["type"] or not match["type"].lower().startswith("image/"):
        found = match["type"] or "no type"
        raise _refused(where, f"a data URL of type image/… is expected, found {shown(found)}", "not_a_picture")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        reason = f"its data is not base64 ({error}); use the plain alphabet, without line ends"
        raise _refused(where, reason, "bad_data_url") from None


def _from_folder(name: str, where: str, limits: Limits, folder: Path) -> bytes:
    """A file inside the folder, links and `..` followed before it is judged where it lies."""
    most = int(limits.body_mb * MB)
    try:
        name.encode()
        root = folder.resolve()
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise _refused(where, f"{shown(name)} leads out of the folder of pictures", "path_refused")
        if not path.is_file():
            raise FileNotFoundError
        # What lies there may have been changed since: a link is not followed, a pipe not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            data = stream.read(most + 1)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: links that go round in a circle
        reason = f"{shown(name)} is no picture in the folder; {_EXPECTED}, or a path inside the folder"
        raise _refused(where, reason, "not_a_picture") from None
    if len(data) > most:
        raise _refused(where, f"{shown(name)} is larger than {limits.body_mb:g} MB", "picture_too_large")
    return data


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _refused(where: str, reason: str, code: str = "invalid_document") -> RequestError:
    return RequestError(422, code, f"{where}: {reason}", param=where)
