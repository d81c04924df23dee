"""Puts a loaded model on one device, or spreads it over several."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory

from mmr5_train.common.files import InputError
from mmr5_train.models.loading import ModelConfig


def place_model(model: Any, config: ModelConfig, device: str) -> Any:
    """The model on `device`, or with `device_map` spread over all GPUs, and over CPU memory for what is left.

    Raises `InputError` if a spread model does not fit, or if several processes would spread one each.
    """
    if config.device_map is None:
        return model.to(device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise InputError(
            f"model.device_map=auto: spreads one model over all GPUs, found {processes} processes; start the "
            "command without a launcher"
        )
    classes = sorted(model._no_split_modules)
    memory = get_balanced_memory(model, no_split_module_classes=classes)
    device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=classes)
    if "disk" in device_map.values():
        raise InputError(
            f"{config.path}: does not fit the memory of this machine's GPUs and CPUs; use larger GPUs, or a "
            "smaller checkpoint"
        )
    return dispatch_model(model, device_map, skip_keys=model._skip_keys_device_placement)


def input_device(model: Any) -> torch.device:
    """The device for the model's inputs. The hooks of a spread model move them on, and weights in CPU memory have
    the device "meta" there."""
    device_map = getattr(model, "hf_device_map", None)
    if device_map is None:
        return model.device
    devices = [device for device in device_map.values() if device not in ("cpu", "disk")]
    return torch.device(devices[0] if devices else "cpu")
