import hashlib
import io
import json
import random
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_construction.corpus.drawing import COLORS, KINDS, PageContent, draw_page
from data_construction.corpus.synthetic_documents import (
    MAX_SECTION,
    USERS,
    USERS_UNSEEN,
    WORDINGS,
    make_document,
    users_query,
)
from data_construction.synthetic import SyntheticStage, main
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError


def build(out, *overrides):
    main(compose_stage(SyntheticStage, "synthetic", [f"out={out}", "documents=6", *overrides]))
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build(tmp_path_factory.mktemp("corpus") / "a")


def lines(corpus):
    return [json.loads(line) for line in (corpus / "MMDocIR_annotations.jsonl").read_text().splitlines()]


def test_corpus_has_the_columns_and_fields_of_mmdocir(corpus):
    table = pq.read_table(corpus / "MMDocIR_pages.parquet")
    expected = {"doc_name", "domain", "passage_id", "image_path", "image_binary", "ocr_text", "vlm_text"}
    assert set(table.column_names) == expected
    row = table.to_pylist()[0]
    assert row["passage_id"] == "0"
    assert not row["doc_name"].endswith(".pdf")
    assert Image.open(io.BytesIO(row["image_binary"])).size == (600, 800)
    for line in lines(corpus):
        assert set(line) == {"doc_name", "domain", "page_indices", "layout_indices", "questions"}
        assert line["doc_name"].endswith(".pdf")


def test_rows_questions_and_descriptions_are_consistent(corpus):
    rows = pq.read_table(corpus / "MMDocIR_pages.parquet").to_pylist()
    relevant = Counter()
    for line in lines(corpus):
        first, last = line["page_indices"]
        pages = rows[first : last + 1]
        assert {row["doc_name"] + ".pdf" for row in pages} == {line["doc_name"]}
        assert [row["passage_id"] for row in pages] == [str(i) for i in range(len(pages))]
        for question in line["questions"]:
            relevant[len(question["page_id"])] += 1
            for page in question["page_id"]:
                assert pages[page]["vlm_text"] in question["Q"]
    assert relevant[1] > relevant[2] > 0


def test_page_text_does_not_describe_the_figure(corpus):
    for row in pq.read_table(corpus / "MMDocIR_pages.parquet").to_pylist():
        words = set(row["ocr_text"].lower().split())
        assert not words & {*COLORS, "bar", "line", "pie", "table", "chart"}


def test_every_page_has_a_hard_negative():
    """Every page of a section shares exactly one of colour and kind with another page."""
    for index in range(50):
        document = make_document(index, seed=5)
        for topic in {page.title for page in document.pages}:
            looks = {(page.color, page.kind) for page in document.pages if page.title == topic}
            for color, kind in looks:
                assert any((color == c) != (kind == k) for c, k in looks)


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
    same_seed, other_seed = build(tmp_path / "b"), build(tmp_path / "c", "seed=7")

    def digest(folder):
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("MMDocIR*"))]

    assert digest(corpus) == digest(same_seed)
    assert digest(corpus) != digest(other_seed)


def test_documents_depend_only_on_seed_and_index():
    assert make_document(3, seed=1) == make_document(3, seed=1)
    assert make_document(3, seed=1) != make_document(3, seed=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("color", COLORS)
def test_figures_are_drawn_in_their_colour(kind, color):
    content = PageContent("Alder: water use", ("A line.",), color, kind, "Guidebook", 1, 11)
    assert content.description in (f"a {color} {kind}", f"an {color} {kind}")
    pixels = np.asarray(draw_page(content).crop((40, 300, 560, 745)), dtype=int).reshape(-1, 3)
    vivid = pixels[np.ptp(pixels, axis=1) > 60]
    if color == "grey":
        assert len(vivid) == 0
    else:
        assert len(vivid) > 0.01 * len(pixels)
        red, green, blue = vivid.mean(0)
        strongest = {"red": red, "green": green, "blue": blue, "orange": red, "purple": blue}[color]
        assert strongest == max(red, green, blue)
        assert (color == "orange") == (red > green + 40 > blue + 80), "only orange has red > green > blue"


def test_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty"):
        build(tmp_path)
    with pytest.raises(InputError, match="no stage wrote it"):
        build(tmp_path, "overwrite=true")
    assert (tmp_path / "thesis.txt").exists()


def test_users_questions_change_nothing_else():
    for index in range(3):
        plain, both = make_document(index, 1), make_document(index, 1, users=True)
        assert both.pages == plain.pages
        catalogue = [q for q in both.questions if "'catalogue'" in q["type"]]
        assert [{**q, "type": q["type"].replace(", 'catalogue'", "")} for q in catalogue] == list(plain.questions)
        for population in (USERS, USERS_UNSEEN):
            asked = [q for q in both.questions if f"'{population}'" in q["type"]]
            assert [q["page_id"] for q in asked] == [q["page_id"] for q in catalogue]
            assert not {q["Q"] for q in asked} & {q["Q"] for q in catalogue}


def test_wordings_of_training_and_evaluation_share_no_sentence_and_no_other_word():
    seen, unseen = WORDINGS[USERS], WORDINGS[USERS_UNSEEN]
    assert not set(seen.forms) & set(unseen.forms)
    words = [{word for words in wording.kinds.values() for word in words} for wording in (seen, unseen)]
    assert not words[0] & words[1]
    assert seen.kinds.keys() == unseen.kinds.keys() == set(KINDS)
    rng = random.Random(0)
    queries = [users_query(seen, "water use", "red", "table", rng) for _ in range(200)]
    assert 30 < sum("spreadsheet" in query for query in queries) < 70
    assert 30 < sum("data table" in query for query in queries) < 70
    assert all("red" in query.lower() and "water use" in query.lower() for query in queries)


def test_sections_of_many_pages_have_different_pages():
    document = make_document(0, 1, two_relevant=0, section_pages=MAX_SECTION)
    assert len(document.pages) == 2 * MAX_SECTION
    for topic in {page.title for page in document.pages}:
        looks = [(page.color, page.kind) for page in document.pages if page.title == topic]
        assert len(set(looks)) == MAX_SECTION
    assert all(len(question["page_id"]) == 1 for question in document.questions)
    with pytest.raises(InputError, match=f"section_pages.*{MAX_SECTION}"):
        compose_stage(SyntheticStage, "synthetic", [f"section_pages={MAX_SECTION + 1}"])
