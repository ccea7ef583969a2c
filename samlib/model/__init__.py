"""CLIP, its weights as a dictionary (`Theta`), and every forward pass without training.

Begin with `clip` (`load_clip`) and `theta` (`task_vector`). `head` writes the classifier from class names, `evaluate`
gives logits, accuracy and loss. `registry` and `weights` know the models of open_clip, `foreign` reads other people's
fine-tuned files, `architecture` is the testbed's network, `fetch` a command that downloads beforehand.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi
