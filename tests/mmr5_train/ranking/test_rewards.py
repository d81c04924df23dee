from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import ValidationError

from mmr5_train.common.files import InputError
from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.rewards import (
    GATE,
    NAMES,
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
def test_reranking_reward_equals_hand_computed_values(ids, positives, expected):
    assert reranking(completion(*ids), 5, positives) == pytest.approx(expected, abs=1e-12)


def test_reranking_reward_needs_only_a_readable_list():
    assert reranking("I think <answer>[1, 2]</answer> is right", 2, [1]) == 1
    for text in ("", "[1, 2]", "<answer>1, 2</answer>", "<answer>[1, two]</answer>", "<answer>[1, 2]"):
        assert reranking(text, 2, [1]) == 0


def test_reranking_reward_rejects_relevant_ids_out_of_range():
    for positives in ([0], [6], [1, 6]):
        with pytest.raises(ValueError, match=r"must be in 1\.\.5"):
            reranking(completion(1, 2, 3, 4, 5), 5, positives)


def test_without_relevant_pages_every_list_earns_the_full_reranking_reward():
    assert reranking(completion(3, 1, 1), 3, []) == 1
    assert reranking("no list", 3, []) == reranking(completion(), 3, []) == 0
    assert gated_reranking(completion(3, 1, 2), 3, []) == 1
    assert gated_reranking(completion(3, 1, 1), 3, []) == GATE


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((3, 1, 2, 4, 5), 1),
        ((1, 1, 1, 1, 1), 1),  # repeated ids have no cost
        ((1, 2, 3, 4), 4 / 5),
        ((1,), 1 / 5),
        ((), 0),
        ((1, 2, 3, 4, 5, 1), 4 / 5),
        ((1, 2, 3, 4, 6), 4 / 5),
        ((1, 2, 3, 4, 5, 6), 4 / 5 * 5 / 6),
        ((0, 6, 7, 8, 9), 0),
        ((1,) * 10, 0),
        ((1,) * 11, -1 / 5),  # negative with more than 2n ids
        ((1,) * 30, -4),
        ((1,) * 10 + (9,) * 10, -2 / 2),
    ],
)
def test_template_reward_equals_hand_computed_values(ids, expected):
    assert template(completion(*ids), 5, [1]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "text", ["", "<answer>[1, 2]</answer>", "<think>t</think><answer>1</answer>", completion(1, 2) + " ok"]
)
def test_template_reward_is_0_for_an_invalid_structure(text):
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
def test_permutation_reward_equals_hand_computed_values(ids, expected):
    assert permutation(completion(*ids), 5, [1]) == pytest.approx(expected, abs=1e-12)
    without_think = "<answer>" + str(list(ids)) + "</answer>"
    assert permutation(without_think, 5, [1]) == pytest.approx(expected / 2, abs=1e-12)
    assert permutation(without_think, 5, [1], expect_think=False) == pytest.approx(expected, abs=1e-12)


def test_fixing_any_defect_raises_the_permutation_reward():
    steps = [(1, 1, 9), (1, 1), (1,), (1, 3), (1, 3, 2), (1, 3, 2, 4), (1, 3, 2, 4, 5)]
    rewards = [permutation(completion(*ids), 5, [1]) for ids in steps]
    assert rewards == sorted(set(rewards))
    assert rewards[-1] == 1


IDS = st.lists(st.integers(-2, 8), max_size=20)
TEXTS = st.one_of(
    IDS.map(lambda ids: completion(*ids)),
    IDS.map(lambda ids: f"<answer>{ids}</answer>"),
    IDS.map(lambda ids: completion(*ids) + " so"),
    st.text("<think>answer/[1,2] "),
)


@given(TEXTS, st.integers(1, 6), st.booleans(), st.data())
def test_rewards_are_within_their_bounds(text, n, expect_think, data):
    positives = data.draw(st.sets(st.integers(1, n), min_size=1))
    answer = parse_answer(text, n, expect_think=expect_think)
    complete = answer.structure_valid and sorted(answer.ids) == list(range(1, n + 1))
    score = {name: reward(text, n, positives, expect_think=expect_think) for name, reward in REWARDS.items()}
    assert 0 <= score["permutation"] <= 1
    assert (score["permutation"] == 1) == complete
    assert 0 <= score["reranking"] <= 1 + 1e-12
    assert score["gated_reranking"] == pytest.approx(score["reranking"] * (1 if complete else 0.3))
    assert score["template"] <= 1


def test_gated_reward_is_full_only_for_a_complete_permutation_with_valid_structure():
    assert gated_reranking(completion(1, 2, 3), 3, [1]) == 1
    assert gated_reranking(completion(1, 1, 1), 3, [1]) == GATE == 0.3
    assert gated_reranking("<answer>[1, 2, 3]</answer>", 3, [1]) == GATE
    assert gated_reranking("<answer>[1, 2, 3]</answer>", 3, [1], expect_think=False) == 1
    assert gated_reranking(completion(3, 2, 1), 3, [1]) == pytest.approx(1 / 27)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_reward_configs_are_valid(path):
    config = RewardConfig.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
    assert config.name == path.stem


def test_invalid_reward_config_is_rejected():
    choices = rf"unknown reward 'recall' \(choices: {', '.join(NAMES)}\)"
    with pytest.raises(ValidationError, match=choices):
        RewardConfig(name="x", weights={"recall": 1})
    for weights in ({}, {"reranking": -1}, {"reranking": float("nan")}, {"reranking": "much"}, {"reranking": 0}):
        with pytest.raises(ValidationError):
            RewardConfig(name="x", weights=weights)


def completion_with_verdicts(verdicts, ids):
    """A completion with one verdict per page: "y" helps, "n" does not help, "?" no verdict, "-" no note.

    "p" and "r" praise and reject the page in free wording.
    """
    notes = {"y": "a table, so it helps.", "n": "a map, so it does not help.", "?": "a map."}
    notes |= {"p": "It is relevant to the question.", "r": "It does not answer the question."}
    lines = [f"Image {i}: {notes[verdict]}" for i, verdict in enumerate(verdicts, 1) if verdict in notes]
    return render_completion("\n".join(lines), ids)


# Hand-computed, n = 4: (share of relevant pages with y + share of other pages with n) / 2; 0 if ids do not follow.
@pytest.mark.parametrize(
    ("verdicts", "ids", "positives", "expected"),
    [
        ("ynnn", (1, 2, 3, 4), {1}, 1),
        ("ynnn", (2, 1, 3, 4), {1}, 0),  # the answer contradicts the verdicts
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
        ("prrr", (1, 2, 3, 4), {1}, 0),  # free wording is no verdict
    ],
)
def test_true_reasoning_equals_hand_computed_values(verdicts, ids, positives, expected):
    assert true_reasoning(completion_with_verdicts(verdicts, ids), 4, positives) == pytest.approx(expected)


def test_true_reasoning_is_0_without_a_think_block():
    assert true_reasoning("<answer>[1, 2]</answer>", 2, [1], expect_think=False) == 0
    assert true_reasoning("Image 1: so it helps.<answer>[1, 2]</answer>", 2, [1]) == 0


def test_reward_for_verdicts_is_refused_for_a_model_without_verdicts():
    reward = RewardConfig(name="mine", weights={"gated_reranking": 1, "true_reasoning": 0.5})
    for verdicts in (True, None):
        reward.check_verdicts(verdicts, "a/model")
    with pytest.raises(
        InputError, match=r"reward=mine: true_reasoning .* but a/model was trained .* refine=false"
    ):
        reward.check_verdicts(False, "a/model")
    RewardConfig(name="logged", weights={"reranking": 1, "true_reasoning": 0}).check_verdicts(False, "a/model")
