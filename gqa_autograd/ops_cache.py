"""The operator gqa_autograd::cache_append_: new keys and values into a cache, in place, with lengths on the device.

It is the one operator here that mutates, so it returns nothing: after functionalisation nobody can hold on to an old cache, and a
compiled step keeps none (docs/design/0008-caches.md)."""

import functools

import torch
from torch import Tensor
from torch.library import register_fake

from . import checks_cache
from .ops import LIBRARY
from .reference import cache as reference

_CACHES = "Tensor(a!) k_cache, Tensor(b!) v_cache"
LIBRARY.define(
    f"cache_append_({_CACHES}, Tensor k_new, Tensor v_new, Tensor cache_seqlens, Tensor? page_table=None) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
cache_append_ = torch.ops.gqa_autograd.cache_append_.default


@functools.cache
def _kernel():
    from .kernels import cache

    return cache


def _changed(*caches: Tensor) -> None:
    """A backward that has saved them must be able to tell; neither the schema nor a kernel says so. Inference tensors have no version."""
    for t in caches:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)


def _cpu(k_cache, v_cache, k_new, v_new, cache_seqlens, page_table=None):
    checks_cache.cache_append("cache_append_", k_cache, v_cache, k_new, v_new, cache_seqlens, page_table)
    _changed(k_cache, v_cache)
    reference.append(k_cache, v_cache, k_new, v_new, cache_seqlens, page_table)


def _cuda(k_cache, v_cache, k_new, v_new, cache_seqlens, page_table=None):
    checks_cache.cache_append("cache_append_", k_cache, v_cache, k_new, v_new, cache_seqlens, page_table)
    _changed(k_cache, v_cache)
    _kernel().launch(k_cache, v_cache, k_new, v_new, cache_seqlens, page_table)


def _fake(k_cache, v_cache, k_new, v_new, cache_seqlens, page_table=None):
    checks_cache.cache_append("cache_append_", k_cache, v_cache, k_new, v_new, cache_seqlens, page_table)


def _autograd(k_cache, v_cache, k_new, v_new, cache_seqlens, page_table=None):
    """A gradient would be lost in silence; here it is refused."""
    if torch.is_grad_enabled():
        for name, t in (("k_cache", k_cache), ("v_cache", v_cache), ("k_new", k_new), ("v_new", v_new)):
            if t.requires_grad:
                raise RuntimeError(f"cache_append_: {name} must not require a gradient, none flows through a cache; use torch.no_grad()")
    with torch._C._AutoDispatchBelowAutograd():
        cache_append_(k_cache, v_cache, k_new, v_new, cache_seqlens, page_table)


for _device, _body in (("CPU", _cpu), ("CUDA", _cuda), ("Autograd", _autograd)):
    LIBRARY.impl(cache_append_, _body, _device)
register_fake(cache_append_, _fake, lib=LIBRARY)
