from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import ValidationError

from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.rewards import (
    GATE,
    REWARDS,
    RewardConfig,
    gated_reranking,
    permutation,
    reranking,
    template,
    true_reasoning,
)

CONFIGS = Path(__file__).parents[3] / "configs" / "reward"


def completion(*ids):
    return render_completion("Image 1: a table, so it helps.", ids)


# Hand-computed from the formula, n = 5.
@pytest.mark.parametrize(
    ("ids", "positives", "expected"),
    [
        ((1, 2, 3, 4, 5), {1}, 1),
        ((2, 1, 3, 4, 5), {1}, 1 / 8),
        ((5, 4, 3, 2, 1), {1}, 1 / 125),
        ((1, 2, 3, 4, 5), {1, 2}, 1),
        ((2, 1, 3, 4, 5), {1, 2}, 1),
        ((1, 3, 2, 4, 5), {1, 2}, (1 + 1 / 27) / (1 + 1 / 8)),
        ((3, 1, 2, 4, 5), {1, 2}, (1 / 8 + 1 / 27) / (1 + 1 / 8)),
        ((4, 5, 1, 2, 3), {1, 2, 3}, (1 / 27 + 1 / 64 + 1 / 125) / (1 + 1 / 8 + 1 / 27)),
        ((1,), {1}, 1),
        ((1,), {1, 2}, 1 / (1 + 1 / 8)),
        ((3, 4), {1, 2}, 0),
        ((1, 1, 1, 1, 1), {1}, 1),
        ((1, 1, 1, 2), {1, 2}, (1 + 1 / 64) / (1 + 1 / 8)),
        ((9, 0, 1), {1}, 1 / 27),
        ((), {1}, 0),
        ((1, 2, 3, 4, 5), {1, 2, 3, 4, 5}, 1),
    ],
)
def test_reranking_reward(ids, positives, expected):
    assert reranking(completion(*ids), 5, positives) == pytest.approx(expected, abs=1e-12)


def test_reranking_reward_asks_for_a_readable_list_and_for_nothing_else():
    assert reranking("I think <answer>[1, 2]</answer> is right", 2, [1]) == 1
    for text in ("", "[1, 2]", "<answer>1, 2</answer>", "<answer>[1, two]</answer>", "<answer>[1, 2]"):
        assert reranking(text, 2, [1]) == 0


def test_reranking_reward_takes_relevant_pages_of_the_prompt_only():
    for positives in ([0], [6], [1, 6]):
        with pytest.raises(ValueError, match=r"among 1\.\.5"):
            reranking(completion(1, 2, 3, 4, 5), 5, positives)


def test_without_a_relevant_page_every_list_ranks_as_well():
    assert reranking(completion(3, 1, 1), 3, []) == 1
    assert reranking("no list", 3, []) == reranking(completion(), 3, []) == 0
    assert gated_reranking(completion(3, 1, 2), 3, []) == 1
    assert gated_reranking(completion(3, 1, 1), 3, []) == GATE


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((3, 1, 2, 4, 5), 1),
        ((1, 1, 1, 1, 1), 1),  # duplicates cost nothing
        ((1, 2, 3, 4), 4 / 5),
        ((1,), 1 / 5),
        ((), 0),
        ((1, 2, 3, 4, 5, 1), 4 / 5),
        ((1, 2, 3, 4, 6), 4 / 5),
        ((1, 2, 3, 4, 5, 6), 4 / 5 * 5 / 6),
        ((0, 6, 7, 8, 9), 0),
        ((1,) * 10, 0),
        ((1,) * 11, -1 / 5),  # below 0 past 2n ids
        ((1,) * 30, -4),
        ((1,) * 10 + (9,) * 10, -2 / 2),
    ],
)
def test_template_reward(ids, expected):
    assert template(completion(*ids), 5, [1]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "text", ["", "<answer>[1, 2]</answer>", "<think>t</think><answer>1</answer>", completion(1, 2) + " ok"]
)
def test_template_reward_is_0_for_another_structure(text):
    assert template(text, 2, [1]) == 0


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((3, 1, 2, 4, 5), 1),
        ((1, 2, 3, 4), 4 / 5),
        ((1, 2, 3, 4, 5, 5), 5 / 6),
        ((1, 2, 3, 4, 4), 4 / 6),
        ((1, 2, 3, 4, 9), 4 / 6),
        ((1, 1, 1, 1, 1), 1 / 9),
        ((0, 7), 0),
        ((), 0),
    ],
)
def test_permutation_reward(ids, expected):
    assert permutation(completion(*ids), 5, [1]) == pytest.approx(expected, abs=1e-12)
    half = "<answer>" + str(list(ids)) + "</answer>"
    assert permutation(half, 5, [1]) == pytest.approx(expected / 2, abs=1e-12)
    assert permutation(half, 5, [1], expect_think=False) == pytest.approx(expected, abs=1e-12)


def test_every_mended_defect_earns_more():
    steps = [(1, 1, 9), (1, 1), (1,), (1, 3), (1, 3, 2), (1, 3, 2, 4), (1, 3, 2, 4, 5)]
    earned = [permutation(completion(*ids), 5, [1]) for ids in steps]
    assert earned == sorted(set(earned))
    assert earned[-1] == 1


IDS = st.lists(st.integers(-2, 8), max_size=20)
TEXTS = st.one_of(
    IDS.map(lambda ids: completion(*ids)),
    IDS.map(lambda ids: f"<answer>{ids}</answer>"),
    IDS.map(lambda ids: completion(*ids) + " so"),
    st.text("<think>answer/[1,2] "),
)


@given(TEXTS, st.integers(1, 6), st.booleans(), st.data())
def test_bounds(text, n, expect_think, data):
    positives = data.draw(st.sets(st.integers(1, n), min_size=1))
    answer = parse_answer(text, n, expect_think=expect_think)
    complete = answer.structure_valid and sorted(answer.ids) == list(range(1, n + 1))
    score = {name: reward(text, n, positives, expect_think=expect_think) for name, reward in REWARDS.items()}
    assert 0 <= score["permutation"] <= 1
    assert (score["permutation"] == 1) == complete
    assert 0 <= score["reranking"] <= 1 + 1e-12
    assert score["gated_reranking"] == pytest.approx(score["reranking"] * (1 if complete else 0.3))
    assert score["template"] <= 1


def test_the_gate_opens_only_for_a_complete_permutation_in_the_right_form():
    assert gated_reranking(completion(1, 2, 3), 3, [1]) == 1
    assert gated_reranking(completion(1, 1, 1), 3, [1]) == GATE == 0.3
    assert gated_reranking("<answer>[1, 2, 3]</answer>", 3, [1]) == GATE
    assert gated_reranking("<answer>[1, 2, 3]</answer>", 3, [1], expect_think=False) == 1
    assert gated_reranking(completion(3, 2, 1), 3, [1]) == pytest.approx(1 / 27)


@pytest.mark.parametrize("name", ["permutation", "mm_r5", "gated"])
def test_shipped_configs(name):
    config = RewardConfig.model_validate(OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml")))
    assert config.name == name
    assert set(config.weights) <= set(REWARDS)


def test_a_wrong_reward_config_says_what_there_is():
    choices = rf"no reward is called 'recall' \(choices: {', '.join(REWARDS)}\)"
    with pytest.raises(ValidationError, match=choices):
        RewardConfig(name="x", weights={"recall": 1})
    for weights in ({}, {"reranking": -1}, {"reranking": float("nan")}, {"reranking": "much"}, {"reranking": 0}):
        with pytest.raises(ValidationError):
            RewardConfig(name="x", weights=weights)


def reasoned(says, ids):
    """A completion whose notes say of each page whether it helps ("?": no verdict, "": no note)."""
    words = {"y": "a table, so it helps.", "n": "a map, so it does not help.", "?": "a map."}
    notes = "\n".join(f"Image {i}: {words[say]}" for i, say in enumerate(says, 1) if say in words)
    return render_completion(notes, ids)


# Hand-computed, n = 4: (share of relevant pages said to help + share of others said not to) / 2, if followed.
@pytest.mark.parametrize(
    ("says", "ids", "positives", "expected"),
    [
        ("ynnn", (1, 2, 3, 4), {1}, 1),
        ("ynnn", (2, 1, 3, 4), {1}, 0),  # the answer does not follow
        ("nynn", (2, 1, 3, 4), {1}, (0 + 2 / 3) / 2),
        ("yynn", (1, 2, 3, 4), {1, 2}, 1),
        ("yynn", (2, 1, 4, 3), {1, 2}, 1),
        ("yynn", (1, 3, 2, 4), {1, 2}, 0),
        ("yynn", (1, 2, 3, 4), {1}, (1 + 2 / 3) / 2),
        ("yn?n", (1, 2, 3, 4), {1}, (1 + 2 / 3) / 2),
        ("yn-n", (1, 2, 3, 4), {1}, (1 + 2 / 3) / 2),
        ("nnnn", (1, 2, 3, 4), {1}, 1 / 2),
        ("yyyy", (4, 3, 2, 1), {1}, 1 / 2),
        ("----", (1, 2, 3, 4), {1}, 0),
        ("nnnn", (1, 2, 3, 4), set(), 1),
        ("yyyy", (1, 2, 3, 4), {1, 2, 3, 4}, 1),
        ("ynnn", (), {1}, 0),
    ],
)
def test_true_reasoning(says, ids, positives, expected):
    assert true_reasoning(reasoned(says, ids), 4, positives) == pytest.approx(expected)


def test_true_reasoning_needs_reasoning():
    assert true_reasoning("<answer>[1, 2]</answer>", 2, [1], expect_think=False) == 0
    assert true_reasoning("Image 1: so it helps.<answer>[1, 2]</answer>", 2, [1]) == 0
