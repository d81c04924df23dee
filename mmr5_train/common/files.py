"""Files written whole or not at all, and read with errors that name the file and the line."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

MANIFEST = "manifest.json"
RECIPE = "recipe.json"  # in a recipe's folder: where each stage wrote, and the seconds it took
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bm25s", "pypdfium2", "pillow")

RecordT = TypeVar("RecordT", bound=BaseModel)


class InputError(Exception):
    """Something the user gave can't be used. The message says what, where, and what to do."""


def validation_message(error: ValidationError) -> str:
    """The problems of a pydantic error on one line, each with its field."""
    problems = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "record"
        problems.append(f"field {field}: {problem['msg']}")
    return "; ".join(problems)


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a JSON Lines file; blank lines are passed over.

    Raises `InputError` for an absent or unreadable file and for a line that is not a JSON object.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    where = f"{error.msg.removesuffix(' at')} at column {error.colno}"
                    raise InputError(
                        f"{path}, line {number}: not valid JSON ({where}); "
                        "the file may have been cut off: write it again or remove the line"
                    ) from None
                except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
                    raise InputError(f"{path}, line {number}: not readable as JSON ({error})") from None
                if not isinstance(value, dict):
                    raise InputError(
                        f"{path}, line {number}: expected a JSON object, found {type(value).__name__}"
                    )
                yield number, value
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run the stage that writes it first") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None


def read_records(path: Path, kind: type[RecordT], unique: str | None = "query_id") -> list[RecordT]:
    """All records of a JSON Lines file.

    Raises `InputError` naming the line and field of a broken record, a second record with the same
    value of the field `unique`, and a file without records.
    """
    records: list[RecordT] = []
    seen: dict[Any, int] = {}
    for number, value in read_json_lines(path):
        try:
            record = kind.model_validate(value)
        except ValidationError as error:
            raise InputError(f"{path}, line {number}: {validation_message(error)}") from None
        if unique is not None:
            key = getattr(record, unique)
            if key in seen:
                raise InputError(f"{path}, line {number}: {unique} {key!r} already stands in line {seen[key]}")
            seen[key] = number
        records.append(record)
    if not records:
        raise InputError(f"{path}: holds no {kind.__name__} record; run the stage that writes it again")
    return records


@contextmanager
def atomic_write(path: Path, mode: str = "w", sync: bool = True) -> Iterator[IO[Any]]:
    """A file that appears under its name only when the block ends without an error.

    Without `sync` it may be lost or cut off if the machine stops within seconds: for the many small files of a
    cache, where waiting for the disk takes longer than making them. Raises `InputError` where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: the disk is full; free some space, or write elsewhere") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder that appears under its name only when the block, which fills it, ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_records(path: Path, records: Iterable[BaseModel]) -> int:
    """Writes one record a line, whole or not at all. Returns how many."""
    count = 0
    with atomic_write(path) as stream:
        for record in records:
            stream.write(record.model_dump_json() + "\n")
            count += 1
    return count


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, sort_keys=False)
        stream.write("\n")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_output(
    path: Path, overwrite: bool = False, inputs: Iterable[Path] = (), stage: str | None = None
) -> Path:
    """Makes the output folder of a stage.

    A folder that already holds something is refused unless `overwrite` is set, and even then only a
    folder which carries this project's manifest, and none of the stage's `inputs`, is emptied. A `stage` that goes
    on where it was stopped gives its name: then a folder in which it did not end is emptied without `overwrite`.

    Raises `InputError` for a folder that can't be made, written or emptied.
    """
    # Marks the folder as ours from the start: a run that was stopped can be overwritten.
    opened = {"finished": False} if stage is None else {"finished": False, "stage": stage}
    try:
        if path.exists() and any(not _is_beginning(child) for child in path.iterdir()):
            if not overwrite and (stage is None or not is_unfinished(path, stage)):
                raise InputError(f"{path}: is not empty; choose another folder with out=…, or set overwrite=true")
            if not _is_ours(path):
                raise InputError(
                    f"{path}: holds files but no {MANIFEST} of this project, so it was not written by it and is "
                    "not emptied; choose another folder with out=…"
                )
            for source in inputs:
                if source.resolve().is_relative_to(path.resolve()):
                    raise InputError(f"{path}: holds {source}, which this stage reads; choose another out=…")
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
        write_json(path / MANIFEST, opened)
        for child in path.iterdir():  # after the manifest: stopped in here, the folder is still ours
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            elif child.name != MANIFEST:
                child.unlink()
    except OSError as error:
        raise InputError(f"{path}: can't be used as an output folder ({error.strerror})") from None
    return path


def is_unfinished(folder: Path, stage: str) -> bool:
    """Whether `open_output` made the folder for this stage, and the stage did not end."""
    return _manifest(folder) == {"finished": False, "stage": stage}


def _is_beginning(child: Path) -> bool:
    """Whether a file is all that is left of a run that was killed while it wrote its first manifest."""
    return child.name.startswith(f".{MANIFEST}.") and child.suffix == ".tmp"


def _is_ours(folder: Path) -> bool:
    """Whether a stage wrote the folder. The file name alone says little: web projects have such a file too."""
    manifest = _manifest(folder)
    return isinstance(manifest, dict) and isinstance(manifest.get("finished"), bool)


def _manifest(folder: Path) -> Any:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_manifest(
    folder: Path,
    *,
    stage: str,
    config: dict[str, Any],
    inputs: Iterable[Path] = (),
    counts: dict[str, Any] | None = None,
) -> None:
    """Writes what made a folder: config, code and package versions, input hashes, counts.

    Nothing that changes between two identical runs (a time, a duration) stands in it.
    """
    write_json(
        folder / MANIFEST,
        {
            "finished": True,
            "stage": stage,
            "config": config,
            "code": code_version(),
            "python": platform.python_version(),
            "packages": package_versions(),
            "inputs": {str(path): file_hash(path) for path in inputs},
            "counts": counts or {},
        },
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage. Raises `InputError` where there is none, or the stage did not end."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run the stage that writes {folder} first") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(manifest).__name__}")
    if not manifest.get("finished"):
        raise InputError(f"{folder}: the stage that writes it did not end; run it again")
    return manifest


def package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def code_version() -> str:
    """The commit of the checkout, with "+changes" if files differ from it. Installed, the package's version."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # git would describe any repository that the environment stands in
        return importlib.metadata.version("mmr5-train")
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return importlib.metadata.version("mmr5-train")
