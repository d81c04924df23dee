"""Token counts before the first step: equal to the processor's, and the rule for examples that do not fit."""

import pytest
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mmr5_train.common.files import InputError
from mmr5_train.models.inputs import encode, load_pages
from mmr5_train.models.lengths import (
    TokenCount,
    TokenLimit,
    check_all_fit,
    context_limit,
    count_tokens,
    image_sizes,
    leave_out_too_long,
    lowest,
    setting_limit,
)
from mmr5_train.models.loading import ModelConfig, load_processor
from mmr5_train.ranking.prompt import build_messages, render_completion
from mmr5_train.ranking.records import Candidate

LIMIT = TokenLimit(100, "trainer.max_length", "raise trainer.max_length")
# Portrait and landscape scans, a page of 6,603 tokens, pages below the smallest size, and very long ones.
PAGE_SIZES = [
    (1240, 1754),
    (2000, 2600),
    (724, 1024),
    (28, 28),
    (3, 9),
    (39, 7800),
    (9000, 60),
    (20, 3000),
    (640, 333),
]


def candidates(folder, sizes):
    pages = []
    for i, size in enumerate(sizes):
        Image.new("L", size, 200).save(folder / f"{i}.png")
        pages.append(Candidate(doc_name="doc", page=i, image=f"{i}.png", score=0))
    return pages


def collate(processor, messages, completion, images):
    """The batch that TRL's SFT trainer makes of one example."""
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    turn = {"role": "assistant", "content": completion}
    return collator([{"prompt": messages, "completion": [turn], "images": images}])


@pytest.mark.parametrize("family", ["standin", "qwen3_standin"])
@pytest.mark.parametrize("max_pixels", [12_845_056, 60_000])
def test_counts_equal_those_of_the_processor(family, max_pixels, prompt, tmp_path, request):
    config = ModelConfig(
        path=str(request.getfixturevalue(family)), min_pixels=4096, max_pixels=max_pixels, dtype="float32"
    )
    processor = load_processor(config)
    pages = candidates(tmp_path, PAGE_SIZES)
    shown = [pages[:2], pages[2:], [*pages[3:], *pages[3:5]], pages[5:6]]
    queries = ["Which page?", "  1,234.50 € in <|im_end|> 2019?\n", "問題 <image>", "x" * 400]
    completions = [
        render_completion("Image 1: a table, so it helps.\nImage 2: The other, so it does not help.", [1, 2]),
        render_completion(None, list(range(1, 8))),
        render_completion("\n\nTwo sentences. That end.", [10, 2, 1, 3, 4, 5, 6, 7, 8, 9]),
        "<answer>[1]</answer>",
    ]
    counts = count_tokens(processor, prompt, queries, shown, image_sizes(pages, tmp_path), completions)
    prompts_only = count_tokens(processor, prompt, queries, shown, image_sizes(pages, tmp_path))
    for query, row, completion, count, prompt_count in zip(
        queries, shown, completions, counts, prompts_only, strict=True
    ):
        images = load_pages(row, tmp_path, processor)
        inputs = encode(processor, prompt, [query], [images])
        assert prompt_count.prompt == count.prompt == inputs["input_ids"].shape[1]
        assert sum(count.visual) == (inputs["input_ids"] == processor.image_token_id).sum()
        batch = collate(processor, build_messages(prompt, query, len(row)), completion, images)
        assert count.total == batch["input_ids"].shape[1]
        assert count.completion == (batch["labels"] != -100).sum()


def test_five_large_pages_exceed_the_published_maximum_length(standin, prompt, tmp_path):
    config = ModelConfig(path=str(standin), min_pixels=3136, max_pixels=12_845_056, dtype="float32")
    pages = candidates(tmp_path, [(2000, 2600)])
    shown = [[pages[0].model_copy(update={"page": i}) for i in range(5)]]
    [count] = count_tokens(load_processor(config), prompt, ["Which page?"], shown, image_sizes(pages, tmp_path))
    assert count.visual == (6603,) * 5
    assert count.prompt > 32_768


def test_a_prompt_that_the_completion_does_not_continue_is_split_as_trl_splits_it(processor, prompt, page_folder):
    """Some templates begin the think block in the generation prompt, also of an answer without a think block."""
    pages = [Candidate(doc_name="doc", page=0, image="page-0.png", score=0)]
    template, sizes = processor.chat_template, image_sizes(pages, page_folder)
    processor.chat_template = template + "{% if add_generation_prompt %}<think>{% endif %}"
    try:
        [count] = count_tokens(processor, prompt, ["?"], [pages], sizes, ["<answer>[1]</answer>"])
        [alone] = count_tokens(processor, prompt, ["?"], [pages], sizes)
        images = load_pages(pages, page_folder, processor)
        batch = collate(processor, build_messages(prompt, "?", 1), "<answer>[1]</answer>", images)
        assert alone.prompt == encode(processor, prompt, ["?"], [images])["input_ids"].shape[1]
    finally:
        processor.chat_template = template
    assert count.total == batch["input_ids"].shape[1]
    assert count.completion == (batch["labels"] != -100).sum()


def test_examples_that_do_not_fit_are_left_out_and_listed(tmp_path):
    counts = [TokenCount(20, (30, 30), 20), TokenCount(20, (30, 30), 21), TokenCount(5, (6,), 7)]
    fitting = leave_out_too_long(tmp_path / "traces.jsonl", ["a", "b", "c"], counts, LIMIT, 0.4)
    assert fitting.indices == [0, 2]
    [skipped] = fitting.skipped
    assert (skipped.query_id, skipped.reason) == ("b", "too many tokens")
    assert skipped.detail == "101 tokens (pages 60 + text 20 + completion 21); at most 100"
    assert fitting.counts == {"too many tokens": 1}
    assert "1 of 3 examples have more than 100 tokens (trainer.max_length)" in fitting.message
    assert "raise trainer.max_length" in fitting.message
    everything = leave_out_too_long(tmp_path, ["a"], counts[:1], LIMIT, 0)
    assert (everything.indices, everything.counts, everything.message) == ([0], {}, "")
    assert leave_out_too_long(tmp_path, ["b"], counts[1:2], None, 0).indices == [0]


@pytest.mark.parametrize(("rows", "max_share"), [([0, 1], 0.4), ([1], 1)])
def test_too_many_examples_that_do_not_fit_are_an_error(rows, max_share, tmp_path):
    counts = [[TokenCount(20, (), 0), TokenCount(120, (), 0)][i] for i in rows]
    with pytest.raises(
        InputError, match=r"questions\.jsonl: 1 of . examples have more .* q1: 120 tokens .*; raise"
    ):
        leave_out_too_long(tmp_path / "questions.jsonl", [f"q{i}" for i in rows], counts, LIMIT, max_share)


def test_evaluation_lists_the_questions_that_do_not_fit():
    counts = [TokenCount(10, (80 + i,)) for i in range(40)]
    with pytest.raises(
        InputError, match=r"system x: 29 of 40 prompts .* q39: 129 tokens .* q30: .*; and 19 more; ra"
    ):
        check_all_fit("system x", [f"q{i}" for i in range(40)], counts, LIMIT)
    check_all_fit("system x", ["q"], counts[:1], LIMIT)


def test_the_lowest_limit_counts_and_its_message_says_what_to_change(tiny):
    context = context_limit(tiny.path, {"max_new_tokens": 768})
    assert (context.tokens, context.source) == (32_000, "the model's context of 32,768 less max_new_tokens 768")
    assert context.advice == "lower model.max_pixels or max_new_tokens, or use fewer candidates"
    setting = setting_limit("trainer.max_length", 1000)
    assert setting.advice == "raise trainer.max_length, or lower model.max_pixels, or use fewer candidates"
    assert lowest(None, context, setting) == setting
    assert lowest(setting_limit("x", None)) is None


def test_unusable_images_are_named_before_anything_is_loaded(tmp_path):
    pages = candidates(tmp_path, [(4000, 10)])
    with pytest.raises(InputError, match=r"0\.png has 4000 × 10 pixels, an aspect ratio above 200:1"):
        image_sizes(pages, tmp_path)
    (tmp_path / "0.png").unlink()
    with pytest.raises(InputError, match=r"0\.png: no such page image"):
        image_sizes(pages, tmp_path)
