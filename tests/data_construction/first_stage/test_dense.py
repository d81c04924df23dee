"""Scores and the index on disk, with a fake encoder: the vectors of a page are the colours of its pixels."""

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


class ColorEncoder:
    """A fake encoder that counts the pages it encodes."""

    def __init__(self) -> None:
        self.pages_encoded = 0

    def pages(self, paths: Sequence[Path]) -> list[np.ndarray]:
        self.pages_encoded += len(paths)
        return [np.asarray(Image.open(path), dtype=np.float32).reshape(-1, 3)[:2] / 255 for path in paths]

    def questions(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([COLORS[word] for word in text.split() if word in COLORS], np.float32) for text in texts]


@pytest.fixture
def colors(monkeypatch: pytest.MonkeyPatch) -> ColorEncoder:
    fake = ColorEncoder()
    encoder = Encoder(pages=fake.pages, questions=fake.questions)
    monkeypatch.setattr(dense, "load_encoder", lambda config: encoder)
    return fake


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


def test_max_sim_sums_the_best_match_of_each_query_vector() -> None:
    page = np.array([[1, 0], [0, 2], [0.5, 0.5]], np.float32)
    assert max_sim(np.array([[1, 0], [0, 1], [1, 1]], np.float32), page) == 1 + 2 + 2
    assert max_sim(np.array([[3, 4]], np.float32), np.array([[1, 2]], np.float32)) == 11


def test_pages_are_ranked_by_their_vectors(tmp_path: Path, colors: ColorEncoder) -> None:
    rank = open_retriever(config(tmp_path), [], [])
    ranked = rank(document(tmp_path, ["red", "blue", "green", "blue"], "a blue chart", "green and red"))
    assert [[page.page for page, _ in ranking] for ranking in ranked] == [[1, 3, 0, 2], [0, 2, 1, 3]]
    assert [score for _, score in ranked[0]] == [255, 255, 0, 0]


def test_vectors_are_cached_on_disk(tmp_path: Path, colors: ColorEncoder) -> None:
    red_and_blue = document(tmp_path, ["red", "blue"], "blue")
    first = open_retriever(config(tmp_path), [], [])(red_and_blue)
    assert open_retriever(config(tmp_path), [], [])(red_and_blue) == first
    assert colors.pages_encoded == 2
    open_retriever(config(tmp_path, "another/model"), [], [])(red_and_blue)
    assert colors.pages_encoded == 4
    open_retriever(config(tmp_path), [], [])(document(tmp_path, ["red", "green"], "blue"))  # another image
    assert colors.pages_encoded == 6


def test_corrupt_vector_file_is_rewritten(tmp_path: Path, colors: ColorEncoder) -> None:
    red_and_blue = document(tmp_path, ["red", "blue"], "blue")
    first = open_retriever(config(tmp_path), [], [])(red_and_blue)
    (path,) = (tmp_path / "index").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    assert open_retriever(config(tmp_path), [], [])(red_and_blue) == first
    assert colors.pages_encoded == 4


def test_unwritable_index_raises(tmp_path: Path, colors: ColorEncoder) -> None:
    (tmp_path / "index").write_text("a file")
    with pytest.raises(InputError, match=r"vectors can't be written .*retriever.index="):
        open_retriever(config(tmp_path), [], [])(document(tmp_path, ["red"], "blue"))


def test_document_without_questions_is_not_encoded(tmp_path: Path, colors: ColorEncoder) -> None:
    assert open_retriever(config(tmp_path), [], [])(document(tmp_path, ["red"])) == []
    assert colors.pages_encoded == 0


def test_missing_sentence_transformers_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"needs sentence-transformers .*pip install '.\[dense\]'"):
        open_retriever(config(tmp_path), [], [])


def test_model_folder_changes_with_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = model_folder(str(tmp_path))
    assert model_folder(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert model_folder(str(tmp_path)) != first
