from .presets import PRESETS, Preset
from .run import Run, begin

__all__ = ["PRESETS", "Preset", "Run", "begin"]
