"""Distillation: losses compared with hand-computed values, and the stage with the tiny model."""

import json
import random

import pytest
import torch
from PIL import Image
from sample_runs import make_evaluation

from mmr5_train import distill
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_records, write_records
from mmr5_train.distill import append_hints, listwise_loss, rank_targets, sample_hint_tokens, verdict_loss
from mmr5_train.evaluation.metrics import is_complete
from mmr5_train.inference.reranker import Reranker
from mmr5_train.models.inputs import append_list_open, encode, page_id_tokens
from mmr5_train.ranking.page_subsets import NO_VERDICT, sample_subsets, sort_pairs_first
from mmr5_train.ranking.records import Ranking

SHORT = ["trainer.logging_steps=1", "trainer.warmup_steps=0", "trainer.learning_rate=1e-3"]


@pytest.fixture(scope="module")
def rankings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    make_evaluation(folder, questions=24, draws=10)
    return folder / "rankings/sft+grpo.jsonl"


def run(data, out, *overrides):
    config = compose_stage(distill.DistillStage, "distill", [f"data={data}", f"out={out}", *SHORT, *overrides])
    distill.main(config)
    return [entry for entry in json.loads((out / "log_history.json").read_text()) if "loss" in entry]


def test_targets_fall_geometrically_with_the_rank():
    assert rank_targets([3, 1, 2], 0.5, 4).tolist() == pytest.approx([2 / 7, 1 / 7, 4 / 7, 0])
    assert rank_targets([1], 0.25, 2).tolist() == [1, 0]


def test_listwise_loss_ignores_padding():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 99.0]])
    targets = torch.stack([rank_targets([1, 3, 2], 0.5, 3), rank_targets([2, 1], 0.5, 3)])
    first = torch.tensor([2.0, 0.0, 1.0]).log_softmax(0) @ torch.tensor([4 / 7, 1 / 7, 2 / 7])
    second = torch.tensor([0.0, 1.0]).log_softmax(0) @ torch.tensor([1 / 3, 2 / 3])
    assert listwise_loss(logits, targets).item() == pytest.approx(-(first + second).item() / 2)
    logits.requires_grad_()
    listwise_loss(logits, targets).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[1, 2] == 0, "there is no third page"


def test_verdict_loss_ignores_pages_without_a_verdict():
    logits, first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 0.0]]), torch.tensor([0, 0, 0])
    both = verdict_loss(logits[:2], torch.tensor([0, 1]), first[:2])
    assert both.item() == pytest.approx(torch.tensor(1 + torch.e**-1).log().item())
    assert verdict_loss(logits, torch.tensor([0, 1, NO_VERDICT]), first).item() == pytest.approx(both.item())
    assert verdict_loss(logits, torch.tensor([NO_VERDICT] * 3), first).item() == 0


def test_verdict_loss_weights_prompts_equally():
    logits, verdicts = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 0])
    second, third = (torch.nn.functional.cross_entropy(logits[i : i + 1], verdicts[:1]) for i in (1, 2))
    first = torch.nn.functional.cross_entropy(logits[:1], verdicts[:1])
    together = verdict_loss(logits, verdicts, torch.tensor([0, 1, 1]))
    assert together.item() == pytest.approx(((first + (second + third) / 2) / 2).item())


def test_the_losses_fall_and_the_checkpoint_scores_pages(rankings, tmp_path, capsys):
    batch_size = "trainer.per_device_train_batch_size=8"
    history = run(rankings, tmp_path / "out", "trainer.max_steps=8", "subsets=0", batch_size)
    for name in ("listwise_loss", "verdict_loss"):
        assert history[-1][name] < 0.8 * history[0][name], name
    complete = [ranking for ranking in read_records(rankings, Ranking) if is_complete(ranking.greedy)]
    printed = capsys.readouterr().out
    assert f"distill: {len(complete)} rankings, 8 steps" in printed
    assert "listwise loss" in printed
    pages = [rankings.parent / page.image for page in complete[0].shown]
    assert Reranker(tmp_path / "out/model", mode="logits").rank(complete[0].query, pages).has_scores
    assert Reranker(tmp_path / "out/model").mode == "reason"


def test_accumulation_does_not_change_a_step(rankings, tmp_path):
    settings = ["trainer.max_steps=2", "completion_share=1"]
    one_batch = run(rankings, tmp_path / "one_batch", *settings, "trainer.per_device_train_batch_size=4")
    split = ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2"]
    micro_batches = run(rankings, tmp_path / "micro_batches", *settings, *split)
    assert [e["loss"] for e in micro_batches] == pytest.approx([e["loss"] for e in one_batch], abs=1e-4)
    assert [e["listwise_loss"] for e in micro_batches] == pytest.approx(
        [e["listwise_loss"] for e in one_batch], abs=1e-4
    )


def test_training_and_inference_score_at_the_same_position(rankings, tiny, prompt, processor):
    """The loss reads page ids after the same tokens and pixels as the mode `logits`."""
    from mmr5_train.distill import Collator, subset_dataset
    from mmr5_train.models.inputs import load_pages

    config = compose_stage(distill.DistillStage, "distill", [f"data={rankings}", "subsets=1", "hint_share=0"])
    first_two = read_records(rankings, Ranking)[:2]
    subsets = sort_pairs_first(
        [(ranking, subset) for ranking in first_two for subset in sample_subsets(ranking, 1, config.seed)],
        config.seed,
    )
    dataset = subset_dataset(first_two, config, processor)
    collator = Collator(processor, lambda rows: {}, config.prompt, config.decay, config.completion_share)
    scoring = collator([dataset[i] for i in range(4)])["scoring"]
    pages = [
        load_pages([ranking.shown[position - 1] for position in subset.positions], rankings.parent, processor)
        for ranking, subset in subsets
    ]
    expected = append_list_open(
        encode(processor, prompt, [ranking.query for ranking, _ in subsets], pages), processor.tokenizer
    )
    for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"):
        assert torch.equal(scoring[name], expected[name]), name
    assert processor.tokenizer.decode(scoring["input_ids"][0]).endswith("<answer>[")
    assert processor.tokenizer.convert_ids_to_tokens(page_id_tokens(processor.tokenizer, 3)) == ["1", "2", "3"]


def test_hints_follow_their_pages_and_verdicts_are_read_at_their_ends(tiny, prompt, processor):
    pages = [[Image.new("RGB", (60, 80), color) for color in row] for row in (["red", "blue"], ["green"])]
    plain = encode(processor, prompt, ["Which page?", "And which of these?"], pages)
    tokenizer = processor.tokenizer
    bar, line = tokenizer(" a red bar chart, so it")["input_ids"], tokenizer(" a table")["input_ids"]
    with_hints = append_hints(dict(plain), [bar, [], line], tokenizer)
    ids, attention_mask, ends = (with_hints[name] for name in ("input_ids", "attention_mask", "page_ends"))
    texts = [tokenizer.decode(row[mask.bool()]) for row, mask in zip(ids, attention_mask, strict=True)]
    assert "<|vision_end|> a red bar chart, so itImage 2:" in texts[0]
    assert texts[0].endswith("<|vision_end|><|im_end|>\n<|im_start|>assistant\n")
    assert "<|vision_end|> a table<|im_end|>" in texts[1]
    texts_up_to_verdicts = [tokenizer.decode(ids[row, : end + 1]) for row, end in ends.nonzero().tolist()]
    assert [text[-4:] for text in texts_up_to_verdicts] == ["o it", "nd|>", "able"]
    for row, mask in enumerate(attention_mask):
        assert (mask.diff() >= 0).all(), "padding is on the left"
        is_plain = with_hints["mm_token_type_ids"][row][mask.bool()].bool()
        assert torch.equal(
            ids[row][mask.bool()][is_plain], plain["input_ids"][row][plain["mm_token_type_ids"][row].bool()]
        )
    assert with_hints["pixel_values"] is plain["pixel_values"]


def test_empty_hints_do_not_change_prompts(tiny, prompt, processor):
    plain = encode(processor, prompt, ["Which page?"], [[Image.new("RGB", (60, 80))] * 2])
    unchanged = append_hints(plain, [[], []], processor.tokenizer)
    assert torch.equal(unchanged["input_ids"], plain["input_ids"])
    assert (
        processor.tokenizer.convert_ids_to_tokens(unchanged["input_ids"][unchanged["page_ends"]])
        == ["<|vision_end|>"] * 2
    )


def test_later_prompts_have_fewer_hint_tokens(rankings, tiny, processor):
    full_hints = sample_hint_tokens(["a red bar chart, so it", ""], 1, processor.tokenizer, random.Random(0))
    assert processor.tokenizer.decode(full_hints[0]) == " a red bar chart, so it"
    assert full_hints[1] == []
    assert sample_hint_tokens(["a red bar chart, so it"], 0, processor.tokenizer, random.Random(0)) == [[]]
    config = compose_stage(distill.DistillStage, "distill", [f"data={rankings}", "subsets=4", "hint_share=0.5"])
    complete = [ranking for ranking in read_records(rankings, Ranking) if is_complete(ranking.greedy)]
    dataset = distill.subset_dataset(complete, config, processor)
    mean_tokens = [sum(map(len, row["hints"])) / len(row["hints"]) for row in dataset]
    quarters = [sum(mean_tokens[i * len(mean_tokens) // 4 : (i + 1) * len(mean_tokens) // 4]) for i in range(4)]
    assert quarters[0] > 1.5 * quarters[1] > 0
    assert quarters[2] == quarters[3] == 0


def test_unusable_rankings_are_rejected(rankings, tmp_path):
    with pytest.raises(InputError, match=r"none of 24 answers has reasoning"):
        run(rankings.with_name("first_stage.jsonl"), tmp_path / "out")
    ranking = read_records(rankings, Ranking)[0]
    many = ranking.model_copy(
        update={
            "shown": tuple(page.model_copy(update={"page": i}) for i, page in enumerate(ranking.shown * 3)),
            "greedy": ranking.greedy.model_copy(update={"order": tuple(range(1, 16)), "defects": ()}),
        }
    )
    write_records(rankings.with_name("many.jsonl"), [many])
    with pytest.raises(
        InputError, match=r"prompts have up to 15 pages, but only 9 page ids start with distinct tokens"
    ):
        run(rankings.with_name("many.jsonl"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
