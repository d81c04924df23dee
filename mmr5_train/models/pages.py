"""Page pictures from whatever a user has: files, bytes, open pictures, PDFs. No torch.

A PDF stands for all its pages; "report.pdf#page=3" is its third (the fragment of RFC 8118, which counts from 1).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any
from urllib.parse import unquote, urlsplit

import pypdfium2
from PIL import Image

from mmr5_train.common.files import InputError

LARGEST_PAGE = 120_000_000  # pixels; a picture that claims more is refused before it is decoded
LONGEST = 200  # times as long as wide; the models take no longer page
DPI, MAX_SIDE = 150, 1024  # how PDF pages are rendered, as in configs/corpus/pdf_folder.yaml
# What Pillow raises for bytes that are not an image, are cut off, or would fill the memory.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# A page of at most this many pixels is kept in memory once it is prepared; larger ones are read again.
SMALL_PAGE = 64_000
KEPT_PAGES = 8192
_PDFIUM = RLock()  # it works in one thread at a time
_PAGE = re.compile(r"page=([1-9]\d{0,5})")

PageInput = str | Path | bytes | Image.Image


def open_pages(
    rows: Sequence[Sequence[PageInput]], prepare: Callable[[Image.Image], Image.Image]
) -> list[list[tuple[Any, Image.Image]]]:
    """Each row's pages as (what it is called, its picture as `prepare` makes it); a PDF becomes all of its pages.

    Takes paths and file:// URLs of pictures and PDFs, the bytes of a picture, and open pictures. What stands in
    several rows is opened once, and several are opened at a time; of each, only what `prepare` made is kept.
    Raises `InputError` for what can't be read, naming it, and for URLs of other machines: nothing is fetched.
    """
    distinct: dict[Any, tuple[PageInput, int]] = {}
    for row in rows:
        for place, one in enumerate(row):
            distinct.setdefault(_key(one), (one, place))

    def open_one(job: tuple[PageInput, int]) -> list[tuple[Any, Image.Image]]:
        return [(name, prepare(picture)) for name, picture in _open_one(*job)]

    with ThreadPoolExecutor() as pool:  # Pillow lets others work while it decodes and resizes
        opened = dict(zip(distinct, pool.map(open_one, distinct.values()), strict=True))
    return [[page for one in row for page in opened[_key(one)]] for row in rows]


def _key(given: PageInput) -> Any:
    return given if isinstance(given, str | Path) else id(given)


def _open_one(given: PageInput, place: int) -> Iterator[tuple[Any, Image.Image]]:
    if isinstance(given, Image.Image):
        yield given, given
    elif isinstance(given, bytes):
        yield given, open_image(io.BytesIO(given), f"page {place + 1} of those given ({len(given):,} bytes)")
    elif isinstance(given, str | Path):
        path, fragment = _local(str(given))
        if path.suffix.lower() != ".pdf":
            yield given, open_image(path)
        elif fragment:
            yield given, next(render_pdf(path, only=_page_number(given, fragment)))
        else:
            for number, picture in enumerate(render_pdf(path), 1):
                yield f"{given}#page={number}", picture
    else:
        raise InputError(
            f"page {place + 1} of those given: expected a path, bytes or a PIL image, found {type(given).__name__}"
        )


def _local(given: str) -> tuple[Path, str]:
    """A path or file:// URL as the path, and the fragment of a PDF."""
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", given):
        url = urlsplit(given)
        if url.scheme.lower() != "file" or url.netloc not in ("", "localhost"):
            raise InputError(f"{given[:200]}: only files of this machine are read; download it first")
        return Path(unquote(url.path)), url.fragment
    path, mark, fragment = given.rpartition("#")
    return (Path(path), fragment) if mark and path.lower().endswith(".pdf") else (Path(given), "")


def _page_number(given: str | Path, fragment: str) -> int:
    match = _PAGE.fullmatch(fragment)
    if match is None:
        raise InputError(f"{given}: expected #page=N with N from 1, found #{fragment[:50]}")
    return int(match[1])


def open_image(source: Path | io.BytesIO, name: object = None) -> Image.Image:
    """A picture, wholly decoded. Raises `InputError` naming one that can't be, or that is too large."""
    name = name or source
    try:
        with Image.open(source) as image:
            if image.width * image.height > LARGEST_PAGE:
                raise InputError(
                    f"{name}: claims {image.width} × {image.height} pixels, more than {LARGEST_PAGE:,}; "
                    "render the page smaller"
                )
            image.load()
            return image.copy()
    except FileNotFoundError:
        raise InputError(f"{name}: no such page image; build the data again, or mend the path") from None
    except IMAGE_ERRORS as error:
        raise InputError(f"{name}: not a readable page image ({one_line(error)})") from None


def render_pdf(path: Path, only: int | None = None) -> Iterator[Image.Image]:
    """The pages of a PDF as pictures, one after another, or the one with the number `only`, from 1."""
    with _PDFIUM:
        try:
            pdf = pypdfium2.PdfDocument(path)
        except FileNotFoundError:
            raise InputError(f"{path}: no such PDF; mend the path") from None
        except (OSError, pypdfium2.PdfiumError) as error:
            raise InputError(f"{path}: not a PDF that can be opened ({one_line(error)})") from None
        pages = len(pdf)
        pdf.init_forms()  # so that what was filled in is drawn
    try:
        if only is not None and only > pages:
            raise InputError(f"{path}: has {pages} pages, page {only} was asked for")
        for number in range(pages) if only is None else [only - 1]:
            with _PDFIUM:
                try:
                    page = pdf[number]
                    picture = render_page(page, DPI, MAX_SIDE)
                    page.close()
                except pypdfium2.PdfiumError as error:
                    raise InputError(f"{path}: page {number + 1} can't be rendered ({one_line(error)})") from None
            yield picture  # not while it is held: who uses the picture may fail, and never come back
    finally:
        with _PDFIUM:
            pdf.close()


def render_page(page: pypdfium2.PdfPage, dpi: int, max_side: int) -> Image.Image:
    """An open PDF page at `dpi`, or as large as `max_side` pixels allow."""
    scale = min(dpi / 72, max_side / max(page.get_size()))
    # pdfium rounds sizes up: without this 1024.0000001 would become 1025
    return page.render(scale=scale * (1 - 1e-9)).to_pil()


def on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB, on white where it is transparent: paper is."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer)
    return image.convert("RGB")


def page_size(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) a page is shown in: multiples of `factor`, the area within the limits, the aspect kept.

    The rule of Qwen2-VL's image processor (arXiv 2409.12191, section 2.1), which leaves such a picture as it
    is: a page is resized once, here.
    """
    if max(width, height) > LONGEST * min(width, height):
        raise InputError(f"a page of {width} × {height} pixels is too long for its width ({LONGEST} : 1 at most)")
    sized = [max(factor, round(side / factor) * factor) for side in (width, height)]
    if sized[0] * sized[1] > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        sized = [max(factor, math.floor(side / scale / factor) * factor) for side in (width, height)]
    elif sized[0] * sized[1] < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        sized = [math.ceil(side * scale / factor) * factor for side in (width, height)]
    return sized[0], sized[1]


def prepare_page(image: Image.Image, processor: Any) -> Image.Image:
    """The picture as the model sees it: RGB, at its final size."""
    processing = processor.image_processor
    limits = processing.size["shortest_edge"], processing.size["longest_edge"]
    return fit_page(image, processing.patch_size * processing.merge_size, *limits)


def fit_page(image: Image.Image, factor: int, min_pixels: int, max_pixels: int) -> Image.Image:
    """The picture in RGB, in the size that `page_size` says."""
    size = page_size(image.width, image.height, factor, min_pixels, max_pixels)
    image = on_white(image)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def load_page(path: str | Path, processor: Any) -> Image.Image:
    """A page image file, prepared for the processor. Raises `InputError` naming a file that can't be read."""
    processing = processor.image_processor
    limits = processing.size["shortest_edge"], processing.size["longest_edge"]
    if is_small(processor):
        return _small_page(str(path), processing.patch_size * processing.merge_size, *limits, processor)
    return prepare_page(open_image(Path(path)), processor)


def is_small(processor: Any) -> bool:
    """Whether pages are so small that they are kept in memory once they are prepared."""
    return bool(processor.image_processor.size["longest_edge"] <= SMALL_PAGE)


@lru_cache(maxsize=KEPT_PAGES)
def _small_page(path: str, factor: int, min_pixels: int, max_pixels: int, processor: Any) -> Image.Image:
    return prepare_page(open_image(Path(path)), processor)


def one_line(error: BaseException) -> str:
    """A reason that is the same in every run: Pillow names the memory address of what it could not read."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(error) or type(error).__name__).replace("\n", " ")
