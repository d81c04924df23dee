"""Rollouts sampled from a real checkpoint by `select`, with interruptions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmr5_train.common.files import InputError, read_manifest, read_records, write_records
from mmr5_train.inference import rollouts as rollouts_module
from mmr5_train.inference.rollouts import PARTIAL, ROLLOUTS, rollout_rewards
from mmr5_train.ranking.records import Page, RankingTask, Rollouts, Skipped
from mmr5_train.select import SelectStage, main

WEIGHTS = {"reranking": 1.0}


@pytest.fixture
def data(page_folder: Path, tasks: list[RankingTask], tmp_path: Path) -> Path:
    """Ten questions, so that there are several batches, with their pages."""
    folder = tmp_path / "data"
    shutil.copytree(page_folder, folder)
    copies = [task.model_copy(update={"query_id": f"{task.query_id}/{i}"}) for i in range(3) for task in tasks]
    write_records(folder / "select.jsonl", copies[:10])
    write_records(
        folder / "pages.jsonl",
        [Page(doc_name="doc", page=i, domain="d", image=f"page-{i}.png", width=600, height=800) for i in range(6)],
    )
    return folder / "select.jsonl"


def select(
    data: Path, model: Path, out: Path, overwrite: bool = False, max_too_long: float = 0.01, **difficulty: Any
) -> Path:
    difficulty = {"samples": 4, "batch_size": 16, "max_new_tokens": 40} | difficulty
    if "rollouts" not in difficulty:
        difficulty["checkpoint"] = str(model)
    reward = {"name": "reranking", "weights": WEIGHTS}
    settings = {"questions": data, "out": out, "overwrite": overwrite, "difficulty": difficulty, "reward": reward}
    main(SelectStage.model_validate(settings | {"max_too_long": max_too_long}))
    return out


def test_questions_that_do_not_fit_the_context_are_left_out(
    data: Path, guessing_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = read_records(data, RankingTask)
    tasks[3] = tasks[3].model_copy(update={"query": "water " * 33_000})
    write_records(data, tasks)
    with pytest.raises(
        InputError, match=rf"1 of 10 examples .* less difficulty\.max_new_tokens 40.*{tasks[3].query_id}:"
    ):
        select(data, guessing_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = select(data, guessing_model, tmp_path / "out", max_too_long=0.1)
    assert [skipped.query_id for skipped in read_records(out / "skipped.jsonl", Skipped)] == [tasks[3].query_id]
    assert read_manifest(out)["counts"]["dropped"]["too many tokens"] == 1
    assert len(read_records(out / ROLLOUTS, Rollouts)) == 9
    assert (
        "lower model.max_pixels or difficulty.max_new_tokens, or use fewer candidates" in capsys.readouterr().out
    )
    again = select(data, guessing_model, tmp_path / "again", rollouts=out / ROLLOUTS)
    assert (again / "questions.jsonl").read_text() == (out / "questions.jsonl").read_text()


def interrupt_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets sampling raise KeyboardInterrupt after this many batches."""
    rank_tasks, calls = rollouts_module.rank_tasks, []

    def counted(backend: Any, tasks: Sequence[Any], *args: Any, **options: Any) -> Any:
        calls.append(len(tasks))
        if len(calls) > batches:
            raise KeyboardInterrupt
        return rank_tasks(backend, tasks, *args, **options)

    monkeypatch.setattr(rollouts_module, "rank_tasks", counted)


def test_questions_with_different_rewards_are_kept(data: Path, guessing_model: Path, tmp_path: Path) -> None:
    out = select(data, guessing_model, tmp_path / "out")
    tasks, records = read_records(data, RankingTask), read_records(out / ROLLOUTS, Rollouts)
    assert [rollouts.query_id for rollouts in records] == [task.query_id for task in tasks]
    rewards = [rollout_rewards(rollouts, task, WEIGHTS) for rollouts, task in zip(records, tasks, strict=True)]
    assert {reward for row in rewards for reward in row} == {0.0, 1.0}
    different = [task.query_id for task, row in zip(tasks, rewards, strict=True) if len(set(row)) > 1]
    assert 0 < len(different) < 10
    assert [task.query_id for task in read_records(out / "questions.jsonl", RankingTask)] == different
    for rollouts, task in zip(records, tasks, strict=True):
        in_grpo = task.in_prompt_order("shuffled", 42)
        assert rollouts.shown == tuple(page.id for page in in_grpo.shown)
        assert all(sample.completion.startswith("<think>") for sample in rollouts.samples)
    counts = read_manifest(out)["counts"]
    assert counts["dropped"] == {"all answers earn the same": 10 - len(different)}
    assert sum(group["before"] for group in counts["difficulty"]) == 10
    assert sum(group["after"] for group in counts["difficulty"]) == len(different)


def test_a_resumed_run_ends_with_the_same_files(
    data: Path,
    guessing_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uninterrupted, resumed = select(data, guessing_model, tmp_path / "uninterrupted"), tmp_path / "resumed"
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            select(data, guessing_model, resumed)
    partial = resumed / PARTIAL
    assert f"finished rollouts are in {partial}" in capsys.readouterr().err
    [file] = partial.iterdir()
    [batch] = [line for line in file.read_text().splitlines() if line]
    with file.open("a") as stream:  # as if the machine had failed in the middle of a batch
        stream.write(batch[:200])
    with pytest.raises(InputError, match=r"partial: .* an interrupted run with samples 4, but this run has 3"):
        select(data, guessing_model, resumed, samples=3)
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)  # 4 and 2 questions are left
        select(data, guessing_model, resumed)
    assert not partial.exists()
    for name in (ROLLOUTS, "questions.jsonl"):
        assert (resumed / name).read_bytes() == (uninterrupted / name).read_bytes()
    with pytest.raises(InputError, match="is not empty"):
        select(data, guessing_model, resumed)


def test_rollouts_are_kept_if_no_question_is_left(
    data: Path, guessing_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"no question is left \(.*mean reward below 0.99: "):
        select(data, guessing_model, out, min_reward=0.99)
    interrupt_after(0, monkeypatch)
    select(data, guessing_model, out)
    assert len(read_records(out / ROLLOUTS, Rollouts)) == 10
    assert select(data, guessing_model, tmp_path / "again", checkpoint=None, rollouts=out / ROLLOUTS).is_dir()
    assert (tmp_path / "again/questions.jsonl").read_text() == (out / "questions.jsonl").read_text()


def test_an_unusable_checkpoint_or_page_is_named_before_anything_is_written(
    data: Path, reciting_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"has no reranker.json, so the prompt it was trained with is unknown"):
        select(data, reciting_model, tmp_path / "out")
    (data.parent / "page-2.png").unlink()
    with pytest.raises(InputError, match=r"page-2.png: no such page image"):
        select(data, reciting_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
