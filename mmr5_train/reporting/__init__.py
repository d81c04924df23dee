"""Builds the HTML pages: tables, training curves, example questions and page pictures."""
