"""Scores and the index on disk, with a stand-in for the model: a page's vector is its picture's mean colour."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_construction.corpus.documents import Document
from data_construction.first_stage import dense
from data_construction.first_stage.dense import Dense, Encoder, max_sim, model_folder
from data_construction.first_stage.retriever import open_retriever
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import Page, PageId, Question

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Colors:
    """Counts the pages it reads."""

    def __init__(self) -> None:
        self.read = 0

    def pages(self, paths: Sequence[Path]) -> list[np.ndarray]:
        self.read += len(paths)
        return [np.asarray(Image.open(path), dtype=np.float32).reshape(-1, 3)[:2] / 255 for path in paths]

    def questions(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([COLORS[word] for word in text.split() if word in COLORS], np.float32) for text in texts]


@pytest.fixture
def colors(monkeypatch: pytest.MonkeyPatch) -> Colors:
    stand_in = Colors()
    encoder = Encoder(pages=stand_in.pages, questions=stand_in.questions)
    monkeypatch.setattr(dense, "load_encoder", lambda config: encoder)
    return stand_in


def document(folder: Path, colors: Sequence[str], *queries: str) -> Document:
    pages = []
    for i, color in enumerate(colors):
        Image.new("RGB", (4, 4), COLORS[color]).save(folder / f"{i}.png")
        image = (folder / f"{i}.png").as_posix()
        pages.append(Page(doc_name="a", page=i, domain="d", image=image, width=4, height=4))
    questions = [
        Question(query_id=f"a/{k}", query=q, doc_name="a", domain="d", positives=(PageId(doc_name="a", page=0),))
        for k, q in enumerate(queries)
    ]
    return Document("a", "d", len(pages), "hash", tuple(pages), tuple(questions))


def config(folder: Path, model: str = "vidore/colqwen2-v1.0") -> Dense:
    return Dense(name="dense", model=model, multi_vector=True, index=folder / "index")


def test_late_interaction_and_dot_product() -> None:
    page = np.array([[1, 0], [0, 2], [0.5, 0.5]], np.float32)
    assert max_sim(np.array([[1, 0], [0, 1], [1, 1]], np.float32), page) == 1 + 2 + 2
    assert max_sim(np.array([[3, 4]], np.float32), np.array([[1, 2]], np.float32)) == 11


def test_pages_are_ranked_by_their_vectors(tmp_path: Path, colors: Colors) -> None:
    rank = open_retriever(config(tmp_path), [], [])
    ranked = rank(document(tmp_path, ["red", "blue", "green", "blue"], "a blue chart", "green and red"))
    assert [[page.page for page, _ in one] for one in ranked] == [[1, 3, 0, 2], [0, 2, 1, 3]]
    assert [score for _, score in ranked[0]] == [255, 255, 0, 0]


def test_vectors_are_read_from_disk_the_second_time(tmp_path: Path, colors: Colors) -> None:
    made = document(tmp_path, ["red", "blue"], "blue")
    first = open_retriever(config(tmp_path), [], [])(made)
    assert open_retriever(config(tmp_path), [], [])(made) == first
    assert colors.read == 2
    open_retriever(config(tmp_path, "another/model"), [], [])(made)
    assert colors.read == 4
    open_retriever(config(tmp_path), [], [])(document(tmp_path, ["red", "green"], "blue"))  # another picture
    assert colors.read == 6


def test_a_broken_index_is_made_anew(tmp_path: Path, colors: Colors) -> None:
    made = document(tmp_path, ["red", "blue"], "blue")
    first = open_retriever(config(tmp_path), [], [])(made)
    (path,) = (tmp_path / "index").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    assert open_retriever(config(tmp_path), [], [])(made) == first
    assert colors.read == 4


def test_an_index_that_cannot_be_written(tmp_path: Path, colors: Colors) -> None:
    (tmp_path / "index").write_text("a file")
    with pytest.raises(InputError, match=r"vectors can't be written .*retriever.index="):
        open_retriever(config(tmp_path), [], [])(document(tmp_path, ["red"], "blue"))


def test_a_document_without_questions_is_not_read(tmp_path: Path, colors: Colors) -> None:
    assert open_retriever(config(tmp_path), [], [])(document(tmp_path, ["red"])) == []
    assert colors.read == 0


def test_without_sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"needs sentence-transformers .*pip install '.\[dense\]'"):
        open_retriever(config(tmp_path), [], [])


def test_other_weights_in_a_folder_have_another_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = model_folder(str(tmp_path))
    assert model_folder(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert model_folder(str(tmp_path)) != first
