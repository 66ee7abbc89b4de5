"""Sizes and helpers that the tests of GQAttention share."""

import torch
from torch import nn
from torch.nn import functional as F

from gqa_autograd.nn import GQAttention, rotary_embedding

E, H_Q, H_KV, D = 32, 4, 2, 16
SIZES = {"embed_dim": E, "num_heads": H_Q, "num_kv_heads": H_KV, "head_dim": D}


def randomize(module: nn.Module) -> nn.Module:
    """Weights far from 0 and 1, so that the scores vary and a norm's weight doesn't commute with the rotation."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module


def gradients(y: torch.Tensor, x: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return dict(zip(("x", *names), torch.autograd.grad(y, (x, *parameters), dy), strict=True))


def plain(module: GQAttention, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    heads = (
        p(x).unflatten(-1, (-1, size)).transpose(1, 2)
        for p, size in ((module.q_proj, module.head_dim), (module.k_proj, module.head_dim), (module.v_proj, module.v_head_dim))
    )
    return module.o_proj(F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).transpose(1, 2).flatten(2))


def band(S: int, left: int, right: int) -> torch.Tensor:
    distance = torch.arange(S) - torch.arange(S)[:, None]
    return (distance >= -left) & (distance <= right)


def heads_of(module: GQAttention, *args, **kwargs):
    """What the attention child is called with, and the module's answer."""
    seen = []
    handle = module.attention.register_forward_pre_hook(lambda module, args: seen.extend(args))
    y = module(*args, **kwargs)
    handle.remove()
    return seen, y


ROTATIONS = {
    "none": (None, lambda S: {}),
    "rope": (1e4, lambda S: {}),
    "positions": (1e4, lambda S: {"positions": torch.arange(S)}),
    "position_embeddings": (None, lambda S: {"position_embeddings": rotary_embedding(torch.arange(S)[None], D)}),
}
