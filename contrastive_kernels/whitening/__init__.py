"""Batched whitening of many small groups at once."""

from .errors import check_whitening
from .layer import Whitening
from .whiten import whiten

__all__ = ["Whitening", "check_whitening", "whiten"]
