"""The plans of decoding: when a call may run one past the dispatcher, and which counters a launch takes. The bodies of CUDA run here on CPU
tensors, with a launch that writes down what it was given."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode

from gqa_autograd import attention_decode, attention_decode_with_lse, ops_decode, plans, testing_decode
from gqa_autograd.testing_decode import DecodeCase

CASES = {"dense": DecodeCase(3, (40, 0), 12, 2, 64), "paged": DecodeCase(3, (40, 0), 12, 2, 64, S_page=16)}


class Device:
    """What went through the dispatcher, what was planned, and what was launched."""

    def __init__(self):
        self.through, self.planned, self.launched = [], [], []

    def plan(self, tile, q, k_cache, v_cache, page_table, scale, window, softcap):
        made = (tile, page_table is not None, tuple(q.shape), scale, window, softcap)
        self.planned.append(made)

        def launch(q, k_cache, v_cache, cache_seqlens, page_table, out, lse):
            self.launched.append((*made, lse is not None))
            out.fill_(q.shape[1])

        return launch

    def body(self, with_lse):
        def run(q, k_cache, v_cache, cache_seqlens, page_table=None, *settings):
            self.through.append(with_lse)
            return ops_decode._cuda(q, k_cache, v_cache, cache_seqlens, page_table, settings, with_lse)

        return run


@pytest.fixture
def device(monkeypatch):
    """The CUDA bodies in place of the CPU's."""
    found = Device()
    monkeypatch.setattr(ops_decode, "_launch", lambda: SimpleNamespace(plan=found.plan))
    plans._plans.clear()
    library = Library("gqa_autograd", "IMPL")
    for name, with_lse in (("attention_decode_fwd", False), ("attention_decode_fwd_lse", True)):
        library.impl(name, found.body(with_lse), "CPU", allow_override=True)
    yield found
    library._destroy()
    plans._plans.clear()


pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")


@pytest.fixture(params=CASES)
def given(request):
    return testing_decode.make(CASES[request.param])


def call(given, function=attention_decode, **options):
    return function(*given.arguments, **{"page_table": given.page_table, **options})


def test_the_second_call_passes_the_dispatcher_by(device, given):
    for function in (attention_decode, attention_decode_with_lse):
        for _ in range(3):
            call(given, function)
    assert device.through == [False, True]
    assert len(device.planned) == 2
    assert [made[-1] for made in device.launched] == [False] * 3 + [True] * 3


def test_what_changes_a_plan(device, given):
    """Each of these is planned anew: else a launch would have numbers of another call."""
    wide = torch.zeros(2, 3, 12, 128, dtype=torch.bfloat16)[..., :64]
    calls = [
        {},
        {"causal": False},
        {"scale": 0.5},
        {"softcap": 3.0},
        {"window": (7, -1)},
        {"window": (7, 0), "causal": False, "softcap": 3},
    ]
    for options in calls:
        call(given, **options)
    others = [
        given._replace(q=wide),
        given._replace(q=given.q[:, :2]),
        given._replace(cache_seqlens=torch.stack((given.cache_seqlens,) * 2, 1)[:, 0]),
    ]
    if given.page_table is not None:
        others.append(given._replace(page_table=given.page_table.repeat(1, 2)))
    for other in others:
        call(other)
    assert len(device.planned) == len(calls) + len(others) == len(device.through)
    for other in others:
        call(other)
    assert len(device.planned) == len(device.through)


def test_lengths_and_pages_are_no_part_of_a_plan(device, given):
    call(given)
    given.cache_seqlens.fill_(7)
    call(given)
    call(given._replace(cache_seqlens=given.cache_seqlens.clone()))
    assert len(device.through) == len(device.planned) == 1


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_nobody_who_watches_is_passed_by(device, given):
    call(given)
    with Watching():
        call(given)
    with torch.autocast("cpu", torch.bfloat16):
        call(given)
    assert len(device.through) == 3
    given.q.requires_grad_()
    with pytest.raises(RuntimeError, match="must not require a gradient"):
        call(given)
    with torch.no_grad():
        call(given)
    assert len(device.through) == 3


def test_a_refused_call_leaves_no_plan(device, given):
    with pytest.raises(ValueError, match="S_q must be at most 64"):
        call(given._replace(q=torch.zeros(2, 65, 12, 64, dtype=torch.bfloat16)))
    assert not plans._plans


# --- the counters of a launch ---
@pytest.fixture
def arena(monkeypatch):
    """Of three streams and two captured launches."""
    decode_launch = pytest.importorskip("gqa_autograd.kernels.decode_launch", reason="no tilelang here: its launch code was not run")
    rows = torch.zeros(5, 8, dtype=torch.int32).unbind()
    made = SimpleNamespace(rows=rows, slot=0, capturing=False, launch=decode_launch)
    monkeypatch.setattr(decode_launch, "_arenas", {0: decode_launch._Arena(rows, itertools.count(3))})
    monkeypatch.setattr(decode_launch, "CAPTURED", 2)
    monkeypatch.setattr(decode_launch.device, "SLOTS", 3)
    monkeypatch.setattr(decode_launch.device, "slot", lambda index: made.slot)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    return made


def test_a_stream_keeps_its_counters(arena):
    q = torch.zeros(1)
    for arena.slot in (0, 2, 0):
        assert arena.launch._counters(0, q, 8) is arena.rows[arena.slot]


def test_each_captured_launch_has_counters_of_its_own(arena):
    q = torch.zeros(1)
    arena.slot, arena.capturing = -1, True
    assert [arena.launch._counters(0, q, 8) is row for row in arena.rows[3:]] == [True, True]
    fresh = arena.launch._counters(0, q, 8)
    assert not any(fresh.data_ptr() == row.data_ptr() for row in arena.rows)
    assert fresh.tolist() == [0] * 8


def test_a_capture_makes_no_arena(arena):
    """Here on another device than the one that has one."""
    arena.slot, arena.capturing = -1, True
    assert arena.launch._counters(1, torch.zeros(1), 6).tolist() == [0] * 6
    assert list(arena.launch._arenas) == [0]


def test_one_stream_too_many_clears_its_own(arena):
    arena.slot = -1
    assert arena.launch._counters(0, torch.zeros(1), 6).tolist() == [0] * 6
