"""What attention must satisfy for any sizes and settings, and what it costs."""

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from gqa_autograd import attention, attention_varlen, attention_with_lse, flops, merge_states, testing, testing_varlen
from gqa_autograd.testing import Case

SIDE = st.integers(-1, 6)
# Every example is small; a slow machine is no reason to fail
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def cases(draw, **fixed):
    """Any small configuration in float64."""
    H_kv, G = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    case = Case(
        B=draw(st.integers(1, 2)),
        S_q=draw(st.integers(1, 9)),
        S_kv=draw(st.integers(1, 9)),
        H_q=H_kv * G,
        H_kv=H_kv,
        D=draw(st.integers(1, 5)),
        causal=draw(st.booleans()),
        window=(draw(SIDE), draw(SIDE)),
        softcap=draw(st.sampled_from([0.0, 0.7, 15.0])),
        scale=draw(st.sampled_from([None, 0.4, 0.0, -1.1])),
        dtype=torch.float64,
        layout=draw(st.sampled_from(["bshd", "bhsd"])),
        D_v=draw(st.integers(1, 4)),
    )
    return dataclasses.replace(case, **fixed)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@quick
@given(cases())
def test_out_lse_and_gradients_are_those_of_autograd(case):
    args = testing.make(case)
    dlse = torch.randn(case.B, case.H_q, case.S_q, dtype=torch.float64)
    with testing.poisoned():
        ours = testing.ours(case, *args, dlse)
    for a, b in zip(ours, testing.plain(case, *args, dlse), strict=True):
        same(a, b)


@quick
@given(cases())
def test_both_forwards_agree(case):
    """attention_fwd and attention_fwd_lse are one function; asking for lse changes no bit of out."""
    q, k, v, _ = testing.make(case)
    with torch.no_grad(), testing.recorded() as bodies:
        assert torch.equal(attention(q, k, v, **case.options), attention_with_lse(q, k, v, **case.options)[0])
    assert bodies == ["attention_fwd", "attention_fwd_lse"]


@quick
@given(cases(), st.integers(1, 8))
def test_keys_split_anywhere_merge_to_the_whole(case, cut):
    """Two parts of the keys, cut anywhere, merged by their lse: the whole, rows that see no key included."""
    assume(cut < case.S_kv)
    case = dataclasses.replace(case, window=(-1, -1))
    q, k, v, _ = testing.make(case)
    window = (-1, case.S_kv - cut if case.causal else -1)
    options = {"scale": case.scale, "softcap": case.softcap}
    first = attention_with_lse(q, k[:, :cut], v[:, :cut], window=window, **options)
    second = attention_with_lse(q, k[:, cut:], v[:, cut:], causal=case.causal, **options)
    whole = attention_with_lse(q, k, v, causal=case.causal, **options)
    for merged in (merge_states(*first, *second), merge_states(*second, *first)):
        for a, b in zip(merged, whole, strict=True):
            same(a, b)


@quick
@given(cases(), st.integers(1, 8))
def test_gradients_of_key_blocks_sum_to_the_whole(case, cut):
    """A ring: attention_bwd of a part of the keys with the out and lse of all. dq adds up, dk and dv lie side by side."""
    assume(cut < case.S_kv)
    case = dataclasses.replace(case, window=(-1, -1))
    q, k, v, do = testing.make(case)
    dlse = torch.randn(case.B, case.H_q, case.S_q, dtype=torch.float64)
    whole = testing.ours(case, q, k, v, do, dlse)
    _, right, scale, softcap = case.formula
    with torch.no_grad():
        rows = do, q, k[:, :cut], v[:, :cut], whole.out, whole.lse, dlse
        first = torch.ops.gqa_autograd.attention_bwd(*rows, -1, case.S_kv - cut if case.causal else -1, scale, softcap)
        rows = do, q, k[:, cut:], v[:, cut:], whole.out, whole.lse, dlse
        second = torch.ops.gqa_autograd.attention_bwd(*rows, -1, right, scale, softcap)
    same(first[0] + second[0], whole.dq)
    for a, b, gradient in zip(first[1:], second[1:], (whole.dk, whole.dv), strict=True):
        same(torch.cat((a, b), 1), gradient)


@quick
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(2, 6)), min_size=1, max_size=4), st.integers(1, 2), st.booleans())
def test_gradients_of_packed_key_blocks_sum_to_the_whole(lengths, last, causal):
    """The same of packed sequences, whose last keys are the second block."""
    lengths_q, lengths_kv = zip(*lengths, strict=True)
    case = testing_varlen.PackedCase(lengths_q, lengths_kv, 4, 2, 3, causal=causal, dtype=torch.float64, D_v=2)
    q, k, v, do, cu_q, _ = args = testing_varlen.make(case)
    whole = testing_varlen.ours(case, *args)
    blocks = [range(b.start, b.stop - last) for _, b in case.slices], [range(b.stop - last, b.stop) for _, b in case.slices]
    dq, dk, dv = torch.zeros_like(whole.dq), torch.full_like(whole.dk, math.nan), torch.full_like(whole.dv, math.nan)
    for right, theirs in zip((last if causal else -1, 0 if causal else -1), blocks, strict=True):
        keys = torch.tensor([j for block in theirs for j in block], dtype=torch.long)
        cu_k = testing_varlen.offsets(tuple(map(len, theirs)))
        rows = do, q.detach(), k.detach()[keys], v.detach()[keys], whole.out, whole.lse, None, cu_q, cu_k
        part = torch.ops.gqa_autograd.attention_varlen_bwd(*rows, -1, right)
        dq += part[0]
        dk[keys], dv[keys] = part[1:]
    for a, b in zip((dq, dk, dv), whole[2:], strict=True):
        same(a, b)


@quick
@given(cases())
def test_grouped_heads_are_repeated_heads(case):
    """Query head h reads KV head h // G; the gradient of a KV head is the sum over its group."""
    q, k, v, do = testing.make(case)
    G = case.H_q // case.H_kv
    repeated = attention(q, *(t.repeat_interleave(G, 2) for t in (k, v)), **case.options)
    out = attention(q, k, v, **case.options)
    same(out, repeated)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), do) for o in (out, repeated)), strict=True):
        same(a, b)


@quick
@given(cases())
def test_unseen_keys_do_not_matter(case):
    """NaN in keys and values that a query doesn't see stays out of its row; bottom-right alignment says which those are."""
    q, k, v, _ = testing.make(case)
    left, right, *_ = case.formula
    out, lse = attention_with_lse(q, k, v, **case.options)
    i = case.S_q - 1
    seen = [j for j in range(case.S_kv) if (left < 0 or j >= case.S_kv - 1 - left) and (right < 0 or j <= case.S_kv - 1 + right)]
    k, v = k.detach().clone(), v.detach().clone()
    hidden = [j for j in range(case.S_kv) if j not in seen]
    k[:, hidden], v[:, hidden] = 1e3, -1e3
    again, lse_again = attention_with_lse(q, k, v, **case.options)
    same(again[:, i], out[:, i])
    same(lse_again[:, :, i], lse[:, :, i])


@quick
@given(cases())
def test_batches_and_orders(case):
    """Each batch entry stands alone; without a mask the order of the keys is free; out is linear in v."""
    q, k, v, _ = testing.make(case)
    out = attention(q, k, v, **case.options)
    same(out[-1:], attention(q[-1:], k[-1:], v[-1:], **case.options))
    same(attention(q, k, 2 * v + 1, **case.options), 2 * out + attention(q, k, torch.ones_like(v), **case.options))
    order = torch.randperm(case.S_kv)
    free = {"scale": case.scale, "softcap": case.softcap}
    same(attention(q, k[:, order], v[:, order], **free), attention(q, k, v, **free))


@quick
@given(cases(softcap=0.0, scale=0.5), st.floats(-150, 150))
def test_a_shift_of_all_logits_moves_only_lse(case, shift):
    """One more column, 1 in q and the shift in k, adds a constant to every logit (pytorch#196678 at -120)."""
    q, k, v, _ = testing.make(case)
    ones, column = torch.ones_like(q[..., :1]), torch.full_like(k[..., :1], shift / 0.5)
    out, lse = attention_with_lse(q, k, v, **case.options)
    moved, lse_moved = attention_with_lse(torch.cat([q, ones], -1), torch.cat([k, column], -1), v, **case.options)
    same(moved, out)
    same(lse_moved, lse + shift)


@quick
@given(cases())
def test_weights_sum_to_one(case):
    """FA#2151: v = 1 gives 1 where a key is seen, 0 elsewhere."""
    q, k, v, _ = testing.make(case)
    out, lse = attention_with_lse(q, k, torch.ones_like(v), **case.options)
    same(out, (lse > -math.inf).double().transpose(1, 2).unsqueeze(3).expand_as(out))


# --- what it costs ---
def pairs(S_q, S_kv, left, right):
    i = torch.arange(S_q).unsqueeze(1) + S_kv - S_q
    j = torch.arange(S_kv)
    return int(((left < 0) | (j >= i - left)).logical_and((right < 0) | (j <= i + right)).sum())


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(-1, 25), st.integers(-1, 25))
def test_visible_pairs(S_q, S_kv, left, right):
    """The closed form against counting, one pair at a time."""
    assert flops.visible_pairs(S_q, S_kv, left, right) == pairs(S_q, S_kv, left, right)


@pytest.mark.parametrize(
    ("options", "left", "right"),
    [({}, -1, -1), ({"causal": True}, -1, 0), ({"window": (2, 1)}, 2, 1), ({"window": (3, -1), "causal": True, "softcap": 5.0}, 3, 0)],
)
@pytest.mark.parametrize("lengths", [(5, 7), (11, 4)])
def test_flop_counter(options, left, right, lengths):
    """Visible pairs only, every query head (GQA), 2 products forward, 5 backward; the same for the operator without lse."""
    S_q, S_kv = lengths
    q, k, v, _ = testing.make(Case(2, S_q, S_kv, 6, 3, 8, dtype=torch.float32, D_v=9))
    count = 2 * 2 * 6 * pairs(S_q, S_kv, left, right)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        attention(q, k, v, **options)
    with FlopCounterMode(display=False) as training:
        attention(q, k, v, **options).sum().backward()
    assert inference.get_total_flops() == count * (8 + 9)
    assert training.get_total_flops() == count * (8 + 9) + count * (3 * 8 + 2 * 9)


LENGTHS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=5)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(LENGTHS, st.integers(0, 3), st.integers(0, 3), st.integers(-1, 8), st.integers(-1, 8))
def test_packed_pairs(lengths, tail_q, tail_kv, left, right):
    """Counted one by one from offsets on a CPU; without them a bound that holds, and is met by one sequence."""
    offsets = [testing_varlen.offsets(tuple(column)) for column in (zip(*lengths, strict=True) if lengths else ((), ()))]
    T_q, T_kv = (int(t[-1]) + tail for t, tail in zip(offsets, (tail_q, tail_kv), strict=True))
    count = sum(pairs(S_q, S_kv, left, right) for S_q, S_kv in lengths)
    assert flops.packed_pairs(T_q, T_kv, *offsets, left, right) == count
    bound = flops.packed_pairs(T_q, T_kv, *(t.to("meta") for t in offsets), left, right)
    assert count <= bound == pairs(T_q, T_kv, left, right)


def test_flop_counter_of_packed_sequences():
    case = testing_varlen.PackedCase((5, 0, 11), (7, 3, 4), 6, 3, 8, causal=True, dtype=torch.float32, D_v=9, tail_q=2)
    q, k, v, _, *offsets = testing_varlen.make(case)
    count = 2 * 6 * (pairs(5, 7, -1, 0) + pairs(11, 4, -1, 0))
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        attention_varlen(q, k, v, *offsets, causal=True)
    with FlopCounterMode(display=False) as training:
        attention_varlen(q, k, v, *offsets, causal=True).sum().backward()
    assert inference.get_total_flops() == count * (8 + 9)
    assert training.get_total_flops() == count * (8 + 9) + count * (3 * 8 + 2 * 9)
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as fake, torch.no_grad():
        attention_varlen(*(mode.from_tensor(t) for t in (q, k, v, *offsets)), causal=True)
    assert fake.get_total_flops() == 2 * 6 * pairs(18, 14, -1, 0) * (8 + 9)


def test_a_sink_is_one_line_over_lse():
    """As the README has it: a logit per head without a value, against a softmax with one more column, gradients too."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, S, H, 16, dtype=torch.float64, generator=generator, requires_grad=True) for S, H in ((7, 4), (9, 2), (9, 2)))
    sink = torch.randn(4, dtype=torch.float64, generator=generator, requires_grad=True)
    out, lse = attention_with_lse(q, k, v, causal=True)
    ours = out * torch.sigmoid(lse - sink[:, None]).transpose(1, 2).unsqueeze(-1)
    z = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 4
    z = z.masked_fill(torch.ones(7, 9, dtype=torch.bool).triu(3), -torch.inf)
    p = torch.softmax(torch.cat((z, sink[None, :, None, None].expand(2, 4, 7, 1)), 3), 3)[..., :9]
    plain = torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(2, 2))
    torch.testing.assert_close(ours, plain)
    grads = [torch.autograd.grad(result.square().sum(), (q, k, v, sink)) for result in (ours, plain)]
    torch.testing.assert_close(*grads)
