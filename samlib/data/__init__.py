"""Image classification tasks as uint8 tensors: the embedded ones, those of the hub, and folders of your own.

Begin with `tasks` (`load_task`, `Task`, `Split`). `catalogue` says which tasks there are, `testbed_tasks` and
`paper_tasks` describe them, `hub`, `folders` and `decode` bring their images in; `batches` and `augment` are what
training does with them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi
