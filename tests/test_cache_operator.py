"""gqa_autograd::cache_append_ on a CPU: what it writes and what it leaves alone, its schema, what it refuses."""

import re

import pytest
import torch
from cache_cases import ADVERSARIAL, BIG, ORDERLY, appended, make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from gqa_autograd import ops_cache
from gqa_autograd.ops_cache import cache_append_
from gqa_autograd.reference import cache as reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ORDERLY, ids=str)
def test_append(case, dtype):
    tensors = make(case, dtype)
    want = appended(case, tensors)
    assert cache_append_(*tensors) is None
    torch.testing.assert_close(tensors[:2], want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", [*ORDERLY, *ADVERSARIAL], ids=str)
def test_the_definition_drops_what_has_no_place(case):
    """The operator refuses these values on a CPU; a kernel, which can't, is held against the definition."""
    tensors = make(case)
    want = appended(case, tensors)
    reference.append(*tensors)
    torch.testing.assert_close(tensors[:2], want, rtol=0, atol=0, equal_nan=True)


def test_a_sequence_without_pages_is_not_in_use():
    case = ORDERLY[4]._replace(lengths=(3, 0, 9), tables=((2,), (-1,), (-1,)), rows=8)
    tensors = make(case)
    want = appended(case, tensors)
    cache_append_(*tensors)
    torch.testing.assert_close(tensors[:2], want, rtol=0, atol=0, equal_nan=True)


def test_strided_caches_and_tokens():
    case = ORDERLY[1]
    tensors = make(case)
    want = appended(case, tensors)
    pool = torch.full((3, 2, 8, 2, 8), torch.nan)
    k_new, v_new = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors[2:4])
    cache_append_(pool[:, 0], pool[:, 1], k_new, v_new, *tensors[4:])
    torch.testing.assert_close((pool[:, 0], pool[:, 1]), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", ORDERLY, ids=str)
def test_opcheck(case):
    tensors = make(case)
    for t in tensors[:2]:
        t.zero_()
    opcheck(cache_append_, tensors)
    permuted = tensors._replace(k_new=tensors.k_new.transpose(1, 2).contiguous().transpose(1, 2))
    opcheck(cache_append_, permuted)


def test_schema():
    """The caches alone are mutated; nothing is returned, so no copy of a cache can be; tensors only, none by keyword."""
    schema = cache_append_._schema
    mutated = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert mutated == ["k_cache", "v_cache"]
    assert schema.returns == []
    assert {str(a.type) for a in schema.arguments} == {"Tensor", "Optional[Tensor]"}
    assert not any(a.kwarg_only for a in schema.arguments)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_version(mode, monkeypatch):
    """A backward that saved the cache from before must be able to tell: also of a kernel's writes, which torch does not see."""
    monkeypatch.setattr(reference, "append", lambda *tensors: None)
    tensors = make(ORDERLY[1])
    before = [t._version for t in tensors[:2]]
    with mode():
        cache_append_(*tensors)
    assert all(t._version > version for t, version in zip(tensors[:2], before, strict=True))


def test_an_inference_tensor_has_no_version():
    with torch.inference_mode():
        tensors = make(ORDERLY[1])
        want = appended(ORDERLY[1], tensors)
        cache_append_(*tensors)
    torch.testing.assert_close(tensors[:2], want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "k_new", "v_new"])
def test_a_gradient_is_refused(name):
    tensors = make(ORDERLY[1])
    spoiled = tensors._replace(**{name: getattr(tensors, name).clone().requires_grad_()})
    with pytest.raises(RuntimeError, match=f"cache_append_: {name} must not require a gradient.*torch.no_grad"):
        cache_append_(*spoiled)
    assert spoiled.k_cache.isnan().all()
    with torch.no_grad():
        cache_append_(*spoiled)
    assert not spoiled.k_cache.isnan().all()


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


DENSE, PAGED = ORDERLY[1], ORDERLY[4]
REFUSED = [
    (DENSE, {"k_cache": lambda t: t[0]}, ValueError, "k_cache must have 4 dimensions [B, S_max, H_kv, D], or pages"),
    (DENSE, {"v_new": lambda t: t[0]}, ValueError, "v_new must have 4 dimensions [B, S_new, H_kv, D], got shape (3, 2, 8)"),
    (DENSE, {"k_new": lambda t: t.double()}, TypeError, "k_new must have the dtype of k_cache, got float64, k_cache float32"),
    (DENSE, {"v_new": lambda t: t.to("meta")}, ValueError, "v_new must be on the device of k_cache, got meta, k_cache on cpu"),
    (DENSE, {"v_new": lambda t: t[:, :2]}, ValueError, "v_new must have shape (3, 3, 2, 8)"),
    (DENSE, {"k_cache": lambda t: t[..., :1, :]}, ValueError, "k_cache must have shape (3, 8, 2, 8)"),
    (DENSE, {"v_cache": lambda t: t[:, :7]}, ValueError, "v_cache must have shape (3, 8, 2, 8)"),
    (DENSE, {"k_cache": lambda t: t[..., ::2], "k_new": lambda t: t[..., ::2]}, ValueError, "k_cache must have stride 1 along D, got 2"),
    (DENSE, {"cache_seqlens": lambda t: t.long()}, TypeError, "cache_seqlens must be int32, got int64"),
    (DENSE, {"cache_seqlens": lambda t: t[:2]}, ValueError, "cache_seqlens must have shape (3,)"),
    (DENSE, {"cache_seqlens": lambda t: t[None]}, ValueError, "cache_seqlens must be [B], got shape (1, 3)"),
    (DENSE, {"cache_seqlens": lambda t: t.to("meta")}, ValueError, "cache_seqlens must be on the device of k_cache, got meta"),
    (DENSE, {"k_cache": lambda t: t[:2], "v_cache": lambda t: t[:2]}, ValueError, "k_cache must have the batch size of k_new, got B=2"),
    (DENSE, {"cache_seqlens": lambda t: ints(0, -1, 0)}, ValueError, "cache_seqlens must be at least 0, got -1 for sequence 1"),
    (DENSE, {"cache_seqlens": lambda t: ints(0, 0, 6)}, ValueError, "must have room, got 6 + 3 tokens for 8 rows of sequence 2"),
    (DENSE, {"cache_seqlens": lambda t: ints(BIG, 0, 6)}, ValueError, f"must have room, got {BIG} + 3 tokens for 8 rows of sequence 0"),
    (PAGED, {"page_table": lambda t: t.long()}, TypeError, "page_table must be int32, got int64"),
    (PAGED, {"page_table": lambda t: t[0]}, ValueError, "page_table must be [B, entries], got shape (3,)"),
    (PAGED, {"page_table": lambda t: t[:2]}, ValueError, "page_table must have shape (3, 3)"),
    (PAGED, {"page_table": lambda t: t + 2}, ValueError, "page_table must have pages below 5, or -1 for none, got 5 for sequence 2"),
    (PAGED, {"page_table": lambda t: t - 3}, ValueError, "page_table must have pages below 5, or -1 for none, got -2 for sequence 1"),
    (PAGED, {"cache_seqlens": lambda t: ints(0, 12, 0)}, ValueError, "must have room, got 12 + 1 tokens for 3 pages of 4 rows"),
]


@pytest.mark.parametrize(("case", "change", "error", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else None)
def test_refused_before_anything_is_written(case, change, error, message):
    tensors = make(case)
    changed = tensors._replace(**{name: f(getattr(tensors, name)) for name, f in change.items()})
    with pytest.raises(error, match="^cache_append_: .*" + re.escape(message)):
        cache_append_(*changed)
    assert tensors.k_cache.isnan().all()
    assert tensors.v_cache.isnan().all()


def test_float32_on_cuda_is_refused():
    with FakeTensorMode():
        tensors = make(ORDERLY[1], device="cuda")
        with pytest.raises(TypeError, match="cache_append_: k_cache must be float16, bfloat16, got float32"):
            cache_append_(*tensors)
        assert cache_append_(*make(ORDERLY[1], torch.bfloat16, device="cuda")) is None


def test_a_cuda_call_reaches_the_kernel(monkeypatch):
    """What `kernels.cache.launch` is handed, with a list in its place."""
    seen = []

    class Kernel:
        def launch(*tensors):
            seen.append(tensors[1:])

    monkeypatch.setattr(ops_cache, "_kernel", lambda: Kernel())
    tensors = make(PAGED, torch.bfloat16)
    ops_cache._cuda(*tensors)
    ((*passed,),) = seen
    assert all(a is b for a, b in zip(passed, tensors, strict=True))
