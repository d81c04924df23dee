"""The reranker as a component of other libraries. Each module needs its library (pip install mmr5-train[NAME])."""
