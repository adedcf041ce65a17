"""Files of rows that are negatives."""

from .layout import DTYPES
from .reading import FileNegatives, made_ahead
from .writing import write_negatives

__all__ = ["DTYPES", "FileNegatives", "made_ahead", "write_negatives"]
