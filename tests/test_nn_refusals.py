"""What GQAttention refuses, and by which message."""

import math
import re

import pytest
import torch
from nn_cases import SIZES, D, E

from gqa_autograd.nn import GQAttention


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 0}, ValueError, "embed_dim must be at least 1, got 0"),
        ({"embed_dim": 32.0}, TypeError, "embed_dim must be an int, got 32.0"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"num_heads": True}, TypeError, "num_heads must be an int, got True"),
        ({"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads, got num_heads=4, num_kv_heads=3"),
        ({"num_kv_heads": 8}, ValueError, "num_heads must be a multiple of num_kv_heads, got num_heads=4, num_kv_heads=8"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
        (
            {"embed_dim": 30, "head_dim": None},
            ValueError,
            "embed_dim must be a multiple of num_heads where head_dim is not given, got embed_dim=30, num_heads=4",
        ),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"head_dim": 15, "rope": 1e4}, ValueError, "head_dim must be even with rope, got 15"),
        ({"v_head_dim": -1}, ValueError, "v_head_dim must be at least 1, got -1"),
        ({"qk_norm": 0}, ValueError, "qk_norm must be above 0, got 0"),
        ({"qk_norm": "rms"}, TypeError, "qk_norm must be a number, got 'rms'"),
        ({"rope": 0.0}, ValueError, "rope must be above 0, got 0.0"),
        ({"rope": math.inf}, ValueError, "rope must be finite, got inf"),
        ({"rope": True}, TypeError, "rope must be a number, got True"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": (3, 0)}, TypeError, "window must be an int, got (3, 0)"),
        ({"softcap": -1.0}, ValueError, "softcap must be at least 0, got -1.0"),
        ({"softcap": None}, TypeError, "softcap must be a number, got None"),
        ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        ({"scale": "auto"}, TypeError, "scale must be a number, got 'auto'"),
        ({"deterministic": 1}, TypeError, "deterministic must be True, False or None, got 1"),
        ({"dropout": 0.1}, ValueError, "dropout must be 0, got 0.1; "),
        ({"dropout": 0.1}, ValueError, "put nn.Dropout after this module"),
        ({"dropout": None}, TypeError, "dropout must be a number, got None"),
    ],
    ids=str,
)
def test_constructor_refuses(options, error, message):
    with pytest.raises(error, match=r"^GQAttention: .*" + re.escape(message)):
        GQAttention(**SIZES | options)


def test_constructor_accepts_the_values_that_switch_off():
    off = GQAttention(**SIZES, qk_norm=False, rope=None, window=None, softcap=0, scale=None, dropout=0)
    assert off.q_norm is None
    assert off.k_norm is None
    assert GQAttention(**SIZES, qk_norm=True).q_norm.eps == 1e-6


def pair(*shape):
    return torch.ones(shape), torch.ones(shape)


X = torch.zeros(2, 5, E)
CU = torch.tensor([0, 5], dtype=torch.int32)
ROPE = {"rope": 1e4}


@pytest.mark.parametrize(
    ("options", "x", "call", "error", "message"),
    [
        ({}, [1.0], {}, TypeError, "x must be a torch.Tensor, got list"),
        ({}, X[..., 1:], {}, ValueError, "x must be [B, S, E] with E=32, or [T, E] with cu_seqlens, got shape (2, 5, 31)"),
        ({}, X[None], {}, ValueError, "x must be [B, S, E] with E=32, or [T, E] with cu_seqlens, got shape (1, 2, 5, 32)"),
        ({}, X[0], {}, ValueError, "x must be [B, S, E] with E=32, or [T, E] with cu_seqlens, got shape (5, 32)"),
        ({}, X, {"max_seqlen": 5}, ValueError, "max_seqlen must be None without cu_seqlens, got int"),
        ({}, X, {"cu_seqlens": CU}, ValueError, "x must be [T, E] with cu_seqlens and E=32, got shape (2, 5, 32)"),
        ({}, X[0, :, 1:], {"cu_seqlens": CU}, ValueError, "x must be [T, E] with cu_seqlens and E=32, got shape (5, 31)"),
        ({}, X[0], {"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
        ({}, X[0], {"cu_seqlens": CU.long()}, TypeError, "cu_seqlens must be int32, got torch.int64"),
        ({}, X[0], {"cu_seqlens": CU[None]}, ValueError, "cu_seqlens must be [N + 1], got shape (1, 2)"),
        ({}, X[0], {"cu_seqlens": CU[:0]}, ValueError, "cu_seqlens must be [N + 1], got shape (0,)"),
        ({}, X[0], {"cu_seqlens": CU.to("meta")}, ValueError, "cu_seqlens must be on the device of x, got meta, x on cpu"),
        (
            ROPE,
            X[0],
            {"cu_seqlens": CU, "positions": torch.arange(4)},
            ValueError,
            "positions must be [S] or [B, S] with B=1, S=5, got shape (4,)",
        ),
        ({}, X[0], {"cu_seqlens": CU, "positions": torch.arange(5)}, ValueError, "positions must be None without rope"),
        (
            {},
            X[0],
            {"cu_seqlens": CU, "position_embeddings": pair(2, 5, D)},
            ValueError,
            "position_embeddings cos must be [1, S, D] or [B, S, D] with B=1, S=5, D=16, got shape (2, 5, 16)",
        ),
        ({}, X, {"kv_cache": object()}, TypeError, "kv_cache must be a KVCache, a PagedKVCache or a layer of one, got object"),
        ({}, X, {"positions": torch.arange(5)}, ValueError, "positions must be None without rope"),
        (
            ROPE,
            X,
            {"positions": torch.arange(5), "position_embeddings": pair(1, 5, D)},
            ValueError,
            "positions and position_embeddings must not be given together",
        ),
        (ROPE, X, {"positions": [0, 1, 2, 3, 4]}, TypeError, "positions must be a torch.Tensor, got list"),
        (ROPE, X, {"positions": torch.arange(5.0)}, TypeError, "positions must be integers, got torch.float32"),
        (ROPE, X, {"positions": torch.ones(5, dtype=torch.bool)}, TypeError, "positions must be integers, got torch.bool"),
        (ROPE, X, {"positions": torch.arange(4)}, ValueError, "positions must be [S] or [B, S] with B=2, S=5, got shape (4,)"),
        (ROPE, X, {"positions": torch.tensor(3)}, ValueError, "positions must be [S] or [B, S] with B=2, S=5, got shape ()"),
        (ROPE, X, {"positions": torch.ones(3, 5).int()}, ValueError, "positions must be [S] or [B, S] with B=2, S=5, got shape (3, 5)"),
        (
            ROPE,
            X,
            {"positions": torch.ones(2, 1, 5).int()},
            ValueError,
            "positions must be [S] or [B, S] with B=2, S=5, got shape (2, 1, 5)",
        ),
        ({}, X, {"position_embeddings": torch.ones(2, 5, D)}, TypeError, "position_embeddings must be a pair (cos, sin), got Tensor"),
        ({}, X, {"position_embeddings": pair(1, 5, D)[:1]}, TypeError, "position_embeddings must be a pair (cos, sin), got tuple"),
        ({}, X, {"position_embeddings": (None, None)}, TypeError, "position_embeddings cos must be a torch.Tensor, got NoneType"),
        *(
            (
                {},
                X,
                {"position_embeddings": pair(*shape)},
                ValueError,
                f"position_embeddings cos must be [1, S, D] or [B, S, D] with B=2, S=5, D=16, got shape {shape}",
            )
            for shape in ((5, D), (3, 5, D), (1, 4, D), (2, 5, D // 2), (2, 5, 1), (2, 1, D), (1, 5, D, 1))
        ),
        (
            {},
            X,
            {"position_embeddings": (torch.ones(1, 5, D), torch.ones(1, 1, D))},
            ValueError,
            "position_embeddings sin must be [1, S, D] or [B, S, D] with B=2, S=5, D=16, got shape (1, 1, 16)",
        ),
    ],
)
def test_forward_refuses(options, x, call, error, message):
    module = GQAttention(**SIZES, **options)
    with pytest.raises(error, match=r"^GQAttention: .*" + re.escape(message)):
        module(x, **call)
