from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pypdfium2
import pytest
from PIL import Image
from sample_tasks import COLORS, file_bytes, make_config, make_data, run, skipped

from mmr5_train.common.config import CONFIGS
from mmr5_train.common.files import InputError, read_manifest, read_records, write_records
from mmr5_train.ranking.notes import remove_verdict
from mmr5_train.ranking.records import Candidate, Page, PageId, RankingTask

# --- the offline teacher


def test_notes_describe_pages_in_prompt_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    traces = run(make_data(tmp_path / "data"), tmp_path / "out")
    assert [trace.query_id for trace in traces] == ["q0", "q1", "q2"]
    orders = set()
    for trace in traces:
        colors = [COLORS[page.page] for page in trace.shown]
        orders.add(tuple(colors))
        relevant = colors.index("green") + 1
        assert trace.positive_ids == (relevant,)
        assert trace.answer == (relevant, *(i for i in (1, 2, 3, 4) if i != relevant))
        assert trace.think.splitlines() == [
            f"Image {i}: a {color} bar chart, so it {'helps' if i == relevant else 'does not help'}."
            for i, color in enumerate(colors, 1)
        ]
    assert len(orders) > 1
    file = tmp_path / "out" / "traces.jsonl"
    assert capsys.readouterr().out == (
        f"traces: 3 of 3 questions explained by the extractive teacher (0 skipped) → {file}\n"
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest["counts"] == {"questions": 3, "traces": 3, "skipped": {}, "teacher": {}}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "skipped.jsonl",
        "traces.jsonl",
    ]


def test_image_paths_are_relative_to_the_output_folder(tmp_path: Path):
    for trace in run(make_data(tmp_path / "data"), tmp_path / "some" / "out"):
        for page in trace.shown:
            with Image.open(tmp_path / "some" / "out" / page.image) as image:
                assert image.size == (30, 40)


def test_pages_are_in_the_prompt_order_of_the_task(tmp_path: Path):
    data = make_data(tmp_path / "data")
    for task, trace in zip(read_records(data, RankingTask), run(data, tmp_path / "a", "seed=7"), strict=True):
        assert [page.id for page in trace.shown] == [page.id for page in task.in_prompt_order("shuffled", 7).shown]
    for trace in run(data, tmp_path / "b", "order=score"):
        assert [page.page for page in trace.shown] == [0, 1, 2, 3]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path):
    data = make_data(tmp_path / "data", questions=8)
    out = tmp_path / "out"
    run(data, out)
    first = file_bytes(out) | {"manifest.json": (out / "manifest.json").read_bytes()}
    run(data, out, "overwrite=true")
    second = file_bytes(out) | {"manifest.json": (out / "manifest.json").read_bytes()}
    assert {
        name: text.replace(b'"overwrite": true', b'"overwrite": false') for name, text in second.items()
    } == first
    run(data, tmp_path / "other", "seed=1")
    assert file_bytes(tmp_path / "other")["traces.jsonl"] != first["traces.jsonl"]


def test_refined_reasoning_has_two_sentences(tmp_path: Path):
    for trace in run(make_data(tmp_path / "data", positives=(1, 2)), tmp_path / "out", "refine=true"):
        helping, others = trace.positive_ids, trace.answer[2:]
        colors = {i: COLORS[page.page] for i, page in enumerate(trace.shown, 1)}
        assert trace.think == (
            "Images {} and {} help: a {} bar chart; a {} bar chart. "
            "Images {} and {} do not help: a {} bar chart; a {} bar chart."
        ).format(*helping, *(colors[i] for i in helping), *others, *(colors[i] for i in others))
        assert all(note.endswith(("so it does not help.", "so it helps.")) for note in trace.notes)


def test_pages_without_description_are_quoted(tmp_path: Path):
    for trace in run(make_data(tmp_path / "data", described=False), tmp_path / "out"):
        helping = trace.notes[trace.positive_ids[0] - 1]
        assert helping == 'Under "Chart" the page says "This page is green.", on green, so it helps.'


def test_question_without_relevant_candidate_is_skipped(tmp_path: Path):
    data = make_data(tmp_path / "data")
    tasks = read_records(data, RankingTask)
    unanswerable = tasks[1].model_copy(update={"positives": (PageId(doc_name="doc 1", page=77),)})
    write_records(data, [tasks[0], unanswerable, tasks[2]])
    assert [trace.query_id for trace in run(data, tmp_path / "out")] == ["q0", "q2"]
    (skip,) = skipped(tmp_path / "out")
    assert (skip.query_id, skip.reason) == ("q1", "no relevant page among the candidates")
    assert read_manifest(tmp_path / "out")["counts"]["skipped"] == {skip.reason: 1}


@pytest.mark.parametrize("refine", [False, True])
def test_question_without_relevant_candidate_can_be_kept(tmp_path: Path, refine: bool):
    data = make_data(tmp_path / "data")
    (task, *_) = read_records(data, RankingTask)
    write_records(data, [task.model_copy(update={"positives": (PageId(doc_name="doc 0", page=77),)})])
    (trace,) = run(data, tmp_path / "out", "missed=keep", f"refine={refine}")
    assert trace.positive_ids == ()
    assert trace.answer == (1, 2, 3, 4)
    assert all(note.endswith("so it does not help.") for note in trace.notes)
    assert trace.think.startswith("Images 1, 2, 3 and 4 do not help: ") == refine


def test_all_questions_of_the_mmdocir_slice_get_traces(tmp_path: Path, slice_folder: Path):
    """178 expert questions on real text layers, each with a relevant page and four other pages of its document."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 40)).save(tmp_path / "images" / "page.jpg")
    tasks: list[RankingTask] = []
    pages: dict[PageId, Page] = {}
    for line in (slice_folder / "MMDocIR_annotations.jsonl").open(encoding="utf-8"):
        document = json.loads(line)
        name = document["doc_name"].removesuffix(".pdf")
        (file,) = (slice_folder / "documents").glob(f"{name}*")
        with pypdfium2.PdfDocument(file) as pdf:
            for k, question in enumerate(document["questions"]):
                gold = question["page_id"]
                others = [number for number in range(len(pdf)) if number not in gold]
                numbers = [*gold[:1], *others[k : k + 4]]
                for number in numbers:
                    page = PageId(doc_name=name, page=number)
                    if page not in pages:
                        text = pdf[number].get_textpage().get_text_range()
                        pages[page] = Page(**page.model_dump(), domain="x", image="images/page.jpg", width=30,
                                           height=40, text=text)  # fmt: skip
                shown = [Candidate(doc_name=name, page=n, image="images/page.jpg", score=-n) for n in numbers]
                positives = tuple(PageId(doc_name=name, page=n) for n in gold)
                tasks.append(RankingTask(query_id=f"{name}/{k}", query=question["Q"], domain=document["domain"],
                                         candidates=tuple(shown), positives=positives))  # fmt: skip
    write_records(tmp_path / "train.jsonl", tasks)
    write_records(tmp_path / "pages.jsonl", pages.values())
    readable = [t.query_id for t in tasks if all(pages[c.id].text.strip() for c in t.candidates)]
    for refine in ("false", "true"):
        traces = run(tmp_path / "train.jsonl", tmp_path / refine, f"refine={refine}")
        assert len(tasks) == 178
        assert [trace.query_id for trace in traces] == readable
        assert max(len(remove_verdict(note).split()) for trace in traces for note in trace.notes) <= 40
        others = skipped(tmp_path / refine)
        assert {s.query_id for s in others} == {task.query_id for task in tasks} - set(readable)
        assert {s.reason for s in others} == {"page without text"}


# --- invalid input


def test_missing_image_raises_before_the_output_is_created(tmp_path: Path):
    data = make_data(tmp_path / "data")
    (tmp_path / "data" / "images" / "1-2.jpg").unlink()
    with pytest.raises(InputError, match=r"train\.jsonl, question q1: page doc 1#2: no image .*1-2\.jpg; run the"):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_candidate_missing_in_pages_file_raises(tmp_path: Path):
    data = make_data(tmp_path / "data")
    pages = tmp_path / "data" / "pages.jsonl"
    pages.write_text("".join(line for line in pages.open() if '"doc 2","page":3' not in line))
    with pytest.raises(InputError, match=r"question q2: page doc 2#3 is not in .*pages\.jsonl"):
        run(data, tmp_path / "out")


@pytest.mark.parametrize("name", ["train.jsonl", "pages.jsonl"])
def test_missing_empty_and_invalid_files_raise(tmp_path: Path, name: str):
    data = make_data(tmp_path / "data")
    file = tmp_path / "data" / name
    lines = file.read_text().splitlines()
    cases = {
        "no such file": None,
        "contains no": "",
        "line 2: not valid JSON": "\n".join([lines[0], lines[1][:40]]),
        "line 2: .* is already in line 1": "\n".join([lines[0], lines[0]]),
        "line 1: field domain": lines[0].replace('"domain"', '"domian"'),
    }
    for match, text in cases.items():
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        with pytest.raises(InputError, match=f"{name}.*{match}"):
            run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pages_file_can_be_configured(tmp_path: Path):
    data = make_data(tmp_path / "data")
    (tmp_path / "data" / "pages.jsonl").rename(tmp_path / "elsewhere.jsonl")
    assert len(run(data, tmp_path / "out", f"pages='{tmp_path / 'elsewhere.jsonl'}'")) == 3


def test_input_folder_is_not_overwritten(tmp_path: Path):
    data = make_data(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text('{"finished": true}')
    with pytest.raises(InputError, match="which this stage reads"):
        run(data, tmp_path / "data", "overwrite=true")
    assert data.is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=nowhere/train.jsonl"], "error: nowhere/train.jsonl: no such file"),
        (["teacher=openai", "teacher.concurency=2"], "did you mean concurrency?"),
    ],
)
def test_command_line_errors_are_short(overrides: list[str], message: str, tmp_path: Path):
    command = [sys.executable, "-m", "data_construction.traces", f"out={tmp_path / 'out'}", *overrides]
    completed = subprocess.run(
        command, capture_output=True, text=True, cwd=CONFIGS.parent, env=os.environ, timeout=60
    )
    assert completed.returncode != 0
    assert message in completed.stderr
    assert "Traceback" not in completed.stderr


def test_error_lists_valid_choices(tmp_path: Path):
    with pytest.raises(InputError, match=r"order: Input should be 'score' or 'shuffled', found 'random'"):
        make_config(tmp_path, tmp_path, "order=random")
