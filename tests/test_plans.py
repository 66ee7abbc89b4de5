"""The plans of forwards on CUDA, and when a call may run one past the dispatcher. The bodies run here on CPU tensors, with a launch that
writes down what it was given."""

import contextlib
import threading
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import Library
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gqa_autograd import attention, attention_with_lse, ops, plans, testing

SIZES = {"B": 2, "S_q": 5, "S_kv": 7, "H_q": 4, "H_kv": 2, "D": 64, "D_v": 64}


class Device:
    """What went through the dispatcher, what was planned, and what was launched."""

    def __init__(self):
        self.through, self.planned, self.launched = [], [], []

    def plan(self, tile, q, k, v, return_lse, scale, window, softcap):
        made = (tile, tuple(q.shape), tuple(k.shape), tuple(v.shape), return_lse, scale, window, softcap)
        self.planned.append(made)

        def launch(q, k, v, out, lse):
            self.launched.append(made)
            assert (lse is not None) == return_lse
            out.fill_(q.shape[1])

        return launch

    def body(self, with_lse):
        def run(q, k, v, *settings):
            self.through.append(with_lse)
            return ops._cuda_forward(q, k, v, settings, with_lse)

        return run


@pytest.fixture
def device(monkeypatch):
    """The CUDA bodies in place of the CPU's."""
    found = Device()
    monkeypatch.setattr(ops, "forward_launch", lambda: SimpleNamespace(plan=found.plan))
    plans._plans.clear()
    library = Library("gqa_autograd", "IMPL")
    for name, with_lse in (("attention_fwd", False), ("attention_fwd_lse", True)):
        library.impl(name, found.body(with_lse), "CPU", allow_override=True)
    yield found
    library._destroy()
    plans._plans.clear()


pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")


def make(dtype=torch.bfloat16, layout="bshd", **sizes):
    n = SimpleNamespace(**{**SIZES, **sizes})
    shapes = (n.B, n.S_q, n.H_q, n.D), (n.B, n.S_kv, n.H_kv, n.D), (n.B, n.S_kv, n.H_kv, n.D_v)
    if layout == "bhsd":
        return [torch.randn(B, H, S, D).to(dtype).transpose(1, 2) for B, S, H, D in shapes]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def twice(device, call=attention, tensors=None, **options):
    """The second call went past the dispatcher."""
    tensors = tensors or make()
    for _ in range(2):
        call(*tensors, **options)
    assert (len(device.through), len(device.planned), len(device.launched)) == (1, 1, 2)
    return tensors


# --- the cache ---
@pytest.mark.parametrize("call", [attention, attention_with_lse])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_an_equal_call_only_runs_the_plan(device, mode, call):
    with mode():
        twice(device, call, causal=True)
        # Other tensors of the kind, and numbers that only look different
        result = call(*make(), causal=1, softcap=0.0, deterministic=True, window=(-1, 5))
    assert (len(device.through), len(device.planned), len(device.launched)) == (1, 1, 3)
    assert torch.is_tensor(result) == (call is attention)


DIFFERENT = [
    *({name: size} for name, size in {"B": 1, "S_q": 6, "S_kv": 8, "H_q": 6, "H_kv": 4}.items()),
    *({"D": 192, "D_v": 128}, {"dtype": torch.float16}, {"layout": "bhsd"}, {"causal": True}, {"scale": 0.3}, {"softcap": 2.0}),
    *({"window": (3, -1)}, {"window": (-1, 3)}, {"window": (3, 3)}),
]


@pytest.mark.parametrize("change", DIFFERENT, ids=str)
def test_every_difference_has_a_plan_of_its_own(device, change):
    twice(device)
    options = {name: change[name] for name in ("causal", "scale", "softcap", "window") if name in change}
    tensors = make(**{name: value for name, value in change.items() if name not in options})
    for _ in range(2):
        attention(*tensors, **options)
    assert (len(device.through), len(device.planned)) == (2, 2)
    assert device.launched[2:] == [device.planned[1]] * 2


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("change", ["strides", "address"])
def test_each_tensor_counts(device, which, change):
    tensors = twice(device)
    t = tensors[which]
    if change == "strides":
        tensors[which] = t.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        tensors[which] = torch.empty(t.numel() + 8, dtype=t.dtype)[1 : t.numel() + 1].view(t.shape).copy_(t)
        assert tensors[which].data_ptr() % 16 != 0
    attention(*tensors)
    assert (len(device.through), len(device.planned)) == (2, 2)


MISFITS = {
    "dtype": (lambda t: t.half(), TypeError, "must share a dtype"),
    "batch": (lambda t: t[:1], ValueError, "must have the batch size of q"),
    "length": (lambda t: t[:, 1:], ValueError, "v must have the length of k"),
    "heads": (lambda t: t[:, :, 1:], ValueError, "v must have the heads of k"),
}


@pytest.mark.parametrize(("misfit", "which"), [*product(MISFITS, (1, 2)), ("dtype", 0), ("batch", 0)])
def test_each_tensor_is_still_checked(device, misfit, which):
    change, error, message = MISFITS[misfit]
    tensors = twice(device)
    tensors[which] = change(tensors[which])
    with pytest.raises(error, match=message):
        attention(*tensors)


def test_the_size_of_v_counts(device):
    tensors = twice(device, tensors=make(D=192, D_v=192))
    tensors[2] = make(D=192, D_v=128)[2]
    assert attention(*tensors).shape == (2, 5, 4, 128)
    assert len(device.planned) == 2


def test_lse_and_device_count(device):
    tensors = twice(device)
    attention_with_lse(*tensors)
    assert [made[4] for made in device.planned] == [False, True]
    numbers = (0, -1, -1, None, 0.0, False)
    elsewhere = [t.to("meta") for t in tensors]
    kinds = {plans.kind(*(e if n == m else t for m, (t, e) in enumerate(zip(tensors, elsewhere, strict=True))), *numbers) for n in range(4)}
    assert len(kinds) == 4


def test_a_raw_operator_shares_the_plan(device):
    tensors = make()
    ops.attention_fwd(*tensors)
    ops.attention_fwd(*tensors, -1, -1, None, 0.0, True)
    attention(*tensors)
    assert (len(device.through), len(device.planned), len(device.launched)) == (2, 1, 3)


def test_training_runs_the_plan(device):
    tensors = [t.requires_grad_() for t in make()]
    for _ in range(2):
        assert attention(*tensors, causal=True).grad_fn is not None
    assert (device.through, len(device.planned), len(device.launched)) == ([True], 1, 2)
    with torch.no_grad():
        assert not attention(*tensors, causal=True).requires_grad
    assert (device.through, len(device.planned)) == ([True, False], 2)


@pytest.mark.parametrize("call", [attention, lambda *a: attention_with_lse(*a)[0]], ids=["out", "out_and_lse"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_gradient_is_recorded_beside_a_plan(device, which, call):
    tensors = twice(device, call)
    tensors[which].requires_grad_()
    assert call(*tensors).grad_fn is not None


BAD = {
    "heads": ({"H_q": 5}, {}, ValueError, "H_q must be a multiple"),
    "size": ({"D": 80, "D_v": 80}, {}, NotImplementedError, r"\(D, D_v\) on CUDA must be one of"),
    "scale": ({}, {"scale": float("nan")}, ValueError, "scale must be finite"),
    "softcap": ({}, {"softcap": -1.0}, ValueError, "softcap must be finite"),
    "window": ({}, {"window": (-2, 0)}, ValueError, "window left must be at least 0"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_call_leaves_no_plan(device, bad):
    sizes, options, error, message = BAD[bad]
    tensors = make(**sizes)
    for _ in range(2):
        with pytest.raises(error, match=message):
            attention(*tensors, **options)
    assert not plans._plans
    assert not device.launched


WRONG = {
    "float_side": ({"window": (-1.0, -1)}, TypeError, "window left must be an int"),
    "bool_side": ({"window": (True, True)}, TypeError, "window left must be an int"),
    "triple": ({"window": (-1, -1, -1)}, TypeError, "window must be a pair"),
    "text_cap": ({"softcap": "0"}, (TypeError, RuntimeError), "softcap"),
    "deterministic": ({"deterministic": "no"}, (TypeError, RuntimeError), "deterministic"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_only_equals_a_good_call_is_refused(device, wrong):
    """(True, True) == (1, 1): a key knows no types."""
    options, error, message = WRONG[wrong]
    tensors = twice(device, window=(1, 1)) if wrong == "bool_side" else twice(device)
    with pytest.raises(error, match=message):
        attention(*tensors, **options)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_tensor_is_refused(device, which):
    tensors = twice(device)
    tensors[which] = None
    with torch.no_grad(), pytest.raises(TypeError, match=f"attention: {'qkv'[which]} must be a torch.Tensor, got NoneType"):
        attention(*tensors)


def test_the_cache_is_bounded(device, monkeypatch):
    monkeypatch.setattr(plans, "LIMIT", 3)
    for n in range(10):
        attention(*make(S_q=n + 1))
        assert 1 <= len(plans._plans) <= 3
    assert len(device.planned) == 10


def test_threads_share_the_cache(device, monkeypatch):
    """Each thread gets the plan of its own kind, also while others throw all of them away."""
    monkeypatch.setattr(plans, "LIMIT", 4)
    wrong = []

    def work(first):
        for n in range(150):
            S_q = 1 + (first + n) % 6
            if attention(*make(S_q=S_q))[0, 0, 0, 0] != S_q:
                wrong.append(S_q)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(device.launched) == 900
    # One too many for each thread that was between the question and the answer
    assert len(plans._plans) <= 4 + 6


# --- who could tell ---
class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def python_dispatcher():
    from torch._dispatch.python import enable_python_dispatcher

    with enable_python_dispatcher():
        yield


WATCHERS = {
    "dispatch_mode": Operators,
    "function_mode": Functions,
    "default_device": lambda: torch.device("cpu"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward_ad": forward_ad.dual_level,
    "profiler": torch.profiler.profile,
    "autograd_profiler": torch.autograd.profiler.profile,
    "python_dispatcher": python_dispatcher,
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_watcher_gets_the_operator(device, watcher, grad):
    tensors = [t.requires_grad_(grad) for t in make()]
    twice(device, tensors=tensors)
    with WATCHERS[watcher]():
        attention(*tensors)
    assert len(device.through) == 2
    attention(*tensors)
    assert len(device.through) == 2


def test_the_profiler_shows_the_operator(device):
    tensors = twice(device)
    with torch.profiler.profile() as profile:
        attention(*tensors)
    assert [e.name for e in profile.events() if "gqa_autograd" in e.name] == ["gqa_autograd::attention_fwd"]


@pytest.mark.parametrize("transform", ["vmap", "grad", "functionalize", "trace"])
def test_a_transform_gets_the_operator(device, transform):
    tensors = twice(device)
    if transform == "vmap":
        torch.vmap(lambda x: (attention(*tensors), x)[1])(torch.zeros(2))
    elif transform == "grad":
        torch.func.grad(lambda x: (attention(*tensors), x)[1])(torch.zeros(()))
    elif transform == "functionalize":
        torch.func.functionalize(attention)(*tensors)
    else:
        traced = torch.jit.trace(attention, tuple(tensors), check_trace=False)
        assert "gqa_autograd::attention_fwd" in str(traced.graph)
    assert len(device.through) == 2


def test_compile_and_export_get_the_operator(device):
    tensors = twice(device)
    assert attention(*tensors).shape == torch.compile(attention, fullgraph=True, backend="aot_eager")(*tensors).shape
    assert len(device.through) == 2

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v)

    for strict in (False, True):
        graph = torch.export.export(Model(), tuple(tensors), strict=strict).graph
        assert any(node.target is ops.attention_fwd for node in graph.nodes)


class Labelled(torch.Tensor):
    """A subclass without a behaviour of its own."""


def escaped(transform):
    """A wrapper that outlived its torch.func level."""
    kept = []
    transform(lambda t: (kept.append(t), t.float().sum())[1])(torch.zeros(SIZES["B"], 5, 4, 64, dtype=torch.bfloat16))
    return kept[0]


ODD = {
    "subclass": lambda q: q.as_subclass(Labelled),
    "parameter": lambda q: torch.nn.Parameter(q, requires_grad=False),
    "negated": torch._neg_view,
    "zero": lambda q: torch._efficientzerotensor(q.shape, dtype=q.dtype),
    "functional": torch._to_functional_tensor,
    "sparse": lambda q: q.to_sparse(),
    "nested": lambda q: torch.nested.nested_tensor(list(q)),
    "escaped_grad": lambda q: escaped(torch.func.grad),
    "escaped_vmap": lambda q: escaped(torch.vmap),
    "fake": lambda q: torch._subclasses.FakeTensorMode().from_tensor(q),
    "meta": lambda q: q.to("meta"),
    "empty": lambda q: q[:0],
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_tensor_gets_the_operator(device, odd, which):
    """With the plan of a plain tensor of that shape, strides and address at hand: of a negated view it would read the wrong sign. Odd is
    whatever the dispatcher takes for more than plain memory."""
    tensors = make(H_kv=4, S_kv=5)
    plain = torch._C._dispatch_keys(tensors[0])
    twice(device, tensors=tensors)
    find = (False, None, 0, (-1, -1), None, False)
    assert plans.planned(*tensors, *find)
    tensors[which] = ODD[odd](tensors[which])
    if odd not in ("subclass", "parameter", "empty"):
        assert torch._C._dispatch_keys(tensors[which]) != plain
    assert plans.planned(*tensors, *find) is None


def test_operators_are_counted_and_poisoned_past_the_dispatcher(device, monkeypatch):
    tensors = twice(device)
    with testing.recorded() as bodies:
        attention(*tensors)
    assert bodies == ["attention_fwd"]
    monkeypatch.setattr(torch.Tensor, "fill_", lambda t, value, original=torch.Tensor.fill_: original(t, value) if value != value else t)
    with testing.poisoned():
        assert attention(*tensors).isnan().all()
    assert len(device.through) == 1


def test_an_output_is_contiguous_and_new(device):
    tensors = make(layout="bhsd")
    outs = [attention(*tensors) for _ in range(3)]
    assert all(out.is_contiguous() for out in outs)
    assert len({out.data_ptr() for out in outs}) == 3
