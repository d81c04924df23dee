"""Refuses to train on held-out documents, and to evaluate on documents that training may have seen.

`candidates` writes the split of each document to documents.jsonl. A data file belongs to the documents.jsonl in
its folder, or in the folders of the files that it was made from, as their manifests say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from mmr5_train.common.files import MANIFEST, InputError, read_records
from mmr5_train.ranking.records import SplitDocument

DOCUMENTS = "documents.jsonl"


def known_splits(data: Path) -> dict[str, str]:
    """Document → split, for all documents of the corpora that a data file was made from. Empty if unknown."""
    splits: dict[str, str] = {}
    for path in _documents_files(data):
        splits |= {
            document.doc_name: document.split for document in read_records(path, SplitDocument, unique="doc_name")
        }
    return splits


def _documents_files(data: Path) -> Iterator[Path]:
    folders, seen = [data.parent, data.parent.parent], set[Path]()  # rankings are in a subfolder of their stage's
    while folders:
        folder = folders.pop(0).resolve()
        if folder in seen:
            continue
        seen.add(folder)
        if (folder / DOCUMENTS).is_file():
            yield folder / DOCUMENTS
        else:
            folders += _input_folders(folder)


def _input_folders(folder: Path) -> list[Path]:
    """The folders of the files that the stage of this folder read. Empty without a readable manifest."""
    try:
        inputs = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["inputs"]
        return [Path(path).parent for path in inputs]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def check_split(data: Path, documents: Iterable[str], *, training: bool, any_split: bool) -> None:
    """Raises `InputError` if a document is in a split that is not for this use, unless `any_split`.

    Training is for all splits but heldout, evaluation for heldout only. Documents of unknown split are allowed.
    """
    if any_split:
        return
    names, splits = set(documents), known_splits(data)
    wrong = sorted(name for name in names if name in splits and (splits[name] == "heldout") == training)
    if wrong:
        use = "trains, and later figures on them would be too good" if training else "evaluates"
        raise InputError(
            f"{data}: {len(wrong)} of {len(names)} documents are in the split {splits[wrong[0]]}, such as "
            f"{wrong[0]}, but this stage {use}; choose another file, or set any_split=true"
        )
