"""Completions, processes and batches must make whole groups; the message names what would."""

import pytest

from mmr5_train.common.files import InputError
from mmr5_train.training.finetune import check_batches


def settings(batch, slices, group):
    return {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": slices,
        "num_generations": group,
    }


@pytest.mark.parametrize(("processes", "batch", "slices", "group"), [(4, 1, 2, 4), (1, 8, 4, 8), (64, 1, 1, 8)])
def test_whole_groups_pass(monkeypatch, processes, batch, slices, group):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    check_batches(settings(batch, slices, group))


def test_the_papers_batches_on_one_gpu():
    with pytest.raises(InputError) as raised:
        check_batches(settings(1, 2, 4))
    assert str(raised.value) == (
        "trainer: 1 process × per_device_train_batch_size 1 × gradient_accumulation_steps 2 = 2 completions a "
        "rollout, which are no whole groups of num_generations 4; nearest: trainer.per_device_train_batch_size=2; "
        "trainer.gradient_accumulation_steps=4; trainer.num_generations=2"
    )


def test_nearest_below_and_above(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError) as raised:
        check_batches(settings(5, 1, 4))
    said = str(raised.value)
    assert "3 processes × per_device_train_batch_size 5" in said
    assert "trainer.per_device_train_batch_size=4 or 8" in said
    assert "trainer.gradient_accumulation_steps=4" in said
    assert "trainer.num_generations=3 or 5" in said


def test_what_is_suggested_fits():
    for batch in range(1, 13):
        for group in range(2, 9):
            try:
                check_batches(settings(batch, 1, group))
            except InputError as error:
                ways = str(error).partition("nearest: ")[2].split("; ")
                assert ways
                for way in ways:
                    name, _, values = way.removeprefix("trainer.").partition("=")
                    for value in values.split(" or "):
                        check_batches(settings(batch, 1, group) | {name: int(value)})
            else:
                assert batch % group == 0


def test_a_rollouts_own_slices_count():
    check_batches({"per_device_train_batch_size": 2, "steps_per_generation": 2, "num_generations": 4})
    with pytest.raises(InputError, match="steps_per_generation 3 = 6 completions"):
        check_batches({"per_device_train_batch_size": 2, "steps_per_generation": 3, "num_generations": 4})
    check_batches({"per_device_train_batch_size": "two", "num_generations": 4})  # refused elsewhere
