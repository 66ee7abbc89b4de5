"""Facts about the device, and how tensors must lie for TMA. Asked once a device, then remembered."""

import contextlib
import functools
import operator
import threading
import warnings

import torch
from torch import Tensor

# Streams that get a tile counter of their own in each kernel; further ones take the tiles in a fixed order
SLOTS = 256
_slots: dict[tuple[int, int], int] = {}
_lock = threading.Lock()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def require_hopper(function: str, device: torch.device) -> None:
    if _capability(device) != (9, 0):
        major, minor = _capability(device)
        raise NotImplementedError(
            f"{function}: the device must have compute capability 9.0 (Hopper: H100, H200, GH200), got {major}.{minor} on {device}"
        )


def is_current(index: int) -> bool:
    """Is that device the current one? A launch needs it to be: TileLang's host code would set it and leave it set."""
    # Not torch.cuda.current_device, which first asks whether CUDA is initialised: here a tensor lies on it
    return torch._C._cuda_getDevice() == index


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` the current one for several launches."""
    return contextlib.nullcontext() if is_current(device.index) else torch.cuda.device(device)


def slot(index: int) -> int:
    """The tile counter of the current device's current stream; -1 (fixed order) while a graph is captured, since two replays could meet in
    one counter."""
    stream = torch._C._cuda_getCurrentRawStream(index)
    # The default stream, 0, can't be captured
    if stream and torch.cuda.is_current_stream_capturing():
        return -1
    number = _slots.get((index, stream))
    return _new_slot(index, stream) if number is None else number


def _new_slot(index: int, stream: int) -> int:
    with _lock:
        return _slots.setdefault((index, stream), len(_slots) if len(_slots) < SLOTS else -1)


def readable(t: Tensor) -> bool:
    """Can TMA read t: stride 1 along D, the other strides positive multiples of 16 bytes, base 16-byte aligned?"""
    *outer, inner = t.stride()
    # A sum of bits: it is a multiple of the unit, a power of two, if each stride is
    bits = functools.reduce(operator.or_, outer)
    return inner == 1 and min(outer) > 0 and bits % (16 // t.element_size()) == 0 and t.data_ptr() % 16 == 0


def rows(t: Tensor) -> Tensor:
    """t as TMA can read it; copies if need be."""
    if t.requires_grad:
        t = t.detach()
    return t if readable(t) else t.clone(memory_format=torch.contiguous_format)


def whole(t: Tensor) -> Tensor:
    """t as kernels without TMA read it, 16 bytes at a time: contiguous, its base 16-byte aligned; copies if need be."""
    t = t.detach().contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def warn_if_deterministic(function: str) -> None:
    """torch.use_deterministic_algorithms(True, warn_only=True) promises a warning from whatever isn't."""
    if torch.is_deterministic_algorithms_warn_only_enabled():
        warnings.warn(f"{function}: the order of dq's sums is not fixed, its bits may change from run to run", stacklevel=2)
