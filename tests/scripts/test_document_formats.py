import re

import document_formats
import pytest
from document_formats import ROOT, fields, main, record, render, returns

from mmr5_train.ranking.records import Record


def test_document_is_current():
    assert main(["--check"]) == 0


def test_check_fails_if_a_record_has_changed(tmp_path, monkeypatch, capsys):
    target = tmp_path / "data_formats.md"
    target.write_text(render().replace("`query_id`", "`question_id`"), encoding="utf-8")
    monkeypatch.setattr(document_formats, "TARGET", target)
    assert main(["--check"]) == 1
    assert "run python scripts/document_formats.py" in capsys.readouterr().err
    assert main([]) == main(["--check"]) == 0


def test_record_is_its_docstring_and_its_fields():
    text = record("mmr5_train.ranking.records.SplitDocument")
    assert text.startswith("The split of one document")
    assert "| `split` | `train` or `select` or `heldout` | " in text


class Undescribed(Record):
    name: str


def test_field_without_description_is_an_error(monkeypatch):
    monkeypatch.setattr(document_formats, "load", {"Undescribed": Undescribed}.get)
    with pytest.raises(ValueError, match=r"Undescribed\.name has no description"):
        fields("Undescribed")
    with pytest.raises(ValueError, match="no list after 'Returns:'"):
        returns("Undescribed")


def test_documented_reasons_and_checks_are_those_of_the_code():
    section = render().partition("### skipped.jsonl")[2].partition("### first_stage.json")[0]
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "data_construction").rglob("*.py"))
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    names = {name for row in rows for name in re.findall("`([^`]+)`", row)} - {
        "query_id",
        "file",
        "reason",
        "detail",
    }
    assert len(names) > 25
    assert [name for name in names if name.removeprefix("kept for evaluation: ") not in source] == []
