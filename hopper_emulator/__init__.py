"""Runs Hopper kernels that TileLang generated on a CPU, and says where they race, deadlock or read what nobody wrote.

    code = lower(factory, *configuration)      # factory: a @tilelang.jit function; no nvcc and no GPU needed
    emulator = Emulator(code)
    emulator(q, k, v, out, lse, scale)         # torch CPU tensors and numbers, in the order of the prim_func; EmulationError if it is wrong

docs/testing.md shows how to work with it. Needs torch, numpy, tilelang's headers and a C++ compiler (g++), and nothing of gqa_autograd."""

from .build import Unknown
from .emulator import Emulator
from .lower import Code, lower
from .report import KINDS, EmulationError

__all__ = ["KINDS", "Code", "EmulationError", "Emulator", "Unknown", "lower"]
