"""The reranker as a component of other libraries. Each module needs its library (pip install '.[NAME]')."""
