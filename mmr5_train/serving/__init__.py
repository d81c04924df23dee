"""The parts of `python -m mmr5_train.serve`: a reranker behind HTTP. Needs the extra `serve`."""
