"""Two descriptions of defective answers: one class per answer, and all defects of an answer.

The classes are those of rank_llm's response analysis, so that results can be compared, and one more: ids outside
the candidates. An answer's class depends only on its recorded defects.
"""

from __future__ import annotations

from collections.abc import Iterable

from mmr5_train.ranking.answer import Defect
from mmr5_train.ranking.records import ModelAnswer, Ranking

CLASSES = {
    "ok": "Every candidate exactly once.",
    "wrong_format": "No list of integers could be read; the prompt's order is used.",
    "repetition": "A list that repeats an id.",
    "out_of_range": "No repeated id, but an id that no candidate has.",
    "missing_documents": "None of the above, but a candidate is missing; includes the empty list.",
}
"""Class → its meaning. After `ok`, in order of precedence: an answer gets the first class that applies."""

DEFECTS = {
    Defect.no_think: "No closed think block although the prompt requires one.",
    Defect.no_answer: "No closed answer block outside the reasoning.",
    Defect.not_a_list: "The answer block contains no bracketed list.",
    Defect.not_integers: "The list has an entry that is not an integer.",
    Defect.empty: "The list is empty.",
    Defect.duplicates: "The list repeats an id.",
    Defect.out_of_range: "The list has an id that no candidate has.",
    Defect.missing_ids: "The list lacks a candidate's id.",
    Defect.cut_off: "Generation stopped at the length limit.",
}
"""Defect → its meaning. An answer can have several."""

_CLASS_DEFECTS = (
    ("wrong_format", {Defect.no_answer, Defect.not_a_list, Defect.not_integers}),
    ("repetition", {Defect.duplicates}),
    ("out_of_range", {Defect.out_of_range}),
    ("missing_documents", {Defect.missing_ids, Defect.empty}),
)


def answer_class(answer: ModelAnswer) -> str:
    """The class of an answer, a key of `CLASSES`: `ok` if and only if it is a complete permutation.

    rank_llm has no class out_of_range and checks the list's length first: it counts a list shorter than the
    candidates as missing documents, even with repeated ids, and a longer one as repetition.
    """
    return next((name for name, defects in _CLASS_DEFECTS if defects.intersection(answer.defects)), "ok")


def class_counts(rankings: Iterable[Ranking], *, sampled: bool = False) -> dict[str, int]:
    """Number of answers in each class, zeros included."""
    counts = dict.fromkeys(CLASSES, 0)
    for ranking in rankings:
        for answer in ranking.samples if sampled else (ranking.greedy,):
            counts[answer_class(answer)] += 1
    return counts
