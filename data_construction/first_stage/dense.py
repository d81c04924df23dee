"""Dense first stage: a visual retriever encodes the page images, and their vectors are compared here.

    python -m data_construction.candidates retriever=dense retriever.model=vidore/colqwen2-v1.0 …

ColPali and ColQwen2 encode a page or a question as one vector per token, DSE and GME as a single vector. The score
is the same for both: the maximum dot product over the page's vectors, summed over the question's vectors (late
interaction, ColPali, arXiv 2407.01449, section 3.2). With single vectors it is their dot product. The models are
loaded by sentence-transformers, an extra (`pip install '.[dense]'`), without code from the model's repository.

Page vectors are stored on disk in half precision, one safetensors file per document. Its name depends on the model
and the bytes of the images, so a second run reads the file, and a run with other images or another model does not.
A page of ColQwen2 takes about 200 kB.
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
"""Shape (vectors, dimensions), float32: the vectors of one page or one question."""

ScorePages = Callable[[Document], list[list[float]]]
"""Returns, for each question of a document, the scores of its pages in page order."""


class Dense(BaseModel):
    """Config group `retriever`: a visual retriever."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["dense"]
    model: str = Field(description="hub name or folder of a model that sentence-transformers can load")
    multi_vector: bool = Field(description="one vector per token (ColPali, ColQwen2), or one per page (DSE, GME)")
    index: Path = Field(description="folder where page vectors are stored")
    batch_size: int = Field(default=4, gt=0, description="pages per batch")

    @property
    def inputs(self) -> list[Path]:
        """The files whose hashes are written to the manifest: none, since the config names the model."""
        return []


@dataclass(frozen=True)
class Encoder:
    """Functions that encode page images and questions."""

    pages: Callable[[Sequence[Path]], list[Vectors]]
    questions: Callable[[Sequence[str]], list[Vectors]]


def load_encoder(config: Dense) -> Encoder:
    """Loads the model. Raises `InputError` if sentence-transformers is not installed or can't load it."""
    try:
        from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    except ImportError as error:
        raise InputError(
            f"retriever=dense needs sentence-transformers 6.2 or newer ({error}): "
            "in the checkout, pip install '.[dense]'"
        ) from None
    try:
        model: Any = (MultiVectorEncoder if config.multi_vector else SentenceTransformer)(config.model)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"retriever.model {config.model}: can't be loaded ({error})") from None

    def vectors(encoded: Sequence[Any]) -> list[Vectors]:
        return [np.atleast_2d(np.asarray(output, dtype=np.float32)) for output in encoded]

    options: dict[str, Any] = {
        "batch_size": config.batch_size,
        "convert_to_numpy": True,
        "show_progress_bar": False,
    }
    return Encoder(
        pages=lambda paths: vectors(model.encode_document([{"image": str(path)} for path in paths], **options)),
        questions=lambda texts: vectors(model.encode_query(list(texts), **options)),
    )


def open_dense(config: Dense) -> ScorePages:
    """Loads the model and returns the function that scores the pages of a document."""
    encoder = load_encoder(config)
    folder = config.index / model_folder(config.model)

    def score(document: Document) -> list[list[float]]:
        if not document.questions or not document.pages:
            return [[] for _ in document.questions]
        pages = page_vectors(document, encoder, folder)
        questions = encoder.questions([question.query for question in document.questions])
        return [[max_sim(question, page) for page in pages] for question in questions]

    return score


def max_sim(question: Vectors, page: Vectors) -> float:
    """Late interaction: the maximum dot product over the page's vectors, summed over the question's vectors."""
    return float((question @ page.T).max(axis=1).sum())


def page_vectors(document: Document, encoder: Encoder, folder: Path) -> list[Vectors]:
    """The vectors of each page of a document: read from `folder`, or encoded and then stored there.

    Raises `InputError` if the folder can't be written.
    """
    images = [Path(page.image) for page in document.pages]
    key = hashlib.sha256("".join(file_hash(image) for image in images).encode()).hexdigest()
    path = folder / f"{key[:32]}.safetensors"
    names = [str(page.page) for page in document.pages]
    try:
        stored = load_file(path)
        return [stored[name].astype(np.float32) for name in names]
    except (FileNotFoundError, SafetensorError, KeyError):  # no file, a truncated one, or other page numbers
        encoded = [vectors.astype(np.float16) for vectors in encoder.pages(images)]
    try:
        with atomic_write(path, "wb", sync=False) as stream:
            stream.write(save(dict(zip(names, encoded, strict=True))))
    except OSError as error:
        raise InputError(
            f"{folder}: vectors can't be written ({error.strerror}); choose another folder with retriever.index=…"
        ) from None
    # Rounded to half precision like the stored vectors, so that the next run has the same scores.
    return [vectors.astype(np.float32) for vectors in encoded]


def model_folder(model: str) -> str:
    """A folder name for a model. For a model on disk, it changes when the files change."""
    files = sorted(path for path in Path(model).rglob("*") if path.is_file()) if Path(model).is_dir() else []
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(f"{model} {stats}".encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', model)[-60:]}-{digest[:12]}"
