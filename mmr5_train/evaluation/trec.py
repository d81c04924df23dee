"""TREC files: runs (`qid Q0 docid rank score tag`) and qrels (`qid 0 docid rel`), what trec_eval and its kin read.

A docid is `<doc_name>#<page>`, page from 0. In names and query ids everything but printable ASCII, and "%" itself,
stands percent-encoded (UTF-8, RFC 3986), so an id is one field of one line and maps back exactly.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from pydantic import Field, ValidationError

from mmr5_train.common.files import InputError, atomic_write, validation_message
from mmr5_train.evaluation.scoring import aligned
from mmr5_train.ranking.records import PageId, Ranking, Record

QRELS = "qrels.txt"
# "#" needs no escape: a docid is split at its last one, and what follows that is a number.
_PLAIN = string.punctuation.replace("%", "")


class RunLine(Record):
    """A line of a run. Rank and tag are not kept: as for trec_eval, the score alone decides."""

    query_id: str = Field(min_length=1)
    doc_name: str = Field(min_length=1)
    page: int = Field(ge=0)
    score: float


def escape(name: str) -> str:
    """A document name or query id without white space, in printable ASCII."""
    return quote(name, safe=_PLAIN)


def unescape(field: str) -> str:
    """The name behind a field; a "%" that starts no escape is itself.

    Raises UnicodeDecodeError for escapes that are no UTF-8.
    """
    return unquote(field, errors="strict")


def docid(page: PageId) -> str:
    return f"{escape(page.doc_name)}#{page.page}"


def run_lines(path: Path) -> Iterator[tuple[int, RunLine]]:
    """(line number from 1, line) of a run, as they stand there; blank lines are passed over.

    Raises `InputError` for a file that can't be read, and for a line of another form.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; write it with your retriever first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.split()
        if fields:
            try:
                yield number, _run_line(fields)
            except ValidationError as error:
                raise InputError(f"{path}, line {number}: {validation_message(error)}") from None
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}") from None


def _run_line(fields: Sequence[str]) -> RunLine:
    """Raises ValueError (pydantic's too) that says what is wrong with the line."""
    if len(fields) != 6:
        raise ValueError(
            f"expected `qid Q0 docid rank score tag`, found {len(fields)} fields; "
            "names with spaces need JSON Lines, or %20 for a space"
        )
    query_id, _, page_id, _, score, _ = fields
    name, mark, page = page_id.rpartition("#")
    if not mark or not page.isdecimal():
        raise ValueError(f"docid must be <doc_name>#<page>, found {page_id!r}")
    try:
        names = {"query_id": unescape(query_id), "doc_name": unescape(name)}
    except UnicodeDecodeError:
        raise ValueError(
            f"{query_id} or {page_id} holds an escape that is no UTF-8; write a percent sign as %25"
        ) from None
    return RunLine.model_validate({**names, "page": page, "score": score})


def read_run(path: Path) -> dict[str, tuple[PageId, ...]]:
    """Query id → its pages, highest score first, equal scores in the order of their lines.

    Raises `InputError` as `run_lines` does, and for a page that stands twice under a question.
    """
    scores: dict[str, dict[PageId, float]] = {}
    for number, line in run_lines(path):
        page = PageId(doc_name=line.doc_name, page=line.page)
        ranked = scores.setdefault(line.query_id, {})
        if page in ranked:
            raise InputError(f"{path}, line {number}: page {page} stands twice for {line.query_id}; remove one")
        ranked[page] = line.score
    return {query_id: tuple(sorted(ranked, key=lambda page: -ranked[page])) for query_id, ranked in scores.items()}


def write_trec(folder: Path, rankings: Mapping[str, Sequence[Ranking]]) -> None:
    """`<system>.run` with the greedy order of each system, and `qrels.txt` with every gold page.

    Scores are n, n − 1, … 1: the records hold orders, and a strictly falling score leaves nothing to the rule by
    which a reader breaks ties. Gold pages that the first stage missed stand in the qrels too, so recall from these
    files is that of results.json. Raises `InputError` where systems did not rank the same questions.
    """
    systems = aligned(rankings)
    for system, ranked in systems.items():
        _write_lines(folder / f"{system}.run", _run(system, ranked))
    _write_lines(folder / QRELS, _qrels(next(iter(systems.values()))))


def _run(system: str, ranked: Iterable[Ranking]) -> Iterator[str]:
    for ranking in ranked:
        pages = ranking.ranked_pages(ranking.greedy)
        for rank, page in enumerate(pages, 1):
            score = len(pages) - rank + 1
            yield f"{escape(ranking.query_id)} Q0 {docid(page)} {rank} {score} {escape(system)}"


def _qrels(ranked: Iterable[Ranking]) -> Iterator[str]:
    for ranking in ranked:
        for page in dict.fromkeys(ranking.positives):
            yield f"{escape(ranking.query_id)} 0 {docid(page)} 1"


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with atomic_write(path) as stream:
        stream.writelines(f"{line}\n" for line in lines)
