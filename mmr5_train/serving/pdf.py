"""The pages of a PDF as pictures: rendered in a process of its own, which a bad PDF may crash or keep busy.

    python -m mmr5_train.serving.pdf PAGES < document.pdf     # what the server runs; prints JSON

pdfium is not safe to use from two threads, can't be interrupted, and reads what strangers send. A process can be
ended, and its memory is its own.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
import os
import resource
import sys
from typing import Any

import pypdfium2

from mmr5_train.models.pages import DPI, LONGEST, MAX_SIDE, render_page
from mmr5_train.serving.settings import API_KEY

JPEG_QUALITY = 90
MEMORY = 3_000_000_000  # bytes that the process may map, libraries included

log = logging.getLogger(__name__)


class PdfError(Exception):
    """A PDF that can't be shown. `code` is for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


async def render_pdf(data: bytes, pages: int) -> dict[str, Any]:
    """The first `pages` pages: {"n_pages": in the PDF, "pages": [{"number", "width", "height", "image"}]}.

    `number` is from 1, `image` a data URL. Raises `PdfError`. Cancelled, it ends the process.
    """
    if b"%PDF-" not in data[:1024]:  # where pdfium looks for it
        raise PdfError("pdf_unreadable", "is no PDF: its first bytes are not those of one")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mmr5_train.serving.pdf",
        str(pages),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != API_KEY},
    )
    try:
        written, problems = await process.communicate(data)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        log.warning("rendering a PDF ended with %s: %s", process.returncode, problems.decode(errors="replace"))
        raise PdfError("pdf_unreadable", "the PDF can't be rendered; print it to a new PDF, or send pictures")
    rendered: dict[str, Any] = json.loads(written)
    if "error" in rendered:
        raise PdfError(rendered["code"], rendered["error"])
    return rendered


def render(data: bytes, pages: int) -> dict[str, Any]:
    """What `render_pdf` gives, in this process."""
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise PdfError("pdf_encrypted", "the PDF asks for a password; save it without one") from None
        raise PdfError("pdf_unreadable", f"not a PDF that can be opened ({error})") from None
    with pdf:
        pdf.init_forms()  # so that what was filled in is drawn
        return {"n_pages": len(pdf), "pages": [_page(pdf, i) for i in range(min(pages, len(pdf)))]}


def _page(pdf: pypdfium2.PdfDocument, index: int) -> dict[str, Any]:
    try:
        page = pdf[index]
        width, height = page.get_size()
        if not (
            0 < width < math.inf and 0 < height < math.inf and max(width, height) <= LONGEST * min(width, height)
        ):
            raise PdfError("pdf_unreadable", f"page {index + 1} is {width:g} × {height:g} points: no page to read")
        image = render_page(page, DPI, MAX_SIDE)
        page.close()
    except pypdfium2.PdfiumError as error:
        raise PdfError("pdf_unreadable", f"page {index + 1} can't be rendered ({error})") from None
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=JPEG_QUALITY)
    url = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return {"number": index + 1, "width": image.width, "height": image.height, "image": url}


def main() -> None:
    if sys.platform == "linux":  # elsewhere the limit is refused, or not held to
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        rendered = render(sys.stdin.buffer.read(), int(sys.argv[1]))
    except PdfError as error:
        rendered = {"error": str(error), "code": error.code}
    json.dump(rendered, sys.stdout)


if __name__ == "__main__":
    main()
