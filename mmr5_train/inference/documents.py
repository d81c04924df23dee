"""What a caller passes as the pages of a query, and the `Document` that results return for each of them."""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from mmr5_train.common.files import InputError
from mmr5_train.models.pages import OpenedPage, PageInput, page_list
from mmr5_train.ranking.results import DocId, Document

PagesInput = Iterable[PageInput | Document] | PageInput | Document


def to_documents(
    pages: PagesInput,
    doc_ids: Sequence[DocId] | None = None,
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> list[Document]:
    """The pages as documents. `doc_ids` and `metadata` have one entry for each page, and replace a document's own.

    Raises `InputError` for a document with text only, and if `doc_ids` or `metadata` has another length.
    """
    given: Sequence[Any] = [pages] if _is_document(pages) else page_list(cast("Iterable[PageInput]", pages))
    documents = [_to_document(page, index) for index, page in enumerate(given)]
    for name, values in (("doc_ids", doc_ids), ("metadata", metadata)):
        if values is not None and len(values) != len(documents):
            raise InputError(f"{name}: expected one for each of {len(documents)} pages, found {len(values)}")
    return [
        Document(
            document.page,
            document.doc_id if doc_ids is None else doc_ids[index],
            document.text,
            document.metadata if metadata is None else metadata[index],
        )
        for index, document in enumerate(documents)
    ]


def documents_of_pages(documents: Sequence[Document], opened: Sequence[OpenedPage]) -> list[Document]:
    """The document of each opened page. Those of a whole PDF have its id with "#page=<number>".

    Without an id, the id is the index of the page.
    """
    pages_of = Counter(page.input for page in opened)
    numbers: Counter[int] = Counter()
    of_pages: list[Document] = []
    for page in opened:
        document = documents[page.input]
        numbers[page.input] += 1
        doc_id = document.doc_id
        if doc_id is None:
            doc_id = len(of_pages)
        elif pages_of[page.input] > 1:
            doc_id = f"{doc_id}#page={numbers[page.input]}"
        of_pages.append(Document(page.document, doc_id, document.text, document.metadata))
    return of_pages


def _is_document(page: Any) -> bool:
    """Whether it is a `Document`, of this project or of the `rerankers` library."""
    return isinstance(page, Document) or (hasattr(page, "doc_id") and hasattr(page, "metadata"))


def _to_document(page: Any, index: int) -> Document:
    if isinstance(page, Document):
        if page.page is None:
            raise InputError(f"page {index + 1}: the document has no page; this reranker ranks page images")
        return page
    if not _is_document(page):
        return Document(page)
    image = getattr(page, "image_path", None) or _decoded(getattr(page, "base64", None), index)
    if not image:
        raise InputError(
            f"page {index + 1}: the document has text only; expected image_path or base64, a page image"
        )
    return Document(image, page.doc_id, page.text or "", page.metadata or {})


def _decoded(encoded: str | None, index: int) -> bytes | None:
    """The bytes of a base64 string or data URI."""
    if encoded is None:
        return None
    try:
        return base64.b64decode(encoded.partition(";base64,")[2] or encoded, validate=True)
    except binascii.Error as error:
        raise InputError(f"page {index + 1}: base64 can't be decoded ({error})") from None
