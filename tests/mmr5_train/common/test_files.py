import hashlib
import json

import pytest

from mmr5_train.common.files import (
    MANIFEST,
    InputError,
    atomic_folder,
    atomic_write,
    code_version,
    file_hash,
    open_output,
    package_versions,
    read_json_lines,
    read_manifest,
    read_records,
    write_json,
    write_manifest,
    write_records,
)
from mmr5_train.ranking.records import PageId, Question

POSITIVE = PageId(doc_name="a", page=1)


def question(query_id="q1", query="How many?"):
    return Question(query_id=query_id, query=query, doc_name="a", domain="d", positives=[POSITIVE])


def write_lines(tmp_path, *lines):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_records_round_trip_through_a_file(tmp_path):
    path = tmp_path / "new" / "questions.jsonl"
    records = [question(), question("q2", "Zwei\u2028Zeilen\n„und“ \u0000 \U0001f600?")]
    assert write_records(path, records) == 2
    assert read_records(path, Question) == records
    first = path.read_bytes()
    write_records(path, records)
    assert path.read_bytes() == first


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = write_lines(tmp_path, "", '{"a": 1}', "  ", '{"a": 2}', "")
    assert list(read_json_lines(path)) == [(2, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"query_id": "q2',
            r"line 2: not valid JSON \(Unterminated string starting at column 14\); the file may",
        ),
        ("[1]", "line 2: expected a JSON object, found list"),
        ("3", "line 2: expected a JSON object, found int"),
        ('{"a": ' + "1" * 5000 + "}", "line 2: not readable as JSON"),
        ("[" * 100_000, "line 2: not readable as JSON"),
        ("{}", "line 2: field query_id: Field required; field query: Field required"),
        (question("q2").model_dump_json().replace('"page":1', '"page":-1'), r"line 2: field positives\.0\.page: "),
        (
            question("q2").model_dump_json().replace('"domain"', '"domian"'),
            "line 2: .*field domian: .*not permitted",
        ),
        (question("q2").model_dump_json().replace("How", "\\ud800"), "line 2: field query: .*valid string"),
        (question("q1").model_dump_json(), "line 2: query_id 'q1' is already in line 1"),
        (b"\xff\xfe", r"questions.jsonl: not UTF-8 text"),
    ],
)
def test_error_names_the_invalid_line(tmp_path, line, message):
    path = write_lines(tmp_path, question().model_dump_json(), line)
    with pytest.raises(InputError, match=message) as raised:
        read_records(path, Question)
    assert str(raised.value).startswith(str(path))


def test_unique_field_can_be_changed_or_disabled(tmp_path):
    path = write_lines(tmp_path, '{"doc_name": "a", "page": 1}', '{"doc_name": "a", "page": 1}')
    assert len(read_records(path, PageId, unique=None)) == 2
    with pytest.raises(InputError, match="page 1 is already in line 1"):
        read_records(path, PageId, unique="page")


def test_missing_empty_and_unreadable_files_are_errors(tmp_path):
    with pytest.raises(InputError, match="no such file; run the stage that writes it first"):
        read_records(tmp_path / "none.jsonl", Question)
    with pytest.raises(InputError, match="contains no Question record"):
        read_records(write_lines(tmp_path, ""), Question)
    with pytest.raises(InputError, match="can't be read"):
        read_records(tmp_path, Question)


def test_write_is_atomic(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def records():
        yield question()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_records(path, records())
    assert path.read_text() == "before"
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "before"
    with atomic_write(path, "wb") as stream:
        stream.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_file_hash_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_open_output_creates_an_unfinished_folder(tmp_path):
    out = open_output(tmp_path / "a" / "b")
    assert [file.name for file in out.iterdir()] == [MANIFEST]
    with pytest.raises(InputError, match="did not finish; run it again"):
        read_manifest(out)


def test_open_output_keeps_a_nonempty_folder_without_overwrite(tmp_path):
    out = open_output(tmp_path / "out")
    (out / "result.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="is not empty; choose another folder with out=…, or set overwrite=true"):
        open_output(out)
    assert (out / "result.jsonl").exists()
    open_output(out, overwrite=True)
    assert [file.name for file in out.iterdir()] == [MANIFEST]


@pytest.mark.parametrize("content", [None, "", "[]", '{"name": "my web site"}', '{"finished": "yes"}'])
def test_open_output_empties_only_folders_that_a_stage_wrote(tmp_path, content):
    (tmp_path / "thesis.tex").write_text("years of work")
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(InputError, match=r"no manifest\.json of this project, so .* it is not emptied"):
        open_output(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_open_output_reopens_only_the_unfinished_folder_of_the_same_stage(tmp_path):
    out = open_output(tmp_path / "out", stage="traces")
    (out / "partial.jsonl").write_text("")
    (out / "below").mkdir()
    for other in ({}, {"stage": "select"}):
        with pytest.raises(InputError, match="is not empty"):
            open_output(out, **other)
    open_output(out, stage="traces")
    assert [path.name for path in out.iterdir()] == [MANIFEST]
    (out / MANIFEST).rename(out / f".{MANIFEST}.123.tmp")  # killed while it wrote its first manifest
    open_output(out, stage="traces")
    write_manifest(out, stage="traces", config={})
    (out / "complete.jsonl").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        open_output(out, stage="traces")


def test_open_output_keeps_a_folder_with_an_input(tmp_path):
    out = open_output(tmp_path / "out")
    (out / "tasks.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"contains .*tasks\.jsonl, which this stage reads"):
        open_output(out, overwrite=True, inputs=[out / "tasks.jsonl"])
    assert (out / "tasks.jsonl").exists()


def test_open_output_rejects_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: can't be used as an output folder \(Not a directory\)"):
        open_output(tmp_path / "file")
    with pytest.raises(InputError, match="can't be used as an output folder"):
        open_output(tmp_path / "file" / "below")


def test_manifest_is_reproducible(tmp_path):
    source = tmp_path / "questions.jsonl"
    write_records(source, [question()])

    def make_folder(name):
        out = open_output(tmp_path / name)
        write_manifest(out, stage="candidates", config={"seed": 42}, inputs=[source], counts={"questions": 1})
        return out

    manifest = read_manifest(make_folder("one"))
    assert manifest["finished"] is True
    assert manifest["stage"] == "candidates"
    assert manifest["config"] == {"seed": 42}
    assert manifest["inputs"] == {str(source): file_hash(source)}
    assert manifest["counts"] == {"questions": 1}
    assert manifest["packages"] == package_versions()
    assert {"torch", "transformers", "trl"} <= set(manifest["packages"])
    assert manifest["code"] == code_version() != ""
    assert (make_folder("two") / MANIFEST).read_bytes() == (tmp_path / "one" / MANIFEST).read_bytes()


def test_unreadable_manifest_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json: no such file; run the stage"):
        read_manifest(tmp_path)
    for content, message in [("{", "can't be read"), ("[]", "expected a JSON object, found list")]:
        (tmp_path / MANIFEST).write_text(content)
        with pytest.raises(InputError, match=message):
            read_manifest(tmp_path)


def test_write_json_keeps_unicode_and_key_order(tmp_path):
    write_json(tmp_path / "a.json", {"b": "ü„“", "a": 1})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert '"ü„“"' in text
    assert list(json.loads(text)) == ["b", "a"]


def test_atomic_folder_appears_only_when_complete(tmp_path):
    def fill_and_fail():
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "half.txt").write_text("half")
            assert not (tmp_path / "model").exists()
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fill_and_fail()
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "all.txt").write_text("all")
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["all.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
