"""Modules around the functional form: projections, normalisation, rotation and layout. The attention itself is `functional.attention`."""

from typing import Any

import torch
from torch import Tensor, nn

from . import checks_nn, functional, functional_decode
from .cache import CacheLayer, KVCache, PagedKVCache


class GQAttention(nn.Module):
    """y = o_proj(attention(rotate(q_norm(q_proj(x))), rotate(k_norm(k_proj(x))), v_proj(x))), grouped-query self-attention

    The parameters are called q_proj, k_proj, v_proj, o_proj and, with qk_norm, q_norm and k_norm, each with a weight and perhaps a bias:
    those of Llama, Qwen and Mistral attention in Hugging Face transformers, whose state dicts load with strict=True. The projections are
    plain nn.Linear. How many heads there are is read off what they return, so a projection may be sharded over its columns (and o_proj
    over its rows), wrapped or replaced. There are no buffers: a module built on the meta device needs `to_empty` and then
    `reset_parameters` or `load_state_dict`, nothing else. The child `attention` is called with (q, k, v), each [B, S, H, D], and holds no
    parameters: hooks and parallel plans that want the attention alone find it there.

    Args:
        embed_dim: E, the size of x and of y.
        num_heads: H_q.
        num_kv_heads: H_kv, of which H_q must be a multiple; H_q when None.
        head_dim: D; embed_dim // num_heads when None.
        v_head_dim: D_v; head_dim when None.
        bias: whether q_proj, k_proj and v_proj have a bias.
        out_bias: whether o_proj has one; as `bias` when None.
        qk_norm: RMSNorm over the D entries of each head of q and k, before the rotation: True, or the eps; True is 1e-6, None is off.
        rope: the base theta of `rotary_embedding`, by which q and k are rotated; None is no rotation but by `position_embeddings`.
        causal: token i sees tokens j <= i.
        window: W, how many tokens a token sees, itself included: i - W < j <= i, which is window=(W - 1, 0) of the functional form; not
            causal, |i - j| < W, which is (W - 1, W - 1). None is unbounded.
        softcap, scale, deterministic: as in `functional.attention`.
        dropout: 0; anything else is refused.
        device, dtype: of the parameters.
    Raises: ValueError for a number, TypeError for a type.
    Source: arXiv:2305.13245 section 2.2; the rotation arXiv:2104.09864 section 3.4.2; the normalisation arXiv:2010.04245, arXiv:2505.09388.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: bool | float | None = None,
        rope: float | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        dropout: float = 0.0,
        deterministic: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = checks_nn.integer("embed_dim", embed_dim)
        self.num_heads = checks_nn.integer("num_heads", num_heads)
        self.num_kv_heads = num_heads if num_kv_heads is None else checks_nn.integer("num_kv_heads", num_kv_heads)
        if num_heads % self.num_kv_heads:
            raise ValueError(
                f"GQAttention: num_heads must be a multiple of num_kv_heads, got num_heads={num_heads}, num_kv_heads={num_kv_heads}"
            )
        self.head_dim = checks_nn.split(embed_dim, num_heads) if head_dim is None else checks_nn.integer("head_dim", head_dim)
        self.v_head_dim = self.head_dim if v_head_dim is None else checks_nn.integer("v_head_dim", v_head_dim)
        self.rope = None if rope is None else checks_nn.number("rope", rope, above=0)
        if rope is not None and self.head_dim % 2:
            raise ValueError(f"GQAttention: head_dim must be even with rope, got {self.head_dim}")
        eps = checks_nn.eps(qk_norm)
        if checks_nn.number("dropout", dropout) != 0:
            raise ValueError(
                f"GQAttention: dropout must be 0, got {dropout}; attention weights are never stored, so none can be dropped: "
                "put nn.Dropout after this module, on the residual branch"
            )
        core = InnerAttention(causal=causal, window=window, softcap=softcap, scale=scale, deterministic=deterministic)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        out_bias = bias if out_bias is None else out_bias
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, self.num_kv_heads * self.head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, self.num_kv_heads * self.v_head_dim, bias=bias, **factory)
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, embed_dim, bias=out_bias, **factory)
        self.q_norm = None if eps is None else HeadNorm(self.head_dim, eps=eps, **factory)
        self.k_norm = None if eps is None else HeadNorm(self.head_dim, eps=eps, **factory)
        self.attention = core

    def reset_parameters(self) -> None:
        """Draws the projections as nn.Linear does, uniform in ±in_features ** -0.5, and sets the weights of the norms to 1."""
        for child in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.q_norm, self.k_norm):
            if child is not None:
                child.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | Tensor | None = None,
        kv_cache: CacheLayer | KVCache | PagedKVCache | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y [B, S, E], or (y, lse) with return_lse; packed, y [T, E]

        Args:
            x: [B, S, E], or with cu_seqlens [T, E]: N sequences one after the other, each of which sees only itself.
            positions: integers [S], [1, S] or [B, S], packed with S = T and B = 1, by which `rope` rotates; 0 … S - 1 when None, packed 0 …
                in each sequence. What a token sees depends on its place in x, not on its position.
            position_embeddings: (cos, sin), each [1, S, D] or [B, S, D], as `rotary_embedding` returns them and as Hugging Face passes
                them; they rotate q and k in place of `rope`. To compute them once for all layers, or for a scaled rotation.
            cu_seqlens: int32 [N + 1], the offsets of `functional.attention_varlen`, for packed x. Tokens beyond the last one get
                o_proj(0), and no gradient but that of o_proj's bias.
            max_seqlen: with cu_seqlens, accepted for the sake of other libraries; not used.
            kv_cache: a KVCache or PagedKVCache of one layer, or `layer(i)` of one of several. x are the next S tokens of each sequence:
                their keys and values are appended in place, and they see all that the cache holds. `positions` count on from its lengths,
                on the device. S is at most 64, or anything while the cache is empty. For inference only: no gradient, causal, not packed.
            return_lse: return lse [B, H_q, S], packed [H_q, T], as well: float32, natural logarithm, differentiable.
        Returns: y in the dtype of o_proj's output: that of x and the parameters, under autocast the autocast dtype.
        Raises: ValueError for a shape, TypeError for a dtype, RuntimeError for a gradient through a cache, NotImplementedError for what a
            cache can't do, and on CUDA for what no kernel computes. On CUDA the attention takes float16 and bfloat16 only; float32
            parameters need torch.autocast.
        """
        checks_nn.input(x, cu_seqlens, max_seqlen, self.embed_dim)
        # A child that was put in the place of the attention need not say whether it is causal
        causal = getattr(self.attention, "causal", True)
        cache = checks_nn.kv_cache(x, kv_cache, cu_seqlens, causal, self.head_dim, self.v_head_dim)
        if cu_seqlens is not None:
            # A batch of one, until the heads are handed on
            x = x.unsqueeze(0)
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.v_head_dim))
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        cos_sin = self._cos_sin(x, positions, position_embeddings, cu_seqlens, cache)
        if cos_sin is not None:
            q, k = _rotate(q, *cos_sin), _rotate(k, *cos_sin)
        if cu_seqlens is not None:
            return self._packed(q[0], k[0], v[0], cu_seqlens, max_seqlen, return_lse)
        options: dict[str, Any] = {}
        if cache is not None:
            checks_nn.no_gradient(q, k, v)
            options["kv_cache"] = cache
        if not return_lse:
            return self.o_proj(self.attention(q, k, v, **options).flatten(2))
        out, lse = self.attention(q, k, v, return_lse=True, **options)
        return self.o_proj(out.flatten(2)), lse

    def _packed(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | Tensor | None, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        result = self.attention(q, k, v, return_lse=return_lse, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        out = result[0] if return_lse else result
        # Rows of out that nobody wrote may hold NaN, and 0 · NaN would spoil the gradient of o_proj's weight
        rest = torch.arange(out.shape[0], device=out.device) >= cu_seqlens[-1]
        y = self.o_proj(out.masked_fill(rest[:, None, None], 0).flatten(1))
        return (y, result[1]) if return_lse else y

    def _cos_sin(
        self,
        x: Tensor,
        positions: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        cu_seqlens: Tensor | None,
        cache: CacheLayer | None,
    ) -> tuple[Tensor, Tensor] | None:
        """(cos, sin), each [1 or B, S, D], or None for no rotation."""
        if position_embeddings is not None:
            if positions is not None:
                raise ValueError("GQAttention: positions and position_embeddings must not be given together, got both")
            return checks_nn.position_embeddings(x, position_embeddings, self.head_dim)
        if self.rope is None:
            if positions is not None:
                raise ValueError("GQAttention: positions must be None without rope, which they are for; got positions, and rope=None")
            return None
        if positions is None:
            positions = _counted(x.shape[1], x.device, cu_seqlens) if cache is None else cache.positions(x.shape[1])
        else:
            checks_nn.positions(x, positions)
        cos, sin = rotary_embedding(positions if positions.dim() == 2 else positions.unsqueeze(0), self.head_dim, self.rope)
        return cos, sin

    def extra_repr(self) -> str:
        parts = [f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"]
        if self.v_head_dim != self.head_dim:
            parts.append(f"v_head_dim={self.v_head_dim}")
        if self.rope is not None:
            parts.append(f"rope={self.rope}")
        return ", ".join(parts)


class InnerAttention(nn.Module):
    """attention(q, k, v) with the settings of a GQAttention, as a module: without parameters, there to be hooked or replaced."""

    def __init__(self, *, causal: bool, window: int | None, softcap: float, scale: float | None, deterministic: bool | None = None) -> None:
        super().__init__()
        self.causal = causal
        self.window = None if window is None else checks_nn.integer("window", window)
        self.softcap = checks_nn.number("softcap", softcap, least=0)
        self.scale = None if scale is None else checks_nn.number("scale", scale)
        if deterministic is not None and not isinstance(deterministic, bool):
            raise TypeError(f"GQAttention: deterministic must be True, False or None, got {deterministic!r}")
        self.deterministic = deterministic

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: bool = False,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | Tensor | None = None,
        kv_cache: CacheLayer | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """out [B, S_q, H_q, D_v] of q [B, S_q, H_q, D], k [B, S_kv, H_kv, D], v [B, S_kv, H_kv, D_v]; (out, lse) with return_lse.

        With cu_seqlens the same without B: q [T, H_q, D] and so on, sequences packed. With kv_cache k and v are appended to it, and q sees
        all that it holds."""
        # The functional form counts the tokens beside this one, the module counts this one too
        side = -1 if self.window is None else self.window - 1
        options: dict[str, Any] = {"causal": self.causal, "scale": self.scale, "softcap": self.softcap, "window": (side, side)}
        if kv_cache is not None:
            lengths = kv_cache.append(k, v)
            # What is longer came with an empty cache, so that the new tokens are all that there is
            if q.shape[1] <= checks_nn.MAX_QUERIES:
                decode = functional_decode.attention_decode_with_lse if return_lse else functional_decode.attention_decode
                return decode(q, kv_cache.k_cache, kv_cache.v_cache, lengths, page_table=kv_cache.page_table, **options)
        options["deterministic"] = self.deterministic
        if cu_seqlens is None:
            return (functional.attention_with_lse if return_lse else functional.attention)(q, k, v, **options)
        packed = functional.attention_varlen_with_lse if return_lse else functional.attention_varlen
        return packed(q, k, v, cu_seqlens, cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, **options)

    def extra_repr(self) -> str:
        parts = [f"causal={self.causal}"]
        if self.window is not None:
            parts.append(f"window={self.window}")
        if self.softcap:
            parts.append(f"softcap={self.softcap}")
        if self.scale is not None:
            parts.append(f"scale={self.scale}")
        if self.deterministic is not None:
            parts.append(f"deterministic={self.deterministic}")
        return ", ".join(parts)


class HeadNorm(nn.RMSNorm):
    """weight x / sqrt(mean(x^2) + eps) over the last dimension, computed at least in the weight's precision, returned in x.dtype

    Under autocast x is bfloat16 and the weight float32: nn.RMSNorm itself then warns and leaves its fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype))).to(x.dtype)


def rotary_embedding(positions: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of angle[..., s, d] = positions[..., s] theta ** (-2 (d mod D/2) / D), for the half-rotated form

    Args: positions [..., S], integers, any device; head_dim D, even; theta the base.
    Returns: (cos, sin), each [..., S, D], float32 whatever autocast says: `position_embeddings` of GQAttention.
    Source: arXiv:2104.09864 section 3.4.2, with entry d paired to d + D/2 in place of 2d to 2d + 1.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    # Reciprocal of a power, and in this order, for the very bits of the frequencies that released weights were trained with
    angle = positions.unsqueeze(-1).float() * (1.0 / theta**exponent)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, H, D] rotated by cos and sin [1 or B, S, D], in x.dtype: float32 angles must not promote bfloat16 heads."""
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return (x * cos.unsqueeze(2) + turned * sin.unsqueeze(2)).to(x.dtype)


def _counted(S: int, device: torch.device, cu_seqlens: Tensor | None) -> Tensor:
    """The positions [S] of tokens: their places, packed those in their own sequences."""
    if cu_seqlens is None:
        return torch.arange(S, device=device)
    token = torch.arange(S, dtype=cu_seqlens.dtype, device=device)
    # The last offset that is not beyond the token begins its sequence, also where empty ones begin there too
    return token - cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
