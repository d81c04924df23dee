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


def test_question_fields(tmp_path: Path) -> None:
    asked = question(" Which table? ", [4, 5, 4], "['Pure-text (Plain-text)', 'Table']")
    annotations, skipped = read(tmp_path, line("a.pdf", 9, asked, first_row=30, domain="Academic paper"))
    (annotation,) = annotations
    (read_question,) = annotation.questions
    assert not skipped
    assert (annotation.doc_name, annotation.stem, annotation.n_pages) == ("a.pdf", "a", 9)
    assert read_question.query_id == "a.pdf/0"
    assert read_question.query == "Which table?"
    assert read_question.domain == "Academic paper"
    assert read_question.question_types == ("Pure-text (Plain-text)", "Table")
    assert read_question.positives == (PageId(doc_name="a.pdf", page=4), PageId(doc_name="a.pdf", page=5))


@pytest.mark.parametrize(
    ("written", "types"),
    [
        ("['Chart']", ("Chart",)),
        ("Chart", ("Chart",)),
        (["Chart", "Table"], ("Chart", "Table")),
        ("[]", ()),
        ("", ()),
    ],
)
def test_ways_to_write_types(tmp_path: Path, written: Any, types: tuple[str, ...]) -> None:
    annotations, _ = read(tmp_path, line("a", 3, question("Q?", [0], written)))
    assert annotations[0].questions[0].question_types == types


def test_a_question_keeps_its_number_when_another_is_left_out(tmp_path: Path) -> None:
    annotations, skipped = read(
        tmp_path, line("a", 3, question("", [0]), question("no label", []), question("good", [1]))
    )
    assert [q.query_id for q in annotations[0].questions] == ["a/2"]
    assert [(s.query_id, s.reason) for s in skipped] == [
        ("a/0", "question can't be understood"),
        ("a/1", "no relevant page"),
    ]


@pytest.mark.parametrize(
    ("broken", "field"),
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
def test_questions_that_cannot_be_understood_are_listed(
    tmp_path: Path, broken: dict[str, Any], field: str
) -> None:
    annotations, skipped = read(tmp_path, line("a", 3, broken, question("good", [0])))
    assert [q.query_id for q in annotations[0].questions] == ["a/1"]
    (skip,) = skipped
    assert (skip.query_id, skip.reason) == ("a/0", "question can't be understood")
    assert field in skip.detail


def test_a_repeated_line_is_listed_and_a_contradicting_one_refused(tmp_path: Path) -> None:
    first = line("a.pdf", 3, question("Q?", [0]))
    annotations, skipped = read(tmp_path, first, line("b", 2, question("R?", [1])), first)
    assert [a.doc_name for a in annotations] == ["a.pdf", "b"]
    assert [(s.reason, s.detail) for s in skipped] == [("duplicate line", "line 3 repeats line 1: a.pdf")]
    with pytest.raises(InputError, match=r"line 2: document 'a' already stands in line 1 with other content"):
        read(tmp_path, first, line("a", 3, question("other", [0])))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"doc_name": "b", ', r"MMDocIR_annotations.jsonl, line 2: not valid JSON"),
        ("[1, 2]", r"line 2: expected a JSON object, found list"),
        (json.dumps({"doc_name": "b", "questions": []}), r"line 2: field domain: Field required"),
        (json.dumps({"doc_name": "", "domain": "d", "questions": []}), r"line 2: field doc_name"),
        (json.dumps(line("b", 3) | {"questions": "none"}), r"line 2: field questions"),
        (json.dumps(line("b", 3) | {"page_indices": [5, 2]}), r"line 2: page_indices \[5, 2\] end before"),
        (json.dumps(line("b", 3) | {"page_indices": [5]}), r"line 2: field page_indices"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, line("a", 3, question("Q?", [0])), text)


def test_absent_and_empty_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder; say where the corpus is with corpus.folder="):
        read_evaluation_annotations(corpus(tmp_path / "nowhere"), [])
    with pytest.raises(InputError, match=r"MMDocIR_annotations.jsonl: no such file"):
        read_evaluation_annotations(corpus(tmp_path), [])
    with pytest.raises(InputError, match="holds no document"):
        read(tmp_path, "")
