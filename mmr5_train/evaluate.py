"""Stage 5, evaluation: every system ranks the held-out questions; figures, intervals, paired differences.

    python -m mmr5_train.evaluate data=outputs/data/heldout.jsonl \\
        'systems={sft:outputs/sft/model,sft+grpo:outputs/grpo/model}' out=outputs/evaluate
    … 'systems={grpo:outputs/grpo/model,direct:{checkpoint:outputs/grpo/model,mode:direct}}'
    accelerate launch --num_processes 2 -m mmr5_train.evaluate …     # two processes share the questions

The first stage is always there, as the baseline. Each system gives one greedy answer a question, the same every
time, and `samples` sampled ones. Rankings are kept batch by batch as they are made: a run that was stopped goes on
with the same command. Writes `rankings/<system>.jsonl` (what was answered), `pages.jsonl` (the pages in them),
`results.json` (`mmr5_train.evaluation.scoring` says what is in it), `timing.json` (the one file that differs
between two runs) and a manifest. Rankings hold only the candidates, so recall@k for a k above their number is the
recall of all candidates.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import Field, ValidationError, field_serializer, field_validator
from tqdm import tqdm

from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import (
    InputError,
    is_unfinished,
    open_output,
    read_records,
    write_json,
    write_manifest,
    write_records,
)
from mmr5_train.evaluation.scoring import results_table, score_rankings
from mmr5_train.evaluation.trec import write_trec
from mmr5_train.inference.remote import ServerConfig
from mmr5_train.inference.reranker import RankingOptions, Reranker
from mmr5_train.models.inputs import check_images
from mmr5_train.models.loading import ModelConfig, is_adapter, resolve_checkpoint
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import (
    LocalId,
    ModelAnswer,
    Order,
    Page,
    PromptedTask,
    Ranking,
    RankingTask,
    Record,
    rebase_images,
)
from mmr5_train.training.checkpoints import check_settings, run_settings

FIRST_STAGE = "first_stage"
PARTIAL = "partial"  # in the output folder of a run that has not ended: its batches, and its settings


class System(RankingOptions):
    """A reranker to evaluate. What is not given is as the stage's own settings say."""

    checkpoint: str | None = Field(default=None, description="a folder, a hub id, an adapter; or a server alone")
    base: str | None = Field(default=None, description="the checkpoint under an adapter")
    server: ServerConfig | None = None


class Batch(Record):
    """Some questions ranked by one system: a line of a partial file."""

    start: int = Field(ge=0, description="index of the first question")
    seconds: float
    sampling_seconds: float
    rankings: tuple[Ranking, ...]


class EvaluateStage(StageConfig):
    """`python -m mmr5_train.evaluate` (configs/evaluate.yaml)."""

    data: Path = Field(description="ranking tasks, e.g. heldout.jsonl; pages.jsonl stands beside it")
    systems: dict[str, System] = Field(
        description="name → checkpoint, or {checkpoint: …, mode: …, server: …}, in the order they are compared in"
    )
    limit: int | None = Field(default=None, gt=0, description="use the first so many questions")
    order: Order = Field(default="score", description="how a prompt shows its candidates")
    think: bool = Field(default=True, description="whether the models were taught a think block")
    constrain: bool = Field(default=False, description="hold answers to a list of all pages, or count defects")
    batch_size: int = Field(gt=0, description="completions generated at a time")
    samples: int = Field(default=0, ge=0, description="sampled answers a question, besides the greedy one")
    temperature: float = Field(default=1.0, gt=0, description="of the sampled answers")
    max_new_tokens: int = Field(gt=0)
    model: ModelConfig
    prompt: Prompt

    @field_validator("systems", mode="before")
    @classmethod
    def _a_path_is_a_checkpoint(cls, systems: Any) -> Any:
        if not isinstance(systems, dict):
            return {} if systems is None else systems  # Hydra adds names to a null, not to an empty dict
        return {name: {"checkpoint": one} if isinstance(one, str) else one for name, one in systems.items()}

    @field_serializer("systems")
    def _as_told(self, systems: dict[str, System]) -> dict[str, Any]:
        """What was given, without defaults: what is not given is the stage's."""
        told = {name: system.model_dump(mode="json", exclude_unset=True) for name, system in systems.items()}
        return {name: one["checkpoint"] if one.keys() == {"checkpoint"} else one for name, one in told.items()}

    @field_validator("systems")
    @classmethod
    def _names_are_file_names(cls, systems: dict[str, System]) -> dict[str, System]:
        for name, system in systems.items():
            if name == FIRST_STAGE or not re.fullmatch(r"\w[\w.+-]*", name):
                raise ValueError(
                    f"{name!r} can't name a system: letters, digits and _ . + - only, not {FIRST_STAGE}"
                )
            if system.checkpoint is None and system.server is None:
                raise ValueError(f"{name}: give a checkpoint or a server")
        return systems


def main(config: EvaluateStage) -> None:
    processes = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    tasks = read_records(config.data, RankingTask)[: config.limit]
    source = config.data.parent
    pages = used_pages(tasks, source / "pages.jsonl")
    checkpoints = [system.checkpoint for system in config.systems.values() if system.checkpoint]
    for checkpoint in checkpoints:  # a wrong path is worth knowing before the first hour
        if not is_adapter(checkpoint):
            resolve_checkpoint(checkpoint)
    if config.systems:
        check_images((page for task in tasks for page in task.candidates), source)
    inputs = [config.data, source / "pages.jsonl"]
    if processes.is_main_process:
        open_evaluation(config, [*inputs, *map(Path, checkpoints)])
    processes.wait_for_everyone()
    for name in config.systems:
        rank_share(name, tasks, config, processes)
    processes.wait_for_everyone()
    if processes.is_main_process:
        finish(config, tasks, pages, inputs)


def open_evaluation(config: EvaluateStage, read: Sequence[Path]) -> None:
    """The output folder: that of a run that was stopped and had the same settings, or an empty one."""
    settings = json.loads(json.dumps(run_settings(config)))
    kept = config.out / PARTIAL / "settings.json"
    if kept.is_file() and is_unfinished(config.out, "evaluate") and not config.overwrite:
        check_settings(config.out, json.loads(kept.read_text(encoding="utf-8")), settings)
    else:
        open_output(config.out, config.overwrite, inputs=read, stage="evaluate")
        write_json(kept, settings)


def finish(config: EvaluateStage, tasks: Sequence[RankingTask], pages: list[Page], inputs: list[Path]) -> None:
    """From the batches of all systems to the result."""
    out, source = config.out, config.data.parent
    rankings, timing = {FIRST_STAGE: [first_stage(task) for task in tasks]}, {}
    for name in config.systems:
        batches = kept_batches(out, name)
        rankings[name] = [ranking for start in sorted(batches) for ranking in batches[start].rankings]
        timing[name] = cost(list(batches.values()))
    for name, ranked in rankings.items():
        folder = out / "rankings"
        write_records(folder / f"{name}.jsonl", rebase_images(ranked, source, folder))
    write_records(out / "pages.jsonl", rebase_images(pages, source, out))
    results = score_rankings(rankings, pages, seed=config.seed)
    write_json(out / "results.json", results)
    write_trec(out / "trec", rankings)
    write_json(out / "timing.json", timing)
    counts = {"questions": len(tasks), "systems": len(rankings), "samples": config.samples}
    settings = config.model_dump(mode="json")
    write_manifest(out, stage="evaluate", config=settings, inputs=inputs, counts=counts)
    shutil.rmtree(out / PARTIAL)
    print(results_table(results))
    print(f"evaluate: {', '.join(rankings)} on {len(tasks)} questions in {out}")


def cost(batches: Sequence[Batch]) -> dict[str, float]:
    """What a system took: seconds in all, sampling included, and of a question's greedy answer; its tokens."""
    answers = [ranking.greedy for batch in batches for ranking in batch.rankings]
    greedy = sum(batch.seconds for batch in batches)
    return {
        "seconds": greedy + sum(batch.sampling_seconds for batch in batches),
        "seconds_per_question": greedy / len(answers),
        **{
            name: sum(getattr(answer, name) for answer in answers) / len(answers)
            for name in ("tokens", "prompt_tokens", "visual_tokens")
        },
    }


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
    return _ranking(FIRST_STAGE, task.in_prompt_order("score"), ModelAnswer(completion="", order=order))


def rank_share(name: str, tasks: Sequence[RankingTask], config: EvaluateStage, processes: PartialState) -> None:
    """Ranks this process's share of the batches that are not kept yet, and keeps each as it is done.

    Batches are the same however often a run was stopped and however many processes share it, and so are the
    rankings in them.
    """
    starts = range(0, len(tasks), config.batch_size)
    done = kept_batches(config.out, name)
    processes.wait_for_everyone()  # all have seen the same
    left = [start for start in starts if start not in done][processes.process_index :: processes.num_processes]
    if not left:
        return
    reranker = load_system(config.systems[name], config, str(processes.device))
    shown = tqdm(left, desc=name, unit="batch", disable=not processes.is_main_process)
    with (config.out / PARTIAL / f"{name}.{processes.process_index}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("\n")  # a line that a kill cut off ends here
        for start in shown:
            batch = rank_batch(name, start, tasks[start : start + config.batch_size], reranker, config)
            stream.write(batch.model_dump_json() + "\n")
            stream.flush()


def kept_batches(out: Path, name: str) -> dict[int, Batch]:
    """The batches of a system that any process has kept, by their start; a line that was cut off is none."""
    batches = {}
    for path in sorted((out / PARTIAL).glob(f"{name}.*.jsonl")):
        if re.fullmatch(re.escape(name) + r"\.\d+\.jsonl", path.name):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    batch = Batch.model_validate_json(line)
                except ValidationError:
                    continue
                batches[batch.start] = batch
    return batches


def load_system(system: System, config: EvaluateStage, device: str) -> Reranker:
    """The reranker, told what its entry says and else what the stage says."""
    own = system.model_dump(exclude_unset=True, exclude={"checkpoint", "base", "server"})
    shared = config.model_dump(include={"constrain", "max_new_tokens", "batch_size"})
    mode = "reason" if config.think else "direct"
    return Reranker(
        system.checkpoint,
        base=system.base,
        server=system.server,
        model=config.model,
        prompt=config.prompt,
        device=device,
        **{"mode": mode, "window": None, **shared, **own},
    )


def rank_batch(
    name: str, start: int, tasks: Sequence[RankingTask], reranker: Reranker, config: EvaluateStage
) -> Batch:
    """A system's answers to some questions: the greedy ones, then those that are sampled."""
    prompted = [task.in_prompt_order(config.order, config.seed) for task in tasks]
    queries, folder = [task.query for task in tasks], config.data.parent
    started = time.monotonic()
    pages = [[reranker.backend.load(folder / page.image) for page in asked.shown] for asked in prompted]
    greedy = [ranked.answered() for ranked in reranker.order(queries, pages)]
    ranked = time.monotonic()
    drawn: list[list[ModelAnswer]] = []
    if config.samples and reranker.mode != "logits":
        size = max(1, config.batch_size // config.samples)
        settings: dict[str, Any] = {"samples": config.samples, "temperature": config.temperature}
        for i in range(0, len(tasks), size):
            seed = config.seed * 1_000_003 + start + i
            drawn += reranker.backend.ask(queries[i : i + size], pages[i : i + size], seed=seed, **settings)
    rankings = [_ranking(name, *row) for row in zip(prompted, greedy, drawn or [[]] * len(tasks), strict=True)]
    return Batch(
        start=start,
        seconds=ranked - started,
        sampling_seconds=time.monotonic() - ranked,
        rankings=tuple(rankings),
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
