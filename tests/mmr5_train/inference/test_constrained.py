from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList

from mmr5_train.common.files import InputError
from mmr5_train.inference.constrained import ListOfAllPages, Vocabulary
from mmr5_train.models.inputs import encode
from mmr5_train.models.loading import load_model
from mmr5_train.models.pages import prepare_page
from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.prompt import render_completion


@pytest.fixture(scope="module")
def vocabulary(processor):
    return Vocabulary(processor.tokenizer)


def written(vocabulary, n, think, max_new_tokens, scores):
    """The text that is decoded from the scores of each step, sampled, and whether it came to its end."""
    held = ListOfAllPages(vocabulary, [n], think=think, prompt_length=2, max_new_tokens=max_new_tokens)
    ids = torch.tensor([[1, 2]])
    for step in range(max_new_tokens):
        ids = torch.cat([ids, torch.multinomial(held(ids, scores(step)).softmax(-1), 1)], dim=1)
        if ids[0, -1] == vocabulary.end:
            break
    text = vocabulary.tokenizer.decode(ids[0, 2:], skip_special_tokens=True)
    return text, ids[0, -1] == vocabulary.end, held.rows[0]


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5, 12, 40])
def test_noise_becomes_a_permutation_within_the_limit(vocabulary, n, think):
    torch.manual_seed(n)
    size = len(vocabulary.texts)
    favour = torch.zeros(1, size)
    favour[0, vocabulary.closing] = 3.0  # so that thoughts are closed, or begun to be, at any time
    for room in (0, 1, 7, 60):
        limit = vocabulary.needed(n) + room
        text, ended, row = written(vocabulary, n, think, limit, lambda _: 3 * torch.randn(1, size) + favour)
        answer = parse_answer(text, n, expect_think=think)
        assert answer.is_complete_permutation
        assert answer.structure_valid
        assert ended, "the limit cut the answer off"
        if think and room == 0:
            assert row.cut_off


def test_the_order_is_the_models_own(vocabulary):
    """Noise has no favourite: each of six orders comes about as often as another."""
    torch.manual_seed(0)
    size = len(vocabulary.texts)
    orders = Counter(written(vocabulary, 3, False, 40, lambda _: torch.zeros(1, size))[0] for _ in range(300))
    assert len(orders) == 6
    assert min(orders.values()) > 20


def test_what_a_model_writes_by_itself_passes_through(vocabulary):
    """The tokens of a completion as SFT teaches it are all allowed where they stand."""
    text = render_completion("Image 1: a table, so it helps.\nImage 2: 3 > 2, so it does not.", [2, 1, 3])
    ids = vocabulary.tokenizer(text)["input_ids"]
    size = len(vocabulary.texts)
    wish = [torch.full((1, size), -30.0).index_fill(1, torch.tensor([i]), 30.0) for i in [*ids, vocabulary.end]]
    found, ended, row = written(vocabulary, 3, True, 200, lambda step: wish[step])
    assert (found, ended, row.cut_off) == (text, True, False)


def test_too_few_tokens_for_an_answer_are_an_error(vocabulary):
    with pytest.raises(InputError, match=r"max_new_tokens: a list of 40 pages takes up to \d+ tokens, found 50"):
        ListOfAllPages(vocabulary, [3, 40], think=True, prompt_length=2, max_new_tokens=50)


def test_rows_of_a_batch_do_not_mix(tiny, prompt, processor, page_folder):
    """An untaught model in one batch of one, two and three pages, sampled."""
    from PIL import Image

    page = prepare_page(Image.open(page_folder / "page-0.png"), processor)
    pages = [[page] * n for n in (1, 2, 3)]
    inputs = encode(processor, prompt, ["Which?"] * 3, pages)
    width = inputs["input_ids"].shape[1]
    held = ListOfAllPages(
        Vocabulary(processor.tokenizer), [1, 2, 3], think=True, prompt_length=width, max_new_tokens=60
    )
    torch.manual_seed(0)
    model = load_model(tiny)
    config = model.generation_config
    config.update(do_sample=True, temperature=3.0, top_k=0, max_new_tokens=60)
    generated = model.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList([held]))
    for n, ids in enumerate(generated[:, width:], 1):
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert parse_answer(text, n).structure_valid, text
        assert parse_answer(text, n).is_complete_permutation
