"""Environment variables: the launcher's, and those of processes that read strangers' files (PDFs, images).

The latter get no keys or tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

ALLOWED = frozenset(
    (
        # where programs and Python find their files
        "PATH", "HOME", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
        "SYSTEMROOT",
        # temporary files, language and time zone
        "TMPDIR", "TEMP", "TMP", "LANG", "LC_ALL", "LC_CTYPE", "PYTHONUTF8", "TZ",
        # threads
        "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM",
    )
)  # fmt: skip
"""The environment variables that such a process gets. All others may hold secrets."""


def without_secrets(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The allowed variables of an environment. A list of forbidden ones would miss the next service's token."""
    return {name: value for name, value in environment.items() if name in ALLOWED}


def drop_secrets() -> None:
    """Removes all other variables from the environment of this process."""
    for name in os.environ.keys() - ALLOWED:
        del os.environ[name]


def is_first_process() -> bool:
    """Whether this is the first process of its launch. Unlike accelerate's state, it needs no torch."""
    return os.environ.get("RANK", "0") == "0"
