from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sample_corpora import line, question, write_lines

from data_construction.corpus.annotations import Annotation, EvaluationSet, read_evaluation_annotations
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import PageId, Skipped


def corpus(folder: Path) -> EvaluationSet:
    return EvaluationSet(folder=folder, pages="documents", descriptions=False, page_cache=folder / "cache")


def read(folder: Path, *lines: dict[str, Any] | str) -> tuple[list[Annotation], list[Skipped]]:
    write_lines(folder, *lines)
    skipped: list[Skipped] = []
    return read_evaluation_annotations(corpus(folder), skipped), skipped


def test_question_fields_are_read(tmp_path: Path) -> None:
    fields = question(" Which table? ", [4, 5, 4], "['Pure-text (Plain-text)', 'Table']")
    annotations, skipped = read(tmp_path, line("a.pdf", 9, fields, first_row=30, domain="Academic paper"))
    (annotation,) = annotations
    (parsed,) = annotation.questions
    assert not skipped
    assert (annotation.doc_name, annotation.stem, annotation.n_pages) == ("a.pdf", "a", 9)
    assert parsed.query_id == "a.pdf/0"
    assert parsed.query == "Which table?"
    assert parsed.domain == "Academic paper"
    assert parsed.question_types == ("Pure-text (Plain-text)", "Table")
    assert parsed.positives == (PageId(doc_name="a.pdf", page=4), PageId(doc_name="a.pdf", page=5))


@pytest.mark.parametrize(
    ("value", "types"),
    [
        ("['Chart']", ("Chart",)),
        ("Chart", ("Chart",)),
        (["Chart", "Table"], ("Chart", "Table")),
        ("[]", ()),
        ("", ()),
    ],
)
def test_question_types_may_be_lists_or_text(tmp_path: Path, value: Any, types: tuple[str, ...]) -> None:
    annotations, _ = read(tmp_path, line("a", 3, question("Q?", [0], value)))
    assert annotations[0].questions[0].question_types == types


def test_skipped_questions_do_not_change_query_ids(tmp_path: Path) -> None:
    annotations, skipped = read(
        tmp_path, line("a", 3, question("", [0]), question("no label", []), question("good", [1]))
    )
    assert [q.query_id for q in annotations[0].questions] == ["a/2"]
    assert [(s.query_id, s.reason) for s in skipped] == [
        ("a/0", "question can't be understood"),
        ("a/1", "no relevant page"),
    ]


@pytest.mark.parametrize(
    ("invalid", "field"),
    [
        (question("Q?", [-1]), "page_id.0"),
        (question("Q?", "3"), "page_id"),
        (question("Q?", [True]), "page_id.0"),
        (question("Q?", [1.5]), "page_id.0"),
        (question("Q?", [1], "['Table'"), "quoted names"),
        (question("Q?", [1], "[__import__('os').getcwd()]"), "quoted names"),
        (question("Q?", [1], "[1, 2]"), "quoted names"),
        (question("Q?", [1], "[" * 5000), "quoted names"),
        ({"page_id": [1]}, "field Q"),
        ({"Q": 3, "page_id": [1]}, "field Q"),
        ({"Q": "Q?"}, "field page_id"),
    ],
)
def test_invalid_questions_are_skipped(tmp_path: Path, invalid: dict[str, Any], field: str) -> None:
    annotations, skipped = read(tmp_path, line("a", 3, invalid, question("good", [0])))
    assert [q.query_id for q in annotations[0].questions] == ["a/1"]
    (skip,) = skipped
    assert (skip.query_id, skip.reason) == ("a/0", "question can't be understood")
    assert field in skip.detail


def test_repeated_lines_are_skipped_and_conflicting_lines_raise(tmp_path: Path) -> None:
    first = line("a.pdf", 3, question("Q?", [0]))
    annotations, skipped = read(tmp_path, first, line("b", 2, question("R?", [1])), first)
    assert [a.doc_name for a in annotations] == ["a.pdf", "b"]
    assert [(s.reason, s.detail) for s in skipped] == [("duplicate line", "line 3 repeats line 1: a.pdf")]
    with pytest.raises(InputError, match=r"line 2: document 'a' is already in line 1, with different content"):
        read(tmp_path, first, line("a", 3, question("other", [0])))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"doc_name": "b", ', r"MMDocIR_annotations.jsonl, line 2: not valid JSON"),
        ("[1, 2]", r"line 2: expected a JSON object, found list"),
        (json.dumps({"doc_name": "b", "questions": []}), r"line 2: field domain: Field required"),
        (json.dumps({"doc_name": "", "domain": "d", "questions": []}), r"line 2: field doc_name"),
        (json.dumps(line("b", 3) | {"questions": "none"}), r"line 2: field questions"),
        (
            json.dumps(line("b", 3) | {"page_indices": [5, 2]}),
            r"line 2: page_indices \[5, 2\]: the last is smaller",
        ),
        (json.dumps(line("b", 3) | {"page_indices": [5]}), r"line 2: field page_indices"),
    ],
)
def test_error_names_the_invalid_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, line("a", 3, question("Q?", [0])), text)


def test_missing_folder_missing_file_and_empty_file_raise(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder; set corpus.folder="):
        read_evaluation_annotations(corpus(tmp_path / "nowhere"), [])
    with pytest.raises(InputError, match=r"MMDocIR_annotations.jsonl: no such file"):
        read_evaluation_annotations(corpus(tmp_path), [])
    with pytest.raises(InputError, match="contains no documents"):
        read(tmp_path, "")
