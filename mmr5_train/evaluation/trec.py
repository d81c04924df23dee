"""TREC files for trec_eval and compatible tools: runs (`qid Q0 docid rank score tag`), qrels (`qid 0 docid rel`).

A docid is `<doc_name>#<page>`, with pages numbered from 0. In names and query ids, "%" and everything except
printable ASCII is percent-encoded (UTF-8, RFC 3986). So every id is one field of a line and decodes exactly.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from pydantic import Field, ValidationError

from mmr5_train.common.files import InputError, atomic_write, validation_message
from mmr5_train.evaluation.scoring import align_rankings
from mmr5_train.ranking.records import PageId, Ranking, Record

QRELS = "qrels.txt"
# "#" needs no escape: a docid is split at its last "#", and only a number follows that.
_UNESCAPED = string.punctuation.replace("%", "")


class RunLine(Record):
    """A line of a run, without rank and tag: as in trec_eval, only the score determines the order."""

    query_id: str = Field(min_length=1)
    doc_name: str = Field(min_length=1)
    page: int = Field(ge=0)
    score: float


def escape(name: str) -> str:
    """A document name or query id, percent-encoded to printable ASCII without white space."""
    return quote(name, safe=_UNESCAPED)


def unescape(field: str) -> str:
    """The name that a field encodes. A "%" that starts no escape stays as it is.

    Raises UnicodeDecodeError if the escapes do not decode to UTF-8.
    """
    return unquote(field, errors="strict")


def docid(page: PageId) -> str:
    return f"{escape(page.doc_name)}#{page.page}"


def run_lines(path: Path) -> Iterator[tuple[int, RunLine]]:
    """Yields (line number from 1, line) of a run in file order, without blank lines.

    Raises `InputError` for a file that can't be read and for a malformed line.
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
    """Parses the fields of a line. Raises ValueError (pydantic's is a subclass) naming the problem."""
    if len(fields) != 6:
        raise ValueError(
            f"expected `qid Q0 docid rank score tag`, found {len(fields)} fields; "
            "names with spaces need JSON Lines, or %20 for a space"
        )
    query_id, _, page_id, _, score, _ = fields
    name, separator, page = page_id.rpartition("#")
    if not separator or not page.isdecimal():
        raise ValueError(f"docid must be <doc_name>#<page>, found {page_id!r}")
    try:
        names = {"query_id": unescape(query_id), "doc_name": unescape(name)}
    except UnicodeDecodeError:
        raise ValueError(
            f"{query_id} or {page_id} has an escape that is not UTF-8; write a percent sign as %25"
        ) from None
    return RunLine.model_validate({**names, "page": page, "score": score})


def read_run(path: Path) -> dict[str, tuple[PageId, ...]]:
    """Query id → its pages, highest score first; pages with equal scores keep the order of their lines.

    Raises `InputError` as `run_lines` does, and for a page that a question lists twice.
    """
    scores: dict[str, dict[PageId, float]] = {}
    for number, line in run_lines(path):
        page = PageId(doc_name=line.doc_name, page=line.page)
        page_scores = scores.setdefault(line.query_id, {})
        if page in page_scores:
            raise InputError(f"{path}, line {number}: {line.query_id} lists page {page} twice; remove one line")
        page_scores[page] = line.score
    return {
        query_id: tuple(sorted(page_scores, key=lambda page: -page_scores[page]))
        for query_id, page_scores in scores.items()
    }


def write_trec(folder: Path, rankings: Mapping[str, Sequence[Ranking]]) -> None:
    """Writes `<system>.run` with each system's greedy order, and `qrels.txt` with all gold pages.

    Scores are n, n − 1, … 1. They decrease strictly, so the order does not depend on how a tool breaks ties. The
    qrels include gold pages that the first stage missed, so recall from these files equals that in results.json.
    Raises `InputError` if the systems did not rank the same questions.
    """
    systems = align_rankings(rankings)
    for system, system_rankings in systems.items():
        _write_lines(folder / f"{system}.run", _run(system, system_rankings))
    _write_lines(folder / QRELS, _qrels(next(iter(systems.values()))))


def _run(system: str, rankings: Iterable[Ranking]) -> Iterator[str]:
    for ranking in rankings:
        pages = ranking.ranked_pages(ranking.greedy)
        for rank, page in enumerate(pages, 1):
            score = len(pages) - rank + 1
            yield f"{escape(ranking.query_id)} Q0 {docid(page)} {rank} {score} {escape(system)}"


def _qrels(rankings: Iterable[Ranking]) -> Iterator[str]:
    for ranking in rankings:
        for page in dict.fromkeys(ranking.positives):
            yield f"{escape(ranking.query_id)} 0 {docid(page)} 1"


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with atomic_write(path) as stream:
        stream.writelines(f"{line}\n" for line in lines)
