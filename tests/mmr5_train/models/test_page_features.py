"""Prompts with vision features, compared to the processor's own inputs with pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from mmr5_train.common.part_times import PartTimes
from mmr5_train.inference.local import load_backend
from mmr5_train.models.config import CheckpointOptions, ModelOptions
from mmr5_train.models.inputs import encode
from mmr5_train.models.loading import TINY
from mmr5_train.models.page_features import MAX_TOWER_PATCHES, PageCache, PageFeatures, encode_prompts
from mmr5_train.models.pages import prepare_page

QUERIES = ["Which?", "Which of the pages shows a <|image_pad|> about water?"]


@pytest.fixture(scope="module", params=["tiny", "standin", "qwen3_standin"])
def backend(request: pytest.FixtureRequest, prompt: Any) -> Any:
    if request.param == "tiny":
        return load_backend(TINY, mode="logits")
    model = ModelOptions(dtype="float32", min_pixels=3136, max_pixels=9500)
    return load_backend(request.getfixturevalue(request.param), CheckpointOptions(model=model, prompt=prompt))


@pytest.fixture(scope="module")
def images(backend: Any) -> list[list[Image.Image]]:
    sizes = [(84, 112), (200, 60), (56, 56), (112, 84)]
    pages = [prepare_page(Image.effect_noise(size, 90).convert("RGB"), backend.limits) for size in sizes]
    return [[pages[0], pages[1], pages[2]], [pages[1], pages[3]]]


def encoded(backend: Any, images: Any, **options: Any) -> Any:
    return encode_prompts(backend.model, backend.processor, backend.prompt, QUERIES, images, **options)


def test_tokens_grids_and_logits_are_those_of_pixels(backend: Any, images: Any) -> None:
    expected = encode(backend.processor, backend.prompt, QUERIES, images)
    prompts = encoded(backend, images)
    inputs = prompts.padded(backend.processor.tokenizer.pad_token_id)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw"):
        assert inputs[name].tolist() == expected[name].tolist(), name
    with torch.no_grad():
        found = backend.model(**inputs, logits_to_keep=1).logits
        wanted = backend.model(**expected, logits_to_keep=1).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def tower_calls(backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The list to which each call of the tower adds its number of pages."""
    calls: list[int] = []
    original = type(backend.model).get_image_features

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(kwargs["image_grid_thw"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(backend.model), "get_image_features", count)
    return calls


def test_each_distinct_page_is_read_once(backend: Any, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tower_calls(backend, monkeypatch)
    copies = [[page.copy() for page in page_images] for page_images in images]  # equal pixels, other objects
    cache, times = PageCache(10**9), PartTimes()
    first = encoded(backend, copies, cache=cache, times=times)
    assert calls == [4]
    assert {"encode", "vision"} <= times.seconds.keys()
    second = encoded(backend, images, cache=cache)
    assert calls == [4]
    pairs = zip(first.levels, second.levels, strict=True)
    assert all(torch.equal(one, other) for a, b in pairs for one, other in zip(a, b, strict=True))
    encoded(backend, images)
    assert calls == [4, 4]


def test_the_tower_reads_a_bounded_number_of_patches(backend: Any, images: Any, monkeypatch: Any) -> None:
    whole = encoded(backend, images)
    calls = tower_calls(backend, monkeypatch)
    monkeypatch.setattr("mmr5_train.models.page_features.MAX_TOWER_PATCHES", 1)
    one_by_one = encoded(backend, images)
    assert calls == [1, 1, 1, 1]
    assert MAX_TOWER_PATCHES > 1
    for a, b in zip(whole.levels, one_by_one.levels, strict=True):
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_cache_is_bounded_and_drops_the_least_recently_used_page() -> None:
    pages = [PageFeatures((1, 2, 2), (torch.zeros(1, 10),)) for _ in range(4)]  # 40 bytes each
    cache = PageCache(100)
    for name, page in zip("abc", pages, strict=False):
        cache.put(name.encode(), page)
        cache.get(b"a")
    assert [cache.get(name.encode()) for name in "abc"] == [pages[0], None, pages[2]]
    assert (len(cache), cache.nbytes) == (2, 80)
    cache.put(b"d", PageFeatures((1, 2, 2), (torch.zeros(1, 30),)))  # larger than the cache
    assert (len(cache), cache.nbytes) == (2, 80)
    cache.put(b"a", pages[3])
    assert (cache.get(b"a"), cache.nbytes) == (pages[0], 80)
