"""Reasoning rerankers for visual documents: train, evaluate, use."""
