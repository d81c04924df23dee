"""The domain of listwise page reranking: records, prompt, answer parser, rewards, windows. It does not use torch."""
