"""What the operators accept, and every message that refuses. The same rules run on real and on fake tensors, inside the operator,
so that eager, tracing, an exported graph and a raw operator call refuse alike, before anything is allocated or launched."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

CPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CUDA_DTYPES = (torch.float16, torch.bfloat16)


def _size(ok: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """ValueError unless ok. A size may be symbolic: then torch keeps the rule as a run-time assertion."""
    if ok is not True:
        torch._check_value(ok, message)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors(function: str, **named: object) -> None:
    """TypeError for an argument that is no tensor: everything after this line may ask for its shape."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(value).__name__}")


def no_tangents(function: str, **named: Tensor) -> None:
    """NotImplementedError for an input of forward-mode AD. Asked only inside a dual level, so that an ordinary call doesn't pay for it."""
    for name, t in named.items():
        if _has_tangent(t):
            raise NotImplementedError(
                f"{function}: forward-mode AD (torch.func.jvp, jacfwd) is not supported, got a tangent for {name}; "
                "use reverse mode: torch.func.vjp, jacrev"
            )


def _has_tangent(t: Tensor) -> bool:
    """Also below the wrappers of an inner vmap or grad; a batched tensor can't be asked itself, torch has no rule for it."""
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(t) or forward_ad.unpack_dual(t).tangent is None:
        if not functorch.is_functorch_wrapped_tensor(t):
            return False
        t = functorch.get_unwrapped(t)
    return True


def window(function: str, causal: bool, window: Sequence[int]) -> tuple[int, int]:
    """The two sides of the window as the operators take them: -1 is unbounded, causal closes the right side at 0."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{function}: window must be a pair (left, right), got {window!r}")
    for side, value in zip(("left", "right"), window, strict=True):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{function}: window {side} must be an int, got {value!r}")
    sides(function, *window)
    return window[0], (0 if causal else window[1])


def sides(function: str, left: int, right: int) -> None:
    """The sides of a window, also for an operator that is called by itself."""
    if left < -1 or right < -1:
        side, value = ("left", left) if left < -1 else ("right", right)
        raise ValueError(f"{function}: window {side} must be at least 0, or -1 for unbounded, got {value}")


def attention(function: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float) -> None:
    """q [B, S_q, H_q, D]; k [B, S_kv, H_kv, D]; v [B, S_kv, H_kv, D_v]; one dtype, one device; H_q a multiple of H_kv."""
    if not _plainly_right(q, k, v, 4):
        _alike(function, "[B, S, H, D]", 4, q, k, v)
        B, B_k, B_v = q.shape[0], k.shape[0], v.shape[0]
        _size(B_k == B, lambda: f"{function}: k must have the batch size of q, got B={B_k} for k, B={B} for q")
        _size(B_v == B, lambda: f"{function}: v must have the batch size of q, got B={B_v} for v, B={B} for q")
        _sizes_fit(function, "S_kv", q, k, v)
    _numbers(function, scale, softcap)


def attention_varlen(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float | None,
    softcap: float,
) -> None:
    """q [T_q, H_q, D]; k [T_kv, H_kv, D]; v [T_kv, H_kv, D_v], as `attention` otherwise; cu_seqlens_q, cu_seqlens_k int32 [N + 1].

    The values of the offsets are looked at where that is free, on a CPU. On CUDA it would make the host wait for the device: there a
    kernel stays inside its tensors whatever they are."""
    if not _plainly_right(q, k, v, 3):
        _alike(function, "[T, H, D]", 3, q, k, v)
        _sizes_fit(function, "T_kv", q, k, v)
    _numbers(function, scale, softcap)
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _offsets(function, name, t, q)
    N_q, N_k = cu_seqlens_q.shape[0], cu_seqlens_k.shape[0]
    _size(N_q == N_k, lambda: f"{function}: cu_seqlens_k must be as long as cu_seqlens_q, got N + 1 = {N_k} and {N_q}")
    for name, t, of, T in (("cu_seqlens_q", cu_seqlens_q, "q", q.shape[0]), ("cu_seqlens_k", cu_seqlens_k, "k", k.shape[0])):
        if _readable(t):
            _offset_values(function, name, t.tolist(), of, T)


def _integers(function: str, name: str, layout: str, t: Tensor, q: Tensor, dims: int) -> None:
    if t.dim() != dims:
        raise ValueError(f"{function}: {name} must have {dims} dimension{'s' * (dims > 1)} {layout}, got shape {tuple(t.shape)}")
    if t.device != q.device:
        raise ValueError(f"{function}: {name} must be on the device of q, got {t.device}, q on {q.device}")
    if t.dtype is not torch.int32:
        raise TypeError(f"{function}: {name} must be int32, got {_name(t.dtype)}")


def _offsets(function: str, name: str, t: Tensor, q: Tensor) -> None:
    _integers(function, name, "[N + 1]", t, q, 1)
    _size(t.shape[0] > 0, lambda: f"{function}: {name} must have at least 1 entry, the offset 0, got none")


def _readable(t: Tensor) -> bool:
    """A plain CPU tensor, neither a fake one nor one of functorch's: its values are at hand."""
    return type(t) is Tensor and t.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def _offset_values(function: str, name: str, offsets: list[int], of: str, T: int) -> None:
    if offsets[0] != 0:
        raise ValueError(f"{function}: {name} must start at 0, got {offsets[0]}")
    for n, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end < start:
            raise ValueError(f"{function}: {name} must not decrease, got {start} before {end} for sequence {n}")
    if offsets[-1] > T:
        raise ValueError(f"{function}: {name} must end at the {T} tokens of {of} or before, got {offsets[-1]}")


def lengths(function: str, **named: object) -> None:
    """The longest lengths, which no kernel here needs: an int, a tensor, whose value nobody asks for, or None."""
    for name, value in named.items():
        if value is not None and (not isinstance(value, (int, Tensor)) or isinstance(value, bool)):
            raise TypeError(f"{function}: {name} must be an int, a tensor or None, got {value!r}")


def _plainly_right(q: Tensor, k: Tensor, v: Tensor, dims: int) -> bool:
    """The same rules in one go, for an ordinary call that keeps them; whatever is not an ordinary call is looked at one by one."""
    if not (type(q) is type(k) is type(v) is Tensor and q.dim() == k.dim() == v.dim() == dims):
        return False
    if not (q.dtype is k.dtype is v.dtype and q.device == k.device == v.device):
        return False
    *B, _, H_q, D = q.shape
    *B_k, _, H_kv, D_k = k.shape
    fit = v.shape[:-1] == k.shape[:-1] and (B_k, D_k) == (B, D) and H_kv > 0 and D > 0 and H_q % H_kv == 0
    return fit and q.dtype in (CUDA_DTYPES if q.is_cuda else CPU_DTYPES)


def _alike(function: str, layout: str, dims: int, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != dims:
            raise ValueError(f"{function}: {name} must have {dims} dimensions {layout}, got shape {tuple(t.shape)}")
        if t.device != q.device:
            raise ValueError(f"{function}: q, k and v must be on one device, got q on {q.device}, {name} on {t.device}")
        if t.dtype is not q.dtype:
            raise TypeError(f"{function}: q, k and v must share a dtype, got q {_name(q.dtype)}, {name} {_name(t.dtype)}")
    _dtype(function, q)


def _sizes_fit(function: str, length: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """All sizes but that of the batch; `length` is what the length of k and v is called."""
    H_q, D = q.shape[-2:]
    S_kv, H_kv, D_k = k.shape[-3:]
    S_v, H_v = v.shape[-3:-1]
    _size(D_k == D, lambda: f"{function}: k must have the head size of q, got D={D_k} for k, D={D} for q")
    _size(S_v == S_kv, lambda: f"{function}: v must have the length of k, got {length}={S_v} for v, {length}={S_kv} for k")
    _size(H_v == H_kv, lambda: f"{function}: v must have the heads of k, got H_kv={H_v} for v, H_kv={H_kv} for k")
    _size(H_kv > 0, lambda: f"{function}: H_kv must be at least 1, got H_kv={H_kv}")
    _size(D > 0, lambda: f"{function}: D must be at least 1, got D={D}")
    _size(H_q % H_kv == 0, lambda: f"{function}: H_q must be a multiple of H_kv, got H_q={H_q}, H_kv={H_kv}")


def _dtype(function: str, q: Tensor) -> None:
    if q.device.type == "cuda":
        if q.dtype not in CUDA_DTYPES:
            raise TypeError(
                f"{function}: q, k and v on CUDA must be float16 or bfloat16, got {_name(q.dtype)}; "
                "cast them, or run the model under torch.autocast('cuda', torch.bfloat16)"
            )
    elif q.dtype not in CPU_DTYPES:
        raise TypeError(f"{function}: q, k and v must be float16, bfloat16, float32 or float64, got {_name(q.dtype)}")


def _numbers(function: str, scale: float | None, softcap: float) -> None:
    # A number may be symbolic while compile traces; its value is then checked when the graph runs
    if isinstance(scale, (int, float)) and not math.isfinite(scale):
        raise ValueError(f"{function}: scale must be finite, got {scale}")
    if isinstance(softcap, (int, float)) and not (0 <= softcap < math.inf):
        raise ValueError(f"{function}: softcap must be finite and at least 0 (0 is off), got {softcap}")


def attention_bwd(function: str, do: Tensor, q: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> None:
    """do, out [B, S_q, H_q, D_v] in q.dtype; lse, dlse [B, H_q, S_q] float32, float64 for float64 q. Packed: the same without B."""
    *B, S_q, H_q, _ = q.shape
    exact = torch.float64 if q.dtype is torch.float64 else torch.float32
    outer, inner = (*B, S_q, H_q, v.shape[-1]), (*B, H_q, S_q)
    for name, t, shape, dtype in (
        ("do", do, outer, q.dtype),
        ("out", out, outer, q.dtype),
        ("lse", lse, inner, exact),
        ("dlse", dlse, inner, exact),
    ):
        if t is None:
            continue
        if t.dim() != len(shape):
            raise ValueError(f"{function}: {name} must have {len(shape)} dimensions, got shape {tuple(t.shape)}")
        if t.device != q.device:
            raise ValueError(f"{function}: {name} must be on the device of q, got {t.device}, q on {q.device}")
        if t.dtype is not dtype:
            raise TypeError(f"{function}: {name} must be {_name(dtype)}, got {_name(t.dtype)}")
        _shape(function, name, t, shape)


def _shape(function: str, name: str, t: Tensor, shape: tuple) -> None:
    for got, want in zip(t.shape, shape, strict=True):
        _size(got == want, lambda: f"{function}: {name} must have shape {tuple(shape)}, got {tuple(t.shape)}")


def states(function: str, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """out [B, S_q, H_q, D_v] and lse [B, H_q, S_q], twice the same shapes."""
    tensors(function, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if out_a.dim() != 4 or lse_a.dim() != 3 or out_a.shape[:3] != lse_a.transpose(1, 2).shape:
        raise ValueError(
            f"{function}: out_a must be [B, S_q, H_q, D_v] and lse_a [B, H_q, S_q], got {tuple(out_a.shape)}, {tuple(lse_a.shape)}"
        )
    for name, a, b in (("out", out_a, out_b), ("lse", lse_a, lse_b)):
        if a.shape != b.shape:
            raise ValueError(f"{function}: {name}_b must have the shape of {name}_a, got {tuple(b.shape)} and {tuple(a.shape)}")
