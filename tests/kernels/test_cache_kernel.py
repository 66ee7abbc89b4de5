"""The kernel that appends to a cache, in the emulator: tokens without a place included."""

import contextlib
from unittest import mock

import catalogue
import pytest
import torch

pytest.importorskip("tilelang", reason="no tilelang here: the kernel was not emulated")
from cache_cases import ADVERSARIAL, ORDERLY, appended, make
from emulation import emulator

from gqa_autograd.kernels import cache, device


@contextlib.contextmanager
def emulated():
    def executable(dtype, paged):
        return emulator(catalogue.entries()[f"append-{str(dtype).removeprefix('torch.')}{'-paged' * paged}"])

    facts = {"require_hopper": lambda function, where: None, "current": lambda where: contextlib.nullcontext()}
    with mock.patch.multiple(device, **facts), mock.patch.object(cache, "executable", executable):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*ORDERLY, *ADVERSARIAL], ids=str)
def test_append(case, dtype):
    tensors = make(case, dtype)
    want = appended(case, tensors)
    with emulated():
        cache.launch(*tensors)
    for name, got, wanted in zip(("k", "v"), tensors, want, strict=False):
        # Bits, so that a NaN that nobody touched counts as equal
        assert torch.equal(got.view(torch.int16), wanted.view(torch.int16)), name


def test_new_tokens_whose_columns_lie_apart_are_copied():
    case = ORDERLY[1]
    tensors = make(case, torch.bfloat16)
    apart = tensors._replace(k_new=tensors.k_new.mT.contiguous().mT)
    assert apart.k_new.stride(3) != 1
    want = appended(case, tensors)
    with emulated():
        cache.launch(*apart)
    assert torch.equal(apart.k_cache.view(torch.int16), want[0].view(torch.int16))


def test_a_cache_may_be_a_view():
    """Of a pool that holds keys and values of one page together, and of one row of a batch."""
    case = ORDERLY[4]
    tensors = make(case, torch.bfloat16)
    pool = torch.full((case.P, 2, case.rows, case.H_kv, case.D), torch.nan, dtype=torch.bfloat16)
    want = appended(case, tensors)
    with emulated():
        cache.launch(pool[:, 0], pool[:, 1], *tensors[2:])
    for got, wanted in zip((pool[:, 0], pool[:, 1]), want, strict=True):
        assert torch.equal(got.contiguous().view(torch.int16), wanted.view(torch.int16))
