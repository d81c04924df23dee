"""The page cache: page images, rendered from PDFs or taken from image bytes, stored in a folder.

The name of a cached file depends on everything that determines its bytes: the hash of the source, the size limits,
and the versions of the renderer and encoder. A second run finds the file; a run with a changed document or setting
does not. Files are written atomically.

Images are JPEG at quality 90: it encodes ten times as fast as PNG, files are two thirds as large, and pages stay
readable. As with PNG, the same pixels give the same bytes. Image bytes within the size limits are not re-encoded.

Without `max_side`, pages keep their size, and `model.max_pixels` decides what a model sees. Then the cache is as
large as the images of the corpus: 49 GB for MMDocIR's training set.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import PIL
import pypdfium2
from PIL import Image
from pydantic import Field

from mmr5_train.common.files import InputError, atomic_write
from mmr5_train.common.pictures import as_seen, orientation, seen_size
from mmr5_train.models.pages import (
    IMAGE_ERRORS,
    MAX_ASPECT_RATIO,
    MAX_DECODED_PIXELS,
    one_line,
    render_pdf_page,
    shrink_factor,
)

JPEG_QUALITY = 90
UNCHANGED_SUFFIX = {"JPEG": ".jpg", "PNG": ".png"}  # formats that are not re-encoded
# pdfium replaces the hyphen of a word that is broken at a line end by U+0002 or U+FFFE; U+00AD is the soft hyphen.
# Other control characters come from fonts without a mapping to letters.
_BROKEN_WORD = re.compile("(?<=\\w)[\u0002\ufffe\u00ad](?:\r?\n)?(?=\\w)")
_CONTROL_CHARACTERS = re.compile("[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u00ad\ufffd\ufffe]+")
_LINE_END = re.compile("\r\n?")


MaxSide = Annotated[
    int | None,
    Field(
        ge=16,
        le=16384,
        description="longest side of a page image in pixels; null: pages keep their size, and only the model's "
        "max_pixels limits what it sees",
    ),
]
"""The field `max_side` of the corpora."""


class UnreadablePageError(Exception):
    """A page whose image can't be read. The message gives the reason."""


@dataclass(frozen=True)
class PageImage:
    """A page image in the cache: its size in pixels, and the size that the page had before a limit shrank it."""

    path: Path
    width: int
    height: int
    source_width: int
    source_height: int


@dataclass(frozen=True)
class PageCache:
    """The folder of cached page images, and the limits of their size.

    `max_side` is in pixels; None: pages keep their size, up to `MAX_PAGE_PIXELS`.
    """

    folder: Path
    dpi: int
    max_side: int | None

    def image(
        self,
        doc_name: str,
        page: int,
        source: str,
        source_size: tuple[int, int],
        suffix: str,
        make: Callable[[], bytes],
    ) -> PageImage:
        """The cached image of a page. If it is not cached, `make` returns its bytes.

        `source` identifies what the image is made from, and `source_size` is its width and height. Raises the
        errors of `make`, `UnreadablePageError` for a strip that no model accepts, and `InputError` if the folder
        can't be written.
        """
        check_shape(*source_size)
        libraries = f"pypdfium2 {pypdfium2.version.PYPDFIUM_INFO} pillow {PIL.__version__}"
        versions = f"{libraries} quality {JPEG_QUALITY} shown 2"  # shown: of `as_seen`
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
        check_shape(*size)  # shrinking rounds the shorter side
        return PageImage(path.absolute(), *size, *source_size)

    def from_bytes(self, doc_name: str, page: int, data: bytes) -> PageImage:
        """Caches an image given as bytes: unchanged if it is a JPEG or PNG within the limits, else as a new JPEG.

        Raises `UnreadablePageError` if the bytes are not a complete image.
        """
        try:
            with Image.open(io.BytesIO(data)) as image:  # reads the header only
                size = seen_size(image)
                is_plain = image.mode in ("RGB", "L") and orientation(image) == 1
                fits = is_plain and shrink_factor(*size, self.max_side) == 1
                suffix = UNCHANGED_SUFFIX.get(image.format or "") if fits else None
        except IMAGE_ERRORS as error:
            raise UnreadablePageError(f"its bytes are not an image ({one_line(error)})") from None
        if size[0] * size[1] > MAX_DECODED_PIXELS:
            raise UnreadablePageError(f"it has {size[0]} × {size[1]} pixels, more than {MAX_DECODED_PIXELS:,}")
        source = f"image {hashlib.sha256(data).hexdigest()}"

        def make() -> bytes:
            try:
                with Image.open(io.BytesIO(data)) as image:
                    image.load()  # decode all of it, to detect truncated images
                    return data if suffix else _jpeg(_shrink(image, self.max_side))
            except IMAGE_ERRORS as error:
                raise UnreadablePageError(f"its image can't be decoded ({one_line(error)})") from None

        return self.image(doc_name, page, source, size, suffix or ".jpg", make)

    def from_pdf(self, doc_name: str, number: int, page: pypdfium2.PdfPage, pdf_hash: str) -> PageImage:
        """The image of an open PDF page, rendered at `dpi`, or at a lower resolution if the limits require it."""

        def make() -> bytes:
            return _jpeg(render_pdf_page(page, self.dpi, self.max_side))

        width, height = (math.ceil(points * self.dpi / 72 * (1 - 1e-9)) for points in page.get_size())
        return self.image(doc_name, number, f"pdf {pdf_hash} page {number}", (width, height), ".jpg", make)


def check_shape(width: int, height: int) -> None:
    """Raises `UnreadablePageError` for an aspect ratio above `MAX_ASPECT_RATIO`."""
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UnreadablePageError(
            f"it is a strip of {width} × {height} pixels, an aspect ratio above {MAX_ASPECT_RATIO}:1"
        )


def page_text(page: pypdfium2.PdfPage) -> str:
    """The text layer of an open PDF page; blank for a scan. Words broken at a line end are joined."""
    textpage = page.get_textpage()
    try:
        text = textpage.get_text_bounded()
    finally:
        textpage.close()
    return _LINE_END.sub("\n", _CONTROL_CHARACTERS.sub(" ", _BROKEN_WORD.sub("", text)))


def folder_name(doc_name: str) -> str:
    """A folder name for a document: readable, and different for different document names."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', doc_name).lstrip('.')[:60]}-{_short_hash(doc_name)}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _image_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a cached image; None if the file does not exist or is not an image."""
    try:
        with Image.open(path) as image:
            return image.size
    except IMAGE_ERRORS:
        return None


def _shrink(image: Image.Image, max_side: int | None) -> Image.Image:
    """The image in RGB, on a white background, within the limits."""
    image = as_seen(image)
    factor = shrink_factor(*image.size, max_side)
    if factor < 1:
        longest = int(max(image.size) * factor + 1e-6)  # `max_side`, or less for a page of too many pixels
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return image


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()
