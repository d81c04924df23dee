"""Reads first-stage scores from files: JSON Lines, TREC runs, and the JSON of MM-R5's released pipeline.

Formats: docs/data_formats.md, "First-stage scores".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmr5_train.common.files import InputError, read_json_lines, validation_message
from mmr5_train.evaluation.trec import RunLine, run_lines
from mmr5_train.ranking.records import PageId, Question, Skipped

TREC_SUFFIXES = (".trec", ".run", ".txt")

Scores = dict[str, dict[int, float]]
"""query id → page → score."""


def score_files(path: Path) -> list[Path]:
    """The files of `retriever.file`: the file itself, or the JSON files in the folder."""
    return sorted(path.glob("*.json")) if path.is_dir() else [path]


class ScoreLine(RunLine):
    """A line of a JSON Lines score file: the fields of a run; other fields are ignored."""

    model_config = ConfigDict(extra="ignore")


def read_scores(path: Path, questions: Sequence[Question], skipped: list[Skipped]) -> Scores:
    """The scores of these questions, from JSON Lines, a TREC run, or MM-R5's JSON (a file, or a folder of files).

    Ignores scores of other questions and records them in `skipped`. Raises `InputError` for an invalid or repeated
    line, a page of another document, and a question without a score; for MM-R5's JSON see `_read_pipeline_scores`.
    """
    by_id = {question.query_id: question for question in questions}
    if path.is_dir() or path.suffix == ".json":
        return _read_pipeline_scores(path, by_id, skipped)
    scores: Scores = {query_id: {} for query_id in by_id}
    unknown: dict[str, None] = {}
    for number, line in _score_lines(path):
        if line.query_id not in by_id:
            unknown[line.query_id] = None
            continue
        question = by_id[line.query_id]
        if line.doc_name.removesuffix(".pdf") != question.doc_name.removesuffix(".pdf"):
            raise InputError(
                f"{path}, line {number}: scores a page of {line.doc_name!r} for {line.query_id}, a question on "
                f"{question.doc_name!r}"
            )
        if line.page in scores[line.query_id]:
            page = PageId(doc_name=line.doc_name, page=line.page)
            raise InputError(f"{path}, line {number}: a second score of page {page} for {line.query_id}")
        scores[line.query_id][line.page] = line.score
    missing = [query_id for query_id in by_id if not scores[query_id]]
    if missing:
        raise InputError(
            f"{path}: has no scores for {len(missing)} of {len(by_id)} questions, the first is {missing[0]!r}; "
            'docs/data_formats.md, "First-stage scores", describes the query ids'
        )
    _record_unknown(path, unknown, skipped)
    return scores


def _record_unknown(path: Path, unknown: dict[str, None], skipped: list[Skipped]) -> None:
    if unknown:
        detail = f"{len(unknown)} questions, the first is {next(iter(unknown))}"
        skipped.append(Skipped(file=str(path), reason="scores of questions not in the corpus", detail=detail))


def _score_lines(path: Path) -> Iterator[tuple[int, RunLine]]:
    if path.suffix in TREC_SUFFIXES:
        yield from run_lines(path)
        return
    if path.suffix != ".jsonl":
        raise InputError(
            f"{path}: the name must end in .jsonl (JSON Lines of query_id, doc_name, page, score), in "
            f"{', '.join(TREC_SUFFIXES)} (a TREC run), or in .json (MM-R5's scores; or a folder of such files)"
        )
    for number, value in read_json_lines(path):
        try:
            yield number, ScoreLine.model_validate(value)
        except ValidationError as error:
            raise InputError(f"{path}, line {number}: {validation_message(error)}") from None


# MM-R5's score JSON.


class _PipelineEntry(BaseModel):
    """The score of one page. The field `query` is ignored: two questions may have the same text."""

    image_path: str
    tag: Literal["positive", "negative"] | None = None
    score: float = Field(allow_inf_nan=False)


def _read_pipeline_scores(path: Path, by_id: dict[str, Question], skipped: list[Skipped]) -> Scores:
    """Reads `{query_id: [{image_path, query, tag, score}, …]}`, one file per subset, with its name: `DUDE.json`.

    The query ids of this project begin with the subset; those in the file may omit it. `page_number` reads the
    page from the name of the image. Pages of other documents are ignored and recorded in `skipped`. A question
    without a score gets no candidates. Labels come from the corpus; the tags are only compared with them, since
    nothing else would reveal page numbers that are off by one.

    Raises `InputError` if a file does not exist or has another format, and if the tags contradict the labels.
    """
    scores: Scores = {query_id: {} for query_id in by_id}
    domains = sorted({question.domain for question in by_id.values()}, key=len, reverse=True)
    unknown: dict[str, None] = {}
    other_documents: list[str] = []
    tagged: list[tuple[bool, bool, str]] = []  # tagged positive, labelled relevant, which page
    for file in score_files(path):
        subset = next((domain for domain in domains if file.stem.startswith(domain)), "")
        for name, entries in _read_json(file).items():
            query_id = name if name in by_id else f"{subset}/{name}"
            if query_id not in by_id:
                unknown[query_id if subset else name] = None
                continue
            question = by_id[query_id]
            relevant = {page.page for page in question.positives}
            for entry in _pipeline_entries(file, name, entries):
                page = page_number(entry.image_path, question.doc_name)
                if page is None:
                    other_documents.append(entry.image_path)
                    continue
                scores[query_id][page] = entry.score
                if entry.tag is not None and (entry.tag == "positive" or page in relevant):
                    tagged.append((entry.tag == "positive", page in relevant, f"{entry.image_path} of {query_id}"))
    if not any(scores.values()):
        problem = (
            f"the first image_path is {other_documents[0]!r}"
            if other_documents
            else "it has no question of the corpus"
        )
        raise InputError(
            f"{path}: contains no score for a page of a question's document: {problem}; expected image names like "
            "<doc_name>_<page>.jpg, in files with the name of their subset, such as DUDE.json"
        )
    _check_tags(path, tagged, skipped)
    if other_documents:
        detail = f"{len(other_documents)} scores, the first is of {other_documents[0]}"
        skipped.append(Skipped(file=str(path), reason="scores of pages of other documents", detail=detail))
    _record_unknown(path, unknown, skipped)
    return scores


def page_number(image_path: str, doc_name: str) -> int | None:
    """The page in an image's name, `<doc_name>_<page>.jpg` or `<doc_name>/<page>.jpg`; None for another document.

    The subset before the document's name and ".pdf" may be missing, and "/" may be "_".
    """
    path = PurePosixPath(image_path.replace("\\", "/"))
    name, _, page = path.stem.rpartition("_")
    if not name:
        name = path.parent.name
    accepted = {
        full.removesuffix(".pdf").replace("/", "_") for full in (doc_name, doc_name.partition("/")[2] or doc_name)
    }
    return int(page) if page.isdecimal() and name.removesuffix(".pdf") in accepted else None


def _check_tags(path: Path, tagged: list[tuple[bool, bool, str]], skipped: list[Skipped]) -> None:
    """Compares tags with labels. Records some contradictions in `skipped`; raises `InputError` for a majority."""
    contradictions = [page for positive, relevant, page in tagged if positive != relevant]
    if len(contradictions) * 2 > len(tagged):
        raise InputError(
            f"{path}: the tags contradict the labels for {len(contradictions)} of {len(tagged)} pages that are "
            f"tagged positive or labeled relevant, the first is {contradictions[0]}; check that the file counts "
            "pages as the corpus does"
        )
    if contradictions:
        detail = f"{len(contradictions)} of {len(tagged)}, the first is {contradictions[0]}; the labels are used"
        skipped.append(Skipped(file=str(path), reason="tags that contradict the labels", detail=detail))


def _pipeline_entries(path: Path, query_id: str, entries: Any) -> Iterator[_PipelineEntry]:
    if not isinstance(entries, list):
        raise InputError(f"{path}, question {query_id}: expected a list of scores, found {type(entries).__name__}")
    for k, value in enumerate(entries):
        try:
            yield _PipelineEntry.model_validate(value)
        except ValidationError as error:
            raise InputError(f"{path}, question {query_id}, entry {k}: {validation_message(error)}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; write it with your retriever first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: can't be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object of question ids, found {type(value).__name__}")
    return value
