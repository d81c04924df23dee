"""Stage 5, evaluation: every system ranks the held-out questions; figures, intervals, paired differences.

    python -m mmr5_train.evaluate data=outputs/data/heldout.jsonl \\
        'systems={sft:outputs/sft/model,sft+grpo:outputs/grpo/model}' out=outputs/evaluate

The first stage is always there, as the baseline. Each checkpoint gives one greedy answer a question, the
same every time, and `samples` sampled ones. Writes `rankings/<system>.jsonl` (what was answered), `pages.jsonl`
(the pages in them), `results.json` (`mmr5_train.ranking.scoring` says what is in it), `timing.json` (the one
file that differs between two runs) and a manifest. Rankings hold the candidates only: recall@k for k beyond
their number is recall of all candidates.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from tqdm import tqdm

from mmr5_train.config import StageConfig, run_stage
from mmr5_train.models.inputs import check_images
from mmr5_train.models.loading import ModelConfig, resolve_checkpoint
from mmr5_train.ranking.files import (
    InputError,
    open_output,
    read_records,
    write_json,
    write_manifest,
    write_records,
)
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import (
    Answered,
    LocalId,
    Order,
    Page,
    PromptedTask,
    Ranking,
    RankingTask,
    rebase_images,
)
from mmr5_train.ranking.scoring import results_table, score_rankings
from mmr5_train.ranking.trec import write_trec
from mmr5_train.reranker import Reranker

FIRST_STAGE = "first_stage"


class EvaluateStage(StageConfig):
    """`python -m mmr5_train.evaluate` (configs/evaluate.yaml)."""

    data: Path = Field(description="ranking tasks, e.g. heldout.jsonl; pages.jsonl stands beside it")
    systems: dict[str, str] = Field(description="name → checkpoint, in the order they are compared in")
    limit: int | None = Field(default=None, gt=0, description="use the first so many questions")
    order: Order = Field(default="score", description="how a prompt shows its candidates")
    think: bool = Field(default=True, description="whether the models were taught a think block")
    batch_size: int = Field(gt=0, description="completions generated at a time")
    samples: int = Field(default=0, ge=0, description="sampled answers a question, besides the greedy one")
    temperature: float = Field(default=1.0, gt=0, description="of the sampled answers")
    max_new_tokens: int = Field(gt=0)
    model: ModelConfig
    prompt: Prompt

    @field_validator("systems", mode="before")
    @classmethod
    def _none_given(cls, systems: Any) -> Any:
        return {} if systems is None else systems  # Hydra adds names to a null, not to an empty dict

    @field_validator("systems")
    @classmethod
    def _names_are_file_names(cls, systems: dict[str, str]) -> dict[str, str]:
        for name in systems:
            if name == FIRST_STAGE or not re.fullmatch(r"\w[\w.+-]*", name):
                raise ValueError(
                    f"{name!r} can't name a system: letters, digits and _ . + - only, not {FIRST_STAGE}"
                )
        return systems


def main(config: EvaluateStage) -> None:
    tasks = read_records(config.data, RankingTask)[: config.limit]
    source = config.data.parent
    pages = used_pages(tasks, source / "pages.jsonl")
    for checkpoint in config.systems.values():  # a wrong path is worth knowing before the first hour
        resolve_checkpoint(checkpoint)
    if config.systems:
        check_images((page for task in tasks for page in task.candidates), source)
    inputs = [config.data, source / "pages.jsonl"]
    read = [*inputs, *(Path(checkpoint) for checkpoint in config.systems.values())]
    out = open_output(config.out, config.overwrite, inputs=read)

    rankings = {FIRST_STAGE: [first_stage(task) for task in tasks]}
    timing = {}
    for system, checkpoint in config.systems.items():
        started = time.monotonic()
        rankings[system] = rank_all(system, checkpoint, tasks, config)
        seconds = time.monotonic() - started
        timing[system] = {"seconds": seconds, "seconds_per_question": seconds / len(tasks)}
        _write_rankings(out, system, rankings[system], source)
    _write_rankings(out, FIRST_STAGE, rankings[FIRST_STAGE], source)
    write_records(out / "pages.jsonl", rebase_images(pages, source, out))
    results = score_rankings(rankings, pages, seed=config.seed)
    write_json(out / "results.json", results)
    write_trec(out / "trec", rankings)
    write_json(out / "timing.json", timing)
    write_manifest(
        out,
        stage="evaluate",
        config=config.model_dump(mode="json"),
        inputs=inputs,
        counts={"questions": len(tasks), "systems": len(rankings), "samples": config.samples},
    )
    print(results_table(results))
    print(f"evaluate: {', '.join(rankings)} on {len(tasks)} questions in {out}")


def used_pages(tasks: Iterable[RankingTask], path: Path) -> list[Page]:
    """The pages of a pages.jsonl that are a candidate of some task. Raises `InputError` where one is not there."""
    asked = {candidate.id: task.query_id for task in tasks for candidate in task.candidates}
    pages = [page for page in read_records(path, Page, unique="id") if page.id in asked]
    there = {page.id for page in pages}
    for page in (page for page in asked if page not in there):
        raise InputError(f"{path}: lacks page {page}, a candidate of {asked[page]}; both must come from one run")
    return pages


def first_stage(task: RankingTask) -> Ranking:
    """The first stage's own order, as a ranking without a completion."""
    order = tuple(LocalId(i) for i in range(1, len(task.candidates) + 1))
    return _ranking(FIRST_STAGE, task.prompted("score"), Answered(completion="", order=order))


def rank_all(system: str, checkpoint: str, tasks: Sequence[RankingTask], config: EvaluateStage) -> list[Ranking]:
    """A checkpoint's rankings of all tasks, in their order."""
    prompted = [task.prompted(config.order, config.seed) for task in tasks]
    reranker = Reranker(
        checkpoint, config.model, config.prompt, think=config.think, max_new_tokens=config.max_new_tokens
    )
    folder, samples = config.data.parent, config.samples
    greedy = reranker.answer(prompted, folder, batch_size=config.batch_size)
    first = [answers[0] for answers in _progress(greedy, len(tasks), f"{system}, greedy")]
    drawn: Iterable[list[Answered]] = [[]] * len(tasks)
    if samples:
        at_a_time = max(1, config.batch_size // samples)
        sampled = reranker.answer(
            prompted,
            folder,
            batch_size=at_a_time,
            samples=samples,
            temperature=config.temperature,
            seed=config.seed,
        )
        drawn = _progress(sampled, len(tasks), f"{system}, sampled")
    return [_ranking(system, *row) for row in zip(prompted, first, drawn, strict=True)]


def _ranking(system: str, prompted: PromptedTask, greedy: Answered, samples: Sequence[Answered] = ()) -> Ranking:
    task = prompted.task
    return Ranking(
        system=system,
        query_id=task.query_id,
        query=task.query,
        domain=task.domain,
        question_types=task.question_types,
        shown=prompted.shown,
        positives=task.positives,
        greedy=greedy,
        samples=tuple(samples),
    )


def _progress(answers: Iterable[list[Answered]], total: int, what: str) -> Iterator[list[Answered]]:
    yield from tqdm(answers, total=total, desc=what, unit="question")


def _write_rankings(out: Path, system: str, rankings: Sequence[Ranking], source: Path) -> None:
    folder = out / "rankings"
    write_records(folder / f"{system}.jsonl", rebase_images(rankings, source, folder))


if __name__ == "__main__":
    run_stage(main, EvaluateStage, "evaluate")
