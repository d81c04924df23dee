"""The vision tower with batched windows and wider MLPs gives the features of the tower as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmr5_train.models.config import ModelOptions
from mmr5_train.models.loading import TINY, load_model
from mmr5_train.models.settings import complete_model
from mmr5_train.models.shared_prefix import image_features
from mmr5_train.models.vision_speed import ATTENTION, UNITS, align_mlps, batch_windows

GRIDS = {"equal": [(1, 16, 8)] * 3, "unequal": [(1, 16, 8), (1, 12, 26), (1, 4, 4)]}


def features(model: Any, grids: list[tuple[int, int, int]]) -> list[tuple[torch.Tensor, ...]]:
    size = torch.tensor(grids)
    torch.manual_seed(0)
    patch = model.config.vision_config.patch_size
    pixels = torch.randn(int(size.prod(1).sum()), 3 * 2 * patch * patch)
    return image_features(model, {"pixel_values": pixels, "image_grid_thw": size})


def assert_equal(expected: Any, found: Any, tolerance: float) -> None:
    for image, other in zip(expected, found, strict=True):
        for level, changed in zip(image, other, strict=True):
            torch.testing.assert_close(changed, level, atol=tolerance, rtol=0)


@pytest.mark.parametrize("checkpoint", ["tiny", "standin", "qwen3_standin"])
@pytest.mark.parametrize("grids", GRIDS)
def test_batched_windows_change_nothing(
    request: Any, checkpoint: str, grids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = TINY if checkpoint == "tiny" else request.getfixturevalue(checkpoint)
    model = load_model(complete_model(ModelOptions(path=str(path), dtype="float32"))).eval()
    expected = features(model, GRIDS[grids])
    calls = count_calls(monkeypatch)
    features(model, GRIDS[grids])
    separate = len(calls)
    batch_windows(model)
    assert model.config.vision_config._attn_implementation == ATTENTION
    calls.clear()
    assert_equal(expected, features(model, GRIDS[grids]), 1e-5)
    assert len(calls) < separate or (checkpoint, grids) == ("qwen3_standin", "unequal")  # it has no windows
    model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an entry for each call of attention."""
    calls: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setattr("mmr5_train.models.vision_speed.scaled_dot_product_attention", counted)
    return calls


def test_gradients_pass_through_batched_windows() -> None:
    models = [load_model(complete_model(ModelOptions(path=str(TINY), freeze_vision=False))) for _ in range(2)]
    batch_windows(models[1])
    for model in models:
        size = torch.tensor(GRIDS["unequal"])
        torch.manual_seed(0)
        pixels = torch.randn(int(size.prod(1).sum()), 3 * 2 * 14 * 14)
        output = model.get_image_features(pixels, size, return_dict=True).pooler_output
        torch.cat(output).square().mean().backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert any(parameter.grad is not None for parameter in models[0].parameters())


def test_wider_mlps_change_nothing() -> None:
    model = load_model(complete_model(ModelOptions(path=str(TINY)))).eval()
    block = model.model.visual.blocks[0].mlp
    with torch.no_grad():  # a width that is not a multiple, as published
        for mlp in (block.mlp for block in model.model.visual.blocks):
            for layer in (mlp.gate_proj, mlp.up_proj):
                layer.weight, layer.bias = (torch.nn.Parameter(p[:-4]) for p in (layer.weight, layer.bias))
                layer.out_features -= 4
            mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :-4])
            mlp.down_proj.in_features -= 4
    expected, width = features(model, GRIDS["unequal"]), block.gate_proj.out_features
    align_mlps(model)
    assert width % UNITS
    assert block.gate_proj.out_features == block.down_proj.in_features == -(-width // UNITS) * UNITS
    assert_equal(expected, features(model, GRIDS["unequal"]), 1e-5)
