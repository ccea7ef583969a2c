from .finetune import finetune_many
from .loop import Finetuned
from .recipe import Recipe
from .sam import SAM
from .schedule import lr_at

__all__ = ["SAM", "Finetuned", "Recipe", "finetune_many", "lr_at"]
