"""Says how many examples each training of a recipe gets, before the stages that make them have run.

A number comes from the data of an earlier stage if they exist, else from the annotation files of the corpus, else
from the recipe's rule. The last two are upper bounds: the first stage misses the relevant page of some questions,
and some documents have too few pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_construction.candidates import CandidatesStage
from data_construction.corpus.reading import read_annotations
from data_construction.corpus.splits import split_documents
from data_construction.corpus.training_set import TrainingSet
from data_construction.first_stage.exclusion import exclude_names, normalize_name, read_excluded
from mmr5_train.common.config import StageConfig
from mmr5_train.common.files import MANIFEST, InputError, read_manifest

Stages = Mapping[str, Any]
"""Stage of a recipe → its config."""


@dataclass(frozen=True)
class Count:
    """A number of questions. `number` is None if nothing is known; without `exact` it is an upper bound."""

    number: int | None
    exact: bool
    source: str

    def limited(self, limit: int | None) -> int | None:
        """The number of questions if at most `limit` are used."""
        numbers = [number for number in (self.number, limit) if number is not None]
        return min(numbers) if numbers else None


@dataclass(frozen=True)
class Forecast:
    """The examples of a training: the number available, and the number that the recipe wants (None: all)."""

    what: str  # "traces" or "questions"
    available: Count
    wanted: int | None
    setting: str  # the setting of `wanted`

    @property
    def used(self) -> int | None:
        return self.available.limited(self.wanted)

    @property
    def is_short(self) -> bool:
        """Whether fewer examples are available than the recipe wants."""
        number = self.available.number
        return number is not None and self.wanted is not None and number < self.wanted

    def __str__(self) -> str:
        number, source = self.available.number, self.available.source
        bound = "" if self.available.exact else "at most "
        if number is None:
            return f"at most {self.wanted:,} {self.what} ({source})" if self.wanted else f"{self.what}: {source}"
        if self.is_short:
            return f"{bound}{number:,} {self.what}, fewer than {self.setting}={self.wanted} ({source})"
        used = f"{self.used:,} of {bound}" if self.wanted and self.wanted < number else bound
        return f"{used}{number:,} {self.what} ({source})"


def forecasts(stages: Stages) -> dict[str, Forecast]:
    """The examples of `sft` and `grpo`, for those that the recipe runs."""
    found = {}
    splits = split_counts(stages)
    if "sft" in stages:
        available = _traces(stages, splits["train"])
        found["sft"] = Forecast("traces", available, stages["sft"].limit, "stages.sft.limit")
    if "grpo" in stages:
        balanced = stages["select"].balanced if "select" in stages else None
        wanted, setting = stages["grpo"].limit, "stages.grpo.limit"
        if balanced and (wanted is None or balanced.count <= wanted):
            wanted, setting = balanced.count, "stages.select.balanced.count"
        found["grpo"] = Forecast("questions", _selected(stages, splits["select"]), wanted, setting)
    return found


def _traces(stages: Stages, tasks: Count) -> Count:
    path = stages["sft"].data
    if (number := _records(path, stages.get("traces"))) is not None:
        return Count(number, True, str(path))
    return Count(tasks.number, False, f"{tasks.source}; questions that fail the teacher or a check are dropped")


def _selected(stages: Stages, tasks: Count) -> Count:
    path, select = stages["grpo"].data, stages.get("select")
    if (number := _records(path, select)) is not None:
        return Count(number, True, str(path))
    if select is None or select.difficulty is None:
        return tasks
    return Count(tasks.number, False, f"{tasks.source}; select drops questions by difficulty")


def split_counts(stages: Stages) -> dict[str, Count]:
    """The numbers of train and select questions that the recipe's candidates have, or will have."""
    candidates = stages.get("candidates")
    if candidates is None:
        return dict.fromkeys(("train", "select"), Count(None, False, "the recipe makes no candidates"))
    paths = {split: candidates.out / f"{split}.jsonl" for split in ("train", "select")}
    numbers = {split: _records(path, candidates) for split, path in paths.items()}
    annotated = None
    if None in numbers.values():
        annotated = annotated_questions(candidates, stages.get("heldout"))
    return {
        split: Count(number, True, str(paths[split]))
        if number is not None
        else _bound(candidates, annotated[split] if annotated else None, split)
        for split, number in numbers.items()
    }


def _bound(candidates: CandidatesStage, annotated: Counter[str] | None, split: str) -> Count:
    """An upper bound of the questions of a split, from the annotated ones per domain, or from the rule."""
    per_domain = candidates.train_per_domain if split == "train" else None
    if annotated is not None:
        number = sum(min(count, per_domain or count) for count in annotated.values())
        drawn = f", at most {per_domain:,} per domain" if per_domain else ""
        return Count(number, False, f"annotated {split} questions in {candidates.corpus.folder}{drawn}")
    if per_domain and isinstance(candidates.corpus, TrainingSet):
        subsets = len(candidates.corpus.subsets)
        return Count(subsets * per_domain, False, f"{subsets} subsets × {per_domain:,}; no corpus yet")
    return Count(None, False, "no corpus yet")


def annotated_questions(
    candidates: CandidatesStage, heldout: CandidatesStage | None
) -> dict[str, Counter[str]] | None:
    """Split → domain → number of annotated questions; None if the corpus is not there.

    Documents are excluded by name, as `candidates` does. Those of `heldout` are excluded if it has not run yet.
    Documents with equal contents are not known yet.
    """
    try:
        annotations = read_annotations(candidates.corpus, candidates.seed, [])
        excluded = read_excluded(path for path in candidates.exclude if path.is_file())
        annotations = exclude_names(annotations, excluded, [])
        if heldout is not None and not all(path.is_file() for path in candidates.exclude):
            names = {normalize_name(a.doc_name) for a in read_annotations(heldout.corpus, heldout.seed, [])}
            annotations = [a for a in annotations if normalize_name(a.doc_name) not in names]
    except InputError:
        return None
    contents = {annotation.doc_name: annotation.doc_name for annotation in annotations}
    split_of = split_documents(contents, candidates.split, candidates.seed)
    counts: dict[str, Counter[str]] = {"train": Counter(), "select": Counter(), "heldout": Counter()}
    for annotation in annotations:
        counts[split_of[annotation.doc_name]][annotation.domain] += len(annotation.questions)
    return counts


def _records(path: Path, stage: StageConfig | None) -> int | None:
    """The number of records in a file; None without the file, or if a stage wrote it with other settings."""
    if not path.is_file():
        return None
    if stage is not None:
        try:
            if not stage.wrote(read_manifest(path.parent)):
                return None
        except InputError:
            if (path.parent / MANIFEST).is_file():  # unfinished; data without a manifest are the user's own
                return None
    with path.open("rb") as stream:
        return sum(1 for line in stream if line.strip())
