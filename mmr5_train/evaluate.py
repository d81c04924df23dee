"""Ranks the held-out questions with each system, and compares the systems.

    python -m mmr5_train.evaluate data=outputs/data/heldout.jsonl \\
        'systems={sft:outputs/sft/model,sft+grpo:outputs/grpo/model}' out=outputs/evaluate
    … 'systems={grpo:outputs/grpo/model,direct:{checkpoint:outputs/grpo/model,mode:direct}}'
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
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import Field, field_serializer, field_validator

from mmr5_train.chat.dialect import Dialect
from mmr5_train.common.config import StageConfig, config_path, run_stage
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
from mmr5_train.evaluation.trec import write_trec
from mmr5_train.inference.fit import check_prompts_fit
from mmr5_train.inference.options import RankingOptions
from mmr5_train.inference.processes import (
    finished_batches,
    on_main_process,
    run_unfinished,
    start_inference_processes,
)
from mmr5_train.inference.remote import RemoteBackend, ServerConfig
from mmr5_train.inference.reranker import Reranker
from mmr5_train.inference.tasks import Batch, batch_seed
from mmr5_train.models.config import MAX_NEW_TOKENS, BackendOptions, CheckpointOptions
from mmr5_train.models.lengths import image_sizes
from mmr5_train.models.loading import load_processor, read_settings
from mmr5_train.models.pages import load_page
from mmr5_train.models.settings import Settings, resolve_settings
from mmr5_train.ranking.prompt import read_prompt
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

FIRST_STAGE = "first_stage"
PARTIAL = "partial"
"""Folder in the output folder of an unfinished run: its finished batches and its settings."""


class System(RankingOptions):
    """A reranker to evaluate. Options that are not set here have the stage's values."""

    checkpoint: str | None = Field(
        default=None,
        description="a folder, a hub id, an adapter, or an option of configs/model, which stands for its path; "
        "optional with a server",
    )
    base: str | None = Field(default=None, description="the checkpoint that an adapter belongs to")
    server: ServerConfig | None = None
    prompt: str | None = Field(default=None, description="an option of configs/prompt or a file, for this system")

    @field_validator("checkpoint")
    @classmethod
    def _option_of_model(cls, checkpoint: str | None) -> str | None:
        if checkpoint is None or "/" in checkpoint or Path(checkpoint).exists():
            return checkpoint
        option = config_path("model", checkpoint)
        return str(OmegaConf.select(OmegaConf.load(option), "path")) if option else checkpoint


class RankedBatch(Batch):
    """One system's rankings of one batch of questions: a line of a partial file."""

    seconds: float
    sampling_seconds: float
    parts: dict[str, float] = Field(default_factory=dict)  # seconds of the parts of the greedy answers
    rankings: tuple[Ranking, ...]
    dialect: Dialect | None = None  # in which a server was asked


class EvaluateStage(StageConfig, CheckpointOptions, BackendOptions):
    """`python -m mmr5_train.evaluate` (configs/evaluate.yaml)."""

    data: Path = Field(description="ranking tasks, e.g. heldout.jsonl, with pages.jsonl in the same folder")
    systems: dict[str, System] = Field(
        description="name → checkpoint, or {checkpoint: …, mode: …, server: …}, in the order of comparison"
    )
    skip: int = Field(default=0, ge=0, description="leave out so many questions at the beginning")
    limit: int | None = Field(default=None, gt=0, description="use only the first questions, at most this many")
    order: Order = Field(default="score", description="order of the candidates in a prompt")
    constrain: bool = Field(
        default=False, description="constrain answers to a list of all pages; false: count malformed answers"
    )
    batch_size: int = Field(gt=0, description="completions per batch")
    samples: int = Field(default=0, ge=0, description="sampled answers per question, besides the greedy one")
    temperature: float = Field(default=1.0, gt=0, description="of the sampled answers")
    max_new_tokens: int = Field(default=MAX_NEW_TOKENS, gt=0)

    @field_validator("systems", mode="before")
    @classmethod
    def _expand_checkpoint_paths(cls, systems: Any) -> Any:
        if not isinstance(systems, dict):
            return {} if systems is None else systems  # the default is null, so that Hydra can add names
        return {
            name: {"checkpoint": system} if isinstance(system, str) else system for name, system in systems.items()
        }

    @field_serializer("systems")
    def _without_defaults(self, systems: dict[str, System]) -> dict[str, Any]:
        """Only the fields that were set. The others have the stage's values, not the defaults of `System`."""
        set_fields = {name: system.model_dump(mode="json", exclude_unset=True) for name, system in systems.items()}
        return {
            name: fields["checkpoint"] if fields.keys() == {"checkpoint"} else fields
            for name, fields in set_fields.items()
        }

    @field_validator("systems")
    @classmethod
    def _names_are_file_names(cls, systems: dict[str, System]) -> dict[str, System]:
        for name, system in systems.items():
            if name == FIRST_STAGE or not re.fullmatch(r"\w[\w.+-]*", name):
                raise ValueError(
                    f"{name!r} can't name a system: expected letters, digits and _ . + -, and not {FIRST_STAGE}"
                )
            if system.checkpoint is None and system.server is None:
                raise ValueError(f"{name}: give a checkpoint or a server")
        return systems


def main(config: EvaluateStage) -> None:
    processes = start_inference_processes()
    tasks = read_records(config.data, RankingTask)[config.skip :][: config.limit]
    if not tasks:
        raise InputError(f"{config.data}: no questions are left after the first {config.skip} (skip)")
    source = config.data.parent
    pages = candidate_pages(tasks, source / "pages.jsonl")
    resolved = {  # checks all systems now, because one may be loaded hours later
        name: resolve_settings(system.checkpoint, system_options(system, config), base=system.base)
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


def load_system(system: System, config: EvaluateStage, device: str) -> Reranker:
    """The reranker of a system."""
    options = system_options(system, config)
    return Reranker(
        system.checkpoint,
        base=system.base,
        server=system.server,
        model=options.model,
        prompt=options.prompt,
        override_checkpoint=options.override_checkpoint,
        device=device,
        **ranking_options(system, config),
    )


def ranking_options(system: System, config: EvaluateStage) -> dict[str, Any]:
    """How a system ranks: its own options, and the stage's for those that it does not set."""
    shared = {"constrain", "max_new_tokens", "batch_size", "backend", "vllm"}
    options = {"window": None, **config.model_dump(include=shared)}
    if config.think is not None:
        options["mode"] = "reason" if config.think else "direct"
    options |= system.model_dump(include=set(RankingOptions.model_fields), exclude_unset=True)
    if options["backend"] != "vllm" and not system.vllm:
        options["vllm"] = {}
    return options


def system_options(system: System, config: EvaluateStage) -> CheckpointOptions:
    """The stage's settings of checkpoints, with the system's own prompt."""
    options = CheckpointOptions.model_validate(config.model_dump(include=set(CheckpointOptions.model_fields)))
    return options.model_copy(update={"prompt": read_prompt(system.prompt)}) if system.prompt else options


def rank_batch(
    name: str, start: int, tasks: Sequence[RankingTask], reranker: Reranker, config: EvaluateStage
) -> RankedBatch:
    """Ranks a batch of tasks with a system: greedy answers, then samples. `start` is the first task's index."""
    prompted = [task.in_prompt_order(config.order, config.seed) for task in tasks]
    queries, folder, backend = [task.query for task in tasks], config.data.parent, reranker.backend
    greedy_start, times = time.monotonic(), PartTimes()
    with times.part("open"):
        images = [
            [load_page(folder / page.image, backend.limits) for page in prompted_task.shown]
            for prompted_task in prompted
        ]
    greedy = [ranked.merged_answer() for ranked in reranker.rank_images(queries, images, times=times)]
    sampling_start = time.monotonic()
    samples: list[list[ModelAnswer]] = [[] for _ in tasks]
    if config.samples and reranker.mode in ("reason", "direct"):
        size = max(1, config.batch_size // config.samples)
        for i in range(0, len(tasks), size):
            samples[i : i + size] = backend.generate(
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
        dialect=backend.dialect if isinstance(backend, RemoteBackend) else None,
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
