__version__: str

from . import data, measure, merge, model, notebook, store, study, train
from .data.tasks import load_task
from .model.clip import load_clip
from .notebook.run import begin
from .train.finetune import finetune

__all__ = [
    "begin",
    "data",
    "finetune",
    "load_clip",
    "load_task",
    "measure",
    "merge",
    "model",
    "notebook",
    "store",
    "study",
    "train",
]
