"""Distillation: losses compared with hand-computed values, and the stage with the tiny model."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from sample_runs import make_evaluation

from mmr5_train import distill
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_manifest, read_records, write_records
from mmr5_train.distill import sample_hint_tokens
from mmr5_train.evaluation.metrics import is_complete
from mmr5_train.inference.reranker import Reranker
from mmr5_train.models.inputs import encode
from mmr5_train.models.loading import load_model
from mmr5_train.models.page_features import encode_prompts
from mmr5_train.models.page_scores import first_page_log_probs, id_branches
from mmr5_train.models.shared_prefix import share_prefixes
from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.page_subsets import NO_VERDICT, sample_subsets, sort_pairs_first
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.records import Ranking, Skipped
from mmr5_train.training.distillation import (
    Collator,
    DistillTrainer,
    append_hints,
    rank_loss,
    rank_matrix,
    rows_with_completion,
    verdict_loss,
    verdict_tokens,
)

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


def arguments(batch_size=16, processes=1):
    """The fields of TRL's config that the data set depends on."""
    return SimpleNamespace(train_batch_size=batch_size, world_size=processes)


def log_probs(rows):
    """Log-probabilities of page ids with a gradient, padded with −inf."""
    values = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=-torch.inf
    )
    return values.requires_grad_()


def test_ranks_are_those_of_the_order():
    assert rank_matrix([[3, 1, 2], [2, 1]]).tolist() == [[1, 2, 0], [1, 0, -1]]


def test_listwise_loss_is_over_the_ids_of_the_prompt_and_makes_an_id_come_next():
    values = log_probs([[-1.0, -3.0, -2.0], [-2.0, -1.5]])
    ranks = rank_matrix([[1, 3, 2], [2, 1]])
    first = values[0].detach().log_softmax(0) @ torch.tensor([4 / 7, 1 / 7, 2 / 7])
    second = values[1, :2].detach().log_softmax(0) @ torch.tensor([1 / 3, 2 / 3])
    ids_come_next = values.detach().logsumexp(1).sum()
    loss = rank_loss(values, ranks, "listwise", 0.5)
    assert loss.item() == pytest.approx(-(first + second + ids_come_next).item() / 2)
    loss.backward()
    assert values.grad[1, 2] == 0, "an id that the prompt does not have"
    assert values.grad.isfinite().all()


def test_ranknet_is_the_mean_of_the_logistic_losses_of_pairs():
    values = log_probs([[-1.0, -3.0, -2.0], [-2.0, -1.5]])
    pairs = [[-1.0 - -2.0, -1.0 - -3.0, -2.0 - -3.0], [-1.5 - -2.0]]  # better minus worse
    expected = [sum(math.log1p(math.exp(-d)) for d in row) / len(row) for row in pairs]
    loss = rank_loss(values, rank_matrix([[1, 3, 2], [2, 1]]), "ranknet", 0.5)
    assert loss.item() == pytest.approx((sum(expected) - values.detach().logsumexp(1).sum().item()) / 2, rel=1e-6)
    loss.backward()
    assert values.grad.isfinite().all()


def test_listmle_is_the_probability_of_the_order_place_by_place():
    values = log_probs([[-1.0, -3.0, -2.0], [-2.0, -1.5]])
    e = [math.exp(v) for v in (-1.0, -3.0, -2.0)]
    first = -(math.log(e[0] / sum(e)) + math.log(e[2] / (e[2] + e[1]))) / 3
    second = -math.log(math.exp(-1.5) / (math.exp(-1.5) + math.exp(-2.0))) / 2
    loss = rank_loss(values, rank_matrix([[1, 3, 2], [2, 1]]), "listmle", 0.5)
    assert loss.item() == pytest.approx((first + second - values.detach().logsumexp(1).sum().item()) / 2, rel=1e-6)
    loss.backward()
    assert values.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["listwise", "ranknet", "listmle"])
def test_each_loss_is_least_for_scores_in_the_order_and_bears_100_pages(kind):
    order = list(range(100, 0, -1))
    good = torch.linspace(-9.0, -1.0, 100)[None]
    ranks = rank_matrix([order])
    assert rank_loss(good, ranks, kind, 0.25) < rank_loss(good.flip(1), ranks, kind, 0.25)
    values = log_probs([good[0].tolist()])
    rank_loss(values, ranks, kind, 0.25).backward()
    assert values.grad.isfinite().all()
    assert values.grad.abs().sum() > 0


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


@pytest.mark.parametrize("share", [0.25, 0.3, 1, 0.01])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_the_share_of_completions_holds_and_all_processes_train_equally_many(share, batch_size, processes):
    rows = 600 * batch_size * processes
    flags = rows_with_completion(rows, share, batch_size, processes)
    assert sum(flags) == pytest.approx(share * rows, abs=batch_size * processes)
    batches = [flags[i : i + batch_size] for i in range(0, rows, batch_size)]
    counts = [[sum(batch) for batch in batches[i : i + processes]] for i in range(0, len(batches), processes)]
    assert all(len(set(micro_batch)) == 1 for micro_batch in counts)
    windows = [sum(count[0] for count in counts[i : i + 20]) for i in range(0, len(counts) - 20, 20)]
    assert max(windows) - min(windows) <= 1, "completions are spread evenly"


def test_processes_get_equally_many_rows(rankings, prompt, processor):
    config = compose_stage(distill.DistillStage, "distill", [f"data={rankings}", "subsets=1"])
    three = [ranking for ranking in read_records(rankings, Ranking) if is_complete(ranking.greedy)][:3]
    one, two = (
        distill.subset_dataset(three, config, prompt, processor, arguments(batch_size=1, processes=n))[:]
        for n in (1, 4)
    )
    assert len(one["query"]) == 6
    assert two["query"] == one["query"] + one["query"][:2]
    assert two["trains_completion"] == [False] * 8, "a quarter of the micro-batches: the fourth, eighth, …"


def test_batch_size_1_trains_the_share_of_completions_with_the_loss_of_larger_batches(
    rankings, tmp_path, monkeypatch
):
    batches = []
    collate = Collator.__call__
    monkeypatch.setattr(
        Collator,
        "__call__",
        lambda self, rows: batches.append(sum(r["trains_completion"] for r in rows)) or collate(self, rows),
    )
    settings = ["trainer.max_steps=2", "completion_share=0.25", "trainer.learning_rate=0"]
    one, eight = (
        run(
            rankings,
            tmp_path / str(size),
            *settings,
            f"trainer.per_device_train_batch_size={size}",
            f"trainer.gradient_accumulation_steps={8 // size}",
        )
        for size in (1, 8)
    )
    assert batches[:16] == [0, 0, 0, 1] * 4
    for name in ("listwise_loss", "verdict_loss"):
        assert [e[name] for e in one] == pytest.approx([e[name] for e in eight], abs=1e-4)
    weighted = [e["loss"] - 0.4 * e["listwise_loss"] - 0.8 * e["verdict_loss"] for e in (*one, *eight)]
    # The completions of the steps differ, so their losses do. A wrong weight would change them by a factor of 4.
    ratios = [value / weighted[0] for value in weighted]
    assert all(0.5 < ratio < 2 for ratio in ratios), f"the completion loss has weight 1 in each step: {weighted}"


def test_training_and_inference_score_at_the_same_position(rankings, tiny, prompt, processor):
    """The loss reads page ids after the same tokens and pixels as the mode `logits`."""
    from mmr5_train.models.inputs import load_pages

    config = compose_stage(distill.DistillStage, "distill", [f"data={rankings}", "subsets=1", "hint_share=0"])
    first_two = read_records(rankings, Ranking)[:2]
    subsets = sort_pairs_first(
        [(ranking, subset) for ranking in first_two for subset in sample_subsets(ranking, 1, config.seed)],
        config.seed,
    )
    dataset = distill.subset_dataset(first_two, config, prompt, processor, arguments())
    collator = Collator(processor, lambda rows: {}, prompt)
    scoring = collator([dataset[i] for i in range(4)])["scoring"]
    pages = [
        load_pages([ranking.shown[position - 1] for position in subset.positions], rankings.parent, processor)
        for ranking, subset in subsets
    ]
    expected = encode(processor, prompt, [ranking.query for ranking, _ in subsets], pages)
    for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"):
        assert torch.equal(scoring[name], expected[name]), name
    assert scoring["ranks"].tolist() == rank_matrix([subset.order for _, subset in subsets]).tolist()


@pytest.mark.parametrize("size", [1, 4])
def test_training_trains_the_log_probabilities_that_inference_scores_by(rankings, tiny, prompt, processor, size):
    """The stage's own loss equals the loss of the scores that mode logits computes for the same prompts."""
    config = compose_stage(distill.DistillStage, "distill", [f"data={rankings}", "subsets=1", "hint_share=0"])
    first_two = read_records(rankings, Ranking)[:2]
    dataset = distill.subset_dataset(first_two, config, prompt, processor, arguments())
    scoring = Collator(processor, lambda rows: {}, prompt)([dataset[i] for i in range(size)])["scoring"]
    model = load_model(tiny).eval()
    trainer = object.__new__(DistillTrainer)
    logged = {}
    vars(trainer).update(
        tokenizer=processor.tokenizer, verdict_tokens=torch.tensor(verdict_tokens(processor.tokenizer)),
        base=model,
        rank_loss="listwise", decay=0.25, verdict_weight=1.0, _tower_is_frozen=True,
        _log_mean=lambda name, value: logged.update({name: value.item()}),
    )  # fmt: skip
    expected = []
    for i in range(size):
        row = dataset[i]
        images = [row["images"][position - 1] for position in row["positions"]]
        prompts = encode_prompts(model, processor, prompt, [row["query"]], [images])
        with torch.no_grad():
            [values] = first_page_log_probs(model, prompts, [id_branches(processor.tokenizer, len(images))])
        expected.append(rank_loss(values[None], rank_matrix([row["order"]]), "listwise", 0.25).item())
    share_prefixes(model)
    with torch.no_grad():
        listwise, verdict = trainer._scoring_losses(model, scoring)
    assert listwise.item() == pytest.approx(sum(expected) / size, abs=1e-4)
    assert logged == {"listwise_loss": listwise.item(), "verdict_loss": verdict.item()}
    # The verdicts are read where a plain pass over the prompts has the ends of pages.
    plain = {name: v for name, v in scoring.items() if name not in ("ranks", "verdicts", "page_ends")}
    with torch.no_grad():
        logits = model(**plain).logits[scoring["page_ends"]][:, trainer.verdict_tokens]
    expected_verdict = verdict_loss(logits, scoring["verdicts"], scoring["page_ends"].nonzero()[:, 0])
    assert verdict.item() == pytest.approx(expected_verdict.item(), abs=1e-4)


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


def test_later_prompts_have_fewer_hint_tokens(rankings, prompt, processor):
    full_hints = sample_hint_tokens(["a red bar chart, so it", ""], 1, processor.tokenizer, random.Random(0))
    assert processor.tokenizer.decode(full_hints[0]) == " a red bar chart, so it"
    assert full_hints[1] == []
    assert sample_hint_tokens(["a red bar chart, so it"], 0, processor.tokenizer, random.Random(0)) == [[]]
    config = compose_stage(distill.DistillStage, "distill", [f"data={rankings}", "subsets=4", "hint_share=0.5"])
    complete = [ranking for ranking in read_records(rankings, Ranking) if is_complete(ranking.greedy)]
    dataset = distill.subset_dataset(complete, config, prompt, processor, arguments())
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
            "shown": tuple(page.model_copy(update={"page": i}) for i, page in enumerate(ranking.shown * 21)),
            "greedy": ranking.greedy.model_copy(update={"order": tuple(range(1, 106)), "defects": ()}),
        }
    )
    write_records(rankings.with_name("many.jsonl"), [many])
    with pytest.raises(InputError, match=r"many.jsonl: prompts have up to 105 pages, .* scores at most 100"):
        run(rankings.with_name("many.jsonl"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gold_first_moves_only_the_relevant_pages(rankings):
    ranking = read_records(rankings, Ranking)[0]
    order = tuple(reversed(ranking.greedy.order))
    ranking = ranking.model_copy(update={"greedy": ranking.greedy.model_copy(update={"order": order})})
    gold = [i for i in order if ranking.shown[i - 1].id in ranking.positives]
    assert 0 < len(gold) < len(order)
    assert distill.gold_first(ranking).greedy.order == (*gold, *(i for i in order if i not in gold))


def test_a_random_order_of_the_prompts_is_refused(rankings, tmp_path):
    with pytest.raises(InputError, match=r"expected train_sampling_strategy=sequential .* found random"):
        run(rankings, tmp_path / "out", "trainer.train_sampling_strategy=random")


def test_rankings_whose_hints_or_completions_are_too_long_are_left_out(rankings, tmp_path):
    complete = [ranking for ranking in read_records(rankings, Ranking) if is_complete(ranking.greedy)][:4]
    long = complete[1].greedy.completion.replace("</think>", "water " * 900 + "</think>")
    greedy = complete[1].greedy.model_copy(update={"completion": long})
    complete[1] = complete[1].model_copy(update={"greedy": greedy})
    path = rankings.with_name("one_long.jsonl")
    write_records(path, complete)
    with pytest.raises(InputError, match=rf"1 of 4 examples .* {complete[1].query_id}: "):
        run(path, tmp_path / "out", "trainer.max_length=600")
    run(path, tmp_path / "out", "trainer.max_length=600", "max_too_long=0.3", "trainer.max_steps=1", "subsets=0")
    assert [skipped.query_id for skipped in read_records(tmp_path / "out/skipped.jsonl", Skipped)] == [
        complete[1].query_id
    ]


@pytest.mark.parametrize("refined", [False, True])
def test_the_stand_in_distils_at_batch_size_1(refined, rankings, standin, tmp_path, capsys):
    """Refined reasoning has no verdicts: without hints and the verdict loss, the order is still trained."""
    complete = [ranking for ranking in read_records(rankings, Ranking) if is_complete(ranking.greedy)][:4]
    if refined:
        for i, ranking in enumerate(complete):
            think = "Image 2 shows the table that the question asks for. The other images differ."
            greedy = to_model_answer(render_completion(think, ranking.greedy.order), len(ranking.shown))
            complete[i] = ranking.model_copy(update={"greedy": greedy})
    path = rankings.with_name("standin.jsonl")
    write_records(path, complete)
    model = ["model=qwen2_5_vl_7b", f"model.path={standin}", "model.dtype=float32", "model.max_pixels=9500"]
    batch = ["trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=8"]
    history = run(path, tmp_path / "out", *model, *batch, "trainer.save_strategy=no")
    assert len(history) == 2, "4 rankings × 4 prompts, 8 in a step"
    assert all(entry["listwise_loss"] > 0 for entry in history)
    assert all(("verdict_loss" in entry) is not refined for entry in history)
    counts = read_manifest(tmp_path / "out")["counts"]
    assert (counts["pages"], counts["pages_with_verdict"]) == (20, 0 if refined else 20)
    assert ("the reasoning states no verdict on any page" in capsys.readouterr().out) is refined
