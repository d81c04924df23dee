"""Makes ranking tasks from a corpus: questions with first-stage candidates.

    python -m data_construction.candidates corpus=synthetic out=outputs/data
    python -m data_construction.candidates corpus=mmdocir_train corpus.folder=FOLDER exclude=[DATA/documents.jsonl]
    python -m data_construction.candidates corpus=pdf_folder corpus.folder=PDFS corpus.questions=questions.csv

Reads a corpus (config group `corpus`), ranks the pages of each question's document, or with
`retriever.scope=corpus` those of all documents of its split (config group `retriever`), and writes into `out`:

- pages.jsonl: every page (`Page`), with the path of its image in the page cache;
- train.jsonl, select.jsonl, heldout.jsonl: `RankingTask` records for SFT, GRPO and evaluation. train and select
  contain only questions that have the full number of candidates and at least one relevant candidate; with
  `missed: keep` also those without a relevant candidate. heldout contains every question, since recall divides by
  all gold pages. With `train_per_domain`, train has at most that many questions per domain, in random order, so
  that its first questions are a sample of all;
- documents.jsonl: `SplitDocument`. The split is by document; documents with equal content get the same split;
- skipped.jsonl: `Skipped`, each document, page and question that can't be used, with the reason;
- first_stage.json: recall of the first stage over all questions; manifest.json.

Documents are processed one at a time. The ranked questions wait in a temporary file until all documents are read,
since the splits depend on which documents are equal.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator
from tqdm import tqdm

from data_construction.corpus.documents import Document
from data_construction.corpus.ocr import Ocr, add_text
from data_construction.corpus.reading import CorpusConfig, read_annotations, read_corpus
from data_construction.corpus.splits import Draw, Split, SplitName, split_documents
from data_construction.first_stage.corpus_scope import CorpusRanking, rank_in_corpus
from data_construction.first_stage.dense import Dense
from data_construction.first_stage.exclusion import REASONS, exclude_contents, exclude_names, read_excluded
from data_construction.first_stage.policy import Policy, choose_candidates
from data_construction.first_stage.ranked_questions import (
    FIRST_STAGE_KS,
    RankedQuestion,
    cut_ranking,
    notes_for_user,
)
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
from mmr5_train.evaluation.metrics import macro, micro
from mmr5_train.ranking.records import (
    SPLITS,
    Candidate,
    Page,
    Question,
    RankingTask,
    Skipped,
    SplitDocument,
    rebase_images,
)

Share = Annotated[float, Field(gt=0, le=1)]


class CandidatesStage(StageConfig):
    """`python -m data_construction.candidates` (configs/candidates.yaml)."""

    corpus: CorpusConfig
    retriever: RetrieverConfig
    ocr: Ocr | None = Field(default=None, description="reads pages without text, such as scans; {}: with defaults")
    exclude: tuple[Path, ...] = Field(
        default=(),
        description="documents.jsonl or MMDocIR annotations: their held-out documents are excluded",
    )
    candidates: int = Field(default=5, gt=0, description="pages per question")
    policy: Policy = Policy()
    n_heldout: int | None = Field(
        default=None, gt=0, description="pages per heldout question; None: the same as `candidates`"
    )
    split: Split
    question_types: dict[SplitName, dict[str, Share]] = Field(
        default={},
        description="question types of a split's questions, as a list or with the share of each type's questions "
        "that is kept, e.g. {users: 1.0, catalogue: 0.5}; a split that is not listed has all",
    )
    train_per_domain: int | None = Field(
        default=None,
        gt=0,
        description="at most this many train questions per domain, drawn with the seed after all filters (MM-R5: "
        "1200 per subset of MMDocIR's training set); null: all",
    )
    missed: Literal["drop", "keep"] = Field(
        default="drop",
        description="train and select questions without a relevant candidate: drop them (as in MM-R5), or keep "
        "them, to train the model on questions that no page answers",
    )

    @property
    def scope(self) -> Literal["document", "corpus"]:
        """Which pages a question's candidates come from."""
        return "document" if isinstance(self.retriever, Dense) else self.retriever.scope

    @field_validator("question_types", mode="before")
    @classmethod
    def _lists_keep_all(cls, value: Any) -> Any:
        if value is None:
            return {}  # the default is null, so that Hydra can add splits
        if not isinstance(value, Mapping):
            return value
        return {
            split: dict.fromkeys(types, 1.0) if isinstance(types, list | tuple) else types
            for split, types in value.items()
        }

    def keeps(self, split: SplitName, question: Question) -> bool:
        """Whether `question_types` keeps a question of the split. The choice depends on the seed and its id."""
        if split not in self.question_types:
            return True
        shares = self.question_types[split]
        share = max((shares.get(kind, 0.0) for kind in question.question_types), default=0.0)
        return Random(f"{self.seed}/{question.query_id}/type").random() < share


@dataclass
class CorpusSummary:
    """Documents without their pages, and a few numbers per question, collected while the documents are read."""

    documents: list[Document] = field(default_factory=list)  # with empty `pages` and `questions`
    recall: list[tuple[float, ...]] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    eligible: int = 0
    unmatched: int = 0  # questions with score 0 for all pages: no word of theirs is on a page
    pages_without_text: int = 0
    pages_by_ocr: int = 0
    textless: list[str] = field(default_factory=list)  # names of documents without any text


def rank_questions(
    document: Document, pages: Sequence[Page], rank: RankDocument, n_first: int, n_irrelevant: int
) -> Iterator[RankedQuestion]:
    """The questions of a document, each with the part of its ranking that candidates are chosen from.

    `pages` are the document's pages, with image paths relative to the output folder.
    """
    shown = {page.page: page for page in pages}
    for question, ranked in zip(document.questions, rank(document), strict=True):
        candidates = [
            Candidate(doc_name=page.doc_name, page=page.page, image=shown[page.page].image, score=score)
            for page, score in ranked
        ]
        yield cut_ranking(question, candidates, n_first, n_irrelevant)


def make_task(
    question: Question, candidates: tuple[Candidate, ...], n: int, *, require_n: bool, keep_missed: bool
) -> RankingTask | Skipped:
    """The task of a question with these candidates, or the reason to skip it.

    `require_n`: skip the question if it has fewer than `n` candidates. `keep_missed`: keep the question if no
    candidate is relevant.
    """
    positives = set(question.positives)
    reason = detail = ""
    if not candidates:
        reason, detail = "no candidate", "the first stage returned no page that can be shown"
    elif require_n and len(candidates) < n:
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


def split_task(config: CandidatesStage, split: SplitName, ranked: RankedQuestion) -> RankingTask | Skipped:
    """The task of a question in a split, or the reason to skip it."""
    question, n = ranked.question, config.candidates
    if split == "heldout":
        n = config.n_heldout or n
        return make_task(question, ranked.ranked[:n], n, require_n=False, keep_missed=True)
    seed = f"{config.seed}/{question.query_id}"
    candidates = choose_candidates(ranked.ranked, question.positives, n, config.policy, split == "train", seed)
    return make_task(question, candidates, n, require_n=True, keep_missed=config.missed == "keep")


def first_stage_results(summary: CorpusSummary | CorpusRanking, n: int) -> dict[str, Any]:
    """Micro and macro recall of the first stage over all questions, and the number of eligible questions.

    A question is eligible if at least one of its first `n` pages is relevant.
    """
    recall_QK = np.array(summary.recall)
    return {
        "questions": len(summary.recall),
        "candidates": n,
        "eligible": summary.eligible,
        "unmatched": summary.unmatched,
        "micro": {f"recall@{k}": micro(recall_QK[:, i]) for i, k in enumerate(FIRST_STAGE_KS)},
        "macro": {f"recall@{k}": macro(recall_QK[:, i], summary.domains) for i, k in enumerate(FIRST_STAGE_KS)},
    }


def corpus_results(ranking: CorpusRanking, n: int, within_document: dict[str, Any]) -> dict[str, Any]:
    """The recall over the whole collection, and that within the question's document for comparison."""
    return {"scope": "corpus", **first_stage_results(ranking, n), "within_document": within_document}


def rank_documents(
    config: CandidatesStage, documents: Iterable[Document], rank: RankDocument, spool: Path
) -> CorpusSummary:
    """Reads the documents once. Writes pages.jsonl, and the ranked questions to the file `spool`."""
    summary, n = CorpusSummary(), config.candidates
    first = max(n, config.n_heldout or 0)
    with atomic_write(config.out / "pages.jsonl") as pages_file, atomic_write(spool) as ranked_file:
        for document in documents:
            pages = tuple(rebase_images(document.pages, Path.cwd(), config.out))
            for page in pages:
                pages_file.write(page.model_dump_json() + "\n")
                summary.pages_without_text += not page.text.strip()
                summary.pages_by_ocr += page.text_source == "ocr"
            if pages and not any(page.text.strip() for page in pages):
                summary.textless.append(document.doc_name)
            for ranked in rank_questions(document, pages, rank, first, config.policy.max_irrelevant(n)):
                ranked_file.write(ranked.model_dump_json() + "\n")
                positives = set(ranked.question.positives)
                summary.eligible += any(candidate.id in positives for candidate in ranked.ranked[:n])
                summary.unmatched += not any(candidate.score for candidate in ranked.ranked)
                summary.recall.append(ranked.recall)
                summary.domains.append(ranked.question.domain)
            summary.documents.append(dataclasses.replace(document, pages=(), questions=()))
    return summary


@dataclass
class SplitSummary:
    """Number of questions per split and domain, of those of other types, and of train questions not drawn."""

    questions: dict[str, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})
    other_types: Counter[str] = field(default_factory=Counter)
    not_drawn: Counter[str] = field(default_factory=Counter)


def write_splits(
    config: CandidatesStage, spool: Path, split_of: dict[str, SplitName], skipped: list[Skipped]
) -> SplitSummary:
    """Writes the ranked questions to the files of their splits. Adds those that can't be used to `skipped`."""
    summary = SplitSummary()
    draw = Draw(config.train_per_domain, config.seed) if config.train_per_domain else None
    with ExitStack() as stack:
        files = {split: stack.enter_context(atomic_write(config.out / f"{split}.jsonl")) for split in SPLITS}
        for line in stack.enter_context(spool.open(encoding="utf-8")):
            ranked = RankedQuestion.model_validate_json(line)
            split = split_of[ranked.question.doc_name]
            if not config.keeps(split, ranked.question):
                summary.other_types[split] += 1
                continue
            task = split_task(config, split, ranked)
            if isinstance(task, Skipped):
                skipped.append(task)
                continue
            summary.questions[split][task.domain] += 1
            if split == "train" and draw:
                draw.add(task)
            else:
                files[split].write(task.model_dump_json() + "\n")
        if draw:
            files["train"].writelines(line + "\n" for line in draw.lines())
            summary.not_drawn = draw.not_drawn
            summary.questions["train"] -= draw.not_drawn
    return summary


def check_question_types(config: CandidatesStage, found: Collection[str]) -> None:
    """Raises `InputError` if `config.question_types` names a type that no question has."""
    for split, types in config.question_types.items():
        if unknown := sorted(set(types) - set(found)):
            raise InputError(
                f"question_types.{split}: no question has the type {unknown[0]!r} (types found: "
                f"{', '.join(sorted(found)) or 'none'})"
            )


def _no_usable_question(source: Path, skipped: Sequence[Skipped]) -> InputError:
    """The error for a corpus without a usable question: every reason with its count, and the first case."""
    counts = Counter(skip.reason for skip in skipped).most_common()
    reasons = "; ".join(f"{reason} ({count})" for reason, count in counts) or "the corpus has no questions"
    first = f"; first: {skipped[0].file or skipped[0].query_id}: {skipped[0].detail}" if skipped else ""
    return InputError(f"{source}: no question can be used: {reasons}{first}")


def main(config: CandidatesStage) -> None:
    skipped: list[Skipped] = []
    excluded = read_excluded(config.exclude)
    in_corpus = config.scope == "corpus"
    annotations = read_annotations(config.corpus, config.seed, skipped, several_documents=in_corpus)
    annotations = exclude_names(annotations, excluded, skipped)
    check_question_types(config, {t for a in annotations for q in a.questions for t in q.question_types})
    rank = open_retriever(
        config.retriever, [q for annotation in annotations for q in annotation.questions], skipped
    )
    documents = exclude_contents(read_corpus(config.corpus, annotations, skipped), excluded, skipped)
    if config.ocr is not None:
        documents = add_text(documents, config.ocr, config.corpus.page_cache / "ocr")
    sources = [*config.corpus.inputs, *config.retriever.inputs, *config.exclude]
    out = open_output(config.out, config.overwrite, inputs=[config.corpus.folder, *sources])
    spool = out / ".ranked.jsonl"
    try:
        progress = tqdm(documents, total=len(annotations), desc="pages", unit="doc")
        summary = rank_documents(config, progress, rank, spool)
        if not summary.recall:
            raise _no_usable_question(config.corpus.folder, skipped)
        hashes = {document.doc_name: document.sha256 for document in summary.documents}
        split_of = split_documents(hashes, config.split, config.seed)
        results = {"scope": "document", **first_stage_results(summary, config.candidates)}
        if in_corpus:
            ranking = rank_in_corpus(
                spool,
                out / "pages.jsonl",
                split_of,
                candidates=config.candidates,
                n_first=max(config.candidates, config.n_heldout or 0),
                n_irrelevant=config.policy.max_irrelevant(config.candidates),
                skipped=skipped,
            )
            results = corpus_results(ranking, config.candidates, results)
        splits = write_splits(config, spool, split_of, skipped)
    finally:
        spool.unlink(missing_ok=True)
    write_records(out / "documents.jsonl", [_split_document(d, split_of[d.doc_name]) for d in summary.documents])
    write_records(out / "skipped.jsonl", skipped)
    write_json(out / "first_stage.json", results)
    for note in notes_for_user(results, summary.textless, "split" if in_corpus else "document"):
        print(f"candidates: {note}", file=sys.stderr)
    pages = sum(document.n_pages for document in summary.documents)
    counts = {
        "documents": len(summary.documents),
        "documents_equal_to_another": len(hashes) - len(set(hashes.values())),
        "documents_by_split": dict(Counter(split_of[document.doc_name] for document in summary.documents)),
        "documents_excluded": {
            reason: sum(skip.reason == reason and skip.query_id is None for skip in skipped) for reason in REASONS
        },
        "pages": pages,
        "pages_without_text": summary.pages_without_text,
        "pages_by_ocr": summary.pages_by_ocr,
        "documents_without_text": summary.textless,
        "questions": {split: count.total() for split, count in splits.questions.items()},
        "questions_by_domain": splits.questions,
        "questions_of_other_types": splits.other_types,
        "train_not_drawn": splits.not_drawn,
        "skipped": dict(Counter(skip.reason for skip in skipped)),
    }
    inputs = [path for path in sources if path.is_file()]
    write_manifest(out, stage="candidates", config=config.model_dump(mode="json"), inputs=inputs, counts=counts)
    sizes = ", ".join(f"{split} {n.total()}" for split, n in splits.questions.items())
    drawn = f"; train drawn from {splits.not_drawn.total() + splits.questions['train'].total()}"
    print(
        f"candidates: {sizes} questions of {len(summary.documents)} documents, {pages} pages "
        f"({summary.pages_without_text} without text); {len(skipped)} skipped (skipped.jsonl); first stage "
        f"recall@1 {results['micro']['recall@1']:.3f}{drawn if splits.not_drawn else ''}; in {out}"
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
