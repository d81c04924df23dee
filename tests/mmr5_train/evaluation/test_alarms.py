"""Each kind of collapse raises its alarm, and a run that learns raises none."""

import random

import pytest

from mmr5_train.common.files import InputError
from mmr5_train.evaluation.alarms import BLOCK, CHECKS, raised_alarms, read_alarms

STEPS = 100


def history(steps=STEPS, noise=0.05, seed=0, **ends):
    """A log in which each value changes linearly from start to end, with Gaussian noise."""
    rng = random.Random(seed)
    start_and_end = {
        "answers/reranking": (0.5, 0.6),
        "answers/complete": (0.9, 0.97),
        "defects/duplicates": (0.04, 0.02),
        "completions/mean_length": (80, 82),
        "completions/clipped_ratio": (0.01, 0.01),
        "answers/true_verdicts": (0.95, 0.96),
        "answers/follow_verdicts": (0.9, 0.97),
        "frac_reward_zero_std": (0.2, 0.5),
        **{f"first/{i}": (0.2, 0.2) for i in range(1, 6)},
        **{key.replace("__", "/"): value for key, value in ends.items()},
    }
    return [
        {"step": step}
        | {
            key: a + (b - a) * step / steps + rng.gauss(0, noise * max(a, b, 0.05))
            for key, (a, b) in start_and_end.items()
        }
        for step in range(1, steps + 1)
    ]


def names(entries):
    return [alarm.name for alarm in raised_alarms(entries, entries[-1]["step"])]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_learning_run_raises_no_alarm(seed, noise):
    entries = history(seed=seed, noise=noise)
    for end in range(1, STEPS + 1):
        assert names(entries[:end]) == []


@pytest.mark.parametrize(
    ("ends", "name"),
    [
        ({"answers__reranking": (0.6, 0.25)}, "ranking falls"),
        ({"defects__duplicates": (0.02, 0.24)}, "duplicates rise"),
        ({"completions__mean_length": (80, 180)}, "length grows"),
        ({"completions__clipped_ratio": (0.0, 0.5)}, "length grows"),
        ({"answers__true_verdicts": (0.95, 0.7)}, "reasoning degrades"),
        ({"answers__follow_verdicts": (0.95, 0.5)}, "reasoning degrades"),
        ({"first__3": (0.2, 0.95)}, "one position comes first"),
        ({"frac_reward_zero_std": (0.4, 1.1)}, "zero-variance groups"),
    ],
)
def test_collapse_raises_its_alarm(ends, name):
    entries = history(**ends)
    assert names(entries) == [name]
    [alarm] = raised_alarms(entries, STEPS)
    assert CHECKS[name][1] in str(alarm)
    assert f"step {STEPS}: {name}: " in str(alarm)


def test_fall_is_measured_from_the_highest_block():
    up, down = history(60, answers__reranking=(0.3, 0.7)), history(60, answers__reranking=(0.7, 0.3), seed=1)
    assert names(up) == []
    assert names(up + down) == ["ranking falls"]


def test_ranking_alarm_names_a_simultaneous_format_rise():
    [alarm] = raised_alarms(history(answers__reranking=(0.6, 0.2), answers__complete=(0.5, 0.99)), STEPS)
    assert ", while answers/complete 0." in alarm.seen


def test_no_alarm_before_two_full_blocks():
    entries = history(2 * BLOCK - 1, answers__reranking=(0.6, 0.0))
    assert names(entries) == []


def test_held_out_threshold_depends_on_the_number_of_questions():
    def evaluations(*values, questions):
        return [
            {"step": i, "heldout/recall@1": value, "heldout/questions": questions}
            for i, value in enumerate(values)
        ]

    assert names(evaluations(0.6, 0.64, 0.6, questions=200)) == []
    assert names(evaluations(0.6, 0.64, 0.6, 0.56, questions=200)) == ["held-out ranking falls"]
    assert names(evaluations(0.6, 0.64, 0.56, questions=50)) == []
    assert names(evaluations(0.6, 0.64, 0.58, questions=1000)) == ["held-out ranking falls"]


def test_invalid_alarms_file_is_an_error(tmp_path):
    assert read_alarms(tmp_path) == []
    (tmp_path / "alarms.json").write_text('[{"name": "x"}]')
    with pytest.raises(InputError, match=r"alarms\.json: not a list of alarms"):
        read_alarms(tmp_path)
