"""supported, explain and warmup, and what a CUDA call refuses; all of it without a GPU, on fake CUDA tensors."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gqa_autograd
from gqa_autograd import support, testing
from gqa_autograd.kernels import build, config

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def qkv(D=128, dtype=torch.bfloat16, device="cuda", requires_grad=True, D_v=None):
    q = torch.empty(2, 33, 8, D, dtype=dtype, device=device, requires_grad=requires_grad)
    k = torch.empty(2, 65, 2, D, dtype=dtype, device=device)
    return q, k, torch.empty(2, 65, 2, D_v or D, dtype=dtype, device=device)


def test_readme_lists_what_is_supported():
    """The rows of the README's table, cell by cell."""
    cpu, cuda = gqa_autograd.supported()
    short = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
    size = lambda D, D_v: str(D) if D_v == D else f"{D}/{D_v}"  # noqa: E731
    sizes = lambda pairs: "any" if pairs is None else ", ".join(size(*pair) for pair in pairs)  # noqa: E731
    for row, name in ((cpu, "CPU"), (cuda, "CUDA sm_90a")):
        assert row.forward == support.FEATURES
        cells = [name, ", ".join(map(short.get, row.dtypes)), sizes(row.D_forward), sizes(row.D_backward)]
        cells += ["yes" if feature in row.backward else "forward only" for feature in support.FEATURES]
        assert f"| {' | '.join(cells)} |" in README


@pytest.mark.parametrize(
    ("requires_grad", "return_lse", "operators"),
    [
        (True, False, ("attention_fwd_lse", "attention_bwd")),
        (True, True, ("attention_fwd_lse", "attention_bwd")),
        (False, True, ("attention_fwd_lse",)),
        (False, False, ("attention_fwd",)),
    ],
)
def test_explain_names_the_operators_that_run(requires_grad, return_lse, operators):
    q, k, v = (t.detach().normal_().requires_grad_(requires_grad) for t in qkv(device="cpu"))
    said = gqa_autograd.explain(q, k, v, causal=True, return_lse=return_lse)
    with testing.recorded() as bodies:
        function = gqa_autograd.attention_with_lse if return_lse else gqa_autograd.attention
        result = function(q, k, v, causal=True)
        if requires_grad:
            (result[0] if return_lse else result).sum().backward()
    assert said.operators == operators == tuple(bodies)
    assert said.body == support.REFERENCE
    assert said.forward_tile is None
    assert said.backward_tile is None


MASKS = {"causal": {"causal": True}, "full": {}, "window": {"window": (17, 4)}}


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", config.D_FORWARD, ids=str)
def test_explain_shows_the_tiles_of_a_cuda_call(sizes, mask, softcap):
    """Each size and each feature on its kernel, in the forward; none leaves the fast path."""
    D, D_v = sizes
    trained = sizes in config.D_BACKWARD and mask != "window" and softcap == 0
    with FakeTensorMode():
        said = gqa_autograd.explain(*qkv(D, requires_grad=trained, D_v=D_v), softcap=softcap, **MASKS[mask])
    assert said.body == support.KERNEL
    assert said.forward_tile == config.FORWARD[D, D_v, mask, softcap > 0, "dense"]
    assert said.backward_tile == (config.BACKWARD[D, mask == "causal"] if trained else None)
    assert f"block_N={said.forward_tile.block_N}" in str(said)


REFUSED = [
    ({"softcap": 3.0}, {}, NotImplementedError, "attention: softcap for gradients on CUDA must be 0 (off), no kernel has it yet, got 3.0"),
    (
        {"window": (3, 0)},
        {},
        NotImplementedError,
        "attention: window for gradients on CUDA must be (-1, -1), or (-1, 0) as causal makes it, no kernel has another yet, got (3, 0)",
    ),
    ({"window": (-1, 2)}, {}, NotImplementedError, "got (-1, 2); the forward alone runs under torch.no_grad()"),
    ({}, {"D": 80}, NotImplementedError, f"attention: (D, D_v) on CUDA must be one of {config.D_FORWARD}, got (80, 80)"),
    ({}, {"D_v": 64}, NotImplementedError, "got (128, 64)"),
    ({}, {"D": 96}, NotImplementedError, f"attention: (D, D_v) for gradients on CUDA must be one of {config.D_BACKWARD}, got (96, 96)"),
    ({"deterministic": True}, {}, NotImplementedError, "attention: deterministic must be False for gradients on CUDA"),
    (
        {},
        {"dtype": torch.float32, "requires_grad": False},
        TypeError,
        "attention: q, k and v on CUDA must be float16 or bfloat16, got float32; cast them, or run",
    ),
]


@pytest.mark.parametrize("function", [gqa_autograd.attention, gqa_autograd.explain], ids=["attention", "explain"])
@pytest.mark.parametrize(("options", "tensors", "error", "message"), REFUSED, ids=[case[3][-40:] for case in REFUSED])
def test_cuda_refuses_by_name(function, options, tensors, error, message):
    """explain raises what the call would raise; the call does so while it is traced, so no graph is built that can't run."""
    with FakeTensorMode(), pytest.raises(error) as caught:
        function(*qkv(**tensors), **options)
    assert message in str(caught.value)


PACKED = "q, k and v on CUDA must not require gradients, packed sequences have no backward kernel yet; the forward alone runs under"


def packed(**changed):
    """The tensors of qkv as packed sequences, with offsets."""
    q, k, v = (t.detach().flatten(0, 1).requires_grad_(t.requires_grad) for t in qkv(**changed))
    return q, k, v, *(torch.zeros(3, dtype=torch.int32, device=q.device) for _ in "qk")


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("function", [gqa_autograd.attention_varlen, gqa_autograd.attention_varlen_with_lse])
def test_gradients_of_packed_sequences_are_refused_on_cuda(function, compiled):
    """Before the forward, in eager and while compile traces; the forward alone has its kernel, and so has a raw backward its refusal."""
    call = torch.compile(function, backend="eager", fullgraph=True) if compiled else function
    with FakeTensorMode():
        tensors = packed()
        with pytest.raises(Exception, match=re.escape(f"attention_varlen: {PACKED}")) as caught:
            call(*tensors)
        assert compiled or caught.type is NotImplementedError
        with torch.no_grad():
            assert call(*tensors) is not None
        q, k, v, *offsets = (t.detach() for t in tensors)
        out, lse = gqa_autograd.attention_varlen_with_lse(q, k, v, *offsets)
        with pytest.raises(NotImplementedError, match=re.escape(f"attention_varlen_bwd: {PACKED}")):
            torch.ops.gqa_autograd.attention_varlen_bwd(out, q, k, v, out, lse, None, *offsets)


@pytest.mark.parametrize("function", ["attention_varlen", "explain"])
@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"D": 80}, NotImplementedError, f"attention_varlen: (D, D_v) on CUDA must be one of {config.D_FORWARD}, got (80, 80)"),
        ({"dtype": torch.float32}, TypeError, "attention_varlen: q, k and v on CUDA must be float16 or bfloat16, got float32; cast them"),
        ({"requires_grad": True}, NotImplementedError, f"attention_varlen: {PACKED}"),
    ],
    ids=["size", "dtype", "gradient"],
)
def test_cuda_refuses_packed_sequences_by_name(function, tensors, error, message):
    with FakeTensorMode():
        q, k, v, *offsets = packed(**{"requires_grad": False} | tensors)
        with pytest.raises(error, match=re.escape(message)):
            getattr(gqa_autograd, function)(q, k, v, **dict(zip(("cu_seqlens_q", "cu_seqlens_k"), offsets, strict=True)))


@pytest.mark.parametrize("return_lse", [False, True])
def test_explain_packed_sequences(return_lse):
    with FakeTensorMode():
        q, k, v, cu_q, cu_k = packed(requires_grad=False)
        said = gqa_autograd.explain(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=33, causal=True, return_lse=return_lse)
    assert said.operators == ("attention_varlen_fwd_lse" if return_lse else "attention_varlen_fwd",)
    assert said.body == support.KERNEL
    assert said.forward_tile == config.forward("", 128, 128, -1, 0, 0.0, packed=True)
    assert said.backward_tile is None
    q, k, v, cu_q, cu_k = packed(device="cpu")
    said = gqa_autograd.explain(q.detach().requires_grad_(), k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert said == (("attention_varlen_fwd_lse", "attention_varlen_bwd"), support.REFERENCE, None, None)


@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=["", "deterministic"])
def test_what_a_gradient_would_refuse_runs_without_one(options):
    with FakeTensorMode():
        q, k, v = qkv(256, requires_grad=False)
        assert gqa_autograd.attention(q, k, v, **options).shape == q.shape


def test_deterministic_mode_that_only_warns_does_not_refuse():
    torch.use_deterministic_algorithms(True, warn_only=True)
    with FakeTensorMode():
        assert gqa_autograd.explain(*qkv()).backward_tile is not None
    torch.use_deterministic_algorithms(True)
    with FakeTensorMode(), pytest.raises(NotImplementedError, match="deterministic"):
        gqa_autograd.explain(*qkv())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"D": 80}, NotImplementedError, "warmup: (D, D_v) on CUDA must be one of"),
        ({"D": 256}, NotImplementedError, "warmup: (D, D_v) for gradients on CUDA must be one of"),
        ({"D": 128, "window": True}, NotImplementedError, "warmup: window for gradients on CUDA"),
        ({"varlen": True}, NotImplementedError, f"warmup: {PACKED}"),
        ({"varlen": True, "D": 80, "backward": False}, NotImplementedError, "warmup: (D, D_v) on CUDA must be one of"),
        ({"D": 192, "D_v": 64, "backward": False}, NotImplementedError, "got (192, 64)"),
        ({"dtype": torch.float32}, TypeError, "warmup: dtype must be float16 or bfloat16, got float32"),
        ({"D": (128, 77), "dtype": (torch.float16, torch.bfloat16)}, NotImplementedError, "got (77, 77)"),
    ],
    ids=str,
)
def test_warmup_refuses_before_it_builds(arguments, error, message, monkeypatch):
    monkeypatch.setattr(support, "_build", lambda *configuration: pytest.fail(f"built {configuration}"))
    before = build.built()
    with pytest.raises(error) as caught:
        gqa_autograd.warmup(**arguments)
    assert message in str(caught.value)
    assert build.built() == before


def test_warmup_builds_every_configuration_once(monkeypatch):
    seen = []
    monkeypatch.setattr(support, "_build", lambda *configuration: seen.append(configuration))
    gqa_autograd.warmup((64, 128), (torch.float16, torch.bfloat16), backward=False)
    assert len(seen) == len(set(map(str, seen))) == 8
    seen.clear()
    gqa_autograd.warmup(256, causal=True, backward=False)
    gqa_autograd.warmup(192, D_v=128, window=True, softcap=True, backward=False)
    assert len(seen) == 2
    assert support._tiles(*seen[1])[0] == config.FORWARD[192, 128, "window", True, "dense"]
    seen.clear()
    gqa_autograd.warmup(varlen=True, causal=True, backward=False)
    assert support._tiles(*seen[0])[0] == config.forward("", 128, 128, -1, 0, 0.0, packed=True)


@pytest.mark.parametrize("varlen", [False, True])
def test_warmup_launches_what_it_builds(varlen, monkeypatch):
    """On a CPU in place of the GPU: both forwards, and the backward where it is wanted."""
    monkeypatch.setattr(support, "_build", lambda *configuration: None)
    prefix = "attention_varlen" if varlen else "attention"
    with testing.recorded() as bodies:
        gqa_autograd.warmup(64, causal=True, varlen=varlen, backward=False, device="cpu")
    # A dense call also with keys enough to be split
    assert bodies == [name for name in (f"{prefix}_fwd", f"{prefix}_fwd_lse") for _ in range(1 if varlen else 2)]


def test_the_long_call_of_warmup_is_split():
    for tile in config.FORWARD.values():
        if tile.form == "dense":
            window = {"full": (-1, -1), "causal": (-1, 0), "window": (support._LONG, 0)}[tile.mask]
            assert config.parts(tile, 1, support._LONG, 1, window, 132) > 1


def test_warmup_builds_what_a_split_call_needs(monkeypatch):
    pytest.importorskip("tilelang", reason="no tilelang here: no program to build")
    from gqa_autograd.kernels import forward_launch

    programs: list = []
    monkeypatch.setattr(forward_launch, "kernel", programs.append)
    for function in (forward_launch.compiled, forward_launch.compiled_merging):
        monkeypatch.setattr(forward_launch, function.__name__, function.__wrapped__)
    gqa_autograd.warmup(64, causal=True, backward=False)
    tile = config.FORWARD[64, 64, "causal", False, "dense"]
    wanted = [forward_launch.program(tile, torch.bfloat16, lse) for lse in (False, True)]
    wanted += [forward_launch.combine_program(64, torch.bfloat16, lse) for lse in (False, True)]
    wanted += [forward_launch.program(config.split(tile), torch.bfloat16, True)]
    assert {(p.name, p.configuration) for p in programs} == {(p.name, p.configuration) for p in wanted}


@pytest.mark.parametrize(("S_q", "form"), [(16, "split"), (4096, "dense")])
def test_explain_shows_a_split(S_q, form, monkeypatch):
    """As beside a GPU of 132 multiprocessors."""
    from gqa_autograd.kernels import device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "multiprocessors", lambda device: 132)
    with FakeTensorMode():
        q, k, v = (torch.empty(2, S, H, 128, dtype=torch.bfloat16, device="cuda") for S, H in ((S_q, 8), (8192, 1), (8192, 1)))
        said = gqa_autograd.explain(q, k, v, causal=True)
    assert said.forward_tile == config.FORWARD[128, 128, "causal", False, form]
    assert f"form='{form}'" in str(said)
