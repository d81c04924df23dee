"""Training on held-out documents and evaluation on training documents are refused."""

import json

import pytest

from mmr5_train.common.files import MANIFEST, InputError, write_manifest, write_records
from mmr5_train.evaluation.splits import check_split, known_splits
from mmr5_train.ranking.records import SplitDocument


def write_documents(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    documents = [
        SplitDocument(doc_name=name, domain="d", split=split, pages=3, sha256="0")
        for name, split in splits.items()
    ]
    write_records(folder / "documents.jsonl", documents)


@pytest.fixture
def chain(tmp_path):
    """data/ → select/ → evaluation/rankings/, as their manifests say, and a second corpus for select."""
    write_documents(tmp_path / "data", a="train", b="select", c="heldout")
    write_documents(tmp_path / "more", d="heldout")
    for folder, *inputs in (
        ("select", "data/select.jsonl", "more/select.jsonl"),
        ("evaluation", "select/questions.jsonl"),
    ):
        (tmp_path / folder).mkdir()
        for name in inputs:
            (tmp_path / name).touch()
        write_manifest(tmp_path / folder, stage=folder, config={}, inputs=[tmp_path / name for name in inputs])
    (tmp_path / "evaluation/rankings").mkdir()
    return tmp_path


@pytest.mark.parametrize("file", ["select/questions.jsonl", "evaluation/rankings/teacher.jsonl"])
def test_splits_are_found_through_the_manifests(chain, file):
    assert known_splits(chain / file) == {"a": "train", "b": "select", "c": "heldout", "d": "heldout"}
    assert known_splits(chain / "data/train.jsonl") == {"a": "train", "b": "select", "c": "heldout"}


def test_files_of_unknown_origin_have_no_splits(tmp_path):
    assert known_splits(tmp_path / "own/questions.jsonl") == {}
    for content in ("not JSON", json.dumps({"inputs": 3}), json.dumps([])):
        (tmp_path / MANIFEST).write_text(content)
        assert known_splits(tmp_path / "questions.jsonl") == {}
    write_manifest(tmp_path, stage="x", config={}, inputs=[])
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "inputs": {str(tmp_path / "itself.jsonl"): "0"}}))
    assert known_splits(tmp_path / "questions.jsonl") == {}


@pytest.mark.parametrize(
    ("documents", "training", "split"),
    [
        ("abc", True, "heldout, such as c"),
        ("cd", True, "heldout, such as c"),
        ("ac", False, "train, such as a"),
        ("b", False, "select"),
    ],
)
def test_a_use_that_a_split_is_not_for_is_refused(chain, documents, training, split):
    data = chain / "select/questions.jsonl"
    with pytest.raises(
        InputError, match=rf"questions\.jsonl: \d of {len(documents)} documents are in the split {split}"
    ):
        check_split(data, documents, training=training, any_split=False)
    check_split(data, documents, training=training, any_split=True)


def test_right_and_unknown_documents_are_allowed(chain):
    data = chain / "select/questions.jsonl"
    check_split(data, ["a", "b", "other"], training=True, any_split=False)
    check_split(data, ["c", "d", "other"], training=False, any_split=False)
