"""Compiles generated CUDA and host C as CPU code against the headers in runtime/, into one shared object per kernel, kept in a cache."""

import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from .lower import Code

RUNTIME = Path(__file__).with_name("runtime")
CXX = os.environ.get("CXX", "g++")
COMMON = ["-g1", "-fPIC", "-w", "-fno-strict-aliasing"]
CPP = [*COMMON, "-std=c++20", "-fvisibility=hidden", "-fno-gnu-unique"]
# -fsanitize=thread makes every load and store a call, which runtime/memory.cpp answers; a call in the tail would hide its line
KERNEL = [*CPP, "-O2", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-fno-optimize-sibling-calls", "-Wno-psabi"]
# The host code's calls into TVM, as names of runtime/host.cpp
HOST_NAMES = {
    "TVMBackendGetFuncFromEnv": "emu_host_find",
    "TVMFFIFunctionCall": "emu_host_call",
    "TVMFFIErrorSetRaisedFromCStr": "emu_host_error",
    "TVMFFIEnvTensorAlloc": "emu_host_allocate",
}
KERNEL_HEAD = re.compile(r"__global__ void __launch_bounds__\((\d+), (\d+)\) (\w+)\(")
DECLARATION = re.compile(r'^extern "C" __global__ void \w+\([^{;]*\);', re.MULTILINE)
DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")
INLINE_PTX = re.compile(r'asm(?: volatile)?\s*\(\s*((?:"(?:[^"\\]|\\.)*"\s*)+)(.*?)\);', re.DOTALL)


class Unknown(NotImplementedError):
    """The kernel uses something that the emulator does not know."""


def cache_folder() -> Path:
    return Path(os.environ.get("HOPPER_EMULATOR_CACHE", Path.home() / ".cache" / "hopper_emulator"))


def build(code: Code, ptx: Mapping[str, str]) -> Path:
    """The shared object for this code; beside it lies kernel.cpp, the CUDA with its line numbers."""
    source = to_cpp(code.device, ptx)
    folder = cache_folder() / _digest(source, *code, _runtime_digest())
    if not (folder / "kernel.so").exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Built aside and renamed, so that a process that looks meanwhile sees all or nothing
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            _compile(Path(aside), folder, source, code)
    return folder / "kernel.so"


def to_cpp(device: str, ptx: Mapping[str, str]) -> str:
    """The CUDA text as C++, line by line the same: other headers, other words for dynamic shared memory, and inline PTX by the table."""
    source = re.sub(r"#include <(?:tl_templates/[\w/.]+|math_constants\.h|cuda\w*\.h)>", '#include "kernel.h"', device)
    # The one dynamic buffer; a kernel with a single shared buffer gives it that one's name and type
    source = DYNAMIC_SHARED.sub(r"\1* const \2 = reinterpret_cast<\1*>(tl::buf_dyn_shmem);", source)
    return INLINE_PTX.sub(lambda found: _translate(found, ptx, source), source)


def entries(device: str) -> str:
    """C++ by which the host code finds the kernels. Not in the kernel's file, where each of its accesses would be checked."""
    kernels = KERNEL_HEAD.findall(device)
    if not kernels:
        raise Unknown("hopper_emulator: no __global__ function with __launch_bounds__(threads, blocks) in the source")
    dynamic = str("extern __shared__" in device).lower()
    lines = [f"EMULATED_KERNEL({name}, {blocks}, {dynamic})" for _, blocks, name in kernels]
    return "\n".join(['#include "kernel.h"', '#include "host.h"', *DECLARATION.findall(device), *lines, ""])


def normalised(ptx: str) -> str:
    """Inline PTX without C's quotes and escapes, each run of white space as one blank: the key of a `ptx` table."""
    text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', ptx)).replace("\\n", " ").replace("\\t", " ")
    return " ".join(text.split())


def _translate(found: re.Match, ptx: Mapping[str, str], source: str) -> str:
    template = normalised(found[1])
    if template not in ptx:
        line = source.count("\n", 0, found.start()) + 1
        raise Unknown(f"hopper_emulator: unknown inline PTX in line {line}: {template!r}; give its C++ in the table `ptx`")
    operands = re.findall(r'"[=+]?\w+"\s*\(((?:[^()]|\([^()]*\))*)\)', found[2])
    # Line breaks inside the statement stay, for the numbers of the lines after it
    return ptx[template].format(*operands) + "\n" * found[0].count("\n")


def _compile(aside: Path, folder: Path, source: str, code: Code) -> None:
    # Compiled in its final place, which the line table then names; renamed into it, since another process may be compiling it just now
    (aside / "kernel.cpp").write_text(source)
    (aside / "kernel.cpp").rename(folder / "kernel.cpp")
    (aside / "entries.cpp").write_text(entries(code.device))
    (aside / "host.c").write_text(code.host)
    include = [f"-I{RUNTIME}", *(f"-I{path}" for path in _tvm_headers())]
    names = [f"-D{theirs}={ours}" for theirs, ours in HOST_NAMES.items()]
    _run([CXX, *KERNEL, *include, "-include", "kernel.h", "-c", str(folder / "kernel.cpp"), "-o", f"{aside}/kernel.o"], source)
    _run([CXX, *CPP, "-O1", *include, "-c", f"{aside}/entries.cpp", "-o", f"{aside}/entries.o"])
    _run([CXX, "-x", "c", *COMMON, "-O1", *names, *include, "-c", f"{aside}/host.c", "-o", f"{aside}/host.o"])
    objects = [*(f"{aside}/{part}.o" for part in ("kernel", "entries", "host")), *map(str, _runtime())]
    _run([CXX, "-shared", "-Wl,-Bsymbolic", *objects, "-o", f"{aside}/kernel.so"])
    (aside / "kernel.so").rename(folder / "kernel.so")


@functools.cache
def _runtime() -> tuple[Path, ...]:
    """The runtime's object files, compiled once for all kernels."""
    folder = cache_folder() / f"runtime-{_runtime_digest()}"
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for file in sorted(RUNTIME.glob("*.cpp")):
        made = folder / f"{file.stem}.o"
        if not made.exists():
            aside = folder / f"{file.stem}.{os.getpid()}.o"
            _run([CXX, *CPP, "-O3", *(f"-I{path}" for path in _tvm_headers()), "-c", str(file), "-o", str(aside)])
            aside.rename(made)
        objects.append(made)
    return tuple(objects)


def _tvm_headers() -> list[Path]:
    def package(name: str) -> Path:
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError(f"hopper_emulator needs the headers of the package {name}")
        return Path(found.submodule_search_locations[0])

    return [package("tilelang") / "3rdparty" / "tvm" / "include", package("tvm_ffi") / "include"]


def _run(command: Sequence[str], kernel: str = "") -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"hopper_emulator needs a C++ compiler, and there is no {command[0]!r}; set CXX") from None
    if done.returncode:
        raise _unknown(done.stderr, kernel) or RuntimeError(f"{command[0]} failed:\n{done.stderr[-4000:]}")


def _unknown(errors: str, kernel: str) -> Unknown | None:
    """A compiler error in the kernel means a name or a form that kernel.h does not have."""
    error = re.search(r"error: (.*)", errors)
    line = re.search(r"kernel\.cpp:(\d+)", errors)
    if error is None or line is None:
        return None
    text = kernel.splitlines()[int(line[1]) - 1].strip()
    return Unknown(f"hopper_emulator doesn't know what the kernel uses in line {line[1]}: {text}\n{error[1]}")


@functools.cache
def _runtime_digest() -> str:
    return _digest(CXX, *(file.read_text() for file in (Path(__file__), *sorted(RUNTIME.iterdir()))))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
