"""Page pictures as a request carries them: a JPEG of bounded size, as it lies on the disk where that will do."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections import OrderedDict
from pathlib import Path

from PIL import Image

from mmr5_train.common.files import InputError

KEPT_URLS = 256  # some 100 MB at most; the questions on a page stand near each other
_ORIENTATION = 0x0112  # Exif: how a viewer should turn the picture


class PagePictures:
    """What was read and encoded once, for the pages that many questions share. Raises as the functions below."""

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
            if len(self._urls) > KEPT_URLS:
                self._urls.popitem(last=False)
        return self._urls[path]


def page_hash(path: Path) -> str:
    """SHA-256 of the file in hexadecimal. Raises `InputError` for one that can't be read."""
    return hashlib.sha256(_read(path)).hexdigest()


def image_url(path: Path, max_pixels: int) -> str:
    """A page image of at most `max_pixels` pixels as a JPEG data URL. Raises `InputError` naming the file.

    A JPEG that is small enough goes as it is: nothing is lost in it, and no time. Any other picture is decoded,
    put on white, made smaller where it must be and encoded.
    """
    data = _read(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if not _fits(image, data, max_pixels):
                data = _encoded(image, max_pixels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not an image that can be read ({error}); make it anew") from None
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such image; run the stage that writes the candidates again") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None


def _fits(image: Image.Image, data: bytes, max_pixels: int) -> bool:
    """Whether a file can go as it is: a whole JPEG (end marker and all), upright, in colours or grey."""
    whole = image.format == "JPEG" and data.endswith(b"\xff\xd9")
    upright = image.getexif().get(_ORIENTATION, 1) == 1
    return whole and upright and image.mode in ("RGB", "L") and image.width * image.height <= max_pixels


def _encoded(image: Image.Image, max_pixels: int) -> bytes:
    page = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if page.mode == "RGBA":
        page = Image.alpha_composite(Image.new("RGBA", page.size, "white"), page).convert("RGB")
    scale = (max_pixels / (page.width * page.height)) ** 0.5
    if scale < 1:
        page = page.resize((max(1, int(page.width * scale)), max(1, int(page.height * scale))))
    stream = io.BytesIO()
    page.save(stream, "JPEG", quality=90)
    return stream.getvalue()
