"""Parts of the HTML pages: tables, training curves, example questions, page pictures."""
