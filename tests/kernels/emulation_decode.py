"""The launch function of decoding on CPU tensors, with the emulator in place of the GPU."""

import contextlib
import functools
import math
from collections.abc import Iterator
from unittest import mock

import emulation
import torch
from catalogue import Entry
from emulation import Machine
from torch import Tensor

from gqa_autograd import meta, testing_decode
from gqa_autograd.kernels import config, decode_launch, device
from gqa_autograd.testing_decode import DecodeCase, Given
from hopper_emulator import Emulator


@contextlib.contextmanager
def emulated(machine: Machine, other: Emulator | None = None) -> Iterator[Tensor]:
    """`launch` runs the emulator, or `other` in its place. Gives the counters, which must be 0 before and after each launch."""
    counters = torch.zeros(2 * machine.multiprocessors, dtype=torch.int32)

    def executable(cfg, dtype):
        return functools.partial(other or emulation.emulator(Entry("decode", cfg, dtype, False)), schedule=machine.schedule)

    facts = {
        "require_hopper": lambda function, device: None,
        "multiprocessors": lambda device: machine.multiprocessors,
        "is_current": lambda index: True,
    }
    with (
        mock.patch.multiple(device, **facts),
        mock.patch.object(decode_launch, "executable", executable),
        mock.patch.object(decode_launch, "_workspace", emulation._poisoned_workspace(decode_launch._workspace)),
        mock.patch.object(decode_launch, "_counters", return_value=counters),
    ):
        yield counters


def decode(given: Given, return_lse: bool = True) -> tuple[Tensor, Tensor]:
    """out and lse, NaN where nothing was written; without return_lse, lse stays NaN."""
    case = given.case
    left, right, scale, softcap = case.formula
    tile = config.decode("attention_decode", case.D, case.S_page, softcap)
    out, lse = (t.fill_(math.nan) for t in meta.attention_decode_fwd_lse(given.q))
    launch = decode_launch.plan(tile, *given.arguments[:3], given.page_table, scale, (left, right), softcap)
    launch(*given.arguments, given.page_table, out, lse if return_lse else None)
    return out, lse


@functools.cache
def made(case: DecodeCase) -> Given:
    return testing_decode.make(case, seed=1)


@torch.no_grad()
def check(given: Given, machine: Machine, return_lse: bool = True, other: Emulator | None = None) -> None:
    """By the closeness rule; the counters are set back, so that the next launch finds them at 0."""
    with emulated(machine, other) as counters:
        out, lse = decode(given, return_lse)
        assert not bool(counters.any()), "counters are not 0 after the launch"
    testing_decode.check(given, out, lse if return_lse else None)
