"""Prompts and answers that do not fit a checkpoint's context are listed before it is loaded."""

import pytest

from mmr5_train.common.files import InputError
from mmr5_train.inference.fit import check_prompts_fit
from mmr5_train.inference.options import RankingOptions
from mmr5_train.models.lengths import count_tokens, image_sizes


@pytest.fixture
def check(tasks, page_folder, processor, prompt):
    prompted = [task.in_prompt_order("score") for task in tasks]
    sizes = image_sizes((page for p in prompted for page in p.shown), page_folder)

    def check(**options):
        options = {"mode": "reason", "window": None, **options}
        check_prompts_fit("systems.a", "tiny", processor, prompt, RankingOptions(**options), prompted, sizes)

    counts = count_tokens(processor, prompt, [task.query for task in tasks], [p.shown for p in prompted], sizes)
    check.longest = max(count.prompt for count in counts)
    return check


def test_answers_need_space_after_their_prompts(check):
    check(max_new_tokens=32_768 - check.longest)
    with pytest.raises(InputError, match=r"systems\.a: \d of 4 prompts .* doc/\d: .* or rank in smaller windows"):
        check(max_new_tokens=32_768 - check.longest + 1)


def test_a_question_counts_as_its_largest_window(check):
    check(max_new_tokens=32_768 - check.longest + 10, window=2)
    with pytest.raises(InputError, match="4 of 4 prompts"):
        check(max_new_tokens=32_700, window=2)


def test_mode_logits_writes_no_answer(check):
    check(mode="logits", max_new_tokens=32_768)
