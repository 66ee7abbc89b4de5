"""What a call on CUDA decides from its shapes, strides, dtypes, alignment and numbers is decided once: the plan of a kind of call.

The body of an operator makes plans, after all checks; so a bad call leaves none. `planned` finds one without the operator: the dispatcher,
the checks and the defaults are half of the host time of a call. That is done only where nobody could see the difference.
"""

from collections.abc import Callable
from typing import Any

from torch import DispatchKey, Tensor, is_grad_enabled
from torch._C import (
    DispatchKeySet,
    _dispatch_tls_local_include_set,
    _is_any_autocast_enabled,
    _len_torch_function_stack,
)
from torch.autograd import _profiler_enabled, forward_ad, profiler
from torch.compiler import is_compiling

# Allocates the outputs and launches, given the tensors of its kind. It keeps no tensor, and asks for stream and device itself
Plan = Callable[..., Any]

# Lengths that change from call to call make a plan each: one is about 2 kB
LIMIT = 1024
_plans: dict[tuple, Plan] = {}
get = _plans.get
_NUMBERS, _FLAGS = (float, int, type(None)), (bool, type(None))

# The keys that a thread adds to every call when nothing watches; in inference mode the first alone
_BACKEND, _VIEWS = DispatchKeySet(DispatchKey.BackendSelect), DispatchKeySet(DispatchKey.ADInplaceOrView)
_QUIET = ((_BACKEND | _VIEWS).raw_repr(), _BACKEND.raw_repr())


def kind(
    q: Tensor, k: Tensor, v: Tensor, addresses: int, left: int, right: int, scale: float | None, softcap: float, with_lse: bool
) -> tuple:
    """All that a plan depends on. `addresses` has the bits of all three together, for their alignment."""
    shapes = (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride())
    return shapes, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, addresses & 15, left, right, scale, softcap, with_lse


def remember(kind: tuple, plan: Plan) -> None:
    if len(_plans) >= LIMIT:
        _plans.clear()
    _plans[kind] = plan


def planned(q, k, v, causal, scale, softcap, window, deterministic, with_lse: bool) -> Plan | None:
    """The plan for a call of `attention` in eager that records no gradient, if an equal one ran before and nothing watches the operator.

    None is always right, and leaves the call to the operator; so whatever is unusual need not be understood here."""
    if is_compiling() or not _plans or not (type(q) is type(k) is type(v) is Tensor):
        return None
    if (is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)) or watched():
        return None
    if not (numbers(window, scale, softcap) and type(deterministic) in _FLAGS):
        return None
    try:
        a, b, c = q.data_ptr(), k.data_ptr(), v.data_ptr()
        # What is more than its memory has no address (sparse, zero or wrapped tensors), no shape (nested ones), or negates
        if not (a and b and c) or q.is_neg() or k.is_neg() or v.is_neg():
            return None
        return get(kind(q, k, v, a | b | c, window[0], 0 if causal else window[1], scale, softcap, with_lse))
    except RuntimeError:
        return None


def any_plan() -> bool:
    return bool(_plans)


def numbers(window, scale, softcap) -> bool:
    """Are these of the types that an ordinary call has? Equal is not enough for a key, True == 1 == 1.0."""
    if not (type(window) is tuple and len(window) == 2 and type(window[0]) is type(window[1]) is int):
        return False
    return type(scale) in _NUMBERS and type(softcap) in _NUMBERS


def plain(*tensors: Tensor) -> bool:
    """Is each no more than its memory? Sparse, zero, wrapped or nested tensors have no address or shape, and a view may negate."""
    try:
        return all(t.data_ptr() and not t.is_neg() for t in tensors)
    except RuntimeError:
        return False


def watched() -> bool:
    """Could anybody tell an operator's call from its body's? A mode, torch.func, a tracer, autocast, forward-mode AD, a profiler."""
    return (
        # Modes, torch.func and tracers see every call by a key that they add to it
        _dispatch_tls_local_include_set().raw_repr() not in _QUIET
        or _len_torch_function_stack() > 0
        or _is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
        or _profiler_enabled()
    )
