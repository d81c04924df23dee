"""The tables command: measured rows in the published tables."""

import json

import pytest
from html_reader import Reader
from sample_runs import make_evaluation

from mmr5_train import tables
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    for seed, name in enumerate(("colqwen", "bm25")):
        make_evaluation(root / name, questions=12, seed=seed, draws=100)
    return root


def run(folder, out, *overrides):
    arguments = [f"evaluations={{ColQwen: {folder}/colqwen, BM25: {folder}/bm25}}", f"out={out}", *overrides]
    tables.main(compose_stage(tables.TablesStage, "tables", arguments))


def test_markdown_and_html_hold_measured_and_published_figures(folder, tmp_path, capsys):
    run(folder, tmp_path / "out", "rows={sft: SFT only, sft+grpo: MM-R5}")
    output = capsys.readouterr().out
    text = (tmp_path / "out/tables.md").read_text()
    page = Reader((tmp_path / "out/tables.html").read_text())
    assert text in output
    assert "6 measured rows, 3 with a published counterpart" in output
    assert read_manifest(tmp_path / "out")["counts"] == {"measured": 6, "beside_published": 3}
    for first_stage in ("ColQwen", "BM25"):
        results = json.loads((folder / first_stage.lower() / "results.json").read_text())
        for row in results["rows"]:
            ends = row["macro"]["intervals"]["recall@1"]
            value = f"{row['macro']['recall@1']:.4f}"
            assert f"{value} [{ends['low']:.4f}, {ends['high']:.4f}]" in text
            assert f"{value} {ends['low']:.4f} – {ends['high']:.4f}" in page.text
    assert "ColQwen + MM-R5 published 0.6951 0.8520" in page.text
    measured = "ColQwen + sft+grpo measured on 12 questions measured − published"
    assert page.text.index("ColQwen + MM-R5 published") < page.text.index(measured)
    assert text.count("| difference |") == 3
    assert "treated as exact" in page.text
    assert page.text.endswith("This file is self-contained and needs no network.")


def test_tables_of_other_papers_stand_apart(folder, tmp_path):
    run(folder, tmp_path / "out")
    text = (tmp_path / "out/tables.md").read_text()
    page = Reader((tmp_path / "out/tables.html").read_text())
    own, *others = text.split("\n## ")
    assert "ColQwen + ZipRerank" not in own
    assert [part.partition(" ")[0] for part in others] == ["ZipRerank", "DocReranker", "Pointwise"]
    assert "| ColQwen + ZipRerank | 0.661 | 0.849 | 0.36 |" in others[0]
    assert "| ColQwen | 0.604 | 0.79 | – |" in others[0]
    assert "must not be mixed" in others[0]
    assert "ColQwen + ZipRerank published 0.661 0.849 0.36" in page.text


def test_output_is_deterministic(folder, tmp_path):
    for name in ("one", "two"):
        run(folder, tmp_path / name)
    for name in ("tables.md", "tables.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_invalid_input_is_an_error(folder, tmp_path):
    with pytest.raises(InputError, match=r"rows\.sft: no published row is called 'nothing'"):
        run(folder, tmp_path / "out", "rows={sft: nothing}")
    with pytest.raises(InputError, match=r"evaluations: .*give at least one, such as"):
        compose_stage(tables.TablesStage, "tables", [])
    with pytest.raises(InputError, match=r"nowhere/colqwen/manifest\.json: no such file"):
        run(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
