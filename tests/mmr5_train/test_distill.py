"""Distillation: its losses on paper, and the stage with the shipped model on made-up rankings."""

import json

import pytest
import torch
from made_up import make_evaluation

from mmr5_train import distill
from mmr5_train.config import compose_stage
from mmr5_train.distill import UNSAID, divide, few_pages_first, listwise_loss, targets, verdict_loss
from mmr5_train.models.answering import identifier_ids
from mmr5_train.ranking.answer import read_answer
from mmr5_train.ranking.files import InputError, read_records, write_records
from mmr5_train.ranking.metrics import is_complete
from mmr5_train.ranking.notes import join_notes
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.records import Ranking
from mmr5_train.reranker import Reranker

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
    assert verdict_loss(logits, torch.tensor([0, 1, UNSAID]), first).item() == pytest.approx(both.item())
    assert verdict_loss(logits, torch.tensor([UNSAID] * 3), first).item() == 0


def test_each_prompt_has_the_same_say():
    logits, verdicts = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 0])
    one, other = (torch.nn.functional.cross_entropy(logits[i : i + 1], verdicts[:1]) for i in (1, 2))
    first = torch.nn.functional.cross_entropy(logits[:1], verdicts[:1])
    together = verdict_loss(logits, verdicts, torch.tensor([0, 1, 1]))
    assert together.item() == pytest.approx(((first + (one + other) / 2) / 2).item())


@pytest.fixture
def ranking(rankings):
    """Five pages, of which the third helps."""
    one = read_records(rankings, Ranking)[0]
    notes = [f"a table of {i}, so it {'helps' if i == 3 else 'does not help'}." for i in range(1, 6)]
    completion = render_completion(join_notes(notes), [3, 1, 2, 4, 5])
    return one.model_copy(update={"greedy": read_answer(completion, 5)})


def test_an_answer_holds_for_its_best_page_and_some_others(ranking):
    own, *parts = divide(ranking, 40, seed=1)
    assert (own.places, own.order, own.verdicts) == ((1, 2, 3, 4, 5), (3, 1, 2, 4, 5), (1, 1, 0, 1, 1))
    assert {len(part.places) for part in parts} == {2, 3, 4}
    assert len({part.places for part in parts}) > 10
    for part in parts:
        assert 3 in part.places
        assert list(part.places) == sorted(part.places), "pages that help alike may be in the prompt's order"
        assert [part.places[i - 1] for i in part.order] == [p for p in (3, 1, 2, 4, 5) if p in part.places]
        assert part.verdicts == tuple(int(place != 3) for place in part.places)
    assert parts == list(divide(ranking, 40, seed=1))[1:]
    assert parts != list(divide(ranking, 40, seed=2))[1:]


def test_prompts_with_few_pages_come_first_and_those_with_more_by_and_by(rankings):
    read = read_records(rankings, Ranking)
    parts = [(one, part) for one in read for part in divide(one, 9, seed=1)]
    pages = [len(part.places) for _, part in few_pages_first(parts, seed=1)]
    assert sorted(pages) == sorted(len(part.places) for _, part in parts)
    assert set(pages[:20]) == {2}
    assert set(pages[-10:]) <= {4, 5}
    assert 3 in pages[: pages.index(4)]
    assert 2 in pages[pages.index(3) :]


def test_two_pages_can_t_be_divided(ranking):
    two = read_answer(render_completion("One of them.", [2, 1]), 2)
    few = ranking.model_copy(update={"shown": ranking.shown[:2], "greedy": two})
    [own] = divide(few, 3, seed=1)
    assert own.order == (2, 1)


def test_a_thought_that_is_not_page_by_page_teaches_the_order_alone(ranking):
    completion = "<think>Page 3 has the total. The others don't help.</think><answer>[3, 1, 2, 4, 5]</answer>"
    refined = ranking.model_copy(update={"greedy": read_answer(completion, 5)})
    own, *parts = divide(refined, 4, seed=1)
    assert own.order == (3, 1, 2, 4, 5)
    assert len(parts) == 4
    for part in (own, *parts):
        assert part.verdicts == (UNSAID,) * len(part.places)


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
    from mmr5_train.models.answering import with_list_open
    from mmr5_train.models.inputs import encode, load_pages

    config = compose_stage(distill.DistillStage, "distill", [f"data={rankings}", "parts=1"])
    whole = read_records(rankings, Ranking)[:2]
    parts = few_pages_first([(one, part) for one in whole for part in divide(one, 1, config.seed)], config.seed)
    dataset = taught_dataset(whole, config, processor)
    collator = Collator(processor, lambda rows: {}, config.prompt, config.decay, config.kept)
    begun = collator([dataset[i] for i in range(4)])["begun"]
    pages = [
        load_pages([ranking.shown[place - 1] for place in part.places], rankings.parent, processor)
        for ranking, part in parts
    ]
    asked = with_list_open(
        encode(processor, prompt, [ranking.query for ranking, _ in parts], pages), processor.tokenizer
    )
    for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"):
        assert torch.equal(begun[name], asked[name]), name
    assert processor.tokenizer.decode(begun["input_ids"][0]).endswith("<answer>[")
    assert processor.tokenizer.convert_ids_to_tokens(identifier_ids(processor.tokenizer, 3)) == ["1", "2", "3"]


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
