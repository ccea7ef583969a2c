"""Fine-tuning with AdamW, SAM, ASAM or RWP: `sam` is the optimiser, `loop` the training, `recipe` what decides a run.

`finetune` trains what is not stored yet, `result` stores it; `beside` (averages, looks, checkpoints), `distributed` and
`schedule` stand beside the loop. `budget` tells what memory and hours a run will take before it begins, `device` where.
`python -m samlib.train` fine-tunes one recipe.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi
