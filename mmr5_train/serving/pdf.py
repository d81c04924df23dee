"""Renders the pages of a PDF as images, in a separate process for each PDF.

    python -m mmr5_train.serving.pdf PAGES < document.pdf     # the command that the server runs; prints JSON

pdfium is not thread-safe and can't be interrupted, and the server gives it untrusted input. A separate process can
be killed, and its crash or memory use does not affect the server. It gets none of the server's keys and tokens.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
import resource
import sys
from typing import Any

import pypdfium2

from mmr5_train.common.environment import without_secrets
from mmr5_train.models.pages import MAX_ASPECT_RATIO, PDF_DPI, pdf_problem, render_pdf_page

JPEG_QUALITY = 90
MEMORY = 3_000_000_000  # limit on the process's address space in bytes, including libraries

log = logging.getLogger(__name__)


class PdfError(Exception):
    """The PDF can't be rendered. `code` is the machine-readable reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


async def render_pdf(data: bytes, pages: int) -> dict[str, Any]:
    """Renders the first `pages` pages: {"n_pages", "pages": [{"number", "width", "height", "image"}]}.

    `n_pages` counts all pages of the PDF, `number` starts at 1, `width` and `height` are in pixels, and `image` is
    a data URL. Raises `PdfError`. Cancelling it kills the process.
    """
    if b"%PDF-" not in data[:1024]:  # pdfium searches the same range
        raise PdfError("pdf_unreadable", "is not a PDF: its first 1024 bytes contain no %PDF- header")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mmr5_train.serving.pdf",
        str(pages),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=without_secrets(),
    )
    try:
        stdout, stderr = await process.communicate(data)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        log.warning("the PDF renderer exited with %s: %s", process.returncode, stderr.decode(errors="replace"))
        raise PdfError("pdf_unreadable", "the PDF can't be rendered; print it to a new PDF, or send page images")
    rendered: dict[str, Any] = json.loads(stdout)
    if "error" in rendered:
        raise PdfError(rendered["code"], rendered["error"])
    return rendered


def render(data: bytes, pages: int) -> dict[str, Any]:
    """Does the work of `render_pdf` in this process."""
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError:
        problem = pdf_problem(data)
        code = "pdf_encrypted" if "password" in problem else "pdf_unreadable"
        raise PdfError(code, f"the PDF can't be opened: {problem}") from None
    with pdf:
        pdf.init_forms()  # needed to render the values of filled-in form fields
        return {"n_pages": len(pdf), "pages": [_render_page(pdf, i) for i in range(min(pages, len(pdf)))]}


def _render_page(pdf: pypdfium2.PdfDocument, index: int) -> dict[str, Any]:
    try:
        page = pdf[index]
        width, height = page.get_size()
        if not (
            0 < width < math.inf
            and 0 < height < math.inf
            and max(width, height) <= MAX_ASPECT_RATIO * min(width, height)
        ):
            size = f"{width:g} × {height:g} points"
            raise PdfError("pdf_unreadable", f"page {index + 1} has an unsupported size ({size})")
        image = render_pdf_page(page, PDF_DPI)
        page.close()
    except pypdfium2.PdfiumError as error:
        raise PdfError("pdf_unreadable", f"page {index + 1} can't be rendered ({error})") from None
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=JPEG_QUALITY)
    url = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return {"number": index + 1, "width": image.width, "height": image.height, "image": url}


def main() -> None:
    if sys.platform == "linux":  # other systems reject this limit or do not enforce it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        rendered = render(sys.stdin.buffer.read(), int(sys.argv[1]))
    except PdfError as error:
        rendered = {"error": str(error), "code": error.code}
    json.dump(rendered, sys.stdout)


if __name__ == "__main__":
    main()
