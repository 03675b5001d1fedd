"""Weight files: reading them safely, naming what they are, and putting them into a network, completely or not at all."""

from .files import WeightFile, read_weight_file
from .weights import LoadReport, compare_names, load_weight_file

__all__ = ["LoadReport", "WeightFile", "compare_names", "load_weight_file", "read_weight_file"]
