"""A small Llama-like language model: RMSNorm, gqa_autograd.nn.GQAttention with RoPE, SwiGLU, tied embeddings."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gqa_autograd import KVCache
from gqa_autograd.cache import CacheLayer
from gqa_autograd.flops import visible_pairs
from gqa_autograd.nn import GQAttention

ROPE_THETA = 10_000.0
PEAK_FLOPS = 989e12  # bfloat16, dense: data sheets of the H100 SXM and the H200

# Causal attention of q [B, S, H_q, D] and k, v [B, S, H_kv, D], each token up to its own position
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# call(block, x) gives block(x)
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """What decides the names and sizes of the weights, and the context they are made for."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    context: int
    qk_norm: bool


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), arXiv:2002.05202; hidden size 3.5 dim as in Llama 3, in multiples of 64."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = -(-7 * dim // 128) * 64
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attending(nn.Module):
    """A function as the child `attention` of GQAttention: without parameters, so weights, projections and RoPE stay as they are."""

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend = attend

    # No **options: a cache that is given must not be ignored
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)


class Block(nn.Module):
    def __init__(self, shape: Shape, attend: Attend | None = None):
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.dim, eps=1e-5)
        self.attention = GQAttention(shape.dim, shape.heads, shape.kv_heads, qk_norm=shape.qk_norm, rope=ROPE_THETA, causal=True)
        if attend is not None:
            self.attention.set_submodule("attention", Attending(attend))
        self.mlp_norm = nn.RMSNorm(shape.dim, eps=1e-5)
        self.mlp = SwiGLU(shape.dim)

    def forward(self, x: Tensor, kv_cache: CacheLayer | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), kv_cache=kv_cache)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Tokens [B, S] -> logits [B, S, vocabulary], each of the tokens up to its own position.

    attend: the attention, in the place of GQAttention's own.
    call: how a block is called; torch.utils.checkpoint.checkpoint with use_reentrant=False checkpoints each, see docs/training.md."""

    def __init__(self, shape: Shape, vocabulary: int, attend: Attend | None = None, call: Call | None = None):
        super().__init__()
        self.shape, self.call = shape, call
        self.embedding = nn.Embedding(vocabulary, shape.dim)
        self.blocks = nn.ModuleList(Block(shape, attend) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, eps=1e-5)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02; what is added to the residual stream is smaller, so its variance doesn't grow with depth."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                added = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 * (2 * self.shape.layers) ** -0.5 if added else 0.02)
            else:
                nn.init.ones_(weight)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """With a cache, tokens are the next ones of each sequence in it."""
        if tokens.shape[1] > self.shape.context:
            raise ValueError(f"LanguageModel: at most context={self.shape.context} tokens, got {tokens.shape[1]}")
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            given = () if cache is None else (cache.layer(i),)
            x = block(x, *given) if self.call is None else self.call(block, x, *given)
        return F.linear(self.norm(x), self.embedding.weight)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The baseline: torch's own, by the backend that torch takes."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def autocast(device: torch.device) -> torch.autocast:
    """On CUDA the weights stay float32 and the products run in bfloat16; on a CPU everything is float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def loss_of(model: Callable[[Tensor], Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the next tokens, in nats."""
    with autocast(tokens.device):
        logits = model(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def train_flops_per_token(model: LanguageModel, seq_len: int) -> float:
    """6 N for the products with the N weights (the tied embedding counts once, as the last product), and for attention 3.5 times its
    forward, 4 D FLOPs for each visible causal pair and head: of a backward's 5 products none is free, the forward has 2."""
    shape = model.shape
    weights = sum(weight.numel() for weight in model.parameters())
    pairs = visible_pairs(seq_len, seq_len, window_right=0) / seq_len
    return 6 * weights + 3.5 * 4 * shape.dim * pairs * shape.layers
