"""BM25 over the pages of all documents of a split: `retriever.scope=corpus`.

A question is ranked against the documents of its own split only, so that no page of a held-out document becomes
a candidate in training. The index is written to disk and read from there memory-mapped, so the memory of ranking
hardly grows with the collection.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_construction.first_stage.ranked_questions import RankedQuestion, cut_ranking, reach
from data_construction.first_stage.words import languages_of, to_words
from mmr5_train.common.bm25s_import import bm25s
from mmr5_train.common.files import atomic_write
from mmr5_train.ranking.records import Candidate, Page, Question, Skipped

Floats = npt.NDArray[np.float32]


class CorpusIndex:
    """A BM25 index of pages on disk, memory-mapped."""

    def __init__(self, texts: Sequence[str], folder: Path) -> None:
        self.size = len(texts)
        self._languages = languages_of(texts)
        tokens = to_words(texts, self._languages)
        self._index = None
        if any(tokens.ids):
            index = bm25s.BM25()
            index.index(tokens, show_progress=False)
            index.save(folder, show_progress=False)
            del index
            self._index = bm25s.BM25.load(folder, mmap=True)

    def scores(self, queries: Sequence[str]) -> Iterator[Floats]:
        """For each query, the scores of all pages, shape (pages,); zeros if no word is on any page."""
        for query in to_words(queries, self._languages, return_ids=False):
            if self._index is None or not query:
                yield np.zeros(self.size, dtype=np.float32)
            else:
                yield self._index.get_scores(query)


def best(scores: Floats, n: int) -> list[int]:
    """The positions of the n highest scores, best first; equal scores in page order."""
    if n < len(scores):
        threshold = np.partition(scores, len(scores) - n)[len(scores) - n]
        positions = np.flatnonzero(scores >= threshold)
    else:
        positions = np.arange(len(scores))
    return [int(i) for i in positions[np.argsort(-scores[positions], kind="stable")][:n]]


class SplitPages:
    """The pages of one split, in the order of pages.jsonl. Their texts are read once, for the index."""

    def __init__(self, path: Path, split_of: Mapping[str, str], split: str) -> None:
        self._path, self._split_of, self._split = path, split_of, split
        pages = list(self._read())
        self.images = [page.image for page in pages]
        self.ids = [page.id for page in pages]
        self.position = {page_id: i for i, page_id in enumerate(self.ids)}
        self.texts = [page.text for page in pages]

    def _read(self) -> Iterator[Page]:
        with self._path.open(encoding="utf-8") as lines:
            for line in lines:
                page = Page.model_validate_json(line)
                if self._split_of[page.doc_name] == self._split:
                    yield page

    def candidate(self, position: int, score: float) -> Candidate:
        return Candidate(**self.ids[position].model_dump(), image=self.images[position], score=score)


@dataclass
class CorpusRanking:
    """Figures of a ranking over the whole collection, one value per question."""

    recall: list[tuple[float, ...]] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    eligible: int = 0
    unmatched: int = 0
    """Questions without a word that is on a page. Their candidates are the first pages of the collection."""


def rank_in_corpus(
    spool: Path,
    pages_path: Path,
    split_of: Mapping[str, str],
    *,
    candidates: int,
    n_first: int,
    n_irrelevant: int,
    skipped: list[Skipped],
) -> CorpusRanking:
    """Replaces the rankings in `spool`, a file of `RankedQuestion`, by rankings of all pages of the splits.

    Adds to `skipped` the questions whose relevant pages are not all in documents of one split, or can't be shown.
    """
    with spool.open(encoding="utf-8") as lines:
        questions = [RankedQuestion.model_validate_json(line).question for line in lines]
    result = CorpusRanking()
    with atomic_write(spool) as stream:
        for split in dict.fromkeys(split_of.values()):
            pages = SplitPages(pages_path, split_of, split)
            usable = [q for q in questions if split_of[q.doc_name] == split and _is_usable(q, pages, skipped)]
            for question, scores in score_questions(pages, usable, split, spool.parent):
                found = best(scores, reach(question, n_first, n_irrelevant))
                missed = {pages.position[page] for page in question.positives} - set(found)
                found += sorted(missed, key=lambda i: (-scores[i], i))
                ranked = [pages.candidate(i, float(scores[i])) for i in found]
                cut = cut_ranking(question, ranked, n_first, n_irrelevant)
                stream.write(cut.model_dump_json() + "\n")
                relevant = set(question.positives)
                result.eligible += any(page.id in relevant for page in ranked[:candidates])
                result.recall.append(cut.recall)
                result.domains.append(question.domain)
                result.unmatched += not scores.any()
    return result


def score_questions(
    pages: SplitPages, questions: Sequence[Question], split: str, folder: Path
) -> Iterator[tuple[Question, Floats]]:
    """Each question with the scores of all pages. The index is in a temporary folder in `folder`."""
    if not questions:
        return
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        index = CorpusIndex(pages.texts, Path(temporary))
        pages.texts = []  # the largest part of the memory
        scores = index.scores([question.query for question in questions])
        pairs = zip(questions, scores, strict=True)
        yield from tqdm(pairs, total=len(questions), desc=f"rank {split}", unit="question")
        del index, scores, pairs  # closes the mapped files before their folder is deleted


def _is_usable(question: Question, pages: SplitPages, skipped: list[Skipped]) -> bool:
    missing = [str(page) for page in question.positives if page not in pages.position]
    if missing:
        reason = "relevant pages not all in one split, or not shown"
        skipped.append(Skipped(query_id=question.query_id, reason=reason, detail=", ".join(missing)))
    return not missing
