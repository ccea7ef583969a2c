"""Fine-tuning with AdamW, SAM, ASAM or RWP: `sam` is the optimiser, `finetune` the loop, `recipe` what decides a run.

`schedule` is the learning rate, `budget` tells memory and hours before a run begins, `device` chooses where.
`python -m samlib.train` fine-tunes one recipe.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi
