from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_train.config import compose_stage
from mmr5_train.ranking.files import InputError, read_manifest, read_records, write_manifest, write_records
from mmr5_train.ranking.records import Candidate, Page, PageId, RankingTask
from mmr5_train.select import SelectStage, balanced, group_edges, group_of, main


def write_data(folder: Path, sides: Sequence[int]) -> None:
    """One question a side length, its one candidate a square page of that side."""
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


def select(folder: Path, name: str = "out", policy: str = "resolution_balanced", **more: Any) -> Path:
    out = folder / name
    settings = {"questions": folder / "data/select.jsonl", "policy": policy, "out": out} | more
    main(SelectStage.model_validate(settings))
    return out


def chosen(out: Path) -> list[int]:
    """Numbers of the chosen questions."""
    return [int(task.query_id[1:].split(".")[0]) for task in read_records(out / "questions.jsonl", RankingTask)]


def test_all_keeps_every_question_and_rebases_images(tmp_path: Path) -> None:
    write_data(tmp_path / "data", [100, 200, 300])
    out = select(tmp_path, "a/b", policy="all", count=1)
    tasks = read_records(out / "questions.jsonl", RankingTask)
    assert [task.query_id for task in tasks] == ["d0.pdf/0", "d1.pdf/0", "d2.pdf/0"]
    assert tasks[0].candidates[0].image == "../../i/0.jpg"
    assert (out / tasks[0].candidates[0].image).resolve() == (tmp_path / "i/0.jpg").resolve()


def test_balanced_takes_evenly(tmp_path: Path) -> None:
    """Of 90 small, 8 middle and 2 large pages, 12 questions: 5 small, 5 middle, 2 large."""
    sides = [100] * 90 + [1000] * 8 + [10000] * 2
    write_data(tmp_path / "data", sides)
    out = select(tmp_path, count=12, groups=3)
    numbers = chosen(out)
    assert numbers == sorted(numbers)
    assert Counter(sides[i] for i in numbers) == {100: 5, 1000: 5, 10000: 2}
    counts = read_manifest(out)["counts"]
    assert (counts["questions_before"], counts["questions"]) == (100, 12)
    assert [(g["group"], g["before"], g["after"]) for g in counts["groups"]] == [(0, 90, 5), (1, 8, 5), (2, 2, 2)]
    assert counts["groups"][0]["from_pixels"] == 10_000
    assert counts["groups"][2]["to_pixels"] == 100_000_000


def test_seed_decides(tmp_path: Path) -> None:
    write_data(tmp_path / "data", [100] * 40 + [500] * 40)
    once = select(tmp_path, "once", count=10)
    again = select(tmp_path, "again", count=10)
    assert (once / "questions.jsonl").read_bytes() == (again / "questions.jsonl").read_bytes()
    assert chosen(select(tmp_path, "other", count=10, seed=7)) != chosen(once)


def test_one_resolution_is_one_group(tmp_path: Path) -> None:
    write_data(tmp_path / "data", [100] * 6)
    out = select(tmp_path, count=4)
    assert read_manifest(out)["counts"]["groups"] == [
        {"group": 0, "from_pixels": 10_000, "to_pixels": 10_000, "before": 6, "after": 4}
    ]


@pytest.mark.parametrize("count", [None, 3, 50])
def test_more_than_there_are_gives_all(tmp_path: Path, count: int | None) -> None:
    write_data(tmp_path / "data", [100, 200, 300])
    assert chosen(select(tmp_path, count=count)) == [0, 1, 2]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 3))
def test_no_group_gives_more_than_another_that_has_more_left(groups: list[int], count: int, seed: int) -> None:
    picked = balanced(groups, count, seed)
    assert len(set(picked)) == len(picked) == min(count, len(groups))
    before, after = Counter(groups), Counter(groups[i] for i in picked)
    for group in before:
        if after[group] < before[group]:
            assert after[group] >= max(after.values()) - 1


@given(st.lists(st.integers(1, 10**8), min_size=1, max_size=20), st.integers(1, 12))
def test_every_resolution_has_a_group(pixels: list[int], groups: int) -> None:
    edges = group_edges(pixels, groups)
    assert len(edges) == groups + 1
    placed = [group_of(value, edges) for value in sorted(pixels)]
    assert placed == sorted(placed)
    assert placed[0] == 0
    assert placed[-1] == (groups - 1 if len(set(pixels)) > 1 else 0)


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"select.jsonl: no such file"):
        select(tmp_path)
    write_data(tmp_path / "data", [100, 200])
    pages = tmp_path / "data/pages.jsonl"
    first, second = pages.read_text().splitlines()
    pages.write_text(first + "\n")
    with pytest.raises(InputError, match=r"pages.jsonl: lacks page d1.pdf#0, a candidate of d1.pdf/0"):
        select(tmp_path)
    pages.write_text(f"{first}\n{second}\n{first}\n")
    with pytest.raises(InputError, match=r"pages.jsonl, line 3: .*already stands in line 1"):
        select(tmp_path)
    pages.unlink()
    with pytest.raises(InputError, match=r"pages.jsonl: no such file"):
        select(tmp_path)
    (tmp_path / "data/select.jsonl").write_text("")
    with pytest.raises(InputError, match=r"select.jsonl: holds no RankingTask record"):
        select(tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_input_is_never_emptied(tmp_path: Path) -> None:
    write_data(tmp_path / "data", [100, 200])
    write_manifest(tmp_path / "data", stage="candidates", config={})
    with pytest.raises(InputError, match="which this stage reads"):
        select(tmp_path, "data", overwrite=True)
    assert (tmp_path / "data/select.jsonl").is_file()


def test_the_config_names_its_choices() -> None:
    assert compose_stage(SelectStage, "select", []).groups == 10
    with pytest.raises(
        InputError, match=r"policy: Input should be 'all' or 'resolution_balanced', found 'hardest'"
    ):
        compose_stage(SelectStage, "select", ["policy=hardest"])
