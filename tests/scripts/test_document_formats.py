import re

import document_formats
import pytest
from document_formats import ROOT, field_table, main, record_section, render, returns_list

from mmr5_train.ranking.records import Record


def test_document_is_up_to_date():
    assert main(["--check"]) == 0


def test_check_fails_after_a_change_of_a_record(tmp_path, monkeypatch, capsys):
    target = tmp_path / "data_formats.md"
    target.write_text(render().replace("`query_id`", "`question_id`"), encoding="utf-8")
    monkeypatch.setattr(document_formats, "TARGET", target)
    assert main(["--check"]) == 1
    assert "run python scripts/document_formats.py" in capsys.readouterr().err
    assert main([]) == main(["--check"]) == 0


def test_record_section_has_the_docstring_and_the_fields():
    text = record_section("mmr5_train.ranking.records.SplitDocument")
    assert text.startswith("The split of one document")
    assert "| `split` | `train` or `select` or `heldout` | " in text


class RecordWithoutDescription(Record):
    name: str


def test_missing_descriptions_are_errors(monkeypatch):
    monkeypatch.setattr(document_formats, "import_name", {"Model": RecordWithoutDescription}.get)
    with pytest.raises(ValueError, match=r"Model\.name has no description"):
        field_table("Model")
    with pytest.raises(ValueError, match="no list after 'Returns:'"):
        returns_list("Model")


def test_documented_reasons_and_checks_occur_in_the_code():
    section = render().partition("### skipped.jsonl")[2].partition("### first_stage.json")[0]
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "data_construction").rglob("*.py"))
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    record_fields = {"query_id", "file", "reason", "detail"}
    names = {name for cell in first_cells for name in re.findall("`([^`]+)`", cell)} - record_fields
    assert len(names) > 25
    assert [name for name in names if name.removeprefix("kept for evaluation: ") not in source] == []
