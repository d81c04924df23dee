"""Runs a task of MTEB with several systems, with its score and paired intervals.

    python -m mmr5_train.mteb task=Vidore3HrBM25sReranking.v2 subsets=[english] \\
        'systems={grpo:outputs/grpo/model,qwen:{crossencoder:qwen3_vl_reranker_2b}}' out=outputs/mteb
    python -m mmr5_train.mteb task=MMDocIRT2ITRetrieval first_stage=mteb/baseline-bm25s top_k=20 …

A reranking task has its candidates. For a retrieval task, `first_stage` gives the best `top_k` pages: a model of
MTEB, which then ranks all pages, or the folder of the predictions of an earlier run of MTEB. The stage writes

- `data/`: the questions and the candidates' pages, in the form of `candidates`
- `evaluation/`: what `evaluate` writes: rankings, paired differences, costs. The same command resumes it.
- `mteb/<system>.json`: MTEB's result, and `results.json`: the main score of each system and subset

`python -m mmr5_train.report evaluation=…/evaluation` shows the systems side by side. MTEB counts the grade of a
relevant page in nDCG, if the task has grades; `evaluate` only whether it is relevant.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from tqdm import tqdm

from mmr5_train import evaluate
from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import (
    InputError,
    atomic_folder,
    check_settings,
    is_unfinished,
    open_output,
    read_records,
    write_json,
    write_manifest,
    write_records,
)
from mmr5_train.inference.processes import on_main_process, start_inference_processes
from mmr5_train.inference.systems import FIRST_STAGE, SystemsOptions
from mmr5_train.ranking.records import Candidate, Page, PageId, Ranking, RankingTask


class MtebStage(StageConfig, SystemsOptions):
    """`python -m mmr5_train.mteb` (configs/mteb.yaml)."""

    task: str = Field(description="a task as MTEB names it, e.g. Vidore3HrBM25sReranking.v2")
    subsets: list[str] | None = Field(default=None, description="subsets of the task, e.g. [english]; null: all")
    first_stage: str | None = Field(
        default=None, description="for a retrieval task: a model of MTEB, or a folder with its predictions"
    )
    top_k: int = Field(default=20, gt=0, description="candidates per question, of a retrieval task")
    limit: int | None = Field(default=None, gt=0, description="use only the first questions of each subset")


def main(config: MtebStage) -> None:
    start_inference_processes()
    data, evaluation = config.out / "data/heldout.jsonl", config.out / "evaluation"
    on_main_process(lambda: prepare_data(config, data.parent))
    if not on_main_process((evaluation / "results.json").is_file):
        evaluate.main(evaluation_stage(config, data, evaluation))
    on_main_process(lambda: write_scores(config, evaluation))


def prepare_data(config: MtebStage, data: Path) -> None:
    """Resumes the interrupted run in the output folder if its settings are the same, else starts a new one."""
    settings = config.model_dump(mode="json", exclude={"out", "overwrite"})
    path = config.out / "settings.json"
    if path.is_file() and is_unfinished(config.out, "mteb") and not config.overwrite:
        check_settings(config.out, json.loads(path.read_text(encoding="utf-8")), settings)
        return
    open_output(config.out, config.overwrite, stage="mteb")
    write_data(load_task(import_mteb(), config), data)
    write_json(path, settings)


def write_scores(config: MtebStage, evaluation: Path) -> None:
    """MTEB's results for the rankings of all systems, and the table of its main score."""
    mteb = import_mteb()
    task = load_task(mteb, config)
    scores = {}
    for name in (FIRST_STAGE, *config.systems):
        scores[name] = mteb_scores(mteb, task, name, evaluation / f"rankings/{name}.jsonl", config.out / "mteb")
    metric = task.metadata.main_score
    write_json(config.out / "results.json", {"task": config.task, "main_score": metric, "systems": scores})
    write_manifest(config.out, stage="mteb", config=config.model_dump(mode="json"))
    for name, by_subset in scores.items():
        print(f"  {name}: " + ", ".join(f"{subset} {score:.4f}" for subset, score in by_subset.items()))
    print(f"mteb: {metric} of {config.task}, computed by MTEB, in {config.out / 'results.json'}")


def import_mteb() -> Any:
    try:
        import mteb
    except ImportError:
        raise InputError("mteb is not installed: in the checkout, pip install '.[mteb]'") from None
    return mteb


def load_task(mteb: Any, config: MtebStage) -> Any:
    """The task with its data, as a reranking task, with at most `limit` questions in each subset."""
    try:
        task = mteb.get_task(config.task, hf_subsets=config.subsets)
    except KeyError as error:
        raise InputError(f"task: {error.args[0]}") from None
    task.load_data()
    for split_data in split_datas(task):
        if config.limit is not None:
            queries = split_data["queries"].select(range(min(config.limit, len(split_data["queries"]))))
            split_data["queries"] = queries
            relevant = split_data["relevant_docs"]
            split_data["relevant_docs"] = {query: relevant[query] for query in queries["id"]}
    if config.first_stage is None:
        if all(split_data["top_ranked"] for split_data in split_datas(task)):
            return task
        raise InputError(
            f"task: {config.task} is a retrieval task without candidates; give first_stage, e.g. "
            "first_stage=mteb/baseline-bm25s"
        )
    predictions = Path(config.first_stage)
    if not predictions.exists():
        predictions = config.out / "first_stage"
        if not predictions.exists():
            with atomic_folder(predictions) as folder:
                mteb.evaluate(mteb.get_model(config.first_stage), task, prediction_folder=folder, cache=None)
    task.convert_to_reranking(predictions, top_k=config.top_k)
    return task


def split_datas(task: Any) -> Iterator[dict[str, Any]]:
    for splits in task.dataset.values():
        yield from splits.values()


def write_data(task: Any, folder: Path) -> None:
    """Writes heldout.jsonl, pages.jsonl and the images of all candidates. Equal images are stored once."""
    images = folder / "images"
    images.mkdir(parents=True)
    tasks: list[RankingTask] = []
    pages: dict[PageId, Page] = {}
    for subset, splits in task.dataset.items():
        for split, split_data in splits.items():
            corpus, top_ranked = split_data["corpus"], split_data["top_ranked"]
            if "image" not in corpus.column_names:
                raise InputError(f"task: {task.metadata.name} has no page images")
            rows = {page: row for row, page in enumerate(corpus["id"])}
            for query in tqdm(split_data["queries"], desc=f"{subset} {split}", unit="question"):
                candidates = []
                for rank, corpus_id in enumerate(top_ranked[query["id"]]):
                    page_id = PageId(doc_name=f"{subset}/{split}/{corpus_id}", page=0)
                    if page_id not in pages:
                        pages[page_id] = write_page(corpus[rows[corpus_id]], page_id, subset, images)
                    candidates.append(
                        Candidate(**page_id.model_dump(), image=pages[page_id].image, score=float(-rank))
                    )
                positives = [page for page, grade in split_data["relevant_docs"][query["id"]].items() if grade > 0]
                tasks.append(
                    RankingTask(
                        query_id=f"{subset}/{split}/{query['id']}",
                        query=query["text"],
                        domain=subset,
                        candidates=tuple(candidates),
                        positives=tuple(PageId(doc_name=f"{subset}/{split}/{page}", page=0) for page in positives),
                    )
                )
    write_records(folder / "pages.jsonl", pages.values())
    write_records(folder / "heldout.jsonl", tasks)


def write_page(row: Mapping[str, Any], page_id: PageId, domain: str, images: Path) -> Page:
    """Stores a page's image, by its content, and returns its record."""
    stream = io.BytesIO()
    image = row["image"]
    image.save(stream, "PNG")
    name = f"{hashlib.sha256(stream.getvalue()).hexdigest()[:32]}.png"
    if not (images / name).exists():
        (images / name).write_bytes(stream.getvalue())
    return Page(
        **page_id.model_dump(),
        domain=domain,
        image=f"images/{name}",
        width=image.width,
        height=image.height,
        text=row.get("text") or "",
    )


def evaluation_stage(config: MtebStage, data: Path, out: Path) -> evaluate.EvaluateStage:
    """The stage that ranks the questions: `config`'s options of systems, on all questions."""
    shared = config.model_dump(include={*SystemsOptions.model_fields, "seed"}, exclude={"systems"})
    return evaluate.EvaluateStage(**shared, systems=config.systems, data=data, out=out)


def mteb_scores(mteb: Any, task: Any, name: str, rankings: Path, folder: Path) -> dict[str, float]:
    """MTEB's main score of each subset, for one system's rankings. Writes MTEB's result to `folder`."""
    from mmr5_train.integrations.mteb import RecordedRankings

    orders: dict[tuple[str, str], dict[str, Sequence[str]]] = {}
    for ranking in read_records(rankings, Ranking):
        subset, split, query = ranking.query_id.split("/", 2)
        pages = [page.doc_name.split("/", 2)[2] for page in ranking.ranked_pages(ranking.greedy)]
        orders.setdefault((subset, split), {})[query] = pages
    result = mteb.evaluate(RecordedRankings(f"mmr5/{name}", orders), task, cache=None, show_progress_bar=False)
    [task_result] = result.task_results
    folder.mkdir(parents=True, exist_ok=True)
    task_result.to_disk(folder / f"{name}.json")
    rows = [row for split_rows in task_result.scores.values() for row in split_rows]
    return {row["hf_subset"]: float(row["main_score"]) for row in rows}


if __name__ == "__main__":
    run_stage(main, MtebStage, "mteb")
