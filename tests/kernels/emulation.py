"""The kernels' own launch functions on CPU tensors, with the emulator in place of the GPU."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import catalogue
import torch
from catalogue import Entry
from torch import Tensor

from gqa_autograd import meta, testing, testing_varlen
from gqa_autograd.kernels import backward_launch, config, device, forward_launch
from gqa_autograd.testing import Case, Result
from gqa_autograd.testing_varlen import PackedCase
from hopper_emulator import Code, Emulator

# tile.PRELUDE: an arrival that is never taken, there to keep the compiler from moving a wait. backward_tiles.PRELUDE: thread blocks run one
# after another here, so whoever has to wait for a turn would wait for ever
PTX = {
    "{ .reg .pred p; setp.gt.f32 p, %0, 0f7E967699; @p bar.arrive 15, 256; }": "if ({0} > 1e38f) emu::named_arrive(15, 256);",
    "ld.acquire.gpu.global.s32 %0, [%1];": "{0} = *{1};",
    "fence.proxy.async;": "tl::fence_proxy_async();",
    "cp.async.bulk.wait_group 0;": "tl::tma_store_wait<0, false>();",
    "red.release.gpu.global.add.s32 [%0], 1;": "*{0} += 1;",
}


class Machine(NamedTuple):
    """What the launch code sees of the device, and the order in which things happen on it."""

    schedule: str | int = "eager"
    multiprocessors: int = 3
    # The tile counter of the stream; -1 while a graph is captured
    slot: int = 0


@functools.cache
def emulator(entry: Entry) -> Emulator:
    return Emulator(catalogue.code(entry), PTX)


def patched(entry: Entry, patch: Callable[[str], str]) -> Emulator:
    """The kernel with another CUDA text."""
    code = catalogue.code(entry)
    return Emulator(Code(patch(code.device), code.host), PTX)


@contextlib.contextmanager
def emulated(machine: Machine, others: dict[Entry, Emulator] | None = None, check_order: bool = True) -> Iterator[None]:
    """`launch` runs the emulator instead of compiled kernels; `others` stand in for some of them."""

    def run(entry: Entry) -> Callable[..., None]:
        chosen = (others or {}).get(entry) or emulator(entry)
        return functools.partial(chosen, schedule=machine.schedule, check_order=check_order)

    def backward_kernels(cfg, dtype, has_dlse):
        families = [*catalogue.STAGES][: 4 if cfg.form == "split" else 3]
        order = ("preprocess", "backward", "postprocess", "merge")
        return tuple(run(_listed(Entry(f, cfg, dtype, has_dlse and f == "preprocess"))) for f in order if f in families)

    facts = {
        "require_hopper": lambda function, device: None,
        "multiprocessors": lambda device: machine.multiprocessors,
        "l2_bytes": lambda device: 2**16,
        "current": lambda device: contextlib.nullcontext(),
        "is_current": lambda index: True,
        "slot": lambda index: machine.slot,
    }
    with (
        mock.patch.multiple(device, **facts),
        mock.patch.object(forward_launch, "executable", lambda cfg, dtype, lse: run(Entry("forward", cfg, dtype, lse))),
        mock.patch.object(forward_launch, "combine_executable", lambda D_v, dtype, lse: run(_merging(D_v, dtype, lse))),
        mock.patch.object(forward_launch, "_workspace", _poisoned_workspace(forward_launch._workspace)),
        mock.patch.object(backward_launch, "compiled", backward_kernels),
        mock.patch.object(backward_launch, "_workspace", _poisoned_workspace(backward_launch._workspace)),
        mock.patch.object(backward_launch, "_partial", _poisoned_workspace(backward_launch._partial)),
    ):
        yield


def _listed(entry: Entry) -> Entry:
    """The catalogue's own entry for a kernel that doesn't depend on the mask."""
    return catalogue.entries()[str(entry)]


def _merging(D_v: int, dtype: torch.dtype, lse: bool) -> Entry:
    found = (e for e in catalogue.entries().values() if e.family == "combine")
    (entry,) = (e for e in found if (e.tile.D_v, e.dtype, e.option) == (D_v, dtype, lse))
    return entry


def _poisoned_workspace(original: Callable) -> Callable:
    def workspace(*arguments):
        made = original(*arguments)
        for t in made:
            t.fill_(math.nan if t.is_floating_point() else -(2**31))
        return made

    return workspace


def attend(tile, q: Tensor, k: Tensor, v: Tensor, case: Case, return_lse: bool, parts: int = 1) -> tuple[Tensor, Tensor]:
    """out and lse, NaN where nothing was written; without return_lse, lse stays NaN. More than one part makes it a split call."""
    left, right, scale, softcap = case.formula
    out, lse = (t.fill_(math.nan) for t in meta.attention_fwd_lse(q, k, v))
    dense = config.FORWARD[tile.D, tile.D_v, tile.mask, tile.softcap, "dense"]
    with mock.patch.object(config, "parts", return_value=parts):
        launch = forward_launch.plan(dense, q, k, v, return_lse, scale, (left, right), softcap)
    launch(q, k, v, out, lse if return_lse else None)
    return out, lse


def attend_packed(tile, q, k, v, cu_seqlens_q, cu_seqlens_k, case: PackedCase, return_lse: bool) -> tuple[Tensor, Tensor]:
    """The same of packed sequences."""
    left, right, scale, softcap = case.formula
    out, lse = (t.fill_(math.nan) for t in meta.attention_varlen_fwd_lse(q, k, v))
    written = out, lse if return_lse else None
    forward_launch.launch_varlen(tile, q, k, v, cu_seqlens_q, cu_seqlens_k, *written, scale, (left, right), softcap)
    return out, lse


class Backward(NamedTuple):
    """What a backward's launch may decide: parts of the heads and of the queries, how heads follow each other, who waits for whom."""

    parts: tuple[int, int] = (1, 1)
    one_head_at_a_time: bool = False
    deterministic: bool = True


@contextlib.contextmanager
def deciding(how: Backward) -> Iterator[None]:
    def together(cfg, q, k, sequences, deterministic):
        return min(2, k.shape[0] * k.shape[2]), 1 if how.one_head_at_a_time else q.shape[2]

    with (
        mock.patch.object(config, "backward_parts", return_value=how.parts),
        mock.patch.object(backward_launch, "_together", together),
    ):
        yield


def differentiate(tile, case: Case, tensors: tuple, out: Tensor, lse: Tensor, dlse: Tensor | None, how: Backward) -> tuple:
    """dq, dk and dv, NaN where nothing was written."""
    q, k, v, do = tensors
    left, right, scale, softcap = case.formula
    gradients = tuple(t.fill_(math.nan) for t in meta.attention_bwd(q, k, v))
    dense = config.BACKWARD[tile.D, tile.D_v, tile.mask, tile.softcap, "dense"]
    with deciding(how):
        call = backward_launch.Call(do, q, k, v, out, lse, dlse, scale, (left, right), softcap, how.deterministic)
        backward_launch.launch(dense, call, *gradients)
    return gradients


def differentiate_packed(tile, case: PackedCase, args: tuple, out: Tensor, lse: Tensor, dlse: Tensor | None, how: Backward) -> tuple:
    """The same of packed sequences."""
    q, k, v, do, *offsets = args
    left, right, scale, softcap = case.formula
    gradients = tuple(t.fill_(math.nan) for t in meta.attention_varlen_bwd(q, k, v))
    do, q, k, v, out, lse, dlse = (None if t is None else t.unsqueeze(0) for t in (do, q, k, v, out, lse, dlse))
    with deciding(how):
        call = backward_launch.Call(do, q, k, v, out, lse, dlse, scale, (left, right), softcap, how.deterministic)
        backward_launch.launch_varlen(tile, call, *offsets, *(t.unsqueeze(0) for t in gradients))
    return gradients


@functools.cache
def truth(case: Case, with_dlse: bool) -> tuple[tuple[Tensor, ...], Tensor | None, Result, Result]:
    """The tensors of a case, and what plain PyTorch and float64 say about it."""
    tensors = testing.make(case, seed=1)
    q = tensors[0]
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1], generator=torch.Generator().manual_seed(2)) if with_dlse else None
    return tensors, dlse, testing.plain(case, *tensors, dlse), testing.exact(case, *tensors, dlse)


@functools.cache
def packed_truth(case: PackedCase) -> tuple[tuple[Tensor, ...], Result, Result]:
    """The same of packed sequences."""
    args = testing_varlen.make(case, seed=1)
    return args, testing_varlen.plain(case, *args), testing_varlen.exact(case, *args)


@torch.no_grad()
def check_forward(entry: Entry, case: Case) -> None:
    """Inside `emulated`: out, and lse where the kernel has it, by the closeness rule."""
    _check_dense(entry, case, entry.option, 1)


@torch.no_grad()
def check_split(entry: Entry, case: Case, return_lse: bool, parts: int) -> None:
    """The same of the keys in several parts and of what merges them."""
    assert entry.tile.form == "split"
    assert parts > 1
    _check_dense(entry, case, return_lse, parts)


def _check_dense(entry: Entry, case: Case, return_lse: bool, parts: int) -> None:
    (q, k, v, _), _, plain, exact = truth(case, False)
    out, lse = attend(entry.tile, q, k, v, case, return_lse, parts)
    testing.assert_no_worse(out, plain.out, exact.out, "out", softcap=case.softcap > 0)
    if return_lse:
        testing.assert_lse(lse, exact.lse)


@torch.no_grad()
def check_packed(entry: Entry, case: PackedCase, spoiled: tuple[int, ...] | None = None) -> None:
    """The same of each sequence alone, and nobody else's rows are written. `spoiled`: these sequences, and all tails, hold NaN."""
    args, plain, exact = packed_truth(case)
    q, k, v, _, *offsets = args if spoiled is None else testing_varlen.spoil(case, args, spoiled)
    out, lse = attend_packed(entry.tile, q, k, v, *offsets, case, entry.option)
    ours = Result(out, lse, *(torch.full_like(t, math.nan) for t in (q, k, v)))
    for n in (n for n in range(len(case.lengths_q)) if n not in (spoiled or ())):
        mine, theirs, truth = (testing_varlen.sequence(case, result, n) for result in (ours, plain, exact))
        testing.assert_no_worse(mine.out, theirs.out, truth.out, f"out of sequence {n}", softcap=case.softcap > 0)
        if entry.option:
            testing.assert_lse(mine.lse, truth.lse)
    testing_varlen.assert_untouched(case, ours)


@torch.no_grad()
def check_backward(entry: Entry, case: Case, with_dlse: bool, how: Backward) -> None:
    """Inside `emulated`: dq, dk and dv by the closeness rule, from an out and lse of the right precision."""
    tensors, dlse, plain, exact = truth(case, with_dlse)
    found = differentiate(entry.tile, case, tensors, exact.out.to(tensors[0].dtype), exact.lse.float(), dlse, how)
    rounding = testing.vanishing(case, *tensors, dlse)
    testing.assert_gradients(case, Result(exact.out, exact.lse, *found), plain, exact, rounding)


# So many sequences of a pack are judged each for itself
FEW = 20


@torch.no_grad()
def check_backward_packed(entry: Entry, case: PackedCase, how: Backward, spoiled: tuple[int, ...] | None = None) -> None:
    """The same of each sequence alone, and 0 for tokens of none. `spoiled` as in `check_packed`."""
    args, plain, exact = packed_truth(case)
    given = args if spoiled is None else testing_varlen.spoil(case, args, spoiled)
    out, lse = exact.out.to(given[0].dtype), exact.lse.float()
    for n in spoiled or ():
        mine = case.slices[n][0]
        out[mine], lse[:, mine] = math.nan, math.nan
    ours = Result(exact.out, exact.lse, *differentiate_packed(entry.tile, case, given, out, lse, None, how))
    if len(case.lengths_q) <= FEW:
        testing_varlen.assert_gradients(case, ours, plain, exact, args, without=spoiled or ())
        return
    # Of hundreds of sequences of a few tokens some are unlucky: there out's own rounding to 16 bits outweighs all that plain gets wrong
    kept = [n for n in range(len(case.lengths_q)) if n not in (spoiled or ())]
    for name in ("dq", "dk", "dv"):
        parts = ([getattr(testing_varlen.sequence(case, result, n), name) for n in kept] for result in (ours, plain, exact))
        testing.assert_no_worse(*(torch.cat(part) for part in parts), name, softcap=case.softcap > 0, gradient=True)
        assert not bool(getattr(testing_varlen.tails(case, ours), name).any()), f"{name}: not 0 beyond the last offset"
