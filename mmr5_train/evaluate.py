"""Ranks the held-out questions with each system, and compares the systems.

    python -m mmr5_train.evaluate data=outputs/data/heldout.jsonl \\
        'systems={sft:outputs/sft/model,sft+grpo:outputs/grpo/model}' out=outputs/evaluate
    … 'systems={grpo:outputs/grpo/model,direct:{checkpoint:outputs/grpo/model,mode:direct}}'
    … 'systems={grpo:outputs/grpo/model,qwen:{crossencoder:qwen3_vl_reranker_2b}}'   # a pointwise reranker
    accelerate launch --num_processes 2 -m mmr5_train.evaluate …     # two processes share the questions

The first stage is always included as the baseline. Each system gives one greedy answer per question, which is the
same in every run, and `samples` sampled answers. Each finished batch of rankings is saved, so the same command
resumes an interrupted run. The stage writes

- `rankings/<system>.jsonl`: the answers, and `pages.jsonl`: the pages in them
- `results.json`: metrics, confidence intervals and paired differences (`mmr5_train.evaluation.scoring`)
- `trec/`: the same rankings and judgments in TREC format
- `timing.json`: seconds and tokens of each system; the only file that differs between two runs
- `manifest.json`

Rankings contain only the candidates, so recall@k for k above their number is the recall of all candidates.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from mmr5_train.chat.dialect import Dialect
from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import (
    InputError,
    check_settings,
    is_unfinished,
    open_output,
    read_records,
    run_settings,
    write_json,
    write_manifest,
    write_records,
)
from mmr5_train.common.part_times import PartTimes
from mmr5_train.evaluation.cost import cost
from mmr5_train.evaluation.scoring import results_table, score_rankings
from mmr5_train.evaluation.splits import check_split
from mmr5_train.evaluation.trec import write_trec
from mmr5_train.inference.fit import check_prompts_fit
from mmr5_train.inference.options import RankingOptions
from mmr5_train.inference.processes import (
    finished_batches,
    on_main_process,
    run_unfinished,
    start_inference_processes,
)
from mmr5_train.inference.reranker import Reranker
from mmr5_train.inference.systems import (
    FIRST_STAGE,
    LoadedSystem,
    System,
    SystemsOptions,
    checkpoint_options,
    learned_dialect,
    load_system,
    ranking_options,
)
from mmr5_train.inference.tasks import Batch, batch_seed
from mmr5_train.models.lengths import image_sizes
from mmr5_train.models.loading import load_processor, read_settings
from mmr5_train.models.settings import Settings, resolve_settings
from mmr5_train.ranking.records import (
    LocalId,
    ModelAnswer,
    Order,
    Page,
    PromptedTask,
    Ranking,
    RankingTask,
    rebase_images,
)

PARTIAL = "partial"
"""Folder in the output folder of an unfinished run: its finished batches and its settings."""


class RankedBatch(Batch):
    """One system's rankings of one batch of questions: a line of a partial file."""

    seconds: float
    sampling_seconds: float
    parts: dict[str, float] = Field(default_factory=dict)  # seconds of the parts of the greedy answers
    rankings: tuple[Ranking, ...]
    dialect: Dialect | None = None  # in which a server was asked


class EvaluateStage(StageConfig, SystemsOptions):
    """`python -m mmr5_train.evaluate` (configs/evaluate.yaml)."""

    data: Path = Field(description="ranking tasks, e.g. heldout.jsonl, with pages.jsonl in the same folder")
    any_split: bool = Field(default=False, description="allow documents of the splits train and select")
    skip: int = Field(default=0, ge=0, description="leave out so many questions at the beginning")
    limit: int | None = Field(default=None, gt=0, description="use only the first questions, at most this many")
    order: Order = Field(default="score", description="order of the candidates in a prompt")
    samples: int = Field(default=0, ge=0, description="sampled answers per question, besides the greedy one")
    temperature: float = Field(default=1.0, gt=0, description="of the sampled answers")


def main(config: EvaluateStage) -> None:
    processes = start_inference_processes()
    tasks = read_records(config.data, RankingTask)[config.skip :][: config.limit]
    if not tasks:
        raise InputError(f"{config.data}: no questions are left after the first {config.skip} (skip)")
    documents = (page.doc_name for task in tasks for page in task.candidates)
    check_split(config.data, documents, training=False, any_split=config.any_split)
    source = config.data.parent
    pages = candidate_pages(tasks, source / "pages.jsonl")
    resolved = {  # checks all systems now, because one may be loaded hours later
        name: resolve_settings(system.checkpoint, checkpoint_options(system, config), base=system.base)
        for name, system in config.systems.items()
        if system.checkpoint
    }
    checkpoints = [system.checkpoint for system in config.systems.values() if system.checkpoint]
    if config.systems:
        check_lengths(tasks, config, resolved)
    inputs = [config.data, source / "pages.jsonl"]
    on_main_process(lambda: prepare_output(config, [*inputs, *map(Path, checkpoints)]))
    for name in config.systems:
        rank_share(name, tasks, config, str(processes.device))
    if processes.is_main_process:
        write_results(config, resolved, tasks, pages, inputs)


def check_lengths(tasks: Sequence[RankingTask], config: EvaluateStage, resolved: Mapping[str, Settings]) -> None:
    """Raises `InputError` for an unreadable page image, and for questions that do not fit a system's context.

    The context of a model on a server is unknown.
    """
    sizes = image_sizes((page for task in tasks for page in task.candidates), config.data.parent)
    prompted = [task.in_prompt_order(config.order, config.seed) for task in tasks]
    for name, settings in resolved.items():
        system = config.systems[name]
        if system.server is not None:
            continue
        processor = load_processor(settings.model)
        options = RankingOptions(**ranking_options(system, config))
        source, path = f"systems.{name}", settings.model.path
        check_prompts_fit(source, path, processor, settings.prompt, options, prompted, sizes)


def prepare_output(config: EvaluateStage, input_paths: Sequence[Path]) -> None:
    """Resumes the interrupted run in the output folder if its settings are the same, else starts a new one."""
    settings = json.loads(json.dumps(run_settings(config)))
    settings_path = config.out / PARTIAL / "settings.json"
    if settings_path.is_file() and is_unfinished(config.out, "evaluate") and not config.overwrite:
        check_settings(config.out, json.loads(settings_path.read_text(encoding="utf-8")), settings)
    else:
        open_output(config.out, config.overwrite, inputs=input_paths, stage="evaluate")
        write_json(settings_path, settings)


def write_results(
    config: EvaluateStage,
    resolved: dict[str, Settings],
    tasks: Sequence[RankingTask],
    pages: list[Page],
    inputs: list[Path],
) -> None:
    """Scores the finished batches of all systems, and writes the stage's files.

    `resolved` are the settings of each system with a checkpoint.
    """
    out, source = config.out, config.data.parent
    rankings, timing = {FIRST_STAGE: [first_stage(task) for task in tasks]}, {}
    dialects: dict[str, Dialect] = {}
    for name in config.systems:
        batches = finished_batches(out / PARTIAL, name, RankedBatch)
        rankings[name] = [ranking for start in sorted(batches) for ranking in batches[start].rankings]
        timing[name] = cost(
            [ranking.greedy for ranking in rankings[name]],
            sum(batch.seconds for batch in batches.values()),
            sum(batch.sampling_seconds for batch in batches.values()),
            [batch.parts for batch in batches.values()],
        )
        for batch in batches.values():
            if batch.dialect:
                dialects[name] = batch.dialect
    for name, system_rankings in rankings.items():
        folder = out / "rankings"
        write_records(folder / f"{name}.jsonl", rebase_images(system_rankings, source, folder))
    write_records(out / "pages.jsonl", rebase_images(pages, source, out))
    results = score_rankings(rankings, pages, seed=config.seed)
    write_json(out / "results.json", results)
    write_trec(out / "trec", rankings)
    write_json(out / "timing.json", timing)
    origins = checkpoint_origins(config.systems)
    counts: dict[str, Any] = {"questions": len(tasks), "systems": len(rankings), "samples": config.samples}
    counts |= {"checkpoints": origins} if origins else {}
    if dialects:
        counts["dialects"] = {name: dialect.model_dump(mode="json") for name, dialect in dialects.items()}
    write_manifest(
        out,
        stage="evaluate",
        config=config.model_dump(mode="json"),
        inputs=inputs,
        counts=counts,
        resolved={name: settings.to_record().model_dump(mode="json") for name, settings in resolved.items()},
    )
    shutil.rmtree(out / PARTIAL)
    print(results_table(results))
    for name, origin in origins.items():
        print(f" {name}: {config.systems[name].checkpoint}, {origin}")
    print(f"evaluate: {', '.join(rankings)} on {len(tasks)} questions in {out}")


def checkpoint_origins(systems: Mapping[str, System]) -> dict[str, str]:
    """System → which checkpoint of its training run it is, such as "step 50 of 100", where that is known."""
    checkpoints = {name: system.checkpoint for name, system in systems.items() if system.checkpoint}
    settings = {name: read_settings(checkpoint) for name, checkpoint in checkpoints.items()}
    return {name: found.origin for name, found in settings.items() if found and found.origin}


def candidate_pages(tasks: Iterable[RankingTask], path: Path) -> list[Page]:
    """The pages in a pages.jsonl that are candidates of the tasks. Raises `InputError` if one is missing there."""
    query_ids = {candidate.id: task.query_id for task in tasks for candidate in task.candidates}
    pages = [page for page in read_records(path, Page, unique="id") if page.id in query_ids]
    page_ids = {page.id for page in pages}
    for page_id, query_id in query_ids.items():
        if page_id not in page_ids:
            raise InputError(
                f"{path}: lacks page {page_id}, a candidate of {query_id}; both files must come from the same run"
            )
    return pages


def first_stage(task: RankingTask) -> Ranking:
    """The first stage's own order as a ranking, without a completion."""
    order = tuple(LocalId(i) for i in range(1, len(task.candidates) + 1))
    return _ranking(FIRST_STAGE, task.in_prompt_order("score"), ModelAnswer(completion="", order=order))


def rank_share(name: str, tasks: Sequence[RankingTask], config: EvaluateStage, device: str) -> None:
    """Ranks this process's share of the batches of a system that are not finished. Call on all processes."""

    def load() -> Callable[[int], RankedBatch]:
        reranker = load_system(config.systems[name], config, device)
        return lambda start: rank_batch(name, start, tasks[start : start + config.batch_size], reranker, config)

    run_unfinished(config.out / PARTIAL, name, RankedBatch, range(0, len(tasks), config.batch_size), load)


def rank_batch(
    name: str, start: int, tasks: Sequence[RankingTask], reranker: LoadedSystem, config: EvaluateStage
) -> RankedBatch:
    """Ranks a batch of tasks with a system: greedy answers, then samples. `start` is the first task's index."""
    prompted = [task.in_prompt_order(config.order, config.seed) for task in tasks]
    queries, folder = [task.query for task in tasks], config.data.parent
    greedy_start, times = time.monotonic(), PartTimes()
    with times.part("open"):
        images = [
            [reranker.open_page(folder / page.image) for page in prompted_task.shown] for prompted_task in prompted
        ]
    greedy = [ranked.merged_answer() for ranked in reranker.rank_images(queries, images, times=times)]
    sampling_start = time.monotonic()
    samples: list[list[ModelAnswer]] = [[] for _ in tasks]
    if config.samples and isinstance(reranker, Reranker) and reranker.mode in ("reason", "direct"):
        size = max(1, config.batch_size // config.samples)
        for i in range(0, len(tasks), size):
            samples[i : i + size] = reranker.backend.generate(
                queries[i : i + size],
                images[i : i + size],
                samples=config.samples,
                temperature=config.temperature,
                seed=batch_seed(config.seed, start + i),
            )
    return RankedBatch(
        start=start,
        seconds=sampling_start - greedy_start,
        sampling_seconds=time.monotonic() - sampling_start,
        parts=times.seconds,
        rankings=tuple(_ranking(name, *row) for row in zip(prompted, greedy, samples, strict=True)),
        dialect=learned_dialect(reranker),
    )


def _ranking(
    system: str, prompted: PromptedTask, greedy: ModelAnswer, samples: Sequence[ModelAnswer] = ()
) -> Ranking:
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


if __name__ == "__main__":
    run_stage(main, EvaluateStage, "evaluate")
