"""Scores of one forward pass, compared to separate passes over each id's text in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from mmr5_train.common.files import InputError
from mmr5_train.inference.local import LocalBackend, load_backend
from mmr5_train.models import page_scores, shared_prefix
from mmr5_train.models.config import CheckpointOptions, ModelOptions
from mmr5_train.models.inputs import encode
from mmr5_train.models.loading import TINY
from mmr5_train.models.page_features import encode_prompts
from mmr5_train.models.page_scores import first_page_log_probs, id_branches
from mmr5_train.models.pages import prepare_page
from mmr5_train.ranking.answer_constraints import LIST_OPEN
from mmr5_train.ranking.prompt import Prompt

QUERIES = ["Which?", "Which of the pages shows a green table about water?"]


@pytest.fixture(scope="module", params=["tiny", "standin", "qwen3_standin"])
def backend(request: pytest.FixtureRequest, prompt: Prompt) -> LocalBackend:
    if request.param == "tiny":
        return load_backend(TINY, mode="logits", max_new_tokens=1)
    options = CheckpointOptions(
        model=ModelOptions(dtype="float32", min_pixels=3136, max_pixels=9500), prompt=prompt
    )
    return load_backend(request.getfixturevalue(request.param), options, mode="logits", max_new_tokens=1)


def pages(backend: LocalBackend, counts: tuple[int, ...]) -> list[list[Image.Image]]:
    colors = [(37 * i % 256, 91 * i % 256, 53 * i % 256) for i in range(sum(counts))]
    images = iter([prepare_page(Image.new("RGB", (84, 112), color), backend.limits) for color in colors])
    return [[next(images) for _ in range(n)] for n in counts]


def separate_log_probs(backend: LocalBackend, query: str, images: list[Image.Image]) -> list[float]:
    """For each id, a pass over the prompt with the beginning of a list that it begins, in full."""
    inputs, tokenizer = encode(backend.processor, backend.prompt, [query], [images]), backend.processor.tokenizer
    prompt_ids, types = inputs.pop("input_ids"), inputs.pop("mm_token_type_ids")
    del inputs["attention_mask"]
    opening, totals = tokenizer(LIST_OPEN)["input_ids"], []
    for i in range(1, len(images) + 1):
        ids = tokenizer(f"{LIST_OPEN}{i}, {1 if i > 1 else 2}, 3]")["input_ids"]
        # The separator is the first token whose text goes beyond the id.
        lengths = range(len(opening) + 1, len(ids) + 1)
        end = next(k for k in lengths if len(tokenizer.decode(ids[:k])) > len(f"{LIST_OPEN}{i}"))
        row = torch.cat([prompt_ids, torch.tensor([ids[:end]])], dim=1)
        row_types = torch.cat([types, torch.zeros(1, end, dtype=types.dtype)], dim=1)
        with torch.no_grad():
            outputs = backend.model(
                input_ids=row, mm_token_type_ids=row_types, logits_to_keep=end - len(opening) + 1, **inputs
            )
        log_probs = outputs.logits[0].double().log_softmax(-1)
        totals.append(sum(log_probs[k, ids[len(opening) + k]].item() for k in range(end - len(opening))))
    return totals


@pytest.mark.parametrize("counts", [(20,), (12, 2)])
def test_scores_are_those_of_separate_passes(backend: LocalBackend, counts: tuple[int, ...]) -> None:
    images, queries = pages(backend, counts), QUERIES[: len(counts)]
    answers = backend.generate(queries, images)
    for [answer], query, page_images in zip(answers, queries, images, strict=True):
        separate = torch.tensor(separate_log_probs(backend, query, page_images), dtype=torch.float64)
        expected = separate.softmax(-1).tolist()
        scores = dict(zip(answer.order, answer.scores, strict=True))
        assert sum(answer.scores) == pytest.approx(1, abs=1e-6)
        assert [scores[i] for i in range(1, len(page_images) + 1)] == pytest.approx(expected, abs=1e-5)
        assert list(answer.scores) == sorted(answer.scores, reverse=True)


def test_the_cached_way_is_equal(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pages(backend, (12, 3))
    shared = backend.generate(QUERIES, images)
    monkeypatch.setattr(shared_prefix, "unsupported_reason", lambda model: "for this test")
    cached = backend.generate(QUERIES, images)
    for [one], [other] in zip(shared, cached, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-6)


def test_each_id_has_its_tokens_and_a_separator(qwen_tokenizer: Any) -> None:
    branches = id_branches(qwen_tokenizer, 100)
    texts = [qwen_tokenizer.decode(branches.opening + tokens) for tokens in branches.tokens]
    assert texts == [f"{LIST_OPEN}{i}," for i in range(1, 101)]
    assert [len(tokens) for tokens in branches.tokens] == [2] * 9 + [3] * 90 + [4]
    assert qwen_tokenizer.decode(id_branches(qwen_tokenizer, 1).tokens[0]).startswith("1]")


def test_a_hundred_pages_are_scored_in_one_pass(standin: Path, prompt: Prompt) -> None:
    options = CheckpointOptions(model=ModelOptions(min_pixels=3136, max_pixels=9500), prompt=prompt)
    backend = load_backend(standin, options, mode="logits", max_new_tokens=1)
    [[answer]] = backend.generate(QUERIES[:1], pages(backend, (100,)))
    assert sorted(answer.order) == list(range(1, 101))
    assert sum(answer.scores) == pytest.approx(1, abs=1e-5)


def test_probabilities_of_all_beginnings_sum_to_at_most_one(backend: LocalBackend) -> None:
    images = pages(backend, (20,))
    prompts = encode_prompts(backend.model, backend.processor, backend.prompt, QUERIES[:1], images)
    [values] = first_page_log_probs(backend.model, prompts, [id_branches(backend.processor.tokenizer, 20)])
    assert values.exp().sum() <= 1 + 1e-5


def test_logits_are_computed_in_float32_part_by_part(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    head = backend.model.get_output_embeddings().weight
    hidden, tokens = torch.randn(7, head.shape[1]), torch.randint(len(head), (7,))
    expected = (hidden.double() @ head.double().T).log_softmax(-1)[torch.arange(7), tokens]
    for chunk in (100, len(head)):
        monkeypatch.setattr(page_scores, "VOCABULARY_CHUNK", chunk)
        values = page_scores.next_token_log_probs(hidden, tokens, backend.model)
        assert values.dtype == torch.float32
        assert values.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert not math.isnan(values.sum().item())


def greedy_order(backend: LocalBackend, query: str, images: list[Image.Image]) -> list[int]:
    """The pages place by place: for each place, a separate pass over the whole text for each page that remains."""
    tokenizer, n = backend.processor.tokenizer, len(images)
    inputs = encode(backend.processor, backend.prompt, [query], [images])
    prompt_ids, types = inputs.pop("input_ids"), inputs.pop("mm_token_type_ids")
    del inputs["attention_mask"]
    order: list[int] = []
    while len(order) < n - 1:
        remaining = [i for i in range(1, n + 1) if i not in order]
        text = LIST_OPEN + "".join(f"{i}, " for i in order)
        totals = []
        for i in remaining:
            ids = tokenizer(f"{text}{i}, ")["input_ids"]
            lengths = range(1, len(ids) + 1)
            start = next(k for k in lengths if len(tokenizer.decode(ids[:k])) > len(text)) - 1
            end = next(k for k in lengths if len(tokenizer.decode(ids[:k])) > len(f"{text}{i}"))
            row = torch.cat([prompt_ids, torch.tensor([ids[:end]])], dim=1)
            row_types = torch.cat([types, torch.zeros(1, end, dtype=types.dtype)], dim=1)
            with torch.no_grad():
                outputs = backend.model(
                    input_ids=row, mm_token_type_ids=row_types, logits_to_keep=end - start + 1, **inputs
                )
            log_probs = outputs.logits[0].double().log_softmax(-1)
            totals.append(sum(log_probs[k, ids[start + k]].item() for k in range(end - start)))
        order.append(remaining[max(range(len(totals)), key=totals.__getitem__)])
    return [*order, *(i for i in range(1, n + 1) if i not in order)]


@pytest.mark.parametrize("n", [1, 2, 12])
def test_place_by_place_is_greedy_without_replacement(backend: LocalBackend, n: int) -> None:
    [images] = pages(backend, (n,))
    backend.logits_order = "place_by_place"
    try:
        [[answer]] = backend.generate(QUERIES[:1], [images])
    finally:
        backend.logits_order = "first_place"
    assert list(answer.order) == greedy_order(backend, QUERIES[0], images)
    assert answer.scores == ()


def test_a_tokenizer_that_joins_ids_with_separators_is_refused(backend: LocalBackend) -> None:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "1,": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    with pytest.raises(InputError, match="joins a page id"):
        id_branches(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 3)
