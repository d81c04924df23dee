"""Evaluation with the shipped tiny model on a few made-up questions, and its config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up import make_data

from mmr5_train.config import compose_stage
from mmr5_train.evaluate import EvaluateStage, first_stage, main
from mmr5_train.ranking.files import InputError, read_manifest, read_records, write_records
from mmr5_train.ranking.records import Page, Ranking, RankingTask
from mmr5_train.ranking.scoring import score_rankings
from mmr5_train.ranking.trec import QRELS, read_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, questions=3, candidates=3)
    return folder / "heldout.jsonl"


def config(data: Path, out: Path, *overrides: str) -> EvaluateStage:
    return compose_stage(EvaluateStage, "evaluate", [f"data={data}", f"out={out}", *overrides])


def files(folder: Path) -> dict[str, bytes]:
    """Everything but the manifest, which names the folder, and the times."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.name not in ("manifest.json", "timing.json")
    }


def test_the_tiny_model_is_evaluated_the_same_way_twice(data: Path, tmp_path: Path) -> None:
    wanted = ("systems={untrained:tiny}", "samples=2", "temperature=3", "batch_size=4", "max_new_tokens=12")
    for name in ("one", "two"):
        main(config(data, tmp_path / name, *wanted))
    out = tmp_path / "one"
    assert files(out) == files(tmp_path / "two")

    ranked = read_records(out / "rankings/untrained.jsonl", Ranking)
    assert [r.query_id for r in ranked] == [t.query_id for t in read_records(data, RankingTask)]
    assert all(len(r.samples) == 2 and sorted(r.greedy.order) == [1, 2, 3] for r in ranked)
    assert all(r.greedy.tokens == 12 and "cut_off" in r.greedy.defects for r in ranked)
    assert len({answer.completion for answer in (ranked[0].greedy, *ranked[0].samples)}) == 3
    assert all((out / "rankings" / page.image).is_file() for r in ranked for page in r.shown)

    pages = read_records(out / "pages.jsonl", Page, unique=None)
    assert {page.id for page in pages} == {page.id for r in ranked for page in r.shown}
    assert all((out / page.image).is_file() for page in pages)

    results = json.loads((out / "results.json").read_text())
    first = read_records(out / "rankings/first_stage.jsonl", Ranking)
    assert results == score_rankings({"first_stage": first, "untrained": ranked}, pages, seed=42)
    run = read_run(out / "trec/untrained.run")
    assert run == {r.query_id: r.pages(r.greedy) for r in ranked}
    assert sorted(path.name for path in (out / "trec").iterdir()) == ["first_stage.run", QRELS, "untrained.run"]
    timing = json.loads((out / "timing.json").read_text())
    assert timing["untrained"]["seconds_per_question"] == pytest.approx(timing["untrained"]["seconds"] / 3)
    assert read_manifest(out)["counts"] == {"questions": 3, "systems": 2, "samples": 2}


def test_without_a_checkpoint_the_first_stage_is_scored(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config(data, tmp_path / "out", "limit=2"))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["system"] for row in results["rows"]] == ["first_stage"]
    assert results["questions"] == 2
    assert results["differences"] == []
    printed = capsys.readouterr().out
    assert "first_stage" in printed
    assert printed.splitlines()[-1] == f"evaluate: first_stage on 2 questions in {tmp_path / 'out'}"


def test_the_first_stage_keeps_its_order(data: Path) -> None:
    task = read_records(data, RankingTask)[0]
    ranking = first_stage(task)
    assert ranking.pages(ranking.greedy) == tuple(candidate.id for candidate in task.candidates)
    assert ranking.greedy.completion == ""


@pytest.mark.parametrize("name", ["first_stage", "a/b", "..", "-x"])
def test_a_system_needs_a_file_name(data: Path, tmp_path: Path, name: str) -> None:
    values = config(data, tmp_path / "out").model_dump() | {"systems": {name: "tiny"}}
    with pytest.raises(ValueError, match="can't name a system"):
        EvaluateStage.model_validate(values)


def test_a_wrong_checkpoint_is_named_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="outputs/nowhere: no such checkpoint"):
        main(config(data, tmp_path / "out", "systems={a:tiny,b:outputs/nowhere}"))
    assert not (tmp_path / "out").exists()


def test_missing_pages_are_named(data: Path, tmp_path: Path) -> None:
    alone = tmp_path / "heldout.jsonl"
    write_records(alone, read_records(data, RankingTask))
    with pytest.raises(InputError, match=r"pages\.jsonl: no such file"):
        main(config(alone, tmp_path / "out"))
    pages = read_records(data.with_name("pages.jsonl"), Page, unique=None)
    lost = read_records(data, RankingTask)[0].candidates[0].id
    write_records(tmp_path / "pages.jsonl", [page for page in pages if page.id != lost])
    with pytest.raises(InputError, match=rf"pages\.jsonl: lacks page {lost}, a candidate of"):
        main(config(alone, tmp_path / "out"))
