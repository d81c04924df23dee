"""What a recipe will take, before it costs money: tokens, memory a GPU by part, steps and hours.

    python -m mmr5_train.plan experiment=mm_r5 gpu=a100_80gb gpus=4

Reads the page sizes of the recipe's own candidates once they are made; before that it takes A4 pages as the corpus
renders them, and says so. Model sizes are exact. Memory and hours are estimates: each formula stands below, in
bytes and operations. None has been checked against a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import Field

from mmr5_train.common.config import compose_stage, run_stage
from mmr5_train.common.files import InputError, read_records
from mmr5_train.models.loading import ModelConfig
from mmr5_train.models.pages import PageLimits, page_size
from mmr5_train.models.shapes import empty_model
from mmr5_train.ranking.records import Page, RankingTask
from mmr5_train.recipe import STAGES, RecipeStage, stage_commands

GIB = 2**30
TEXT_TOKENS = 200  # of a prompt without its pages: system text, question, markers
A4 = (724, 1024)  # a portrait page with longest side 1,024, the corpus readers' default
KERNELS = 1.5 * GIB  # CUDA context, cuBLAS workspaces, fragmentation


@dataclass(frozen=True)
class Gpu:
    """A card as its maker describes it: memory, dense bfloat16 operations a second, memory bandwidth."""

    gib: float
    flops: float
    bytes_per_s: float


GPUS = {
    "rtx_4090": Gpu(24, 165e12, 1.01e12),
    "l40s": Gpu(48, 362e12, 0.86e12),
    "a100_40gb": Gpu(40, 312e12, 1.56e12),
    "a100_80gb": Gpu(80, 312e12, 2.04e12),
    "h100": Gpu(80, 989e12, 3.35e12),
    "h200": Gpu(141, 989e12, 4.8e12),
}
BUSY = 0.4  # share of a card's operations that training reaches; of its bandwidth, that decoding does


class PlanStage(RecipeStage):
    """`python -m mmr5_train.plan` (configs/plan.yaml)."""

    gpu: str = Field(description="a card: " + ", ".join(GPUS))
    gpus: int = Field(gt=0)
    completion_tokens: int = Field(gt=0, description="expected length of a sampled completion")


@dataclass(frozen=True)
class Network:
    """A model's sizes: parameters by part, and what activations depend on."""

    language: int
    vision: int
    trained: int
    layers: int
    hidden: int
    intermediate: int
    kv: int  # width of the keys of one layer
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    token_side: int  # pixels a side of a visual token


@dataclass(frozen=True)
class Workload:
    """One stage on one GPU."""

    prompts: list[int]  # tokens of each prompt of the data
    rows: int  # sequences in a forward pass: examples, or completions
    groups: int  # prompts among them that are computed once (rows, where nothing is shared)
    completion: int  # longest completion, tokens
    expected: int  # expected completion, tokens
    updates: int  # optimizer steps
    sequences: int  # sequences trained on, over all GPUs, passes over the same rollout included
    passes: float  # forward passes beside the update's own: old and reference policy
    rollouts: int  # completions sampled, over all GPUs
    checkpointing: bool


def main(config: PlanStage) -> None:
    if config.gpu not in GPUS:
        raise InputError(f"gpu: no card is called {config.gpu} (choices: {', '.join(GPUS)})")
    for name, lines in plan(config).items():
        print(f"\n{name}")
        for line in lines:
            print(f"  {line}")


def plan(config: PlanStage) -> dict[str, list[str]]:
    """The report, by stage."""
    commands = stage_commands(config)
    stages: dict[str, Any] = {
        name: compose_stage(STAGES[name][1], STAGES[name][2], commands[name])
        for name in ("candidates", "sft", "select", "grpo")
        if name in commands
    }
    gpu = GPUS[config.gpu]
    report: dict[str, list[str]] = {}
    for name in ("sft", "grpo"):
        if name not in stages:
            continue
        stage = stages[name]
        # GRPO starts from a checkpoint that is not there yet: its shape is that of the model's own.
        path = stages["sft"].model.path if name == "grpo" and "sft" in stages else stage.model.path
        network = measure(stage.model.model_copy(update={"path": path}))
        prompts, source = prompt_tokens(
            stages.get("candidates"), stage.model, "train" if name == "sft" else "select", network.token_side
        )
        work = sft_work(stage, prompts, config) if name == "sft" else grpo_work(stage, stages, prompts, config)
        report[name] = list(describe(path, network, work, source, gpu, config))
    return report


def describe(
    path: str, network: Network, work: Workload, source: str, gpu: Gpu, config: PlanStage
) -> Iterator[str]:
    total = network.language + network.vision
    yield f"{path}: {total / 1e9:.2f} billion parameters, {network.trained / 1e6:,.1f} million trained"
    yield f"prompts: {mean(work.prompts):,.0f} tokens, longest {max(work.prompts):,} ({source})"
    yield from histogram(work.prompts)
    parts = {stage: memory(network, work, stage, config.gpus) for stage in ZERO}
    yield f"memory a GPU at the longest prompt, GiB ({config.gpus} × {config.gpu}, {gpu.gib:g} GiB each):"
    yield f"  {'':<16}" + "".join(f"{stage:>15}" for stage in parts)
    for part in next(iter(parts.values())):
        yield f"  {part:<16}" + "".join(f"{sizes[part] / GIB:>15.1f}" for sizes in parts.values())
    sums = {stage: sum(sizes.values()) / GIB for stage, sizes in parts.items()}
    yield f"  {'sum':<16}" + "".join(f"{size:>15.1f}" for size in sums.values())
    fitting = [stage for stage, size in sums.items() if size <= gpu.gib]
    if len(fitting) < len(sums):
        named = ", ".join(stage for stage in sums if stage not in fitting)
        biggest = max(parts[list(sums)[-1]], key=lambda part: parts[list(sums)[-1]][part])
        yield f"WARNING: {named} won't fit; " + (
            f"{fitting[0]} does" if fitting else f"nothing does: the largest part is {biggest}. {KNOBS[biggest]}"
        )
    hours = seconds(network, work, gpu, config.gpus) / 3600
    yield f"{work.updates:,} updates, about {hours:,.1f} hours, {hours * config.gpus:,.0f} GPU hours"


def histogram(values: Sequence[int], bins: int = 6) -> Iterator[str]:
    low, high = min(values), max(values)
    width = max(1, math.ceil((high - low + 1) / bins))
    for start in range(low, high + 1, width):
        count = sum(start <= value < start + width for value in values)
        yield f"  {start:>7,} to {start + width - 1:>7,}  {count:>7,}  {'█' * round(30 * count / len(values))}"


def measure(model: ModelConfig) -> Network:
    """The network's sizes, exactly, from a model without weights."""
    network = empty_model(model.path)
    text, vision = network.config.text_config, network.config.vision_config
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    seeing = sum(size for name, size in sizes.items() if ".visual." in name)
    trained = sum(sizes.values()) - (seeing if model.freeze_vision else 0)
    if model.lora is not None:
        from peft import get_peft_model

        from mmr5_train.training.adapters import lora_config

        adapted: Any = get_peft_model(network, lora_config(model))  # type: ignore[arg-type]
        trained = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    heads = text.hidden_size // text.num_attention_heads
    return Network(
        language=sum(sizes.values()) - seeing,
        vision=seeing,
        trained=trained,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        kv=text.num_key_value_heads * heads,
        vocabulary=text.vocab_size,
        vision_layers=vision.depth,
        vision_hidden=vision.hidden_size,
        token_side=vision.patch_size * vision.spatial_merge_size,
    )


def prompt_tokens(candidates: Any, model: ModelConfig, split: str, side: int) -> tuple[list[int], str]:
    """Tokens of each prompt, and where the page sizes are from."""
    folder = candidates.out if candidates is not None else Path()
    if not (folder / f"{split}.jsonl").is_file():
        count = candidates.candidates if candidates is not None else 5
        tokens = TEXT_TOKENS + count * page_tokens(*A4, model, side)
        return [tokens], f"no {folder / split}.jsonl yet: {count} pages of {A4[0]} × {A4[1]} pixels"
    pages = {page.id: page for page in read_records(folder / "pages.jsonl", Page, unique="id")}
    sizes = {key: page_tokens(page.width, page.height, model, side) for key, page in pages.items()}
    tasks = read_records(folder / f"{split}.jsonl", RankingTask)
    found = [TEXT_TOKENS + sum(sizes[page.id] for page in task.candidates) for task in tasks]
    return found, f"{len(found):,} questions of {folder / split}.jsonl"


def page_tokens(width: int, height: int, model: ModelConfig, side: int) -> int:
    shown = page_size(width, height, PageLimits(side, model.min_pixels, model.max_pixels))
    return shown[0] * shown[1] // side**2


def sft_work(stage: Any, prompts: list[int], config: PlanStage) -> Workload:
    trainer = stage.trainer
    examples = min(len(prompts), stage.limit or len(prompts)) if len(prompts) > 1 else stage.limit or 1
    batch = trainer["per_device_train_batch_size"]
    a_step = batch * trainer["gradient_accumulation_steps"] * config.gpus
    steps = trainer["max_steps"] if trainer["max_steps"] > 0 else examples * trainer["num_train_epochs"] / a_step
    return Workload(
        prompts, batch, batch, config.completion_tokens, config.completion_tokens, math.ceil(steps),
        math.ceil(steps) * a_step, 0, 0, trainer["gradient_checkpointing"],
    )  # fmt: skip


def grpo_work(stage: Any, stages: dict[str, Any], prompts: list[int], config: PlanStage) -> Workload:
    trainer = stage.trainer
    drawn = stages["select"].balanced if "select" in stages else None
    questions = drawn.count if drawn and (len(prompts) == 1 or drawn.count < len(prompts)) else len(prompts)
    group, batch = trainer["num_generations"], trainer["per_device_train_batch_size"]
    a_step = batch * trainer["gradient_accumulation_steps"] * config.gpus
    again = trainer["num_iterations"]
    steps = trainer["max_steps"]
    if steps <= 0:
        steps = math.ceil(questions * group * again * trainer["num_train_epochs"] / a_step)
    shares = stage.shared_prefix != "never" and batch % group == 0
    return Workload(
        prompts, batch, batch // group if shares else batch, trainer["max_completion_length"],
        config.completion_tokens, steps, steps * a_step,
        (1 if again > 1 else 0) + (1 if trainer["beta"] else 0), steps * a_step // again,
        trainer["gradient_checkpointing"],
    )  # fmt: skip


ZERO = {"ddp": 0, "zero2": 2, "zero3": 3, "zero3_offload": 3}
KNOBS = {
    "weights": "Take a smaller model, more GPUs under ZeRO-3, or a 4-bit base.",
    "gradients": "Train adapters (model.lora) instead of the whole model.",
    "optimizer": "Train adapters (model.lora), or use configs/accelerate/zero3_offload.yaml.",
    "activations": "Lower model.max_pixels, candidates or the batch; trainer.gradient_checkpointing=true.",
    "KV cache": "Lower trainer.max_completion_length or trainer.num_generations; shared_prefix=always.",
    "logits": "Lower trainer.max_completion_length or the batch.",
    "kernels": "Take a larger card.",
}


def memory(network: Network, work: Workload, zero: str, gpus: int) -> dict[str, float]:
    """Bytes a GPU at the longest prompt, by part."""
    stage, offload = ZERO[zero], zero.endswith("offload")
    total, prompt = network.language + network.vision, max(work.prompts)
    shared = 1 / gpus
    # bfloat16 weights; trained ones in float32 (adapters), with float32 gradients and two Adam moments.
    weights = 2 * total * (shared if stage == 3 else 1) * (0 if offload else 1)
    if offload:
        weights = 2 * total / network.layers * 2  # two layers at a time come over
    tokens = work.groups * prompt + work.rows * work.completion
    layer = 2 * (7 * network.hidden + 2 * network.kv + 4 * network.intermediate) + 8 * network.hidden
    kept = network.layers * 2 * network.hidden + layer if work.checkpointing else network.layers * layer
    seeing = 2 * work.groups * 4 * prompt * 8 * network.vision_hidden  # four patches a token; nothing is kept
    cache = 2 * 2 * network.layers * network.kv * (work.groups * prompt + work.rows * work.completion)
    return {
        "weights": weights + 2 * network.trained,
        "gradients": 4 * network.trained * (shared if stage >= 2 else 1),
        "optimizer": 8 * network.trained * (shared if stage >= 2 else 1) * (0 if offload else 1),
        "activations": tokens * kept + seeing,
        "KV cache": cache if work.rollouts else 0,
        "logits": 10.0 * work.rows * min(work.completion, 1024) * network.vocabulary,
        "kernels": KERNELS,
    }


def seconds(network: Network, work: Workload, gpu: Gpu, gpus: int) -> float:
    """Time of all updates and rollouts, from operations (training) and bytes moved (decoding)."""
    prompt = mean(work.prompts)
    a_row = prompt * work.groups / work.rows + work.expected
    forward = 2 * network.language * a_row + 4 * network.layers * network.hidden * prompt * a_row
    seeing = 2 * network.vision * 4 * prompt * work.groups / work.rows
    passes = 3 + (1 if work.checkpointing else 0) + work.passes
    training = work.sequences * (forward * passes + seeing * (1 + work.passes)) / (gpu.flops * BUSY * gpus)
    batches = work.rollouts / max(1, work.rows) / gpus
    decoding = batches * work.expected * 2 * network.language / (gpu.bytes_per_s * BUSY)
    prefill = work.rollouts * (forward + seeing) / (gpu.flops * BUSY * gpus)
    return training + decoding + prefill


if __name__ == "__main__":
    run_stage(main, PlanStage, "plan")
