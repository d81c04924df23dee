"""Page images as a request carries them: JPEG data URLs of bounded size."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections import OrderedDict
from pathlib import Path

from PIL import Image

from mmr5_train.common.files import InputError
from mmr5_train.common.pictures import as_seen, orientation

MAX_CACHED_URLS = 256  # about 100 MB at most; questions on the same page are close together in the data


class PageImages:
    """Caches hashes and data URLs of page images, since many questions share a page.

    Both methods raise `InputError` as `page_hash` and `image_url` do.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._hashes: dict[Path, str] = {}
        self._urls: OrderedDict[Path, str] = OrderedDict()

    async def hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = await asyncio.to_thread(page_hash, path)
        return self._hashes[path]

    async def url(self, path: Path) -> str:
        if path not in self._urls:
            self._urls[path] = await asyncio.to_thread(image_url, path, self._max_pixels)
            if len(self._urls) > MAX_CACHED_URLS:
                self._urls.popitem(last=False)
        return self._urls[path]


def page_hash(path: Path) -> str:
    """SHA-256 of the file in hexadecimal. Raises `InputError` if it can't be read."""
    return hashlib.sha256(_read(path)).hexdigest()


def image_url(path: Path, max_pixels: int) -> str:
    """A page image of at most `max_pixels` pixels as a JPEG data URL. Raises `InputError` naming the file.

    A JPEG file that is small enough is sent unchanged, which loses no quality and takes no time. Any other image
    is decoded, put on a white background, shrunk if necessary, and encoded.
    """
    data = _read(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if not _can_send_unchanged(image, data, max_pixels):
                data = _encode(image, max_pixels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path}: not a readable image ({error}); run the stage that writes the candidates again"
        ) from None
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such image; run the stage that writes the candidates again") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None


def _can_send_unchanged(image: Image.Image, data: bytes, max_pixels: int) -> bool:
    """Whether the file is a complete JPEG (it has the end marker), upright, in RGB or grey, and small enough."""
    complete = image.format == "JPEG" and data.endswith(b"\xff\xd9")
    return (
        complete
        and orientation(image) == 1
        and image.mode in ("RGB", "L")
        and image.width * image.height <= max_pixels
    )


def _encode(image: Image.Image, max_pixels: int) -> bytes:
    page = as_seen(image)
    scale = (max_pixels / (page.width * page.height)) ** 0.5
    if scale < 1:
        page = page.resize((max(1, int(page.width * scale)), max(1, int(page.height * scale))))
    stream = io.BytesIO()
    page.save(stream, "JPEG", quality=90)
    return stream.getvalue()
