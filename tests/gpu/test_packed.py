"""Packed sequences on the card: values, what no sequence may see or touch, bits, lengths that change, offsets that make no sense."""

import dataclasses

import pytest
import torch
from packed_cases import ALL, CONFIGURATIONS, MASKS, NONSENSE, many
from tools import fenced, forward, kernels_of, no_synchronisation, same_bits

import gqa_autograd
from gqa_autograd import testing, testing_varlen
from gqa_autograd.testing import Case, Result
from gqa_autograd.testing_varlen import PackedCase, offsets

pytestmark = pytest.mark.gpu
OPS = torch.ops.gqa_autograd
UTILS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
LENGTHS = (300, 1, 129, 0, 77, 128, 513)


def check(case: PackedCase, seed: int = 0) -> None:
    """Closeness of out and lse, with NaN in the tails of the inputs, which stay out, and of the outputs, which stay there."""
    args = testing_varlen.make(case, "cuda", seed)
    with testing.poisoned():
        ours = forward(case, *testing_varlen.spoil(case, args))
    plain, exact = testing_varlen.plain(case, *args), testing_varlen.exact(case, *args)
    testing_varlen.assert_no_worse(case, ours, plain, exact, names=("out",))
    testing_varlen.assert_untouched(case, ours)


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_forward(case):
    check(case)


@pytest.mark.parametrize("N", [300, 511, 512, 513, 1100])
def test_many_sequences(N):
    """Around the number from which neighbours are counted together."""
    check(many(N, causal=True))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_scales(scale):
    for options in MASKS.values():
        check(PackedCase((90, 0, 131), (150, 10, 131), 4, 2, 128, scale=scale, **options))


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("mask", MASKS)
def test_without_lse_the_same_bits(mask, D):
    case = PackedCase(LENGTHS, LENGTHS[::-1], 8, 2, D, tail_q=9, **MASKS[mask])
    q, k, v, _, *cu_seqlens = args = testing_varlen.make(case, "cuda")
    with testing.poisoned(), torch.no_grad():
        out = gqa_autograd.attention_varlen(q, k, v, *cu_seqlens, **case.options)
    with testing.poisoned():
        assert same_bits(out, forward(case, *args).out)


def test_odd_rows_are_read_through_a_copy():
    """Rows that TMA can't read: not 16-byte aligned, or a stride other than 1 along D."""
    case = PackedCase((100, 33), (70, 140), 4, 2, 128, causal=True)
    q, k, v, *rest = testing_varlen.make(case, "cuda")
    expected = forward(case, q, k, v, *rest)
    wide = [torch.cat((t.new_full((*t.shape[:2], 1), torch.nan), t.detach()), dim=2)[..., 1:] for t in (q, k, v)]
    turned = [t.detach().mT.contiguous().mT for t in (q, k, v)]
    for views in (wide, turned):
        assert not any(t.is_contiguous() for t in views)
        assert same_bits(forward(case, *views, *rest).out, expected.out)


# --- one sequence and the others ---
@pytest.mark.parametrize("mask", MASKS)
def test_nan_stays_in_its_sequence(mask):
    """Neighbours on both sides, shorter than a tile and longer. Bits, not closeness: 0 times NaN would show, a NaN read and masked not."""
    case = PackedCase((40, 200, 1, 130, 64), (60, 190, 5, 130, 64), 4, 2, 128, tail_q=30, tail_kv=30, **MASKS[mask])
    args = testing_varlen.make(case, "cuda")
    clean = forward(case, *args)
    for spoiled in ((1, 3), (0, 2, 4)):
        dirty = forward(case, *testing_varlen.spoil(case, args, spoiled))
        for n in set(range(5)) - set(spoiled):
            a, b = (testing_varlen.sequence(case, result, n) for result in (dirty, clean))
            assert same_bits(a.out, b.out), f"sequence {n}"
            assert same_bits(a.lse, b.lse), f"sequence {n}"


@pytest.mark.parametrize("options", [*MASKS.values(), {"causal": True, "softcap": 20.0}], ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_a_sequence_has_the_same_bits_alone_and_in_company(D, options):
    """vllm#51902: in any order, beside any others."""
    case = PackedCase(LENGTHS, (260, 40, 129, 7, 0, 300, 513), 8, 2, D, **options)
    args = testing_varlen.make(case, "cuda")
    together = forward(case, *args)
    for order in ((6, 5, 4, 3, 2, 1, 0), (2, 0), (5, 6, 1), *((n,) for n in range(7))):
        some = dataclasses.replace(
            case, lengths_q=tuple(case.lengths_q[n] for n in order), lengths_kv=tuple(case.lengths_kv[n] for n in order)
        )
        slices = [case.slices[n] for n in order]
        q, k, v, do = (torch.cat([t.detach()[where[side]] for where in slices]) for t, side in zip(args[:4], (0, 1, 1, 0), strict=True))
        apart = forward(some, q, k, v, do, offsets(some.lengths_q, "cuda"), offsets(some.lengths_kv, "cuda"))
        for place, n in enumerate(order):
            a, b = testing_varlen.sequence(some, apart, place), testing_varlen.sequence(case, together, n)
            assert same_bits(a.out, b.out), f"sequence {n} of {order}"
            assert same_bits(a.lse, b.lse), f"sequence {n} of {order}"


# --- lengths that change ---
def test_max_seqlen_changes_nothing_and_nothing_waits():
    case = PackedCase(LENGTHS, LENGTHS, 8, 2, 128, causal=True)
    args = testing_varlen.make(case, "cuda")
    expected = forward(case, *args)
    on_device = torch.tensor(513, dtype=torch.int32, device="cuda")
    for longest in (None, 513, 100_000, on_device, torch.tensor(513)):
        with no_synchronisation():
            again = forward(case, *args, max_seqlen_q=longest, max_seqlen_k=longest)
        assert same_bits(again.out, expected.out)
        assert same_bits(again.lse, expected.lse)


def test_one_build_for_all_lengths():
    """FA#2635. 50 packings with other numbers of sequences, tokens, heads and layouts."""
    from gqa_autograd.kernels import build

    forward(case := PackedCase((17,), (17,), 2, 1, 128, causal=True), *testing_varlen.make(case, "cuda"))
    first = build.built()
    for n in range(50):
        lengths = tuple(1 + (i + 1) * (n + 3) * 7 % 200 for i in range(n % 13))
        case = PackedCase(lengths, lengths[::-1], 1 + n % 4, 1, 128, causal=True, tail_q=1 + n, tail_kv=2, layout=("thd", "htd")[n % 2])
        forward(case, *testing_varlen.make(case, "cuda"))
    assert build.built() == first


def test_a_graph_replays_with_other_lengths():
    """Offsets, numbers and how many sequences are empty change in place; the tokens stay as many."""
    tokens, first = 700, (300, 1, 129, 0, 270)
    case = PackedCase(first, first, 8, 2, 128, causal=True)
    q, k, v, _, cu_q, cu_k = args = testing_varlen.make(case, "cuda")
    forward(case, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(case, *args)
    for seed, lengths in enumerate(((700, 0, 0, 0, 0), (0, 0, 0, 0, 700), (140,) * 5, (128, 128, 128, 128, 188), (1, 1, 1, 1, 696), first)):
        other = dataclasses.replace(case, lengths_q=lengths, lengths_kv=lengths)
        assert sum(lengths) == tokens
        fresh = testing_varlen.make(other, "cuda", seed)
        with torch.no_grad():
            for t, new in zip((q, k, v, cu_q, cu_k), (*fresh[:3], *fresh[4:]), strict=True):
                t.copy_(new)
        for t in captured[:2]:
            t.fill_(torch.nan)
        graph.replay()
        expected = forward(other, *fresh)
        assert same_bits(captured.out, expected.out), lengths
        assert same_bits(captured.lse, expected.lse), lengths


def test_streams_do_not_share_a_tile_counter():
    case = PackedCase((1500, 3, 900), (1500, 3, 900), 16, 4, 128, causal=True)
    args = testing_varlen.make(case, "cuda")
    expected = forward(case, *args).out
    streams = [torch.cuda.Stream() for _ in range(6)]
    torch.cuda.synchronize()
    outs = []
    for n in range(60):
        with torch.cuda.stream(streams[n % 6]):
            outs.append(forward(case, *args).out)
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", NONSENSE)
def test_offsets_that_make_no_sense_touch_nothing_else(name, mask, monkeypatch):
    """Their values are not looked at on the host. test_sanitizer.py runs the same under memcheck."""
    case = PackedCase((100, 100, 100), (100, 100, 100), 4, 2, 128, **MASKS[mask])
    args = testing_varlen.make(case, "cuda")
    expected = forward(case, *args)
    cu_seqlens = (torch.tensor(values, dtype=torch.int32, device="cuda") for values in NONSENSE[name])
    with fenced(monkeypatch) as strips:
        forward(case, *args[:4], *cu_seqlens)
        assert len(strips) == 4
        assert all(bool(strip.isnan().all()) for strip in strips)
    # The card is as it was: no error is pending, the tile counter is set back
    assert same_bits(forward(case, *args).out, expected.out)


# --- which kernel, and the ways to it ---
@pytest.mark.parametrize("case", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_every_feature_runs_on_the_one_kernel(case):
    """By its name, that of the dense form: nothing leaves the fast path."""
    args = testing_varlen.make(case, "cuda")
    forward(case, *args)
    assert kernels_of(lambda: forward(case, *args)) == ["attention_fwd_kernel"]


def test_compiled_equals_eager():
    f = torch.compile(gqa_autograd.attention_varlen_with_lse, fullgraph=True)
    for lengths in ((100, 50), (7, 0, 200), (64,) * 9):
        case = PackedCase(lengths, lengths, 4, 2, 64, causal=True)
        q, k, v, _, *cu_seqlens = args = testing_varlen.make(case, "cuda")
        with torch.no_grad():
            out, lse = f(q, k, v, *cu_seqlens, causal=True)
        expected = forward(case, *args)
        assert same_bits(out, expected.out)
        assert same_bits(lse, expected.lse)


@pytest.mark.parametrize("layout", ["thd", "htd"])
def test_opcheck(layout):
    case = PackedCase((19, 0, 23), (5, 8, 31), 4, 2, 64, layout=layout)
    q, k, v, _, *cu_seqlens = (t.detach() for t in testing_varlen.make(case, "cuda"))
    for operator in (OPS.attention_varlen_fwd.default, OPS.attention_varlen_fwd_lse.default):
        torch.library.opcheck(operator, (q, k, v, *cu_seqlens, -1, 0, 0.3), test_utils=UTILS)


def test_one_sequence_is_dense_attention():
    """By closeness to the same truth; the bits may differ."""
    dense = Case(1, 333, 400, 8, 2, 128, causal=True)
    case = PackedCase((333,), (400,), 8, 2, 128, causal=True)
    q, k, v, do, *cu_seqlens = testing_varlen.make(case, "cuda")
    ours = forward(case, q, k, v, do, *cu_seqlens)
    batch = [t[None].detach() for t in (q, k, v, do)]
    with torch.no_grad():
        out, lse = gqa_autograd.attention_with_lse(*batch[:3], **dense.options)
    plain, exact = testing.plain(dense, *batch), testing.exact(dense, *batch)
    for result in (Result(ours.out[None], ours.lse[None], *batch[:3]), Result(out, lse, *batch[:3])):
        testing.assert_no_worse(result.out, plain.out, exact.out, "out")
        testing.assert_lse(result.lse, exact.lse)
