"""Every message of checks.py: in eager, through the raw operators and, for sizes, while torch.compile traces."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gqa_autograd import attention, attention_with_lse, checks, merge_states, ops


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def qkv(q=(2, 5, 6, 8), k=(2, 7, 3, 8), v=(2, 7, 3, 8)):
    return tensor(*q), tensor(*k), tensor(*v)


SIZES = {
    "batch_k": (qkv(k=(4, 7, 3, 8)), "attention: k must have the batch size of q, got B=4 for k, B=2 for q"),
    "batch_v": (qkv(v=(4, 7, 3, 8)), "attention: v must have the batch size of q, got B=4 for v, B=2 for q"),
    "head_size": (qkv(k=(2, 7, 3, 9)), "attention: k must have the head size of q, got D=9 for k, D=8 for q"),
    "length_v": (qkv(v=(2, 11, 3, 8)), "attention: v must have the length of k, got S_kv=11 for v, S_kv=7 for k"),
    "heads_v": (qkv(v=(2, 7, 4, 8)), "attention: v must have the heads of k, got H_kv=4 for v, H_kv=3 for k"),
    "no_heads": (qkv(k=(2, 7, 0, 8), v=(2, 7, 0, 8)), "attention: H_kv must be at least 1, got H_kv=0"),
    "no_head_size": (qkv((2, 5, 6, 0), (2, 7, 3, 0)), "attention: D must be at least 1, got D=0"),
    "groups": (qkv(k=(2, 7, 4, 8), v=(2, 7, 4, 8)), "attention: H_q must be a multiple of H_kv, got H_q=6, H_kv=4"),
}
DIMENSIONS = {
    "dim_q": ((tensor(2, 5, 48), *qkv()[1:]), "attention: q must have 4 dimensions [B, S, H, D], got shape (2, 5, 48)"),
    "dim_k": ((qkv()[0], tensor(7, 3, 8), qkv()[2]), "attention: k must have 4 dimensions [B, S, H, D], got shape (7, 3, 8)"),
    "dim_v": ((*qkv()[:2], tensor(1, 2, 7, 3, 8)), "attention: v must have 4 dimensions [B, S, H, D], got shape (1, 2, 7, 3, 8)"),
}
TYPES = {
    "dtype_k": ((qkv()[0], qkv()[1].half(), qkv()[2]), "attention: q, k and v must share a dtype, got q float32, k float16"),
    "dtype_v": ((*qkv()[:2], qkv()[2].bfloat16()), "attention: q, k and v must share a dtype, got q float32, v bfloat16"),
    "integers": (tuple(t.int() for t in qkv()), "attention: q, k and v must be float16, bfloat16, float32 or float64, got int32"),
}
NUMBERS = {
    "scale_nan": ({"scale": math.nan}, "attention: scale must be finite, got nan"),
    "scale_inf": ({"scale": -math.inf}, "attention: scale must be finite, got -inf"),
    "softcap_negative": ({"softcap": -1.0}, "attention: softcap must be finite and at least 0 (0 is off), got -1.0"),
    "softcap_inf": ({"softcap": math.inf}, "attention: softcap must be finite and at least 0 (0 is off), got inf"),
    "softcap_nan": ({"softcap": math.nan}, "attention: softcap must be finite and at least 0 (0 is off), got nan"),
}
WINDOWS = {
    "no_pair": ({"window": 3}, TypeError, "attention: window must be a pair (left, right), got 3"),
    "three": ({"window": (1, 2, 3)}, TypeError, "attention: window must be a pair (left, right), got (1, 2, 3)"),
    "float": ({"window": (1.0, 2)}, TypeError, "attention: window left must be an int, got 1.0"),
    "bool": ({"window": (1, True)}, TypeError, "attention: window right must be an int, got True"),
    "left": ({"window": (-2, 0)}, ValueError, "attention: window left must be at least 0, or -1 for unbounded, got -2"),
    "right": ({"window": (0, -5)}, ValueError, "attention: window right must be at least 0, or -1 for unbounded, got -5"),
    "right_causal": ({"window": (0, -5), "causal": True}, ValueError, "attention: window right must be at least 0"),
}
CALLS = {"attention": attention, "with_lse": attention_with_lse, "fwd": ops.attention_fwd, "fwd_lse": ops.attention_fwd_lse}
PUBLIC = [attention, attention_with_lse]


def refuses(kind, message):
    return pytest.raises(kind, match=re.escape(message))


# --- the forward, in eager and through the raw operators ---
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("args", "message"), [*SIZES.values(), *DIMENSIONS.values()], ids=[*SIZES, *DIMENSIONS])
def test_shapes(args, message, call, requires_grad):
    args = [t.clone().requires_grad_(requires_grad) for t in args]
    with refuses(ValueError, message):
        call(*args)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("args", "message"), TYPES.values(), ids=TYPES.keys())
def test_dtypes(args, message, call):
    with refuses(TypeError, message):
        call(*args)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("options", "message"), NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers(options, message, call):
    with refuses(ValueError, message):
        call(*qkv(), **options)


@pytest.mark.parametrize(("left", "right", "side", "got"), [(-2, 0, "left", -2), (3, -5, "right", -5), (-7, -5, "left", -7)])
def test_windows_of_raw_operators(left, right, side, got):
    q, k, v = qkv()
    message = f"window {side} must be at least 0, or -1 for unbounded, got {got}"
    for op in (ops.attention_fwd, ops.attention_fwd_lse):
        with refuses(ValueError, f"attention: {message}"):
            op(q, k, v, left, right)
    out, lse = ops.attention_fwd_lse(q, k, v)
    with refuses(ValueError, f"attention_bwd: {message}"):
        ops.attention_bwd(out, q, k, v, out, lse, None, left, right)


@pytest.mark.parametrize("call", PUBLIC)
@pytest.mark.parametrize(("options", "kind", "message"), WINDOWS.values(), ids=WINDOWS.keys())
def test_windows(options, kind, message, call):
    with refuses(kind, message):
        call(*qkv(), **options)


@pytest.mark.parametrize("call", PUBLIC)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_not_a_tensor(which, call):
    args = list(qkv())
    args[which] = args[which].tolist()
    with refuses(TypeError, f"attention: {'qkv'[which]} must be a torch.Tensor, got list"):
        call(*args)


@pytest.mark.parametrize("call", PUBLIC)
def test_devices(call):
    q, k, v = qkv()
    with refuses(ValueError, "attention: q, k and v must be on one device, got q on cpu, k on meta"):
        call(q, k.to("meta"), v)
    with refuses(ValueError, "attention: q, k and v must be on one device, got q on meta, v on cpu"):
        call(q.to("meta"), k.to("meta"), v)
    out = call(q.to("meta"), k.to("meta"), v.to("meta"))
    assert (out if call is attention else out[0]).shape == q.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_cuda_dtypes(call, dtype):
    """Known without a GPU: a fake CUDA tensor is refused by the same line."""
    with FakeTensorMode():
        args = [torch.empty(2, S, H, 64, dtype=dtype, device="cuda") for S, H in ((5, 6), (7, 3), (7, 3))]
        name = str(dtype).removeprefix("torch.")
        with refuses(TypeError, f"attention: q, k and v on CUDA must be float16 or bfloat16, got {name}; cast them"):
            call(*args)
        assert call(*(t.bfloat16() for t in args)) is not None


# --- while compile traces ---
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("args", "message"), SIZES.values(), ids=SIZES.keys())
def test_sizes_while_tracing(args, message, dynamic):
    """The message of eager, before anything runs. A symbolic size prints as its symbol, so there only the words are compared."""
    words = message.split(", got")[0]
    with pytest.raises(Exception, match=re.escape(words if dynamic else message)):
        torch.compile(attention, backend="eager", fullgraph=True, dynamic=dynamic)(*args)


@pytest.mark.parametrize(("args", "message"), [*DIMENSIONS.values(), *TYPES.values()], ids=[*DIMENSIONS, *TYPES])
def test_types_while_tracing(args, message):
    with pytest.raises(Exception, match=re.escape(message)):
        torch.compile(attention, backend="eager", fullgraph=True)(*args)


def test_sizes_while_exporting():
    class Plain(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v)

    args, message = SIZES["groups"]
    for strict in (True, False):
        with pytest.raises(Exception, match=re.escape(message)):
            torch.export.export(Plain(), args, strict=strict)


def test_compiled_graph_still_checks():
    """A size that was right while tracing and is wrong later: traced again, and refused."""
    compiled = torch.compile(attention, backend="eager", fullgraph=True, dynamic=True)
    compiled(*qkv())
    with pytest.raises(Exception, match="H_q must be a multiple of H_kv"):
        compiled(*SIZES["groups"][0])


# --- the backward operator ---
def backward_args(**changed):
    q, k, v = qkv()
    args = {"do": tensor(2, 5, 6, 8), "q": q, "k": k, "v": v, "out": tensor(2, 5, 6, 8), "lse": tensor(2, 6, 5), "dlse": tensor(2, 6, 5)}
    return tuple({**args, **changed}.values())


BACKWARD = {
    "do_dim": ({"do": tensor(2, 5, 48)}, ValueError, "do must have 4 dimensions, got shape (2, 5, 48)"),
    "lse_dim": ({"lse": tensor(2, 6, 5, 1)}, ValueError, "lse must have 3 dimensions, got shape (2, 6, 5, 1)"),
    "do_shape": ({"do": tensor(2, 5, 6, 9)}, ValueError, "do must have shape (2, 5, 6, 8), got (2, 5, 6, 9)"),
    "out_shape": ({"out": tensor(2, 7, 6, 8)}, ValueError, "out must have shape (2, 5, 6, 8), got (2, 7, 6, 8)"),
    "lse_shape": ({"lse": tensor(2, 5, 6)}, ValueError, "lse must have shape (2, 6, 5), got (2, 5, 6)"),
    "dlse_shape": ({"dlse": tensor(2, 3, 5)}, ValueError, "dlse must have shape (2, 6, 5), got (2, 3, 5)"),
    "do_dtype": ({"do": tensor(2, 5, 6, 8).half()}, TypeError, "do must be float32, got float16"),
    "out_dtype": ({"out": tensor(2, 5, 6, 8).double()}, TypeError, "out must be float32, got float64"),
    "lse_dtype": ({"lse": tensor(2, 6, 5).bfloat16()}, TypeError, "lse must be float32, got bfloat16"),
    "dlse_dtype": ({"dlse": tensor(2, 6, 5).double()}, TypeError, "dlse must be float32, got float64"),
    "do_device": ({"do": tensor(2, 5, 6, 8, device="meta")}, ValueError, "do must be on the device of q, got meta, q on cpu"),
    "lse_device": ({"lse": tensor(2, 6, 5, device="meta")}, ValueError, "lse must be on the device of q, got meta, q on cpu"),
    "groups": ({"q": tensor(2, 5, 7, 8)}, ValueError, "H_q must be a multiple of H_kv, got H_q=7, H_kv=3"),
    "k_batch": ({"k": tensor(4, 7, 3, 8)}, ValueError, "k must have the batch size of q, got B=4 for k, B=2 for q"),
}


@pytest.mark.parametrize(("changed", "kind", "message"), BACKWARD.values(), ids=BACKWARD.keys())
def test_backward(changed, kind, message):
    with refuses(kind, f"attention_bwd: {message}"):
        ops.attention_bwd(*backward_args(**changed))


@pytest.mark.parametrize("name", [name for name in BACKWARD if "device" not in name])
def test_backward_while_tracing(name):
    changed, _, message = BACKWARD[name]
    with pytest.raises(Exception, match=re.escape(f"attention_bwd: {message}")):
        torch.compile(lambda *a: ops.attention_bwd(*a), backend="eager", fullgraph=True)(*backward_args(**changed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_backward_wants_the_lse_of_its_dtype(dtype):
    """float64 has a float64 lse, everything else a float32 one."""
    right, wrong = (torch.float64, torch.float32) if dtype is torch.float64 else (torch.float32, torch.float64)
    low = {name: t.to(dtype) for name, t in zip(("do", "q", "k", "v", "out"), backward_args()[:5], strict=True)}
    lse = tensor(2, 6, 5, dtype=right)
    ops.attention_bwd(*backward_args(**low, lse=lse, dlse=None))
    with refuses(TypeError, f"attention_bwd: lse must be {str(right)[6:]}, got {str(wrong)[6:]}"):
        ops.attention_bwd(*backward_args(**low, lse=lse.to(wrong), dlse=None))


# --- merge_states ---
STATES = {
    "no_tensor": (lambda o, m: (o, None, o, m), TypeError, "lse_a must be a torch.Tensor, got NoneType"),
    "out_dim": (
        lambda o, m: (o[0], m, o, m),
        ValueError,
        "out_a must be [B, S_q, H_q, D_v] and lse_a [B, H_q, S_q], got (5, 6, 8), (2, 6, 5)",
    ),
    "layout": (
        lambda o, m: (o, m.mT, o, m.mT),
        ValueError,
        "out_a must be [B, S_q, H_q, D_v] and lse_a [B, H_q, S_q], got (2, 5, 6, 8), (2, 5, 6)",
    ),
    "out_shape": (lambda o, m: (o, m, o[:, :3], m), ValueError, "out_b must have the shape of out_a, got (2, 3, 6, 8) and (2, 5, 6, 8)"),
    "lse_shape": (lambda o, m: (o, m, o, m[:, :3]), ValueError, "lse_b must have the shape of lse_a, got (2, 3, 5) and (2, 6, 5)"),
}


@pytest.mark.parametrize(("args", "kind", "message"), STATES.values(), ids=STATES.keys())
def test_merge_states(args, kind, message):
    with refuses(kind, f"merge_states: {message}"):
        merge_states(*args(tensor(2, 5, 6, 8), tensor(2, 6, 5)))


# --- a message that no test above sees would be a new one ---
def test_every_message_is_tested():
    """Each refusal in checks.py has its words in this file, in test_checks_varlen.py, or in the tests of forward-mode AD."""
    source = inspect.getsource(checks)
    messages = re.findall(r'f"\{function\}: (.*?)"', source)
    assert len(messages) >= 20
    tested = " ".join(str(x) for group in (SIZES, DIMENSIONS, TYPES, NUMBERS, WINDOWS, BACKWARD, STATES) for x in group.values())
    here = Path(__file__)
    tested += "".join(path.read_text(encoding="utf-8") for path in (here, here.with_name("test_checks_varlen.py")))
    for message in messages:
        # The longest piece between two values
        piece = max(re.split(r"\{.*?\}", message), key=len).strip(" ,")
        assert piece in tested or "forward-mode AD" in piece, f"no test for: {message}"
