"""Serves a reranker over HTTP, with a web page to try it on your own PDFs.

    python -m mmr5_train.serve checkpoint=outputs/grpo/model          # then open http://127.0.0.1:8000
    MMR5_API_KEY=… python -m mmr5_train.serve checkpoint=… host=0.0.0.0 port=8080 folder=outputs/data/pages

It writes no files. The API is compatible with hosted rerank services. /health already responds while the model
loads. The server ranks concurrent requests in batches. docs/serving.md describes the API, limits and errors.
"""

from __future__ import annotations

from functools import partial

from mmr5_train.common.config import run_stage
from mmr5_train.common.files import InputError
from mmr5_train.serving.batching import Ranker
from mmr5_train.serving.settings import ServeConfig


def main(config: ServeConfig) -> None:
    try:
        from mmr5_train.serving.server import run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise InputError(f"serve needs {error.name}: in the checkout, pip install '.[serve]'") from None
    run(config, partial(load_reranker, config))


def load_reranker(config: ServeConfig) -> Ranker:
    from mmr5_train.inference.reranker import Reranker  # a slow import, during which /health already answers

    settings = config.model_dump(include={"mode", "max_new_tokens", "window", "stride", "batch_size"})
    options = {name: value for name, value in settings.items() if value is not None}
    return Reranker(
        config.checkpoint, prompt=config.prompt, override_checkpoint=config.override_checkpoint, **options
    )


if __name__ == "__main__":
    run_stage(main, ServeConfig, "serve")
