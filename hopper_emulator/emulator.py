"""Calls a compiled kernel on torch CPU tensors, with every argument in memory of its own between margins."""

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .build import build
from .lower import Code
from .report import EmulationError, Names

SCHEDULES = {"eager": 0, "lazy": 1}
SEEDED = 2
MARGIN = 4096
# DLPack's codes: signed, unsigned, float, bfloat
DTYPES = {
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
}
INT, FLOAT, TENSOR = 1, 3, 7


class _Any(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_uint64))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
    )


class _Memory:
    """Copies of the storages behind some tensors; `valid` marks the bytes that are elements of one of them."""

    def __init__(self, tensors: list[tuple[int, Tensor]]):
        self.copies: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.names: dict[int, list[str]] = {}
        for position, tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.copies:
                whole = torch.tensor([], dtype=torch.uint8).set_(storage)
                copy = torch.full((storage.nbytes() + 2 * MARGIN + 256,), 0xFF, dtype=torch.uint8)
                shift = MARGIN + -(copy.data_ptr() + MARGIN) % 256
                copy[shift : shift + storage.nbytes()] = whole
                self.copies[storage.data_ptr()] = whole, copy[shift : shift + storage.nbytes()], torch.zeros_like(whole)
            self.names.setdefault(storage.data_ptr(), []).append(f"argument {position}")
            self._mark(tensor)

    def _mark(self, tensor: Tensor) -> None:
        valid = self.copies[tensor.untyped_storage().data_ptr()][2]
        size = tensor.element_size()
        shape, strides = (*tensor.shape, size), (*(s * size for s in tensor.stride()), 1)
        valid.as_strided(shape, strides, tensor.storage_offset() * size).fill_(1)

    def address(self, tensor: Tensor) -> int:
        return self.copies[tensor.untyped_storage().data_ptr()][1].data_ptr() + int(tensor.storage_offset()) * tensor.element_size()

    def copy_back(self) -> None:
        for whole, copy, _ in self.copies.values():
            whole.copy_(copy)

    def regions(self) -> list[tuple[int, int, str]]:
        return [(copy.data_ptr(), len(copy), " and ".join(self.names[key])) for key, (_, copy, _) in self.copies.items()]


class Emulator:
    """A kernel that runs on the CPU.

    code:  what `lower` gave, or the get_kernel_source() and get_host_source() of a compiled kernel.
    ptx:   C++ for the inline PTX of the kernel's prelude, by its text with single blanks; {0}, {1}... stand for the operands.
    Raises Unknown where the kernel uses what the emulator does not know."""

    def __init__(self, code: Code, ptx: Mapping[str, str] | None = None):
        self.library = build(code, ptx or {})
        self._so = ctypes.CDLL(str(self.library))
        self._so.emu_failure.restype = self._so.emu_host_failure.restype = ctypes.c_char_p
        self._so.emu_base.restype = ctypes.c_uint64

    def __call__(self, *arguments: Any, schedule: str | int = "eager", check_order: bool = True) -> None:
        """Runs it; results are in the tensors. Raises EmulationError; the tensors are then as they were.

        schedule:    "eager", an asynchronous operation is done when it is issued; "lazy", only when no thread can go on; or a number, the
                     seed of a random order of warps and asynchronous operations.
        check_order: False lets accesses race; that then shows as a wrong value, or in this schedule not at all."""
        tensors = [(i, a) for i, a in enumerate(arguments) if isinstance(a, Tensor)]
        memory = _Memory(tensors)
        self._tell_regions(memory)
        packed, keep = self._packed(arguments, memory)
        how, seed = (SEEDED, schedule) if isinstance(schedule, int) else (SCHEDULES[schedule], 0)
        self._so.emu_begin(how, seed, check_order)
        result = _Any()
        status = self._so["__tvm_ffi_main"](None, packed, len(arguments), ctypes.byref(result))
        del keep
        if status:
            self._raise(memory)
        memory.copy_back()

    def _packed(self, arguments: tuple, memory: _Memory) -> tuple[Any, list]:
        packed, keep = (_Any * len(arguments))(), []
        for slot, a in zip(packed, arguments, strict=True):
            if isinstance(a, Tensor):
                shape, strides = (ctypes.c_int64 * a.ndim)(*a.shape), (ctypes.c_int64 * a.ndim)(*a.stride())
                tensor = _DLTensor(
                    memory.address(a), 2, 0, a.ndim, *DTYPES[a.dtype], 1, ctypes.addressof(shape), ctypes.addressof(strides), 0
                )
                keep += [shape, strides, tensor]
                slot.kind, slot.value = TENSOR, ctypes.addressof(tensor)
            elif isinstance(a, float):
                slot.kind, slot.value = FLOAT, int(np.float64(a).view(np.uint64))
            else:
                slot.kind, slot.value = INT, a & (2**64 - 1)
        return packed, keep

    def _tell_regions(self, memory: _Memory) -> None:
        n = len(memory.copies)
        bases, sizes, valid = (ctypes.c_void_p * n)(), (ctypes.c_size_t * n)(), (ctypes.c_void_p * n)()
        for i, (_, copy, mark) in enumerate(memory.copies.values()):
            bases[i], sizes[i], valid[i] = copy.data_ptr(), len(copy), mark.data_ptr()
        self._so.emu_regions(n, bases, sizes, valid)

    def _raise(self, memory: _Memory) -> None:
        report = self._so.emu_failure().decode(errors="replace")
        if report:
            raise Names(self.library, self._so.emu_base(), memory.regions()).error(report)
        raise EmulationError("host", self._so.emu_host_failure().decode(errors="replace"), None)
