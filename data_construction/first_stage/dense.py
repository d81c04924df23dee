"""Dense first stages: a visual retriever reads the page pictures, vectors are compared here.

    python -m data_construction.candidates retriever=dense retriever.model=vidore/colqwen2-v1.0 …

ColPali and ColQwen2 give a page and a question one vector a token, DSE and GME one vector each. One score serves
both: for each vector of the question its best match on the page, summed (late interaction, ColPali, arXiv
2407.01449, section 3.2); with one vector each that is their dot product. The models come through
sentence-transformers, an extra: `pip install '.[dense]'`. It loads no code from a model's repository here.

Vectors of pages are kept on disk, in half precision, a safetensors file a document, named after the model and the
bytes of the pictures: a second run reads them, a changed picture or model does not find them. A page of ColQwen2
takes about 200 kB.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from data_construction.corpus.documents import Document
from mmr5_train.common.files import InputError, atomic_write, file_hash

Vectors = np.ndarray
"""(vectors, dimensions), float32: of one page or one question."""

ScorePages = Callable[[Document], list[list[float]]]
"""For each question of a document the scores of its pages, in page order."""


class Dense(BaseModel):
    """Config group `retriever`: a visual retriever."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["dense"]
    model: str = Field(description="hub name or folder, of a model that sentence-transformers loads")
    multi_vector: bool = Field(description="one vector a token (ColPali, ColQwen2), or one a page (DSE, GME)")
    index: Path = Field(description="folder where vectors of pages are kept")
    batch_size: int = Field(default=4, gt=0, description="pages at once")

    @property
    def inputs(self) -> list[Path]:
        """The files whose hashes stand in the manifest: none, the model is named in the config."""
        return []


@dataclass(frozen=True)
class Encoder:
    """What turns pictures and questions into vectors."""

    pages: Callable[[Sequence[Path]], list[Vectors]]
    questions: Callable[[Sequence[str]], list[Vectors]]


def load_encoder(config: Dense) -> Encoder:
    """The model. Raises `InputError` where sentence-transformers is not installed or can't load it."""
    try:
        from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    except ImportError as error:
        raise InputError(
            f"retriever=dense needs sentence-transformers 6.2 or newer ({error}): "
            "in the checkout, pip install '.[dense]'"
        ) from None
    try:
        model = (MultiVectorEncoder if config.multi_vector else SentenceTransformer)(config.model)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"retriever.model {config.model}: can't be loaded ({error})") from None

    def vectors(encoded: Sequence[Any]) -> list[Vectors]:
        return [np.atleast_2d(np.asarray(of_one, dtype=np.float32)) for of_one in encoded]

    options = {"batch_size": config.batch_size, "convert_to_numpy": True, "show_progress_bar": False}
    return Encoder(
        pages=lambda paths: vectors(model.encode_document([{"image": str(path)} for path in paths], **options)),
        questions=lambda texts: vectors(model.encode_query(list(texts), **options)),
    )


def open_dense(config: Dense) -> ScorePages:
    """Loads the model; the result scores one document after the other."""
    encoder = load_encoder(config)
    folder = config.index / model_folder(config.model)

    def score(document: Document) -> list[list[float]]:
        if not document.questions or not document.pages:
            return [[] for _ in document.questions]
        pages = page_vectors(document, encoder, folder)
        asked = encoder.questions([question.query for question in document.questions])
        return [[max_sim(question, page) for page in pages] for question in asked]

    return score


def max_sim(question: Vectors, page: Vectors) -> float:
    """The sum, over the vectors of the question, of the best dot product with a vector of the page."""
    return float((question @ page.T).max(axis=1).sum())


def page_vectors(document: Document, encoder: Encoder, folder: Path) -> list[Vectors]:
    """The vectors of each page of a document, from `folder` or from the encoder, which then writes them there.

    Raises `InputError` where the folder can't be written.
    """
    images = [Path(page.image) for page in document.pages]
    key = hashlib.sha256("".join(file_hash(image) for image in images).encode()).hexdigest()
    path = folder / f"{key[:32]}.safetensors"
    names = [str(page.page) for page in document.pages]
    try:
        kept = load_file(path)
        return [kept[name].astype(np.float32) for name in names]
    except (FileNotFoundError, SafetensorError, KeyError):  # absent, cut off, or other page numbers: made anew
        made = [vectors.astype(np.float16) for vectors in encoder.pages(images)]
    try:
        with atomic_write(path, "wb", sync=False) as stream:
            stream.write(save(dict(zip(names, made, strict=True))))
    except OSError as error:
        raise InputError(
            f"{folder}: vectors can't be written ({error.strerror}); choose another folder with retriever.index=…"
        ) from None
    return [vectors.astype(np.float32) for vectors in made]  # rounded as those on disk: the same scores next time


def model_folder(model: str) -> str:
    """A folder name for a model; of a model on disk, other weights give another name."""
    files = sorted(path for path in Path(model).rglob("*") if path.is_file()) if Path(model).is_dir() else []
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(f"{model} {stats}".encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', model)[-60:]}-{digest[:12]}"
