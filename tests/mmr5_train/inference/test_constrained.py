"""Constrained decoding, first with random scores instead of a model's, then with the tiny model."""

from collections import Counter

import pytest
import torch
from PIL import Image
from transformers import LogitsProcessorList

from mmr5_train.common.files import InputError
from mmr5_train.inference.constrained import PermutationLogitsProcessor, Vocabulary
from mmr5_train.models.inputs import encode
from mmr5_train.models.loading import load_model
from mmr5_train.models.pages import page_limits, prepare_page
from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.prompt import render_completion


@pytest.fixture(scope="module")
def vocabulary(processor):
    return Vocabulary(processor.tokenizer)


def sample(vocabulary, n_pages, think, max_new_tokens, scores_at):
    """Samples one completion from `scores_at(step)`.

    Returns its text, whether it has the end token, and the final decoding state.
    """
    constraint = PermutationLogitsProcessor(
        vocabulary, [n_pages], think=think, prompt_length=2, max_new_tokens=max_new_tokens
    )
    ids = torch.tensor([[1, 2]])
    for step in range(max_new_tokens):
        ids = torch.cat([ids, torch.multinomial(constraint(ids, scores_at(step)).softmax(-1), 1)], dim=1)
        if ids[0, -1] == vocabulary.end_id:
            break
    text = vocabulary.tokenizer.decode(ids[0, 2:], skip_special_tokens=True)
    return text, ids[0, -1] == vocabulary.end_id, constraint.states[0]


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5, 12, 40])
def test_random_scores_give_a_permutation_within_the_token_limit(vocabulary, n, think):
    torch.manual_seed(n)
    size = len(vocabulary.texts)
    bias = torch.zeros(1, size)
    bias[0, vocabulary.closing_ids] = 3.0  # so that think blocks are closed, or partly closed, at any time
    for spare_tokens in (0, 1, 7, 60):
        limit = vocabulary.max_answer_length(n) + spare_tokens
        text, has_end, row = sample(vocabulary, n, think, limit, lambda _: 3 * torch.randn(1, size) + bias)
        answer = parse_answer(text, n, expect_think=think)
        assert answer.is_complete_permutation
        assert answer.structure_valid
        assert has_end, "the limit cut the answer off"
        if think and spare_tokens == 0:
            assert row.cut_off


def test_the_constraint_does_not_favor_an_order(vocabulary):
    """With equal scores, each of the six orders of three pages is about equally frequent."""
    torch.manual_seed(0)
    size = len(vocabulary.texts)
    orders = Counter(sample(vocabulary, 3, False, 40, lambda _: torch.zeros(1, size))[0] for _ in range(300))
    assert len(orders) == 6
    assert min(orders.values()) > 20


def test_a_well_formed_completion_is_not_changed(vocabulary):
    """All tokens of a completion as in the SFT data are allowed at their positions."""
    text = render_completion("Image 1: a table, so it helps.\nImage 2: 3 > 2, so it does not.", [2, 1, 3])
    ids = vocabulary.tokenizer(text)["input_ids"]
    size = len(vocabulary.texts)
    scores = [
        torch.full((1, size), -30.0).index_fill(1, torch.tensor([i]), 30.0) for i in [*ids, vocabulary.end_id]
    ]
    sampled, has_end, row = sample(vocabulary, 3, True, 200, lambda step: scores[step])
    assert (sampled, has_end, row.cut_off) == (text, True, False)


def test_too_few_tokens_for_an_answer_are_an_error(vocabulary):
    with pytest.raises(InputError, match=r"max_new_tokens: a list of 40 pages takes up to \d+ tokens, found 50"):
        PermutationLogitsProcessor(vocabulary, [3, 40], think=True, prompt_length=2, max_new_tokens=50)


def test_rows_of_a_batch_may_have_different_numbers_of_pages(tiny, prompt, processor, page_folder):
    """The untrained tiny model, sampled, in one batch of prompts with one, two and three pages."""
    page = prepare_page(Image.open(page_folder / "page-0.png"), page_limits(processor))
    inputs = encode(processor, prompt, ["Which?"] * 3, [[page] * n for n in (1, 2, 3)])
    prompt_length = inputs["input_ids"].shape[1]
    constraint = PermutationLogitsProcessor(
        Vocabulary(processor.tokenizer), [1, 2, 3], think=True, prompt_length=prompt_length, max_new_tokens=60
    )
    torch.manual_seed(0)
    model = load_model(tiny)
    config = model.generation_config
    config.update(do_sample=True, temperature=3.0, top_k=0, max_new_tokens=60)
    sequences = model.generate(
        **inputs, generation_config=config, logits_processor=LogitsProcessorList([constraint])
    )
    for n, ids in enumerate(sequences[:, prompt_length:], 1):
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert parse_answer(text, n).structure_valid, text
        assert parse_answer(text, n).is_complete_permutation
