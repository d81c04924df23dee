"""The domain of listwise page reranking: records, prompt, answer grammar, rewards, metrics. No torch here."""
