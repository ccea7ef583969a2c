"""The thin library of the book: SAM fine-tuning, merging and interference measures.

Eight packages in the order of the pipeline, each using only those before it: `store`, `data`, `model`, `train`,
`merge`, `measure`, `notebook`, `study`; `rules` says what a setting may be. Names are loaded when they are asked for.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi
