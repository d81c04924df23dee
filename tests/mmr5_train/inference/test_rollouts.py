"""A real model is asked, stopped, and asked again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mmr5_train.common.files import InputError, read_manifest, read_records, write_records
from mmr5_train.inference.local import LocalBackend
from mmr5_train.inference.rollouts import PARTIAL, ROLLOUTS, rewards_of
from mmr5_train.ranking.records import Page, RankingTask, Rollouts
from mmr5_train.select import SelectStage, main

WEIGHTS = {"reranking": 1.0}


@pytest.fixture
def data(page_folder: Path, tasks: list[RankingTask], tmp_path: Path) -> Path:
    """The shared tasks thrice, so that there are several batches, and their pages."""
    folder = tmp_path / "data"
    shutil.copytree(page_folder, folder)
    many = [task.model_copy(update={"query_id": f"{task.query_id}/{i}"}) for i in range(3) for task in tasks]
    write_records(folder / "select.jsonl", many[:10])
    write_records(
        folder / "pages.jsonl",
        [Page(doc_name="doc", page=i, domain="d", image=f"page-{i}.png", width=600, height=800) for i in range(6)],
    )
    return folder / "select.jsonl"


def select(data: Path, model: Path, out: Path, overwrite: bool = False, **difficulty: Any) -> Path:
    asked = {"checkpoint": str(model), "samples": 4, "batch_size": 16, "max_new_tokens": 40} | difficulty
    reward = {"name": "reranking", "weights": WEIGHTS}
    settings = {"questions": data, "out": out, "overwrite": overwrite, "difficulty": asked, "reward": reward}
    main(SelectStage.model_validate(settings))
    return out


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """LocalBackend.answer is interrupted after so many batches."""
    answer, calls = LocalBackend.answer, []

    def counted(self: LocalBackend, tasks: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(tasks))
        if len(calls) > batches:
            raise KeyboardInterrupt
        return answer(self, tasks, *args, **options)

    monkeypatch.setattr(LocalBackend, "answer", counted)


def test_questions_whose_answers_differ_stay(data: Path, guessing_model: Path, tmp_path: Path) -> None:
    out = select(data, guessing_model, tmp_path / "out")
    tasks, rollouts = read_records(data, RankingTask), read_records(out / ROLLOUTS, Rollouts)
    assert [made.query_id for made in rollouts] == [task.query_id for task in tasks]
    earned = [rewards_of(made, task, WEIGHTS) for made, task in zip(rollouts, tasks, strict=True)]
    assert {reward for rewards in earned for reward in rewards} == {0.0, 1.0}
    differ = [task.query_id for task, rewards in zip(tasks, earned, strict=True) if len(set(rewards)) > 1]
    assert 0 < len(differ) < 10
    assert [task.query_id for task in read_records(out / "questions.jsonl", RankingTask)] == differ
    for made, task in zip(rollouts, tasks, strict=True):
        assert made.shown == tuple(
            page.id for page in task.in_prompt_order("shuffled", 42).shown
        )  # as GRPO shows them
        assert all(sample.completion.startswith("<think>") for sample in made.samples)
    counts = read_manifest(out)["counts"]
    assert counts["dropped"] == {"all answers earn the same": 10 - len(differ)}
    assert sum(group["before"] for group in counts["difficulty"]) == 10
    assert sum(group["after"] for group in counts["difficulty"]) == len(differ)


def test_a_stopped_run_goes_on_and_ends_the_same(
    data: Path,
    guessing_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, stopped = select(data, guessing_model, tmp_path / "whole"), tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            select(data, guessing_model, stopped)
    partial = stopped / PARTIAL
    assert f"finished rollouts are kept in {partial}" in capsys.readouterr().err
    assert len(partial.read_text().splitlines()) == 4
    with partial.open("a") as stream:  # a machine that went down in the middle of a batch
        stream.write(partial.read_text().splitlines()[0] + "\n" + '{"query_id": "doc')
    with pytest.raises(
        InputError, match=r"partial.jsonl: rollouts of a run .* with another samples \(then 4, now 3"
    ):
        select(data, guessing_model, stopped, samples=3)
    with monkeypatch.context() as patch:
        stop_after(2, patch)  # 4 and 2 questions are left
        select(data, guessing_model, stopped)
    assert not partial.exists()
    for name in (ROLLOUTS, "questions.jsonl"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(InputError, match="is not empty"):
        select(data, guessing_model, stopped)


def test_bounds_that_leave_nothing_cost_no_rollouts(
    data: Path, guessing_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"no question is left \(.*mean reward below 0.99: "):
        select(data, guessing_model, out, min_reward=0.99)
    stop_after(0, monkeypatch)
    select(data, guessing_model, out)
    assert len(read_records(out / ROLLOUTS, Rollouts)) == 10
    assert select(data, guessing_model, tmp_path / "again", checkpoint=None, rollouts=out / ROLLOUTS).is_dir()
    assert (tmp_path / "again/questions.jsonl").read_text() == (out / "questions.jsonl").read_text()


def test_what_cannot_be_asked_is_said_first(data: Path, reciting_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing says with which prompt it was taught"):
        select(data, reciting_model, tmp_path / "out")
    (data.parent / "page-2.png").unlink()
    with pytest.raises(InputError, match=r"page-2.png: no such page image"):
        select(data, reciting_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
