"""Distillation: its losses on paper, and the stage with the shipped model on made-up rankings."""

import json
import random

import pytest
import torch
from made_up import make_evaluation
from PIL import Image

from mmr5_train import distill
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_records, write_records
from mmr5_train.distill import listwise_loss, targets, thinned, verdict_loss, with_hints
from mmr5_train.evaluation.metrics import is_complete
from mmr5_train.inference.local import identifier_ids
from mmr5_train.inference.reranker import Reranker
from mmr5_train.models.inputs import encode
from mmr5_train.ranking.parts import NO_VERDICT, sample_subsets, sort_pairs_first
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
    assert targets([3, 1, 2], 0.5, 4).tolist() == pytest.approx([2 / 7, 1 / 7, 4 / 7, 0])
    assert targets([1], 0.25, 2).tolist() == [1, 0]


def test_the_listwise_loss_is_the_cross_entropy_among_the_pages_there_are():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 99.0]])
    wanted = torch.stack([targets([1, 3, 2], 0.5, 3), targets([2, 1], 0.5, 3)])
    first = torch.tensor([2.0, 0.0, 1.0]).log_softmax(0) @ torch.tensor([4 / 7, 1 / 7, 2 / 7])
    second = torch.tensor([0.0, 1.0]).log_softmax(0) @ torch.tensor([1 / 3, 2 / 3])
    assert listwise_loss(logits, wanted).item() == pytest.approx(-(first + second).item() / 2)
    logits.requires_grad_()
    listwise_loss(logits, wanted).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[1, 2] == 0, "there is no third page"


def test_verdicts_that_were_not_given_do_not_count():
    logits, first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 0.0]]), torch.tensor([0, 0, 0])
    both = verdict_loss(logits[:2], torch.tensor([0, 1]), first[:2])
    assert both.item() == pytest.approx(torch.tensor(1 + torch.e**-1).log().item())
    assert verdict_loss(logits, torch.tensor([0, 1, NO_VERDICT]), first).item() == pytest.approx(both.item())
    assert verdict_loss(logits, torch.tensor([NO_VERDICT] * 3), first).item() == 0


def test_each_prompt_has_the_same_say():
    logits, verdicts = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 0])
    one, other = (torch.nn.functional.cross_entropy(logits[i : i + 1], verdicts[:1]) for i in (1, 2))
    first = torch.nn.functional.cross_entropy(logits[:1], verdicts[:1])
    together = verdict_loss(logits, verdicts, torch.tensor([0, 1, 1]))
    assert together.item() == pytest.approx(((first + (one + other) / 2) / 2).item())


def test_it_learns_and_leaves_a_checkpoint_that_scores(rankings, tmp_path, capsys):
    size = "trainer.per_device_train_batch_size=8"
    history = run(rankings, tmp_path / "out", "trainer.max_steps=8", "parts=0", size)
    for name in ("listwise_loss", "verdict_loss"):
        assert history[-1][name] < 0.8 * history[0][name], name
    whole = [ranking for ranking in read_records(rankings, Ranking) if is_complete(ranking.greedy)]
    assert f"distill: {len(whole)} rankings, 8 steps, listwise loss" in capsys.readouterr().out
    pages = [rankings.parent / page.image for page in whole[0].shown]
    assert Reranker(tmp_path / "out/model", mode="logits").rank(whole[0].query, pages).has_scores
    assert Reranker(tmp_path / "out/model").mode == "reason"


def test_a_step_is_the_same_however_it_is_split(rankings, tmp_path):
    settings = ["trainer.max_steps=2", "kept=1"]
    whole = run(rankings, tmp_path / "whole", *settings, "trainer.per_device_train_batch_size=4")
    split = ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2"]
    parts = run(rankings, tmp_path / "parts", *settings, *split)
    assert [e["loss"] for e in parts] == pytest.approx([e["loss"] for e in whole], abs=1e-4)
    assert [e["listwise_loss"] for e in parts] == pytest.approx([e["listwise_loss"] for e in whole], abs=1e-4)


def test_the_scores_are_read_where_they_are_taught(rankings, tiny, prompt, processor):
    """The tokens and pixels behind which the loss reads page ids are those that `logits` sends."""
    from mmr5_train.distill import Collator, taught_dataset
    from mmr5_train.inference.local import with_list_open
    from mmr5_train.models.inputs import load_pages

    config = compose_stage(distill.DistillStage, "distill", [f"data={rankings}", "parts=1", "hinted=0"])
    whole = read_records(rankings, Ranking)[:2]
    parts = sort_pairs_first(
        [(one, part) for one in whole for part in sample_subsets(one, 1, config.seed)], config.seed
    )
    dataset = taught_dataset(whole, config, processor)
    collator = Collator(processor, lambda rows: {}, config.prompt, config.decay, config.kept)
    begun = collator([dataset[i] for i in range(4)])["begun"]
    pages = [
        load_pages([ranking.shown[position - 1] for position in part.positions], rankings.parent, processor)
        for ranking, part in parts
    ]
    asked = with_list_open(
        encode(processor, prompt, [ranking.query for ranking, _ in parts], pages), processor.tokenizer
    )
    for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"):
        assert torch.equal(begun[name], asked[name]), name
    assert processor.tokenizer.decode(begun["input_ids"][0]).endswith("<answer>[")
    assert processor.tokenizer.convert_ids_to_tokens(identifier_ids(processor.tokenizer, 3)) == ["1", "2", "3"]


def test_hints_stand_behind_their_pages_and_verdicts_at_their_ends(tiny, prompt, processor):
    pages = [[Image.new("RGB", (60, 80), color) for color in row] for row in (["red", "blue"], ["green"])]
    plain = encode(processor, prompt, ["Which page?", "And which of these?"], pages)
    tokenizer = processor.tokenizer
    bar, line = tokenizer(" a red bar chart, so it")["input_ids"], tokenizer(" a table")["input_ids"]
    hinted = with_hints(dict(plain), [bar, [], line], tokenizer)
    ids, there, ends = (hinted[name] for name in ("input_ids", "attention_mask", "ends"))
    texts = [tokenizer.decode(row[mask.bool()]) for row, mask in zip(ids, there, strict=True)]
    assert "<|vision_end|> a red bar chart, so itImage 2:" in texts[0]
    assert texts[0].endswith("<|vision_end|><|im_end|>\n<|im_start|>assistant\n")
    assert "<|vision_end|> a table<|im_end|>" in texts[1]
    read = [tokenizer.decode(ids[row, : place + 1]) for row, place in ends.nonzero().tolist()]
    assert [text[-4:] for text in read] == ["o it", "nd|>", "able"]
    for row, mask in enumerate(there):
        assert (mask.diff() >= 0).all(), "padding stands on the left"
        without = hinted["mm_token_type_ids"][row][mask.bool()].bool()
        assert torch.equal(
            ids[row][mask.bool()][without], plain["input_ids"][row][plain["mm_token_type_ids"][row].bool()]
        )
    assert hinted["pixel_values"] is plain["pixel_values"]


def test_without_hints_prompts_stay_as_they_are(tiny, prompt, processor):
    plain = encode(processor, prompt, ["Which page?"], [[Image.new("RGB", (60, 80))] * 2])
    same = with_hints(plain, [[], []], processor.tokenizer)
    assert torch.equal(same["input_ids"], plain["input_ids"])
    assert processor.tokenizer.convert_ids_to_tokens(same["input_ids"][same["ends"]]) == ["<|vision_end|>"] * 2


def test_hints_lose_their_tokens_from_prompt_to_prompt(rankings, tiny, processor):
    whole = thinned(["a red bar chart, so it", ""], 1, processor.tokenizer, random.Random(0))
    assert processor.tokenizer.decode(whole[0]) == " a red bar chart, so it"
    assert whole[1] == []
    assert thinned(["a red bar chart, so it"], 0, processor.tokenizer, random.Random(0)) == [[]]
    config = compose_stage(distill.DistillStage, "distill", [f"data={rankings}", "parts=4", "hinted=0.5"])
    read = [one for one in read_records(rankings, Ranking) if is_complete(one.greedy)]
    dataset = distill.taught_dataset(read, config, processor)
    said = [sum(map(len, row["hints"])) / len(row["hints"]) for row in dataset]
    quarters = [sum(said[i * len(said) // 4 : (i + 1) * len(said) // 4]) for i in range(4)]
    assert quarters[0] > 1.5 * quarters[1] > 0
    assert quarters[2] == quarters[3] == 0


def test_what_teaches_nothing_is_an_error(rankings, tmp_path):
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
    with pytest.raises(InputError, match=r"prompts of up to 15 pages, and this tokenizer tells 9 apart"):
        run(rankings.with_name("many.jsonl"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
