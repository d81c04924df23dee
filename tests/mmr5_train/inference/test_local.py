"""The backend that runs the model in this process: precision, and token ids without text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmr5_train.inference.local import LocalBackend, load_backend
from mmr5_train.inference.stopping import End
from mmr5_train.models.config import CheckpointOptions, ModelOptions
from mmr5_train.models.pages import load_page
from mmr5_train.ranking.prompt import Prompt

QUERIES = ["Which?", "Which of the pages shows a green table about water?"]


@pytest.fixture(scope="module")
def backend(standin: Path, prompt: Prompt) -> LocalBackend:
    options = CheckpointOptions(model=ModelOptions(dtype="bfloat16", max_pixels=9500), prompt=prompt)
    return load_backend(standin, options, max_new_tokens=24)


@pytest.fixture(scope="module")
def images(backend: LocalBackend, page_folder: Path) -> list[Any]:
    return [[load_page(page_folder / f"page-{i}.png", backend.limits) for i in range(n)] for n in (2, 5)]


def test_greedy_answers_do_not_depend_on_earlier_samples(backend: LocalBackend, images: list[Any]) -> None:
    attention = backend.model.config.get_text_config()._attn_implementation
    before = backend.generate(QUERIES, images)
    backend.generate(QUERIES, images, samples=3)
    assert backend.model.config.get_text_config()._attn_implementation == attention
    assert backend.generate(QUERIES, images) == before


def test_token_ids_without_text_are_decoded_to_nothing(backend: LocalBackend) -> None:
    tokenizer = backend.processor.tokenizer
    ids = [151_665, *tokenizer("<answer>[2, 1]</answer>")["input_ids"], 152_063, tokenizer.eos_token_id]
    answer = backend._read(ids, 2, End(len(ids) - 1, len(ids), "", False), False, False, {})
    assert answer.completion == "<answer>[2, 1]</answer>"
