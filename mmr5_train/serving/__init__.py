"""The HTTP server behind `python -m mmr5_train.serve`. Needs the extra `serve`."""
