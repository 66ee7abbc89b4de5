"""A failure of the emulation in the kernel's own terms: line, buffer, barrier and argument instead of addresses."""

import re
import subprocess
from pathlib import Path

KINDS = {
    "deadlock": "no thread can go on: a phase, a barrier or a lane that never comes",
    "over-arrival": "more arrivals at a barrier than it expects",
    "barrier": "a barrier that is initialised twice, or whose users disagree about it",
    "unwritten": "a read of what nobody wrote",
    "race": "two ordinary accesses, one of them a write, with no order between them",
    "overwrite": "a buffer changed while an asynchronous operation reads or writes it",
    "unwaited": "the result of an asynchronous load used, or left, without a wait for it",
    "store source": "shared memory changed, or gone, before a TMA store has read it",
    "proxy fence": "an asynchronous operation on ordinary writes without fence.proxy.async between them",
    "out of bounds": "an access outside of the arguments or of shared memory",
    "registers": "setmaxnreg beyond the pool, or a count that does not exist",
    "wgmma": "registers used while a product is at work on them, or threads that disagree about a product",
    "tma": "an address, a box or a tensor map that TMA refuses",
    "host": "the kernel's host code refuses the call",
    "unknown": "something that the emulator does not know",
}


class EmulationError(RuntimeError):
    """What went wrong, by kind (see KINDS), and the line of the generated CUDA where it did (None if it is not in one place)."""

    def __init__(self, kind: str, text: str, line: int | None):
        super().__init__(f"{kind}: {text}")
        self.kind, self.line = kind, line


class Names:
    """Resolves the marks that the runtime leaves in a report."""

    def __init__(self, library: Path, base: int, regions: list[tuple[int, int, str]]):
        self.library, self.base, self.regions = library, base, regions
        self.source = (library.parent / "kernel.cpp").read_text().splitlines()

    def error(self, report: str) -> EmulationError:
        kind, text = report.split("|", 1)
        sites = re.findall(r"\{(0x[0-9a-f]+)\}", text)
        lines = {site: self.line(int(site, 16)) for site in dict.fromkeys(sites)}
        text = re.sub(r"\{(0x[0-9a-f]+)\}", lambda m: self.quoted(lines[m[1]]), text)
        text = re.sub(r"\{shared\+(\d+)\}", lambda m: self.shared(int(m[1])), text)
        text = re.sub(r"\{barrier (0x[0-9a-f]+)\}", lambda m: self.barrier(int(m[1], 16)), text)
        text = re.sub(r"\{global (0x[0-9a-f]+)\}", lambda m: self.argument(int(m[1], 16)), text)
        return EmulationError(kind, text.replace("{(nil)}", "the end"), lines[sites[0]] if sites else None)

    def line(self, address: int) -> int | None:
        """The line of the kernel at a return address: the innermost inlined frame that is in the kernel's file."""
        # A return address is behind the call
        command = ["addr2line", "-i", "-e", str(self.library), hex(address - self.base - 1)]
        frames = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"kernel\.cpp:(\d+)", frames)
        return int(found[1]) if found else None

    def quoted(self, line: int | None) -> str:
        return "an unknown line" if line is None else f"line {line} `{self.source[line - 1].strip()[:120]}`"

    def shared(self, offset: int) -> str:
        """The buffer that a byte of dynamic shared memory lies in, by the declarations at the head of the kernel."""
        text = "\n".join(self.source)
        heads = re.findall(r"void\* (\w+) = \(\(void\*\)\(\(char\*\)buf_dyn_shmem \+ (\d+)\)\);", text)
        # A single buffer is declared as the whole
        alone = re.findall(r"\* const (\w+) = reinterpret_cast<\w+\*>\(tl::buf_dyn_shmem\);", text) if not heads else []
        below = [(int(start), name) for name, start in [*heads, *((name, 0) for name in alone)] if int(start) <= offset]
        if not below:
            return f"shared memory + {offset}"
        start, name = max(below)
        return f"{name} + {offset - start}"

    def barrier(self, address: int) -> str:
        """The barrier's variable and index, from the symbols of its static memory."""
        symbols = subprocess.run(["nm", "-C", str(self.library)], capture_output=True, text=True, check=True).stdout
        place = address - self.base
        found = [(int(a, 16), name) for a, name in re.findall(r"^([0-9a-f]+) [a-zA-Z] .*::(\w+)_mem$", symbols, re.MULTILINE)]
        below = [(start, name) for start, name in found if start <= place]
        if not below:
            return f"the barrier at {address:#x}"
        start, name = max(below)
        return f"barrier {name}[{(place - start) // 8}]"

    def argument(self, address: int) -> str:
        """The nearest argument of the call."""
        if not self.regions:
            return hex(address)
        begin, bytes_, name = min(self.regions, key=lambda r: max(r[0] - address, address - r[0] - r[1], 0))
        return f"byte {address - begin} of the storage of {name} ({bytes_} bytes)"
