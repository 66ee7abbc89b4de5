"""dq, dk and dv of packed sequences: values, what no sequence may see, what must be zero, block by block as a ring."""

import pytest
import torch
from gradient_cases import MASKS, PACKED_COVERING, stored
from packed_cases import NONSENSE, many
from tools import fenced, kernels_of, poisoned_workspace, same_bits

import gqa_autograd
from gqa_autograd import testing, testing_varlen
from gqa_autograd.kernels import config
from gqa_autograd.testing import Result
from gqa_autograd.testing_varlen import PackedCase, offsets

pytestmark = pytest.mark.gpu
OPS = torch.ops.gqa_autograd
SIZES = pytest.mark.parametrize("sizes", config.D_BACKWARD, ids=str)
GRADIENTS = ("dq", "dk", "dv")


def check(case: PackedCase, args: tuple, dlse=None, without: tuple[int, ...] = (), deterministic: bool = False) -> Result:
    """Closeness, sequence by sequence, with NaN in the tails of q, k, v and do, in the sequences of `without`, and in what is written."""
    spoiled = testing_varlen.spoil(case, args, without)
    poisoned_workspace(args[0].device)
    with testing.poisoned():
        ours = testing_varlen.ours(case, *spoiled, spoiled_rows(case, dlse, without), deterministic=deterministic)
    plain, exact = testing_varlen.plain(case, *args, dlse), testing_varlen.exact(case, *args, dlse)
    testing_varlen.assert_gradients(case, ours, plain, exact, args, dlse, without)
    return ours


def spoiled_rows(case: PackedCase, dlse, sequences: tuple[int, ...]):
    """lse's gradient with NaN where `spoil` writes it."""
    if dlse is None:
        return None
    dlse = dlse.clone()
    dlse[:, sum(case.lengths_q) :] = torch.nan
    for n in sequences:
        dlse[:, case.slices[n][0]] = torch.nan
    return dlse


@pytest.mark.parametrize("one", PACKED_COVERING.values(), ids=PACKED_COVERING)
def test_closeness(one):
    q, k, v, do, *cu_seqlens = testing_varlen.make(one.case, "cuda", seed=1)
    dlse = torch.randn(q.shape[1], q.shape[0], device=q.device) if one.dlse else None
    do = stored(do, one.do)
    check(one.case, (q, k, v, do, *cu_seqlens), dlse)
    ours = check(one.case, (q, k, v, do, *cu_seqlens), dlse, deterministic=True)
    # With NaN in its tail an expanded `do` would be a tensor of its own
    if one.do == "expanded" and one.case.tail_q == 0:
        again = testing_varlen.ours(one.case, q, k, v, do, *cu_seqlens, dlse, deterministic=True)
        assert all(same_bits(getattr(again, name), getattr(ours, name)) for name in GRADIENTS)


@pytest.mark.parametrize("N", [300, 511, 512, 513, 1100])
def test_many_sequences(N):
    """Around the number from which neighbours are counted together; some without queries, some without keys.

    Judged as one tensor: of a thousand means over a few elements each, some lie beyond any factor of plain's."""
    case = many(N, causal=True)
    args = testing_varlen.make(case, "cuda")
    poisoned_workspace(args[0].device)
    with testing.poisoned():
        ours = testing_varlen.ours(case, *args)
    plain, exact = testing_varlen.plain(case, *args), testing_varlen.exact(case, *args)
    for name in GRADIENTS:
        got, allowed, want = (getattr(result, name) for result in (ours, plain, exact))
        testing.assert_no_worse(got, allowed, want, name, gradient=True)


@SIZES
@pytest.mark.parametrize("mask", ["causal", "full", "both"])
def test_nan_stays_in_its_sequence(mask, sizes):
    """Neighbours on both sides, shorter than a tile and longer. Bits, not closeness: 0 times NaN would show, a NaN read and masked not."""
    D, D_v = sizes
    case = PackedCase(
        (40, 200, 1, 130, 64), (60, 190, 5, 130, 64), 4, 2, D, D_v=D_v if D_v != D else None, tail_q=30, tail_kv=30, **MASKS[mask]
    )
    args = testing_varlen.make(case, "cuda")
    dlse = torch.randn(4, args[0].shape[0], device=args[0].device)
    clean = testing_varlen.ours(case, *args, dlse, deterministic=True)
    for without in ((1, 3), (0, 2, 4)):
        dirty = check(case, args, dlse, without, deterministic=True)
        for n in set(range(5)) - set(without):
            a, b = (testing_varlen.sequence(case, result, n) for result in (dirty, clean))
            assert all(same_bits(getattr(a, name), getattr(b, name)) for name in GRADIENTS), f"sequence {n}"


@SIZES
def test_what_sees_nothing_gets_zero(sizes):
    """To the bit: queries and keys of sequences without the other, queries that are longer than their keys, tails."""
    D, D_v = sizes
    case = PackedCase((0, 50, 70, 200), (20, 61, 0, 30), 4, 2, D, causal=True, D_v=D_v if D_v != D else None, tail_q=5, tail_kv=7)
    args = testing_varlen.make(case, "cuda")
    ours = check(case, args, torch.full((4, args[0].shape[0]), 3.0, device=args[0].device))
    parts = [testing_varlen.sequence(case, ours, n) for n in range(4)]
    for gradient in (parts[0].dk, parts[0].dv, parts[2].dq, parts[3].dq[: 200 - 30], *testing_varlen.tails(case, ours)[2:]):
        assert gradient.numel()
        assert not gradient.any()


@SIZES
def test_a_ring_of_key_blocks(sizes):
    """attention_varlen_bwd with the out and lse of the whole: dq summed over blocks of keys. The last 40 keys of each sequence are the
    second block; the first one ends 40 keys before the queries do, so its causal mask is a window with right side 40."""
    D, D_v = sizes
    last = 40
    case = PackedCase((130, 60, 300), (190, 60, 390), 4, 2, D, causal=True, D_v=D_v if D_v != D else None)
    q, k, v, do, cu_q, _ = args = testing_varlen.make(case, "cuda")
    plain, exact = testing_varlen.plain(case, *args), testing_varlen.exact(case, *args)
    dk, dv = (torch.full(t.shape, torch.nan, dtype=t.dtype, device=t.device) for t in (k, v))
    dq = torch.zeros(q.shape, device=q.device)
    with torch.no_grad():
        out, lse = gqa_autograd.attention_varlen_with_lse(q, k, v, *args[4:], causal=True)
        for right in (last, 0):
            theirs = [slice(b.start, b.stop - last) if right else slice(b.stop - last, b.stop) for _, b in case.slices]
            keys, values = (torch.cat([t[where] for where in theirs]) for t in (k, v))
            cu_k = offsets(tuple(where.stop - where.start for where in theirs), q.device)
            part = OPS.attention_varlen_bwd(do, q, keys, values, out, lse, None, cu_q, cu_k, -1, right)
            dq += part[0]
            for whole, gradient in ((dk, part[1]), (dv, part[2])):
                for where, piece in zip(theirs, gradient.split([w.stop - w.start for w in theirs]), strict=True):
                    whole[where] = piece
    testing_varlen.assert_gradients(case, Result(out, lse, dq.to(q.dtype), dk, dv), plain, exact, args)


@pytest.mark.parametrize("name", NONSENSE)
def test_offsets_that_make_no_sense_touch_nothing_else(name, monkeypatch):
    """Their values are not looked at on the host. test_sanitizer.py runs the same under memcheck."""
    case = PackedCase((100, 100, 100), (100, 100, 100), 4, 2, 128, causal=True)
    args = testing_varlen.make(case, "cuda")
    expected = testing_varlen.ours(case, *args, deterministic=True)
    cu_seqlens = [torch.tensor(values, dtype=torch.int32, device=args[0].device) for values in NONSENSE[name]]
    with fenced(monkeypatch) as strips:
        testing_varlen.ours(case, *args[:4], *cu_seqlens)
        assert len(strips) == 10
        assert all(bool(strip.isnan().all()) for strip in strips)
    # The card is as it was: no error is pending, no counter is left over
    again = testing_varlen.ours(case, *args, deterministic=True)
    assert all(same_bits(getattr(again, name), getattr(expected, name)) for name in GRADIENTS)


def test_one_build_for_all_lengths():
    """FA#2635, for gradients: 30 packings with other numbers of sequences, tokens, heads and layouts."""
    from gqa_autograd.kernels import build

    case = PackedCase((17,), (17,), 2, 1, 128, causal=True)
    testing_varlen.ours(case, *testing_varlen.make(case, "cuda"))
    first = build.built()
    for n in range(30):
        lengths = tuple(1 + (i + 1) * (n + 3) * 7 % 200 for i in range(n % 13))
        case = PackedCase(lengths, lengths[::-1], 1 + n % 4, 1, 128, causal=True, tail_q=1 + n, tail_kv=2, layout=("thd", "htd")[n % 2])
        testing_varlen.ours(case, *testing_varlen.make(case, "cuda"))
    assert build.built() == first


@SIZES
def test_the_dense_kernels_compute_it(sizes):
    """By their names: the backward of packs is a form of the one backward, in both dtypes."""
    D, D_v = sizes
    for dtype in (torch.bfloat16, torch.float16):
        case = PackedCase((90, 130), (90, 200), 4, 2, D, causal=True, D_v=D_v if D_v != D else None, dtype=dtype)
        args = testing_varlen.make(case, "cuda")
        testing_varlen.ours(case, *args)
        names = kernels_of(lambda case=case, args=args: testing_varlen.ours(case, *args))
        assert names[0] == "attention_fwd_kernel"
        assert "attention_bwd_kernel" in names[1:]
        assert all(name.startswith("attention_bwd") for name in names[1:]), names


def test_a_graph_replays_with_other_lengths():
    """Forward and backward in one graph; offsets and numbers change in place, the tokens stay as many."""
    first = (300, 1, 129, 0, 270)
    case = PackedCase(first, first, 8, 2, 128, causal=True)
    args = testing_varlen.make(case, "cuda")
    testing_varlen.ours(case, *args, deterministic=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = testing_varlen.ours(case, *args, deterministic=True)
    for seed, lengths in enumerate(((700, 0, 0, 0, 0), (0, 0, 0, 0, 700), (140,) * 5, (1, 1, 1, 1, 696), first)):
        other = PackedCase(lengths, lengths, 8, 2, 128, causal=True)
        fresh = testing_varlen.make(other, "cuda", seed)
        with torch.no_grad():
            for t, new in zip(args, fresh, strict=True):
                t.copy_(new)
        for t in captured:
            t.fill_(torch.nan)
        graph.replay()
        expected = testing_varlen.ours(other, *fresh, deterministic=True)
        for name in ("out", *GRADIENTS):
            assert same_bits(getattr(captured, name), getattr(expected, name)), (lengths, name)
