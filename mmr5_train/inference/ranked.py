"""The order of a query's images, and the answers that it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.notes import split_notes
from mmr5_train.ranking.records import LocalId, ModelAnswer
from mmr5_train.ranking.results import Document, RankedResults, build_results


class WindowAnswer(NamedTuple):
    """One answer to one window."""

    indices: list[int]
    """The images in the prompt: local id i is `indices[i - 1]`."""
    answer: ModelAnswer


@dataclass(frozen=True)
class RankedImages:
    """The order of one query's images, and the answers that it was computed from."""

    order: list[int]
    """Indices of all images, best first."""
    windows: list[WindowAnswer]
    scores: tuple[float, ...] | None = None
    """By rank, in mode logits with a single window. Scores of different windows can't be compared."""

    @property
    def margin(self) -> float:
        """The difference of the two best scores: 1 for a single page, 0 without scores."""
        if len(self.order) == 1:
            return 1.0
        return self.scores[0] - self.scores[1] if self.scores else 0.0

    def merged_answer(self) -> ModelAnswer:
        """All windows as one answer, whose local ids are the indices plus 1. Token counts are sums, or unknown."""
        answers = [window.answer for window in self.windows]
        return ModelAnswer(
            completion="\n".join(answer.completion for answer in answers),
            order=tuple(LocalId(i + 1) for i in self.order),
            defects=tuple(dict.fromkeys(defect for answer in answers for defect in answer.defects)),
            tokens=_known_sum(answer.tokens for answer in answers),
            prompt_tokens=_known_sum(answer.prompt_tokens for answer in answers),
            visual_tokens=sum(answer.visual_tokens for answer in answers),
            scores=self.scores or (),
        )


def _known_sum(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def ranked_images_of(order: list[int], windows: list[WindowAnswer]) -> RankedImages:
    scores = windows[0].answer.scores if len(windows) == 1 else ()
    return RankedImages(order, windows, scores or None)


def results_of(
    query: str, documents: list[Document], ranked: RankedImages, *, timing: Mapping[str, float], top_k: int | None
) -> RankedResults:
    thoughts: list[str] = []
    notes: dict[int, str] = {}  # by index; if several windows have a note on a page, the last one counts
    for indices, answer in ranked.windows:
        thought = parse_answer(answer.completion, len(indices), expect_think=True).think
        if thought:
            thoughts.append(thought)
            notes |= {indices[i - 1]: note for i, note in split_notes(thought).items() if 1 <= i <= len(indices)}
    return build_results(
        query,
        documents,
        ranked.order,
        scores=ranked.scores,
        notes=notes,
        reasoning="\n\n".join(thoughts),
        answers=[window.answer for window in ranked.windows],
        timing=timing,
        top_k=top_k,
    )
