"""MTEB's code on small tasks in the form of its data sets: our reranker, a CrossEncoder and BM25."""

import json
from pathlib import Path

import mteb as mteb_package
import numpy as np
import pytest
from datasets import Dataset, Features, Image, Sequence, Value
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.models_protocols import SearchProtocol
from tiny_qwen3 import write_qwen3

from data_construction.corpus.drawing import draw_page
from data_construction.corpus.synthetic_documents import make_document
from mmr5_train import Reranker, report
from mmr5_train import mteb as mteb_stage
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_records
from mmr5_train.integrations.mteb import MtebReranker, RecordedRankings, strictly_descending
from mmr5_train.mteb import MtebStage, main
from mmr5_train.ranking.records import Ranking

LANGUAGES = {"english": ["eng-Latn"], "french": ["fra-Latn"]}
TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n{% for part in message.content -%}"
    "{%- if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif -%}"
    "{%- endfor -%}<|im_end|>\n{% endfor -%}<|im_start|>assistant\nso it"
)


def write_task_data(folder: Path, candidates: int | None) -> None:
    """A data set in the form of MTEB's: a configuration for each part and language."""
    pages = [*make_document(0, 0).pages, *make_document(1, 0).pages][:12]
    questions = make_document(0, 0).questions[:4]
    features = Features({"id": Value("string"), "image": Image(), "text": Value("string")})
    corpus = Dataset.from_dict(
        {
            "id": [f"page-{i}" for i in range(len(pages))],
            "image": [draw_page(page) for page in pages],
            "text": [f"{page.text} page{i}" for i, page in enumerate(pages)],
        },
        features=features,
    )
    queries = Dataset.from_dict(
        {
            "id": [f"q{i}" for i in range(len(questions))],
            "text": [f"{question['Q']} page{question['page_id'][0]}" for question in questions],
        }
    )
    relevant = [
        (f"q{i}", f"page-{page}", 1) for i, question in enumerate(questions) for page in question["page_id"]
    ]
    qrels = Dataset.from_dict(
        {
            "query-id": [row[0] for row in relevant],
            "corpus-id": [row[1] for row in relevant],
            "score": [row[2] for row in relevant],
        }
    )
    parts = {"corpus": corpus, "queries": queries, "qrels": qrels}
    if candidates:
        rng = np.random.default_rng(0)
        parts["top_ranked"] = Dataset.from_dict(
            {
                "query-id": [f"q{i}" for i in range(len(questions))],
                "corpus-ids": [
                    [f"page-{page}" for page in rng.permutation(len(pages))[:candidates]] for _ in questions
                ],
            },
            features=Features({"query-id": Value("string"), "corpus-ids": Sequence(Value("string"))}),
        )
    lines = ["---", "configs:"]
    for language in LANGUAGES:
        for part, data in parts.items():
            path = f"{language}-{part}/test.parquet"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            data.to_parquet(str(folder / path))
            lines += [f"- config_name: {language}-{part}", "  data_files:", "  - split: test", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def make_task(folder: Path, name: str, kind: str) -> type[AbsTaskRetrieval]:
    metadata = TaskMetadata(
        name=name, description="Synthetic pages.", reference="https://example.org",
        dataset={"path": str(folder), "revision": "main"}, type=kind, category="t2it", eval_splits=["test"],
        eval_langs=LANGUAGES, main_score="ndcg_at_10", date=("2026-01-01", "2026-01-02"), domains=["Academic"],
        task_subtypes=["Image Text Retrieval"], license="cc-by-4.0", annotations_creators="derived", dialect=[],
        modalities=["text", "image"], sample_creation="created", bibtex_citation="",
    )  # fmt: skip
    return type(name, (AbsTaskRetrieval,), {"metadata": metadata})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("reranking", "retrieval")}
    write_task_data(made["reranking"], candidates=6)
    write_task_data(made["retrieval"], candidates=None)
    return made


@pytest.fixture
def tasks(folders, monkeypatch):
    """MTEB finds the made-up tasks by their names."""
    made = {
        "SmallReranking": make_task(folders["reranking"], "SmallReranking", "Reranking"),
        "SmallRetrieval": make_task(folders["retrieval"], "SmallRetrieval", "DocumentUnderstanding"),
    }
    get_task = mteb_package.get_task

    def find(name, hf_subsets=None, **options):
        if name not in made:
            return get_task(name, hf_subsets=hf_subsets, **options)
        return made[name]().filter_languages(languages=None, hf_subsets=hf_subsets)

    monkeypatch.setattr(mteb_package, "get_task", find)
    return made


@pytest.fixture(scope="module")
def reranker():
    return Reranker("tiny", mode="logits")


def test_the_reranker_is_a_search_model_of_mteb(tasks, reranker):
    model = MtebReranker(reranker, "org/reranker", batch_size=3)
    assert isinstance(model, SearchProtocol)
    result = mteb_package.evaluate(model, tasks["SmallReranking"](), cache=None, show_progress_bar=False)
    [task_result] = result.task_results
    scores = {row["hf_subset"]: row["main_score"] for row in task_result.scores["test"]}
    assert set(scores) == set(LANGUAGES)
    assert scores["english"] == scores["french"] > 0.2
    with pytest.raises(InputError, match="this is a retrieval task"):
        mteb_package.evaluate(model, tasks["SmallRetrieval"](), cache=None, show_progress_bar=False)


def test_scores_have_no_ties():
    scores = strictly_descending(["c", "a", "b"])
    assert list(scores) == ["c", "a", "b"]
    assert scores["c"] > scores["a"] > scores["b"] > 0
    with pytest.raises(InputError, match="organization/model"):
        RecordedRankings("reranker", {})


def stage(out: Path, *overrides: str) -> MtebStage:
    return compose_stage(MtebStage, "mteb", [f"out={out}", "batch_size=4", *overrides])


def test_systems_are_scored_by_mteb_and_compared_with_intervals(tasks, tmp_path, capsys):
    cross = write_qwen3(tmp_path / "qwen3")
    (tmp_path / "template.txt").write_text(TEMPLATE)
    systems = {
        "ours": {"checkpoint": "tiny", "mode": "logits"},
        "cross": {
            "crossencoder": {
                "path": str(cross), "dtype": "float32", "true_token": " helps", "false_token": " does",
                "chat_template": TEMPLATE,
            }
        },
    }  # fmt: skip
    config = stage(tmp_path / "out", "task=SmallReranking").model_copy(update={"systems": parse_systems(systems)})
    main(config)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["main_score"] == "ndcg_at_10"
    assert list(results["systems"]) == ["first_stage", "ours", "cross"]
    ours = json.loads((tmp_path / "out/evaluation/results.json").read_text())
    rows = {row["system"]: row for row in ours["rows"]}
    for name, by_subset in results["systems"].items():
        mteb_mean = np.mean(list(by_subset.values()))
        assert rows[name]["ndcg@10"] == pytest.approx(mteb_mean, abs=1e-4), name
        recall = recall_of(tmp_path / f"out/mteb/{name}.json", "recall_at_3")
        assert rows[name]["recall@3"] == pytest.approx(recall, abs=1e-4), name
    live = mteb_package.evaluate(
        MtebReranker(Reranker("tiny", mode="logits"), "org/reranker"), tasks["SmallReranking"](), cache=None,
        show_progress_bar=False,
    )  # fmt: skip
    live_scores = {row["hf_subset"]: row["main_score"] for row in live.task_results[0].scores["test"]}
    assert live_scores == pytest.approx(results["systems"]["ours"])
    assert "computed by MTEB" in capsys.readouterr().out
    report.main(
        compose_stage(
            report.ReportStage, "report", [f"evaluation={tmp_path}/out/evaluation", f"out={tmp_path}/report"]
        )
    )
    page = (tmp_path / "report/report.html").read_text()
    assert all(name in page for name in systems)
    with pytest.raises(InputError, match="is not empty"):
        main(config)


def parse_systems(systems):
    from mmr5_train.inference.systems import System

    return {name: System(**fields) for name, fields in systems.items()}


def recall_of(path, name):
    scores = json.loads(path.read_text())["scores"]["test"]
    return np.mean([row[name] for row in scores])


def test_a_retrieval_task_gets_candidates_from_bm25(tasks, tmp_path):
    overrides = [
        "task=SmallRetrieval",
        "subsets=[english]",
        "top_k=5",
        "limit=3",
        "systems={ours:{checkpoint:tiny,mode:logits}}",
    ]
    with pytest.raises(InputError, match="a retrieval task without candidates; give first_stage"):
        main(stage(tmp_path / "none", *overrides))
    main(stage(tmp_path / "out", *overrides, "first_stage=mteb/baseline-bm25s"))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["systems"]["ours"]) == ["english"]
    assert results["systems"]["first_stage"]["english"] > 0.5, "each question names a word of its page"
    rankings = read_records(tmp_path / "out/evaluation/rankings/ours.jsonl", Ranking)
    assert [len(ranking.shown) for ranking in rankings] == [5, 5, 5]


def test_an_interrupted_run_resumes_with_the_same_settings_only(tasks, tmp_path, monkeypatch):
    overrides = ["task=SmallReranking", "systems={ours:{checkpoint:tiny,mode:logits}}"]
    scored = mteb_stage.mteb_scores
    monkeypatch.setattr(mteb_stage, "mteb_scores", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main(stage(tmp_path / "out", *overrides))
    written = (tmp_path / "out/evaluation/rankings/ours.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(mteb_stage, "mteb_scores", scored)
    with pytest.raises(InputError, match="contains a stopped run with limit None, but this run has 2"):
        main(stage(tmp_path / "out", *overrides, "limit=2"))
    main(stage(tmp_path / "out", *overrides))
    assert (tmp_path / "out/evaluation/rankings/ours.jsonl").stat().st_mtime_ns == written


def test_tasks_that_the_documents_name_exist_in_mteb():
    names = ("MMDocIRT2IRetrieval", "MMDocIRT2ITRetrieval", "Vidore3HrBM25sReranking.v2")
    assert [mteb_package.get_task(name).metadata.name for name in names] == list(names)
    with pytest.raises(InputError, match="task: "):
        mteb_stage.load_task(mteb_package, stage(Path("x"), "task=NoSuchTask"))
