"""Finds the page image that a framework's document stands for."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from mmr5_train.common.files import InputError
from mmr5_train.models.pages import PageInput

IMAGE_KEYS = ("image_path", "image", "page_image")
FILE_KEYS = ("file_path", "path", "source", "file_name")
PAGE_KEYS = ("page_number", "page", "page_label")


def page_of(metadata: Mapping[str, Any], *, content: str = "", first_page: int, name: str) -> PageInput:
    """The page image of a document.

    It is, in this order, the image in the metadata (`IMAGE_KEYS`: a path, bytes or PIL image), the image in the
    content, as a data URI, or the file in the metadata (`FILE_KEYS`) with its page number (`PAGE_KEYS`).

    Args:
        metadata: of the document.
        content: its text, which may be a data URI.
        first_page: the number that the framework gives the first page under "page" (0 or 1). "page_number" and
            "page_label" count from 1.
        name: the document's name in an error message.

    Raises `InputError` if the document has no image.
    """
    for key in IMAGE_KEYS:
        if metadata.get(key):
            image: PageInput = metadata[key]
            return data_uri(image, name) if isinstance(image, str) and image.startswith("data:") else image
    if content.startswith("data:image/"):
        return data_uri(content, name)
    file = next((metadata[key] for key in FILE_KEYS if metadata.get(key)), None)
    if file is None:
        raise InputError(
            f"{name}: no page image; expected one of {', '.join(IMAGE_KEYS)} in its metadata, or a file "
            f"({', '.join(FILE_KEYS)}) with a page number ({', '.join(PAGE_KEYS)})"
        )
    if not str(file).lower().endswith((".pdf", ".tif", ".tiff")):
        return str(file)
    page_key = next((key for key in PAGE_KEYS if metadata.get(key) is not None), None)
    if page_key is None:
        raise InputError(f"{name}: no page number of {file} in its metadata; expected {', '.join(PAGE_KEYS)}")
    number = str(metadata[page_key])
    if not number.isdecimal():
        raise InputError(f"{name}: {page_key} of {file}: expected a page number, found {number!r}")
    return f"{file}#page={int(number) + (1 - first_page if page_key == 'page' else 0)}"


def data_uri(text: str, name: str) -> bytes:
    """The bytes of a data URI or of base64 text."""
    try:
        return base64.b64decode(text.partition(";base64,")[2] or text, validate=True)
    except binascii.Error as error:
        raise InputError(f"{name}: its image is not valid base64 ({error})") from None
