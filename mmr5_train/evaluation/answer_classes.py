"""What was wrong with answers, in two ways: one class for each answer, and every defect that it has.

The classes are those that rank_llm's response analysis made common, so that figures can be read side by side, and
one more: ids beyond the candidates. They are decided by the recorded defects alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from mmr5_train.ranking.answer import Defect
from mmr5_train.ranking.records import ModelAnswer, Ranking

CLASSES = {
    "ok": "Each candidate exactly once.",
    "wrong_format": "No list of integers could be read: the order of the prompt stands.",
    "repetition": "A list in which an id stands twice.",
    "out_of_range": "No id twice, but one that no candidate has.",
    "missing_documents": "None of these, but not every candidate is there; an empty list too.",
}
"""Class → its meaning. The classes after `ok` are in order of precedence: an answer has the first that fits."""

DEFECTS = {
    Defect.no_think: "No closed think block, where one is expected.",
    Defect.no_answer: "No closed answer block outside the reasoning.",
    Defect.not_a_list: "The answer block holds no bracketed list.",
    Defect.not_integers: "An entry of the list is no integer.",
    Defect.empty: "The list has no entries.",
    Defect.duplicates: "An id stands twice.",
    Defect.out_of_range: "An id that no candidate has.",
    Defect.missing_ids: "A candidate's id is not there.",
    Defect.cut_off: "Generation ended at the length limit.",
}
"""Defect → its meaning. An answer can have several."""

_FROM = (
    ("wrong_format", {Defect.no_answer, Defect.not_a_list, Defect.not_integers}),
    ("repetition", {Defect.duplicates}),
    ("out_of_range", {Defect.out_of_range}),
    ("missing_documents", {Defect.missing_ids, Defect.empty}),
)


def answer_class(answered: ModelAnswer) -> str:
    """The one class of an answer, a key of `CLASSES`: `ok` exactly where it is a complete permutation.

    rank_llm, which knows no out_of_range, looks at the list's length first. It counts a list shorter than the
    candidates under missing documents, repeated ids or not, and a longer one under repetition.
    """
    return next((name for name, defects in _FROM if defects.intersection(answered.defects)), "ok")


def class_counts(rankings: Iterable[Ranking], *, sampled: bool = False) -> dict[str, int]:
    """How many answers are of each class, zeros included."""
    counts = dict.fromkeys(CLASSES, 0)
    for ranking in rankings:
        for answered in ranking.samples if sampled else (ranking.greedy,):
            counts[answer_class(answered)] += 1
    return counts
