"""The package bm25s, imported without JAX.

Where JAX is installed, the import of bm25s runs a function of JAX on the GPU. JAX then reserves 75 % of the GPU's
memory for the life of the process, and training in that process or beside it runs out of memory. bm25s uses JAX
only to select the best scores, which this project does itself.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def import_without(package: str, hidden: str) -> Any:
    """Imports `package` while the import of `hidden` fails. Afterwards `hidden` can be imported as before."""
    missing = object()
    before = sys.modules.get(hidden, missing)
    sys.modules[hidden] = None  # type: ignore[assignment]  # `import` raises ModuleNotFoundError
    try:
        return importlib.import_module(package)
    finally:
        if before is missing:
            del sys.modules[hidden]
        else:
            sys.modules[hidden] = before  # type: ignore[assignment]


bm25s = import_without("bm25s", hidden="jax")
STOPWORDS: tuple[str, ...] = tuple(bm25s.stopwords.STOPWORDS_EN)
