"""The checks that scripts/check_docs.py runs on commands, Python blocks, code spans and links."""
