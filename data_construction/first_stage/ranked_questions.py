"""The part of a first-stage ranking that candidates are chosen from."""

from __future__ import annotations

from collections.abc import Sequence

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
