"""What nvcc says of every kernel configuration. `python tests/kernels/resources.py` prints it, says what moved and renews resources.jsonl.

No GPU is needed: TileLang with a CUDA toolkit, or with the one that `pip install tilelang[nvcc]` brings. HGMMA is counted where nvdisasm
lies beside nvcc (pip install nvidia-cuda-nvdisasm, of nvcc's version).
"""

import concurrent.futures
import functools
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# As a script: pytest's `python -m` has the repository root on the path already
sys.path.append(str(Path(__file__).parents[2]))
import catalogue

DATA = Path(__file__).with_name("resources.jsonl")
WARPGROUP = 128
# The kernels with products and with warpgroups of several kinds; the other two only read, add and write
MAIN = ("forward", "backward")
# Those with products
PRODUCTS = (*MAIN, "decode")


class Resources(NamedTuple):
    """registers at launch; registers that the warpgroups ask for with setmaxnreg, in all; bytes spilled; warpgroup products in the source;
    codes of ptxas' remarks (C7510 and its like: every product waits for the one before); HGMMA in the SASS, None where not counted."""

    registers: int
    warpgroups: int
    asked: int
    spilled: int
    products: int
    remarks: list[str]
    hgmma: int | None = None


class Gate(NamedTuple):
    """One configuration's resources (None where nvcc refused it), the rules that it breaks, and the seconds that it took."""

    found: Resources | None
    broken: list[str]
    lowering: float
    nvcc: float


def missing() -> str | None:
    """What the gates need and this machine does not have."""
    if importlib.util.find_spec("tilelang") is None:
        return "no tilelang here"
    from tilelang.contrib import nvcc

    try:
        compiler = nvcc.get_nvcc_compiler()
    except RuntimeError as error:
        return f"no nvcc here ({error})"
    return None if Path(compiler).exists() else f"no nvcc here (there is no {compiler})"


@functools.cache
def versions() -> dict[str, str]:
    import tilelang
    from tilelang.contrib import nvcc

    text = subprocess.run([nvcc.get_nvcc_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    return {"tilelang": tilelang.__version__, "nvcc": re.findall(r"V(\d+\.\d+\.\d+)", text)[0]}


def disassembler() -> Path | None:
    """nvdisasm of the toolkit in use; another version's need not know this one's code."""
    from tilelang.contrib import nvcc

    tool = Path(nvcc.get_nvcc_compiler()).with_name("nvdisasm")
    return tool if tool.exists() else None


def gate(name: str) -> Gate:
    """Lowers one configuration and has nvcc compile it, once."""
    start = time.perf_counter()
    entry = catalogue.entries()[name]
    source = catalogue.code(entry).device
    lowered = time.perf_counter()
    try:
        found, refused = measure(source), []
    except RuntimeError as error:
        found, refused = None, [str(error)]
    return Gate(found, broken(entry.family, source, found) + refused, lowered - start, time.perf_counter() - lowered)


def measure(source: str) -> Resources:
    """What ptxas says of the CUDA source of a kernel; RuntimeError with nvcc's words if it does not compile."""
    said, sass = _compile(source)
    spills = _found(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return Resources(
        registers=max(map(int, _found(r"Used (\d+) registers", said))),
        warpgroups=_warpgroups(source),
        asked=sum(setmaxnreg(source)),
        spilled=sum(int(number) for numbers in spills for number in numbers),
        products=_products(source),
        remarks=sorted({_code(line) for line in said.splitlines() if re.search(r"\bC75\d\d\b|serialized", line)}),
        hgmma=None if sass is None else len(re.findall(r"\bHGMMA\b", sass)),
    )


def setmaxnreg(source: str) -> list[int]:
    """The registers a thread that each call asks for."""
    return [int(number) for number in re.findall(r"warpgroup_reg_(?:de)?alloc<(\d+)>", source)]


def broken(family: str, source: str, found: Resources | None) -> list[str]:
    """Each rule that a kernel breaks, with the value that breaks it."""
    asked, warpgroups = setmaxnreg(source), _warpgroups(source)
    rules = [(n % 8 == 0 and 24 <= n <= 256, f"setmaxnreg {n}: must be a multiple of 8 from 24 to 256") for n in sorted(set(asked))]
    if family in MAIN:
        rules.append((len(asked) == warpgroups, f"setmaxnreg {asked}: must be one call for each of {warpgroups} warpgroups"))
    if family in PRODUCTS:
        rules.append((_products(source) > 0, "products 0: no wgmma in the source"))
    if found is not None:
        launched = found.registers * warpgroups
        rules.append((found.spilled == 0, f"spilled {found.spilled} bytes: must be 0"))
        rules.append((not found.remarks, f"remarks {found.remarks}: ptxas must have none on wgmma or setmaxnreg"))
        rules.append((found.asked <= launched, f"asked {found.asked}: more registers than the {launched} of the launch, it would hang"))
        rules.append((family not in PRODUCTS or found.hgmma != 0, "hgmma 0: no HGMMA in the SASS"))
    return [text for holds, text in rules if not holds]


def moved(before: Resources, now: Resources) -> list[str]:
    """The fields that differ. HGMMA only where both counted it."""
    either = zip(Resources._fields, before, now, strict=True)
    return [f"{field} {old} -> {new}" for field, old, new in either if old != new and not (field == "hgmma" and None in (old, new))]


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()] if DATA.exists() else []


def committed() -> dict[str, Resources]:
    """The rows of the versions in use, empty where they are not in the data."""
    return {row["kernel"]: Resources(**row["resources"]) for row in read() if versions().items() <= row.items()}


def _compile(source: str) -> tuple[str, str | None]:
    """What ptxas said, and the SASS where there is a disassembler."""
    from tilelang.contrib import nvcc

    # As TileLang compiles it (tilelang/cuda/backend.py), and ptxas made to speak
    options = ["-gencode", "arch=compute_90a,code=sm_90a", "-std=c++20", "-O3", "-w", "--use_fast_math", "-Xptxas", "-v", "--cubin"]
    with tempfile.TemporaryDirectory() as folder:
        file, made = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        file.write_text(source)
        include = [f"-I{nvcc.TILELANG_TEMPLATE_PATH}", f"-I{nvcc.CUTLASS_INCLUDE_DIR}"]
        said = _run([nvcc.get_nvcc_compiler(), *options, *include, "-o", str(made), str(file)])
        tool = disassembler()
        return said, tool and _run([str(tool), "--print-code", str(made)])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def _found(pattern: str, said: str) -> list[Any]:
    numbers = re.findall(pattern, said)
    # Else other words of a new ptxas would read as no spill
    if not numbers:
        raise RuntimeError(f"ptxas does not say {pattern!r} any more: {said[-2000:]}")
    return numbers


def _warpgroups(source: str) -> int:
    return int(re.findall(r"__launch_bounds__\((\d+)", source)[0]) // WARPGROUP


def _products(source: str) -> int:
    return len(re.findall(r"tl::wgmma_[rs]s<", source))


def _code(line: str) -> str:
    found = re.search(r"\bC75\d\d\b", line)
    return found[0] if found else line.strip()


def _all() -> dict[str, Gate]:
    """Every gate, on all cores, with a line of progress each."""
    names = list(catalogue.entries())
    gates = {}
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(gate, name): name for name in names}
        for number, done in enumerate(concurrent.futures.as_completed(waiting), 1):
            name = waiting[done]
            gates[name] = one = done.result()
            progress = f"{number}/{len(names)} {name}: lowering {one.lowering:.1f} s, nvcc {one.nvcc:.1f} s"
            print(progress, file=sys.stderr, flush=True)
    return {name: gates[name] for name in names}


def table(gates: Mapping[str, Gate]) -> str:
    lines = [f"{'kernel':40} registers  asked/launched  spilled  products  HGMMA  remarks"]
    for name, one in gates.items():
        if (r := one.found) is not None:
            launched, hgmma = r.registers * r.warpgroups, "-" if r.hgmma is None else r.hgmma
            counts = f"{r.registers:9}  {r.asked:>5}/{launched:<8}  {r.spilled:7}  {r.products:8}  {hgmma:>5}"
            lines.append(f"{name:40} {counts}  {' '.join(r.remarks)}".rstrip())
    return "\n".join(lines)


def changes(before: Mapping[str, Resources], gates: Mapping[str, Gate]) -> list[str]:
    """Which configurations moved against the rows of these versions, came or went, and which break a rule."""
    now = {name: one.found for name, one in gates.items() if one.found is not None}
    lines = [f"{name} moved: {', '.join(fields)}" for name in now if name in before and (fields := moved(before[name], now[name]))]
    lines += [f"{name} is new" for name in now if name not in before] + [f"{name} is gone" for name in before if name not in gates]
    return lines + [f"{name} BREAKS {rule}" for name, one in gates.items() for rule in one.broken]


def main() -> None:
    if missing():
        sys.exit(missing())
    before, gates = committed(), _all()
    print(", ".join(f"{tool} {version}" for tool, version in versions().items()))
    print(table(gates))
    print("\n".join(changes(before, gates) or ["nothing moved"]))
    # Other versions keep their rows, of the configurations that still are
    rows = [row for row in read() if not versions().items() <= row.items() and row["kernel"] in gates]
    rows += [{"kernel": name, **versions(), "resources": one.found._asdict()} for name, one in gates.items() if one.found]
    rows.sort(key=lambda row: (row["tilelang"], row["nvcc"], list(gates).index(row["kernel"])))
    DATA.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
