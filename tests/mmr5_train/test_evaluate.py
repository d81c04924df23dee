"""The evaluation stage with the tiny model on a few synthetic questions, and its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sample_runs import make_data

from mmr5_train import evaluate
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_manifest, read_records, write_records
from mmr5_train.evaluate import PARTIAL, EvaluateStage, System, first_stage, main
from mmr5_train.evaluation.scoring import score_rankings
from mmr5_train.evaluation.trec import QRELS, read_run
from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.records import Page, Ranking, RankingTask

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, questions=3, candidates=3)
    return folder / "heldout.jsonl"


def config(data: Path, out: Path, *overrides: str) -> EvaluateStage:
    return compose_stage(EvaluateStage, "evaluate", [f"data={data}", f"out={out}", *overrides])


def files(folder: Path) -> dict[str, bytes]:
    """Contents of all files but manifest.json and timing.json, which differ between runs."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.name not in ("manifest.json", "timing.json")
    }


def test_two_runs_write_the_same_files(data: Path, tmp_path: Path) -> None:
    overrides = ("systems={untrained:tiny}", "samples=2", "temperature=3", "batch_size=4", "max_new_tokens=12")
    for name in ("one", "two"):
        main(config(data, tmp_path / name, *overrides))
    out = tmp_path / "one"
    assert files(out) == files(tmp_path / "two")

    rankings = read_records(out / "rankings/untrained.jsonl", Ranking)
    assert [r.query_id for r in rankings] == [t.query_id for t in read_records(data, RankingTask)]
    assert all(len(r.samples) == 2 and sorted(r.greedy.order) == [1, 2, 3] for r in rankings)
    assert all(r.greedy.tokens == 12 and "cut_off" in r.greedy.defects for r in rankings)
    assert len({answer.completion for answer in (rankings[0].greedy, *rankings[0].samples)}) == 3
    assert all((out / "rankings" / page.image).is_file() for r in rankings for page in r.shown)

    pages = read_records(out / "pages.jsonl", Page, unique=None)
    assert {page.id for page in pages} == {page.id for r in rankings for page in r.shown}
    assert all((out / page.image).is_file() for page in pages)

    results = json.loads((out / "results.json").read_text())
    first = read_records(out / "rankings/first_stage.jsonl", Ranking)
    assert results == score_rankings({"first_stage": first, "untrained": rankings}, pages, seed=42)
    run = read_run(out / "trec/untrained.run")
    assert run == {r.query_id: r.ranked_pages(r.greedy) for r in rankings}
    assert sorted(path.name for path in (out / "trec").iterdir()) == ["first_stage.run", QRELS, "untrained.run"]
    timing = json.loads((out / "timing.json").read_text())["untrained"]
    assert 0 < 3 * timing["seconds_per_question"] < timing["seconds"], "sampling takes time too"
    assert timing["tokens"] == 12
    assert timing["visual_tokens"] == 3 * 12, "three pages of 84 × 112 pixels, with one token per 28 × 28 pixels"
    assert timing["prompt_tokens"] > timing["visual_tokens"] + 40
    assert not (out / PARTIAL).exists()
    assert read_manifest(out)["counts"] == {"questions": 3, "systems": 2, "samples": 2}


def test_an_interrupted_run_is_resumed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is interrupted in the second batch of the second system, with an incomplete line in the partial file."""
    overrides = ("systems={a:tiny,b:tiny}", "samples=2", "batch_size=2", "max_new_tokens=4")
    main(config(data, tmp_path / "uninterrupted", *overrides))
    rank_batch, calls = evaluate.rank_batch, []

    def interrupted(name: str, start: int, *args: Any) -> Any:
        if calls == [("a", 0), ("a", 2), ("b", 0)]:
            raise KeyboardInterrupt
        calls.append((name, start))
        return rank_batch(name, start, *args)

    monkeypatch.setattr(evaluate, "rank_batch", interrupted)
    out = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        main(config(data, out, *overrides))
    with (out / PARTIAL / "b.0.jsonl").open("a") as stream:
        stream.write('{"start": 2, "seconds": 0.1, "ranki')
    monkeypatch.setattr(evaluate, "rank_batch", lambda *args: calls.append(args[:2]) or rank_batch(*args))
    with pytest.raises(InputError, match=r"batch_size 2, but this run has 3"):
        main(config(data, out, *overrides, "batch_size=3"))
    main(config(data, out, *overrides))
    assert calls == [("a", 0), ("a", 2), ("b", 0), ("b", 2)], "a batch was ranked twice"
    assert files(out) == files(tmp_path / "uninterrupted")


def test_a_checkpoint_can_be_evaluated_in_several_modes(data: Path, tmp_path: Path) -> None:
    modes = "direct:{checkpoint:tiny,mode:direct,constrain:true},logits:{checkpoint:tiny,mode:logits}"
    windows = "windows:{checkpoint:tiny,mode:logits,window:2,stride:1}"
    main(config(data, tmp_path / "out", f"systems={{{modes},{windows}}}", "samples=1", "max_new_tokens=40"))
    direct, logits, windows = (
        read_records(tmp_path / f"out/rankings/{name}.jsonl", Ranking) for name in ("direct", "logits", "windows")
    )
    for ranking in direct:
        assert parse_answer(ranking.greedy.completion, 3, expect_think=False).structure_valid
        assert not ranking.greedy.defects
    for ranking in logits:
        assert ranking.greedy.completion == ""
        assert sum(ranking.greedy.scores) == pytest.approx(1)
        assert list(ranking.greedy.scores) == sorted(ranking.greedy.scores, reverse=True)
        assert ranking.samples == ()
    assert all(sorted(r.greedy.order) == [1, 2, 3] and r.greedy.scores == () for r in windows)


def test_the_first_stage_is_scored_without_any_system(
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


def test_the_ranking_of_the_first_stage_is_the_candidate_order(data: Path) -> None:
    task = read_records(data, RankingTask)[0]
    ranking = first_stage(task)
    assert ranking.ranked_pages(ranking.greedy) == tuple(candidate.id for candidate in task.candidates)
    assert ranking.greedy.completion == ""


def test_an_option_of_the_model_group_stands_for_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert System(checkpoint="qwen2_5_vl_7b").checkpoint == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert System(checkpoint="outputs/sft/model").checkpoint == "outputs/sft/model"
    monkeypatch.chdir(tmp_path)
    Path("qwen2_5_vl_7b").mkdir()
    assert System(checkpoint="qwen2_5_vl_7b").checkpoint == "qwen2_5_vl_7b"


@pytest.mark.parametrize("name", ["first_stage", "a/b", "..", "-x"])
def test_a_system_name_must_be_a_file_name(data: Path, tmp_path: Path, name: str) -> None:
    values = config(data, tmp_path / "out").model_dump() | {"systems": {name: "tiny"}}
    with pytest.raises(ValueError, match="can't name a system"):
        EvaluateStage.model_validate(values)


def test_a_missing_checkpoint_is_named_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="outputs/nowhere: no such checkpoint"):
        main(config(data, tmp_path / "out", "systems={a:tiny,b:outputs/nowhere}"))
    assert not (tmp_path / "out").exists()


def test_questions_that_do_not_fit_a_system_are_listed_before_anything_is_written(
    data: Path, tmp_path: Path
) -> None:
    """An evaluation leaves no question out, because that would change its figures."""
    systems = "systems={a:{checkpoint:tiny,max_new_tokens:20},b:{checkpoint:tiny,max_new_tokens:32750}}"
    with pytest.raises(InputError, match=r"systems\.b: \d+ of \d+ prompts .* less max_new_tokens 32,750.*; lower"):
        main(config(data, tmp_path / "out", systems))
    assert not (tmp_path / "out").exists()


def test_missing_pages_are_named(data: Path, tmp_path: Path) -> None:
    tasks_path = tmp_path / "heldout.jsonl"
    write_records(tasks_path, read_records(data, RankingTask))
    with pytest.raises(InputError, match=r"pages\.jsonl: no such file"):
        main(config(tasks_path, tmp_path / "out"))
    pages = read_records(data.with_name("pages.jsonl"), Page, unique=None)
    missing_page = read_records(data, RankingTask)[0].candidates[0].id
    write_records(tmp_path / "pages.jsonl", [page for page in pages if page.id != missing_page])
    with pytest.raises(InputError, match=rf"pages\.jsonl: lacks page {missing_page}, a candidate of"):
        main(config(tasks_path, tmp_path / "out"))
