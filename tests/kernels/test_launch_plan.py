"""What a forward's plan hands to the kernel, with a list in the kernel's place; and the slots of the tile counters."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("tilelang", reason="no tilelang here: the launch code was not tested")

from gqa_autograd import meta
from gqa_autograd.kernels import config, device, forward_launch

SLOT = 5


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each launch, on a device that is current."""
    found = []
    monkeypatch.setattr(device, "require_hopper", lambda function, where: None)
    monkeypatch.setattr(device, "multiprocessors", lambda where: 132)
    monkeypatch.setattr(device, "l2_bytes", lambda where: 2**20)
    monkeypatch.setattr(device, "is_current", lambda index: True)
    monkeypatch.setattr(device, "slot", lambda index: SLOT)
    monkeypatch.setattr(forward_launch, "executable", lambda cfg, dtype, lse: lambda *arguments: found.append(arguments))
    return found


def make(B=2, S_q=200, S_kv=300, H_q=4, H_kv=2, D=64):
    shapes = (B, S_q, H_q, D), (B, S_kv, H_kv, D), (B, S_kv, H_kv, D)
    return [torch.randn(shape).bfloat16() for shape in shapes]


def launch(tensors, scale=0.125, window=(-1, -1), softcap=0.0, with_lse=False, again=None):
    """One plan, run on its own tensors or on others of their kind; returns those and the outputs."""
    tile = config.forward("test", 64, 64, *window, softcap)
    plan = forward_launch.plan(tile, *tensors, with_lse, scale, window, softcap)
    outputs = meta.attention_fwd_lse(*tensors)
    plan(*(again or tensors), outputs[0], outputs[1] if with_lse else None)
    return outputs


@pytest.mark.parametrize("with_lse", [False, True])
def test_plain_tensors_are_passed_as_they_lie(calls, with_lse):
    tensors, others = make(), make()
    out, lse = launch(tensors, again=others, with_lse=with_lse)
    ((*passed, scale, softcap, left, right, blocks, section, slot, parts),) = calls
    wanted = [*others, out, lse if with_lse else out]
    assert all(p is w for p, w in zip(passed, wanted, strict=True))
    assert (scale, softcap, left, right) == (0.125, 0.0, 500, 500)
    # Two tiles of 128 queries for each of 8 heads; K and V of a head take 76800 bytes, half of the L2 cache holds 6 of 4
    assert (blocks, section, slot, parts) == (16, 4 * 2, SLOT, 1)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("how", ["address", "strides"])
def test_what_tma_cannot_read_is_copied_in_every_launch(calls, which, how):
    plain = make()
    odd = list(plain)
    t = plain[which]
    if how == "address":
        odd[which] = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)
    else:
        odd[which] = t.transpose(2, 3).contiguous().transpose(2, 3)
    launch(odd)
    launch(odd, again=[2 * t for t in odd])
    for factor, passed in zip((1, 2), calls, strict=True):
        assert passed[which].data_ptr() % 16 == 0
        assert passed[which].stride(3) == 1
        assert torch.equal(passed[which], factor * t)


def test_views_of_a_fused_qkv_are_passed_as_they_lie(calls):
    q, k, v = torch.randn(2, 50, 8, 64).bfloat16().split([4, 2, 2], 2)
    launch((q, k, v))
    assert all(p is t for p, t in zip(calls[0], (q, k, v), strict=False))


@pytest.mark.parametrize(("scale", "sign"), [(-0.5, -1.0), (0.0, 0.0), (-0.0, 0.0)])
def test_a_scale_that_is_not_positive_goes_into_q(calls, scale, sign):
    q, k, v = make()
    launch((q, k, v), scale)
    assert torch.equal(calls[0][0], sign * q)
    assert calls[0][5] == (abs(scale) or 1.0)


def test_sides_of_a_window(calls):
    tensors = make()
    for window, sides in (((7, 0), (7, 0)), ((-1, 3), (500, 3)), ((10**12, -1), (500, 500))):
        launch(tensors, window=window)
        assert calls[-1][7:9] == sides


def test_without_queries_or_keys_nothing_is_launched(calls):
    launch(make(S_q=0))
    out, lse = launch(make(S_kv=0), with_lse=True)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not calls


def test_a_plan_keeps_no_tensor(calls):
    tensors = make()
    tile = config.forward("test", 64, 64, -1, -1, 0.0)
    plan = forward_launch.plan(tile, *tensors, False, -0.5, (-1, -1), 0.0)
    plan(*tensors, meta.attention_fwd(*tensors), None)
    kept = [weakref.ref(t) for t in tensors]
    calls.clear()
    del tensors
    gc.collect()
    assert [t() for t in kept] == [None] * 3


def test_another_device_is_made_current_for_the_launch(calls, monkeypatch):
    order = []

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            order.append("enter")

        def __exit__(self, *error):
            order.append("exit")

    monkeypatch.setattr(device, "is_current", lambda index: bool(order))
    monkeypatch.setattr(device, "slot", lambda index: order.append("slot") or SLOT)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    q, k, v = make()
    launch((q, k, v), scale=-0.5)
    assert order == ["enter", "slot", "exit"]
    assert torch.equal(calls[0][0], -q)


# --- split calls ---
class Kernels:
    """What was asked for, and the arguments of its one launch."""

    def __init__(self):
        self.configuration, self.arguments = None, None

    def __call__(self, *configuration):
        assert self.configuration is None
        self.configuration = configuration
        return self.launched

    def launched(self, *arguments):
        assert self.arguments is None
        self.arguments = arguments


@pytest.fixture
def split(calls, monkeypatch):
    """The attending and the merging kernel of a split call."""
    attending, merging = Kernels(), Kernels()
    monkeypatch.setattr(forward_launch, "executable", attending)
    monkeypatch.setattr(forward_launch, "combine_executable", merging)
    return attending, merging


@pytest.mark.parametrize("with_lse", [False, True])
def test_a_chunk_of_a_long_sequence_is_split_and_merged(split, with_lse):
    tensors = make(B=3, S_q=2, S_kv=5000, H_q=4, H_kv=2)
    out, lse = launch(tensors, with_lse=with_lse)
    attending, merging = split
    # 4 tiles on 132 multiprocessors could be 33 parts, but 5000 keys have 9 times 4 blocks of 128
    parts, rows = 9, 3 * 2 * 4
    assert attending.configuration == (config.FORWARD[64, 64, "full", False, "split"], torch.bfloat16, True)
    q, k, v, part_out, part_lse, scale, softcap, left, right, blocks, section, slot, passed = attending.arguments
    assert all(p is t for p, t in zip((q, k, v), tensors, strict=True))
    assert (scale, softcap, left, right, slot, passed) == (0.125, 0.0, 5002, 5002, SLOT, parts)
    # A block for each part of each tile; 2^20 bytes of L2 hold half of no head's K and V, so heads go one KV head at a time
    assert (blocks, section) == (4 * 3 * parts, 2)
    assert part_out.shape == (parts * 3, 2, 4, 64)
    assert part_lse.shape == (parts * 3, 2, 4)
    assert merging.configuration == (64, torch.bfloat16, with_lse)
    merged_out, merged_lse, whole, last = merging.arguments
    assert (merged_out.shape, merged_lse.shape, whole.shape) == ((parts, rows, 64), (parts, rows), (rows, 64))
    for view, of in ((merged_out, part_out), (merged_lse, part_lse), (whole, out), (last, lse if with_lse else out)):
        assert view.data_ptr() == of.data_ptr()
    assert last.shape == (lse.shape if with_lse else whole.shape)


def test_the_workspace_takes_what_is_documented(split):
    """4 (D_v + 1) bytes for each row and part."""
    launch(make(B=3, S_q=2, S_kv=5000, H_q=4, H_kv=2))
    part_out, part_lse = split[0].arguments[3:5]
    assert part_out.dtype == part_lse.dtype == torch.float32
    assert part_out.untyped_storage().nbytes() + part_lse.untyped_storage().nbytes() == 4 * (64 + 1) * (3 * 2 * 4) * 9


def test_blocks_are_never_more_than_multiprocessors(split):
    launch(make(B=40, S_q=2, S_kv=5000))
    assert split[0].arguments[9] == 132


def test_parts_do_not_depend_on_the_batch(calls, monkeypatch):
    """A row has the same bits alone and in company, also where company alone would fill the device."""
    monkeypatch.setattr(forward_launch, "combine_executable", lambda *configuration: lambda *arguments: None)
    for B in (1, 2, 7, 40):
        launch(make(B=B, S_q=2, S_kv=5000))
    assert [arguments[-1] for arguments in calls] == [9] * 4


def test_a_window_too_short_to_split(split):
    """5000 keys, of which a tile sees a few."""
    launch(make(S_q=2, S_kv=5000), window=(200, 0))
    assert split[0].configuration == (config.FORWARD[64, 64, "window", False, "dense"], torch.bfloat16, False)
    assert split[0].arguments[-1] == 1
    assert split[1].configuration is None


# --- slots ---
class Streams:
    """The current stream of each thread, and whether a graph is captured."""

    def __init__(self, monkeypatch):
        self.mine = threading.local()
        self.capturing = False
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: self.mine.stream, raising=False)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(device, "_slots", {})

    def slot(self, stream, index=0):
        self.mine.stream = stream
        return device.slot(index)


@pytest.fixture
def streams(monkeypatch):
    return Streams(monkeypatch)


def test_every_stream_has_a_slot_of_its_own(streams):
    assert [streams.slot(s) for s in (0, 64, 128, 0, 64)] == [0, 1, 2, 0, 1]
    assert streams.slot(64, index=1) == 3
    found = [streams.slot(1000 + n) for n in range(device.SLOTS)]
    assert found == [*range(4, device.SLOTS), *[-1] * 4]
    assert streams.slot(64) == 1


def test_a_captured_launch_has_no_slot(streams):
    streams.slot(64)
    streams.capturing = True
    assert [streams.slot(64), streams.slot(128)] == [-1, -1]
    streams.capturing = False
    assert streams.slot(128) == 1


class Slow(dict):
    """Leaves the other threads time between the question and the answer."""

    def __len__(self):
        found = super().__len__()
        time.sleep(0.001)
        return found


def test_threads_never_share_a_slot(streams, monkeypatch):
    """Two streams in one slot would take each other's tiles."""
    monkeypatch.setattr(device, "_slots", Slow())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(streams.slot, range(1, 41)))
    assert sorted(found) == list(range(40))
