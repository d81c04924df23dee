"""Reasoning rerankers for visual documents: training, evaluation and inference.

from mmr5_train import Reranker
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmr5_train.inference.reranker import QueryReranker, Reranker
    from mmr5_train.ranking.results import Document, RankedResults, Result

__all__ = ["Document", "QueryReranker", "RankedResults", "Reranker", "Result"]

# PEFT imports bitsandbytes if it is installed, and on a CPU bitsandbytes warns about a missing CUDA kernel.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Imports the public names on first use, because the data stages must work without torch."""
    if name in ("Reranker", "QueryReranker"):
        from mmr5_train.inference import reranker

        return getattr(reranker, name)
    if name in ("Document", "RankedResults", "Result"):
        from mmr5_train.ranking import results

        return getattr(results, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
