"""The part of a first-stage ranking that candidates are chosen from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmr5_train.ranking.metrics import recall_at_k
from mmr5_train.ranking.records import Candidate, Question, Record

FIRST_STAGE_KS = (1, 3, 5, 10, 20)


class RankedQuestion(Record):
    """A question, the part of its ranking that candidates are chosen from, and the recall of the first stage.

    `recall` has one value for each of FIRST_STAGE_KS.
    """

    question: Question
    ranked: tuple[Candidate, ...]
    recall: tuple[float, ...]


def reach(question: Question, n_first: int, n_irrelevant: int) -> int:
    """Pages at the top of a ranking that must be known.

    They are the first `n_first` pages, those that the recall needs, and the best `n_irrelevant` irrelevant pages,
    which are among the first n_irrelevant + (number of relevant) pages.
    """
    return max(n_first, n_irrelevant + len(question.positives), FIRST_STAGE_KS[-1])


def cut_ranking(
    question: Question, ranked: Sequence[Candidate], n_first: int, n_irrelevant: int
) -> RankedQuestion:
    """Keeps the first pages of a ranking (`reach`) and every relevant page, in its order."""
    first = [page.id for page in ranked[: FIRST_STAGE_KS[-1]]]
    relevant, n = set(question.positives), reach(question, n_first, n_irrelevant)
    return RankedQuestion(
        question=question,
        ranked=tuple(page for i, page in enumerate(ranked) if i < n or page.id in relevant),
        recall=tuple(recall_at_k(first, question.positives, k) for k in FIRST_STAGE_KS),
    )


def notes_for_user(results: Mapping[str, Any], textless: Sequence[str], place: str) -> Iterator[str]:
    """What the user should know of a first stage. `textless` are documents without any text."""
    if textless:
        names = ", ".join(textless[:5]) + (", …" if len(textless) > 5 else "")
        yield (
            f"documents without text: {len(textless)} ({names}); BM25 can't search them, and the offline teacher "
            "can't explain them; ocr={} reads them"
        )
    if results["unmatched"]:
        yield (
            f"{results['unmatched']} of {results['questions']} questions have score 0 for every page of their "
            f"{place}: with BM25, no word of the question is on a page, so its candidates are the first pages"
        )
