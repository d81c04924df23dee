"""From a corpus to ranking tasks: page pictures, the first stage's candidates, and splits by document.

    python -m data_construction.candidates corpus=synthetic out=outputs/data
    python -m data_construction.candidates corpus=mmdocir_train corpus.folder=FOLDER exclude=[DATA/documents.jsonl]
    python -m data_construction.candidates corpus=pdf_folder corpus.folder=PDFS corpus.questions=questions.csv

Reads a corpus (config group `corpus`), ranks the pages of each question's document (config group `retriever`),
and writes into `out`:

- pages.jsonl: every page (`Page`), its picture in the page cache;
- train.jsonl, select.jsonl, heldout.jsonl: `RankingTask` records, for SFT, GRPO and evaluation. The first two
  hold only questions with as many candidates as asked for, one of them relevant; with `missed: keep` also those
  whose relevant pages the first stage missed. heldout holds every question, since recall divides by all gold
  pages;
- documents.jsonl: `SplitDocument`; documents are split, never questions, and equal documents stay together;
- skipped.jsonl: `Skipped`, all that was left out and why;
- first_stage.json: recall of the first stage over all questions; manifest.json.

Documents go through one by one. What the splits are made of waits on disk, since equal documents are known only
when all have been read.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tqdm import tqdm

from data_construction.corpus.documents import Document
from data_construction.corpus.reading import CorpusConfig, read_annotations, read_corpus
from data_construction.first_stage.exclusion import REASONS, exclude_contents, exclude_names, read_excluded
from data_construction.first_stage.policy import Policy, choose
from data_construction.first_stage.retriever import RankDocument, RetrieverConfig, open_retriever
from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import (
    InputError,
    atomic_write,
    open_output,
    write_json,
    write_manifest,
    write_records,
)
from mmr5_train.evaluation.metrics import macro, micro, recall_at_k
from mmr5_train.ranking.records import (
    SPLITS,
    Candidate,
    Page,
    Question,
    RankingTask,
    Record,
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

    corpus: CorpusConfig
    retriever: RetrieverConfig
    exclude: tuple[Path, ...] = Field(
        default=(),
        description="documents.jsonl or MMDocIR annotations: documents kept for evaluation, left out here",
    )
    candidates: int = Field(default=5, gt=0, description="pages a question")
    policy: Policy = Policy()
    n_heldout: int | None = Field(default=None, gt=0, description="the same for heldout; None: `candidates`")
    split: Split
    missed: Literal["drop", "keep"] = Field(
        default="drop",
        description="train and select questions without a relevant candidate: left out (as in MM-R5), or kept, "
        "to teach what to say when no page helps",
    )


class RankedQuestion(Record):
    """A question with the part of its ranking that candidates can come from, and the first stage's recall at each
    of FIRST_STAGE_KS.
    """

    question: Question
    ranked: tuple[Candidate, ...]
    recall: tuple[float, ...]


@dataclass
class Tally:
    """What is known when all documents have been read; grows by a few numbers a question."""

    documents: list[Document] = field(default_factory=list)  # without pages and questions
    recall: list[tuple[float, ...]] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    eligible: int = 0
    pages_without_text: int = 0


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


def rank_questions(
    document: Document, shown: Sequence[Page], rank: RankDocument, first: int, irrelevant: int
) -> Iterator[RankedQuestion]:
    """The questions of a document with the first `first` pages of each ranking, every relevant page, and at least
    `irrelevant` of the best irrelevant ones, as far as there are so many.

    `shown`: the pages of the document with image paths for the files that will name them.
    """
    images = {page.page: page.image for page in shown}
    ids = {page.page: page.id for page in shown}
    for question, ranked in zip(document.questions, rank(document), strict=True):
        order = [ids[page.page] for page, _ in ranked]
        reach = max(first, irrelevant + len(question.positives))
        yield RankedQuestion(
            question=question,
            ranked=tuple(
                Candidate(doc_name=page.doc_name, page=page.page, image=images[page.page], score=score)
                for i, (page, score) in enumerate(ranked)
                if i < reach or ids[page.page] in question.positives
            ),
            recall=tuple(recall_at_k(order, question.positives, k) for k in FIRST_STAGE_KS),
        )


def make_task(
    question: Question, candidates: tuple[Candidate, ...], asked_for: int, *, complete: bool, keep_missed: bool
) -> RankingTask | Skipped:
    """The task of a question with these candidates, or why it is left out.

    `complete`: it must have as many as asked for. `keep_missed`: none of them need be relevant.
    """
    positives = set(question.positives)
    reason = detail = ""
    if not candidates:
        reason, detail = "no candidate", "the first stage returned no page that can be shown"
    elif complete and len(candidates) < asked_for:
        reason, detail = "fewer candidates than asked for", f"{len(candidates)} of {asked_for}"
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


def split_task(config: CandidatesStage, split: SplitName, ranked: RankedQuestion) -> RankingTask | Skipped:
    """The task of a question in a split, or why it is left out."""
    question, n = ranked.question, config.candidates
    if split == "heldout":
        n = config.n_heldout or n
        return make_task(question, ranked.ranked[:n], n, complete=False, keep_missed=True)
    seed = f"{config.seed}/{question.query_id}"
    candidates = choose(ranked.ranked, question.positives, n, config.policy, split == "train", seed)
    return make_task(question, candidates, n, complete=True, keep_missed=config.missed == "keep")


def first_stage_results(tally: Tally, n: int) -> dict[str, Any]:
    """Recall of the first stage over all questions, micro and macro, and how many can be reranked with success.

    A question counts as eligible if a relevant page stands among its first `n`.
    """
    recall_QK = np.array(tally.recall)
    return {
        "questions": len(tally.recall),
        "candidates": n,
        "eligible": tally.eligible,
        "micro": {f"recall@{k}": micro(recall_QK[:, i]) for i, k in enumerate(FIRST_STAGE_KS)},
        "macro": {f"recall@{k}": macro(recall_QK[:, i], tally.domains) for i, k in enumerate(FIRST_STAGE_KS)},
    }


def read_and_rank(config: CandidatesStage, read: Iterable[Document], rank: RankDocument, spool: Path) -> Tally:
    """Goes through the documents once: writes pages.jsonl, and the ranked questions into the file `spool`."""
    tally, n = Tally(), config.candidates
    first = max(n, config.n_heldout or 0)
    with atomic_write(config.out / "pages.jsonl") as pages_file, atomic_write(spool) as ranked_file:
        for document in read:
            pages = tuple(rebase_images(document.pages, Path.cwd(), config.out))
            for page in pages:
                pages_file.write(page.model_dump_json() + "\n")
                tally.pages_without_text += not page.text.strip()
            for ranked in rank_questions(document, pages, rank, first, config.policy.reach(n)):
                ranked_file.write(ranked.model_dump_json() + "\n")
                positives = set(ranked.question.positives)
                tally.eligible += any(candidate.id in positives for candidate in ranked.ranked[:n])
                tally.recall.append(ranked.recall)
                tally.domains.append(ranked.question.domain)
            tally.documents.append(dataclasses.replace(document, pages=(), questions=()))
    return tally


def write_splits(
    config: CandidatesStage, spool: Path, placed: dict[str, SplitName], skipped: list[Skipped]
) -> dict[str, int]:
    """Deals the ranked questions out to the files of the splits. Returns how many each got."""
    kept = dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        files = {split: stack.enter_context(atomic_write(config.out / f"{split}.jsonl")) for split in SPLITS}
        for line in stack.enter_context(spool.open(encoding="utf-8")):
            ranked = RankedQuestion.model_validate_json(line)
            split = placed[ranked.question.doc_name]
            made = split_task(config, split, ranked)
            if isinstance(made, Skipped):
                skipped.append(made)
                continue
            files[split].write(made.model_dump_json() + "\n")
            kept[split] += 1
    return kept


def _nothing_left(source: Path, skipped: Sequence[Skipped]) -> InputError:
    """What to say where not one question can be used: every reason with its count, and the first case."""
    reasons = Counter(skip.reason for skip in skipped).most_common()
    found = "; ".join(f"{reason} ({count})" for reason, count in reasons) or "there is none"
    first = f"; first: {skipped[0].file or skipped[0].query_id}: {skipped[0].detail}" if skipped else ""
    return InputError(f"{source}: not one question can be used: {found}{first}")


def main(config: CandidatesStage) -> None:
    skipped: list[Skipped] = []
    excluded = read_excluded(config.exclude)
    asked = exclude_names(read_annotations(config.corpus, config.seed, skipped), excluded, skipped)
    rank = open_retriever(config.retriever, [q for annotation in asked for q in annotation.questions], skipped)
    read = exclude_contents(read_corpus(config.corpus, asked, skipped), excluded, skipped)
    sources = [*config.corpus.inputs, *config.retriever.inputs, *config.exclude]
    out = open_output(config.out, config.overwrite, inputs=[config.corpus.folder, *sources])
    spool = out / ".ranked.jsonl"
    try:
        tally = read_and_rank(config, tqdm(read, total=len(asked), desc="pages", unit="doc"), rank, spool)
        if not tally.recall:
            raise _nothing_left(config.corpus.folder, skipped)
        hashes = {document.doc_name: document.sha256 for document in tally.documents}
        placed = split_documents(hashes, config.split, config.seed)
        kept = write_splits(config, spool, placed, skipped)
    finally:
        spool.unlink(missing_ok=True)
    write_records(out / "documents.jsonl", [_split_document(d, placed[d.doc_name]) for d in tally.documents])
    write_records(out / "skipped.jsonl", skipped)
    results = first_stage_results(tally, config.candidates)
    write_json(out / "first_stage.json", results)
    pages = sum(document.n_pages for document in tally.documents)
    counts = {
        "documents": len(tally.documents),
        "documents_equal_to_another": len(hashes) - len(set(hashes.values())),
        "documents_by_split": dict(Counter(placed[document.doc_name] for document in tally.documents)),
        "documents_excluded": {
            reason: sum(skip.reason == reason and skip.query_id is None for skip in skipped) for reason in REASONS
        },
        "pages": pages,
        "pages_without_text": tally.pages_without_text,
        "questions": kept,
        "skipped": dict(Counter(skip.reason for skip in skipped)),
    }
    inputs = [path for path in sources if path.is_file()]
    write_manifest(out, stage="candidates", config=config.model_dump(mode="json"), inputs=inputs, counts=counts)
    sizes = ", ".join(f"{split} {n}" for split, n in kept.items())
    print(
        f"candidates: {sizes} questions of {len(tally.documents)} documents, {pages} pages "
        f"({tally.pages_without_text} without text); {len(skipped)} left out (skipped.jsonl); first stage "
        f"recall@1 {results['micro']['recall@1']:.3f}; in {out}"
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
