# The server of a reranker; docs/serving.md shows how to run it. The checkpoint is mounted at /model.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

RUN useradd --create-home --uid 10001 mmr5
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs ./configs
COPY mmr5_train ./mmr5_train
COPY data_construction ./data_construction
RUN pip install --no-cache-dir --constraint constraints.txt '.[serve]'

USER mmr5
ENV HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=300s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["mmr5", "serve", "host=0.0.0.0", "checkpoint=/model"]
