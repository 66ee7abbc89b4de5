"""What attention_decode refuses, by which message: in eager, through the raw operators, while torch.compile traces, and on CUDA tensors
without a GPU."""

import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from gqa_autograd import attention_decode, attention_decode_with_lse, checks_decode, meta, ops_decode


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def args(q=(2, 5, 6, 8), cache=(2, 40, 3, 8), lengths=(7, 40)):
    return {"q": tensor(*q), "k_cache": tensor(*cache), "v_cache": tensor(*cache), "cache_seqlens": ints(*lengths)}


def paged(pages=9, S_page=16, table=((0, 8, -1), (3, 4, 5)), lengths=(20, 48)):
    cache = (pages, S_page, 3, 8)
    return {**args(cache=cache, lengths=lengths), "page_table": torch.tensor(table, dtype=torch.int32)}


K = "[B, S_max, H_kv, D], or pages [P, S_page, H_kv, D]"
SIZES = {
    "queries": (args(q=(2, 65, 6, 8)), "S_q must be at most 64, got S_q=65; longer ones take attention"),
    "head_size": (args(q=(2, 5, 6, 7)), "k_cache must have the head size of q, got D=8 for k_cache, D=7 for q"),
    "shape_v": (
        {**args(), "v_cache": tensor(2, 40, 3, 9)},
        "v_cache must have the shape of k_cache, got (2, 40, 3, 9) and (2, 40, 3, 8)",
    ),
    "no_heads": (args(cache=(2, 40, 0, 8)), "H_kv must be at least 1, got H_kv=0"),
    "no_head_size": (args(q=(2, 5, 6, 0), cache=(2, 40, 3, 0)), "D must be at least 1, got D=0"),
    "groups": (args(cache=(2, 40, 4, 8)), "H_q must be a multiple of H_kv, got H_q=6, H_kv=4"),
    "lengths": (args(lengths=(7, 40, 3)), "cache_seqlens must have one length for each sequence of q, got 3 for B=2"),
    "batch": (args(cache=(3, 40, 3, 8)), "k_cache without a page_table must have the batch size of q, got B=3 and B=2"),
    "rows": (paged(table=((0, 1, 2),)), "page_table must have one row for each sequence of q, got 1 for B=2"),
    "page_size": (paged(S_page=48), "the page size, k_cache.shape[1], must be one of (16, 32, 64, 128, 256), got 48"),
    "page_size_8": (paged(S_page=8), "the page size, k_cache.shape[1], must be one of (16, 32, 64, 128, 256), got 8"),
}
DIMENSIONS = {
    "dim_q": ({**args(), "q": tensor(2, 6, 8)}, "q must have 4 dimensions [B, S_q, H_q, D], got shape (2, 6, 8)"),
    "dim_k": ({**args(), "k_cache": tensor(80, 3, 8)}, f"k_cache must have 4 dimensions {K}, got shape (80, 3, 8)"),
    "dim_v": ({**args(), "v_cache": tensor(80, 3, 8)}, f"v_cache must have 4 dimensions {K}, got shape (80, 3, 8)"),
    "dim_lengths": ({**args(), "cache_seqlens": ints(7, 40)[None]}, "cache_seqlens must have 1 dimension [B], got shape (1, 2)"),
    "dim_table": ({**paged(), "page_table": ints(0, 1)}, "page_table must have 2 dimensions [B, max_pages], got shape (2,)"),
}
TYPES = {
    "dtype_k": ({**args(), "k_cache": args()["k_cache"].half()}, "k_cache must have the dtype of q, got float16, q float32"),
    "dtype_v": ({**args(), "v_cache": args()["v_cache"].double()}, "v_cache must have the dtype of q, got float64, q float32"),
    "integers": (
        {name: t.int() for name, t in args().items()},
        "q, k_cache and v_cache must be float16, bfloat16, float32 or float64, got int32",
    ),
    "int64": ({**args(), "cache_seqlens": torch.tensor([7, 40])}, "cache_seqlens must be int32, got int64"),
    "table_int64": ({**paged(), "page_table": paged()["page_table"].long()}, "page_table must be int32, got int64"),
    "table_float": ({**paged(), "page_table": paged()["page_table"].float()}, "page_table must be int32, got float32"),
}
NO_TENSORS = {
    "list": ({**args(), "cache_seqlens": [7, 40]}, "cache_seqlens must be a torch.Tensor, got list"),
    "int": ({**args(), "page_table": 3}, "page_table must be a torch.Tensor, got int"),
    "none": ({**args(), "k_cache": None}, "k_cache must be a torch.Tensor, got NoneType"),
}
NUMBERS = {
    "scale": ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be finite and at least 0 (0 is off), got -1.0"),
    "window": ({"window": (-2, 0)}, ValueError, "window left must be at least 0, or -1 for unbounded, got -2"),
    "pair": ({"window": 5}, TypeError, "window must be a pair (left, right), got 5"),
}
VALUES = {
    "long": (args(lengths=(7, 41)), "cache_seqlens must be from 0 to 40, what the cache can hold, got 41 for sequence 1"),
    "negative": (args(lengths=(-1, 40)), "cache_seqlens must be from 0 to 40, what the cache can hold, got -1 for sequence 0"),
    "long_paged": (paged(lengths=(20, 49)), "cache_seqlens must be from 0 to 48, what the cache can hold, got 49 for sequence 1"),
    "page": (paged(lengths=(33, 48)), "page_table must name pages below 9, those of k_cache, got -1 at [0, 2]"),
    "page_9": (paged(table=((0, 9, 1), (3, 4, 5))), "page_table must name pages below 9, those of k_cache, got 9 at [0, 1]"),
}
REFUSED = {**SIZES, **DIMENSIONS, **VALUES}
PUBLIC = [attention_decode, attention_decode_with_lse]
OPERATORS = [ops_decode.attention_decode_fwd, ops_decode.attention_decode_fwd_lse]


def refuses(kind, message):
    return pytest.raises(kind, match="^" + re.escape(f"attention_decode: {message}"))


@pytest.fixture
def nothing_runs(monkeypatch):
    """A body begins with its outputs; refusals come before."""

    def allocated(*args):
        raise AssertionError("outputs were allocated")

    for name in ("attention_decode_fwd", "attention_decode_fwd_lse"):
        monkeypatch.setattr(meta, name, allocated)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("call", PUBLIC + OPERATORS)
@pytest.mark.parametrize(
    ("given", "message"), [*SIZES.values(), *DIMENSIONS.values(), *VALUES.values()], ids=[*SIZES, *DIMENSIONS, *VALUES]
)
def test_shapes_and_values(call, given, message):
    with refuses(ValueError, message):
        call(**given)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("call", PUBLIC + OPERATORS)
@pytest.mark.parametrize(("given", "message"), TYPES.values(), ids=TYPES)
def test_types(call, given, message):
    with refuses(TypeError, message):
        call(**given)


@pytest.mark.parametrize("call", PUBLIC)
@pytest.mark.parametrize(("given", "message"), NO_TENSORS.values(), ids=NO_TENSORS)
def test_what_is_no_tensor(call, given, message):
    with refuses(TypeError, message):
        call(**given)


@pytest.mark.parametrize("call", PUBLIC)
@pytest.mark.parametrize(("options", "kind", "message"), NUMBERS.values(), ids=NUMBERS)
def test_numbers(call, options, kind, message):
    with refuses(kind, message):
        call(**args(), **options)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-3, 0), "window left must be at least 0, or -1 for unbounded, got -3"),
        ((-1, -2), "window right must be at least 0, or -1 for unbounded, got -2"),
        ((-1, 0, math.inf), "scale must be finite, got inf"),
        ((-1, 0, None, -1.0), "softcap must be finite and at least 0 (0 is off), got -1.0"),
    ],
)
def test_numbers_of_the_raw_operators(operator, settings, message):
    with refuses(ValueError, message):
        operator(*args().values(), None, *settings)


def test_the_same_without_what_is_wrong():
    for given in (args(), paged()):
        for call in PUBLIC:
            call(**given)


# --- gradients ---
@pytest.mark.parametrize("call", PUBLIC)
@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_a_gradient_is_refused(call, name):
    given = args()
    given[name].requires_grad_()
    message = "q, k_cache and v_cache must not require a gradient while grad mode is on, since it has none; train with attention"
    with refuses(RuntimeError, message):
        call(**given)
    with pytest.raises(Exception, match=re.escape(message)):
        torch.compile(call, backend="eager", fullgraph=True)(**given)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.func.grad(lambda t: call(**{**args(), name: t})[0].sum())(args()[name])
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            call(**given)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_raw_operator_refuses_a_backward(operator):
    given = args()
    out = operator(**{**given, "q": given["q"].requires_grad_()})
    with refuses(RuntimeError, "q, k_cache and v_cache must not require a gradient"):
        (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()


def test_forward_mode_is_refused():
    given = args()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="attention_decode: forward-mode AD"):
        attention_decode(**{**given, "v_cache": forward_ad.make_dual(given["v_cache"], given["v_cache"])})


# --- while tracing, and what only a GPU would say ---
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("given", "message"), [*SIZES.values(), *DIMENSIONS.values(), *TYPES.values()], ids=[*SIZES, *DIMENSIONS, *TYPES])
def test_while_tracing(given, message, dynamic):
    """A symbolic size prints as its symbol, so there only the words are compared."""
    with pytest.raises(Exception, match=re.escape(message.split(", got")[0] if dynamic else message)):
        torch.compile(attention_decode, backend="eager", fullgraph=True, dynamic=dynamic)(**given)


@pytest.mark.parametrize(("given", "message"), VALUES.values(), ids=VALUES)
def test_values_when_a_compiled_graph_runs(given, message):
    compiled = torch.compile(attention_decode, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        compiled(**given)


def cuda(D=128, dtype=torch.bfloat16, S_page=None, cache=None, lengths="cuda"):
    caches = [tensor(2, S_page or 40, 3, D, dtype=dtype, device="cuda") if cache is None else cache() for _ in "kv"]
    table = {"page_table": tensor(2, 3, dtype=torch.int32, device="cuda")} if S_page else {}
    given = {"q": tensor(2, 5, 6, D, dtype=dtype, device="cuda"), "k_cache": caches[0], "v_cache": caches[1]}
    return {**given, "cache_seqlens": tensor(2, dtype=torch.int32, device=lengths), **table}


def strided(shape, strides):
    return lambda: torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="cuda")


STRIDES = "k_cache on CUDA must have stride 1 along D and other strides that are positive multiples of 8, got strides"
ON_CUDA = {
    "D": (lambda: cuda(D=96), NotImplementedError, "D on CUDA must be one of (64, 128, 256), got 96"),
    "float32": (lambda: cuda(dtype=torch.float32), TypeError, "q, k_cache and v_cache on CUDA must be float16 or bfloat16, got float32"),
    "device": (lambda: cuda(lengths="cpu"), ValueError, "cache_seqlens must be on the device of q, got cpu, q on cuda:0"),
    "inner": (lambda: cuda(cache=strided((2, 40, 3, 128), (15360, 384, 1, 3))), ValueError, f"{STRIDES} (15360, 384, 1, 3)"),
    "odd": (lambda: cuda(cache=strided((2, 40, 3, 128), (16000, 393, 131, 1))), ValueError, f"{STRIDES} (16000, 393, 131, 1)"),
    "expanded": (lambda: cuda(cache=strided((2, 40, 3, 128), (0, 384, 128, 1))), ValueError, f"{STRIDES} (0, 384, 128, 1)"),
}


@pytest.mark.parametrize(("given", "kind", "message"), ON_CUDA.values(), ids=ON_CUDA)
def test_on_cuda(given, kind, message):
    """Fake CUDA tensors meet the rules of CUDA, and of the table of tiles, on any machine."""
    with FakeTensorMode(), refuses(kind, message):
        attention_decode(**given())


@pytest.mark.parametrize("S_page", [None, 16, 64, 256])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_on_cuda_without_what_is_wrong(D, S_page):
    with FakeTensorMode():
        assert attention_decode(**cuda(D=D, S_page=S_page)).shape == (2, 5, 6, D)


def test_an_odd_address_is_refused():
    """Asked where there is an address: when a call is planned."""
    t = torch.zeros(33, dtype=torch.bfloat16)
    checks_decode.aligned("attention_decode", "k_cache", t[: 32 - t.data_ptr() // 2 % 8])
    with refuses(ValueError, "v_cache on CUDA must begin at a multiple of 16 bytes, got address"):
        checks_decode.aligned("attention_decode", "v_cache", t[1:])
