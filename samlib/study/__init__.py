"""The book's experiments: arms of fine-tuning, trained, merged and measured over seeds.

Begin with `central` (`measure`) and `arms`. `scoring` and `campaign` are what all experiments share; `all_methods`,
`pairs`, `flatness_chain` and `where_sam_helps` are the others. `evidence` reads what is published, `publish` writes it;
`sweep` runs a notebook over a `grid` of parameters.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi
