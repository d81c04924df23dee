"""MM-R5's score JSON. test_retriever.py tests JSON Lines and TREC runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_construction.first_stage.score_files import page_number, read_scores
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import PageId, Question, Skipped


def make_question(query_id: str, doc_name: str, *pages: int, domain: str = "DUDE") -> Question:
    positives = tuple(PageId(doc_name=doc_name, page=page) for page in pages)
    return Question(query_id=query_id, query="Q?", doc_name=doc_name, domain=domain, positives=positives)


def entry(image_path: str, score: Any, tag: str | None = None) -> dict[str, Any]:
    return {"image_path": image_path, "query": "Q?", "score": score} | ({"tag": tag} if tag else {})


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def test_each_subset_has_its_own_score_file(tmp_path: Path) -> None:
    """The same query id in two subsets means two questions."""
    dude = [entry("img/a_0.jpg", 1.5, "negative"), entry("img/a_2.jpg", 7, "positive")]
    write(tmp_path / "s/DUDE.json", {"0": dude, "unknown": dude})
    write(tmp_path / "s/Wiki-ss_scores.json", {"0": [entry("x/b/c/4.png", -1, "positive")]})
    questions = [
        make_question("DUDE/0", "DUDE/a", 2),
        make_question("Wiki-ss/0", "Wiki-ss/b/c", 4, domain="Wiki-ss"),
    ]
    skipped: list[Skipped] = []
    scores = read_scores(tmp_path / "s", [questions[0]], skipped)
    assert scores == {"DUDE/0": {0: 1.5, 2: 7.0}}
    assert [(s.reason, s.detail) for s in skipped] == [
        ("scores of questions not in the corpus", "2 questions, the first is DUDE/unknown")
    ]
    write(tmp_path / "s/Wiki-ss_scores.json", {"0": [entry("x/b_c_4.png", -1, "positive")]})
    assert read_scores(tmp_path / "s", questions, [])["Wiki-ss/0"] == {4: -1.0}


def test_single_file_with_full_query_ids_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "all.json", {"a.pdf/0": [entry("page_images/a_3.jpg", 2)]})
    assert read_scores(path, [make_question("a.pdf/0", "a.pdf", 3)], []) == {"a.pdf/0": {3: 2.0}}


@pytest.mark.parametrize(
    ("image", "page"),
    [
        ("corpus/img/a_b_12.jpg", 12),
        ("corpus\\img\\a_b_0.jpg", 0),
        ("a/b_3.png", None),
        ("x/a_b/3.png", 3),
        ("DUDE_a_b_4.jpg", 4),
        ("a_b.pdf_4.jpg", 4),
        ("other_4.jpg", None),
        ("a_b_last.jpg", None),
    ],
)
def test_page_number_is_parsed_from_the_image_path(image: str, page: int | None) -> None:
    assert page_number(image, "DUDE/a/b") == page


def test_pages_of_other_documents_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "DUDE.json", {"0": [entry("a_1.jpg", 1), entry("z_1.jpg", 2)]})
    skipped: list[Skipped] = []
    questions = [make_question("DUDE/0", "DUDE/a", 1), make_question("DUDE/1", "DUDE/a", 1)]
    assert read_scores(path, questions, skipped) == {"DUDE/0": {1: 1.0}, "DUDE/1": {}}
    assert [(s.reason, s.detail) for s in skipped] == [
        ("scores of pages of other documents", "1 scores, the first is of z_1.jpg")
    ]


def test_tags_are_compared_with_the_labels(tmp_path: Path) -> None:
    questions = [make_question(f"DUDE/{k}", "DUDE/a", 1) for k in range(3)]
    right = [entry("a_0.jpg", 2, "negative"), entry("a_1.jpg", 1, "positive")]
    off_by_one = [entry("a_1.jpg", 2, "negative"), entry("a_2.jpg", 1, "positive")]
    skipped: list[Skipped] = []
    read_scores(write(tmp_path / "DUDE.json", {"0": right, "1": right, "2": off_by_one}), questions, skipped)
    assert [(s.reason, s.detail) for s in skipped] == [
        ("tags that contradict the labels", "2 of 4, the first is a_1.jpg of DUDE/2; the labels are used")
    ]
    path = write(tmp_path / "DUDE.json", {str(k): off_by_one for k in range(3)})
    with pytest.raises(
        InputError,
        match=r"contradict the labels for 6 of 6 pages .* first is a_1.jpg of DUDE/0; check that the file",
    ):
        read_scores(path, questions, [])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected an object of question ids, found list"),
        ({"0": {}}, "question 0: expected a list of scores, found dict"),
        ({"0": [entry("a_1.jpg", "high")]}, "question 0, entry 0: field score"),
        ({"0": [{"score": 1}]}, "question 0, entry 0: field image_path: Field required"),
        ({"0": [entry("a_1.jpg", 1, "maybe")]}, "question 0, entry 0: field tag"),
        ({"0": [entry("p7.jpg", 1)]}, r"the first image_path is 'p7.jpg'; expected .*<doc_name>_<page>.jpg"),
        ({"9": [entry("a_1.jpg", 1)]}, "it has no question of the corpus"),
    ],
)
def test_invalid_score_json_raises(tmp_path: Path, value: Any, message: str) -> None:
    path = write(tmp_path / "DUDE.json", value)
    with pytest.raises(InputError, match=message):
        read_scores(path, [make_question("DUDE/0", "DUDE/a", 1)], [])


def test_unreadable_files_raise(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"DUDE.json: no such file"):
        read_scores(tmp_path / "DUDE.json", [], [])
    (tmp_path / "DUDE.json").write_text('{"0": [')
    with pytest.raises(InputError, match=r"DUDE.json: can't be read as JSON"):
        read_scores(tmp_path / "DUDE.json", [], [])
