"""What every notebook needs around its experiment: `begin` checks the parameters and gives a `Run`.

`run` is that, `presets` are the sizes, `parameters` what a parameter may be; `plot` draws, `page` hands numbers to the
text. Nothing here decides a result.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi
