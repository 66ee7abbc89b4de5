"""How the backward is launched: what `do` may look like, its kernels, its workspace, graphs, synchronisation, devices."""

import pytest
import torch
from gradient_cases import MASKS
from tools import kernels_of, no_synchronisation, same_bits

import gqa_autograd
from gqa_autograd import testing, testing_varlen
from gqa_autograd.kernels import config
from gqa_autograd.testing import Case
from gqa_autograd.testing_varlen import PackedCase

pytestmark = pytest.mark.gpu
SIZES = pytest.mark.parametrize("sizes", config.D_BACKWARD, ids=str)
BACKWARD = ["attention_bwd_preprocess_kernel", "attention_bwd_kernel", "attention_bwd_postprocess_kernel"]


def graph_of(case: Case, **more):
    """q, k, v, do and out, lse of a forward that can be differentiated."""
    q, k, v, do = testing.make(case, "cuda")
    return q, k, v, do, *gqa_autograd.attention_with_lse(q, k, v, **case.options, **more)


def of_size(sizes: tuple[int, int], *shape: int, **options) -> Case:
    D, D_v = sizes
    return Case(*shape, D, D_v=D_v if D_v != D else None, **options)


@SIZES
def test_do_in_any_layout_gives_the_same_bits(sizes):
    """FA#355, fla#1138: strided, permuted, at an odd address, expanded from a row or a number."""
    case = of_size(sizes, 2, 150, 210, 6, 2, causal=True)
    q, k, v, do, out, _ = graph_of(case, deterministic=True)
    gradients = lambda do: torch.autograd.grad(out, (q, k, v), do, retain_graph=True)  # noqa: E731
    odd = torch.cat((do.new_zeros(1), do.flatten()))[1:].view(do.shape)
    wide = torch.cat((do, do.new_full(do.shape, torch.nan)), 3)[..., : do.shape[3]]
    every = torch.stack((do, do.new_full(do.shape, torch.nan)), 2).flatten(1, 2)[:, ::2]
    permuted = do.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    for views in ((do, odd, wide, every, permuted), (do[:, :1].expand_as(do), do[:, :1].expand_as(do).contiguous())):
        expected = gradients(views[-1].contiguous())
        for view in views:
            assert torch.equal(view, views[-1])
            assert all(same_bits(a, b) for a, b in zip(gradients(view), expected, strict=True)), view.stride()
    one = torch.ones((), dtype=do.dtype, device=do.device)
    pairs = zip(gradients(one.expand_as(do)), gradients(torch.ones_like(do).contiguous()), strict=True)
    assert all(same_bits(a, b) for a, b in pairs)


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("mask", ["full", "causal", "both"])
@SIZES
def test_every_feature_runs_on_the_same_kernels(sizes, mask, softcap):
    """By their names, in both dtypes: nothing leaves the fast path."""
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v, do, out, _ = graph_of(of_size(sizes, 2, 600, 640, 16, 8, softcap=softcap, dtype=dtype, **MASKS[mask]))
        gradient = lambda out=out, q=q, k=k, v=v, do=do: torch.autograd.grad(out, (q, k, v), do, retain_graph=True)  # noqa: E731
        gradient()
        names = kernels_of(gradient)
        assert [name for name in names if name in BACKWARD] == BACKWARD, names
        assert all(name.startswith("attention_bwd") for name in names), names


def measured_workspace(case: Case) -> int:
    """The peak of memory in a backward above what is held before, without the gradients that it returns; bytes."""
    q, k, v, do, out, _ = graph_of(case)
    gradients = lambda: torch.autograd.grad(out, (q, k, v), do, retain_graph=True)  # noqa: E731
    gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = gradients()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(t.numel() * t.element_size() for t in kept)


@pytest.mark.parametrize("shape", [(2, 4096, 4096, 32, 8), (8, 1024, 1024, 32, 8)], ids=str)
@SIZES
def test_workspace(sizes, shape):
    """float32 dq, two float32 for each padded row of queries, one int32 for each block of queries, and what the allocator rounds up to.
    A grid of many blocks is not split: there are no partial sums of dk and dv."""
    case = of_size(sizes, *shape, causal=True)
    # 128 queries: no block is longer; 64: none is shorter
    rows = case.B * case.H_q * -(-case.S_q // 128) * 128
    assert measured_workspace(case) <= rows * (case.D * 4 + 2 * 4) + rows // 64 * 4 + 8 * 2**21


@SIZES
def test_workspace_of_a_small_grid(sizes):
    """Split, so that dk and dv are summed from float32 parts: no more of them than multiprocessors have room for."""
    case = of_size(sizes, 1, 4096, 256, 8, 1)
    rows = case.B * case.H_q * case.S_q
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    parts = multiprocessors * 128 * (case.D + (case.D_v or case.D)) * 4
    assert measured_workspace(case) <= rows * (case.D * 4 + 2 * 4) + rows // 64 * 4 + 2 * parts + 8 * 2**21


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (40, 7)}, {"softcap": 15.0}], ids=str)
def test_nothing_waits(options):
    """Dense, split and packed, with and without a gradient of lse, with `do` that is copied."""
    for case in (Case(1, 200, 200, 4, 2, 64, **options), Case(1, 3000, 128, 4, 1, 128, **options)):
        q, k, v, do, out, lse = graph_of(case)
        run = lambda *g, out=out, lse=lse, q=q, k=k, v=v: torch.autograd.grad((out, lse)[: len(g)], (q, k, v), g, retain_graph=True)  # noqa: E731
        for gradients in ((do,), (do, torch.ones_like(lse)), (do.mT.contiguous().mT,)):
            run(*gradients)
            torch.cuda.synchronize()
            with no_synchronisation():
                run(*gradients)
    case = PackedCase((90, 0, 131), (150, 10, 131), 4, 2, 128, **options)
    args = testing_varlen.make(case, "cuda")
    testing_varlen.ours(case, *args)
    torch.cuda.synchronize()
    with no_synchronisation():
        testing_varlen.ours(case, *args)


@SIZES
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", [(1, 500, 500, 8, 2), (1, 3000, 128, 4, 1)], ids=["square", "split"])
def test_graph_capture_and_replay(shape, deterministic, sizes):
    """Forward and backward in one graph, replayed on new numbers: the bits of a call outside, but of dq those only that are asked for; a
    replay leaves no counter behind."""
    case = of_size(sizes, *shape, window=(300, 20), softcap=30.0)
    args = testing.make(case, "cuda")
    testing.ours(case, *args, deterministic=deterministic)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = testing.ours(case, *args, deterministic=deterministic)
    for seed in (1, 2, 2):
        fresh = testing.make(case, "cuda", seed)
        with torch.no_grad():
            for t, new in zip(args, fresh, strict=True):
                t.copy_(new)
        for t in captured:
            t.fill_(torch.nan)
        graph.replay()
        expected = testing.ours(case, *fresh, deterministic=deterministic)
        for name in expected._fields:
            got, wanted = getattr(captured, name), getattr(expected, name)
            if deterministic or name != "dq":
                assert same_bits(got, wanted), name
            else:
                assert (got.float() - wanted.float()).norm() <= 1e-3 * wanted.float().norm()


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_another_device_is_current_and_stays_so(form):
    """FA#1782, FA#2356: forward and backward, also split and with a softcap."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only: that another device stays the current one was not tested")
    torch.cuda.set_device(0)
    options = {"causal": True, "softcap": 20.0}
    if form == "dense":
        case, module = Case(1, 2000, 130, 4, 1, 128, **options), testing
    else:
        case, module = PackedCase((200, 60), (260, 60), 4, 2, 128, **options), testing_varlen
    expected = module.ours(case, *module.make(case, "cuda:0"), deterministic=True)
    args = [t.detach().to("cuda:1") for t in module.make(case, "cuda:0")]
    ours = module.ours(case, *(t.requires_grad_() for t in args[:3]), *args[3:], deterministic=True)
    assert torch.cuda.current_device() == 0
    for a, b in zip(ours, expected, strict=True):
        assert a.device.index == 1
        assert same_bits(a.cpu(), b.cpu())
