"""What every notebook needs around its experiment: `begin` checks the parameters and gives a `Run`.

`presets` are the sizes of a run (smoke, laptop, published, paper), `parameters` what a parameter may be, `run` is what
`begin` gives; `plot` draws, `page` hands numbers to the text, `execute` runs a notebook in a process of its own. What
decides a result is handed on from here as values.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi
