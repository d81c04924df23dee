"""Makes reasoning traces for SFT from a teacher's notes on the candidates.

    python -m data_construction.traces data=outputs/data/train.jsonl out=outputs/traces
    python -m data_construction.traces … teacher=openai teacher.model=… refine=true

As in MM-R5 (arXiv 2506.12364, data construction), the teacher explains every candidate separately, and the label
decides whether it argues that the page helps. The teacher also states its verdict on the page as a field, which
must agree with the label. The prompt shows the candidates in shuffled order. The think block is the notes in that
order, one line per page, each with its verdict at the end ("Image i: a map, so it does not help."). The answer is
all relevant ids, then the others, each group ascending. With `refine`, a second call summarizes the notes in two
sentences.

A question is dropped and listed in skipped.jsonl if a call or a check fails. The same happens if none of its
candidates is relevant, unless `missed: keep`: then every note says that the page does not help, and the answer is
1..n.

The answers of a paid teacher are stored as they arrive, in a file next to `out`. To resume an interrupted run, run
the same command again: it requests only the missing answers and writes the same bytes as an uninterrupted run.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from tqdm import tqdm

from data_construction.teacher.calls import TeacherFailure
from data_construction.teacher.checks import (
    RETRY_PROBLEMS,
    FailedChecks,
    Rules,
    failed_checks,
    failed_note_checks,
    failed_reasoning_checks,
)
from data_construction.teacher.replies import PageNote
from data_construction.teacher.teacher import Teacher, TeacherConfig, make_teacher
from data_construction.teacher.vision import OpenAIConfig
from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import InputError, open_output, read_records, write_manifest, write_records
from mmr5_train.ranking.notes import join_notes
from mmr5_train.ranking.records import (
    LocalId,
    Order,
    Page,
    PageId,
    PromptedTask,
    RankingTask,
    Skipped,
    Trace,
    rebase_images,
)

NO_POSITIVE = "no relevant page among the candidates"


class TracesStage(StageConfig):
    """`python -m data_construction.traces` (configs/traces.yaml)."""

    data: Path = Field(description="ranking tasks, usually train.jsonl of a candidates folder")
    pages: Path | None = Field(default=None, description="pages.jsonl; None: the one in the folder of `data`")
    teacher: TeacherConfig
    order: Order = "shuffled"
    refine: bool = False
    missed: Literal["drop", "keep"] = Field(
        default="drop",
        description="questions without a relevant candidate: drop (as in MM-R5), or explain that no page helps",
    )
    max_words: int = Field(
        default=40,
        ge=10,
        description="limit of a note, without its verdict; refined reasoning may have twice as many",
    )
    second_try: bool = Field(
        default=False, description="repeat a request whose answer fails a check, with the problem in the prompt"
    )
    answers: Path | None = Field(
        default=None, description="store of a paid teacher's answers; None: next to `out`"
    )
    dry_run: bool = Field(
        default=False, description="print the estimated calls and cost of a paid teacher, and stop"
    )

    @property
    def answers_file(self) -> Path:
        out = self.out.resolve()
        return self.answers or out.with_name(f"{out.name}.answers.sqlite")

    @property
    def is_paid(self) -> bool:
        return isinstance(self.teacher, OpenAIConfig)

    @property
    def rules(self) -> Rules:
        """The language is not checked for the extractive teacher, which always writes English."""
        return Rules(self.max_words, self.refine, same_language=self.is_paid)


def main(config: TracesStage) -> None:
    tasks = read_records(config.data, RankingTask)
    pages_file = config.pages or config.data.with_name("pages.jsonl")
    pages = {page.id: page for page in read_records(pages_file, Page, unique="id")}
    for task in tasks:
        check_pages(task, pages, config.data, pages_file)
    prompted = [task.in_prompt_order(config.order, config.seed) for task in tasks]
    if config.dry_run:
        print(estimate(prompted, pages, config))
        return
    if config.refine:
        print("traces: refined reasoning states no verdict on a page, which reward=true_reasoning would need")
    teacher = make_teacher(config.teacher, config.answers_file, config.max_words, config.overwrite)
    out = open_output(config.out, config.overwrite, inputs=[config.data, pages_file], stage="traces")
    try:
        results = asyncio.run(make_traces(prompted, pages, teacher, config))
    except InputError as error:
        raise InputError(f"{error}\n{resume_hint(config)}") from None
    except KeyboardInterrupt:
        print(resume_hint(config))
        raise
    try:
        write_results(out, results, teacher, config, pages_file)
    except OSError as error:
        raise InputError(f"{out}: can't be written ({error.strerror}); {resume_hint(config)}") from None


def resume_hint(config: TracesStage) -> str:
    stored = f"the answers so far are stored in {config.answers_file}; " if config.is_paid else ""
    return f"{stored}run the same command again to continue"


def write_results(
    out: Path, results: Sequence[Trace | Skipped], teacher: Teacher, config: TracesStage, pages_file: Path
) -> None:
    """Writes the files of the stage and prints the summary line. Raises `InputError` if there is no trace."""
    traces = [result for result in results if isinstance(result, Trace)]
    skipped = [result for result in results if isinstance(result, Skipped)]
    write_records(out / "skipped.jsonl", skipped)
    if not traces:
        raise InputError(
            f"{config.data}: none of {len(results)} questions got a trace; the first is {skipped[0].query_id}: "
            f"{skipped[0].reason} ({skipped[0].detail}); all are listed in {out / 'skipped.jsonl'}"
        )
    write_records(out / "traces.jsonl", traces)
    write_manifest(
        out,
        stage="traces",
        config=config.model_dump(mode="json"),
        inputs=[config.data, pages_file],
        counts={
            "questions": len(results),
            "traces": len(traces),
            "skipped": dict(sorted(Counter(skip.reason for skip in skipped).items())),
            "teacher": dict(sorted(teacher.counts.items())),
        },
        resolved=teacher.resolved,
    )
    print(
        f"traces: {len(traces)} of {len(results)} questions explained by the {config.teacher.name} teacher "
        f"({len(skipped)} skipped) → {out / 'traces.jsonl'}"
    )


def estimate(prompted: Sequence[PromptedTask], pages: dict[PageId, Page], config: TracesStage) -> str:
    """The text that a dry run prints. It needs no key, no network and no output folder."""
    if not isinstance(config.teacher, OpenAIConfig):
        return f"dry run: the {config.teacher.name} teacher costs nothing"
    selected = [task for task in prompted if is_explained(task, config)]
    teacher = config.teacher
    cost = teacher.estimate(selected, pages, config.refine, config.max_words)
    return (
        f"dry run: {len(selected)} of {len(prompted)} questions, if every answer has the full length and passes "
        f"at the first try; answers that are already in {config.answers_file} are not paid for again\n"
        + cost.report(teacher.model or "model", teacher.price, teacher.concurrency, teacher.batch)
    )


def is_explained(task: PromptedTask, config: TracesStage) -> bool:
    """Whether the teacher explains this question, or it is skipped for lack of a relevant candidate."""
    return bool(task.local_positives) or config.missed == "keep"


def check_pages(task: RankingTask, pages: dict[PageId, Page], tasks_file: Path, pages_file: Path) -> None:
    """Raises `InputError` if a candidate is not in pages.jsonl, or its image does not exist."""
    for candidate in task.candidates:
        location = f"question {task.query_id}: page {candidate.id}"
        if candidate.id not in pages:
            raise InputError(
                f"{tasks_file}, {location} is not in {pages_file}; both files must come from the same run: set "
                "pages=… or run the stage that writes the candidates again"
            )
        image = tasks_file.parent / candidate.image
        if not image.is_file():
            raise InputError(
                f"{tasks_file}, {location}: no image {image}; run the stage that writes the candidates again"
            )


async def make_traces(
    prompted: Sequence[PromptedTask], pages: dict[PageId, Page], teacher: Teacher, config: TracesStage
) -> list[Trace | Skipped]:
    """One result per question, in the order of the questions.

    As many questions are in progress as there may be calls in flight. While one question waits for its last page
    or its refinement, the others keep the server busy.
    """
    slots = asyncio.Semaphore(teacher.concurrency)

    async def bounded(task: PromptedTask) -> Trace | Skipped:
        async with slots:
            result = await make_trace(task, pages, teacher, config)
        bar.set_postfix_str(teacher.status(), refresh=False)
        bar.update()
        return result

    with tqdm(total=len(prompted), desc="traces", unit="question") as bar:
        running = [asyncio.create_task(bounded(task)) for task in prompted]
        try:
            return await asyncio.gather(*running)
        except BaseException:
            print(f"\ntraces: stopping after {bar.n} questions; waiting for calls in flight", file=sys.stderr)
            raise
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await teacher.close()


async def make_trace(
    prompted: PromptedTask, pages: dict[PageId, Page], teacher: Teacher, config: TracesStage
) -> Trace | Skipped:
    """Explains each page, refines and checks. Raises `InputError` if no question can succeed."""
    task, positives = prompted.task, prompted.local_positives
    if not is_explained(prompted, config):
        return Skipped(query_id=task.query_id, reason=NO_POSITIVE, detail=f"{len(task.candidates)} candidates")
    folder, words, rules = config.data.parent, config.max_words, config.rules
    shown_pages = [pages[candidate.id] for candidate in prompted.shown]

    async def explain(i: LocalId) -> PageNote:
        page, image, helps = shown_pages[i - 1], folder / prompted.shown[i - 1].image, i in positives
        note = await teacher.explain(task.query, page, image, helps, words)
        if problem := retry_problem(failed_note_checks(i, note, task.query, page, helps, rules), config, teacher):
            note = await teacher.explain(task.query, page, image, helps, words, problem)
        return note

    async def refine(notes: Sequence[str]) -> str:
        think = await teacher.refine(task.query, notes, positives, 2 * words)
        failed = failed_reasoning_checks(think, task.query, shown_pages, positives, rules)
        if problem := retry_problem(failed, config, teacher):
            think = await teacher.refine(task.query, notes, positives, 2 * words, problem)
        return think

    try:
        page_notes = await gather_in_order([explain(LocalId(i)) for i in range(1, len(shown_pages) + 1)])
        notes = [str(note) for note in page_notes]
        think = await refine(notes) if config.refine else join_notes(notes)
    except TeacherFailure as failure:
        return Skipped(query_id=task.query_id, reason=failure.reason, detail=failure.detail)
    others = [LocalId(i) for i in range(1, len(shown_pages) + 1) if i not in positives]
    answer = (*positives, *others)
    for name, detail in failed_checks(task.query, shown_pages, page_notes, think, answer, positives, rules):
        return Skipped(query_id=task.query_id, reason=f"check {name}", detail=detail)
    trace = Trace(
        query_id=task.query_id,
        query=task.query,
        domain=task.domain,
        shown=prompted.shown,
        notes=tuple(notes),
        think=think,
        answer=answer,
        positive_ids=positives,
    )
    return next(rebase_images([trace], folder, config.out))


def retry_problem(failed: FailedChecks, config: TracesStage, teacher: Teacher) -> str:
    """The problem to put into the prompt of a second try; "" if there is no second try."""
    if not config.second_try:
        return ""
    problem = next((RETRY_PROBLEMS[name] for name, _ in failed if name in RETRY_PROBLEMS), "")
    if problem:
        teacher.counts["second_try"] += 1
    return problem


async def gather_in_order(calls: Sequence[Coroutine[Any, Any, PageNote]]) -> list[PageNote]:
    """The results of concurrent calls.

    Waits for all calls, then raises the error of the first failed call in the order of `calls`, so that the error
    does not depend on timing. Errors that end the run come before `TeacherFailure`.
    """
    results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, TeacherFailure)):
        raise error
    return [result for result in results if isinstance(result, PageNote)]


if __name__ == "__main__":
    run_stage(main, TracesStage, "traces")
