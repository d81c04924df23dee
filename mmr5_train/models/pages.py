"""Page images: opens them, converts them to RGB and resizes them for the model. Does not import torch.

Every page takes the same path:

    open_image or render_pdf_pages  →  as_seen  →  resize to page_size

`prepare_page` does the last two steps. `load_page` opens and prepares one page image of a data set. `open_pages`
opens and prepares the pages that a user passes to the reranker: files, bytes, PIL images and PDFs.

The path of a PDF or of a TIFF with several pages stands for all of its pages. "report.pdf#page=3" is its third
page (the fragment of RFC 8118, which counts from 1).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from threading import RLock
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pypdfium2
from PIL import Image

from mmr5_train.common.files import InputError
from mmr5_train.common.part_times import PartTimes
from mmr5_train.common.pictures import as_seen, seen_size

MAX_DECODED_PIXELS = 120_000_000
"""Images whose header declares more pixels are rejected before they are decoded."""

MAX_ASPECT_RATIO = 200
"""Longer side ÷ shorter side. Qwen's image processors reject images above it."""

PDF_DPI = 150
"""Resolution of rendered PDF pages, as in configs/corpus/pdf_folder.yaml."""

MAX_PAGE_PIXELS = 16_777_216
"""Larger pages are rendered, or stored in the page cache, at this size. No model of configs/model sees more."""

SMALL_PAGE_PIXELS = 64_000
"""Prepared pages of at most this many pixels are cached in memory; larger ones are read from disk each time."""

MAX_CACHED_PAGES = 8192

# What Pillow raises for bytes that are not an image, that are truncated, or that would exhaust memory.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

MANY_PAGES = (".pdf", ".tif", ".tiff")
"""Endings of files that may have several pages."""

_PDFIUM = RLock()  # pdfium is not thread-safe
_PAGE_FRAGMENT = re.compile(r"page=([1-9]\d{0,5})")

PageInput = str | Path | bytes | IO[bytes] | Image.Image
"""A page that a user passes: a path or file:// URL of an image or PDF, its bytes, an open file, or a PIL image."""


class OpenedPage(NamedTuple):
    """One page, ready for the model."""

    document: Any
    """`Result.page`: the user's input, or "<path>#page=<number>" for a page of a whole PDF."""
    image: Image.Image
    """The prepared image."""
    input: int = 0
    """Index of the user's input, from 0, that the page comes from."""


class PageLimits(NamedTuple):
    """The image sizes that a model accepts."""

    factor: int
    """Side of a visual token in pixels: patch size × merge size. Both sides of an image are multiples of it."""
    min_pixels: int
    max_pixels: int

    @property
    def are_small(self) -> bool:
        """Whether prepared pages are small enough to be cached."""
        return self.max_pixels <= SMALL_PAGE_PIXELS


def page_limits(processor: Any) -> PageLimits:
    """The limits that a transformers processor applies."""
    image_processor = processor.image_processor
    size = image_processor.size
    factor = image_processor.patch_size * image_processor.merge_size
    return PageLimits(factor, size["shortest_edge"], size["longest_edge"])


def page_size(width: int, height: int, limits: PageLimits) -> tuple[int, int]:
    """The (width, height) that a page image is resized to.

    Both sides are multiples of `limits.factor`, the area is within the limits, and the aspect ratio changes as
    little as possible. This is the rule of Qwen2-VL's image processor (arXiv 2409.12191, section 2.1), so the
    processor does not resize a prepared page a second time. For very long pages, the processor's own rule can
    exceed `max_pixels`, and give a size that the processor itself rejects, because the shorter side becomes a
    whole number of visual tokens. Here the longer side is then reduced.

    Raises `InputError` for an aspect ratio above `MAX_ASPECT_RATIO`.
    """
    factor, min_pixels, max_pixels = limits
    _check_aspect_ratio(width, height, "the page image")
    sides = [max(factor, round(side / factor) * factor) for side in (width, height)]
    too_large = sides[0] * sides[1] > max_pixels
    if too_large:
        scale = math.sqrt(width * height / max_pixels)
        sides = [max(factor, math.floor(side / scale / factor) * factor) for side in (width, height)]
    elif sides[0] * sides[1] < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        sides = [math.ceil(side * scale / factor) * factor for side in (width, height)]
    # Where rounding changed the shorter side much, the processor would reject the page, or it would be too large.
    longest = MAX_ASPECT_RATIO * min(sides)
    if too_large:
        longest = min(longest, max(factor, max_pixels // min(sides) // factor * factor))
    return min(sides[0], longest), min(sides[1], longest)


def _check_aspect_ratio(width: int, height: int, name: object) -> None:
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(
            f"{name} has {width} × {height} pixels, an aspect ratio above {MAX_ASPECT_RATIO}:1; crop or split "
            "the page"
        )


def visual_tokens(width: int, height: int, limits: PageLimits) -> int:
    """Visual tokens of a page image of width × height pixels. Raises `InputError` as `page_size` does."""
    # The second call is what the processor does with a prepared page. It changes nothing, unless the limits are so
    # close that no image size of this shape is between them.
    shown = page_size(*page_size(width, height, limits), limits)
    return shown[0] * shown[1] // limits.factor**2


def prepare_page(image: Image.Image, limits: PageLimits) -> Image.Image:
    """The page image as the model sees it: as a person sees it (`as_seen`), resized to `page_size`.

    Raises `InputError` for a page that can't be shown.
    """
    size = page_size(*seen_size(image), limits)
    try:
        image = as_seen(image)
    except ValueError as error:
        raise InputError(f"the page image can't be shown: {error}") from None
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def load_page(path: str | Path, limits: PageLimits) -> Image.Image:
    """Opens and prepares a page image file. Small pages are cached.

    Raises `InputError`, which names the file, for a file that can't be read.
    """
    if limits.are_small:
        return _load_small_page(str(path), limits)
    return prepare_page(open_image(Path(path)), limits)


@lru_cache(maxsize=MAX_CACHED_PAGES)
def _load_small_page(path: str, limits: PageLimits) -> Image.Image:
    return prepare_page(open_image(Path(path)), limits)


def open_pages(
    page_lists: Sequence[Sequence[PageInput]], limits: PageLimits, times: PartTimes | None = None
) -> list[list[OpenedPage]]:
    """Opens and prepares several lists of pages; the path of a PDF becomes all of its pages.

    A page that appears in several lists is opened once. Files are opened in parallel, and only prepared images are
    kept. Nothing is downloaded. The seconds are added to `times`. Raises `InputError`, which names the page, for a
    page that can't be read and for a URL of another machine.
    """
    times = times or PartTimes()
    distinct: dict[Any, tuple[PageInput, int]] = {}
    for pages in page_lists:
        for index, page in enumerate(pages):
            distinct.setdefault(_page_key(page), (page, index))

    def open_and_prepare(page_and_index: tuple[PageInput, int]) -> list[OpenedPage]:
        opened, prepared = _open(*page_and_index), list[OpenedPage]()
        while True:
            with times.part("open"):
                page = next(opened, None)
            if page is None:
                return prepared
            with times.part("resize"):
                prepared.append(OpenedPage(page[0], prepare_page(page[1], limits)))

    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes and resizes
        opened = dict(zip(distinct, pool.map(open_and_prepare, distinct.values()), strict=True))
    return [
        [found._replace(input=index) for index, page in enumerate(pages) for found in opened[_page_key(page)]]
        for pages in page_lists
    ]


def page_list(pages: Iterable[PageInput] | PageInput) -> list[PageInput]:
    """The pages as a list: a single page becomes a list of one. Raises `InputError` for something else."""
    if isinstance(pages, str | Path | bytes | bytearray | Image.Image) or hasattr(pages, "read"):
        return [pages]  # type: ignore[list-item]
    if not isinstance(pages, Iterable):
        raise InputError(f"pages: expected a list of pages, found {type(pages).__name__}")
    return list(pages)


def _page_key(page: PageInput) -> Any:
    return page if isinstance(page, str | Path) else id(page)


def _open(page: PageInput, index: int) -> Iterator[tuple[Any, Image.Image]]:
    """(document, image) of one input, or of each page of a whole PDF; `index` is for error messages."""
    if isinstance(page, Image.Image):
        yield page, page
    elif isinstance(page, bytes | bytearray) or hasattr(page, "read"):
        data = page.read() if hasattr(page, "read") else bytes(page)
        if not isinstance(data, bytes):
            raise InputError(f"page {index + 1}: expected a file opened in binary mode, found text")
        name = f"page {index + 1} ({len(data):,} bytes)"
        is_pdf = b"%PDF" in data[:1024]
        for image in render_pdf_pages(data, name) if is_pdf else open_frames(io.BytesIO(data), name):
            yield page, image
    elif isinstance(page, str | Path):
        path, fragment = _split_location(str(page))
        open_all = render_pdf_pages if path.suffix.lower() == ".pdf" else open_frames
        if fragment:
            yield page, next(open_all(path, only=_page_number(page, fragment)))
            return
        images = open_all(path)
        first, second = next(images), next(images, None)
        if second is None and path.suffix.lower() != ".pdf":
            yield page, first
            return
        for number, image in enumerate(chain([first], [second] if second else [], images), 1):
            yield f"{page}#page={number}", image
    else:
        raise InputError(
            f"page {index + 1}: expected a path, bytes, an open file or a PIL image, found {type(page).__name__}"
        )


def _split_location(location: str) -> tuple[Path, str]:
    """The file path of a path or file:// URL, and the fragment after "#" if it is a PDF."""
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", location):
        url = urlsplit(location)
        if url.scheme.lower() != "file" or url.netloc not in ("", "localhost"):
            raise InputError(f"{location[:200]}: only local files are supported; download it first")
        return Path(unquote(url.path)), url.fragment
    path, mark, fragment = location.rpartition("#")
    return (Path(path), fragment) if mark and path.lower().endswith(MANY_PAGES) else (Path(location), "")


def _page_number(location: str | Path, fragment: str) -> int:
    match = _PAGE_FRAGMENT.fullmatch(fragment)
    if match is None:
        raise InputError(f"{location}: expected #page=N with N from 1, found #{fragment[:50]}")
    return int(match[1])


def open_image(source: Path | io.BytesIO, name: object = None) -> Image.Image:
    """A fully decoded image, as a person sees it; error messages call it `name`, by default its path.

    Raises `InputError` for an image that can't be decoded, has more than `MAX_DECODED_PIXELS`, or grey values that
    can't be shown.
    """
    with _open_header(source, name or source) as image:
        frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        if frames > 1:
            raise InputError(f"{name or source}: is a TIFF of {frames} pages; save each as a file")
        image.load()
        return as_seen(image)


def open_frames(
    source: Path | io.BytesIO, name: object = None, *, only: int | None = None
) -> Iterator[Image.Image]:
    """The pages of a TIFF one after another, or only the page with the number `only`, from 1; else the one image.

    Raises `InputError` as `open_image` does, and for a page that does not exist.
    """
    name = name or source
    with _open_header(source, name) as image:
        count = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        if only is not None and only > count:
            raise InputError(f"{name}: has {count} pages; expected a page number up to {count}, found {only}")
        for index in range(count) if only is None else [only - 1]:
            image.seek(index)
            if image.width * image.height > MAX_DECODED_PIXELS:
                raise InputError(f"{name}: page {index + 1} has more than {MAX_DECODED_PIXELS:,} pixels")
            image.load()
            yield as_seen(image)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of a page image file in pixels, from its header.

    Raises `InputError`, which names the file, if `open_image` or `page_size` would raise it.
    """
    with _open_header(path, path) as image:
        size = seen_size(image)
        _check_aspect_ratio(*size, path)
        return size


@contextmanager
def _open_header(source: Path | io.BytesIO, name: object) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet. Errors inside the block also become `InputError`."""
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_DECODED_PIXELS:
                raise InputError(
                    f"{name}: expected at most {MAX_DECODED_PIXELS:,} pixels, found {image.width} × "
                    f"{image.height}; render the page at a lower resolution"
                )
            yield image
    except FileNotFoundError:
        raise InputError(f"{name}: no such page image; build the data again, or correct the path") from None
    except IMAGE_ERRORS as error:
        raise InputError(f"{name}: not a readable page image ({one_line(error)})") from None


def render_pdf_pages(
    source: Path | bytes, name: object = None, *, only: int | None = None
) -> Iterator[Image.Image]:
    """Renders the pages of a PDF one after another, or only the page with the number `only`, counted from 1.

    Error messages call it `name`, by default its path. Raises `InputError` for a file that is not a PDF, and for a
    page that does not exist or can't be rendered.
    """
    path = name or source
    with _PDFIUM:
        try:
            pdf = pypdfium2.PdfDocument(source)
        except FileNotFoundError:
            raise InputError(f"{path}: no such PDF; correct the path") from None
        except (OSError, pypdfium2.PdfiumError):
            try:
                problem = pdf_problem(source if isinstance(source, bytes) else source.read_bytes())
            except OSError as error:  # a folder, or a file that may not be read
                problem = one_line(error)
            raise InputError(f"{path}: not a PDF that can be opened: {problem}") from None
        count = len(pdf)
        pdf.init_forms()  # so that filled-in form fields are rendered
    try:
        if only is not None and only > count:
            raise InputError(f"{path}: has {count} pages; expected a page number up to {count}, found {only}")
        for index in range(count) if only is None else [only - 1]:
            with _PDFIUM:
                try:
                    page = pdf[index]
                    image = render_pdf_page(page, PDF_DPI)
                    page.close()
                except pypdfium2.PdfiumError as error:
                    raise InputError(f"{path}: page {index + 1} can't be rendered ({one_line(error)})") from None
            yield image  # outside the lock: the consumer may fail and never resume this generator
    finally:
        with _PDFIUM:
            pdf.close()


def pdf_problem(data: bytes) -> str:
    """Why pdfium can't open a PDF. Its own error code can be that of an earlier file."""
    if b"%PDF" not in data[:1024]:
        return "it does not begin as a PDF"
    if b"/Encrypt" in data:
        return "it requires a password; save it without one"
    return "it is damaged, or has no pages"


def render_pdf_page(page: pypdfium2.PdfPage, dpi: int, max_side: int | None = None) -> Image.Image:
    """An open PDF page, rendered at `dpi`.

    The resolution is lower if a side would exceed `max_side` pixels or the page `MAX_PAGE_PIXELS`.
    """
    points = page.get_size()
    scale = dpi / 72
    scale *= shrink_factor(points[0] * scale, points[1] * scale, max_side)
    # pdfium rounds sizes up; without this factor 1024.0000001 pixels would become 1025.
    return page.render(scale=scale * (1 - 1e-9)).to_pil()


def shrink_factor(width: float, height: float, max_side: int | None) -> float:
    """What a page's sides are multiplied by to have at most `max_side` and in all `MAX_PAGE_PIXELS` pixels."""
    longest = math.inf if max_side is None else max_side
    return min(1.0, longest / max(width, height), math.sqrt(MAX_PAGE_PIXELS / (width * height)))


def one_line(error: BaseException) -> str:
    """The error's message in one line, without Pillow's memory addresses, which differ between runs."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(error) or type(error).__name__).replace("\n", " ")
