"""From a corpus to ranking tasks: page pictures, the first stage's candidates, and splits by document.

    python -m data_construction.candidates corpus=synthetic out=outputs/data

Reads a corpus folder (config group `corpus`), ranks the pages of each question's document (config group
`retriever`), and writes into `out`:

- pages.jsonl: every page (`Page`), its picture in the page cache;
- train.jsonl, select.jsonl, heldout.jsonl: `RankingTask` records, for SFT, GRPO and evaluation. The first two
  hold only questions with as many candidates as asked for, one of them relevant; with `missed: keep` also those
  whose relevant pages the first stage missed. heldout holds every question, since recall divides by all gold
  pages;
- documents.jsonl: `SplitDocument`; documents are split, never questions, and equal documents stay together;
- skipped.jsonl: `Skipped`, all that was left out and why;
- first_stage.json: recall of the first stage over all questions; manifest.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tqdm import tqdm

from data_construction.corpus.annotations import Corpus, read_annotations
from data_construction.corpus.mmdocir import Document, read_documents
from data_construction.first_stage import RankDocument, Retriever, open_retriever
from mmr5_train.config import StageConfig, run_stage
from mmr5_train.ranking.files import (
    InputError,
    open_output,
    whole_file,
    write_json,
    write_manifest,
    write_records,
)
from mmr5_train.ranking.metrics import macro, micro, recall_at_k
from mmr5_train.ranking.records import (
    SPLITS,
    Candidate,
    Question,
    RankingTask,
    Skipped,
    SplitDocument,
    rebase_images,
)

FIRST_STAGE_KS = (1, 3, 5, 10, 20)

SplitName = Literal["train", "select", "heldout"]


class Split(BaseModel):
    """Shares of the documents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: float = Field(ge=0, le=1)
    select: float = Field(ge=0, le=1)
    heldout: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _is_a_whole(self) -> Self:
        total = self.train + self.select + self.heldout
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + select + heldout must be 1, found {total:g}")
        return self


class CandidatesStage(StageConfig):
    """`python -m data_construction.candidates` (configs/candidates.yaml)."""

    corpus: Corpus
    retriever: Retriever
    candidates: int = Field(default=5, gt=0, description="first-stage pages a question")
    n_heldout: int | None = Field(default=None, gt=0, description="the same for heldout; None: `candidates`")
    split: Split
    missed: Literal["drop", "keep"] = Field(
        default="drop",
        description="train and select questions without a relevant candidate: left out (as in MM-R5), or kept, "
        "to teach what to say when no page helps",
    )


@dataclass(frozen=True)
class RankedQuestion:
    """A question with its best candidates and the first stage's recall at each of FIRST_STAGE_KS."""

    question: Question
    candidates: tuple[Candidate, ...]
    recall: tuple[float, ...]


def split_documents(hashes: dict[str, str], split: Split, seed: int) -> dict[str, SplitName]:
    """doc_name → "train", "select" or "heldout", for document names with their content hashes.

    The order in which documents are dealt out depends on the seed and each name alone; equal documents go
    where the first of them goes.
    """
    shuffled = sorted(hashes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    twins: dict[str, list[str]] = {}
    for name in shuffled:
        twins.setdefault(hashes[name], []).append(name)
    train_end = round(split.train * len(hashes))
    select_end = round((split.train + split.select) * len(hashes))
    placed: dict[str, SplitName] = {}
    for names in twins.values():
        at = len(placed)
        name_of_split: SplitName = "train" if at < train_end else "select" if at < select_end else "heldout"
        placed |= dict.fromkeys(names, name_of_split)
    return placed


def rank_questions(document: Document, rank: RankDocument, keep: int) -> list[RankedQuestion]:
    """The first `keep` pages for each question of a document."""
    ranked_questions = []
    for question, ranked in zip(document.questions, rank(document), strict=True):
        order = [page.id for page, _ in ranked]
        ranked_questions.append(
            RankedQuestion(
                question=question,
                candidates=tuple(
                    Candidate(doc_name=page.doc_name, page=page.page, image=page.image, score=score)
                    for page, score in ranked[:keep]
                ),
                recall=tuple(recall_at_k(order, question.positives, k) for k in FIRST_STAGE_KS),
            )
        )
    return ranked_questions


def make_task(ranked: RankedQuestion, n: int, *, keep_short: bool, keep_missed: bool) -> RankingTask | Skipped:
    """The task of a question with its first `n` candidates, or why it is left out.

    `keep_short`: fewer candidates will do. `keep_missed`: none of them need be relevant.
    """
    question, candidates = ranked.question, ranked.candidates[:n]
    positives = set(question.positives)
    reason = detail = ""
    if not candidates:
        reason, detail = "no candidate", "the first stage returned no page that can be shown"
    elif not keep_short and len(candidates) < n:
        reason, detail = "fewer candidates than asked for", f"{len(candidates)} of {n}"
    elif not keep_missed and positives.isdisjoint(candidate.id for candidate in candidates):
        reason = "no relevant page among the candidates"
        detail = f"relevant: {', '.join(str(page.page) for page in question.positives)}"
    if reason:
        return Skipped(query_id=question.query_id, reason=reason, detail=detail)
    return RankingTask(
        query_id=question.query_id,
        query=question.query,
        domain=question.domain,
        question_types=question.question_types,
        candidates=candidates,
        positives=question.positives,
    )


def first_stage_results(ranked: Sequence[RankedQuestion], n: int) -> dict[str, Any]:
    """Recall of the first stage over all questions, micro and macro, and how many can be reranked with success.

    A question counts as eligible if a relevant page stands among its first `n`.
    """
    recall_QK = np.array([question.recall for question in ranked])
    domains = [question.question.domain for question in ranked]
    eligible = 0
    for question in ranked:
        positives = set(question.question.positives)
        eligible += any(candidate.id in positives for candidate in question.candidates[:n])
    return {
        "questions": len(ranked),
        "candidates": n,
        "eligible": eligible,
        "micro": {f"recall@{k}": micro(recall_QK[:, i]) for i, k in enumerate(FIRST_STAGE_KS)},
        "macro": {f"recall@{k}": macro(recall_QK[:, i], domains) for i, k in enumerate(FIRST_STAGE_KS)},
    }


def _read_and_rank(
    read: Iterable[Document], rank: RankDocument, keep: int, out: Path
) -> tuple[list[Document], list[RankedQuestion]]:
    """Goes through the documents once: writes pages.jsonl, returns the documents, without pages, and questions."""
    documents: list[Document] = []
    ranked: list[RankedQuestion] = []
    with whole_file(out / "pages.jsonl") as stream:
        for document in read:
            pages = tuple(rebase_images(document.pages, Path.cwd(), out))
            for page in pages:
                stream.write(page.model_dump_json() + "\n")
            ranked += rank_questions(dataclasses.replace(document, pages=pages), rank, keep)
            documents.append(dataclasses.replace(document, pages=()))
    return documents, ranked


def _nothing_left(folder: Path, skipped: Sequence[Skipped]) -> InputError:
    """What to say where not one question can be used: every reason with its count, and the first case."""
    reasons = Counter(skip.reason for skip in skipped).most_common()
    found = "; ".join(f"{reason} ({count})" for reason, count in reasons) or "there is none"
    first = f"; first: {skipped[0].file or skipped[0].query_id}: {skipped[0].detail}" if skipped else ""
    return InputError(f"{folder}: not one question can be used: {found}{first}")


def main(config: CandidatesStage) -> None:
    skipped: list[Skipped] = []
    annotations = read_annotations(config.corpus, skipped)
    asked = [question for annotation in annotations for question in annotation.questions]
    rank = open_retriever(config.retriever, asked, skipped)
    documents_read = read_documents(config.corpus, annotations, skipped)
    out = open_output(config.out, config.overwrite, inputs=[config.corpus.folder])
    keep = max(config.candidates, config.n_heldout or 0)
    shown = tqdm(documents_read, total=len(annotations), desc="pages", unit="doc")
    documents, ranked = _read_and_rank(shown, rank, keep, out)
    if not ranked:
        raise _nothing_left(config.corpus.folder, skipped)
    hashes = {document.doc_name: document.sha256 for document in documents}
    placed = split_documents(hashes, config.split, config.seed)
    kept = {}
    for split in SPLITS:
        n = (config.n_heldout or config.candidates) if split == "heldout" else config.candidates
        of_split = [question for question in ranked if placed[question.question.doc_name] == split]
        is_heldout = split == "heldout"
        keep_missed = is_heldout or config.missed == "keep"
        made = [make_task(q, n, keep_short=is_heldout, keep_missed=keep_missed) for q in of_split]
        skipped += [skip for skip in made if isinstance(skip, Skipped)]
        tasks = [task for task in made if isinstance(task, RankingTask)]
        kept[split] = write_records(out / f"{split}.jsonl", tasks)
    write_records(out / "documents.jsonl", [_split_document(d, placed[d.doc_name]) for d in documents])
    write_records(out / "skipped.jsonl", skipped)
    results = first_stage_results(ranked, config.candidates)
    write_json(out / "first_stage.json", results)
    counts = {
        "documents": len(documents),
        "documents_equal_to_another": len(hashes) - len(set(hashes.values())),
        "documents_by_split": dict(Counter(placed[document.doc_name] for document in documents)),
        "pages": sum(document.n_pages for document in documents),
        "questions": kept,
        "skipped": dict(Counter(skip.reason for skip in skipped)),
    }
    sources = [config.corpus.annotations_path, config.corpus.pages_path, config.retriever.file]
    inputs = [path for path in sources if path is not None and path.is_file()]
    write_manifest(out, stage="candidates", config=config.model_dump(mode="json"), inputs=inputs, counts=counts)
    print(
        f"candidates: {', '.join(f'{split} {n}' for split, n in kept.items())} questions of {len(documents)} "
        f"documents, {counts['pages']} pages; {len(skipped)} left out (skipped.jsonl); first stage recall@1 "
        f"{results['micro']['recall@1']:.3f}; in {out}"
    )


def _split_document(document: Document, split: SplitName) -> SplitDocument:
    return SplitDocument(
        doc_name=document.doc_name,
        domain=document.domain,
        split=split,
        pages=document.n_pages,
        sha256=document.sha256,
    )


if __name__ == "__main__":
    run_stage(main, CandidatesStage, "candidates")
