"""How the completions of a rank share prompts, for settings of batch, accumulation and group size."""

from itertools import groupby, product

import pytest

from mmr5_train.training.sharing import share


@pytest.mark.parametrize(
    ("settings", "arrangement"),
    [
        ((1, 2, 2, 4), "each prompt is computed once for 2 of its 4 completions, because a rank has 2 completions "
                       "of a rollout batch; 2 micro-batches are computed in one pass"),
        ((8, 4, 4, 8), "each prompt is computed once for its 8 completions"),
        ((1, 8, 8, 4), "each prompt is computed once for its 4 completions; 4 micro-batches are computed in one "
                       "pass"),
        ((1, 2, 4, 4), "each prompt is computed once for its 4 completions in sampling and scoring; an optimizer "
                       "step has 2 of them on a rank; 2 micro-batches are computed in one pass"),
    ],
    ids=["published", "recommended", "groups_by_accumulation", "half_a_group_per_step"],
)  # fmt: skip
def test_the_arrangement_is_stated(settings, arrangement):
    assert str(share(*settings)) == arrangement


def test_a_pass_covers_micro_batches_of_one_step_and_one_rollout_batch_with_the_fewest_prompts():
    for batch, accumulation, steps, group in product((1, 2, 3, 4, 8), (1, 2, 3, 4, 8), (1, 2, 3, 4, 8), (2, 4, 6)):
        sharing = share(batch, accumulation, steps, group)
        assert accumulation % sharing.micro_batches == steps % sharing.micro_batches == 0
        assert sharing.trained == batch * sharing.micro_batches
        # On every rank, rows of the same block belong to the same prompt.
        for rank in range(group):
            first = rank * sharing.rollout
            prompts = [(first + row) // group for row in range(sharing.rollout)]
            blocks = [prompts[i : i + sharing.sampled] for i in range(0, len(prompts), sharing.sampled)]
            assert all(len(set(block)) == 1 and len(block) == sharing.sampled for block in blocks)
            starts = range(0, len(prompts), sharing.trained)
            read = max(len(list(groupby(prompts[i : i + sharing.trained]))) for i in starts)
            assert read <= sharing.prompts
        assert sharing.rollout % sharing.scored == 0
        assert sharing.rollout % sharing.block == 0
        assert bool(sharing.nothing_to_share) == (sharing.sampled == 1)
