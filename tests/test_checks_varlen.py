"""What attention_varlen refuses, by which message: in eager, through the raw operators and, for sizes, while torch.compile traces."""

import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gqa_autograd import attention_varlen, attention_varlen_with_lse, explain, meta, ops_varlen


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def offsets(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def args(q=(5, 6, 8), k=(7, 3, 8), v=(7, 3, 9), cu_q=(0, 2, 5), cu_k=(0, 0, 7)):
    return tensor(*q), tensor(*k), tensor(*v), offsets(*cu_q), offsets(*cu_k)


def changed(n, value):
    return (*args()[:n], value, *args()[n + 1 :])


SIZES = {
    "head_size": (args(k=(7, 3, 9)), "k must have the head size of q, got D=9 for k, D=8 for q"),
    "length_v": (args(v=(11, 3, 8)), "v must have the length of k, got T_kv=11 for v, T_kv=7 for k"),
    "heads_v": (args(v=(7, 4, 8)), "v must have the heads of k, got H_kv=4 for v, H_kv=3 for k"),
    "no_heads": (args(k=(7, 0, 8), v=(7, 0, 8)), "H_kv must be at least 1, got H_kv=0"),
    "no_head_size": (args(q=(5, 6, 0), k=(7, 3, 0)), "D must be at least 1, got D=0"),
    "groups": (args(k=(7, 4, 8), v=(7, 4, 8)), "H_q must be a multiple of H_kv, got H_q=6, H_kv=4"),
    "sequences": (args(cu_k=(0, 1, 2, 7)), "cu_seqlens_k must be as long as cu_seqlens_q, got N + 1 = 4 and 3"),
    "no_offset_q": (args(cu_q=()), "cu_seqlens_q must have at least 1 entry, the offset 0, got none"),
    "no_offset_k": (args(cu_k=()), "cu_seqlens_k must have at least 1 entry, the offset 0, got none"),
}
DIMENSIONS = {
    "dim_q": (changed(0, tensor(1, 5, 6, 8)), "q must have 3 dimensions [T, H, D], got shape (1, 5, 6, 8)"),
    "dim_k": (changed(1, tensor(7, 24)), "k must have 3 dimensions [T, H, D], got shape (7, 24)"),
    "dim_v": (changed(2, tensor(1, 7, 3, 8)), "v must have 3 dimensions [T, H, D], got shape (1, 7, 3, 8)"),
    "dim_cu_q": (changed(3, offsets(0, 5)[None]), "cu_seqlens_q must have 1 dimension [N + 1], got shape (1, 2)"),
    "dim_cu_k": (changed(4, torch.tensor(7, dtype=torch.int32)), "cu_seqlens_k must have 1 dimension [N + 1], got shape ()"),
}
TYPES = {
    "dtype_k": (changed(1, args()[1].half()), "q, k and v must share a dtype, got q float32, k float16"),
    "integers": ((*(t.int() for t in args()[:3]), *args()[3:]), "q, k and v must be float16, bfloat16, float32 or float64, got int32"),
    "int64": (changed(3, args()[3].long()), "cu_seqlens_q must be int32, got int64"),
    "float": (changed(4, args()[4].float()), "cu_seqlens_k must be int32, got float32"),
}
NUMBERS = {
    "scale_nan": ({"scale": math.nan}, "scale must be finite, got nan"),
    "softcap_negative": ({"softcap": -1.0}, "softcap must be finite and at least 0 (0 is off), got -1.0"),
}
VALUES = {
    "first_q": (args(cu_q=(1, 2, 5)), "cu_seqlens_q must start at 0, got 1"),
    "first_k": (args(cu_k=(-1, 2, 5)), "cu_seqlens_k must start at 0, got -1"),
    "decreasing_q": (args(cu_q=(0, 4, 3)), "cu_seqlens_q must not decrease, got 4 before 3 for sequence 1"),
    "decreasing_k": (args(cu_k=(0, -2, 3)), "cu_seqlens_k must not decrease, got 0 before -2 for sequence 0"),
    "last_q": (args(cu_q=(0, 4, 6)), "cu_seqlens_q must end at the 5 tokens of q or before, got 6"),
    "last_k": (args(cu_k=(0, 0, 8)), "cu_seqlens_k must end at the 7 tokens of k or before, got 8"),
}
CALLS = {
    "attention_varlen": attention_varlen,
    "with_lse": attention_varlen_with_lse,
    "fwd": ops_varlen.attention_varlen_fwd,
    "fwd_lse": ops_varlen.attention_varlen_fwd_lse,
}
PUBLIC = [attention_varlen, attention_varlen_with_lse]


def refuses(kind, message):
    return pytest.raises(kind, match="^" + re.escape(f"attention_varlen: {message}"))


@pytest.fixture
def nothing_runs(monkeypatch):
    """A body begins with its outputs; refusals come before."""
    for name in ("attention_varlen_fwd", "attention_varlen_fwd_lse", "attention_varlen_bwd"):
        monkeypatch.setattr(meta, name, lambda *_: pytest.fail("outputs were allocated before the call was refused"))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(
    ("given", "message"), [*SIZES.values(), *DIMENSIONS.values(), *VALUES.values()], ids=[*SIZES, *DIMENSIONS, *VALUES]
)
def test_shapes_and_values(given, message, call, requires_grad):
    q, k, v, *rest = given
    with refuses(ValueError, message):
        call(*(t.clone().requires_grad_(requires_grad) for t in (q, k, v)), *rest)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("given", "message"), TYPES.values(), ids=TYPES.keys())
def test_types(given, message, call):
    with refuses(TypeError, message):
        call(*given)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("options", "message"), NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers(options, message, call):
    with refuses(ValueError, message):
        call(*args(), **options)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("call", PUBLIC)
def test_windows(call):
    with refuses(ValueError, "window left must be at least 0, or -1 for unbounded, got -2"):
        call(*args(), window=(-2, 0))
    with refuses(TypeError, "window must be a pair (left, right), got 3"):
        call(*args(), window=3)
    for op in (ops_varlen.attention_varlen_fwd, ops_varlen.attention_varlen_fwd_lse):
        with refuses(ValueError, "window right must be at least 0, or -1 for unbounded, got -5"):
            op(*args(), 3, -5)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("call", PUBLIC)
@pytest.mark.parametrize("which", range(5))
def test_not_a_tensor(which, call):
    given = list(args())
    given[which] = given[which].tolist()
    with refuses(TypeError, f"{('q', 'k', 'v', 'cu_seqlens_q', 'cu_seqlens_k')[which]} must be a torch.Tensor, got list"):
        call(*given)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("call", PUBLIC)
@pytest.mark.parametrize("side", ["max_seqlen_q", "max_seqlen_k"])
@pytest.mark.parametrize("value", [3.0, True, [5], "5"], ids=str)
def test_max_seqlen(value, side, call):
    with refuses(TypeError, f"{side} must be an int, a tensor or None, got {value!r}"):
        call(*args(), **{side: value})


@pytest.mark.parametrize("call", PUBLIC)
def test_devices(call):
    q, k, v, cu_q, cu_k = args()
    with refuses(ValueError, "q, k and v must be on one device, got q on cpu, k on meta"):
        call(q, k.to("meta"), v, cu_q, cu_k)
    for given, name in (((cu_q.to("meta"), cu_k), "cu_seqlens_q"), ((cu_q, cu_k.to("meta")), "cu_seqlens_k")):
        with refuses(ValueError, f"{name} must be on the device of q, got meta, q on cpu"):
            call(q, k, v, *given)
    out = call(*(t.to("meta") for t in (q, k, v, cu_q, cu_k)))
    assert (out if call is attention_varlen else out[0]).shape == (5, 6, 9)


@pytest.mark.parametrize("call", PUBLIC)
def test_cuda_offsets_stay_on_the_device(call):
    """A fake CUDA tensor has no values: whoever asked for one would raise. Offsets of another device are refused, not copied."""
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(T, H, 64, dtype=torch.bfloat16, device="cuda") for T, H in ((5, 6), (7, 3), (7, 3)))
        cu_q, cu_k = (torch.empty(3, dtype=torch.int32, device="cuda") for _ in "qk")
        longest = torch.empty((), dtype=torch.int32, device="cuda")
        assert call(q, k, v, cu_q, cu_k, max_seqlen_q=longest, max_seqlen_k=longest) is not None
        with refuses(ValueError, "cu_seqlens_k must be on the device of q, got cpu, q on cuda:0"):
            call(q, k, v, cu_q, torch.empty(3, dtype=torch.int32))


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (SIZES["groups"][0], ValueError, SIZES["groups"][1]),
        (VALUES["last_k"][0], ValueError, VALUES["last_k"][1]),
        (TYPES["int64"][0], TypeError, TYPES["int64"][1]),
        ((*args()[:4], None), TypeError, "cu_seqlens_k must be a torch.Tensor, got NoneType"),
    ],
    ids=["size", "value", "type", "one_of_two"],
)
def test_explain_refuses_what_the_call_would(given, kind, message):
    q, k, v, cu_q, cu_k = given
    with refuses(kind, message):
        explain(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


# --- while compile traces ---
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("given", "message"), SIZES.values(), ids=SIZES.keys())
def test_sizes_while_tracing(given, message, dynamic):
    """The message of eager. A symbolic size prints as its symbol, so there only the words are compared."""
    words = message.split(", got")[0]
    with pytest.raises(Exception, match=re.escape(words if dynamic else message)):
        torch.compile(attention_varlen, backend="eager", fullgraph=True, dynamic=dynamic)(*given)


@pytest.mark.parametrize(("given", "message"), [*DIMENSIONS.values(), *TYPES.values()], ids=[*DIMENSIONS, *TYPES])
def test_types_while_tracing(given, message):
    with pytest.raises(Exception, match=re.escape(message)):
        torch.compile(attention_varlen, backend="eager", fullgraph=True)(*given)


@pytest.mark.parametrize(("given", "message"), VALUES.values(), ids=VALUES.keys())
def test_values_when_a_compiled_graph_runs(given, message):
    """The values aren't known to the graph; its operator refuses them when it runs."""
    compiled = torch.compile(attention_varlen, backend="aot_eager", fullgraph=True)
    compiled(*args())
    with pytest.raises(ValueError, match=re.escape(message)):
        compiled(*given)


# --- the backward operator ---
def backward_args(**changed):
    q, k, v, cu_q, cu_k = args()
    lse = tensor(6, 5)
    given = {"do": tensor(5, 6, 9), "q": q, "k": k, "v": v, "out": tensor(5, 6, 9), "lse": lse, "dlse": lse, "cu_q": cu_q, "cu_k": cu_k}
    return tuple({**given, **changed}.values())


BACKWARD = {
    "do_dim": ({"do": tensor(1, 5, 6, 9)}, ValueError, "do must have 3 dimensions, got shape (1, 5, 6, 9)"),
    "lse_dim": ({"lse": tensor(1, 6, 5)}, ValueError, "lse must have 2 dimensions, got shape (1, 6, 5)"),
    "do_shape": ({"do": tensor(5, 6, 8)}, ValueError, "do must have shape (5, 6, 9), got (5, 6, 8)"),
    "out_shape": ({"out": tensor(7, 6, 9)}, ValueError, "out must have shape (5, 6, 9), got (7, 6, 9)"),
    "lse_shape": ({"lse": tensor(5, 6)}, ValueError, "lse must have shape (6, 5), got (5, 6)"),
    "dlse_shape": ({"dlse": tensor(3, 5)}, ValueError, "dlse must have shape (6, 5), got (3, 5)"),
    "lse_dtype": ({"lse": tensor(6, 5).bfloat16()}, TypeError, "lse must be float32, got bfloat16"),
    "groups": ({"q": tensor(5, 7, 8)}, ValueError, "H_q must be a multiple of H_kv, got H_q=7, H_kv=3"),
    "values": ({"cu_q": offsets(0, 9, 5)}, ValueError, "cu_seqlens_q must not decrease, got 9 before 5 for sequence 1"),
    "offsets": ({"cu_k": offsets(0, 1)}, ValueError, "cu_seqlens_k must be as long as cu_seqlens_q, got N + 1 = 2 and 3"),
}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("given", "kind", "message"), BACKWARD.values(), ids=BACKWARD.keys())
def test_backward(given, kind, message):
    with pytest.raises(kind, match=re.escape(f"attention_varlen_bwd: {message}")):
        ops_varlen.attention_varlen_bwd(*backward_args(**given))


def test_backward_accepts_what_is_right():
    assert [t.shape for t in ops_varlen.attention_varlen_bwd(*backward_args())] == [(5, 6, 8), (7, 3, 8), (7, 3, 9)]
    with pytest.raises(ValueError, match="window left"):
        ops_varlen.attention_varlen_bwd(*backward_args(), -3)
