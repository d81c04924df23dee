"""The selection of GRPO questions, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import (
    InputError,
    read_manifest,
    read_records,
    write_json,
    write_manifest,
    write_records,
)
from mmr5_train.inference.rollouts import rollout_rewards
from mmr5_train.ranking.prompt import read_prompt
from mmr5_train.ranking.records import Candidate, ModelAnswer, Page, PageId, RankingTask, Rollouts, Trace
from mmr5_train.select import Balanced, SelectStage, balanced_sample, group_edges, group_of, main


def write_data(folder: Path, sides: Sequence[int]) -> None:
    """One question for each side length: its only candidate is a square page with this side."""
    pages, tasks = [], []
    for i, side in enumerate(sides):
        name = f"d{i}.pdf"
        pages.append(Page(doc_name=name, page=0, domain="d", image=f"../i/{i}.jpg", width=side, height=side))
        tasks.append(
            RankingTask(
                query_id=f"{name}/0",
                query="Q?",
                domain="d",
                candidates=(Candidate(doc_name=name, page=0, image=f"../i/{i}.jpg", score=1.0),),
                positives=(PageId(doc_name=name, page=0),),
            )
        )
    folder.mkdir(parents=True)
    write_records(folder / "pages.jsonl", pages)
    write_records(folder / "select.jsonl", tasks)


REWARD = {"name": "reranking", "weights": {"reranking": 1.0}}


def select(folder: Path, name: str = "out", **settings: Any) -> Path:
    out = folder / name
    required = {"questions": folder / "data/select.jsonl", "out": out, "reward": REWARD}
    main(SelectStage.model_validate(required | settings))
    return out


def select_balanced(folder: Path, name: str = "out", *, count: int, groups: int = 10, **settings: Any) -> Path:
    return select(folder, name, balanced={"count": count, "groups": groups}, **settings)


def selected_numbers(out: Path) -> list[int]:
    """Numbers of the selected questions."""
    return [int(task.query_id[1:].split(".")[0]) for task in read_records(out / "questions.jsonl", RankingTask)]


def test_without_selection_settings_all_questions_are_kept_and_image_paths_rebased(tmp_path: Path) -> None:
    write_data(tmp_path / "data", [100, 200, 300])
    out = select(tmp_path, "a/b")
    tasks = read_records(out / "questions.jsonl", RankingTask)
    assert [task.query_id for task in tasks] == ["d0.pdf/0", "d1.pdf/0", "d2.pdf/0"]
    assert tasks[0].candidates[0].image == "../../i/0.jpg"
    assert (out / tasks[0].candidates[0].image).resolve() == (tmp_path / "i/0.jpg").resolve()


def test_groups_are_by_the_size_before_pages_were_shrunk(tmp_path: Path) -> None:
    """All pages are 100 pixels wide in the cache; half of them were 1,000 pixels wide in the corpus."""
    write_data(tmp_path / "data", [100] * 12)
    pages = read_records(tmp_path / "data/pages.jsonl", Page, unique="id")
    original = [page.model_copy(update={"source_width": 1000, "source_height": 1000}) for page in pages[:3]]
    write_records(tmp_path / "data/pages.jsonl", original + pages[3:])
    numbers = selected_numbers(select_balanced(tmp_path, count=4, groups=10))
    assert sum(number < 3 for number in numbers) == 2


def test_balanced_selection_takes_evenly_from_groups(tmp_path: Path) -> None:
    """12 of 100 questions: 5 of the 90 with small pages, 5 of the 8 with medium ones and both with large ones."""
    sides = [100] * 90 + [1000] * 8 + [10000] * 2
    write_data(tmp_path / "data", sides)
    out = select_balanced(tmp_path, count=12, groups=3)
    numbers = selected_numbers(out)
    assert numbers == sorted(numbers)
    assert Counter(sides[i] for i in numbers) == {100: 5, 1000: 5, 10000: 2}
    counts = read_manifest(out)["counts"]
    assert (counts["questions_before"], counts["questions"]) == (100, 12)
    assert [(g["group"], g["before"], g["after"]) for g in counts["groups"]] == [(0, 90, 5), (1, 8, 5), (2, 2, 2)]
    assert counts["groups"][0]["from_pixels"] == 10_000
    assert counts["groups"][2]["to_pixels"] == 100_000_000


def test_balanced_selection_depends_on_the_seed(tmp_path: Path) -> None:
    write_data(tmp_path / "data", [100] * 40 + [500] * 40)
    first = select_balanced(tmp_path, "first", count=10)
    second = select_balanced(tmp_path, "second", count=10)
    assert (first / "questions.jsonl").read_bytes() == (second / "questions.jsonl").read_bytes()
    assert selected_numbers(select_balanced(tmp_path, "other", count=10, seed=7)) != selected_numbers(first)


def test_equal_resolutions_are_one_group(tmp_path: Path) -> None:
    write_data(tmp_path / "data", [100] * 6)
    out = select_balanced(tmp_path, count=4)
    assert read_manifest(out)["counts"]["groups"] == [
        {"group": 0, "from_pixels": 10_000, "to_pixels": 10_000, "before": 6, "after": 4}
    ]


@pytest.mark.parametrize("count", [3, 50])
def test_a_count_above_the_number_of_questions_selects_all(tmp_path: Path, count: int) -> None:
    write_data(tmp_path / "data", [100, 200, 300])
    assert selected_numbers(select_balanced(tmp_path, count=count)) == [0, 1, 2]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 3))
def test_no_group_is_favored(groups: list[int], count: int, seed: int) -> None:
    selected = balanced_sample(groups, count, seed)
    assert len(set(selected)) == len(selected) == min(count, len(groups))
    before, after = Counter(groups), Counter(groups[i] for i in selected)
    for group in before:
        if after[group] < before[group]:
            assert after[group] >= max(after.values()) - 1


@given(st.lists(st.integers(1, 10**8), min_size=1, max_size=20), st.integers(1, 12))
def test_every_resolution_belongs_to_a_group(pixels: list[int], groups: int) -> None:
    edges = group_edges(pixels, groups)
    assert len(edges) == groups + 1
    placed = [group_of(value, edges) for value in sorted(pixels)]
    assert placed == sorted(placed)
    assert placed[0] == 0
    assert placed[-1] == (groups - 1 if len(set(pixels)) > 1 else 0)


def test_missing_and_duplicate_records_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"select.jsonl: no such file"):
        select(tmp_path)
    write_data(tmp_path / "data", [100, 200])
    pages = tmp_path / "data/pages.jsonl"
    first, second = pages.read_text().splitlines()
    pages.write_text(first + "\n")
    with pytest.raises(InputError, match=r"pages.jsonl: lacks page d1.pdf#0, a candidate of d1.pdf/0"):
        select(tmp_path)
    pages.write_text(f"{first}\n{second}\n{first}\n")
    with pytest.raises(InputError, match=r"pages.jsonl, line 3: .*is already in line 1"):
        select(tmp_path)
    pages.unlink()
    with pytest.raises(InputError, match=r"pages.jsonl: no such file"):
        select(tmp_path)
    (tmp_path / "data/select.jsonl").write_text("")
    with pytest.raises(InputError, match=r"select.jsonl: contains no RankingTask record"):
        select(tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_an_input_is_rejected(tmp_path: Path) -> None:
    write_data(tmp_path / "data", [100, 200])
    write_manifest(tmp_path / "data", stage="candidates", config={})
    with pytest.raises(InputError, match="which this stage reads"):
        select(tmp_path, "data", overwrite=True)
    assert (tmp_path / "data/select.jsonl").is_file()


def test_questions_about_documents_seen_by_sft_are_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data", [100, 200, 300])
    tasks = read_records(tmp_path / "data/select.jsonl", RankingTask)
    write_records(tmp_path / "train.jsonl", tasks[:1])
    page = tasks[1].candidates[0].model_copy(update={"doc_name": "d1"})  # some corpora omit ".pdf"
    trace = Trace(
        query_id="?",
        query="Q?",
        domain="d",
        shown=(page,),
        notes=("n",),
        think="n",
        answer=(1,),
        positive_ids=(1,),
    )
    write_records(tmp_path / "traces.jsonl", [trace])
    assert selected_numbers(select(tmp_path, "a", seen=tmp_path / "train.jsonl")) == [1, 2]
    out = select_balanced(tmp_path, "b", seen=tmp_path / "traces.jsonl", count=1)
    counts = read_manifest(out)["counts"]
    assert counts["dropped"] == {"document seen by SFT": 1, "not drawn": 1}
    assert sum(group["before"] for group in counts["groups"]) == 3
    assert sum(group["after"] for group in counts["groups"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"select: 1 of 3 questions (document seen by SFT: 1; not drawn: 1); in {out}"
    assert "10,000 to 12,457       1       0" in " ".join(printed)
    assert str(tmp_path / "traces.jsonl") in read_manifest(out)["inputs"]
    with pytest.raises(InputError, match=r"no question is left \(document seen by SFT: 3\); give questions about"):
        select(tmp_path, "c", seen=tmp_path / "data/select.jsonl")
    assert not (tmp_path / "c").exists()


def write_rollouts(folder: Path, answers: Sequence[Sequence[str]]) -> Path:
    """Rollouts for the questions of `write_data`, with these answers."""
    tasks = read_records(folder / "data/select.jsonl", RankingTask)
    write_records(
        folder / "rollouts.jsonl",
        [
            Rollouts(
                query_id=task.query_id,
                shown=tuple(page.id for page in task.candidates),
                think=True,
                samples=[
                    ModelAnswer(completion=f"<think>t</think><answer>{text}</answer>", order=(1,)) for text in row
                ],
            )
            for task, row in zip(tasks, answers, strict=True)
        ],
    )
    return folder / "rollouts.jsonl"


def test_too_hard_and_too_easy_questions_are_removed(tmp_path: Path) -> None:
    """Mean rewards 0 and 1 (all answers equal), ¼, ½ and ¾."""
    correct, incorrect = "[1]", "[]"
    answers = [[incorrect] * 4, [correct] * 4, *([correct] * k + [incorrect] * (4 - k) for k in (1, 2, 3))]
    write_data(tmp_path / "data", [100] * 5)
    rollouts = write_rollouts(tmp_path, answers)
    out = select(tmp_path, "any", difficulty={"rollouts": rollouts})
    assert selected_numbers(out) == [2, 3, 4]
    counts = read_manifest(out)["counts"]
    assert counts["dropped"] == {"all answers earn the same": 2}
    assert counts["difficulty"] == [
        {"group": 0, "from_reward": 0.0, "to_reward": 0.1, "before": 1, "after": 0},
        {"group": 2, "from_reward": 0.2, "to_reward": 0.3, "before": 1, "after": 1},
        {"group": 4, "from_reward": 0.4, "to_reward": 0.5, "before": 1, "after": 1},
        {"group": 7, "from_reward": 0.7, "to_reward": 0.8, "before": 1, "after": 1},
        {"group": 9, "from_reward": 0.9, "to_reward": 1.0, "before": 1, "after": 0},
    ]
    bounded = select(
        tmp_path, "some", difficulty={"rollouts": rollouts, "min_reward": 0.3, "max_reward": 0.5}, overwrite=True
    )
    assert selected_numbers(bounded) == [3]
    dropped = read_manifest(bounded)["counts"]["dropped"]
    assert dropped == {"all answers earn the same": 2, "mean reward below 0.3": 1, "mean reward above 0.5": 1}
    before = (bounded / "questions.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"no question is left .*run again with other bounds"):
        select(tmp_path, "some", difficulty={"rollouts": rollouts, "max_reward": 0.2}, overwrite=True)
    assert (bounded / "questions.jsonl").read_bytes() == before


def test_rollout_rewards_are_weighted_means(tmp_path: Path) -> None:
    """For [1, 1]: reranking 1, permutation ½, with weights 1 and 3: (1 + 3/2) / 4."""
    write_data(tmp_path / "data", [100])
    rollouts = write_rollouts(tmp_path, [["[1, 1]", "[]"]])
    task = read_records(tmp_path / "data/select.jsonl", RankingTask)[0]
    record = read_records(rollouts, Rollouts)[0]
    assert rollout_rewards(record, task, {"reranking": 1.0, "permutation": 3.0}) == [0.625, 0.0]


def test_rollouts_for_other_questions_or_candidates_are_rejected(tmp_path: Path) -> None:
    write_data(tmp_path / "data", [100, 200])
    rollouts = write_rollouts(tmp_path, [["[1]", "[]"]] * 2)
    lines = rollouts.read_text().splitlines()
    rollouts.write_text(lines[0])
    with pytest.raises(InputError, match=r"rollouts.jsonl: has no rollouts for d1.pdf/0"):
        select(tmp_path, difficulty={"rollouts": rollouts})
    rollouts.write_text("\n".join([lines[0], lines[1].replace('"page":0', '"page":7')]))
    with pytest.raises(InputError, match=r"the rollouts for d1.pdf/0 show other candidates"):
        select(tmp_path, difficulty={"rollouts": rollouts})
    assert not (tmp_path / "out").exists()


def test_reward_for_verdicts_is_refused_before_a_model_without_verdicts_answers(tmp_path: Path) -> None:
    write_data(tmp_path / "data", [10, 20])
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    settings = {"min_pixels": 784, "max_pixels": 784, "dtype": "float32", "think": True, "verdicts": False}
    write_json(model / "reranker.json", settings | {"prompt": read_prompt("default").model_dump()})
    reward = {"name": "true_reasoning", "weights": {"true_reasoning": 1}}
    with pytest.raises(
        InputError, match=r"reward=true_reasoning: .*/model was trained on answers without verdicts"
    ):
        select(tmp_path, difficulty={"checkpoint": str(model)}, reward=reward)
    assert not (tmp_path / "out").exists()


def test_config_has_defaults_and_rejects_invalid_fields() -> None:
    assert compose_stage(SelectStage, "select", []).balanced == Balanced(count=3000, groups=10)
    assert compose_stage(SelectStage, "select", ["balanced=null"]).balanced is None
    config = compose_stage(SelectStage, "select", ["difficulty={checkpoint:outputs/sft/model}", "reward=gated"])
    assert (config.difficulty.samples, config.difficulty.order) == (8, "shuffled")
    for overrides, message in (
        (["policy=all"], "policy: no such field .choices: balanced, difficulty, max_too_long, model, out"),
        (["difficulty.samples=4"], "difficulty.samples: difficulty is null; set all its fields together"),
        (["difficulty={samples:4}"], "give either checkpoint .* or rollouts"),
        (["difficulty={checkpoint:a,rollouts:b}"], "give either checkpoint .* or rollouts"),
        (["difficulty={checkpoint:a,sample:4}"], "difficulty.sample: no such field; did you mean samples"),
        (["difficulty={checkpoint:a,min_reward:0.9,max_reward:0.1}"], "min_reward 0.9 is above max_reward 0.1"),
    ):
        with pytest.raises(InputError, match=message):
            compose_stage(SelectStage, "select", overrides)
