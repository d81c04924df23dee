"""Candidates from all documents of a split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from candidates_runs import WORDS, run_candidates
from hypothesis import given
from hypothesis import strategies as st
from sample_corpora import line, question, train_line, train_page, write_lines, write_pdf, write_subset

from data_construction.candidates import CandidatesStage, main
from data_construction.corpus.documents import Document
from data_construction.first_stage.bm25 import rank_by_bm25
from data_construction.first_stage.corpus_scope import CorpusIndex, best
from mmr5_train.common.config import validate
from mmr5_train.common.files import InputError, read_manifest, read_records
from mmr5_train.ranking.records import Page, PageId, Question, RankingTask, Skipped, SplitDocument

CORPUS = {"name": "bm25", "scope": "corpus"}


def test_a_question_finds_pages_of_other_documents(orchard: Path) -> None:
    out = run_candidates(orchard, retriever=CORPUS)
    tasks = {task.query_id: task for task in read_records(out / "heldout.jsonl", RankingTask)}
    assert len(tasks) == 9
    pears = tasks["small.pdf/0"].candidates
    assert [str(page.id) for page in pears[:2]] == ["small.pdf#0", "fruit.pdf#1"], "shorter pages first"
    assert pears[0].score > pears[1].score > pears[2].score == 0
    assert [str(page.id) for page in tasks["fruit.pdf/4"].candidates[:1]] == ["fruit.pdf#4"]
    assert all((out / page.image).is_file() for task in tasks.values() for page in task.candidates)
    results = json.loads((out / "first_stage.json").read_text())
    assert (results["scope"], results["questions"], results["unmatched"]) == ("corpus", 9, 1)
    assert results["within_document"]["scope"] == "document"
    assert results["within_document"]["micro"]["recall@1"] >= results["micro"]["recall@1"] > 0.5
    assert not (out / ".ranked.jsonl").exists()
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == []


def test_no_candidate_is_of_another_split(tmp_path: Path) -> None:
    names = [f"doc{i}" for i in range(8)]
    write_lines(tmp_path, *(line(f"{name}.pdf", 2, question("Where are the apples?", [0])) for name in names))
    for i, name in enumerate(names):
        write_pdf(tmp_path / f"documents/{name}.pdf", [f"apples {name} {WORDS[i % 7]}", f"other {name}"])
    split = {"train": 0.5, "select": 0.25, "heldout": 0.25}
    out = run_candidates(tmp_path, retriever=CORPUS, split=split, candidates=2, missed="keep")
    split_of = {
        d.doc_name: d.split for d in read_records(out / "documents.jsonl", SplitDocument, unique="doc_name")
    }
    assert sorted(split_of.values()) == ["heldout"] * 2 + ["select"] * 2 + ["train"] * 4
    for name in ("train", "select", "heldout"):
        tasks = read_records(out / f"{name}.jsonl", RankingTask)
        assert {split_of[page.doc_name] for task in tasks for page in task.candidates} == {name}
        assert len({page.doc_name for task in tasks for page in task.candidates}) == 2


def test_one_document_ranks_as_within_the_document(tmp_path: Path) -> None:
    texts = ["solar capacity rose", "water use fell", "solar capacity and solar panels", ""]
    pages = tuple(
        Page(doc_name="a", page=i, domain="d", image=f"{i}.jpg", width=1, height=1, text=text)
        for i, text in enumerate(texts)
    )
    asked = Question(
        query_id="0", query="solar panels?", doc_name="a", domain="d", positives=(PageId(doc_name="a", page=0),)
    )
    [within] = rank_by_bm25(Document("a", "d", 4, "hash", pages, (asked,)))
    index = CorpusIndex(texts, tmp_path)
    [scores, none] = index.scores([asked.query, "nothing of this"])
    assert [(page.page, pytest.approx(score)) for page, score in within] == [
        (i, float(scores[i])) for i in best(scores, 4)
    ]
    assert not none.any()
    assert any(tmp_path.iterdir()), "the index is on disk"


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, 3.0]), min_size=1, max_size=30), st.integers(1, 40))
def test_best_is_a_stable_sort(scores: list[float], n: int) -> None:
    expected = sorted(range(len(scores)), key=lambda i: -scores[i])[:n]
    assert best(np.array(scores, dtype=np.float32), n) == expected


def test_texts_without_a_word_give_zero_scores(tmp_path: Path) -> None:
    [scores] = CorpusIndex(["", " "], tmp_path).scores(["anything"])
    assert scores.tolist() == [0, 0]


def training_set(folder: Path, scope: str, split: dict[str, float]) -> Path:
    rows = [train_page(name, page, f"{name} text {page}") for name in "abcd" for page in range(3)]
    lines = [
        train_line(0, "Where is a text?", ("a", 0), ("b", 1)),
        train_line(1, "Where is c text?", ("c", 0)),
        train_line(2, "Where is d text?", ("d", 0), ("absent", 0)),
    ]
    write_subset(folder, "DUDE", rows, lines)
    corpus = {"format": "mmdocir_train", "folder": folder, "page_cache": folder / "cache", "subsets": ["DUDE"]}
    out = folder / scope
    retriever = {"name": "bm25", "scope": scope}
    main(
        validate(
            CandidatesStage,
            {"out": out, "corpus": corpus, "retriever": retriever, "candidates": 3, "split": split},
        )
    )
    return out


def test_questions_about_several_documents_are_kept(tmp_path: Path) -> None:
    all_heldout = {"train": 0, "select": 0, "heldout": 1}
    out = training_set(tmp_path, "corpus", all_heldout)
    first, second = read_records(out / "heldout.jsonl", RankingTask)
    assert [str(page) for page in first.positives] == ["DUDE/a#0", "DUDE/b#1"]
    assert {page.doc_name for page in first.candidates} == {"DUDE/a"}, "the word a is on its pages only"
    assert second.query_id == "DUDE/1"
    assert {d.doc_name for d in read_records(out / "documents.jsonl", SplitDocument, unique="doc_name")} == {
        f"DUDE/{n}" for n in "abcd"
    }
    skipped = {skip.query_id: skip.reason for skip in read_records(out / "skipped.jsonl", Skipped, unique=None)}
    assert skipped["DUDE/2"] == "relevant pages not all in one split, or not shown"

    within = training_set(tmp_path, "document", all_heldout)
    assert [task.query_id for task in read_records(within / "heldout.jsonl", RankingTask)] == ["DUDE/1"]
    assert read_manifest(within)["counts"]["skipped"]["relevant pages in several documents"] == 2


def test_a_question_about_documents_of_two_splits_is_skipped(tmp_path: Path) -> None:
    out = training_set(tmp_path, "corpus", {"train": 0.5, "select": 0, "heldout": 0.5})
    split_of = {
        d.doc_name: d.split for d in read_records(out / "documents.jsonl", SplitDocument, unique="doc_name")
    }
    reasons = {skip.query_id: skip.reason for skip in read_records(out / "skipped.jsonl", Skipped, unique=None)}
    assert ("DUDE/0" in reasons) == (split_of["DUDE/a"] != split_of["DUDE/b"])


def test_scores_from_files_have_no_corpus_scope(orchard: Path) -> None:
    with pytest.raises(InputError, match=r"retriever.scope=corpus is only for retriever=bm25"):
        run_candidates(orchard, retriever={"name": "scores", "file": "x.jsonl", "scope": "corpus"})
