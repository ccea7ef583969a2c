from .clip import Clip, load_clip
from .evaluate import accuracy, logits, losses
from .head import zero_shot_head
from .theta import Theta, dot, flat, task_vector, weights_of

__all__ = [
    "Clip",
    "Theta",
    "accuracy",
    "dot",
    "flat",
    "load_clip",
    "logits",
    "losses",
    "task_vector",
    "weights_of",
    "zero_shot_head",
]
