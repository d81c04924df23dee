"""Estimates a recipe's prompt tokens, GPU memory, optimizer steps and hours.

    python -m mmr5_train.plan experiment=mm_r5 gpu=a100_80gb gpus=4

Page sizes come from the recipe's candidates if that stage has run. Otherwise they are those of A4 pages at 150
dpi. The numbers of examples come from the data, from the annotation files of the corpus, or from the recipe's rule
(mmr5_train/recipes/forecast.py). The output says which. Model sizes are exact. Memory and hours are estimates from
the formulas in mmr5_train/recipes/cost.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import Field

from data_construction.corpus.training_set import TrainingSet
from mmr5_train.common.config import run_stage
from mmr5_train.common.files import InputError, read_json_lines, read_records
from mmr5_train.distill import check_recipe
from mmr5_train.models.config import ModelConfig
from mmr5_train.models.pages import PageLimits, page_size, shrink_factor
from mmr5_train.models.settings import complete_model
from mmr5_train.ranking.records import RankingTask
from mmr5_train.recipe import RecipeStage, check_verdicts, compose_stages, stage_overrides
from mmr5_train.recipes.cost import GIB, GPUS, ZERO, Gpu, Network, Workload, measure, memory, seconds
from mmr5_train.recipes.forecast import forecasts
from mmr5_train.recipes.inherited import inherit_settings
from mmr5_train.training.sharing import share

TEXT_TOKENS = 200  # tokens of a prompt without its pages: system prompt, question, chat template
A4 = (1240, 1754)  # pixels of a portrait page at 150 dpi
TRAINING_SET_GB = 49  # MMDocIR's training set as published


class PlanStage(RecipeStage):
    """Config of `python -m mmr5_train.plan` (configs/plan.yaml)."""

    gpu: str = Field(description="GPU type: " + ", ".join(GPUS))
    gpus: int = Field(gt=0)
    completion_tokens: int = Field(gt=0, description="expected length of a completion, in tokens")


def main(config: PlanStage) -> None:
    if config.gpu not in GPUS:
        raise InputError(f"gpu: unknown GPU type {config.gpu} (choices: {', '.join(GPUS)})")
    for name, lines in plan(config).items():
        print(f"\n{name}")
        for line in lines:
            print(f"  {line}")


def plan(config: PlanStage) -> dict[str, list[str]]:
    """Training stage → the lines of its estimate."""
    stages: dict[str, Any] = inherit_settings(compose_stages(stage_overrides(config)))
    check_verdicts(stages)
    check_recipe(stages)
    gpu = GPUS[config.gpu]
    report: dict[str, list[str]] = {}
    if "candidates" in stages:
        report["data"] = [page_cache(stages["candidates"].corpus)]
    for name, forecast in forecasts(stages).items():
        stage = stages[name]
        # GRPO's checkpoint does not exist before SFT has run. It has the shape of SFT's base model.
        path = stages["sft"].model.path if name == "grpo" and "sft" in stages else stage.model.path
        model = complete_model(stage.model.model_copy(update={"path": path}))
        network = measure(model)
        prompts, source = prompt_tokens(
            stages.get("candidates"), model, "train" if name == "sft" else "select", network.token_side
        )
        examples = forecast.used or len(prompts)
        make_work = sft_work if name == "sft" else grpo_work
        work = make_work(stage, prompts, examples, config)
        report[name] = [f"examples: {forecast}", *describe(path, network, work, source, gpu, config)]
        if forecast.is_short:
            report[name].insert(1, f"WARNING: fewer examples than {forecast.setting}={forecast.wanted}")
    return report


def describe(
    path: str, network: Network, work: Workload, source: str, gpu: Gpu, config: PlanStage
) -> Iterator[str]:
    """The lines of a stage's estimate. `source` says where the page sizes come from."""
    total = network.language + network.vision
    yield f"{path}: {total / 1e9:.2f} billion parameters, {network.trained / 1e6:,.1f} million trained"
    yield f"prompts: {mean(work.prompts):,.0f} tokens, longest {max(work.prompts):,} ({source})"
    yield from histogram(work.prompts)
    parts = {stage: memory(network, work, stage, config.gpus) for stage in ZERO}
    yield f"memory per GPU at the longest prompt, GiB ({config.gpus} × {config.gpu}, {gpu.gib:g} GiB each):"
    yield f"  {'':<16}" + "".join(f"{stage:>15}" for stage in parts)
    for part in next(iter(parts.values())):
        yield f"  {part:<16}" + "".join(f"{sizes[part] / GIB:>15.1f}" for sizes in parts.values())
    sums = {stage: sum(sizes.values()) / GIB for stage, sizes in parts.items()}
    yield f"  {'sum':<16}" + "".join(f"{size:>15.1f}" for size in sums.values())
    fitting = [stage for stage, size in sums.items() if size <= gpu.gib]
    if len(fitting) < len(sums):
        too_large = ", ".join(stage for stage in sums if stage not in fitting)
        sizes = parts[list(parts)[-1]]  # the config that partitions most
        largest = max(sizes, key=lambda part: sizes[part])
        yield f"WARNING: does not fit: {too_large}. " + (
            f"Use {fitting[0]}." if fitting else f"The largest part is {largest}. {ADVICE[largest]}"
        )
    hours = seconds(network, work, gpu, config.gpus) / 3600
    yield f"{work.updates:,} updates, about {hours:,.1f} hours, {hours * config.gpus:,.0f} GPU hours"


def histogram(values: Sequence[int], bins: int = 6) -> Iterator[str]:
    """Lines of a text histogram, one per bin."""
    low, high = min(values), max(values)
    width = max(1, math.ceil((high - low + 1) / bins))
    for start in range(low, high + 1, width):
        count = sum(start <= value < start + width for value in values)
        yield f"  {start:>7,} to {start + width - 1:>7,}  {count:>7,}  {'█' * round(30 * count / len(values))}"


def prompt_tokens(candidates: Any, model: ModelConfig, split: str, side: int) -> tuple[list[int], str]:
    """Tokens of each prompt of a split, and where the page sizes come from. One A4 prompt if there is no data."""
    folder = candidates.out if candidates is not None else Path()
    if not (folder / f"{split}.jsonl").is_file():
        count = candidates.candidates if candidates is not None else 5
        factor = shrink_factor(*A4, candidates.corpus.max_side if candidates is not None else None)
        width, height = (round(length * factor) for length in A4)
        tokens = page_tokens(width, height, model, side)
        source = (
            f"no {folder / split}.jsonl yet: {count} pages of {width} × {height} pixels, {tokens:,} tokens each"
        )
        return [TEXT_TOKENS + count * tokens], source
    sizes = {
        (page["doc_name"], page["page"]): page_tokens(page["width"], page["height"], model, side)
        for _, page in read_json_lines(folder / "pages.jsonl")  # as records, 200,000 pages would fill a gigabyte
    }
    tasks = read_records(folder / f"{split}.jsonl", RankingTask)
    tokens_by_task = [
        TEXT_TOKENS + sum(sizes[page.doc_name, page.page] for page in task.candidates) for task in tasks
    ]
    return tokens_by_task, f"{len(tasks):,} questions of {folder / split}.jsonl"


def page_tokens(width: int, height: int, model: ModelConfig, side: int) -> int:
    """Visual tokens of a page of width × height pixels; `side` is a visual token's side in pixels."""
    resized = page_size(width, height, PageLimits(side, model.min_pixels, model.max_pixels))
    return resized[0] * resized[1] // side**2


def page_cache(corpus: Any) -> str:
    """What the page cache holds, and how large it gets."""
    if not isinstance(corpus, TrainingSet):
        return f"page cache: {corpus.page_cache}: the pages of the corpus as JPEG or PNG"
    files = [corpus.pages_path(subset) for subset in corpus.subsets]
    size = sum(file.stat().st_size for file in files if file.is_file()) / 1e9 or TRAINING_SET_GB
    limit = "at their original size" if corpus.max_side is None else f"shrunk to {corpus.max_side} pixels a side"
    return f"page cache: {corpus.page_cache}: at most {size:,.0f} GB, the page images of the training set {limit}"


def sft_work(stage: Any, prompts: list[int], examples: int, config: PlanStage) -> Workload:
    """The work of SFT on `examples` traces."""
    trainer = stage.trainer
    batch = trainer["per_device_train_batch_size"]
    sequences_per_step = batch * trainer["gradient_accumulation_steps"] * config.gpus
    steps = trainer["max_steps"]
    if steps <= 0:
        steps = math.ceil(examples * trainer["num_train_epochs"] / sequences_per_step)
    return Workload(
        prompts=prompts,
        rows=batch,
        groups=batch,
        completion=config.completion_tokens,
        expected=config.completion_tokens,
        updates=steps,
        sequences=steps * sequences_per_step,
        passes=0,
        rollouts=0,
        checkpointing=trainer["gradient_checkpointing"],
    )


def grpo_work(stage: Any, prompts: list[int], questions: int, config: PlanStage) -> Workload:
    """The work of GRPO on `questions` questions."""
    trainer = stage.trainer
    group, batch = trainer["num_generations"], trainer["per_device_train_batch_size"]
    sequences_per_step = batch * trainer["gradient_accumulation_steps"] * config.gpus
    iterations = trainer["num_iterations"]
    steps = trainer["max_steps"]
    if steps <= 0:
        steps = math.ceil(questions * group * iterations * trainer["num_train_epochs"] / sequences_per_step)
    accumulation = trainer["gradient_accumulation_steps"]
    sharing = share(batch, accumulation, trainer.get("steps_per_generation") or accumulation, group)
    shares_prefix = stage.shared_prefix != "never" and not sharing.nothing_to_share
    return Workload(
        prompts=prompts,
        rows=sharing.trained if shares_prefix else batch,
        groups=sharing.prompts if shares_prefix else batch,
        completion=trainer["max_completion_length"],
        expected=config.completion_tokens,
        updates=steps,
        sequences=steps * sequences_per_step,
        passes=(1 if iterations > 1 else 0) + (1 if trainer["beta"] else 0),
        rollouts=steps * sequences_per_step // iterations,
        checkpointing=trainer["gradient_checkpointing"],
        sampled_rows=sharing.rollout,
        sampled_prompts=sharing.rollout // sharing.sampled if shares_prefix else sharing.rollout,
    )


ADVICE = {
    "weights": "Use a smaller model, more GPUs with ZeRO-3, or a 4-bit base.",
    "gradients": "Train adapters (model.lora) instead of the whole model.",
    "optimizer": "Train adapters (model.lora), or use configs/accelerate/zero3_offload.yaml.",
    "activations": "Lower model.max_pixels, candidates or the batch; trainer.gradient_checkpointing=true.",
    "KV cache": "Lower trainer.max_completion_length or trainer.num_generations; shared_prefix=always.",
    "logits": "Lower trainer.max_completion_length or the batch.",
    "kernels": "Use a GPU with more memory.",
}


if __name__ == "__main__":
    run_stage(main, PlanStage, "plan")
