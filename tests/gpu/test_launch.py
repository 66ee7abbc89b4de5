"""How the kernels are launched: one build per configuration, strides, streams, graphs, devices, compile, refusals."""

import contextlib

import pytest
import torch
from tools import kernels_of

import gqa_autograd
from gqa_autograd import ops, testing
from gqa_autograd.kernels import config
from gqa_autograd.testing import Case

pytestmark = pytest.mark.gpu
OPS = torch.ops.gqa_autograd
UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")


def step(q, k, v, **options):
    out = gqa_autograd.attention(q, k, v, **options)
    return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))


def test_one_build_per_configuration():
    """FA#2635: no compilation per shape. 50 lengths, head counts and strides, then no more kernels than after the first."""
    from gqa_autograd.kernels import build

    # A grid so small that its backward is split, and one that isn't
    for case in (Case(1, 1024, 1024, 4, 1, 128, causal=True), Case(4, 512, 512, 32, 8, 128, causal=True)):
        step(*testing.make(case, "cuda")[:3], causal=True)
    first = build.built()
    for n in range(50):
        layout = ("bshd", "bhsd", "fused")[n % 3]
        S_kv = 5 + 11 * n if layout == "fused" else 3 + 17 * n
        case = Case(1 + n % 3, 5 + 11 * n, S_kv, 1 + n % 4, 1, 128, causal=True, layout=layout)
        step(*testing.make(case, "cuda")[:3], causal=True)
    assert build.built() == first


def test_configurations_do_not_mix():
    """FA#2402, flashinfer#4014, tilelang#2662: a cache key that misses a setting shows when A then B run in one process."""
    for D, causal, dtype in (
        (64, True, torch.bfloat16),
        (128, False, torch.bfloat16),
        (64, False, torch.float16),
        (128, True, torch.float16),
    ):
        case = Case(1, 140, 180, 4, 2, D, causal=causal, dtype=dtype)
        q, k, v, do = testing.make(case, "cuda")
        ours, plain, exact = (f(case, q, k, v, do) for f in (testing.ours, testing.plain, testing.exact))
        for name in ("out", "dq", "dk", "dv"):
            testing.assert_no_worse(getattr(ours, name), getattr(plain, name), getattr(exact, name), name)


def test_views_of_a_fused_qkv_are_read_in_place():
    from gqa_autograd.kernels import device

    q, k, v, _ = testing.make(Case(2, 100, 100, 4, 2, 128, layout="fused"), "cuda")
    assert all(device.rows(t).data_ptr() == t.data_ptr() and device.rows(t).stride() == t.stride() for t in (q, k, v))
    odd = torch.randn(2, 100, 4, 129, device="cuda", dtype=torch.bfloat16)[..., 1:]
    assert device.rows(odd).is_contiguous()


@pytest.mark.parametrize("causal", [True, False])
def test_a_row_has_the_same_bits_alone_and_in_company(causal):
    """vllm#51902: tiles must not depend on run-time lengths."""
    q, k, v, _ = testing.make(Case(5, 300, 400, 8, 2, 128), "cuda")
    with torch.no_grad():
        together = gqa_autograd.attention_with_lse(q, k, v, causal=causal)
        for b in (0, 3):
            alone = gqa_autograd.attention_with_lse(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=causal)
            assert all(torch.equal(t[b : b + 1], a) for t, a in zip(together, alone, strict=True))


def test_forward_and_gradients_repeat_bit_for_bit():
    q, k, v, _ = testing.make(Case(2, 1000, 1000, 8, 2, 128), "cuda")
    first = step(q, k, v, causal=True, deterministic=True)
    for _ in range(20):
        again = step(q, k, v, causal=True, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_streams_do_not_share_a_tile_counter():
    q, k, v, _ = testing.make(Case(2, 1500, 1500, 16, 4, 128), "cuda")
    with torch.no_grad():
        expected = gqa_autograd.attention(q, k, v, causal=True)
        streams = [torch.cuda.Stream() for _ in range(6)]
        torch.cuda.synchronize()
        outs = []
        for n in range(60):
            with torch.cuda.stream(streams[n % 6]):
                outs.append(gqa_autograd.attention(q, k, v, causal=True))
        torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


def test_graph_capture_and_replay():
    """Forward and backward in one graph, replayed on new numbers; no build, allocation or synchronisation is left for the capture."""
    gqa_autograd.warmup(128, torch.bfloat16, causal=True, device="cuda")
    q, k, v, do = testing.make(Case(1, 500, 500, 8, 2, 128), "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gqa_autograd.attention(q, k, v, causal=True, deterministic=True)
        grads = torch.autograd.grad(out, (q, k, v), do)
    for seed in range(3):
        fresh = testing.make(Case(1, 500, 500, 8, 2, 128), "cuda", seed=seed)
        with torch.no_grad():
            for t, new in zip((q, k, v, do), fresh, strict=True):
                t.copy_(new)
        graph.replay()
        expected = gqa_autograd.attention(*fresh[:3], causal=True, deterministic=True)
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(expected, fresh[:3], fresh[3]), strict=True))


def test_two_graphs_replay_side_by_side():
    q, k, v, _ = testing.make(Case(1, 2000, 2000, 16, 4, 128), "cuda")
    graphs = []
    with torch.no_grad():
        expected = gqa_autograd.attention(q, k, v, causal=True)
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = gqa_autograd.attention(q, k, v, causal=True)
            graphs.append((graph, out, torch.cuda.Stream()))
    for _ in range(10):
        for graph, out, stream in graphs:
            out.fill_(float("nan"))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for _, out, _ in graphs)


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["bshd", "fused"])
def test_no_synchronisation(layout):
    """Through the operators and past the dispatcher, of a kind that is new and of one that is known."""
    q, k, v, do = testing.make(Case(1, 200, 200, 4, 2, 64, layout=layout), "cuda")
    gqa_autograd.warmup(64, torch.bfloat16, causal=True, device="cuda")
    torch.cuda.synchronize()
    with no_synchronisation():
        for _ in range(3):
            torch.autograd.grad(gqa_autograd.attention(q, k, v, causal=True), (q, k, v), do)
            with torch.no_grad():
                gqa_autograd.attention(q, k, v, causal=True)
                gqa_autograd.attention_with_lse(q, k, v, causal=True)


def test_a_synchronisation_would_be_seen():
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_known_kind_passes_the_dispatcher(requires_grad, monkeypatch):
    """The same bits as the operator's, on a view whose address is odd too, on another stream, and into a graph."""
    case = Case(1, 300, 400, 4, 2, 128)
    q, k, v = (t.detach().requires_grad_(requires_grad) for t in testing.make(case, "cuda")[:3])
    odd = torch.empty(k.numel() + 1, dtype=k.dtype, device="cuda")[1:].view(k.shape).copy_(k.detach())
    stream = torch.cuda.Stream()
    with torch.no_grad():
        expected = gqa_autograd.attention(q, k, v, causal=True)
        assert torch.equal(gqa_autograd.attention(q, odd, v, causal=True), expected)
        monkeypatch.setattr(ops, "run", lambda *arguments: pytest.fail("the operator was called"))
        assert torch.equal(gqa_autograd.attention(q, k, v, causal=True), expected)
        assert torch.equal(gqa_autograd.attention(q, odd, v, causal=True), expected)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            out = gqa_autograd.attention(q, k, v, causal=True)
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = gqa_autograd.attention(q, k, v, causal=True)
        for _ in range(3):
            out.zero_()
            graph.replay()
            assert torch.equal(out, expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_which_kernels_run(compiled):
    """Under no_grad one kernel, without LSE; in training the forward and the three of the backward. Nothing of torch's own."""
    f = torch.compile(gqa_autograd.attention, fullgraph=True) if compiled else gqa_autograd.attention
    q, k, v, _ = testing.make(Case(4, 512, 512, 32, 8, 128), "cuda")

    def infer():
        with torch.no_grad(), testing.recorded() as bodies:
            f(q, k, v, causal=True)
        return bodies

    def train():
        with testing.recorded() as bodies:
            f(q, k, v, causal=True).sum().backward()
        return bodies

    assert infer() == ["attention_fwd"]
    assert train() == ["attention_fwd_lse", "attention_bwd"]
    assert kernels_of(infer) == ["attention_fwd_kernel"]
    assert kernels_of(train) == [
        "attention_fwd_kernel",
        "attention_bwd_preprocess_kernel",
        "attention_bwd_kernel",
        "attention_bwd_postprocess_kernel",
    ]


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("mask", [{"causal": True}, {}, {"window": (40, 7)}, {"causal": True, "window": (40, -1)}], ids=str)
@pytest.mark.parametrize("sizes", config.D_FORWARD, ids=str)
def test_every_feature_runs_on_the_one_kernel(sizes, mask, softcap):
    """By the name of the kernel that ran: nothing leaves the fast path."""
    D, D_v = sizes
    q, k, v, _ = testing.make(Case(1, 90, 130, 4, 2, D, D_v=D_v if D_v != D else None), "cuda")

    def infer():
        with torch.no_grad():
            gqa_autograd.attention(q, k, v, softcap=softcap, **mask)

    infer()
    assert kernels_of(infer) == ["attention_fwd_kernel"]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_equals_eager(mode):
    q, k, v, do = testing.make(Case(2, 130, 190, 6, 2, 64), "cuda")
    f = torch.compile(lambda q, k, v: gqa_autograd.attention(q * 2, k, v, causal=True), fullgraph=True, mode=mode)
    expected = gqa_autograd.attention(q * 2, k, v, causal=True)
    grads = torch.autograd.grad(expected, (q, k, v), do)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        out = f(q, k, v)
        again = torch.autograd.grad(out, (q, k, v), do)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        for a, b in zip(again, grads, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(requires_grad, layout):
    q, k, v, do = testing.make(Case(2, 19, 23, 4, 2, 64, layout=layout), "cuda")
    q, k, v = (t.detach().requires_grad_(requires_grad) for t in (q, k, v))
    tolerance = {"rtol": 2e-2, "atol": 2e-2}
    for scale in (None, 0.3):
        torch.library.opcheck(OPS.attention_fwd.default, (q, k, v, -1, 0, scale), test_utils=UTILS, **tolerance)
        torch.library.opcheck(OPS.attention_fwd_lse.default, (q, k, v, -1, 0, scale), test_utils=UTILS, **tolerance)
    with torch.no_grad():
        out, lse = gqa_autograd.attention_with_lse(q, k, v)
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            OPS.attention_bwd.default, (do, q.detach(), k.detach(), v.detach(), out, lse, dlse), test_utils=UTILS, **tolerance
        )


def test_ring_of_three_blocks():
    """FA#1137: attention_bwd with the global out and lse, block by block, sums to the whole gradient; so does autograd through lse."""
    case = Case(1, 192, 384, 4, 2, 128)
    q, k, v, do = testing.make(case, "cuda")
    plain, exact = testing.plain(case, q, k, v, do), testing.exact(case, q, k, v, do)
    parts = [gqa_autograd.attention_with_lse(q, k[:, s], v[:, s]) for s in (slice(0, 128), slice(128, 200), slice(200, 384))]
    merged = gqa_autograd.merge_states(*gqa_autograd.merge_states(*parts[0], *parts[1]), *parts[2])
    grads = torch.autograd.grad(merged[0], (q, k, v), do)
    testing.assert_no_worse(merged[0], plain.out, exact.out, "out")
    testing.assert_lse(merged[1], exact.lse)
    with torch.no_grad():
        blocks = [
            OPS.attention_bwd(do, q, k[:, s], v[:, s], merged[0], merged[1], None)
            for s in (slice(0, 128), slice(128, 200), slice(200, 384))
        ]
    whole = sum(b[0].float() for b in blocks).bfloat16(), *(torch.cat([b[i] for b in blocks], 1) for i in (1, 2))
    for name, through_lse, by_block in zip(("dq", "dk", "dv"), grads, whole, strict=True):
        testing.assert_no_worse(through_lse, getattr(plain, name), getattr(exact, name), name)
        testing.assert_no_worse(by_block, getattr(plain, name), getattr(exact, name), name)


def test_another_device_is_current_and_stays_so():
    """FA#1782, FA#2356."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only: that another device stays the current one was not tested")
    case = Case(1, 200, 260, 4, 2, 128, causal=True)
    torch.cuda.set_device(0)
    q, k, v, do = testing.make(case, "cuda:1")
    ours = testing.ours(case, q, k, v, do)
    assert torch.cuda.current_device() == 0
    plain, exact = testing.plain(case, q, k, v, do), testing.exact(case, q, k, v, do)
    for name in ("out", "dq", "dk", "dv"):
        assert getattr(ours, name).device == q.device
        testing.assert_no_worse(getattr(ours, name), getattr(plain, name), getattr(exact, name), name)
    with torch.no_grad(), torch.cuda.device(1):
        assert torch.equal(gqa_autograd.attention(q, k, v, causal=True), ours.out)
        assert torch.cuda.current_device() == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": torch.float32}, TypeError, "autocast"),
        ({"D": 80}, NotImplementedError, r"\(D, D_v\) on CUDA must be one of"),
    ],
    ids=str,
)
def test_refusals_come_before_any_launch(change, error, message):
    options = {"causal": True, **change}
    D, dtype = options.pop("D", 64), options.pop("dtype", torch.bfloat16)
    q, k, v, _ = testing.make(Case(1, 20, 20, 2, 2, D, dtype=dtype), "cuda")

    def refused():
        with pytest.raises(error, match=message):
            gqa_autograd.attention(q, k, v, **options)

    refused()
    assert kernels_of(refused) == []


def test_a_tensor_on_the_cpu_is_refused():
    q, k, v, _ = testing.make(Case(1, 20, 20, 2, 2, 64), "cuda")
    with pytest.raises(ValueError, match="one device"):
        gqa_autograd.attention(q, k.cpu(), v)
