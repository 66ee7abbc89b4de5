"""torch.compile and torch.export: the graphs, the number of frames, which body runs, and what the body is handed."""

import dataclasses
import io

import expecttest
import pytest
import torch
import torch._functorch.config
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend, normalize_gm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gqa_autograd import SAVE_OPS, attention, attention_with_lse, meta, testing
from gqa_autograd.reference import attention as reference
from gqa_autograd.testing import Case

# Distinct sizes: dynamo would take equal ones for one symbol (pitfall 10)
SMALL = Case(2, 5, 7, 6, 3, 8, causal=True, dtype=torch.float32)
MODES = {"train": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
BACKENDS = ["eager", "aot_eager", "inductor"]


def inputs(case=SMALL, requires_grad=True):
    q, k, v, do = testing.make(case)
    return *(t.requires_grad_(requires_grad) for t in (q, k, v)), do


def causal(q, k, v):
    return attention(q, k, v, causal=True)


def calls(gm):
    """The calls of our operators in a graph, in order."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and "gqa_autograd" in str(node.target)]


def names(gm):
    """Every call in a graph that computes, one a line."""
    idle = ("getitem", "detach", "alias")
    nodes = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    return "\n".join(name for name in nodes if not any(word in name for word in idle))


# --- graphs ---
class TestGraphs(expecttest.TestCase):
    """Regenerate with EXPECTTEST_ACCEPT=1. The texts are the same on every supported torch."""

    def record(self, mode, function=causal):
        backend = AotEagerAndRecordGraphs()
        q, k, v, do = inputs(requires_grad=mode == "train")
        with MODES[mode](), testing.recorded() as bodies:
            out = torch.compile(function, backend=backend, fullgraph=True)(q, k, v)
            if mode == "train":
                out.backward(do)
        return backend, bodies

    def test_inference(self):
        """Nothing but attention_fwd: no LSE is written, allocated or returned."""
        for mode in ("no_grad", "inference"):
            backend, bodies = self.record(mode)
            assert bodies == ["attention_fwd"]
            assert len(backend.graphs) == 1
            self.assertExpectedInline(
                normalize_gm(backend.graphs[0].print_readable(False)),
                """\
class GraphModule(torch.nn.Module):
    def forward(self, L_q_: "f32[2, 5, 6, 8]", L_k_: "f32[2, 7, 3, 8]", L_v_: "f32[2, 7, 3, 8]"):
        l_q_ = L_q_
        l_k_ = L_k_
        l_v_ = L_v_

        attention_fwd_default: "f32[2, 5, 6, 8]" = torch.ops.gqa_autograd.attention_fwd.default(l_q_, l_k_, l_v_, -1, 0, None, 0, False);  l_q_ = l_k_ = l_v_ = None
        return (attention_fwd_default,)
""",  # noqa: E501
            )
            self.assertExpectedInline(names(backend.fw_graphs[0]), """gqa_autograd.attention_fwd.default""")

    def test_training(self):
        backend, bodies = self.record("train")
        assert bodies == ["attention_fwd_lse", "attention_bwd"]
        assert len(backend.graphs) == 1
        self.assertExpectedInline(names(backend.fw_graphs[0]), """gqa_autograd.attention_fwd_lse.default""")
        self.assertExpectedInline(names(backend.bw_graphs[0]), """gqa_autograd.attention_bwd.default""")
        (backward,) = calls(backend.bw_graphs[0])
        assert backward.target._schema.arguments[6].name == "dlse"
        # No zeros are made for an lse that nobody used
        assert backward.args[6] is None

    def test_training_through_lse(self):
        backend, _ = self.record("train", lambda q, k, v: attention_with_lse(q, k, v)[1].sum() * attention(q, k, v))
        backwards = calls(backend.bw_graphs[0])
        assert [node.args[6] is None for node in backwards].count(False) == 1

    def test_deterministic_is_in_the_graph(self):
        def deterministic(node):
            at = [a.name for a in node.target._schema.arguments].index("deterministic")
            return node.args[at] if len(node.args) > at else False

        for switch in (False, True):
            torch._dynamo.reset()
            torch.use_deterministic_algorithms(switch)
            backend, _ = self.record("train")
            for graph in (backend.fw_graphs[0], backend.bw_graphs[0]):
                assert [deterministic(node) for node in calls(graph)] == [switch]


# --- frames ---
@pytest.mark.parametrize("backend", BACKENDS)
def test_toggling_grad_mode_costs_three_frames(backend):
    """Pitfall 10, and pytorch#144540, FA#1435: no graph breaks; train, no_grad and inference compile once each, then never again."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(causal, backend=counter, fullgraph=True)
    q, k, v, do = inputs()
    want = causal(q, k, v)
    grads = torch.autograd.grad(want, (q, k, v), do)
    bodies_of = {"train": ["attention_fwd_lse"], "no_grad": ["attention_fwd"], "inference": ["attention_fwd"]}
    for _ in range(2):
        for mode, context in MODES.items():
            with context(), testing.recorded() as bodies, testing.poisoned():
                out = compiled(q, k, v)
            assert bodies == bodies_of[mode]
            torch.testing.assert_close(out, want)
            if mode == "train":
                for a, b in zip(torch.autograd.grad(out, (q, k, v), do), grads, strict=True):
                    torch.testing.assert_close(a, b)
        assert counter.frame_count == 3


@pytest.mark.parametrize("mode", ["frozen", "only_q", "only_k", "only_v"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_only_when_needed(backend, mode):
    args = inputs(requires_grad=False)[:3]
    if mode != "frozen":
        args["qkv".index(mode[-1])].requires_grad_()
    with testing.recorded() as bodies:
        out = torch.compile(causal, backend=backend, fullgraph=True)(*args)
        assert bodies == ["attention_fwd" if mode == "frozen" else "attention_fwd_lse"]
        if mode != "frozen":
            out.sum().backward()
            assert bodies[1:] == ["attention_bwd"]
    assert [t.grad is not None for t in args] == [mode == f"only_{name}" for name in "qkv"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_frame_for_all_lengths(backend):
    """FA#2635: one compile per configuration over 50 lengths, S_q below and above S_kv (rows that see no key)."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(causal, backend=counter, fullgraph=True, dynamic=True)
    lengths = range(11, 61) if backend == "aot_eager" else (11, 29, 47)
    for n, S_q in enumerate(lengths):
        case = dataclasses.replace(SMALL, B=2 + n % 3, S_q=S_q, S_kv=90 - 2 * S_q if S_q < 40 else S_q - 10)
        q, k, v, do = inputs(case)
        got, want = compiled(q, k, v), causal(q, k, v)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, (q, k, v), do), torch.autograd.grad(want, (q, k, v), do), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_second_length_makes_it_dynamic():
    """Without dynamic=True torch recompiles once, for the second length, and never again."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(causal, backend=counter, fullgraph=True)
    for S_q, S_kv in ((11, 13), (17, 29), (23, 41), (31, 37), (43, 19)):
        compiled(*inputs(dataclasses.replace(SMALL, S_q=S_q, S_kv=S_kv))[:3])
    assert counter.frame_count == 2


def test_settings_are_part_of_the_cache_key():
    """FA#2402, flashinfer#4014, tilelang#2662: A, then B, then A again in one process, each with its own settings."""
    q, k, v, _ = inputs(requires_grad=False)
    compiled = torch.compile(attention, backend="inductor", fullgraph=True)
    options = [{"window": (-1, 0)}, {"scale": -0.3}, {"window": (1, 0)}, {"softcap": 2.0}, {"scale": 0.7}]
    for option in options + options[::-1]:
        formula = dataclasses.replace(SMALL, causal=False, **option).formula
        torch.testing.assert_close(compiled(q, k, v, **option), reference.attention_fwd_lse(q, k, v, *formula)[0])


@pytest.mark.parametrize("with_lse", [False, True])
def test_autocast(with_lse):
    """Pitfall 9: the casts are in the graph, lse stays float32."""
    q, k, v, _ = inputs()
    compiled = torch.compile(lambda *a: attention_with_lse(*a) if with_lse else (attention(*a),), backend="inductor", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = compiled(q, k, v)
    want = attention_with_lse(*(t.bfloat16() for t in (q, k, v)))
    for a, b in zip(got, want, strict=False):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend):
    """The operators refuse; AOTAutograd refuses before they are asked. Either way nobody gets a silent zero."""
    q, k, v, _ = inputs()
    # With donated buffers torch refuses create_graph itself, before anybody asks for a second derivative
    with torch._functorch.config.patch(donated_buffer=False):
        (dq,) = torch.autograd.grad(torch.compile(causal, backend=backend)(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dq.sum().backward()


def test_forward_mode_is_refused():
    """Pitfall 8, with the transform inside the compiled function."""
    q, k, v, _ = inputs(requires_grad=False)

    def tangent(q):
        return torch.func.jvp(lambda q: attention(q, k, v), (q,), (q,))[1]

    with pytest.raises(NotImplementedError, match=r"attention: forward-mode AD .* got a tangent for q"):
        torch.compile(tangent, backend="eager")(q)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(tangent, backend="eager", fullgraph=True)(q)


# --- layout ---
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_fused_views_are_not_copied(backend, requires_grad, monkeypatch):
    """Pitfall 11: the body gets q, k and v as views of the one buffer that the projection wrote; outputs are contiguous all the same."""
    received = []
    for name in ("attention_fwd", "attention_fwd_lse"):
        original = getattr(meta, name)

        def spy(q, k, v, original=original):
            if not isinstance(q, torch._subclasses.FakeTensor):
                received.append([(t.stride(), t.untyped_storage().data_ptr()) for t in (q, k, v)])
            return original(q, k, v)

        monkeypatch.setattr(meta, name, spy)

    def layer(x, w):
        q, k, v = (x @ w).split([6 * 8, 3 * 8, 3 * 8], dim=-1)
        return attention(q.unflatten(-1, (6, 8)), k.unflatten(-1, (3, 8)), v.unflatten(-1, (3, 8)), causal=True)

    x, w = torch.randn(2, 5, 20), torch.randn(20, 96, requires_grad=requires_grad)
    out = torch.compile(layer, backend=backend, fullgraph=True)(x, w)
    strides, buffers = zip(*received[-1], strict=True)
    assert strides == ((480, 96, 8, 1),) * 3
    assert len(set(buffers)) == 1
    assert out.is_contiguous()
    torch.testing.assert_close(out, layer(x, w))


# --- checkpointing ---
def norms(q, k, v):
    """Cheap work around attention, so that there is something to recompute."""
    return attention(torch.cos(q), torch.cos(k), torch.cos(v), causal=True).sin()


def gradients(function, *args):
    leaves = [t.detach().clone().requires_grad_() for t in args]
    with testing.recorded() as bodies:
        function(*leaves).sum().backward()
    return [t.grad for t in leaves], bodies


# The eager backend ignores checkpointing on 2.11: it is for debugging dynamo
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("selective", [False, True])
def test_checkpoint(selective, backend):
    """Plain checkpointing runs the forward again, SAVE_OPS keeps its results; the gradients are the same."""

    def keep():
        return create_selective_checkpoint_contexts(list(SAVE_OPS))

    def block(q, k, v):
        return checkpoint(norms, q, k, v, use_reentrant=False, **({"context_fn": keep} if selective else {}))

    args = inputs()[:3]
    want, _ = gradients(norms, *args)
    got, bodies = gradients(torch.compile(block, backend=backend, fullgraph=True), *args)
    assert bodies == ["attention_fwd_lse", *["attention_fwd_lse"] * (not selective), "attention_bwd"]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("saved", [True, False])
def test_memory_budget(saved):
    """A memory budget keeps attention, the dearest to run again, if torch may keep operators that are not its own."""

    def block(q, k, v, w):
        x = q
        for _ in range(3):
            x = attention((x @ w).relu(), k, v).sin()
        return x

    case = Case(2, 65, 67, 6, 3, 16, dtype=torch.float32)
    q, k, v, _ = inputs(case)
    options = {"activation_memory_budget": 0.7, "is_non_builtin_to_include": saved}
    with torch._functorch.config.patch(options):
        _, bodies = gradients(torch.compile(block, backend="aot_eager", fullgraph=True), q, k, v, torch.randn(16, 16))
    assert bodies.count("attention_bwd") == 3
    assert bodies.count("attention_fwd_lse") == 3 if saved else bodies.count("attention_fwd_lse") > 3


# --- export ---
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(20, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).split([6 * 8, 3 * 8, 3 * 8], dim=-1)
        return attention(q.unflatten(-1, (6, 8)), k.unflatten(-1, (3, 8)), v.unflatten(-1, (3, 8)), causal=True).flatten(2)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_export(strict, grad):
    """Export for inference under torch.no_grad(): the graph then holds attention_fwd. With gradients on it can still be trained.

    Pitfall 5: grad mode decides, never torch.compiler.is_exporting(), which is True inside plain compile on 2.11.
    """
    layer, auto = Layer(), torch.export.Dim.AUTO
    with torch.set_grad_enabled(grad):
        program = torch.export.export(layer, (torch.randn(2, 5, 20),), dynamic_shapes=({0: auto, 1: auto},), strict=strict)
        program = program.run_decompositions()
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    name = "attention_fwd_lse" if grad else "attention_fwd"
    assert [str(node.target) for node in calls(loaded)] == [f"gqa_autograd.{name}.default"]
    x = torch.randn(3, 9, 20)
    with torch.no_grad(), testing.recorded() as bodies:
        out = loaded.module()(x)
    assert bodies == [name]
    torch.testing.assert_close(out, layer(x))


def test_exported_for_inference_still_has_a_gradient():
    """Slower, never wrong: attention_fwd runs the forward again in its backward."""
    q, k, v, do = inputs(requires_grad=False)

    class Plain(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True)

    with torch.no_grad():
        program = torch.export.export(Plain(), (q, k, v))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    with testing.recorded() as bodies:
        got = torch.autograd.grad(program.module()(*leaves), leaves, do)
    assert bodies == ["attention_fwd", "attention_fwd_lse", "attention_bwd"]
    for a, b in zip(got, torch.autograd.grad(causal(*leaves), leaves, do), strict=True):
        torch.testing.assert_close(a, b)
