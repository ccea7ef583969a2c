"""The book's experiments: arms of fine-tuning, trained, merged and measured over seeds.

Begin with `central` (`measure`) and `arms`. `scoring` and `campaign` are what all experiments share. The others are
`all_methods` (every merging method), `pairs` (chapter 6), `flatness_chain` (from flat minima to the merge gap) and
`where_sam_helps` (the map of SAM's gain). `sweep` runs a notebook over a `grid` of parameters.

The way of a published number: `publish` (the command) measures by one of these modules and writes
book/published/<study>.published.json; `evidence` reads it back for the chapters, which glue it into their text;
`claims` holds what the paper claims and makes the tables of the results page, which tools/page_tables.py puts there.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi
