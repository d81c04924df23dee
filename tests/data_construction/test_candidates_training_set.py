"""Candidates from the training set's format, scores from MM-R5's JSON, and excluded documents."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from candidates_runs import ALL_HELDOUT, ALL_TRAIN, WORDS, run_candidates
from sample_corpora import image_bytes, train_line, train_page, write_subset

from mmr5_train.common.files import InputError, read_manifest, read_records
from mmr5_train.ranking.records import Page, RankingTask


@pytest.fixture
def training_set(tmp_path: Path) -> Path:
    """Two subsets with the same query ids: a document of eight pages each, every page with its own word."""
    folder = tmp_path / "training"
    for subset, red in (("DUDE", 0), ("Wiki-ss", 200)):
        rows = [
            train_page("fruit", i, f"{subset} page on {word}", image_bytes(f"rgb({red}, 0, {20 * i})"))
            for i, word in enumerate((*WORDS, "nuts"))
        ]
        lines = [train_line(i, f"Where are the {word}?", ("fruit", i)) for i, word in enumerate(WORDS)]
        write_subset(folder, subset, rows, lines, struct=subset == "DUDE")
    return folder


def run_training(folder: Path, name: str = "data", **more: Any) -> Path:
    corpus = {"format": "mmdocir_train", "subsets": ["DUDE", "Wiki-ss"], "folder": folder}
    corpus["page_cache"] = folder / "cache"
    return run_candidates(folder, name, **({"corpus": corpus, "split": ALL_TRAIN, "candidates": 5} | more))


def test_training_set_becomes_tasks(training_set: Path) -> None:
    out = run_training(training_set)
    tasks = read_records(out / "train.jsonl", RankingTask)
    assert [task.query_id for task in tasks] == [
        f"{subset}/{i}" for subset in ("DUDE", "Wiki-ss") for i in range(7)
    ]
    assert [str(task.candidates[0].id) for task in tasks[:2]] == ["DUDE/fruit#0", "DUDE/fruit#1"]
    assert {task.domain for task in tasks} == {"DUDE", "Wiki-ss"}
    assert all((out / candidate.image).is_file() for candidate in tasks[0].candidates)
    manifest = read_manifest(out)
    assert manifest["counts"]["pages"] == 16
    assert len(manifest["inputs"]) == 2
    assert not (out / ".ranked.jsonl").exists()


def test_candidates_follow_mm_r5_scores_and_the_policy(training_set: Path) -> None:
    """The relevant page has the lowest score; the policy decides whether it becomes a candidate."""
    for subset in ("DUDE", "Wiki-ss"):
        scores = {
            str(i): [
                {
                    "image_path": f"img/fruit_{page}.jpg",
                    "query": "Where?",
                    "tag": "positive" if page == i else "negative",
                    "score": -1 if page == i else page,
                }
                for page in range(8)
            ]
            for i in range(7)
        }
        (training_set / f"scores/{subset}.json").parent.mkdir(exist_ok=True)
        (training_set / f"scores/{subset}.json").write_text(json.dumps(scores))
    settings = {"retriever": {"name": "scores", "file": training_set / "scores"}, "candidates": 3}
    policies = {"all_relevant": {"rule": "all_relevant"}, "inserted": {"insert_missed": True}}
    for name, policy in policies.items():
        out = run_training(training_set, name, policy=policy, **settings)
        first = read_records(out / "train.jsonl", RankingTask)[0]
        assert [candidate.page for candidate in first.candidates] == [7, 6, 0]
        assert [candidate.score for candidate in first.candidates] == [7, 6, -1]
    out = run_training(training_set, "top", **settings)
    assert (out / "train.jsonl").read_text() == ""
    select = {"train": 0, "select": 1, "heldout": 0}
    out = run_training(training_set, "select", policy={"insert_missed": True}, **settings | {"split": select})
    assert (out / "select.jsonl").read_text() == ""  # insert_missed is for train only
    heldout = run_training(
        training_set, "heldout", policy={"rule": "all_relevant"}, **settings | {"split": ALL_HELDOUT}
    )
    assert [c.page for c in read_records(heldout / "heldout.jsonl", RankingTask)[0].candidates] == [7, 6, 5]
    assert len(read_manifest(out)["inputs"]) == 4


def test_excluded_documents_are_skipped(training_set: Path, orchard: Path) -> None:
    heldout = run_training(training_set, "heldout", split=ALL_HELDOUT)
    lines = (heldout / "documents.jsonl").read_text().splitlines()
    renamed = json.loads(lines[0]) | {"doc_name": "another name.pdf"}
    (training_set / "by_content.jsonl").write_text(json.dumps(renamed) + "\n")
    out = run_training(training_set, "data", exclude=[training_set / "by_content.jsonl"])
    tasks = read_records(out / "train.jsonl", RankingTask)
    assert {task.domain for task in tasks} == {"Wiki-ss"}
    assert {page.doc_name for page in read_records(out / "pages.jsonl", Page, unique="id")} == {"Wiki-ss/fruit"}
    counts = read_manifest(out)["counts"]
    assert list(counts["documents_excluded"].values()) == [0, 1]
    assert counts["skipped"] == {"kept for evaluation: the same content": 8}  # the document and its questions
    with pytest.raises(InputError, match=r"no question can be used: kept for evaluation: the same name \(16\)"):
        run_training(training_set, "none", exclude=[orchard / "MMDocIR_annotations.jsonl"])


def test_questions_are_drawn_after_the_filter(training_set: Path) -> None:
    """In each subset, three questions have no relevant candidate. The other four are drawn."""
    for subset in ("DUDE", "Wiki-ss"):
        path = training_set / f"annotations_top1_negative/{subset}_train.jsonl"
        lines = path.read_text().splitlines()
        missed = [json.loads(line) | {"query": "Where are the nuts?"} for line in lines[:3]]
        path.write_text("\n".join([*map(json.dumps, missed), *lines[3:]]) + "\n")
    settings = {"candidates": 1, "train_per_domain": 4}
    out = run_training(training_set, "drawn", **settings)
    tasks = read_records(out / "train.jsonl", RankingTask)
    assert Counter(task.domain for task in tasks) == {"DUDE": 4, "Wiki-ss": 4}
    assert read_manifest(out)["counts"]["train_not_drawn"] == {}
    fewer = run_training(training_set, "fewer", **settings | {"train_per_domain": 3})
    counts = read_manifest(fewer)["counts"]
    assert counts["questions"] == {"train": 6, "select": 0, "heldout": 0}
    assert counts["train_not_drawn"] == {"DUDE": 1, "Wiki-ss": 1}
    assert counts["questions_by_domain"]["train"] == {"DUDE": 3, "Wiki-ss": 3}
    drawn = read_records(fewer / "train.jsonl", RankingTask)
    assert [task.query_id for task in drawn] == [task.query_id for task in tasks if task in drawn]
