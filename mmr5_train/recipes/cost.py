"""What a training stage costs on a GPU: memory by part, and seconds.

Model sizes are exact. Memory and seconds are formulas. docs/benchmarks.md compares them with measurements on an
H200: memory within 10 %, seconds within 30 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any

from mmr5_train.models.config import ModelConfig
from mmr5_train.models.shapes import empty_model

GIB = 2**30
KERNELS = 1.5 * GIB  # CUDA context, cuBLAS workspaces, fragmentation


@dataclass(frozen=True)
class Gpu:
    """Data sheet of a GPU: memory in GiB, dense bfloat16 FLOP per second, memory bandwidth in bytes per second."""

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
# Share of peak FLOP/s reached in training and prefill, and of bandwidth reached in decoding: measured on an H200
# with torch's attention (docs/benchmarks.md).
UTILIZATION = 0.27


@dataclass(frozen=True)
class Network:
    """A model's sizes: parameters by part, and the dimensions that determine activations."""

    language: int
    vision: int
    trained: int
    adapters: int  # those of the trained parameters that adapters add to the model
    adapted_inputs: int  # widths of all inputs that the adapters of one layer keep in float32
    adapted_input: int  # the largest of them
    layers: int
    hidden: int
    intermediate: int
    kv: int  # width of the keys (or values) of one layer
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    token_side: int  # side of a visual token in pixels


@dataclass(frozen=True)
class Workload:
    """The work of a training stage. `rows` and `groups` are per GPU."""

    prompts: list[int]  # tokens of each prompt in the data
    rows: int  # sequences in a forward pass: SFT examples or GRPO completions
    groups: int  # different prompts in a forward pass; equals `rows` without a shared prefix
    completion: int  # longest completion in tokens
    expected: int  # expected completion length in tokens
    updates: int  # optimizer steps
    sequences: int  # sequences trained on by all GPUs; counts each iteration over a rollout
    passes: float  # forward passes in addition to the update's own: old policy, reference policy
    rollouts: int  # completions sampled by all GPUs
    checkpointing: bool
    sampled_rows: int = 0  # completions that a GPU samples at once: those of a rollout batch
    sampled_prompts: int = 0  # different prompts among them; equals `sampled_rows` without a shared prefix


ZERO = {"ddp": 0, "zero2": 2, "zero3": 3, "zero3_offload": 3}  # config of accelerate → stage of ZeRO


def measure(model: ModelConfig) -> Network:
    """The exact sizes of a model, from its modules without weights."""
    network = empty_model(model.path)
    text, vision = network.config.text_config, network.config.vision_config
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    vision_size = sum(size for name, size in sizes.items() if ".visual." in name)
    trained = sum(sizes.values()) - (vision_size if model.freeze_vision else 0)
    adapters, inputs, copies = 0, [0], 1
    if model.lora is not None:
        from peft import get_peft_model

        from mmr5_train.training.adapters import lora_config

        adapted: Any = get_peft_model(network, lora_config(model))  # type: ignore[arg-type]
        trained = adapters = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
        inputs = [
            p.shape[1] for name, p in adapted.named_parameters() if ".layers.0." in name and "lora_A" in name
        ]
        copies = 2 if model.lora.dropout else 1  # dropout makes another one
    head_width = text.hidden_size // text.num_attention_heads
    return Network(
        language=sum(sizes.values()) - vision_size,
        vision=vision_size,
        trained=trained,
        adapters=adapters,
        adapted_inputs=sum(inputs) * copies,
        adapted_input=max(inputs) * copies,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        kv=text.num_key_value_heads * head_width,
        vocabulary=text.vocab_size,
        vision_layers=vision.depth,
        vision_hidden=vision.hidden_size,
        token_side=vision.patch_size * vision.spatial_merge_size,
    )


def memory(network: Network, work: Workload, zero: str, gpus: int) -> dict[str, float]:
    """Bytes per GPU at the longest prompt, by part.

    Activations are those of training or of sampling, whichever needs more together with its logits or KV cache.
    """
    stage, offload = ZERO[zero], zero.endswith("offload")
    total, prompt = network.language + network.vision, max(work.prompts)
    gpu_share = 1 / gpus
    # bfloat16 weights. Trained weights are float32, with float32 gradients and two Adam moments.
    weights = 2 * total * (gpu_share if stage == 3 else 1) * (0 if offload else 1)
    if offload:
        weights = 2 * total / network.layers * 2  # two layers at a time are on the GPU
    phases = training_memory(network, work, prompt), sampling_memory(network, work, prompt)
    larger = max(phases, key=lambda parts: sum(parts.values()))
    return {
        "weights": weights + 2 * network.trained + 2 * network.adapters,
        "gradients": 4 * network.trained * (gpu_share if stage >= 2 else 1),
        "optimizer": 8 * network.trained * (gpu_share if stage >= 2 else 1) * (0 if offload else 1),
        **larger,
        "kernels": KERNELS,
    }


def layer_bytes(network: Network) -> float:
    """Bytes per token of one layer's activations, in bfloat16 and, for the norms, in float32."""
    return 2 * (7 * network.hidden + 2 * network.kv + 4 * network.intermediate) + 8 * network.hidden


def vision_bytes(network: Network, tokens: float) -> float:
    """Bytes of the vision tower's activations. It stores nothing for a backward pass: it is frozen.

    Each visual token has four patches.
    """
    return 2 * tokens * 4 * 8 * network.vision_hidden


def training_memory(network: Network, work: Workload, prompt: int) -> dict[str, float]:
    """Bytes of a forward and a backward pass."""
    tokens = work.groups * prompt + work.rows * work.completion
    layer = layer_bytes(network) + 4 * network.adapted_inputs
    # Gradient checkpointing stores only each layer's input and recomputes one layer at a time.
    stored = network.layers * 2 * network.hidden + layer if work.checkpointing else network.layers * layer
    if work.sequences == 0:
        stored = layer  # without a backward pass, only one layer's activations exist at a time
    return {
        "activations": tokens * stored + vision_bytes(network, work.groups * prompt),
        "KV cache": 0.0,
        "logits": 10.0 * work.rows * min(work.completion, 1024) * network.vocabulary,
    }


def sampling_memory(network: Network, work: Workload, prompt: int) -> dict[str, float]:
    """Bytes of the prefill of a rollout batch, all prompts at once, with the cache of its completions."""
    prompts = work.sampled_prompts * prompt
    layer = layer_bytes(network) + 4 * network.adapted_input
    cached_tokens = prompts + work.sampled_rows * work.completion
    return {
        "activations": prompts * layer + vision_bytes(network, prompts),
        "KV cache": 2.0 * 2 * network.layers * network.kv * cached_tokens,
        "logits": 0.0,
    }


def seconds(network: Network, work: Workload, gpu: Gpu, gpus: int) -> float:
    """Seconds of all updates and rollouts, from FLOP (training, prefill) and bytes read (decoding)."""
    prompt = mean(work.prompts)
    tokens = prompt * work.groups / work.rows + work.expected  # per row
    forward = 2 * network.language * tokens + 4 * network.layers * network.hidden * prompt * tokens
    vision = 2 * network.vision * 4 * prompt * work.groups / work.rows
    passes = 3 + (1 if work.checkpointing else 0) + work.passes
    training = work.sequences * (forward * passes + vision * (1 + work.passes)) / (gpu.flops * UTILIZATION * gpus)
    batches = work.rollouts / max(1, work.sampled_rows) / gpus
    decoding = batches * work.expected * 2 * network.language / (gpu.bytes_per_s * UTILIZATION)
    prefill = work.rollouts * (forward + vision) / (gpu.flops * UTILIZATION * gpus)
    return training + decoding + prefill
