"""The packs of the benchmarks: their lengths, the dense shape beside each, FLOPs and bytes."""

import torch

from benchmarks import bounds, packs
from benchmarks.packs import Pack

SKEWED = (3014, 1005, 6028, 1206, 2009, 861, 754, 1507)
RANDOM = (344, 1062, 2341, 4258, 2820, 851, 3083, 1625)


def test_lengths():
    """Faults: a remainder dropped; a seed that changes from process to process, as hash() does."""
    assert len(packs.PACKS) == len({(pack.name, pack.T) for pack in packs.PACKS}) == 14
    for pack, (kind, N), T in zip(packs.PACKS, [s for s in packs.SHAPES for _ in packs.TOKENS], packs.TOKENS * 7, strict=True):
        assert (pack.kind, len(pack.lengths)) == (kind, N)
        assert min(pack.lengths) >= 1
        assert T - (N if kind == "odd" else 0) == pack.T
        assert packs.drawn(kind, N, T) == pack
    assert packs.drawn("skewed", 8, 16384).lengths == SKEWED
    assert packs.drawn("random", 8, 16384).lengths == RANDOM
    assert all(S % 128 == 0 for S in packs.drawn("uniform", 64, 16384).lengths)
    assert all(S % 2 == 1 for S in packs.drawn("odd", 16, 16384).lengths)


def test_skewed_is_skewed():
    for pack in packs.PACKS:
        longest = max(pack.lengths) / pack.T * len(pack.lengths)
        assert {"uniform": longest == 1, "odd": longest == 1, "random": 1.2 < longest < 2.5, "skewed": longest > 2.5}[pack.kind], pack


def test_the_dense_shape_costs_as_much():
    """Tokens and FLOPs; documents that are alike have themselves. Fault: pairs counted without the triangle."""
    for pack in packs.PACKS:
        dense = pack.dense
        tokens, work = dense.B * dense.S_q / pack.T, bounds.flops(dense, "forward") / bounds.flops(pack, "forward")
        if pack.kind in ("uniform", "odd"):
            assert (dense.B, dense.S_q, work) == (len(pack.lengths), pack.lengths[0], 1)
        else:
            assert dense.S_q % 128 == 64
            assert 0.9 <= tokens <= 1.02, pack
            assert 0.86 <= work <= 1.04, pack
        assert (dense.H_q, dense.H_kv, dense.D, dense.causal, dense.dtype) == (32, 8, 128, True, torch.bfloat16)


def test_flops_and_bytes_are_the_documents():
    pack = Pack("any", (3, 1, 10), 4, 2, 64)
    assert bounds.flops(pack, "forward") == 4 * 64 * 4 * (6 + 1 + 55)
    assert bounds.bytes_read(pack, "forward") == 2 * 14 * (4 * 64 + 2 * 2 * 64)


def test_the_twin_has_as_many_documents():
    for pack in packs.PACKS:
        assert len(pack.twin.lengths) == len(pack.lengths)
        assert min(pack.twin.lengths) >= 1
        assert 2900 <= pack.twin.T <= packs.TWIN_TOKENS + len(pack.lengths)
