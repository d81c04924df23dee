"""The HTTP server that `python -m mmr5_train.serve` starts. Needs the extra `serve`."""
