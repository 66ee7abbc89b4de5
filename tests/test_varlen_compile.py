"""Packed sequences under torch.compile and torch.export: graphs, frames over lengths and numbers of sequences, layout, checkpointing."""

import dataclasses
import io

import expecttest
import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend, normalize_gm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gqa_autograd import SAVE_OPS, attention_varlen, attention_varlen_with_lse, meta, testing, testing_varlen
from gqa_autograd.testing_varlen import PackedCase

# Sizes are distinct: dynamo would take equal ones for one symbol (pitfall 10)
SMALL = PackedCase((5, 0, 2, 10), (7, 3, 0, 6), 6, 3, 8, causal=True, dtype=torch.float32)
MODES = {"train": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
BACKENDS = ["eager", "aot_eager", "inductor"]


def inputs(case=SMALL, requires_grad=True):
    q, k, v, do, *offsets = testing_varlen.make(case)
    return *(t.requires_grad_(requires_grad) for t in (q, k, v)), do, *offsets


def causal(q, k, v, cu_q, cu_k):
    return attention_varlen(q, k, v, cu_q, cu_k, causal=True)


def calls(gm):
    return [node for node in gm.graph.nodes if node.op == "call_function" and "gqa_autograd" in str(node.target)]


def compare(got, want, case=SMALL):
    """Equal up to the last offset."""
    torch.testing.assert_close(got[: sum(case.lengths_q)], want[: sum(case.lengths_q)])


class TestGraphs(expecttest.TestCase):
    """Regenerate with EXPECTTEST_ACCEPT=1. The texts are the same on every supported torch."""

    def record(self, mode, function=causal):
        backend = AotEagerAndRecordGraphs()
        q, k, v, do, *offsets = inputs(requires_grad=mode == "train")
        with MODES[mode](), testing.recorded() as bodies:
            out = torch.compile(function, backend=backend, fullgraph=True)(q, k, v, *offsets)
            if mode == "train":
                out.backward(do)
        return backend, bodies

    def test_inference(self):
        for mode in ("no_grad", "inference"):
            backend, bodies = self.record(mode)
            assert bodies == ["attention_varlen_fwd"]
            assert len(backend.graphs) == 1
            self.assertExpectedInline(
                normalize_gm(backend.graphs[0].print_readable(False)),
                """\
class GraphModule(torch.nn.Module):
    def forward(self, L_q_: "f32[17, 6, 8]", L_k_: "f32[16, 3, 8]", L_v_: "f32[16, 3, 8]", L_cu_q_: "i32[5]", L_cu_k_: "i32[5]"):
        l_q_ = L_q_
        l_k_ = L_k_
        l_v_ = L_v_
        l_cu_q_ = L_cu_q_
        l_cu_k_ = L_cu_k_

        attention_varlen_fwd_default: "f32[17, 6, 8]" = torch.ops.gqa_autograd.attention_varlen_fwd.default(l_q_, l_k_, l_v_, l_cu_q_, l_cu_k_, -1, 0, None, 0, False);  l_q_ = l_k_ = l_v_ = l_cu_q_ = l_cu_k_ = None
        return (attention_varlen_fwd_default,)
""",  # noqa: E501
            )

    def test_training(self):
        backend, bodies = self.record("train")
        assert bodies == ["attention_varlen_fwd_lse", "attention_varlen_bwd"]
        assert len(backend.graphs) == 1
        forward, backward = calls(backend.fw_graphs[0]), calls(backend.bw_graphs[0])
        assert [str(node.target) for node in (*forward, *backward)] == [
            "gqa_autograd.attention_varlen_fwd_lse.default",
            "gqa_autograd.attention_varlen_bwd.default",
        ]
        assert backward[0].target._schema.arguments[6].name == "dlse"
        # No zeros are made for an lse that nobody used
        assert backward[0].args[6] is None


# --- frames ---
@pytest.mark.parametrize("backend", BACKENDS)
def test_toggling_grad_mode_costs_three_frames(backend):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(causal, backend=counter, fullgraph=True)
    q, k, v, do, *offsets = inputs()
    want = causal(q, k, v, *offsets)
    grads = torch.autograd.grad(want, (q, k, v), do)
    bodies_of = {"train": "attention_varlen_fwd_lse", "no_grad": "attention_varlen_fwd", "inference": "attention_varlen_fwd"}
    for _ in range(2):
        for mode, context in MODES.items():
            with context(), testing.recorded() as bodies, testing.poisoned():
                out = compiled(q, k, v, *offsets)
            assert bodies == [bodies_of[mode]]
            torch.testing.assert_close(out, want)
            if mode == "train":
                for a, b in zip(torch.autograd.grad(out, (q, k, v), do), grads, strict=True):
                    torch.testing.assert_close(a, b)
        assert counter.frame_count == 3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_frame_for_all_lengths(backend):
    """One compile over numbers of sequences, lengths, tails and max_seqlen; S_q below and above S_kv."""
    counter = CompileCounterWithBackend(backend)

    def step(q, k, v, cu_q, cu_k, max_seqlen):
        return attention_varlen(q, k, v, cu_q, cu_k, causal=True, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for n in range(24 if backend == "aot_eager" else 3):
        lengths_q = tuple((7 * n + 5 * m) % 11 for m in range(2 + n % 5))
        lengths_kv = tuple((3 * n + 4 * m) % 13 for m in range(2 + n % 5))
        case = dataclasses.replace(SMALL, lengths_q=(*lengths_q, 3), lengths_kv=(2, *lengths_kv), tail_q=19 + n % 3, tail_kv=29 + n % 4)
        q, k, v, do, *offsets = inputs(case)
        got, want = compiled(q, k, v, *offsets, 17 + n), causal(q, k, v, *offsets)
        compare(got, want, case)
        for a, b in zip(torch.autograd.grad(got, (q, k, v), do), torch.autograd.grad(want, (q, k, v), do), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_the_second_packing_makes_it_dynamic():
    """Without dynamic=True torch recompiles once for other lengths and numbers of sequences, not for other values or max_seqlen."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda *a: attention_varlen(*a[:5], max_seqlen_q=a[5], max_seqlen_k=a[5]), backend=counter, fullgraph=True)
    q, k, v, _, *offsets = inputs()
    for n, lengths in enumerate(((5, 0, 2, 10), (0, 0, 17, 0), (1, 2, 3, 11))):
        compiled(q, k, v, testing_varlen.offsets(lengths), offsets[1], 3 + n)
    assert counter.frame_count == 1
    for n, (lengths_q, lengths_kv) in enumerate((((9, 4), (5, 7)), ((3, 8, 2), (11, 2, 8)), ((20, 1, 5, 6, 7), (1, 2, 3, 4, 5)))):
        case = dataclasses.replace(SMALL, lengths_q=lengths_q, lengths_kv=lengths_kv)
        q, k, v, _, *offsets = inputs(case)
        compare(compiled(q, k, v, *offsets, 30 + n), attention_varlen(q, k, v, *offsets), case)
    assert counter.frame_count == 2


@pytest.mark.parametrize("with_lse", [False, True])
def test_autocast(with_lse):
    q, k, v, _, *offsets = inputs()
    function = attention_varlen_with_lse if with_lse else lambda *a: (attention_varlen(*a),)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.compile(function, backend="inductor", fullgraph=True)(q, k, v, *offsets)
    want = attention_varlen_with_lse(*(t.bfloat16() for t in (q, k, v)), *offsets)
    for a, b in zip(got, want, strict=False):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_fused_views_are_not_copied(backend, requires_grad, monkeypatch):
    """Pitfall 11: the body gets q, k and v as views of the one buffer that the projection wrote."""
    received = []
    for name in ("attention_varlen_fwd", "attention_varlen_fwd_lse"):
        original = getattr(meta, name)

        def spy(q, k, v, original=original):
            if not isinstance(q, torch._subclasses.FakeTensor):
                received.append([(t.stride(), t.untyped_storage().data_ptr()) for t in (q, k, v)])
            return original(q, k, v)

        monkeypatch.setattr(meta, name, spy)

    def layer(x, w, cu):
        q, k, v = (x @ w).split([6 * 8, 3 * 8, 3 * 8], dim=-1)
        return attention_varlen(q.unflatten(-1, (6, 8)), k.unflatten(-1, (3, 8)), v.unflatten(-1, (3, 8)), cu, cu, causal=True)

    x, w, cu = torch.randn(17, 20), torch.randn(20, 96, requires_grad=requires_grad), testing_varlen.offsets((4, 0, 13))
    out = torch.compile(layer, backend=backend, fullgraph=True)(x, w, cu)
    strides, buffers = zip(*received[-1], strict=True)
    assert strides == ((96, 8, 1),) * 3
    assert len(set(buffers)) == 1
    assert out.is_contiguous()
    torch.testing.assert_close(out, layer(x, w, cu))


# The eager backend ignores checkpointing on 2.11
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("selective", [False, True])
def test_checkpoint(selective, backend):
    """Plain checkpointing runs the forward again, SAVE_OPS keeps its results; the gradients are the same."""

    def norms(q, k, v, *offsets):
        return causal(torch.cos(q), torch.cos(k), torch.cos(v), *offsets).sin()

    def keep():
        return create_selective_checkpoint_contexts(list(SAVE_OPS))

    def block(q, k, v, cu_q, cu_k):
        return checkpoint(norms, q, k, v, cu_q, cu_k, use_reentrant=False, **({"context_fn": keep} if selective else {}))

    q, k, v, _, *offsets = inputs()
    want = torch.autograd.grad(norms(q, k, v, *offsets).sum(), (q, k, v))
    with testing.recorded() as bodies:
        got = torch.autograd.grad(torch.compile(block, backend=backend, fullgraph=True)(q, k, v, *offsets).sum(), (q, k, v))
    assert bodies == [*["attention_varlen_fwd_lse"] * (1 if selective else 2), "attention_varlen_bwd"]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


# --- export ---
class Plain(torch.nn.Module):
    def forward(self, q, k, v, cu_q, cu_k):
        return attention_varlen(q, k, v, cu_q, cu_k, causal=True)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_export(strict, grad):
    """Other lengths, another number of sequences; under no_grad the graph has no LSE."""
    auto = torch.export.Dim.AUTO
    q, k, v, _, *offsets = inputs()
    with torch.set_grad_enabled(grad):
        program = torch.export.export(Plain(), (q, k, v, *offsets), dynamic_shapes=({0: auto},) * 5, strict=strict).run_decompositions()
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    name = "attention_varlen_fwd_lse" if grad else "attention_varlen_fwd"
    assert [str(node.target) for node in calls(loaded)] == [f"gqa_autograd.{name}.default"]
    case = dataclasses.replace(SMALL, lengths_q=(9, 2), lengths_kv=(4, 8), tail_q=2, tail_kv=3)
    q, k, v, _, *offsets = inputs(case)
    with torch.no_grad(), testing.recorded() as bodies:
        out = loaded.module()(q, k, v, *offsets)
    assert bodies == [name]
    compare(out, causal(q, k, v, *offsets), case)


def test_exported_for_inference_still_has_a_gradient():
    """Slower, never wrong: attention_varlen_fwd runs the forward again in its backward."""
    q, k, v, do, *offsets = inputs(requires_grad=False)
    with torch.no_grad():
        program = torch.export.export(Plain(), (q, k, v, *offsets))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    with testing.recorded() as bodies:
        got = torch.autograd.grad(program.module()(*leaves, *offsets), leaves, do)
    assert bodies == ["attention_varlen_fwd", "attention_varlen_fwd_lse", "attention_varlen_bwd"]
    for a, b in zip(got, torch.autograd.grad(causal(*leaves, *offsets), leaves, do), strict=True):
        torch.testing.assert_close(a, b)
