from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from candidates_runs import ALL_TRAIN, WORDS, run_candidates
from hypothesis import given
from hypothesis import strategies as st
from sample_corpora import (
    line,
    page_row,
    question,
    write_lines,
    write_parquet,
    write_pdf,
)

from data_construction.candidates import CandidatesStage, Split, main, split_documents
from data_construction.corpus.annotations import EvaluationSet
from data_construction.corpus.training_set import TrainingSet
from data_construction.first_stage.dense import Dense
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_manifest, read_records
from mmr5_train.ranking.records import SPLITS, Page, RankingTask, Skipped, SplitDocument


def read_all(path: Path, kind: type[Any]) -> list[Any]:
    return read_records(path, kind, unique=None) if path.read_text() else []


def test_heldout_keeps_every_question_and_all_gold_pages(orchard: Path) -> None:
    out = run_candidates(orchard)
    tasks = {task.query_id: task for task in read_records(out / "heldout.jsonl", RankingTask)}
    assert len(tasks) == 9
    assert [len(task.candidates) for task in tasks.values()] == [3] * 7 + [2] * 2
    assert tasks["fruit.pdf/4"].candidates[0].page == 4
    assert len(tasks["small.pdf/0"].positives) == 2
    assert tasks["fruit.pdf/0"].question_types == ("Table",)
    assert (out / "train.jsonl").read_text() == (out / "select.jsonl").read_text() == ""


def test_image_paths_are_relative_to_the_output_folder(orchard: Path) -> None:
    out = run_candidates(orchard, "deep/er/data")
    pages = read_records(out / "pages.jsonl", Page, unique="id")
    assert len(pages) == 9
    (task, *_) = read_records(out / "heldout.jsonl", RankingTask)
    for image in [page.image for page in pages] + [candidate.image for candidate in task.candidates]:
        assert not Path(image).is_absolute()
        assert (out / image).is_file()


def test_train_has_only_complete_tasks_with_a_relevant_candidate(orchard: Path) -> None:
    out = run_candidates(orchard, split=ALL_TRAIN)
    tasks = read_records(out / "train.jsonl", RankingTask)
    assert [task.query_id for task in tasks] == [f"fruit.pdf/{k}" for k in range(7)]
    assert [(s.query_id, s.reason, s.detail) for s in read_all(out / "skipped.jsonl", Skipped)] == [
        ("small.pdf/0", "fewer candidates than asked for", "2 of 3"),
        ("small.pdf/1", "fewer candidates than asked for", "2 of 3"),
    ]
    single = run_candidates(orchard, "single", split=ALL_TRAIN, candidates=1)
    skipped = read_all(single / "skipped.jsonl", Skipped)
    assert [(s.query_id, s.reason, s.detail) for s in skipped] == [
        ("small.pdf/1", "no relevant page among the candidates", "relevant: 1")
    ]
    assert read_manifest(single)["counts"]["skipped"] == {"no relevant page among the candidates": 1}


@pytest.mark.parametrize("split", ["train", "select"])
def test_missed_keep_keeps_questions_without_a_relevant_candidate(split: str, orchard: Path) -> None:
    only_split = {"train": 0, "select": 0, "heldout": 0, split: 1}
    out = run_candidates(orchard, "keep", split=only_split, candidates=1, missed="keep")
    assert "small.pdf/1" in {task.query_id for task in read_records(out / f"{split}.jsonl", RankingTask)}
    assert not read_all(out / "skipped.jsonl", Skipped)


def test_a_split_has_the_question_types_of_the_config(orchard: Path) -> None:
    annotations = orchard / "MMDocIR_annotations.jsonl"
    annotations.write_text(annotations.read_text().replace("Table", "Chart", 2))
    everything = {task.query_id: task for task in read_all(run_candidates(orchard) / "heldout.jsonl", RankingTask)}
    out = run_candidates(orchard, "tables", question_types={"heldout": ["Table"], "train": ["Chart"]})
    tables = {i: task for i, task in everything.items() if task.question_types == ("Table",)}
    assert {task.query_id: task for task in read_all(out / "heldout.jsonl", RankingTask)} == tables
    assert len(tables) == 7
    assert read_manifest(out)["counts"]["questions_of_other_types"] == {"heldout": 2}


def test_a_share_of_a_types_questions_is_kept_whatever_the_other_types(orchard: Path) -> None:
    annotations = orchard / "MMDocIR_annotations.jsonl"
    annotations.write_text(annotations.read_text().replace("Table", "Chart", 2))

    def kept(name: str, types: Any) -> dict[str, RankingTask]:
        out = run_candidates(orchard, name, question_types={"heldout": types})
        return {task.query_id: task for task in read_all(out / "heldout.jsonl", RankingTask)}

    all_tables, some = kept("all", ["Table"]), kept("some", {"Table": 0.5})
    assert 0 < len(some) < len(all_tables) == 7
    assert some.items() <= all_tables.items()
    both = kept("both", {"Chart": 1.0, "Table": 0.5})
    assert both.keys() == some.keys() | kept("charts", ["Chart"]).keys()
    with pytest.raises(InputError, match=r"question_types\.heldout\.Table"):
        kept("wrong", {"Table": 1.5})


def test_a_question_type_that_no_question_has_is_an_error(orchard: Path) -> None:
    with pytest.raises(InputError, match=r"question_types\.train: no question has the type 'Tabel' .*: Table\)"):
        run_candidates(orchard, question_types={"train": ["Table", "Tabel"]})


def test_n_heldout_sets_the_number_of_heldout_candidates(orchard: Path) -> None:
    tasks = read_records(run_candidates(orchard, n_heldout=6) / "heldout.jsonl", RankingTask)
    assert [len(task.candidates) for task in tasks] == [6] * 7 + [2] * 2


def test_candidates_follow_the_scores_of_a_file(orchard: Path) -> None:
    sizes = {"fruit.pdf": (7, 7), "small.pdf": (2, 2)}  # pages, questions
    with (orchard / "scores.jsonl").open("w") as stream:
        for name, (n_pages, n_questions) in sizes.items():
            for k in range(n_questions):
                for page in range(n_pages):
                    row = {"query_id": f"{name}/{k}", "doc_name": name, "page": page, "score": float(page)}
                    stream.write(json.dumps(row) + "\n")
    out = run_candidates(orchard, retriever={"name": "scores", "file": orchard / "scores.jsonl"})
    tasks = read_records(out / "heldout.jsonl", RankingTask)
    assert [candidate.page for candidate in tasks[0].candidates] == [6, 5, 4]
    assert str(orchard / "scores.jsonl") in read_manifest(out)["inputs"]


def test_first_stage_recall_is_reported(orchard: Path) -> None:
    results = json.loads((run_candidates(orchard) / "first_stage.json").read_text())
    # Each fruit question ranks its page first. In the small document, recall@1 is 1/2 for the first question
    # (two relevant pages) and 0 for the second (page 0 is ranked before page 1).
    assert results["questions"] == 9
    assert results["eligible"] == 9
    assert results["micro"]["recall@1"] == pytest.approx(7.5 / 9)
    assert results["macro"]["recall@3"] == 1


def test_the_same_seed_gives_the_same_bytes(orchard: Path) -> None:
    split = {"train": 0.5, "select": 0, "heldout": 0.5}
    first, second = run_candidates(orchard, split=split), run_candidates(orchard, "second", split=split)
    for name in ("pages", "train", "select", "heldout", "documents", "skipped"):
        assert (first / f"{name}.jsonl").read_bytes() == (second / f"{name}.jsonl").read_bytes()


def test_pages_are_rendered_once(orchard: Path) -> None:
    run_candidates(orchard)
    files = {path: path.stat().st_ino for path in (orchard / "cache").rglob("*.jpg")}
    assert len(files) == 9
    again = run_candidates(orchard, "again", candidates=2)
    assert {path: path.stat().st_ino for path in (orchard / "cache").rglob("*.jpg")} == files
    assert len(read_records(again / "pages.jsonl", Page, unique="id")) == 9


def test_documents_record_their_split_and_hash(tmp_path: Path) -> None:
    names = [f"d{i}" for i in range(8)]
    write_lines(tmp_path, *(line(f"{name}.pdf", None, question("Where are the figs?", [0])) for name in names))
    for i, name in enumerate(names):
        write_pdf(tmp_path / f"documents/{name}.pdf", [f"figs {i}", "one", "two"])
    for name in ("d1", "d2", "d3"):  # copies under other names
        shutil.copy(tmp_path / "documents/d0.pdf", tmp_path / f"documents/{name}.pdf")
    out = run_candidates(tmp_path, split={"train": 0.5, "select": 0.25, "heldout": 0.25})
    documents = read_records(out / "documents.jsonl", SplitDocument, unique="doc_name")
    assert [document.doc_name for document in documents] == [f"{name}.pdf" for name in names]
    twins = [document for document in documents if document.doc_name[:2] in ("d0", "d1", "d2", "d3")]
    assert len({document.sha256 for document in twins}) == len({document.split for document in twins}) == 1
    assert read_manifest(out)["counts"]["documents_equal_to_another"] == 3
    for split in SPLITS:
        in_split = {document.doc_name for document in documents if document.split == split}
        names = {task.query_id.rpartition("/")[0] for task in read_all(out / f"{split}.jsonl", RankingTask)}
        assert names <= in_split


@given(
    st.dictionaries(st.text(min_size=1, max_size=5), st.sampled_from("uvwxyz"), min_size=1, max_size=30),
    st.sampled_from([(0.5, 0.25, 0.25), (0, 0, 1), (1, 0, 0), (0.7, 0.2, 0.1)]),
    st.integers(0, 5),
)
def test_equal_documents_share_a_split(hashes: dict[str, str], shares: tuple[float, ...], seed: int) -> None:
    split = Split(train=shares[0], select=shares[1], heldout=shares[2])
    placed = split_documents(hashes, split, seed)
    assert placed.keys() == hashes.keys()
    for content in set(hashes.values()):
        assert len({placed[name] for name in hashes if hashes[name] == content}) == 1
    for name, share in zip(SPLITS, shares, strict=True):
        assert share > 0 or name not in placed.values()


def test_splits_have_the_configured_shares() -> None:
    hashes = {f"d{i}": str(i) for i in range(100)}
    split = Split(train=0.7, select=0.2, heldout=0.1)
    counts = Counter(split_documents(hashes, split, 1).values())
    assert counts == {"train": 70, "select": 20, "heldout": 10}
    assert split_documents(hashes, split, 1) != split_documents(hashes, split, 2)


@pytest.mark.parametrize(
    "split",
    [{"train": 0.5}, {"train": 0.8, "select": 0.3, "heldout": 0.3}, {"train": -1, "select": 1, "heldout": 1}],
)
def test_invalid_shares_raise(tmp_path: Path, split: dict[str, float]) -> None:
    with pytest.raises(
        InputError, match=r"split(: .*must be 1, found 1.4|\.train: .*greater|\.select: Field required)"
    ):
        run_candidates(tmp_path, split=split)


def test_corpus_without_usable_questions_raises(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a.pdf", 3, question("Q?", [0]), question("", [0])), line("b.pdf", 3))
    (tmp_path / "documents").mkdir()
    with pytest.raises(InputError, match=r"no question can be used: document can't be read \(3\); question can't"):
        run_candidates(tmp_path)
    assert not json.loads((tmp_path / "data/manifest.json").read_text())["finished"]
    write_lines(tmp_path, line("b.pdf", 1))
    write_pdf(tmp_path / "documents/b.pdf", ["figs"])
    with pytest.raises(InputError, match=r"no question can be used: the corpus has no questions"):
        run_candidates(tmp_path, "other")


def test_output_folder_is_protected(orchard: Path) -> None:
    run_candidates(orchard)
    with pytest.raises(InputError, match=r"data: is not empty; choose another folder with out="):
        run_candidates(orchard)
    run_candidates(orchard, overwrite=True)
    with pytest.raises(InputError, match=r"orchard: contains .*orchard.*choose another folder|no manifest.json"):
        run_candidates(orchard, ".", overwrite=True)
    shutil.copy(orchard / "data/manifest.json", orchard / "manifest.json")
    with pytest.raises(InputError, match=r"orchard, which this stage reads; choose another out="):
        run_candidates(orchard, ".", overwrite=True)
    assert (orchard / "documents/fruit.pdf").is_file()
    with pytest.raises(InputError, match="can't be used as an output folder"):
        run_candidates(orchard, "documents/fruit.pdf/data")


def test_input_errors_come_before_the_output_folder_is_created(orchard: Path) -> None:
    for more in (
        {"pages": "nothing"},
        {"retriever": {"name": "scores", "file": orchard / "absent.jsonl"}},
    ):
        with pytest.raises(InputError, match="no such file"):
            run_candidates(orchard, **more)
    assert not (orchard / "data").exists()


def test_reads_a_page_parquet(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a.pdf", 4, question("Where are the figs?", [2])))
    rows = [page_row("a", i, text) for i, text in enumerate(["dates", "", "figs", "limes"])]
    write_parquet(tmp_path / "pages.parquet", rows)
    out = run_candidates(tmp_path, pages="pages.parquet")
    (task,) = read_records(out / "heldout.jsonl", RankingTask)
    assert [candidate.page for candidate in task.candidates] == [2, 0, 3]
    assert str(tmp_path / "pages.parquet") in read_manifest(out)["inputs"]


def test_candidates_are_made_from_a_pdf_folder(tmp_path: Path) -> None:
    write_pdf(tmp_path / "pdfs/fruit.pdf", [f"A page about {word}" for word in WORDS])
    (tmp_path / "q.csv").write_text("question,document,pages\nWhere are the pears?,fruit.pdf,2\n")
    choices = ["corpus=pdf_folder", f"corpus.folder={tmp_path}/pdfs", f"corpus.questions={tmp_path}/q.csv"]
    choices += [
        f"corpus.page_cache={tmp_path}/cache",
        f"out={tmp_path}/data",
        "split={train:0,select:0,heldout:1}",
    ]
    main(compose_stage(CandidatesStage, "candidates", choices))
    (task,) = read_records(tmp_path / "data/heldout.jsonl", RankingTask)
    assert task.query_id == "fruit.pdf/2"
    assert task.candidates[0].page == task.positives[0].page == 1
    assert list(read_manifest(tmp_path / "data")["inputs"]) == [str(tmp_path / "q.csv")]


def test_full_disk_raises_and_keeps_page_images(orchard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    calls, sync = itertools.count(), os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: full(file) if next(calls) else sync(file)
    )  # fails from the second call
    with pytest.raises(InputError, match=r"jsonl: the disk is full; free some space"):
        run_candidates(orchard)
    assert len(list((orchard / "cache").rglob("*.jpg"))) == 9
    monkeypatch.undo()
    assert run_candidates(orchard, overwrite=True).is_dir()


def test_command_line_prints_one_summary_line(orchard: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "data_construction.candidates",
        "corpus=mmdocir_pdf",
        f"corpus.folder={orchard}",
    ]
    command += [f"corpus.page_cache={orchard}/cache", f"out={orchard}/data", "candidates=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1  # one summary line; the progress bar goes to stderr
    assert done.stdout.startswith("candidates: train ")


def test_every_corpus_and_retriever_config_composes() -> None:
    for name in ("synthetic", "mmdocir", "mmdocir_pdf", "mmdocir_train"):
        config = compose_stage(CandidatesStage, "candidates", [f"corpus={name}"])
        assert isinstance(config.corpus, TrainingSet if name == "mmdocir_train" else EvaluationSet)
        # Published data sets keep the size of their pages. The synthetic corpus has a fixed one.
        assert config.corpus.max_side == (1024 if name == "synthetic" else None)
    with pytest.raises(InputError, match=r"no value for corpus.folder, corpus.questions"):
        compose_stage(CandidatesStage, "candidates", ["corpus=pdf_folder"])
    dense = compose_stage(CandidatesStage, "candidates", ["retriever=dense"]).retriever
    assert isinstance(dense, Dense)
    scores = compose_stage(CandidatesStage, "candidates", ["retriever=scores", "retriever.file=a.trec"])
    assert scores.retriever.inputs == [Path("a.trec")]


# Micro and macro recall of BM25 that the benchmark's own metric code gives on the slice.
SLICE_MICRO = {1: 0.2825, 3: 0.4684, 5: 0.5669, 10: 0.6813, 20: 0.9218}
SLICE_MACRO = {1: 0.2842, 3: 0.4425, 5: 0.5266, 10: 0.6407, 20: 0.9195}


def test_bm25_recall_on_the_mmdocir_slice(slice_folder: Path, tmp_path: Path) -> None:
    corpus = {
        "format": "mmdocir",
        "folder": slice_folder,
        "pages": "documents",
        "descriptions": False,
        "page_cache": tmp_path / "cache",
    }
    out = run_candidates(tmp_path, corpus={**corpus, "max_side": 32}, candidates=5)
    results = json.loads((out / "first_stage.json").read_text())
    assert results["questions"] == 178
    assert results["eligible"] >= 117
    for k, value in SLICE_MICRO.items():
        assert results["micro"][f"recall@{k}"] > value - 0.01
    for k, value in SLICE_MACRO.items():
        assert results["macro"][f"recall@{k}"] > value - 0.01
    assert len(read_records(out / "pages.jsonl", Page, unique="id")) == 729
    assert len(read_records(out / "heldout.jsonl", RankingTask)) == 178
    assert (out / "skipped.jsonl").read_text() == ""
    assert len(os.listdir(tmp_path / "cache")) == 25
