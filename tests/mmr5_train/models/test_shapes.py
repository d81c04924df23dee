"""The published shapes on the meta device load, take adapters, and have the sizes with which plan computes."""

from functools import lru_cache

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText

from mmr5_train.common.config import compose_stage
from mmr5_train.models.shapes import empty_model, shape_config
from mmr5_train.recipes import cost
from mmr5_train.sft import SftStage
from mmr5_train.training.adapters import lora_config

PATHS = {"3B": "Qwen/Qwen2.5-VL-3B-Instruct", "7B": "Qwen/Qwen2.5-VL-7B-Instruct"}
# Rows and columns of the layers with adapters, counted by hand: q and o, k and v, gate, up and down.
ADAPTERS = {
    "3B": 36 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008)),
    "7B": 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)),
}


def model_config(size, r):
    overrides = [f"model=qwen2_5_vl_{size.lower()}", f"model.lora={{r:{r},alpha:{4 * r}}}"]
    config = compose_stage(SftStage, "sft", overrides).model
    assert config.path == PATHS[size]
    return config


@lru_cache
def planned_network(size):
    return cost.measure(model_config(size, 64))


@pytest.mark.parametrize("size", PATHS)
def test_a_shape_takes_the_adapters_that_were_counted_by_hand(size):
    config = model_config(size, 8)
    model = get_peft_model(empty_model(config.path), lora_config(config))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not any("visual" in name for name in trained)
    counts = {8: sum(p.numel() for p in trained.values()), 64: planned_network(size).trained}
    assert counts == {r: r * ADAPTERS[size] for r in (8, 64)}
    if size == "7B":
        assert counts == {8: 20_185_088, 64: 161_480_704}


@pytest.mark.parametrize("size", PATHS)
def test_the_sizes_of_a_plan_are_those_of_the_modules(size):
    model, network = empty_model(PATHS[size]), planned_network(size)
    assert network.language + network.vision == sum(p.numel() for p in model.parameters())
    assert network.vision == sum(p.numel() for p in model.model.visual.parameters())
    text, vision = model.model.language_model, model.model.visual
    assert (network.layers, network.vision_layers) == (len(text.layers), len(vision.blocks))
    for layer in text.layers:
        attention, mlp = layer.self_attn, layer.mlp
        sizes = (attention.q_proj.in_features, attention.k_proj.out_features, mlp.gate_proj.out_features)
        assert sizes == (network.hidden, network.kv, network.intermediate)
    assert model.lm_head.out_features == network.vocabulary
    assert vision.blocks[0].norm1.weight.numel() == network.vision_hidden


@pytest.mark.parametrize("size", PATHS)
def test_planned_memory_is_that_of_the_parameters_and_of_a_key_value_cache(size):
    """Base weights in bfloat16; adapters in float32, with gradients and two moments; a layer's keys and values."""
    network = planned_network(size)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape_config(PATHS[size]), dtype=torch.bfloat16)
        cache = model.model.language_model(
            inputs_embeds=torch.empty(2, 50, network.hidden, dtype=torch.bfloat16),
            position_ids=torch.empty(3, 2, 50, dtype=torch.long),
            use_cache=True,
        ).past_key_values
    stage = cost.Workload(
        prompts=[40], rows=2, groups=2, completion=10, expected=10, updates=1, sequences=2, passes=0, rollouts=2,
        checkpointing=True, sampled_rows=2, sampled_prompts=2,
    )  # fmt: skip
    planned = cost.memory(network, stage, "ddp", 1)
    trained = 64 * ADAPTERS[size]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert planned["weights"] == weights + 4 * trained
    assert planned["gradients"] + planned["optimizer"] == 12 * trained
    cached = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert cost.sampling_memory(network, stage, 40)["KV cache"] == sum(
        tensor.numel() * tensor.element_size() for tensor in cached
    )
