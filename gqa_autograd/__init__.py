"""Grouped-query attention for PyTorch on Hopper GPUs: trainable, compilable, fast."""

from . import _version, nn
from .cache import KVCache, PagedKVCache
from .functional import attention, attention_varlen, attention_varlen_with_lse, attention_with_lse, merge_states
from .functional_decode import attention_decode, attention_decode_with_lse
from .ops_varlen import SAVE_OPS
from .support import explain, supported, warmup

__version__ = _version.__version__
__all__ = [
    "SAVE_OPS",
    "KVCache",
    "PagedKVCache",
    "attention",
    "attention_decode",
    "attention_decode_with_lse",
    "attention_varlen",
    "attention_varlen_with_lse",
    "attention_with_lse",
    "explain",
    "merge_states",
    "nn",
    "supported",
    "warmup",
]
