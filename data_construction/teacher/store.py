"""Stores every answer of a paid teacher as it arrives, so that no request is paid for twice.

The store is one SQLite file. The key of an answer is a hash of everything that determines the request
(`request_key`), so any number of runs can share the file, also at the same time: a process claims a request before
it sends it, and other processes wait for the answer. `kill -9` loses no answer that had been written. A power cut
may lose the answers of the last seconds, but does not corrupt the file.
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

from mmr5_train.chat.completion import Completion
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
_LATER_TABLES = """
CREATE TABLE IF NOT EXISTS dialects (
    model TEXT NOT NULL, configured TEXT NOT NULL, learned TEXT NOT NULL, PRIMARY KEY (model, configured)
);
CREATE TABLE IF NOT EXISTS batches (
    token TEXT PRIMARY KEY, model TEXT NOT NULL, url TEXT NOT NULL, owner TEXT NOT NULL, id TEXT
);
CREATE TABLE IF NOT EXISTS batch_requests (
    key TEXT PRIMARY KEY, token TEXT NOT NULL, prompt_tokens INTEGER NOT NULL
)
"""


@dataclass(frozen=True)
class Answer:
    """The parts of a server's reply that are used. `finish` is as in `mmr5_train.chat.completion.Completion`.

    A stored answer has both counts. Until it is stored, None means that the server did not report one.
    """

    text: str
    finish: str
    prompt_tokens: int | None
    completion_tokens: int | None

    @classmethod
    def of(cls, reply: Completion) -> Answer:
        return cls(reply.text, reply.finish, reply.prompt_tokens, reply.completion_tokens)


@dataclass(frozen=True)
class StoredBatch:
    """A batch of requests whose answers are not stored yet."""

    token: str
    """Made by this project, and sent with the batch."""
    url: str
    """Base URL of its server."""
    id: str | None
    """The server's name of it. None: the process ended before it learned the name."""
    requests: dict[str, int]
    """Request key → estimated prompt tokens."""


@dataclass(frozen=True)
class Spent:
    """Totals over all answers of a model in a store."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def request_key(request: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of a request's canonical JSON."""
    canonical = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


class AnswerStore:
    """The answers in one file, which is created if it does not exist.

    Every method raises `InputError` if the file can't be read or written: the disk is full, another program has
    locked the file, or the file is not a store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._host, self._token = socket.gethostname(), secrets.token_hex(4)
        self._owner = f"{self._host}/{os.getpid()}/{self._token}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"{path}: can't be created or opened ({error}); choose another file with answers=…"
            ) from None
        with self._sqlite_errors():
            _retry_if_busy(self._db.execute, "PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
        with self._transaction():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0 and not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in _TABLES.split(";\n"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise InputError(
                    f"{path}: is not a store of answers that this version can read; choose another with answers=…"
                )
            for statement in _LATER_TABLES.split(";\n"):
                self._db.execute(statement)

    def register_settings(self, settings: Mapping[str, Any], accept_other_settings: bool) -> None:
        """Records the settings that the requests of this run depend on.

        Raises `InputError`, listing the differences to the last recorded settings, if the store was used before,
        but not with these settings. `accept_other_settings` turns that check off.
        """
        value = json.dumps(settings, sort_keys=True, ensure_ascii=False)
        with self._transaction():
            known = [row[0] for row in self._db.execute("SELECT value FROM settings ORDER BY rowid")]
            if known and value not in known and not accept_other_settings:
                last = json.loads(known[-1])
                raise InputError(
                    f"{self.path}: contains {self.count()} answers to requests with other settings, which this "
                    "run can't reuse:"
                    + "".join(
                        f"\n  {name}: {_short(last.get(name))} in the store, {_short(settings.get(name))} now"
                        for name in sorted({*last, *settings})
                        if last.get(name) != settings.get(name)
                    )
                    + "\nRestore the settings, or start a new store with answers=…, or use this store with "
                    "overwrite=true: it keeps its answers and reuses those whose requests are the same"
                )
            self._db.execute("INSERT OR IGNORE INTO settings VALUES (?)", (value,))

    def dialect(self, model: str, configured: str) -> str | None:
        """What a model's refusals have taught runs that began with the dialect `configured`. Both are JSON."""
        with self._sqlite_errors():
            row = self._db.execute(
                "SELECT learned FROM dialects WHERE model = ? AND configured = ?", (model, configured)
            ).fetchone()
        return row[0] if row else None

    def put_dialect(self, model: str, configured: str, learned: str) -> None:
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO dialects VALUES (?, ?, ?)", (model, configured, learned))

    def get(self, key: str) -> Answer | None:
        with self._sqlite_errors():
            row = self._db.execute(
                "SELECT text, finish, prompt_tokens, completion_tokens FROM answers WHERE key = ?", (key,)
            ).fetchone()
        return Answer(*row) if row else None

    def put(self, key: str, model: str, answer: Answer) -> None:
        """Stores an answer, adds its tokens to the totals and deletes its claim, in one transaction."""
        with self._transaction():
            inserted = self._db.execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", (key, model, *astuple(answer))
            )
            if inserted.rowcount:
                self._db.execute(
                    "INSERT INTO spent VALUES (?, 1, ?, ?) ON CONFLICT (model) DO UPDATE SET "
                    "answers = answers + 1, prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
                    "completion_tokens = completion_tokens + excluded.completion_tokens",
                    (model, answer.prompt_tokens, answer.completion_tokens),
                )
            self._db.execute("DELETE FROM claims WHERE key = ?", (key,))

    def spent(self, model: str) -> Spent:
        """Totals over the answers of a model, including those of other processes."""
        with self._sqlite_errors():
            row = self._db.execute(
                "SELECT answers, prompt_tokens, completion_tokens FROM spent WHERE model = ?", (model,)
            ).fetchone()
        return Spent(*row) if row else Spent()

    def count(self) -> int:
        with self._sqlite_errors():
            (count,) = self._db.execute("SELECT coalesce(sum(answers), 0) FROM spent").fetchone()
        return int(count)

    def claim(self, key: str, seconds: float) -> bool:
        """Claims a request. Returns False if another process has claimed it.

        A claim ends when its answer is stored, with `release`, after `seconds`, or when its process ends.
        """
        with self._transaction():
            row = self._db.execute("SELECT owner, until FROM claims WHERE key = ?", (key,)).fetchone()
            if row and row[1] > time.time() and self._is_running(row[0]):
                return False
            self._db.execute(
                "INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", (key, self._owner, time.time() + seconds)
            )
        return True

    def begin_batch(self, batch: StoredBatch, model: str) -> None:
        """Records a batch before it is sent, so that it is found again if this process ends while it is sent."""
        with self._transaction():
            row = (batch.token, model, batch.url, self._owner, batch.id)
            self._db.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", row)
            self._db.executemany(
                "INSERT OR REPLACE INTO batch_requests VALUES (?, ?, ?)",
                [(key, batch.token, tokens) for key, tokens in batch.requests.items()],
            )

    def name_batch(self, token: str, id: str) -> None:
        """Records the server's name of a batch."""
        with self._transaction():
            self._db.execute("UPDATE batches SET id = ? WHERE token = ?", (id, token))

    def end_batch(self, token: str) -> None:
        """Deletes the record of a batch whose answers are stored, or which was never sent."""
        with self._transaction():
            self._db.execute("DELETE FROM batch_requests WHERE token = ?", (token,))
            self._db.execute("DELETE FROM batches WHERE token = ?", (token,))

    def batches(self, model: str) -> list[StoredBatch]:
        """The batches of a model that no running process waits for. This process waits for them from now on."""
        found = []
        with self._transaction():
            rows = self._db.execute("SELECT token, url, owner, id FROM batches WHERE model = ?", (model,))
            for token, url, owner, id in rows.fetchall():
                if self._is_running(owner):
                    continue
                self._db.execute("UPDATE batches SET owner = ? WHERE token = ?", (self._owner, token))
                requests = self._db.execute(
                    "SELECT key, prompt_tokens FROM batch_requests WHERE token = ?", (token,)
                )
                found.append(StoredBatch(token, url, id, dict(requests.fetchall())))
        return found

    def release(self, key: str) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self._owner))

    def close(self) -> None:
        """Optional: without it no answer is lost, and open claims end with the process."""
        self._db.close()

    def _is_running(self, owner: str) -> bool:
        """Whether the process that owns a claim is running. A process on another machine counts as running."""
        host, pid, token = owner.split("/")
        if host != self._host:
            return True
        if int(pid) == os.getpid():  # after a container restart, the new process often has the same id
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
        with self._sqlite_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise InputError(
                f"{self.path}: can't be used ({error}); check that the disk has space, that the file is a store "
                "of answers and that no other program locks it. Its answers are kept: run the same command again"
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
def _retry_if_busy(execute: Callable[[str], Any], statement: str) -> None:
    """Executes a statement to which SQLite's own busy timeout does not apply.

    If two processes change the journal mode at the same time, SQLite refuses one of them at once, since waiting
    would be a deadlock.
    """
    execute(statement)
