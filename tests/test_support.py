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
        cells.append("any" if row.D_decode is None else ", ".join(map(str, row.D_decode)))
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


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", config.D_BACKWARD, ids=str)
def test_explain_shows_the_tiles_of_a_cuda_call(sizes, mask, softcap, deterministic, trained):
    """Each size and each feature on its kernels; none leaves the fast path."""
    D, D_v = sizes
    with FakeTensorMode():
        said = gqa_autograd.explain(*qkv(D, requires_grad=trained, D_v=D_v), softcap=softcap, deterministic=deterministic, **MASKS[mask])
    assert said.body == support.KERNEL
    assert said.forward_tile == config.FORWARD[D, D_v, mask, softcap > 0, "dense"]
    assert said.backward_tile == (config.BACKWARD[D, D_v, mask, softcap > 0, "dense"] if trained else None)
    assert f"block_N={said.forward_tile.block_N}" in str(said)


def test_gradients_have_the_sizes_of_the_forward():
    assert config.D_BACKWARD == config.D_FORWARD
    assert set(config.BACKWARD) == set(config.FORWARD)
    for key, tile in config.BACKWARD.items():
        assert key == (tile.D, tile.D_v, tile.mask, tile.softcap, tile.form)


REFUSED = [
    ({}, {"D": 80}, NotImplementedError, f"attention: (D, D_v) on CUDA must be one of {config.D_FORWARD}, got (80, 80)"),
    ({"softcap": 3.0, "window": (3, 0)}, {"D": 320}, NotImplementedError, "got (320, 320)"),
    ({}, {"D_v": 64}, NotImplementedError, "got (128, 64)"),
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


def test_a_backward_without_a_kernel_is_refused_by_name():
    """Also one called on its own, before anything is allocated; the forward's refusal comes first elsewhere."""
    rest = f"(D, D_v) for gradients on CUDA must be one of {config.D_BACKWARD}, got (80, 80); the forward alone runs under torch.no_grad()"
    with FakeTensorMode():
        q, k, v = qkv(80, requires_grad=False)
        lse = torch.empty(2, 8, 33, dtype=torch.float32, device="cuda")
        with pytest.raises(NotImplementedError, match=re.escape(f"attention_bwd: {rest}")):
            torch.ops.gqa_autograd.attention_bwd(q, q, k, v, q, lse, None)
        q, k, v, *offsets = packed(D=80, requires_grad=False)
        lse = torch.empty(8, 66, dtype=torch.float32, device="cuda")
        with pytest.raises(NotImplementedError, match=re.escape(f"attention_varlen_bwd: {rest}")):
            torch.ops.gqa_autograd.attention_varlen_bwd(q, q, k, v, q, lse, None, *offsets)


def packed(**changed):
    """The tensors of qkv as packed sequences, with offsets."""
    q, k, v = (t.detach().flatten(0, 1).requires_grad_(t.requires_grad) for t in qkv(**changed))
    return q, k, v, *(torch.zeros(3, dtype=torch.int32, device=q.device) for _ in "qk")


@pytest.mark.parametrize("function", ["attention_varlen", "explain"])
@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"D": 80}, NotImplementedError, f"attention_varlen: (D, D_v) on CUDA must be one of {config.D_FORWARD}, got (80, 80)"),
        ({"dtype": torch.float32}, TypeError, "attention_varlen: q, k and v on CUDA must be float16 or bfloat16, got float32; cast them"),
    ],
    ids=["size", "dtype"],
)
def test_cuda_refuses_packed_sequences_by_name(function, tensors, error, message):
    with FakeTensorMode():
        q, k, v, *offsets = packed(**{"requires_grad": False} | tensors)
        with pytest.raises(error, match=re.escape(message)):
            getattr(gqa_autograd, function)(q, k, v, **dict(zip(("cu_seqlens_q", "cu_seqlens_k"), offsets, strict=True)))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_explain_packed_sequences(return_lse, requires_grad):
    with FakeTensorMode():
        q, k, v, cu_q, cu_k = packed(requires_grad=requires_grad)
        said = gqa_autograd.explain(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=33, causal=True, return_lse=return_lse)
    forward = "attention_varlen_fwd_lse" if return_lse or requires_grad else "attention_varlen_fwd"
    assert said.operators == (forward, *["attention_varlen_bwd"] * requires_grad)
    assert said.body == support.KERNEL
    assert said.forward_tile == config.FORWARD[128, 128, "causal", False, "packed"]
    assert said.backward_tile == (config.BACKWARD[128, 128, "causal", False, "packed"] if requires_grad else None)
    q, k, v, cu_q, cu_k = packed(device="cpu")
    said = gqa_autograd.explain(q.detach().requires_grad_(), k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert said == (("attention_varlen_fwd_lse", "attention_varlen_bwd"), support.REFERENCE, None, None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"D": 80}, NotImplementedError, "warmup: (D, D_v) on CUDA must be one of"),
        ({"D": 192, "D_v": 256}, NotImplementedError, "got (192, 256)"),
        ({"varlen": True, "D": 80}, NotImplementedError, "warmup: (D, D_v) on CUDA must be one of"),
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
    gqa_autograd.warmup(192, D_v=128, window=True, softcap=True)
    assert len(seen) == 2
    assert support._tiles(*seen[0]) == (config.FORWARD[256, 256, "causal", False, "dense"], None)
    wanted = 192, 128, "window", True, "dense"
    assert support._tiles(*seen[1]) == (config.FORWARD[wanted], config.BACKWARD[wanted])
    seen.clear()
    gqa_autograd.warmup(varlen=True, causal=True)
    wanted = 128, 128, "causal", False, "packed"
    assert support._tiles(*seen[0]) == (config.FORWARD[wanted], config.BACKWARD[wanted])


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_warmup_launches_what_it_builds(varlen, backward, monkeypatch):
    """On a CPU in place of the GPU: both forwards, and the backward where it is wanted."""
    monkeypatch.setattr(support, "_build", lambda *configuration: None)
    # So that the definition does not take long over them
    monkeypatch.setattr(support, "_LONG", 64)
    prefix = "attention_varlen" if varlen else "attention"
    with testing.recorded() as bodies:
        gqa_autograd.warmup(64, causal=True, varlen=varlen, backward=backward, device="cpu")
    # A dense call also with keys enough to be split, and with KV heads few enough
    twice = range(1 if varlen else 2)
    forwards = [name for name in (f"{prefix}_fwd", f"{prefix}_fwd_lse") for _ in twice]
    assert bodies == forwards + [name for _ in twice for name in (f"{prefix}_fwd_lse", f"{prefix}_bwd")] * backward


def test_the_long_call_of_warmup_is_split():
    for tile in config.FORWARD.values():
        if tile.form == "dense":
            window = {"full": (-1, -1), "causal": (-1, 0), "window": (support._LONG, 0)}[tile.mask]
            assert config.parts(tile, 1, support._LONG, 1, window, 132) > 1
    for backward in config.BACKWARD.values():
        if backward.form == "dense":
            window = {"full": (-1, -1), "causal": (-1, 0), "window": (support._LONG, 0)}[backward.mask]
            assert config.backward_parts(backward, 1, 1, 1, 1, 1, window, 132) == (1, 1)
            assert config.backward_parts(backward, 1, support._LONG, 8, support._LONG, 1, window, 132)[0] > 1


@pytest.mark.parametrize("varlen", [False, True])
def test_warmup_builds_what_its_calls_need(varlen, monkeypatch):
    """Forward and backward, the forms that split calls take included."""
    pytest.importorskip("tilelang", reason="no tilelang here: no program to build")
    from gqa_autograd.kernels import backward_launch, forward_launch

    programs: list = []
    for launch, functions in ((forward_launch, ("compiled", "compiled_merging")), (backward_launch, ("compiled",))):
        monkeypatch.setattr(launch, "kernel", programs.append)
        for name in functions:
            monkeypatch.setattr(launch, name, getattr(launch, name).__wrapped__)
    gqa_autograd.warmup(64, causal=True, varlen=varlen)
    form, dtype = "packed" if varlen else "dense", torch.bfloat16
    tile, backward = (tiles[64, 64, "causal", False, form] for tiles in (config.FORWARD, config.BACKWARD))
    wanted = [forward_launch.program(tile, dtype, lse) for lse in (False, True)]
    # Without the last, which merges parts
    wanted += backward_launch.programs(backward, dtype, False)[:3]
    if not varlen:
        wanted += [forward_launch.combine_program(64, dtype, lse) for lse in (False, True)]
        wanted += [forward_launch.program(config.split(tile), dtype, True)]
        wanted += backward_launch.programs(config.split_backward(backward), dtype, False)
    assert {(p.name, p.configuration) for p in programs} == {(p.name, p.configuration) for p in wanted}


@pytest.mark.parametrize(
    ("S_q", "S_kv", "trained", "forms"), [(16, 8192, True, ("split", "dense")), (4096, 4096, True, ("dense", "split"))]
)
def test_explain_shows_a_split(S_q, S_kv, trained, forms, monkeypatch):
    """As beside a GPU of 132 multiprocessors."""
    from gqa_autograd.kernels import device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "multiprocessors", lambda device: 132)
    with FakeTensorMode():
        sizes = (S_q, 8), (S_kv, 1), (S_kv, 1)
        q, k, v = (torch.empty(2, S, H, 128, dtype=torch.bfloat16, device="cuda", requires_grad=trained) for S, H in sizes)
        said = gqa_autograd.explain(q, k, v, causal=True)
    assert said.forward_tile == config.FORWARD[128, 128, "causal", False, forms[0]]
    assert said.backward_tile == config.BACKWARD[128, 128, "causal", False, forms[1]]
    assert f"form='{forms[0]}'" in str(said)
    assert f"form='{forms[1]}'" in str(said)
