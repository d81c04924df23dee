"""A rollout batch must consist of complete groups. The error names the nearest valid settings."""

import pytest

from mmr5_train.common.files import InputError
from mmr5_train.training.arguments import check_group_sizes


def settings(batch, steps, group):
    return {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": steps,
        "num_generations": group,
    }


@pytest.mark.parametrize(("processes", "batch", "steps", "group"), [(4, 1, 2, 4), (1, 8, 4, 8), (64, 1, 1, 8)])
def test_complete_groups_are_valid(monkeypatch, processes, batch, steps, group):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    check_group_sizes(settings(batch, steps, group))


def test_the_settings_of_the_paper_are_rejected_on_one_gpu():
    with pytest.raises(InputError) as raised:
        check_group_sizes(settings(1, 2, 4))
    assert str(raised.value) == (
        "trainer: 1 process × per_device_train_batch_size 1 × gradient_accumulation_steps 2 = 2 completions "
        "per rollout, which is not a multiple of num_generations 4; nearest valid settings: "
        "trainer.per_device_train_batch_size=2; trainer.gradient_accumulation_steps=4; trainer.num_generations=2"
    )


def test_the_error_names_the_nearest_settings_below_and_above(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError) as raised:
        check_group_sizes(settings(5, 1, 4))
    message = str(raised.value)
    assert "3 processes × per_device_train_batch_size 5" in message
    assert "trainer.per_device_train_batch_size=4 or 8" in message
    assert "trainer.gradient_accumulation_steps=4" in message
    assert "trainer.num_generations=3 or 5" in message


def test_suggested_settings_are_valid():
    for batch in range(1, 13):
        for group in range(2, 9):
            try:
                check_group_sizes(settings(batch, 1, group))
            except InputError as error:
                options = str(error).partition("nearest valid settings: ")[2].split("; ")
                assert options
                for option in options:
                    name, _, values = option.removeprefix("trainer.").partition("=")
                    for value in values.split(" or "):
                        check_group_sizes(settings(batch, 1, group) | {name: int(value)})
            else:
                assert batch % group == 0


def test_steps_per_generation_replaces_accumulation():
    check_group_sizes({"per_device_train_batch_size": 2, "steps_per_generation": 2, "num_generations": 4})
    with pytest.raises(InputError, match="steps_per_generation 3 = 6 completions"):
        check_group_sizes({"per_device_train_batch_size": 2, "steps_per_generation": 3, "num_generations": 4})
    check_group_sizes(
        {"per_device_train_batch_size": "two", "num_generations": 4}
    )  # `trainer_arguments` rejects it
