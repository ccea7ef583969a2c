from .finetune import Finetuned, finetune_many
from .recipe import Recipe
from .sam import SAM
from .schedule import lr_at

__all__ = ["SAM", "Finetuned", "Recipe", "finetune_many", "lr_at"]
