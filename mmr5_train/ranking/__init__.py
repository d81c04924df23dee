"""The domain of listwise page reranking: records, prompt, answer parser, rewards, windows. No torch here."""
