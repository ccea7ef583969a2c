"""Scripts around the book: building it (`build_book`), checking and comparing runs, and how the testbed was made."""
