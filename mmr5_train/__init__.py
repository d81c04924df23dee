"""Reasoning rerankers for visual documents: train, evaluate, use."""

import logging

# PEFT imports bitsandbytes wherever it is installed, and on a CPU that warns of a kernel nobody asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
