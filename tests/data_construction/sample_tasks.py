"""Small sets of questions on documents of four coloured pages, and helpers to run the traces stage on them."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from data_construction.traces import TracesStage, main
from mmr5_train.common.config import CONFIGS, validate
from mmr5_train.common.files import read_records, write_records
from mmr5_train.ranking.records import Candidate, Page, PageId, RankingTask, Skipped, Trace

COLORS = ("red", "green", "blue", "orange")


def make_data(folder: Path, questions: int = 3, described: bool = True, positives: tuple[int, ...] = (1,)) -> Path:
    """Writes train.jsonl, pages.jsonl and images/ for `questions` documents with four pages and one question."""
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


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
