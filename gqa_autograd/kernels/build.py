"""Compile once per configuration: remembered in the process, kept on disk, built by one thread and one process at a time."""

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_lock = threading.RLock()
_kernels: dict[tuple, Any] = {}


class Program(NamedTuple):
    """A kernel before it is compiled: `factory` is a @tilelang.jit function, `configuration` its arguments."""

    name: str
    factory: Any
    configuration: tuple


def kernel(program: Program) -> Any:
    """The compiled kernel; compiled, or read from disk, at the first call."""
    key = (program.name, program.configuration)
    found = _kernels.get(key)
    if found is None:
        with _lock:
            found = _kernels.get(key)
            if found is None:
                with _one_process_at_a_time(f"{program.name}{program.configuration}"):
                    found = program.factory.compile(*program.configuration)
                _kernels[key] = found
    return found


def built() -> int:
    """How many kernels this process has compiled or read from disk: one per configuration, whatever the shapes."""
    return len(_kernels)


@contextlib.contextmanager
def _one_process_at_a_time(name: str) -> Iterator[None]:
    """TileLang's disk cache is written by rename, so it is safe without this; the lock spares the ranks of a job from compiling the same
    kernel side by side: the first compiles, the others read."""
    folder = Path(os.environ.get("TILELANG_CACHE_DIR", Path.home() / ".tilelang" / "cache")) / "gqa_autograd_locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / hashlib.sha256(name.encode()).hexdigest()[:16], os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        # A read-only cache folder has its kernels, or TileLang says what is wrong with it
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
