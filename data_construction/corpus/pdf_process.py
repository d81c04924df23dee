"""Renders the PDFs of a corpus in a child process.

    python -m data_construction.corpus.pdf_process     # reads requests and writes answers, one JSON per line

PDFs come from strangers, and pdfium reads them in C++. The process gets none of the user's keys and tokens, and if
pdfium crashes, only one document is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pypdfium2

from data_construction.corpus.page_cache import PageCache, PageImage, UnreadablePageError, page_text
from mmr5_train.common.environment import without_secrets
from mmr5_train.common.files import InputError, file_hash
from mmr5_train.ranking.records import Record


class PdfRequest(Record):
    """A PDF to render into a page cache. If it has another number of pages than `pages`, nothing is rendered."""

    path: Path
    doc_name: str
    pages: int | None
    cache: PageCache


class RenderedPage(Record):
    """A page's image and text, or the problem with it."""

    image: PageImage | None = None
    text: str = ""
    problem: str = ""


class RenderedPdf(Record):
    """The pages of a PDF. `error`: why the document can't be used; `fatal`: why no document can be rendered."""

    sha256: str = ""
    n_pages: int = 0
    pages: tuple[RenderedPage, ...] = ()
    error: str = ""
    fatal: str = ""


class PdfProcess:
    """The child process. It starts with the first request and, after a crash, with the next one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def render(self, request: PdfRequest) -> RenderedPdf:
        """The pages of a PDF. Raises `InputError` if the page cache can't be written."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "data_construction.corpus.pdf_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env=without_secrets(),
                start_new_session=True,  # so that Ctrl-C reaches only the stage, which then closes the process
            )
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(request.model_dump_json() + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer.endswith("\n"):
            return RenderedPdf(error=f"its renderer crashed (exit code {self.close()}); print it to a new PDF")
        rendered = RenderedPdf.model_validate_json(answer)
        if rendered.fatal:
            raise InputError(rendered.fatal)
        return rendered

    def close(self) -> int:
        """Ends the process. Returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()  # it has nothing to lose: it is idle, or what it writes is written atomically
        process.communicate()
        return process.returncode


def render(request: PdfRequest) -> RenderedPdf:
    """Does the work of `PdfProcess.render` in this process."""
    try:
        sha256 = file_hash(request.path)
        pdf = pypdfium2.PdfDocument(request.path)
    except FileNotFoundError:
        return RenderedPdf(error="no such file; copy the PDF there")
    except (OSError, pypdfium2.PdfiumError) as error:
        return RenderedPdf(error=f"not a readable PDF ({error}); download it again")
    with pdf:
        n_pages = len(pdf)
        if request.pages not in (None, n_pages):
            return RenderedPdf(sha256=sha256, n_pages=n_pages)
        pdf.init_forms()  # render the contents of form fields
        pages = tuple(_render_page(pdf, number, sha256, request) for number in range(n_pages))
    return RenderedPdf(sha256=sha256, n_pages=n_pages, pages=pages)


def _render_page(pdf: pypdfium2.PdfDocument, number: int, sha256: str, request: PdfRequest) -> RenderedPage:
    try:
        page = pdf[number]
        try:
            image = request.cache.from_pdf(request.doc_name, number, page, sha256)
            return RenderedPage(image=image, text=page_text(page))
        finally:
            page.close()
    except (pypdfium2.PdfiumError, UnreadablePageError) as error:
        return RenderedPage(problem=str(error))


def main() -> None:
    """Answers the requests on stdin until it is closed. Anything else that is printed goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                rendered = render(PdfRequest.model_validate_json(line))
            except InputError as error:
                rendered = RenderedPdf(fatal=str(error))
            print(rendered.model_dump_json(), file=answers, flush=True)


if __name__ == "__main__":
    main()
