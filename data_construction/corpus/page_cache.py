"""Page pictures: rendered from a PDF or taken from image bytes, once, into a cache folder.

A cached file is named after everything that decides its bytes (the source's hash, the size limits, the
versions of the renderer and of the encoder), so a second run finds it and a changed document or setting does
not. Files appear whole or not at all.

JPEG at quality 90, since it is written ten times as fast as PNG and two thirds as large, while pages stay
readable; like PNG, the same pixels give the same bytes. Image bytes that fit are kept as they are.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import PIL
import pypdfium2
from PIL import Image

from mmr5_train.common.files import InputError, atomic_write
from mmr5_train.models.pages import IMAGE_ERRORS, on_white, one_line, render_page

JPEG_QUALITY = 90
KEPT_SUFFIX = {"JPEG": ".jpg", "PNG": ".png"}  # formats of image bytes that are not encoded again
# Where a line ends inside a word, pdfium writes U+0002 (or U+FFFE) in place of the hyphen; U+00AD is the soft
# hyphen. Other control characters come from fonts that don't say which letters they draw.
_BROKEN_WORD = re.compile("(?<=\\w)[\u0002\ufffe\u00ad](?:\r?\n)?(?=\\w)")
_NO_TEXT = re.compile("[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u00ad\ufffd\ufffe]+")
_LINE_END = re.compile("\r\n?")


class UnreadablePageError(Exception):
    """A page that can't be shown. The message says why."""


@dataclass(frozen=True)
class PageImage:
    """A page picture in the cache; width and height in pixels."""

    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class PageCache:
    """Where page pictures are kept and how large they may be."""

    folder: Path
    dpi: int
    max_side: int

    def image(self, doc_name: str, page: int, source: str, suffix: str, make: Callable[[], bytes]) -> PageImage:
        """The picture of a page, made by `make` if it is not there yet.

        `source` is what the picture is made from, besides this cache's own settings. Raises whatever `make`
        raises, and `InputError` where the folder can't be written.
        """
        versions = f"pypdfium2 {pypdfium2.version.PYPDFIUM_INFO} pillow {PIL.__version__} quality {JPEG_QUALITY}"
        key = _short_hash(f"{source} dpi {self.dpi} max_side {self.max_side} {versions}")
        path = self.folder / folder_name(doc_name) / f"{page:04d}-{key}{suffix}"
        size = _image_size(path)
        if size is None:
            data = make()
            try:
                with atomic_write(path, "wb", sync=False) as stream:
                    stream.write(data)
            except OSError as error:
                raise InputError(
                    f"{path.parent}: page images can't be written ({error.strerror}); choose another folder with "
                    "corpus.page_cache=…"
                ) from None
            size = Image.open(io.BytesIO(data)).size
        return PageImage(path.absolute(), *size)

    def from_bytes(self, doc_name: str, page: int, data: bytes) -> PageImage:
        """The picture in JPEG, PNG or other image bytes: the same bytes, or smaller where they exceed `max_side`.

        Raises `UnreadablePageError` for bytes that are not a whole image.
        """
        try:
            with Image.open(io.BytesIO(data)) as image:  # reads the header only
                fits = max(image.size) <= self.max_side and image.mode in ("RGB", "L")
                suffix = KEPT_SUFFIX.get(image.format or "") if fits else None
        except IMAGE_ERRORS as error:
            raise UnreadablePageError(f"its image bytes are no image ({one_line(error)})") from None
        source = f"image {hashlib.sha256(data).hexdigest()}"

        def make() -> bytes:
            try:
                with Image.open(io.BytesIO(data)) as image:
                    image.load()  # a picture that is cut off must not pass for a whole one
                    return data if suffix else _jpeg(_shrunk(image, self.max_side))
            except IMAGE_ERRORS as error:
                raise UnreadablePageError(f"its image can't be decoded ({one_line(error)})") from None

        return self.image(doc_name, page, source, suffix or ".jpg", make)

    def from_pdf(self, doc_name: str, number: int, page: pypdfium2.PdfPage, pdf_hash: str) -> PageImage:
        """The picture of an open PDF page, rendered at `dpi` or as large as `max_side` allows."""

        def make() -> bytes:
            return _jpeg(render_page(page, self.dpi, self.max_side))

        return self.image(doc_name, number, f"pdf {pdf_hash} page {number}", ".jpg", make)


def page_text(page: pypdfium2.PdfPage) -> str:
    """The text layer of an open PDF page, words broken at a line's end joined again; blank for a scan."""
    textpage = page.get_textpage()
    try:
        text = textpage.get_text_bounded()
    finally:
        textpage.close()
    return _LINE_END.sub("\n", _NO_TEXT.sub(" ", _BROKEN_WORD.sub("", text)))


def folder_name(doc_name: str) -> str:
    """A folder for any document name: readable, and different for different names."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', doc_name).lstrip('.')[:60]}-{_short_hash(doc_name)}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _image_size(path: Path) -> tuple[int, int] | None:
    """Pixels of a cached picture; None where it is absent or is not a picture any more."""
    try:
        with Image.open(path) as image:
            return image.size
    except IMAGE_ERRORS:
        return None


def _shrunk(image: Image.Image, max_side: int) -> Image.Image:
    """The image in RGB, on white where it is transparent, at most `max_side` pixels wide and high."""
    image = on_white(image)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return image


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()
