from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from data_construction.teacher.store import Answer, AnswerStore, Spent, _retry_if_busy, request_key
from mmr5_train.common.files import InputError

ANSWER = Answer("It shows a table.", "stop", 1300, 9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.sqlite"


def in_another_process(code: str, path: Path, **options: object) -> subprocess.Popen[str]:
    """Runs `code` with an open `store` in a new process. It may read stdin to wait for the test."""
    head = "import sys\nfrom pathlib import Path\nfrom data_construction.teacher.store import *\n"
    command = [sys.executable, "-c", f"{head}store = AnswerStore(Path(sys.argv[1]))\n{code}", str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def test_request_key_depends_on_every_field():
    request = {"model": "m", "text": "What?", "page": ["hash", 100], "tries": 0}
    assert request_key(dict(reversed(request.items()))) == request_key(request)
    others = ({"model": "n"}, {"text": "What"}, {"page": ["hash", 101]}, {"page": None}, {"tries": 1})
    assert len({request_key({**request, **other}) for other in others} | {request_key(request)}) == 6


def test_answers_are_stored_and_counted_once(path: Path):
    store = AnswerStore(path)
    assert store.get("a") is None
    assert store.spent("m") == Spent()
    store.put("a", "m", ANSWER)
    store.put("a", "m", Answer("Another.", "stop", 1, 1))
    store.put("b", "other", ANSWER)
    store.close()
    reopened = AnswerStore(path)
    assert reopened.get("a") == ANSWER
    assert reopened.spent("m") == Spent(1, 1300, 9)
    assert reopened.count() == 2


def test_claim_ends_with_its_process(path: Path):
    other = in_another_process("print(store.claim('a', 60), flush=True); sys.stdin.read()", path)
    assert other.stdout
    assert other.stdout.readline() == "True\n"
    store = AnswerStore(path)
    assert not store.claim("a", 60)
    assert store.claim("b", 60)
    assert not store.claim("b", 60)
    store.release("a")  # claimed by another process: no effect
    assert not store.claim("a", 60)
    other.kill()
    other.wait()
    assert store.claim("a", 60)


def test_claim_ends_by_timeout_release_or_answer(path: Path):
    store = AnswerStore(path)
    assert store.claim("late", -1)
    assert store.claim("late", 60)
    store.release("late")
    assert store.claim("late", 60)
    store.put("late", "m", ANSWER)
    assert store.claim("late", 60)
    store.close()
    assert AnswerStore(path).claim("late", 60)


def test_two_processes_write_concurrently(path: Path):
    code = "for i in range(300): store.put(sys.stdin.readline() + str(i), 'm', Answer('x', 'stop', 1, 1))"
    writers = [in_another_process(code, path) for _ in range(2)]
    for writer, name in zip(writers, "ab", strict=True):
        writer.communicate(f"{name}\n" * 300, timeout=120)
        assert writer.returncode == 0
    assert AnswerStore(path).spent("m") == Spent(600, 600, 600)


def test_busy_statement_is_retried():
    """SQLite refuses one of two processes that change the journal mode at the same time with SQLITE_BUSY."""
    busy, broken = sqlite3.OperationalError("database is locked"), sqlite3.OperationalError("disk I/O error")
    busy.sqlite_errorcode, broken.sqlite_errorcode = sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR
    statements = []

    def execute(statement: str) -> None:
        statements.append(statement)
        if len(statements) < 3:
            raise busy
        if statement == "broken":
            raise broken

    _retry_if_busy(execute, "PRAGMA journal_mode = WAL")
    assert len(statements) == 3
    with pytest.raises(sqlite3.OperationalError, match="disk I/O"):
        _retry_if_busy(execute, "broken")
    assert len(statements) == 4


def test_changed_settings_raise(path: Path):
    store = AnswerStore(path)
    store.register_settings({"model": "m", "system": "Be brief. " * 20}, accept_other_settings=False)
    store.put("a", "m", ANSWER)
    store.register_settings({"model": "m", "system": "Be brief. " * 20}, accept_other_settings=False)
    with pytest.raises(
        InputError, match=r'contains 1 answers .*\n  model: "m" in the store, "n" now\n  system: .*…'
    ) as caught:
        store.register_settings({"model": "n", "system": "Be long."}, accept_other_settings=False)
    assert "answers=…" in str(caught.value)
    assert "overwrite=true" in str(caught.value)
    store.register_settings({"model": "n", "system": "Be long."}, accept_other_settings=True)
    store.register_settings({"model": "n", "system": "Be long."}, accept_other_settings=False)
    store.register_settings({"model": "m", "system": "Be brief. " * 20}, accept_other_settings=False)
    assert store.get("a") == ANSWER


def test_other_files_are_rejected_and_not_changed(tmp_path: Path, path: Path):
    path.write_text("My notes. " * 100)
    with pytest.raises(InputError, match=r"answers\.sqlite: can't be used \(file is not a database\)"):
        AnswerStore(path)
    assert path.read_text().startswith("My notes.")
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE mine (x)")
    with pytest.raises(InputError, match="is not a store of answers"):
        AnswerStore(tmp_path / "other.sqlite")
    with pytest.raises(InputError, match="can't be created or opened"):
        AnswerStore(path / "below_a_file.sqlite")


def test_full_disk_raises_and_loses_no_answer(path: Path):
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # simulates a full disk
try:
    for i in range(10_000):
        store.put(str(i), 'm', Answer('x' * 200, 'stop', 1, 1))
except Exception as error:
    print(i, type(error).__name__, error)
"""
    output, _ = in_another_process(code, path).communicate(timeout=120)
    written, kind, message = output.split(" ", 2)
    assert kind == "InputError"
    assert "check that the disk has space" in message
    store = AnswerStore(path)
    assert int(written) > 10
    assert store.count() == int(written)
    store.put("another", "m", ANSWER)
