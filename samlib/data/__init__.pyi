from .batches import batch_indices, mislabel
from .catalogue import TASKS
from .tasks import Split, Task, corrupted, load_task, subset

__all__ = ["TASKS", "Split", "Task", "batch_indices", "corrupted", "load_task", "mislabel", "subset"]
