"""Every answer of a paid teacher, kept as it arrives: what was paid for once is never asked for again.

One SQLite file. An answer is found by the hash of all that decides it (`request_key`), so the file may serve any
number of runs, and two processes at a time: a request that one of them has on its way is claimed, and the other
waits for its answer. `kill -9` at any moment loses no answer that had been written. (A power cut may lose those of
the last seconds, but no more than those: the file stays whole.)
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from tenacity import retry, retry_if_exception, stop_after_delay, wait_random

from mmr5_train.common.files import InputError

BUSY_SECONDS = 30
_VERSION = 1
_TABLES = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, finish TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE spent (
    model TEXT PRIMARY KEY, answers INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
);
CREATE TABLE claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL);
CREATE TABLE settings (value TEXT NOT NULL UNIQUE);
"""


@dataclass(frozen=True)
class Answer:
    """What a server replied, as far as it is used. `finish` is the reply's finish_reason, or "refusal"."""

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Spent:
    """All that a model's answers in a store took."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def request_key(request: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of a request's canonical JSON."""
    canonical = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


class AnswerStore:
    """The answers in one file, made where it is absent. Every method raises `InputError` for a file that can't be
    read or written: a full disk, another program that holds it, something else than a store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._host, self._token = socket.gethostname(), secrets.token_hex(4)
        self._owner = f"{self._host}/{os.getpid()}/{self._token}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"{path}: can't be made or opened ({error}); give answers=… in another folder"
            ) from None
        with self._clear():
            _waiting(self._db.execute, "PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
        with self._transaction():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0 and not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in _TABLES.split(";\n"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise InputError(
                    f"{path}: is no store of answers that this version can read; give another answers=…"
                )

    def expect(self, settings: Mapping[str, Any], accept: bool) -> None:
        """Notes the settings under which answers are asked for.

        Raises `InputError` saying how they differ from those it was last used with, unless they were used in it
        before, or `accept`.
        """
        value = json.dumps(settings, sort_keys=True, ensure_ascii=False)
        with self._transaction():
            known = [row[0] for row in self._db.execute("SELECT value FROM settings ORDER BY rowid")]
            if known and value not in known and not accept:
                last = json.loads(known[-1])
                raise InputError(
                    f"{self.path}: holds {self.count()} answers to other settings, so they would be paid for anew:"
                    + "".join(
                        f"\n  {name}: {_short(last.get(name))} there, {_short(settings.get(name))} now"
                        for name in sorted({*last, *settings})
                        if last.get(name) != settings.get(name)
                    )
                    + "\nPut the settings back, or begin a store of their own with answers=…, or go on in this "
                    "one with overwrite=true: it keeps what it has and uses it wherever a request is the same"
                )
            self._db.execute("INSERT OR IGNORE INTO settings VALUES (?)", (value,))

    def get(self, key: str) -> Answer | None:
        with self._clear():
            row = self._db.execute(
                "SELECT text, finish, prompt_tokens, completion_tokens FROM answers WHERE key = ?", (key,)
            ).fetchone()
        return Answer(*row) if row else None

    def put(self, key: str, model: str, answer: Answer) -> None:
        """Keeps an answer, counts what it took and gives its claim up, all or nothing."""
        with self._transaction():
            kept = self._db.execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", (key, model, *astuple(answer))
            )
            if kept.rowcount:
                self._db.execute(
                    "INSERT INTO spent VALUES (?, 1, ?, ?) ON CONFLICT (model) DO UPDATE SET "
                    "answers = answers + 1, prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
                    "completion_tokens = completion_tokens + excluded.completion_tokens",
                    (model, answer.prompt_tokens, answer.completion_tokens),
                )
            self._db.execute("DELETE FROM claims WHERE key = ?", (key,))

    def spent(self, model: str) -> Spent:
        """What the answers of a model took, those of other processes included."""
        with self._clear():
            row = self._db.execute(
                "SELECT answers, prompt_tokens, completion_tokens FROM spent WHERE model = ?", (model,)
            ).fetchone()
        return Spent(*row) if row else Spent()

    def count(self) -> int:
        with self._clear():
            (count,) = self._db.execute("SELECT coalesce(sum(answers), 0) FROM spent").fetchone()
        return int(count)

    def claim(self, key: str, seconds: float) -> bool:
        """Whether the caller may send this request: nobody else has it on the way.

        A claim ends with its answer, with `release`, after `seconds`, or with the process that made it.
        """
        with self._transaction():
            row = self._db.execute("SELECT owner, until FROM claims WHERE key = ?", (key,)).fetchone()
            if row and row[1] > time.time() and self._lives(row[0]):
                return False
            self._db.execute(
                "INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", (key, self._owner, time.time() + seconds)
            )
        return True

    def release(self, key: str) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self._owner))

    def close(self) -> None:
        """Nothing is lost without it; a claim that was not released ends with the process."""
        self._db.close()

    def _lives(self, owner: str) -> bool:
        """Whether the process that made a claim still runs; one of another machine is taken to."""
        host, pid, token = owner.split("/")
        if host != self._host:
            return True
        if int(pid) == os.getpid():  # in a container, a restart often has the same number
            return token == self._token
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._clear():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _clear(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise InputError(
                f"{self.path}: can't be used ({error}); see that the disk has room, that the file is a store of "
                "answers and that no other program holds it. The answers in it are kept: the same command goes on"
            ) from None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"


@retry(
    retry=retry_if_exception(lambda error: getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY),
    wait=wait_random(0.01, 0.05),
    stop=stop_after_delay(BUSY_SECONDS),
    reraise=True,
)
def _waiting(execute: Callable[[str], Any], statement: str) -> None:
    """Runs a statement for which SQLite's own timeout does not hold.

    Two processes that change the journal mode at once would wait for each other, so one is refused right away.
    """
    execute(statement)
