"""What is trained: LoRA adapters and LoRA+ with PEFT, the precision of the trained weights, the frozen tower."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer

from mmr5_train.common.files import InputError
from mmr5_train.models.config import ModelConfig


def lora_config(model: ModelConfig) -> LoraConfig | None:
    """PEFT's config for the model's adapters, or None for full fine-tuning.

    Raises `InputError` for a 4-bit base without adapters: quantized weights cannot be trained.
    """
    if model.lora is None and model.load_in_4bit:
        raise InputError("model.load_in_4bit: 4-bit weights can't be trained; add adapters with model.lora")
    if model.lora is None:
        return None
    return LoraConfig(
        r=model.lora.r,
        lora_alpha=model.lora.alpha,
        lora_dropout=model.lora.dropout,
        target_modules=model.lora.target_modules,
        task_type="CAUSAL_LM",
    )


def use_lora_plus(trainer: Trainer, model: ModelConfig) -> None:
    """Replaces the trainer's optimizer with PEFT's LoRA+ version of it, if the model config sets a ratio.

    LoRA+ (arXiv 2402.12354) gives the B matrices a higher learning rate than the A matrices.
    """
    if model.lora is None or model.lora.plus_ratio is None:
        return
    network: Any = trainer.model
    optimizer_class, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, network)
    learning_rate = settings.pop("lr")
    optimizer = create_loraplus_optimizer(
        network,
        optimizer_class,
        lr=learning_rate,
        loraplus_lr_ratio=model.lora.plus_ratio,
        loraplus_weight_decay=trainer.args.weight_decay,
        **settings,
    )
    # PEFT adds a parameter group for embeddings that is usually empty. DeepSpeed rejects empty groups.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    trainer.optimizer = optimizer


def keep_float32_weights(trainer: Trainer, model: ModelConfig) -> None:
    """Converts the trained weights to float32. The forward pass still computes in the dtype of `model`.

    A 16-bit weight ignores updates that are small against it: bfloat16 those below 1/512 of the weight, which at a
    learning rate of 1e-5 are most of them. DeepSpeed keeps float32 copies itself.
    """
    if trainer.is_deepspeed_enabled or model.dtype == "float32":
        return
    network: Any = trainer.model
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def run_frozen_tower_without_gradients(trainer: Trainer) -> None:
    """Runs the vision tower without gradients and in evaluation mode if none of its weights is trained.

    For gradient checkpointing with LoRA, transformers makes the output of every input embedding require gradients,
    the tower's patch embedding included. The frozen tower would be computed again and differentiated in each
    backward pass, for gradients that nothing uses.
    """
    network: Any = trainer.model
    base = network.get_base_model() if isinstance(network, PeftModel) else network
    tower = getattr(base.model, "visual", None)
    if tower is not None and not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.forward = torch.no_grad()(tower.forward)
        tower.eval()
        tower.train = lambda mode=True: tower  # in training mode, its layers would be checkpointed


def count_trainable_parameters(trainer: Trainer) -> int:
    """The number of trainable parameters, over all ranks."""
    model: Any = trainer.model
    # Under ZeRO-3 a partitioned parameter is empty on this rank and has its full size in `ds_numel`.
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def without_adapter(model: Any) -> Any:
    """The base model in which PEFT has placed its adapter layers, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
