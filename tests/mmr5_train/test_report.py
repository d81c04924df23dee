"""The report on generated evaluations: its contents, and what it must never contain."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from html_reader import Reader
from sample_runs import make_evaluation, make_training

from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_records, write_json, write_records
from mmr5_train.evaluation.answer_classes import CLASSES, DEFECTS
from mmr5_train.evaluation.scoring import find_difference, p_text, score_rankings
from mmr5_train.ranking.records import LocalId, Page, Ranking
from mmr5_train.report import ReportStage, main
from mmr5_train.reporting.views import signed

QUESTIONS = 30
SUFFIXES = (("", QUESTIONS), ("_sampled", 4 * QUESTIONS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    make_evaluation(root / "evaluate", QUESTIONS, draws=200)
    make_training(root / "sft", "sft")
    make_training(root / "grpo", "grpo", steps=40)
    return root


def write(root: Path, out: Path, *overrides: str) -> str:
    arguments = [f"evaluation={root / 'evaluate'}", f"out={out}", *overrides]
    main(compose_stage(ReportStage, "report", arguments))
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(folders: Path) -> str:
    return write(folders, folders / "out", f"sft={folders / 'sft'}", f"grpo={folders / 'grpo'}")


@pytest.fixture(scope="module")
def page(html: str) -> Reader:
    return Reader(html)


@pytest.fixture
def copy(folders: Path, tmp_path: Path) -> Path:
    """A copy of the evaluation folder that a test can modify."""
    shutil.copytree(folders / "evaluate", tmp_path / "evaluate")
    return tmp_path


def test_report_shows_every_figure(page: Reader, folders: Path) -> None:
    results = json.loads((folders / "evaluate/results.json").read_text())
    for row in results["rows"]:
        for metric in ("recall@1", "recall@3", "recall@5", "ndcg@5", "mrr", "recall@1_sampled"):
            interval = row["intervals"][metric]
            assert f"{row[metric]:.3f} {interval['low']:.3f} – {interval['high']:.3f}" in page.text
        for group in ("by_domain", "by_question_type"):
            for name, scores in row[group].items():
                assert name in page.text
                assert f"{scores['recall@1']:.3f}" in page.text
    for difference in results["differences"]:
        values = difference["recall@1"]
        text = f"{signed(values['mean'])} {signed(values['low'])} to {signed(values['high'])}"
        assert f"Recall@1 {text}" in page.text
    first, last = f"{results['rows'][0]['recall@1']:.3f}", f"{results['rows'][-1]['recall@1']:.3f}"
    gap = find_difference(results, results["rows"][-1]["system"], results["rows"][0]["system"])["recall@1"]
    if gap["p_holm"] < 0.05:
        assert f"from {first} to {last} on 30 held-out" in page.text
    else:
        assert f"don’t differ significantly on 30 held-out questions: recall@1 {last} and {first}" in page.text
    assert page.text.count("Ceiling ") == 1  # all systems have the same candidates
    for row in results["rows"]:
        assert f"{100 * row['recall@1'] / row['ceiling']['recall@1']:.1f} %" in page.text
    for difference in results["differences"]:
        for name in ("recall@1", "mrr"):
            gap = difference[name]
            ends = f"{signed(gap['low'])} to {signed(gap['high'])} p {p_text(gap['p_holm'])}"
            assert f"{signed(gap['mean'])} {ends}" in page.text


def test_report_shows_defects_and_classes_including_zeros(page: Reader, folders: Path) -> None:
    results = json.loads((folders / "evaluate/results.json").read_text())
    sft, grpo = results["rows"][1:]
    assert f"SFT {QUESTIONS} greedy" in page.text
    assert f"SFT + GRPO {4 * QUESTIONS} sampled" in page.text
    for name, meaning in {**CLASSES, **{str(defect): text for defect, text in DEFECTS.items()}}.items():
        kind = "classes" if name in CLASSES and name != "out_of_range" else "defects"
        counts = [(row[f"{kind}{end}"].get(name, 0), n) for row in (sft, grpo) for end, n in SUFFIXES]
        cells = " ".join(f"{count} {100 * count / answers:.1f} %" for count, answers in counts)
        label = "OK" if name == "ok" else name.replace("_", " ")
        assert f"{label} {meaning} {cells}" in page.text
    n_without_defect = round(sft["without_defect"] * QUESTIONS)
    assert (
        f"without defect None of the defects below. {n_without_defect} {100 * n_without_defect / QUESTIONS:.1f} %"
        in page.text
    )
    assert sum(sft["classes"].values()) == QUESTIONS


def test_report_shows_the_known_costs(page: Reader, copy: Path) -> None:
    rankings = read_records(copy / "evaluate/rankings/sft.jsonl", Ranking)
    greedy = sum(r.greedy.tokens for r in rankings) / QUESTIONS
    sampled = sum(a.tokens for r in rankings for a in r.samples) / (4 * QUESTIONS)
    assert (
        f"System Completion tokens Completion tokens, sampled SFT {greedy:,.0f} {sampled:,.0f} SFT +" in page.text
    )
    timing = {"sft": {"seconds": 60.0, "seconds_per_question": 2.0, "prompt_tokens": 10240.0}}
    write_json(copy / "evaluate/timing.json", timing)
    text = Reader(write(copy, copy / "out")).text
    assert "System Seconds Completion tokens Completion tokens, sampled Prompt tokens SFT 2 " in text
    assert f"{sampled:,.0f} 10,240 SFT + GRPO – " in text
    assert "timing.json" in json.dumps(json.loads((copy / "out/manifest.json").read_text())["inputs"])
    (copy / "evaluate/timing.json").write_text("[]")
    with pytest.raises(InputError, match=r"timing\.json: expected one object per system"):
        write(copy, copy / "other")


def test_report_shows_the_modes_of_one_checkpoint(folders: Path, copy: Path) -> None:
    shutil.copytree(copy / "evaluate", copy / "modes")
    timing = {"sft": {"seconds_per_question": 0.5, "tokens": 80.0}, "sft+grpo": {"seconds_per_question": 0.02}}
    timing["sft+grpo"]["tokens"] = 0.0
    write_json(copy / "modes/timing.json", timing)
    html = write(copy, copy / "out", f"modes={copy / 'modes'}")
    text = Reader(html).text
    rows = {row["system"]: row for row in json.loads((copy / "modes/results.json").read_text())["rows"]}
    slow, fast = rows["sft"]["recall@1"], rows["sft+grpo"]["recall@1"]
    assert "Mode recall@1 Milliseconds Speedup Completion tokens sft" in text
    for value, rest in ((slow, "500 1.0 80"), (fast, "20.0 25.0 0")):
        assert re.search(rf"{value:.3f} [\d.]+ to [\d.]+ {re.escape(rest)}", text), text[-3000:]
    assert text.index("500 1.0 80") < text.index("20.0 25.0 0"), "slowest mode first"
    assert html.count("milliseconds per question") == 1
    assert "Modes" not in Reader(write(folders, copy / "without")).text


def test_results_of_an_older_version_are_accepted(copy: Path) -> None:
    path = copy / "evaluate/results.json"
    results = json.loads(path.read_text())
    for row in results["rows"]:
        del row["ceiling"], row["classes"], row["classes_sampled"]
    for difference in results["differences"]:
        for value in difference.values():
            if isinstance(value, dict):
                del value["p"], value["p_holm"]
    write_json(path, results)
    text = Reader(write(copy, copy / "out")).text
    assert f"Ceiling {results['ceiling']['recall@1']:.3f}" in text


def test_system_with_other_candidates_has_its_own_ceiling(copy: Path) -> None:
    names = ("first_stage", "sft")
    rankings = {name: read_records(copy / f"evaluate/rankings/{name}.jsonl", Ranking) for name in names}
    order = (LocalId(1), LocalId(2))
    rankings["sft"] = [
        r.model_copy(
            update={
                "shown": r.shown[:2],
                "greedy": r.greedy.model_copy(update={"order": order}),
                "samples": tuple(a.model_copy(update={"order": order}) for a in r.samples),
            }
        )
        for r in rankings["sft"]
    ]
    results = score_rankings(rankings, [], draws=50)
    write_json(copy / "evaluate/results.json", results)
    write_records(copy / "evaluate/rankings/sft.jsonl", rankings["sft"])
    text = Reader(write(copy, copy / "out")).text
    assert f"Ceiling of First stage {results['rows'][0]['ceiling']['recall@1']:.3f}" in text
    assert f"Ceiling of SFT {results['rows'][1]['ceiling']['recall@1']:.3f}" in text


def test_report_shows_both_training_stages(page: Reader) -> None:
    assert (
        "Trained from the shipped tiny model by SFT on 3,000 reasoning traces and GRPO on 3,000 questions."
        in page.text
    )
    for title in (
        "Token accuracy",
        "Reranking reward",
        "Permutation reward",
        "KL",
        "Completion length",
        "Defects",
    ):
        assert title in page.text
    charts = [label for label in page.values("aria-label") if label.startswith("Completion length:")]
    assert re.fullmatch(r"Completion length: mean length \d\d\.\d at step 1, \d\d\.\d at step 40\.", charts[0])


def test_report_shows_twelve_questions_with_all_outcomes(page: Reader) -> None:
    outcomes = [attrs["class"] for _, attrs in page.tags if (attrs.get("class") or "").startswith("outcome ")]
    assert len(outcomes) == 12
    assert {"outcome improved", "outcome unchanged"} <= set(outcomes)
    assert outcomes == sorted(outcomes, key=str)  # improved, unchanged, worsened is also the alphabetical order
    assert "shows" in page.text  # a false description is followed by the true one
    names = [label for label in page.values("aria-label") if label.startswith("Page image: ")]
    assert len(names) == 60
    assert all(re.search(r"page \d+: an? \w+ (\w+ chart|table)$", name) for name in names)


def test_report_loads_nothing_from_elsewhere(html: str, page: Reader) -> None:
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[\w+/=]+", "", html))
    assert "script" not in {tag for tag, _ in page.tags}
    for name in ("src", "href", "xlink:href"):
        assert all(value.startswith(("#", "data:image/jpeg;base64,")) for value in page.values(name))
    assert len(html.encode()) < 8_000_000


def test_ids_are_unique_and_link_targets_exist(page: Reader) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    targets = [value[1:] for value in page.values("href") + page.values("xlink:href") if value.startswith("#")]
    assert set(targets + page.values("popovertarget") + page.values("aria-labelledby")) <= set(ids)


def test_report_is_deterministic(folders: Path, tmp_path: Path, html: str) -> None:
    overrides = (f"sft={folders / 'sft'}", f"grpo={folders / 'grpo'}")
    assert write(folders, tmp_path / "again", *overrides) == html
    assert write(folders, tmp_path / "other", *overrides, "seed=1") != html


def test_text_is_escaped(copy: Path) -> None:
    hostile = "<script>alert(1)</script> \"><img src=x onerror=alert(2)> ' & {{ 7*7 }} {% raw %}"
    for path in (copy / "evaluate/rankings").glob("*.jsonl"):
        changed = []
        for ranking in read_records(path, Ranking):
            greedy = ranking.greedy
            if greedy.completion:
                text = f"<think>Image 1: {hostile}\n{hostile}</think><answer>[1]</answer>"
                greedy = greedy.model_copy(update={"completion": text})
            fields = {"query": hostile, "question_types": (hostile,), "greedy": greedy}
            changed.append(ranking.model_copy(update=fields))
        write_records(path, changed)
    pages = read_records(copy / "evaluate/pages.jsonl", Page, unique=None)
    write_records(
        copy / "evaluate/pages.jsonl",
        [p.model_copy(update={"description": hostile, "text": hostile}) for p in pages],
    )
    page = Reader(write(copy, copy / "out"))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert " ".join(hostile.split()) in page.text


def test_missing_log_is_reported(copy: Path) -> None:
    make_training(copy / "sft", "sft")
    (copy / "sft/log_history.json").unlink()
    make_training(copy / "grpo", "grpo")
    write_json(copy / "grpo/log_history.json", [])
    text = Reader(write(copy, copy / "out", f"sft={copy / 'sft'}", f"grpo={copy / 'grpo'}")).text
    assert f"No curves: {copy / 'sft/log_history.json'} is missing" in text
    assert f"No curves: {copy / 'grpo/log_history.json'} has no logged step" in text


def test_optional_sections_are_omitted(folders: Path, tmp_path: Path) -> None:
    page = Reader(write(folders, tmp_path / "out", "questions=0"))
    assert "training" not in page.values("id")
    assert "cases" not in page.values("id")


def test_missing_or_broken_picture_becomes_a_placeholder(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = sorted((copy / "evaluate/images").iterdir())
    for path in images[::2]:
        path.unlink()
    for path in images[1::2]:
        path.write_bytes(b"no picture")
    text = Reader(write(copy, copy / "out", "questions=2")).text
    assert "page image not found" in text
    assert "page image not readable" in text
    assert re.search(r"\d+ page pictures could not be read", capsys.readouterr().out)


def test_report_of_a_single_system_has_no_differences(copy: Path) -> None:
    first = read_records(copy / "evaluate/rankings/first_stage.jsonl", Ranking)
    write_json(copy / "evaluate/results.json", score_rankings({"first_stage": first}, [], draws=50))
    page = Reader(write(copy, copy / "out"))
    assert "First stage: recall@1" in page.text
    assert "Differences" not in page.text
    assert not {"answers", "cost"} & set(page.values("id"))  # a first stage writes no completions
    assert {link[1:] for link in page.values("href") if link.startswith("#")} <= set(page.values("id"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read"),
        ("[]", "field questions is missing"),
        ('{"questions": 3}', "field samples is missing"),
    ],
)
def test_invalid_results_are_an_error(copy: Path, content: str, message: str) -> None:
    (copy / "evaluate/results.json").write_text(content)
    with pytest.raises(InputError, match=rf"results\.json: {message}"):
        write(copy, copy / "out")
    assert not (copy / "out").exists()


def test_folder_without_an_evaluation_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/evaluate/manifest\.json: no such file"):
        write(tmp_path / "nowhere", tmp_path / "out")


def test_a_colour_never_contradicts_the_corrected_p_value(copy: Path) -> None:
    path = copy / "evaluate/results.json"
    results = json.loads(path.read_text())
    for difference in results["differences"]:
        for value in difference.values():
            if isinstance(value, dict):
                value.update({"mean": 0.2, "low": 0.1, "high": 0.3, "p_holm": 0.125})
    write_json(path, results)
    unsure = write(copy, copy / "unsure")
    assert '<li class="up">' not in unsure
    assert "delta sure" not in unsure
    assert "differ significantly" in Reader(unsure).text.split("Results")[0]
    for difference in results["differences"]:
        for value in difference.values():
            if isinstance(value, dict):
                value["p_holm"] = 0.01
    write_json(path, results)
    sure = write(copy, copy / "sure")
    assert '<li class="unsure">' not in sure
    assert '<li class="up">' in sure


def test_a_folder_of_another_stage_is_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sft: .*/grpo is a folder of the stage grpo; give one of sft"):
        write(folders, tmp_path / "out", f"sft={folders / 'grpo'}")
    assert not (tmp_path / "out").exists()


def test_rankings_of_different_questions_are_an_error(copy: Path) -> None:
    path = copy / "evaluate/rankings/sft.jsonl"
    write_records(path, read_records(path, Ranking)[1:])
    with pytest.raises(InputError, match="sft and first_stage did not rank the same questions"):
        write(copy, copy / "out")


def test_invalid_log_is_an_error(copy: Path) -> None:
    make_training(copy / "sft", "sft")
    (copy / "sft/log_history.json").write_text('{"loss": 1}')
    with pytest.raises(InputError, match=r"log_history\.json: expected a list"):
        write(copy, copy / "out", f"sft={copy / 'sft'}")
