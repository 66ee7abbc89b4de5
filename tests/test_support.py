"""supported, explain and warmup, and what a CUDA call refuses; all of it without a GPU, on fake CUDA tensors."""

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
    sizes = lambda D: "any" if D is None else ", ".join(map(str, D))  # noqa: E731
    yes = lambda flag: "yes" if flag else "no"  # noqa: E731
    for row, name, deterministic in ((cpu, "CPU", "yes"), (cuda, "CUDA sm_90a", "forward only")):
        cells = [name, ", ".join(map(short.get, row.dtypes)), sizes(row.D_forward), sizes(row.D_backward)]
        cells += [yes(row.causal), yes(row.window), yes(row.softcap), deterministic]
        assert f"| {' | '.join(cells)} |" in README
    assert cpu.deterministic_backward
    assert not cuda.deterministic_backward


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", config.D_FORWARD)
def test_explain_shows_the_tiles_of_a_cuda_call(D, causal):
    with FakeTensorMode():
        said = gqa_autograd.explain(*qkv(D, requires_grad=D in config.D_BACKWARD), causal=causal)
    assert said.body == support.KERNEL
    assert said.forward_tile == config.FORWARD[D, causal]
    assert said.backward_tile == config.BACKWARD.get((D, causal))
    assert f"block_N={said.forward_tile.block_N}" in str(said)


REFUSED = [
    ({"softcap": 3.0}, {}, NotImplementedError, "attention: softcap on CUDA must be 0 (off), no kernel has it yet, got 3.0"),
    (
        {"window": (3, 0)},
        {},
        NotImplementedError,
        "attention: window on CUDA must be (-1, -1), or (-1, 0) as causal makes it, no kernel has",
    ),
    ({"window": (-1, 2)}, {}, NotImplementedError, "got (-1, 2)"),
    ({}, {"D": 96}, NotImplementedError, "attention: D on CUDA must be one of (64, 128, 256) and D_v equal to it, got D=96, D_v=96"),
    ({}, {"D_v": 64}, NotImplementedError, "got D=128, D_v=64"),
    ({}, {"D": 256}, NotImplementedError, "attention: D for gradients on CUDA must be one of (64, 128) and D_v equal to it, got D=256"),
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
        ({"D": 96}, NotImplementedError, "warmup: D on CUDA must be one of"),
        ({"D": 256}, NotImplementedError, "warmup: D for gradients on CUDA must be one of"),
        ({"dtype": torch.float32}, TypeError, "warmup: dtype must be float16 or bfloat16, got float32"),
        ({"D": (128, 77), "dtype": (torch.float16, torch.bfloat16)}, NotImplementedError, "got D=77"),
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
    assert len(seen) == len(set(seen)) == 8
    seen.clear()
    gqa_autograd.warmup(256, causal=True, backward=False)
    assert len(seen) == 1
