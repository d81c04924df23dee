from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_construction.first_stage.exclusion import normalize_name, read_excluded
from mmr5_train.common.files import InputError


@pytest.mark.parametrize(
    ("name", "normalized"),
    [
        ("Report 2020.PDF", "report 2020"),
        ("DUDE/Report 2020", "report 2020"),
        ("2303.08559v2.pdf", "2303.08559"),
        ("ArxivQA/2303.08559", "2303.08559"),
        ("plan v2.pdf", "plan v2"),
    ],
)
def test_normalize_name_drops_folder_suffix_and_version(name: str, normalized: str) -> None:
    assert normalize_name(name) == normalized


def test_reads_documents_and_annotations(tmp_path: Path) -> None:
    lines = [
        {"doc_name": "a.pdf", "sha256": "1", "split": "heldout", "domain": "d", "pages": 1},
        {"doc_name": "b.pdf", "sha256": "2", "split": "train", "domain": "d", "pages": 1},
    ]
    (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "annotations.jsonl").write_text(json.dumps({"doc_name": "C.pdf", "domain": "d", "questions": []}))
    excluded = read_excluded([tmp_path / "documents.jsonl", tmp_path / "annotations.jsonl"])
    assert (excluded.names, excluded.hashes) == ({"a", "c"}, {"1"})


def test_other_files_raise(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"query_id": "1"}')
    with pytest.raises(InputError, match=r"tasks.jsonl, line 1: field doc_name.*takes documents.jsonl"):
        read_excluded([tmp_path / "tasks.jsonl"])
    with pytest.raises(InputError, match="no such file"):
        read_excluded([tmp_path / "absent.jsonl"])
