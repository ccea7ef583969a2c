"""Where results are kept: files that are whole or absent, keys that name them by what decides them, and their origin.

`files` finds the cache folder, `keys` names a result by its inputs and code, `checkpoint` lets a training run go on
where it stopped, `provenance` says which commit, libraries and device made a number.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi
