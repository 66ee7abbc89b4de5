"""Grouped-query attention for PyTorch on Hopper GPUs: trainable, compilable, fast."""

from . import _version, nn
from .functional import attention, attention_with_lse, merge_states
from .ops import SAVE_OPS

__version__ = _version.__version__
__all__ = ["SAVE_OPS", "attention", "attention_with_lse", "merge_states", "nn"]
