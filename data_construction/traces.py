"""Reasoning traces: the teacher explains each page, the notes become a think block, the labels the answer.

    python -m data_construction.traces data=outputs/data/train.jsonl out=outputs/traces
    python -m data_construction.traces … teacher=openai teacher.model=… refine=true

As in MM-R5 (arXiv 2506.12364, data construction): every candidate is explained separately, in the direction
of its label; shown in shuffled order, the notes are the think block ("Image i: note", a line a page) and the
answer is all relevant ids, then the rest, each ascending. With `refine` a second call makes two sentences of
the notes. A question with a failed call or check is dropped and listed in skipped.jsonl. So is one without a
relevant page among its candidates, unless `missed: keep`: then every note says no, and the answer is 1..n.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field
from tqdm import tqdm

from data_construction.teacher import Teacher, TeacherConfig, TeacherFailure, make_teacher
from mmr5_train.config import StageConfig, run_stage
from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.files import InputError, open_output, read_records, write_manifest, write_records
from mmr5_train.ranking.notes import join_notes, verdict
from mmr5_train.ranking.prompt import neutral, render_completion
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
PARTIAL = "traces.partial.jsonl"

_HELPS_NOT = re.compile(
    r"(?:\b(?:no|not|never|cannot|nothing)\b|n[’']t\b)(?:\W+\w+){0,3}?\W+"
    r"(?:help\w*|answer\w*|relevant|useful|use|bear\w*|address\w*)\b|\b(?:irrelevant|unrelated|unhelpful|useless)\b",
    re.IGNORECASE,
)
_HELPS = re.compile(r"\b(?:helps?|helpful|answers|relevant|useful)\b", re.IGNORECASE)
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”")
# Words that a page or a question may hold for its own reasons, and turns of phrase that only a label explains.
_LABEL_WORD = re.compile(r"\b(?:labels?|positives?|negatives?)\b", re.IGNORECASE)
_LABEL_TOLD = re.compile(
    r"\bground[- ]?truth\b|\b(?:positive|negative) (?:page|image|candidate|example)s?\b"
    r"|\blabell?ed (?:as )?(?:a )?(?:ir)?(?:relevant|positive|negative|correct|wrong|helpful|useful)\b"
    r"|\b(?:the|given|its) label (?:is|says|states)\b|\b(?:according to|by|given) (?:the|its) label\b"
    r"|\b(?:was|am|were|been) told\b",
    re.IGNORECASE,
)
_NAMED = re.compile(r"\bImages? (\d+(?:(?:, ?and |, ?| ?and | ?& ?)\d+)*)", re.IGNORECASE)


class TracesStage(StageConfig):
    """`python -m data_construction.traces` (configs/traces.yaml)."""

    data: Path = Field(description="jsonl of ranking tasks, mostly train.jsonl of a data folder")
    pages: Path | None = Field(default=None, description="pages.jsonl; null: the one beside data")
    teacher: TeacherConfig
    order: Order = "shuffled"
    refine: bool = False
    missed: Literal["drop", "keep"] = Field(
        default="drop",
        description="questions without a relevant candidate: left out (as in MM-R5), or explained: no page helps",
    )
    max_words: int = Field(default=40, ge=10, description="longest note; refined reasoning may have twice as many")


def main(config: TracesStage) -> None:
    tasks = read_records(config.data, RankingTask)
    pages_file = config.pages or config.data.with_name("pages.jsonl")
    pages = {page.id: page for page in read_records(pages_file, Page, unique="id")}
    for task in tasks:
        check_pages(task, pages, config.data, pages_file)
    teacher = make_teacher(config.teacher)
    out = open_output(config.out, config.overwrite, inputs=[config.data, pages_file])

    prompted = [task.prompted(config.order, config.seed) for task in tasks]
    with (out / PARTIAL).open("w", encoding="utf-8") as partial:
        try:
            results = asyncio.run(make_traces(prompted, pages, teacher, config, partial))
        except InputError as error:
            raise InputError(f"{error}\n{partial_message(out)}") from None
        except KeyboardInterrupt:
            print(partial_message(out))
            raise
    traces = [result for result in results if isinstance(result, Trace)]
    skipped = [result for result in results if isinstance(result, Skipped)]
    reasons = Counter(skip.reason for skip in skipped)
    write_records(out / "skipped.jsonl", skipped)
    (out / PARTIAL).unlink()
    if not traces:
        raise InputError(
            f"{config.data}: none of {len(tasks)} questions got a trace; the first, {skipped[0].query_id}: "
            f"{skipped[0].reason} ({skipped[0].detail}); all are listed in {out / 'skipped.jsonl'}"
        )
    write_records(out / "traces.jsonl", traces)
    write_manifest(
        out,
        stage="traces",
        config=config.model_dump(mode="json"),
        inputs=[config.data, pages_file],
        counts={
            "questions": len(tasks),
            "traces": len(traces),
            "skipped": dict(sorted(reasons.items())),
            "teacher": dict(sorted(teacher.counts.items())),
        },
    )
    print(
        f"traces: {len(traces)} of {len(tasks)} questions explained by the {config.teacher.name} teacher "
        f"({len(skipped)} skipped) → {out / 'traces.jsonl'}"
    )


def check_pages(task: RankingTask, pages: dict[PageId, Page], tasks_file: Path, pages_file: Path) -> None:
    """Raises `InputError` for a candidate that pages.jsonl does not have, or whose image is not there."""
    for candidate in task.candidates:
        where = f"question {task.query_id}: page {candidate.id}"
        if candidate.id not in pages:
            raise InputError(
                f"{tasks_file}, {where} is not in {pages_file}; both must come from one run: give pages=… or run "
                "the stage that writes the candidates again"
            )
        image = tasks_file.parent / candidate.image
        if not image.is_file():
            raise InputError(
                f"{tasks_file}, {where}: no image {image}; run the stage that writes the candidates again"
            )


def partial_message(out: Path) -> str:
    with (out / PARTIAL).open(encoding="utf-8") as lines:
        done = sum(1 for _ in lines)
    return f"{done} finished traces are kept in {out / PARTIAL} (overwrite=true removes them)"


async def make_traces(
    prompted: Sequence[PromptedTask],
    pages: dict[PageId, Page],
    teacher: Teacher,
    config: TracesStage,
    partial: IO[str],
) -> list[Trace | Skipped]:
    """One result a question, in the questions' order whatever the concurrency.

    Finished traces are appended to `partial` at once, so that a run which is stopped keeps them.
    """
    slots = asyncio.Semaphore(teacher.concurrency)  # few questions at a time: the first are done early

    async def bounded(task: PromptedTask) -> Trace | Skipped:
        async with slots:
            result = await make_trace(task, pages, teacher, config)
        if isinstance(result, Trace):
            partial.write(result.model_dump_json() + "\n")
            partial.flush()
        bar.update()
        return result

    with tqdm(total=len(prompted), desc="traces", unit="question") as bar:
        running = [asyncio.create_task(bounded(task)) for task in prompted]
        try:
            return await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await teacher.close()


async def make_trace(
    prompted: PromptedTask, pages: dict[PageId, Page], teacher: Teacher, config: TracesStage
) -> Trace | Skipped:
    """Explain each page, assemble, refine, verify. Raises `InputError` where no question can succeed."""
    task, positives = prompted.task, prompted.local_positives
    if not positives and config.missed == "drop":
        return Skipped(query_id=task.query_id, reason=NO_POSITIVE, detail=f"{len(task.candidates)} candidates")
    folder, words = config.data.parent, config.max_words
    seen = [pages[candidate.id] for candidate in prompted.shown]

    async def explain(i: int) -> str:
        image = folder / prompted.shown[i - 1].image
        return await teacher.explain(task.query, seen[i - 1], image, i in positives, words)

    try:
        notes = await all_in_order([explain(i) for i in range(1, len(seen) + 1)])
        think = (
            await teacher.refine(task.query, notes, positives, 2 * words) if config.refine else join_notes(notes)
        )
    except TeacherFailure as failure:
        return Skipped(query_id=task.query_id, reason=failure.reason, detail=failure.detail)
    rest = [LocalId(i) for i in range(1, len(seen) + 1) if i not in positives]
    answer = (*positives, *rest)
    for name, detail in failed_checks(task.query, seen, notes, think, answer, positives, config):
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


async def all_in_order(calls: Sequence[Coroutine[Any, Any, str]]) -> list[str]:
    """The calls' results. The error raised is that of the first failed call in order, not in time."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, TeacherFailure)):
        raise error
    return [result for result in results if isinstance(result, str)]


def failed_checks(
    query: str,
    seen: Sequence[Page],
    notes: Sequence[str],
    think: str,
    answer: tuple[LocalId, ...],
    positives: tuple[LocalId, ...],
    config: TracesStage,
) -> Iterator[tuple[str, str]]:
    """(name, what was found) of each check that a trace does not pass. Everything local refers to `seen`."""
    if len(notes) != len(seen) or not all(note.strip() and "\n" not in note for note in notes):
        yield "one_note_a_page", f"{len(notes)} notes on {len(seen)} pages"
    for i, (page, note) in enumerate(zip(seen, notes, strict=False), 1):
        if len(note.split()) > config.max_words:
            yield "short_notes", f"image {i}: {len(note.split())} words, at most {config.max_words} asked for"
        if direction(note) not in (None, i in positives):
            yield "direction", f"image {i} {'helps' if i in positives else 'does not help'}; the note: {note}"
        if word := label_word(note, query, [page]):
            yield "no_label_words", f"image {i}: {word!r} in: {note}"
    if config.refine:
        named = named_pages(think)
        if not set(positives) <= named or not named <= set(answer):
            yield "names_pages", f"images {sorted(named)} named, relevant are {list(positives)}, in: {think}"
        if len(think.split()) > 2 * config.max_words:
            yield "short_reasoning", f"{len(think.split())} words, at most {2 * config.max_words} asked for"
        if word := label_word(think, query, seen):
            yield "no_label_words", f"{word!r} in: {think}"
    if neutral(think) != think:
        yield "no_tags", f"a tag in: {think}"
    read = parse_answer(render_completion(think, answer), len(seen))
    relevant_first = set(answer[: len(positives)]) == set(positives)
    if read.defects or not read.structure_valid or not relevant_first:
        yield "answer", f"{list(answer)} reads as {list(read.ids)}, relevant are {list(positives)}"


def direction(note: str) -> bool | None:
    """Whether a note says that its page helps; None where it can't be told."""
    told = verdict(note)
    if told is not None:
        return told
    own_words = _QUOTED.sub(" ", note)
    rest = _HELPS_NOT.sub(" ", own_words)
    against, for_it = rest != own_words, bool(_HELPS.search(rest))
    return None if against == for_it else for_it


def label_word(text: str, query: str, seen: Sequence[Page]) -> str | None:
    """A word that gives away that the teacher knew the label; those of the pages and the question are none."""
    own_words = _QUOTED.sub(" ", text)
    if told := _LABEL_TOLD.search(own_words):
        return told[0]
    words = _LABEL_WORD.findall(own_words)
    given = " ".join([query, *(f"{page.text} {page.description}" for page in seen)]).lower() if words else ""
    return next((word for word in words if word.lower() not in given), None)


def named_pages(text: str) -> set[int]:
    """Local ids that a text names, as in "Image 2" or "Images 1, 3 and 4"."""
    return {int(i) for ids in _NAMED.findall(text) for i in re.findall(r"\d+", ids)}


if __name__ == "__main__":
    run_stage(main, TracesStage, "traces")
