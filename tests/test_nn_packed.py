"""GQAttention on packed sequences: the same as on each sequence, and as on a padded batch."""

import math

import pytest
import torch
from nn_cases import H_Q, SIZES, D, E, gradients, heads_of, randomize
from torch._dynamo.testing import CompileCounterWithBackend

from gqa_autograd import functional
from gqa_autograd.nn import GQAttention, rotary_embedding
from gqa_autograd.testing_varlen import offsets

LENGTHS = (4, 0, 1, 9, 0, 3)
F64 = torch.float64
OPTIONS = {
    "plain": {},
    "rope": {"rope": 100.0},
    "full": {"causal": False, "rope": 100.0},
    "all": {"rope": 100.0, "qk_norm": True, "bias": True, "v_head_dim": 6, "window": 3, "softcap": 2.0, "scale": 0.4},
}


def packed(lengths=LENGTHS, tail=0, dtype=F64):
    """x [T, E], cu_seqlens and the tokens of each sequence."""
    cu_seqlens = offsets(lengths)
    x = torch.randn(sum(lengths) + tail, E, dtype=dtype, requires_grad=True)
    return x, cu_seqlens, [slice(a, b) for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_packed_equals_padded(options):
    """One row a sequence, right-padded; under a causal mask no token sees the padding, without one each row is taken alone."""
    module = randomize(GQAttention(**SIZES, **options, dtype=F64))
    x, cu_seqlens, tokens = packed()
    y = module(x, cu_seqlens=cu_seqlens)
    if options.get("causal", True):
        rows = torch.nn.utils.rnn.pad_sequence([x[s] for s in tokens], batch_first=True)
        padded = module(rows)
        want = torch.cat([padded[n, : s.stop - s.start] for n, s in enumerate(tokens)])
    else:
        want = torch.cat([module(x[None, s])[0] for s in tokens])
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(gradients(y, x, module), gradients(want, x, module))


@pytest.mark.parametrize("return_lse", [False, True])
def test_tail(return_lse, monkeypatch):
    """Tokens beyond the last offset: NaN in the rows that the attention leaves alone reaches neither y nor any gradient."""
    module = randomize(GQAttention(**SIZES, rope=100.0, out_bias=True, dtype=F64))
    x, cu_seqlens, _ = packed(tail=5)

    def spoiled(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            out, lse = result if return_lse else (result, None)
            rest = torch.arange(out.shape[0]) >= sum(LENGTHS)
            out = torch.where(rest[:, None, None], math.nan, out)
            return (out, lse) if return_lse else out

        return call

    for name in ("attention_varlen", "attention_varlen_with_lse"):
        monkeypatch.setattr(functional, name, spoiled(getattr(functional, name)))
    y = module(x, cu_seqlens=cu_seqlens, return_lse=return_lse)
    y, lse = y if return_lse else (y, None)
    T = sum(LENGTHS)
    torch.testing.assert_close(y[T:], module.o_proj.bias.expand(5, E))
    # A gradient that comes from the bias row alone
    dy = torch.randn(T + 5, E, dtype=F64)
    got = torch.autograd.grad(y, (x, *module.parameters()), dy)
    assert not got[0][T:].any()
    monkeypatch.undo()
    short = x.detach()[:T].requires_grad_()
    want = torch.autograd.grad(module(short, cu_seqlens=cu_seqlens), (short, *module.parameters()), dy[:T])
    names = ["x", *(name for name, _ in module.named_parameters())]
    for name, a, b in zip(names, got, want, strict=True):
        torch.testing.assert_close(a[:T] if name == "x" else a, b + dy[T:].sum(0) if name == "o_proj.bias" else b, msg=name)
    assert lse is None or lse.shape == (H_Q, T + 5)


def test_lse():
    module = randomize(GQAttention(**SIZES, rope=100.0, dtype=F64))
    x, cu_seqlens, tokens = packed()
    y, lse = module(x, cu_seqlens=cu_seqlens, return_lse=True)
    torch.testing.assert_close(y, module(x, cu_seqlens=cu_seqlens), rtol=0, atol=0)
    want = torch.cat([module(x[None, s], return_lse=True)[1][0] for s in tokens], dim=1)
    torch.testing.assert_close(lse, want)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), x, retain_graph=True) for t in (lse, want)))


def test_positions():
    """Without `positions` they begin at 0 in each sequence; given, they are taken; the rotation is relative within a sequence."""
    module = randomize(GQAttention(**SIZES, rope=100.0, dtype=F64))
    x, cu_seqlens, tokens = packed(tail=2)
    counted = torch.cat([torch.arange(n) for n in (*LENGTHS, 2)])
    (q, k, _), y = heads_of(module, x, cu_seqlens=cu_seqlens)
    same = {"rtol": 0, "atol": 0}
    for given in (counted, counted[None], counted.int()):
        torch.testing.assert_close(module(x, cu_seqlens=cu_seqlens, positions=given), y, **same)
    torch.testing.assert_close(module(x, cu_seqlens=cu_seqlens, position_embeddings=rotary_embedding(counted[None], D, 100.0)), y, **same)
    for s in tokens:
        if s.stop > s.start:
            (q_alone, k_alone, _), _ = heads_of(module, x[None, s])
            torch.testing.assert_close((q[s], k[s]), (q_alone[0], k_alone[0]))
    stretched = module(x, cu_seqlens=cu_seqlens, positions=2 * counted)
    assert (stretched - y).abs().max() > 0.1


@pytest.mark.parametrize("hint", [9, torch.tensor(9), None], ids=str)
def test_max_seqlen_changes_nothing(hint):
    module = GQAttention(**SIZES)
    x, cu_seqlens, _ = packed(dtype=None)
    torch.testing.assert_close(module(x, cu_seqlens=cu_seqlens, max_seqlen=hint), module(x, cu_seqlens=cu_seqlens), rtol=0, atol=0)


def test_offsets_are_refused_by_the_function():
    x, _, _ = packed(dtype=None)
    with pytest.raises(ValueError, match="attention_varlen: cu_seqlens_q must end at the 17 tokens of q or before, got 18"):
        GQAttention(**SIZES, rope=100.0)(x, cu_seqlens=offsets((18,)))


@pytest.mark.parametrize("lengths", [(), (0, 0), (1,)], ids=str)
def test_few_tokens(lengths):
    x, cu_seqlens, _ = packed(lengths, dtype=None)
    y = GQAttention(**SIZES, rope=100.0, qk_norm=True)(x, cu_seqlens=cu_seqlens)
    assert y.shape == x.shape
    assert y.isfinite().all()


def test_nothing_reads_a_length_on_the_host():
    """A meta tensor has no values to read."""
    module = GQAttention(**SIZES, rope=100.0, device="meta")
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    assert module(torch.empty(17, E, device="meta"), cu_seqlens=cu_seqlens, max_seqlen=cu_seqlens).shape == (17, E)


@pytest.mark.parametrize("mode", ["autocast", "parameters"])
def test_bfloat16(mode):
    module = GQAttention(**SIZES, rope=100.0, qk_norm=True, dtype=None if mode == "autocast" else torch.bfloat16)
    x, cu_seqlens, _ = packed(dtype=None if mode == "autocast" else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        heads, y = heads_of(module, x, cu_seqlens=cu_seqlens)
    assert [t.dtype for t in (*heads, y)] == [torch.bfloat16] * 4
    y.float().sum().backward()
    assert x.grad.dtype is x.dtype


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    """No other frame for other lengths and numbers of sequences; fullgraph: nothing reads a length on the host."""
    module = randomize(GQAttention(**SIZES, rope=100.0, qk_norm=True))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for lengths in ((4, 0, 1, 9, 0, 3), (12, 1, 6), (5, 5, 5, 8)):
        x, cu_seqlens, _ = packed(lengths, tail=2, dtype=None)
        y, want = compiled(x, cu_seqlens=cu_seqlens), module(x, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(gradients(y, x, module), gradients(want, x, module), rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    # torch compiles the first call of a module with float settings twice
    assert frames == frames[:1] * 3
