from .arms import ARMS, JOINT, recipes
from .campaign import measure_many
from .central import gains, measure, table
from .evidence import published

__all__ = ["ARMS", "JOINT", "gains", "measure", "measure_many", "published", "recipes", "table"]
