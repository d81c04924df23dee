"""The benchmark of the first stage at a small size."""

import bench_retrieval
import pytest
from candidates_runs import run_candidates, write_orchard


@pytest.fixture
def orchard(tmp_path):
    return write_orchard(tmp_path / "orchard")


def test_a_page_is_found_by_its_words(tmp_path):
    row = bench_retrieval.million(None, tmp_path, 300)
    assert row["pages"] == 300
    assert row["gold_first"] > 0.95
    assert row["disk_mib"] > 0
    assert row["peak_mib"] >= row["texts_mib"] > 0
    [target] = bench_retrieval.targets({"million": row})
    assert target["met"]


def test_recall_is_that_of_the_named_documents(orchard):
    out = run_candidates(orchard)
    recall = bench_retrieval.document_recall(out, {"small.pdf"})
    assert recall["questions"] == 2
    assert recall["recall@1"] == pytest.approx((0.5 + 0) / 2)
    assert bench_retrieval.document_recall(out, {"fruit.pdf"})["questions"] == 7


def test_scopes_are_compared_on_the_slice(orchard, tmp_path):
    row = bench_retrieval.scopes(orchard, tmp_path, 0)
    assert row["questions"] == 9
    assert row["document"]["recall@1"] >= row["corpus"]["recall@1"] > 0


def test_targets_need_the_published_recall_and_a_gain():
    result = {
        "scopes": {"document": {**bench_retrieval.WITHIN_DOCUMENT, "recall@3": 0.4}},
        "ocr": {"before": {"recall@1": 0.1}, "after": {"recall@1": 0.12}},
    }
    verdicts = [target["met"] for target in bench_retrieval.targets(result)]
    assert verdicts == [True, False, True, True, True, False]
