"""What merging does to models, and why: the chapters' measures, each a function of weights and images.

`interference` is what merged tasks do to each other, `landscape` the loss along lines and planes, `hessian` and
`sharpness` the curvature, `taylor` the terms that link it to the merge gap, `intervals` how sure a mean over seeds is.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi
