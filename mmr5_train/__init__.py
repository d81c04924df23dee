"""Reasoning rerankers for visual documents: train, evaluate, use.

from mmr5_train import Reranker
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmr5_train.inference.reranker import QueryReranker, Reranker
    from mmr5_train.ranking.results import RankedResults, Result

__all__ = ["QueryReranker", "RankedResults", "Reranker", "Result"]

# PEFT imports bitsandbytes wherever it is installed, and on a CPU that warns of a kernel nobody asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """What users import, loaded when it is asked for: the domain and the data stages need no torch."""
    if name in ("Reranker", "QueryReranker"):
        from mmr5_train.inference import reranker

        return getattr(reranker, name)
    if name in ("RankedResults", "Result"):
        from mmr5_train.ranking import results

        return getattr(results, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
