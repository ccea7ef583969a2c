"""The thin library of the book: SAM fine-tuning, merging and interference measures."""

__version__ = "0.1.0"
