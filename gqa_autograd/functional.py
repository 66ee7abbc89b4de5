"""The public functions: settle the defaults, decide whether LSE is needed, call the operator."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks, ops, ops_varlen, plans


# softcap is 0 and not 0.0 by default: compile(dynamic=True) takes a float default for a symbol, and then compiles the first graph twice
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0,
    window: tuple[int, int] = (-1, -1),
    deterministic: bool | None = None,
) -> Tensor:
    """out[b, i, h] = sum_j softmax_j(z_ij) v[b, j, h // G],  z_ij = scale q[b, i, h]·k[b, j, h // G],  G = H_q // H_kv

    Query i sees key j if i + S_kv - S_q - left <= j <= i + S_kv - S_q + right: lengths are aligned at their ends (bottom-right).
    A query that sees no key gives out = 0 and zero gradients.

    Args:
        q: [B, S_q, H_q, D]. float16 or bfloat16, on a CPU also float32 and float64. Any strides; stride 1 along D and 16-byte aligned
            rows, as in a view of a fused QKV, are read in place on CUDA, anything else is copied first.
        k: [B, S_kv, H_kv, D]; H_q must be a multiple of H_kv. S_kv may be 0, shorter or longer than S_q.
        v: [B, S_kv, H_kv, D_v].
        causal: close the window on the right side at 0, so that query i sees keys j <= i + S_kv - S_q.
        scale: any finite number; D ** -0.5 when None.
        softcap: z becomes softcap tanh(z / softcap); 0 is off.
        window: (left, right) in keys, self not counted; -1 is unbounded.
        deterministic: bit-equal gradients from run to run; None follows torch.are_deterministic_algorithms_enabled().
    Returns:
        [B, S_q, H_q, D_v] in q.dtype, differentiable once in q, k and v. Under autocast q, k and v are cast as for torch's own
        scaled_dot_product_attention. `supported()` lists what has a kernel on CUDA, `explain` says what a call would run.
    Raises:
        ValueError for a shape or a number, TypeError for a dtype, NotImplementedError on CUDA for what no kernel computes.
    Source: arXiv:2307.08691 algorithms 1 and 2; docs/maths/attention.md.
    """
    if run := plans.planned(q, k, v, causal, scale, softcap, window, deterministic, False):
        return run(q, k, v)
    q, k, v, settings = settle("attention", q, k, v, causal, scale, softcap, window, deterministic)
    if needs_grad(q, k, v):
        return _differentiable(q, k, v, settings)[0]
    return ops.run(ops.attention_fwd, q, k, v, *settings)


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0,
    window: tuple[int, int] = (-1, -1),
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse): out as `attention`, lse[b, h, i] = ln sum_j exp z_ij over the keys that query i sees; -inf where it sees none.

    Args: as `attention`.
    Returns: out [B, S_q, H_q, D_v] in q.dtype; lse [B, H_q, S_q], float32 (float64 for float64 inputs), natural logarithm, scale and
        softcap included. Both are differentiable in q, k and v, so partial attentions can be merged with `merge_states` and trained.
    Raises: as `attention`.
    Source: arXiv:2307.08691 algorithm 1; docs/maths/attention.md.
    """
    if run := plans.planned(q, k, v, causal, scale, softcap, window, deterministic, True):
        return run(q, k, v)
    q, k, v, settings = settle("attention", q, k, v, causal, scale, softcap, window, deterministic)
    if needs_grad(q, k, v):
        return _differentiable(q, k, v, settings)
    return ops.run(ops.attention_fwd_lse, q, k, v, *settings)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0,
    window: tuple[int, int] = (-1, -1),
    deterministic: bool | None = None,
) -> Tensor:
    """`attention` of N sequences of any lengths, packed one after the other without padding: for each n

        out[a:b] = attention(q[a:b], k[c:d], v[c:d]),  a, b = cu_seqlens_q[n], cu_seqlens_q[n + 1],  c, d likewise of cu_seqlens_k

    with S_q = b - a and S_kv = d - c, aligned at their ends. Either may be 0: a query without keys gives out = 0 and zero gradients. What
    one sequence holds reaches no other, and each has the bits that it has alone.

    Args:
        q: [T_q, H_q, D]; k: [T_kv, H_kv, D]; v: [T_kv, H_kv, D_v]. dtypes, strides, heads as for `attention`.
        cu_seqlens_q, cu_seqlens_k: [N + 1], int32, on the device of q: 0 first, never decreasing, T_q and T_kv at most. On a CPU the values
            are checked; on CUDA they are not, for the host would have to wait for them, and what they then say is undefined, though no
            memory outside the tensors is touched.
        max_seqlen_q, max_seqlen_k: the longest lengths, which other libraries need: accepted, and not used for anything.
        causal, scale, softcap, window, deterministic: as for `attention`, within each sequence.
    Returns:
        [T_q, H_q, D_v] in q.dtype, differentiable once in q, k and v. Tokens beyond the last offset belong to no sequence: they may hold
        anything, NaN included, their gradients are exactly 0, and their rows of out are undefined: never written, perhaps not finite. Mask
        them or cut them off before a sum over tokens, as the gradient of a projection's weight is one.
    Raises:
        ValueError for a shape, a number or offsets, TypeError for a dtype, NotImplementedError on CUDA for what no kernel computes, as
        gradients of packed sequences are for now.
    Source: arXiv:2307.08691 algorithms 1 and 2; docs/maths/attention.md.
    """
    offsets = (cu_seqlens_q, cu_seqlens_k)
    q, k, v, settings = settle_varlen(
        "attention_varlen", q, k, v, *offsets, max_seqlen_q, max_seqlen_k, causal, scale, softcap, window, deterministic
    )
    if needs_grad(q, k, v):
        return _differentiable_varlen(q, k, v, *offsets, settings)[0]
    return ops.run(ops_varlen.attention_varlen_fwd, q, k, v, *offsets, *settings)


def attention_varlen_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0,
    window: tuple[int, int] = (-1, -1),
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse): out as `attention_varlen`, lse[h, i] = ln sum_j exp z_ij over the keys that query i sees in its sequence; -inf where
    it sees none.

    Args: as `attention_varlen`.
    Returns: out [T_q, H_q, D_v] in q.dtype; lse [H_q, T_q], float32 (float64 for float64 inputs), natural logarithm, scale and softcap
        included. Both are differentiable in q, k and v. Rows of tokens beyond the last offset are undefined in both.
    Raises: as `attention_varlen`.
    Source: arXiv:2307.08691 algorithm 1; docs/maths/attention.md.
    """
    offsets = (cu_seqlens_q, cu_seqlens_k)
    q, k, v, settings = settle_varlen(
        "attention_varlen", q, k, v, *offsets, max_seqlen_q, max_seqlen_k, causal, scale, softcap, window, deterministic
    )
    if needs_grad(q, k, v):
        return _differentiable_varlen(q, k, v, *offsets, settings)
    return ops.run(ops_varlen.attention_varlen_fwd_lse, q, k, v, *offsets, *settings)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of the attention over the keys of a and b together: lse = ln(e^lse_a + e^lse_b), out = sum of e^(lse_x - lse) out_x

    Args: out_a, out_b [B, S_q, H_q, D_v]; lse_a, lse_b [B, H_q, S_q], natural logarithm, as `attention_with_lse` returns them.
    Returns: out in out_a.dtype, lse in lse_a.dtype; differentiable. Where both parts see no key, out = 0, lse = -inf, gradients 0.
    Raises: ValueError if the shapes differ or don't fit each other.
    Source: arXiv:2501.01005 section 2.2.
    """
    checks.states("merge_states", out_a, lse_a, out_b, lse_b)
    top = torch.maximum(lse_a, lse_b).detach()
    empty = top == -torch.inf
    top = top.masked_fill(empty, 0)
    # The share of an empty part is exp(-inf) = 0, with gradient 0; where both are empty the sum is set to 1, so that nothing is NaN
    share_a, share_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = (share_a + share_b).masked_fill(empty, 1)
    lse = (top + torch.log(total)).masked_fill(empty, -torch.inf)
    weight_a, weight_b = ((share / total).transpose(1, 2).unsqueeze(3) for share in (share_a, share_b))
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse


def settle(
    function, q, k, v, causal=False, scale=None, softcap=0.0, window=(-1, -1), deterministic=None
) -> tuple[Tensor, Tensor, Tensor, ops.Settings]:
    """The arguments of `attention` as its operators take them; `function` is what messages call it."""
    checks.tensors(function, q=q, k=k, v=v)
    # Forward-mode AD has no hook in a custom operator: its tangents would be zero in silence
    if forward_ad._current_level >= 0:
        checks.no_tangents(function, q=q, k=k, v=v)
    left, right = checks.window(function, causal, window)
    device = q.device.type
    # torch has no answer for meta tensors, which have shapes only
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (t if t.dtype is torch.float64 else t.to(dtype) for t in (q, k, v))
    if deterministic is None:
        # Dynamo can't trace ..._warn_only_enabled(): a compiled call takes a wish for warnings as one for determinism
        strict = torch.compiler.is_compiling() or not torch.is_deterministic_algorithms_warn_only_enabled()
        deterministic = torch.are_deterministic_algorithms_enabled() and strict
    return q, k, v, ops.Settings(left, right, scale, softcap, deterministic)


def settle_varlen(
    function, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *args, **options
) -> tuple[Tensor, Tensor, Tensor, ops.Settings]:
    """The same for `attention_varlen`."""
    # All five at once: which one torch.compile meets first decides the order of the graph's inputs
    checks.tensors(function, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    # While compile traces nobody touches these: a look at an int would bind the graph to its value
    if not torch.compiler.is_compiling():
        checks.lengths(function, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    return settle(function, q, k, v, *args, **options)


def needs_grad(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """The rule for LSE, in one place. Grad mode counts: under no_grad nobody will come back for the saved LSE."""
    if not torch.is_grad_enabled():
        return False
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    return _transformed() and any(map(_requires_grad_below, (q, k, v)))


def _transformed() -> bool:
    """Inside torch.func or vmap, run and not traced."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _requires_grad_below(t: Tensor) -> bool:
    """An inner vmap hides from its wrapper that an outer grad watches the tensor."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t) and not t.requires_grad:
        t = functorch.get_unwrapped(t)
    return t.requires_grad


def _differentiable(q: Tensor, k: Tensor, v: Tensor, settings: ops.Settings) -> tuple[Tensor, Tensor]:
    ops.tiles(q, v, settings, backward=True)
    if torch.compiler.is_compiling():
        return ops.attention_fwd_lse(q, k, v, *settings)
    return (ops.Attention if _transformed() else ops.EagerAttention).apply(q, k, v, *settings)


def _differentiable_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, settings: ops.Settings
) -> tuple[Tensor, Tensor]:
    ops_varlen.tiles(q, v, settings, backward=True)
    if torch.compiler.is_compiling():
        return ops_varlen.attention_varlen_fwd_lse(q, k, v, cu_seqlens_q, cu_seqlens_k, *settings)
    function = ops_varlen.AttentionVarlen if _transformed() else ops_varlen.EagerAttentionVarlen
    return function.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, *settings)
