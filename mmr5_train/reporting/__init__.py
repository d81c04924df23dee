"""Parts of the report: training curves, held-out cases, page pictures."""
