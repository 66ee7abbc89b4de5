"""For Hugging Face transformers: `HFCache`, a KVCache as its models take one, and `register`, this package's attention by name.

    register()
    model.set_attn_implementation("gqa_autograd")
    model.generate(ids, past_key_values=HFCache(model.config, batch, max_length, dtype=model.dtype, device=model.device))

Each works without the other. Imported by nothing else here, since transformers is optional."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import flash_attention_mask

from . import functional
from .cache import CacheLayer, KVCache

NAME = "gqa_autograd"


def register(name: str = NAME) -> None:
    """Makes `attention` known to transformers by a name for set_attn_implementation and attn_implementation.

    Args: name: which. Returns: None. Raises: nothing; the attention itself refuses padding, dropout and packed sequences when it is called.
    """
    AttentionInterface.register(name, attend)
    # Without it a model would drop the mask of padded prompts, and the attention could not refuse them
    AttentionMaskInterface.register(name, flash_attention_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`attention` as transformers calls it: heads before tokens going in, after them coming out; sliding_window counts the token itself.

    Raises: NotImplementedError for a mask of padding and for packed sequences, ValueError for dropout; what `attention` raises."""
    if attention_mask is not None:
        raise NotImplementedError(
            "gqa_autograd: prompts must not be padded, got an attention mask with zeros; "
            "batch prompts of one length, or take 'sdpa' with HFCache"
        )
    if options.get("cu_seq_lens_q") is not None:
        raise NotImplementedError("gqa_autograd: packed sequences are not supported through transformers, got cu_seq_lens_q")
    if dropout:
        raise ValueError(f"gqa_autograd: dropout must be 0, got {dropout}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    side = -1 if sliding_window is None else sliding_window - 1
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return functional.attention(q, k, v, causal=causal, scale=scaling, softcap=softcap or 0, window=(side, -1 if causal else side)), None


class HFCache(Cache):
    """A KVCache of a whole model as `past_key_values`: allocated once, appended in place, handed to any attention implementation as views

    Sequences are of one length, as generate() has them: prompts of different lengths are padded on the left, which an attention with masks
    takes. Beams work; `cache` is the KVCache itself.

    Args:
        config: of the model: num_hidden_layers, num_key_value_heads, head_dim.
        batch, max_length: sequences (times beams), and the most tokens each will have.
        dtype, device: of the model.
    Raises: ValueError or TypeError as KVCache; later, for more tokens than max_length.
    """

    def __init__(
        self, config: Any, batch: int, max_length: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        config = config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.cache = KVCache(batch, max_length, kv_heads, head_dim, layers=config.num_hidden_layers, dtype=dtype, device=device)
        super().__init__(layers=[_Layer(self.cache, i) for i in range(self.cache.layers)])


class _Layer(CacheLayerMixin):
    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, cache: KVCache, i: int) -> None:
        super().__init__()
        layer: CacheLayer = cache.layer(i)
        # Heads before tokens, as everybody there expects them
        self._views = layer.k_cache.transpose(1, 2), layer.v_cache.transpose(1, 2)
        self.keys, self.values = self._views
        self.dtype, self.device = layer.k_cache.dtype, layer.k_cache.device
        self.is_initialized = True
        self._cache, self._layer, self._length = cache, layer, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self._layer.append(key_states.transpose(1, 2), value_states.transpose(1, 2))
        self._length += key_states.shape[2]
        keys, values = (t[:, :, : self._length] for t in self._views)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return self._cache.max_length

    def reset(self) -> None:
        self._length = 0
        self._cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"HFCache: crop takes how many tokens to remove as a negative number, got {tokens_to_remove}")
        self._length = max(self._length + tokens_to_remove, 0)
        # Each layer says the same of the lengths that they share
        self._cache.crop(self._length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for t in (self._layer.k_cache, self._layer.v_cache):
            t.copy_(t.index_select(0, beam_idx.to(t.device)))
