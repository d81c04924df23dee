from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pypdfium2
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from servers import RECITED, OpenAIServer, Reply, ScriptedServer, completion

from data_construction.traces import (
    PARTIAL,
    TracesStage,
    direction,
    failed_checks,
    label_word,
    main,
    named_pages,
)
from mmr5_train.config import CONFIGS, validate
from mmr5_train.ranking.files import InputError, read_manifest, read_records, write_records
from mmr5_train.ranking.records import Candidate, LocalId, Page, PageId, RankingTask, Skipped, Trace

KEY = "sk-secret-0123456789"
COLORS = ("red", "green", "blue", "orange")


def make_data(folder: Path, questions: int = 3, described: bool = True, positives: tuple[int, ...] = (1,)) -> Path:
    """train.jsonl, pages.jsonl and images/ for `questions` questions on a document of four pages each."""
    (folder / "images").mkdir(parents=True)
    tasks, pages = [], []
    for q in range(questions):
        name = f"doc {q}"
        shown = []
        for number, color in enumerate(COLORS):
            image = f"images/{q}-{number}.jpg"
            Image.new("RGB", (30, 40), color).save(folder / image)
            shown.append(Candidate(doc_name=name, page=number, image=image, score=9.0 - number))
            description = f"a {color} bar chart" if described else ""
            pages.append(
                Page(doc_name=name, page=number, domain="x", image=image, width=30, height=40,
                     text=f"Chart\nThis page is {color}.", description=description)
            )  # fmt: skip
        gold = tuple(PageId(doc_name=name, page=number) for number in positives)
        query = f"What is {COLORS[positives[0]]} in document {q}?"
        tasks.append(
            RankingTask(query_id=f"q{q}", query=query, domain="x", candidates=tuple(shown), positives=gold)
        )
    write_records(folder / "train.jsonl", tasks)
    write_records(folder / "pages.jsonl", pages)
    return folder / "train.jsonl"


def make_config(data: Path, out: Path, *overrides: str) -> TracesStage:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        config = compose("traces", [f"data='{data}'", f"out='{out}'", *overrides])
    return validate(TracesStage, OmegaConf.to_container(config, resolve=True))


def run(data: Path, out: Path, *overrides: str) -> list[Trace]:
    main(make_config(data, out, *overrides))
    return read_records(out / "traces.jsonl", Trace)


def skipped(out: Path) -> list[Skipped]:
    return read_records(out / "skipped.jsonl", Skipped, unique=None)


def by_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


# --- the offline teacher


def test_a_trace_says_what_is_on_each_page_in_prompt_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    traces = run(make_data(tmp_path / "data"), tmp_path / "out")
    assert [trace.query_id for trace in traces] == ["q0", "q1", "q2"]
    orders = set()
    for trace in traces:
        colors = [COLORS[page.page] for page in trace.shown]
        orders.add(tuple(colors))
        where = colors.index("green") + 1
        assert trace.positive_ids == (where,)
        assert trace.answer == (where, *(i for i in (1, 2, 3, 4) if i != where))
        assert trace.think.splitlines() == [
            f"Image {i}: a {color} bar chart, so it {'helps' if i == where else 'does not help'}."
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


def test_images_are_found_from_the_output_folder(tmp_path: Path):
    for trace in run(make_data(tmp_path / "data"), tmp_path / "some" / "out"):
        for page in trace.shown:
            with Image.open(tmp_path / "some" / "out" / page.image) as image:
                assert image.size == (30, 40)


def test_the_prompt_shows_the_pages_as_the_task_says(tmp_path: Path):
    data = make_data(tmp_path / "data")
    for task, trace in zip(read_records(data, RankingTask), run(data, tmp_path / "a", "seed=7"), strict=True):
        assert [page.id for page in trace.shown] == [page.id for page in task.prompted("shuffled", 7).shown]
    for trace in run(data, tmp_path / "b", "order=score"):
        assert [page.page for page in trace.shown] == [0, 1, 2, 3]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path):
    data = make_data(tmp_path / "data", questions=8)
    out = tmp_path / "out"
    run(data, out)
    first = by_bytes(out) | {"manifest.json": (out / "manifest.json").read_bytes()}
    run(data, out, "overwrite=true")
    second = by_bytes(out) | {"manifest.json": (out / "manifest.json").read_bytes()}
    assert {
        name: text.replace(b'"overwrite": true', b'"overwrite": false') for name, text in second.items()
    } == first
    run(data, tmp_path / "other", "seed=1")
    assert by_bytes(tmp_path / "other")["traces.jsonl"] != first["traces.jsonl"]


def test_refined_reasoning_is_two_sentences_on_local_ids(tmp_path: Path):
    for trace in run(make_data(tmp_path / "data", positives=(1, 2)), tmp_path / "out", "refine=true"):
        helping, others = trace.positive_ids, trace.answer[2:]
        colors = {i: COLORS[page.page] for i, page in enumerate(trace.shown, 1)}
        assert trace.think == (
            "Images {} and {} help: a {} bar chart; a {} bar chart. "
            "Images {} and {} do not help: a {} bar chart; a {} bar chart."
        ).format(*helping, *(colors[i] for i in helping), *others, *(colors[i] for i in others))
        assert all(note.endswith(("so it does not help.", "so it helps.")) for note in trace.notes)


def test_pages_without_a_known_content_are_quoted(tmp_path: Path):
    for trace in run(make_data(tmp_path / "data", described=False), tmp_path / "out"):
        helping = trace.notes[trace.positive_ids[0] - 1]
        assert helping == 'Under "Chart" the page says "This page is green.", on green, so it helps.'


def test_a_question_without_a_relevant_candidate_is_listed(tmp_path: Path):
    data = make_data(tmp_path / "data")
    tasks = read_records(data, RankingTask)
    lost = tasks[1].model_copy(update={"positives": (PageId(doc_name="doc 1", page=77),)})
    write_records(data, [tasks[0], lost, tasks[2]])
    assert [trace.query_id for trace in run(data, tmp_path / "out")] == ["q0", "q2"]
    (skip,) = skipped(tmp_path / "out")
    assert (skip.query_id, skip.reason) == ("q1", "no relevant page among the candidates")
    assert read_manifest(tmp_path / "out")["counts"]["skipped"] == {skip.reason: 1}


@pytest.mark.parametrize("refine", [False, True])
def test_or_it_is_explained_that_no_page_helps(tmp_path: Path, refine: bool):
    data = make_data(tmp_path / "data")
    (task, *_) = read_records(data, RankingTask)
    write_records(data, [task.model_copy(update={"positives": (PageId(doc_name="doc 0", page=77),)})])
    (trace,) = run(data, tmp_path / "out", "missed=keep", f"refine={refine}")
    assert trace.positive_ids == ()
    assert trace.answer == (1, 2, 3, 4)
    assert all(note.endswith("so it does not help.") for note in trace.notes)
    assert trace.think.startswith("Images 1, 2, 3 and 4 do not help: ") == refine


def test_every_question_of_the_real_slice_is_explained(tmp_path: Path, slice_folder: Path):
    """178 expert questions on real text layers: each relevant page with four others of its document."""
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
    for refine in ("false", "true"):
        traces = run(tmp_path / "train.jsonl", tmp_path / refine, f"refine={refine}")
        assert len(traces) == len(tasks) == 178
        assert max(len(note.split()) for trace in traces for note in trace.notes) <= 40
        assert (tmp_path / refine / "skipped.jsonl").read_text() == ""


# --- a vision model behind a server


@pytest.fixture
def openai_config(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TracesStage]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def make(data: Path, out: Path, *overrides: str) -> TracesStage:
        return make_config(data, out, "teacher=openai", "teacher.model=m", "teacher.attempts=2", *overrides)

    return make


def test_a_real_server_explains_every_page(
    openai_config: Callable[..., TracesStage],
    openai_server: OpenAIServer,
    reciting_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.setenv("OPENAI_BASE_URL", openai_server.base_url)
    data = make_data(tmp_path / "data", questions=2)
    for concurrency in (1, 4):
        out = tmp_path / str(concurrency)
        main(openai_config(data, out, f"teacher.model='{reciting_model}'", f"teacher.concurrency={concurrency}"))
        for trace in read_records(out / "traces.jsonl", Trace):
            assert trace.think == "\n".join(f"Image {i}: {RECITED}" for i in (1, 2, 3, 4))
        assert read_manifest(out)["counts"]["teacher"] == {"requests": 8}
    assert by_bytes(tmp_path / "1") == by_bytes(tmp_path / "4")


def scripted_teacher(number: int, body: dict[str, Any]) -> Reply:
    """Answers that depend on what is asked alone: right, wrong, leaking or failing, and slower or faster."""
    parts = body["messages"][1]["content"]
    text = parts[-1]["text"]
    document = next(q for q in range(30) if f"document {q}?" in text)
    helps = "This page is of use" in text
    delay = 0.05 * (document % 3)
    if len(parts) == 1:
        named = text.partition("why ")[2].partition(" can help")[0]
        return completion(f"{named} can help. The others can't.")._replace(delay=delay)
    if document == 3 and helps:
        return Reply(500, {"error": {"message": "no luck"}}, delay=delay)
    if document == 4:
        return completion("word " * 50)._replace(delay=0.0 if helps else 0.1)
    if document == 5:
        return completion("This page helps.")._replace(delay=delay)
    if document == 6:
        return completion("It is labelled relevant, so it helps." if helps else "Text, so it does not help.")
    if document == 7:
        return completion("" if helps else "word " * 50)._replace(delay=0.2 if helps else 0.0)
    return completion(f"It is chart {document}, so it {'helps' if helps else 'does not help'}.")._replace(
        delay=delay
    )


def test_what_fails_is_dropped_and_listed_the_same_whatever_the_concurrency(
    openai_config: Callable[..., TracesStage], scripted_server: ScriptedServer, tmp_path: Path
):
    scripted_server.script = scripted_teacher
    data = make_data(tmp_path / "data", questions=10)
    for concurrency in (1, 8):
        out = tmp_path / str(concurrency)
        main(openai_config(data, out, "refine=true", f"teacher.concurrency={concurrency}"))
    assert by_bytes(tmp_path / "1") == by_bytes(tmp_path / "8")
    out = tmp_path / "1"
    assert [trace.query_id for trace in read_records(out / "traces.jsonl", Trace)] == [
        "q0",
        "q1",
        "q2",
        "q8",
        "q9",
    ]
    reasons = {skip.query_id: skip.reason for skip in skipped(out)}
    first_page_helps = read_records(data, RankingTask)[7].prompted("shuffled", 42).local_positives == (1,)
    assert reasons == {
        "q3": "the teacher's server failed",
        "q4": "the teacher's answer was too long",
        "q5": "check direction",
        "q6": "check no_label_words",
        "q7": f"the teacher's answer was {'empty' if first_page_helps else 'too long'}",
    }
    counts = read_manifest(out)["counts"]
    assert counts["teacher"]["too_long"] == 8 + 6
    assert counts["teacher"]["empty"] == 2
    assert counts["teacher"]["retried_server_error"] == 1
    assert KEY not in "".join(path.read_text() for path in out.iterdir())


def test_a_run_that_is_stopped_keeps_its_finished_traces(
    openai_config: Callable[..., TracesStage], scripted_server: ScriptedServer, tmp_path: Path
):
    refused = Reply(401, {"error": {"message": f"expired: {KEY}"}})
    scripted_server.script = lambda number, body: completion("A chart.") if number < 10 else refused
    data, out = make_data(tmp_path / "data", questions=5), tmp_path / "out"
    with pytest.raises(
        InputError, match=r"refuses the key(.|\n)*2 finished traces are kept in .*partial"
    ) as caught:
        main(openai_config(data, out, "teacher.concurrency=1"))
    assert KEY not in str(caught.value)
    assert not (out / "traces.jsonl").exists()
    kept = read_records(out / PARTIAL, Trace)
    assert [trace.query_id for trace in kept] == ["q0", "q1"]
    assert (out / kept[0].shown[0].image).is_file()
    with pytest.raises(InputError, match="did not end"):
        read_manifest(out)
    scripted_server.replies(completion("A chart."))
    main(openai_config(data, out, "overwrite=true"))
    assert len(read_records(out / "traces.jsonl", Trace)) == 5


def test_a_server_that_answers_garbage_leaves_no_trace_and_says_why(
    openai_config: Callable[..., TracesStage], scripted_server: ScriptedServer, tmp_path: Path
):
    scripted_server.replies(Reply(body="<html>", headers={"Content-Type": "text/html"}))
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    with pytest.raises(
        InputError, match=r"none of 3 questions got a trace; the first, q0: .*not a chat completion"
    ):
        main(openai_config(data, out))
    assert len(skipped(out)) == 3
    assert not (out / "traces.jsonl").exists()


def test_a_corrupt_page_image_stops_the_run(
    openai_config: Callable[..., TracesStage], scripted_server: ScriptedServer, tmp_path: Path
):
    data = make_data(tmp_path / "data")
    (tmp_path / "data" / "images" / "1-2.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1-2\.jpg: not an image that can be read"):
        main(openai_config(data, tmp_path / "out"))


# --- wrong input


def test_a_missing_image_is_named_before_anything_is_written(tmp_path: Path):
    data = make_data(tmp_path / "data")
    (tmp_path / "data" / "images" / "1-2.jpg").unlink()
    with pytest.raises(InputError, match=r"train\.jsonl, question q1: page doc 1#2: no image .*1-2\.jpg; run the"):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_page_that_is_not_in_pages_jsonl_is_named(tmp_path: Path):
    data = make_data(tmp_path / "data")
    pages = tmp_path / "data" / "pages.jsonl"
    pages.write_text("".join(line for line in pages.open() if '"doc 2","page":3' not in line))
    with pytest.raises(InputError, match=r"question q2: page doc 2#3 is not in .*pages\.jsonl"):
        run(data, tmp_path / "out")


@pytest.mark.parametrize("name", ["train.jsonl", "pages.jsonl"])
def test_missing_empty_and_broken_files_are_named(tmp_path: Path, name: str):
    data = make_data(tmp_path / "data")
    file = tmp_path / "data" / name
    lines = file.read_text().splitlines()
    cases = {
        "no such file": None,
        "holds no": "",
        "line 2: not valid JSON": "\n".join([lines[0], lines[1][:40]]),
        "line 2: .* already stands in line 1": "\n".join([lines[0], lines[0]]),
        "line 1: field domain": lines[0].replace('"domain"', '"domian"'),
    }
    for match, text in cases.items():
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        with pytest.raises(InputError, match=f"{name}.*{match}"):
            run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_pages_file_can_be_given(tmp_path: Path):
    data = make_data(tmp_path / "data")
    (tmp_path / "data" / "pages.jsonl").rename(tmp_path / "elsewhere.jsonl")
    assert len(run(data, tmp_path / "out", f"pages='{tmp_path / 'elsewhere.jsonl'}'")) == 3


def test_the_data_folder_is_not_overwritten(tmp_path: Path):
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
def test_the_command_line_speaks_plainly(overrides: list[str], message: str, tmp_path: Path):
    command = [sys.executable, "-m", "data_construction.traces", f"out={tmp_path / 'out'}", *overrides]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent, env=os.environ, timeout=60)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_wrong_choice_names_the_choices(tmp_path: Path):
    with pytest.raises(InputError, match=r"order: Input should be 'score' or 'shuffled', found 'random'"):
        make_config(tmp_path, tmp_path, "order=random")


# --- checks


@pytest.mark.parametrize(
    ("note", "helps"),
    [
        ("a red bar chart, so it helps.", True),
        ("a red bar chart, so it does not help.", False),
        ("The table lists the revenue, which directly answers the question.", True),
        ("The page is relevant because it states the year.", True),
        ("It shows a map and does not answer the question.", False),
        ("It doesn’t contain anything useful about revenue.", False),
        ("It can't help since it is a cover page.", False),
        ("The page is about birds and irrelevant here.", False),
        ('It says "this does not help", which answers the question.', True),
        ("It shows a map.", None),
        ("It helps with names but does not answer the question.", None),
    ],
)
def test_the_direction_of_a_note(note: str, helps: bool | None):
    assert direction(note) is helps


@pytest.fixture(scope="module")
def config() -> TracesStage:
    return make_config(Path("train.jsonl"), Path("out"))


PAGE = Page(doc_name="d", page=0, domain="x", image="i", width=1, height=1, text="Positive results, by sector")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a red bar chart, so it helps.", None),
        ("It shows positive results.", None),
        ("It shows negative results.", "negative"),
        ("This is a positive page.", "positive page"),
        ("As the ground truth says, it helps.", "ground truth"),
        ("It is labelled relevant.", "labelled relevant"),
        ("The bar labelled 2015 is the highest.", None),
        ('It says "the label is negative".', None),
        ("I was told that it helps.", "was told"),
        ("The label is clear.", "label is"),
    ],
)
def test_words_that_give_the_label_away(text: str, found: str | None):
    told = label_word(text, "What grew?", [PAGE])
    assert told is None if found is None else found in str(told)


def test_words_of_the_question_give_nothing_away():
    assert label_word("It names the label.", "Who signed to the label?", [PAGE]) is None


def test_named_pages():
    assert named_pages("Image 2 helps. Images 1, 3 and 4 do not; nor do images 5 & 6.") == {1, 2, 3, 4, 5, 6}
    assert named_pages("No image of 12 pages helps.") == set()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, None),
        ({"notes": ["Text.", "Chart."]}, "one_note_a_page"),
        ({"notes": ["Text.", "", "Chart."]}, "one_note_a_page"),
        ({"notes": ["Text.", "Two\nlines.", "Chart."]}, "one_note_a_page"),
        ({"notes": ["Text.", "word " * 41, "Chart."]}, "short_notes"),
        ({"notes": ["Text, so it helps.", "Chart.", "Text."]}, "direction"),
        ({"notes": ["Text.", "A positive page.", "Text."]}, "no_label_words"),
        ({"think": "Image 1: <answer>[1]"}, "no_tags"),
        ({"think": "Image 1: </think>"}, "no_tags"),
        ({"answer": (1, 2, 3)}, "answer"),
        ({"answer": (2, 1)}, "answer"),
        ({"answer": (2, 1, 1)}, "answer"),
        ({"refine": True, "think": "Image 2 helps. Image 1 does not."}, None),
        ({"refine": True, "think": "Image 1 does not help."}, "names_pages"),
        ({"refine": True, "think": "Images 2 and 4 help."}, "names_pages"),
        ({"refine": True, "think": "Image 2 helps. " + "word " * 90}, "short_reasoning"),
        ({"refine": True, "think": "Image 2 is a positive page."}, "no_label_words"),
    ],
)
def test_each_check_finds_what_it_is_for(change: dict[str, Any], name: str | None, config: TracesStage):
    failed = failed_checks(
        "What?",
        [PAGE] * 3,
        change.get("notes", ["Text.", "Chart, so it helps.", "Text."]),
        change.get("think", "Image 1: Text."),
        tuple(LocalId(i) for i in change.get("answer", (2, 1, 3))),
        (LocalId(2),),
        config.model_copy(update={"refine": change.get("refine", False)}),
    )
    assert next((found for found, _ in failed), None) == name
