"""Evaluation and training folders for tests: drawn page images, and random rankings of a given skill."""

from __future__ import annotations

import random
from pathlib import Path

from data_construction.corpus.drawing import draw_page
from data_construction.corpus.synthetic_documents import make_document
from mmr5_train.common.files import read_records, write_json, write_manifest, write_records
from mmr5_train.evaluation.scoring import score_rankings
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.records import (
    Candidate,
    LocalId,
    ModelAnswer,
    Page,
    PageId,
    Ranking,
    RankingTask,
    rebase_images,
)

SKILL = {"sft": 0.5, "sft+grpo": 0.75}  # probability of a correct verdict on a page


def make_data(folder: Path, questions: int, candidates: int = 5, seed: int = 0) -> list[RankingTask]:
    """Writes heldout.jsonl, pages.jsonl and page images of synthetic documents. Returns the tasks."""
    rng = random.Random(seed)
    pages: list[Page] = []
    tasks: list[RankingTask] = []
    (folder / "images").mkdir(parents=True)
    index = 0
    while len(tasks) < questions:
        document = make_document(index, seed)
        index += 1
        name = document.doc_name
        for number, content in enumerate(document.pages):
            image = f"images/{name}_{number}.jpg"
            draw_page(content).save(folder / image, quality=85)
            pages.append(
                Page(doc_name=name, page=number, domain=document.domain, image=image, width=600, height=800,
                     text=content.text, description=content.description)
            )  # fmt: skip
        for k, question in enumerate(document.questions):
            numbers = list(range(len(document.pages)))
            # The first relevant page is usually a candidate, but rarely the first one.
            rng.shuffle(numbers)
            if rng.random() < 0.9:
                numbers.remove(question["page_id"][0])
                numbers.insert(rng.choice((0, 0, 1, 2, 3, 4)), question["page_id"][0])
            shown = [Candidate(doc_name=name, page=n, image=f"images/{name}_{n}.jpg", score=float(-i))
                    for i, n in enumerate(numbers[:candidates])]  # fmt: skip
            tasks.append(
                RankingTask(query_id=f"{name}/{k}", query=str(question["Q"]), domain=document.domain,
                            question_types=tuple(type_names(question["type"])), candidates=tuple(shown),
                            positives=tuple(PageId(doc_name=name, page=n) for n in question["page_id"]))
            )  # fmt: skip
    write_records(folder / "pages.jsonl", pages)
    write_records(folder / "heldout.jsonl", tasks[:questions])
    return tasks[:questions]


def type_names(types: object) -> list[str]:
    """The names in "['Chart']"."""
    return str(types).strip("[]").replace("'", "").split(", ")


def make_answer(
    task: RankingTask, descriptions: dict[PageId, str], skill: float, rng: random.Random
) -> ModelAnswer:
    """A completion whose descriptions and verdicts are correct with a probability that grows with `skill`."""
    relevant = set(task.positives)
    notes, helpful = [], []
    for i, page in enumerate(task.candidates, 1):
        description = descriptions[page.id] if rng.random() < 0.5 + skill / 2 else "a purple line chart"
        helps = (page.id in relevant) == (rng.random() < 0.6 + 0.4 * skill)
        notes.append(f"Image {i}: {description}, so it {'helps' if helps else 'does not help'}.")
        if helps:
            helpful.append(LocalId(i))
    n = len(task.candidates)
    order = helpful + [LocalId(i) for i in range(1, n + 1) if i not in helpful]
    if rng.random() < 0.06:
        text = render_completion("\n".join(notes), [*order[:-1], order[0]])
        return ModelAnswer(completion=text, order=tuple(order), defects=("duplicates", "missing_ids"), tokens=80)
    text = render_completion("\n".join(notes), order)
    return ModelAnswer(completion=text, order=tuple(order), tokens=70 + rng.randint(0, 20))


def make_rankings(folder: Path, questions: int = 60, samples: int = 4, seed: int = 0) -> dict[str, list[Ranking]]:
    """Rankings of three systems over data generated in `folder`, with image paths relative to `folder`."""
    tasks = make_data(folder, questions, seed=seed)
    pages = read_records(folder / "pages.jsonl", Page, unique=None)
    descriptions = {page.id: page.description for page in pages}
    rng = random.Random(seed)
    rankings: dict[str, list[Ranking]] = {"first_stage": [], **{system: [] for system in SKILL}}
    for task in tasks:
        fields = task.model_dump(exclude={"candidates"}) | {"shown": task.candidates}
        first = ModelAnswer(completion="", order=tuple(LocalId(i) for i in range(1, len(task.candidates) + 1)))
        rankings["first_stage"].append(Ranking(system="first_stage", greedy=first, **fields))
        for system, skill in SKILL.items():
            answers = [make_answer(task, descriptions, skill - 0.1 * bool(k), rng) for k in range(samples + 1)]
            rankings[system].append(
                Ranking(system=system, greedy=answers[0], samples=tuple(answers[1:]), **fields)
            )
    return rankings


def make_evaluation(
    folder: Path, questions: int = 60, seed: int = 0, draws: int = 500
) -> dict[str, list[Ranking]]:
    """Writes a folder with the files of the evaluate stage. Returns the rankings."""
    rankings = make_rankings(folder, questions, seed=seed)
    pages = read_records(folder / "pages.jsonl", Page, unique=None)
    for system, ranked in rankings.items():
        write_records(folder / "rankings" / f"{system}.jsonl", rebase_images(ranked, folder, folder / "rankings"))
    write_json(folder / "results.json", score_rankings(rankings, pages, draws=draws))
    config = {"data": "outputs/data/heldout.jsonl", "samples": 4, "temperature": 1.0, "seed": seed}
    write_manifest(
        folder, stage="evaluate", config=config, counts={"questions": questions, "systems": len(rankings)}
    )
    return rankings


def make_training(folder: Path, stage: str, steps: int = 120, seed: int = 0) -> None:
    """Writes log_history.json and manifest.json of a training stage."""
    rng = random.Random(seed)
    history: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        t = step / steps
        common = {
            "epoch": t,
            "step": step,
            "learning_rate": 1e-4 * (1 - t),
            "grad_norm": 1 + rng.random(),
        }
        if stage == "sft":
            loss = 0.05 + 2.5 * 2.718 ** (-6 * t) + 0.05 * rng.random()
            history.append({"loss": loss, "mean_token_accuracy": 1 - loss / 3, "entropy": loss * 0.8, **common})
            continue
        rerank = 0.45 + 0.25 * t + 0.12 * rng.random()
        history.append(
            {
                "loss": 0.01 * rng.gauss(0, 1),
                "reward": rerank + 0.9,
                "reward_std": 0.3 - 0.1 * t,
                "rewards/reranking/mean": rerank,
                "rewards/permutation/mean": 0.9 + 0.08 * t,
                "entropy": 0.03 - 0.015 * t + 0.003 * rng.random(),
                "kl": 0.02 * t + 0.003 * rng.random(),
                "completions/mean_length": 80 + 3 * rng.random(),
                "defects/duplicates": 0.04 * (1 - t) + 0.01 * rng.random(),
                "defects/missing_ids": 0.05 * (1 - t) + 0.01 * rng.random(),
                **common,
            }
        )
    history.append({"train_runtime": 12.0, "train_loss": 0.3, "epoch": 1.0, "step": steps})
    folder.mkdir(parents=True)
    write_json(folder / "log_history.json", history)
    config = {"out": str(folder), "seed": 42, "model": {"path": "tiny"}, "learning_rate": 1e-4}
    counts = {"traces" if stage == "sft" else "tasks": 3000, "steps": steps, "trained_parameters": 912_640}
    write_manifest(folder, stage=stage, config=config, counts=counts)
